"""A run that begins with a release: what is trained on, what is written down and what is refused; exports of a step.

Two runs of two steps of a tiny model; the rest looks at what they have left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sftdist.commands import chat
from sftdist.commands.export import run as export
from sftdist.core import ledger
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.releases import Release
from sftdist.core.settings import DataConfig, EvaluateConfig, ExportConfig, PlanConfig, PrepareConfig, TrainConfig
from sftdist.core.storage import read_json
from sftdist.evals.identity import identify
from sftdist.release.registry import release
from sftdist.train import run
from tests.e2e.workshop import SMALL, model_folder, write_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

KEYS = ("data.train=my.jsonl", *SMALL, "precision=fp32", "export.dtype=fp32", "train.max_steps=2", "zero.stage=1")
ANSWER = ("--once", "What colour is thing 3?", "--max-new-tokens", "8")


def publish(model: Path, registry: Path, name: str = "bot") -> Release:
    """A release of a model folder, without a gate."""

    def fill(folder: Path) -> Mapping[str, Any]:
        for file in model.iterdir():
            if file.is_file() and file.name != "manifest.json":
                shutil.copyfile(file, folder / file.name)
        return {}

    return release(registry, name, fill, lambda draft: {"model_sha256": identify(model).sha256})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/lora`, whose merged export is bot@v1 and whose base is bot@v2, and `runs/warm`, which began with bot@v1."""
    folder = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model_folder(folder / "model")
        write_rows(folder / "my.jsonl", 60)
        run(compose("lora", ["model.path=model", *KEYS, "run.dir=runs/lora", "optimizer.lr=0.1"]))
        publish(folder / "runs/lora/export", folder / "registry")
        publish(folder / "model", folder / "registry")
        run(compose("full", ["model.path=release:bot@v1", *KEYS, "run.dir=runs/warm", "optimizer.lr=1e-6"]))
    return folder


@pytest.fixture(autouse=True)
def here(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shop)
    return shop


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_that_begins_with_a_release_trains_its_weights_with_a_new_optimizer(shop: Path) -> None:
    begun, tuned = weights(shop / "registry/bot/v1"), weights(shop / "runs/warm/export")
    base = weights(shop / "model")
    moved = max(float((tuned[name] - begun[name]).abs().max()) for name in begun)
    assert 0 < moved < 1e-5, "two steps of a tiny learning rate"
    assert max(float((tuned[name] - base[name]).abs().max()) for name in base) > 1e-3, "the release is not its base"
    steps = [json.loads(line)["step"] for line in (shop / "runs/warm/metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 1, "it does not go on where the other run ended"


def test_where_it_came_from_is_written_down(shop: Path) -> None:
    lora, warm = ledger.read(shop / "runs/ledger.jsonl")
    folder = shop / "registry/bot/v1"
    assert lora["parent"] is None
    assert warm["parent"]["release"] == "bot@v1"
    assert warm["parent"]["model_sha256"] == read_json(folder / "release.json")["model_sha256"]
    assert warm["parent"]["path"] == "registry/bot/v1"


@pytest.mark.parametrize("schema", [TrainConfig, DataConfig, PrepareConfig, PlanConfig, EvaluateConfig])
def test_every_command_finds_it(schema: type[TrainConfig]) -> None:
    given = ["model.path=release:bot", *KEYS, "data.val=my.jsonl"]
    cfg = compose("full", given, schema)
    assert cfg.model.path == "registry/bot/v2", "the one in use"
    pinned = compose("full", [*given, "model.path=release:bot@v1", "registry=./registry"], schema)
    assert pinned.model.path == "registry/bot/v1"


def test_a_release_that_comes_into_use_later_is_another_configuration(shop: Path) -> None:
    words = ["model.path=release:bot", *KEYS]
    with pytest.raises(ConfigError, match=r"model\.path: was 'registry/bot/v1', now 'registry/bot/v2'"):
        run(compose("full", [*words, "run.dir=runs/warm", "optimizer.lr=1e-6"]))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("release:bot@v9", r"model\.path: bot@v9: given the version 'v9', but registry/bot has v1, v2"),
        ("release:bott", r"model\.path: bott: given no release, .*registry has bot; did you mean bot\?"),
    ],
)
def test_a_release_that_is_not_there_is_said(reference: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose("full", [f"model.path={reference}", *KEYS])


def test_a_damaged_release_is_refused_before_anything_is_trained(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop / "registry", tmp_path / "registry")
    damaged = tmp_path / "registry/bot/v1"
    weights_file = damaged / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.chmod(0o644)
    weights_file.write_bytes(content)
    words = ["model.path=release:bot@v1", f"registry={tmp_path / 'registry'}", *KEYS, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"bot@v1 is not what was published:\n.*model\.safetensors"):
        run(compose("full", words))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    (damaged / "release.json").unlink()
    with pytest.raises(ConfigError, match=r"given release:bot@v1, but .* has no release\.json, so it is not whole"):
        compose("full", words)


def test_an_adapter_alone_is_no_start(shop: Path, tmp_path: Path) -> None:
    publish(shop / "runs/lora/export/adapter", tmp_path, "thin")
    with pytest.raises(ConfigError, match=r"thin@v1 has no config\.json: it is an adapter alone"):
        compose("full", ["model.path=release:thin", f"registry={tmp_path}", *KEYS])


def test_an_export_is_merged_or_an_adapter_as_it_is_asked_for(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And both say the same as the model that training ended with."""
    assert chat.main(["runs/lora", *ANSWER]) == 0
    wanted = capsys.readouterr().out
    for merge, has in (("false", "adapter_config.json"), ("true", "config.json")):
        folder = export(compose(overrides=["run.dir=runs/lora", "step=2", f"merge={merge}"], schema=ExportConfig))
        assert folder == Path("runs/lora/export-step-00000002")
        assert (folder / has).is_file()
        assert (folder / "config.json").is_file() == (merge == "true")
        capsys.readouterr()
        assert chat.main(["runs/lora", "--step", "2", *ANSWER]) == 0
        assert capsys.readouterr().out == wanted, f"merge={merge}"
    assert chat.main(["--model", "runs/lora/export/adapter", "--base", *ANSWER]) == 0
    assert capsys.readouterr().out.rstrip("\n").endswith(f"tuned> {wanted}".rstrip("\n"))


def test_a_full_run_has_no_adapter_to_export() -> None:
    with pytest.raises(ConfigError, match=r"merge: given false, but this run trains all weights"):
        export(compose(overrides=["run.dir=runs/warm", "merge=false"], schema=ExportConfig))
