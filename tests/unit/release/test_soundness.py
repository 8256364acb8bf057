"""What is found in a model folder before it is asked any prompt: each fault planted, and named."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sftdist.core.errors import GateError
from sftdist.core.storage import write_json, write_manifest
from sftdist.release.soundness import Training, faults, is_same, require_sound
from sftdist.release.tensors import Tensor, rounded, tensors_in

Q, K, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {Q: (8, 8), K: (4, 8), NORM: (8,)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As an export writes it, with the files that decide whether an answer ends."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    write_json(folder / "tokenizer_config.json", {"eos_token": "<end>"})
    write_json(folder / "generation_config.json", {"eos_token_id": [0, 2]})
    write_manifest(folder)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Training]:
    """A tuned model, what its run says of it, and its base; all is well."""
    write(tmp_path / "base", weights(0))
    write(tmp_path / "export", weights(1))
    write(tmp_path / "model", weights(1))
    write_json(tmp_path / "model" / "facts.json", {"stop_ids": [0, 2], "token_rows": []})
    return tmp_path / "export", Training(tmp_path / "model", tmp_path / "base")


def test_a_sound_model(run: tuple[Path, Training]) -> None:
    assert faults(*run) == []
    require_sound(*run)


def test_everything_is_reported_at_once(run: tuple[Path, Training]) -> None:
    folder, training = run
    write(folder, {**weights(1), Q: torch.full((8, 8), float("inf"))})
    (folder / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(GateError) as refused:
        require_sound(folder, training)
    assert refused.value.exit_code == 4
    for words in ("64 values that are not finite", "the chat template is not the one of", "manifest.json says"):
        assert words in str(refused.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_value_in_each_dtype_is_found_at_its_place(
    run: tuple[Path, Training], dtype: torch.dtype, value: str
) -> None:
    folder, training = run
    tensors = weights(1, dtype)
    poisoned = tensors[Q].float()
    poisoned[3, 5] = float(value)
    if dtype == torch.float8_e4m3fn and value != "nan":
        pytest.skip("this dtype has no infinity")
    write(folder, {**tensors, Q: poisoned.to(dtype)})
    (found,) = faults(folder, training)
    assert f"model.safetensors: {Q} holds 1 value that is not finite" in found
    assert "the first at 29" in found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_values_are_no_fault(run: tuple[Path, Training], dtype: torch.dtype) -> None:
    """Of F8_E4M3 all but one pattern with a full exponent are numbers."""
    folder, training = run
    limits = torch.finfo(dtype)
    extremes = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    write(folder, {**weights(1, dtype), NORM: extremes.to(dtype)})
    assert faults(folder, training) == []


def test_the_scan_reads_block_by_block(tmp_path: Path) -> None:
    """The last value of a tensor that is larger than a block; and integers have no such value."""
    values = torch.zeros(1000, dtype=torch.bfloat16)
    values[999] = float("nan")
    values[500] = float("inf")
    save_file({"a": values, "b": torch.full((9,), -1)}, tmp_path / "model.safetensors")
    tensors = tensors_in(tmp_path)
    assert [len(block) for block in tensors["a"].blocks(300)] == [300, 300, 300, 100]
    assert tensors["a"].non_finite() == (2, 500)
    assert tensors["b"].non_finite() is None


@pytest.mark.long
def test_the_scan_takes_little_memory(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2**28, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")  # 512 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert tensors_in(tmp_path)["a"].non_finite() is None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 * 1024 * (1 if sys.platform == "linux" else 1024), "in KiB"


def test_files_that_were_changed_after_the_export(run: tuple[Path, Training]) -> None:
    folder, training = run
    save_file(weights(2), folder / "model.safetensors", metadata={"format": "pt"})
    (found,) = faults(folder, training)
    assert "model.safetensors: its sha256 is not the one in manifest.json" in found
    (folder / "manifest.json").unlink()
    (found,) = faults(folder, training)
    assert "it has no manifest.json" in found


Edit = Callable[[Path], object]
TEMPLATES: dict[str, tuple[Edit, str]] = {
    "template": (lambda to: (to / "chat_template.jinja").write_text("{{ other }}"), "the chat template is not the one"),
    "no template": (lambda to: (to / "chat_template.jinja").unlink(), "the chat template is not the one of training"),
    "tokenizer": (lambda to: (to / "tokenizer.json").write_text("{ }"), "the tokenizer is not the one of training"),
    "settings": (
        lambda to: write_json(to / "tokenizer_config.json", {"eos_token": "<end>", "add_bos_token": True}),
        "tokenizer_config.json: add_bos_token not as in training",
    ),
    "stops": (
        lambda to: write_json(to / "generation_config.json", {"eos_token_id": 2}),
        "given eos_token_id [2], required [0, 2]: without [0] answers would not end",
    ),
    "no stops": (lambda to: (to / "generation_config.json").unlink(), "given eos_token_id [], required [0, 2]"),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_another_template_than_in_training(run: tuple[Path, Training], fault: str) -> None:
    """Written into the manifest, too: whoever changes a template may export it again with it."""
    folder, training = run
    edit, words = TEMPLATES[fault]
    edit(folder)
    write_manifest(folder)
    (found,) = faults(folder, training)
    assert words in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_in_the_place_of_the_tuned_model(run: tuple[Path, Training], dtype: torch.dtype) -> None:
    """Also where it was only rounded to another dtype, or cut into other shards."""
    folder, training = run
    write(folder, weights(0, dtype))
    (found,) = faults(folder, training)
    assert "its weights are those of the base" in found
    assert "nothing was learned, or the base was put in the place of the tuned model" in found
    tensors = weights(0, dtype)
    (folder / "model.safetensors").unlink()
    save_file({Q: tensors.pop(Q)}, folder / "model-00001-of-00002.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    write_manifest(folder)
    (found,) = faults(folder, training)
    assert "its weights are those of the base" in found


def test_a_little_learned_is_learned(run: tuple[Path, Training]) -> None:
    """One value in one tensor; and float32 weights that bfloat16 could not tell from the base's."""
    folder, training = run
    tensors = weights(0)
    tensors[NORM][0] += 1e-3
    write(folder, tensors)
    assert faults(folder, training) == []
    base = weights(0, torch.bfloat16)
    write(training.base or folder, base)
    write(folder, {name: tensor.float() * (1 + 2**-12) for name, tensor in base.items()})
    assert faults(folder, training) == []
    write(folder, {name: tensor.float() for name, tensor in base.items()})
    assert len(faults(folder, training)) == 1


def test_another_architecture_is_not_the_base(run: tuple[Path, Training]) -> None:
    folder, training = run
    write(folder, {**weights(0), "lm_head.weight": torch.ones(2, 2)})
    assert faults(folder, training) == []
    write(folder, {**weights(0), NORM: torch.ones(16)})
    assert faults(folder, training) == []


def adapt(folder: Path, *, rslora: bool = False) -> float:
    """An adapter of q and k in `folder/adapter`; its scale."""
    random = torch.Generator().manual_seed(5)
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    parts = {}
    for name, rows in ((Q, 8), (K, 4)):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        parts[f"{stem}.lora_A.weight"] = torch.randn(4, 8, generator=random)
        parts[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=random)
    save_file(parts, adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", {"r": 4, "lora_alpha": 2.0, "use_rslora": rslora})
    return 2.0 / 2 if rslora else 2.0 / 4


def merged(folder: Path, scale: float, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    parts, tensors = load_file(folder / "adapter" / "adapter_model.safetensors"), weights(0)
    for name in names:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[name] += scale * parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"]
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_is_not_merged_or_only_in_part(run: tuple[Path, Training], rslora: bool) -> None:
    folder, training = run
    scale = adapt(folder, rslora=rslora)
    write(folder, merged(folder, scale, (Q, K)))
    assert faults(folder, training) == []
    write(folder, merged(folder, scale, ()))
    (found,) = faults(folder, training)
    assert "is not merged into them; merge it: sftdist export run.dir=R" in found
    write(folder, merged(folder, scale, (Q,)))
    (found,) = faults(folder, training)
    assert f"{K} is as in the base" in found
    assert "it was left out of the merge" in found


def test_a_layer_whose_adapter_changes_nothing_may_stay(run: tuple[Path, Training]) -> None:
    """Its B is zero, or its change is lost in the rounding of the dtype that is written."""
    folder, training = run
    scale = adapt(folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    parts = load_file(file)
    parts[f"base_model.model.{K.removesuffix('.weight')}.lora_B.weight"].mul_(1e-9)
    save_file(parts, file)
    write(folder, {name: tensor.bfloat16() for name, tensor in merged(folder, scale, (Q,)).items()})
    assert faults(folder, training) == []


def test_an_adapter_alone_is_not_released(run: tuple[Path, Training]) -> None:
    folder, training = run
    adapt(folder)
    (found,) = faults(folder / "adapter", training)
    assert "given an adapter alone, required the merged model with the adapter beside it" in found


def test_files_that_are_no_safetensors_are_named(run: tuple[Path, Training]) -> None:
    folder, training = run
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken, words in (
        (whole[:-1], "bytes, its header says"),
        (whole + b"x", "bytes, its header says"),
        (b"", "it is no whole safetensors file"),
        (b"\xff" * 100, "it is no whole safetensors file"),
        ((8).to_bytes(8, "little") + b"{} [] ? ", "its header is not one of safetensors"),
        (whole.replace(b'"F32"', b'"F99"'), "has the dtype F99"),
        (whole.replace(b"[8,8]", b"[8,9]"), "which its shape"),
    ):
        assert broken != whole
        file.write_bytes(broken)
        write_manifest(folder)
        assert words in faults(folder, training)[0]
    file.unlink()
    write_manifest(folder)
    assert "it holds no weights" in faults(folder, training)[0]


def test_an_index_that_names_other_files(run: tuple[Path, Training]) -> None:
    folder, training = run
    write_json(folder / "model.safetensors.index.json", {"weight_map": {Q: "model.safetensors", K: "other", "z": "m"}})
    write_manifest(folder)
    (found,) = faults(folder, training)
    assert f"{K}, z not in the file that it names" in found
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    write_manifest(folder)
    assert "and so does model-2.safetensors" in faults(folder, training)[0]


def test_rounding_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        expected = torch.from_numpy(values.copy()).to(kind).float().numpy()
        assert np.array_equal(rounded(values, dtype), expected, equal_nan=True)


def test_same_says_nothing_of_integers_beside_floats(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int32), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    tensors: dict[str, Tensor] = tensors_in(tmp_path)
    assert not is_same(tensors["a"], tensors["b"])
    assert is_same(tensors["a"], tensors["a"])
