"""A model is known by every file that decides its answers, and by no other."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import run

import pytest

from sftdist.core.errors import ConfigError
from sftdist.core.storage import read_json, write_json
from sftdist.evals.identity import adapter_base, identify, weights_sha256
from tests.evaluated import BASE


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def test_a_copy_is_the_same_model_and_other_files_make_no_difference(model: Path) -> None:
    (model / "README.md").write_text("about")
    (model / "manifest.json").write_text("{}")
    (model / "adapter").mkdir()
    (model / "adapter" / "adapter_model.safetensors").write_bytes(b"below")
    assert identify(model).sha256 == identify(BASE).sha256
    assert set(identify(model).files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    "name", ["model.safetensors", "chat_template.jinja", "generation_config.json", "tokenizer.json", "config.json"]
)
def test_one_byte_of_a_file_that_decides_makes_another_model(model: Path, name: str) -> None:
    data = bytearray((model / name).read_bytes())
    data[-2] ^= 1
    (model / name).write_bytes(data)
    assert identify(model).sha256 != identify(BASE).sha256
    same_weights = weights_sha256(identify(model)) == weights_sha256(identify(BASE))
    assert same_weights == (name != "model.safetensors")


def test_a_file_that_is_gone_makes_another_model(model: Path) -> None:
    (model / "generation_config.json").unlink()
    assert identify(model).sha256 != identify(BASE).sha256


def _adapter(folder: Path, base: str | None) -> Path:
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": base})
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_an_adapter_is_known_with_its_base(model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", str(model))
    before = identify(adapter)
    assert adapter_base(adapter) == model
    assert {"adapter_model.safetensors", "base/model.safetensors", "base/config.json"} <= set(before.files)
    write_json(model / "config.json", {**read_json(model / "config.json"), "changed": 1})
    assert identify(adapter).sha256 != before.sha256
    assert weights_sha256(identify(adapter)) == weights_sha256(before)


@pytest.mark.parametrize("base", [None, "/nowhere/base", "owner/name"])
def test_an_adapter_without_its_base_is_refused(tmp_path: Path, base: str | None) -> None:
    with pytest.raises(ConfigError, match=r"given base_model_name_or_path=.*required the folder.*sftdist export"):
        identify(_adapter(tmp_path / "adapter", base))


def test_a_folder_without_a_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder without weights"):
        identify(tmp_path)
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"weights without config.json"):
        identify(model)


def test_torch_is_not_needed() -> None:
    code = "import sys; import sftdist.evals.identity; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
