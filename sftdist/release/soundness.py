"""Is a model folder fit to be judged at all? Asked of its files before it is asked any prompt, without torch.

What is found here would make every figure that follows a figure of something else: weights that are not finite, files
that were changed after their export, another chat template than the one of training, a model that never stops, and
weights that are the base's own, where nothing was learned or an adapter was not merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import GateError
from sftdist.core.storage import MANIFEST, read_json, verify_directory
from sftdist.release.tensors import Tensor, rounded, tensors_in

ADAPTER = "adapter"  # beside the merged model
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEMPLATE, _TOKENIZER, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
_GENERATION = "generation_config.json"
_SHOWN = 5


@dataclass(frozen=True)
class Training:
    """What the run says of its model: `outline` (R/model: tokenizer and template of training, and the ids that end an
    answer), and the folder of the base, where there is one on this machine."""

    outline: Path
    base: Path | None


def require_sound(folder: Path, training: Training) -> None:
    """Raises GateError with everything that is wrong with the model in a folder."""
    if found := faults(folder, training):
        more = f"\n... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise GateError(f"{folder} cannot be released:\n" + "\n".join(found[:_SHOWN]) + more)


def faults(folder: Path, training: Training) -> list[str]:
    """Everything that is wrong, each with what to do; what is wrong with the weights comes first."""
    if (folder / _ADAPTER_CONFIG).is_file():
        return [
            f"{folder}: given an adapter alone, required the merged model with the adapter beside it; make it with "
            "sftdist export run.dir=R export.merge=true and name its folder: candidate=R/export-step-..."
        ]
    found = [*_changed(folder), *_template(folder, training.outline), *_stops(folder, training.outline)]
    try:
        tensors = tensors_in(folder)
    except ValueError as problem:
        return [f"{problem}; export the model again", *found]
    learned = [] if training.base is None else _learned(folder, tensors, training.base)
    return [*_weights(folder, tensors), *learned, *found]


def _changed(folder: Path) -> list[str]:
    """Files that are not what the export wrote."""
    if not (folder / MANIFEST).is_file():
        return [
            f"{folder}: it has no {MANIFEST}, so nothing says what was exported; export it: sftdist export run.dir=R"
        ]
    return [f"{problem}; export the model again" for problem in verify_directory(folder)]


# --- the template -------------------------------------------------------------------------------------


def _template(folder: Path, outline: Path) -> Iterator[str]:
    """What differs from the tokenizer and the template that the run trained with."""
    advice = f"training used the one in {outline}: copy it back, or train with the new one"
    for name in (_TEMPLATE, _TOKENIZER):
        if _content(folder / name) != _content(outline / name):
            what = "the chat template" if name == _TEMPLATE else "the tokenizer"
            yield f"{folder / name}: {what} is not the one of training; {advice}"
    here, there = _json(folder / _TOKENIZER_CONFIG), _json(outline / _TOKENIZER_CONFIG)
    if changed := sorted(key for key in {**here, **there} if here.get(key) != there.get(key)):
        yield f"{folder / _TOKENIZER_CONFIG}: {', '.join(changed)} not as in training; {advice}"


def _stops(folder: Path, outline: Path) -> Iterator[str]:
    """Ids that ended an answer in training, and would not end one when the model is served."""
    wanted = set(_json(outline / "facts.json").get("stop_ids", []))
    given = _json(folder / _GENERATION).get("eos_token_id")
    has = {given} if isinstance(given, int) else set(given or [])
    if missing := sorted(wanted - has):
        yield (
            f"{folder / _GENERATION}: given eos_token_id {sorted(has)}, required {sorted(wanted)}: without {missing} "
            "answers would not end where they ended in training; export the model again"
        )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


# --- the weights --------------------------------------------------------------------------------------


def _weights(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that are absent, empty, or hold a value that is not finite."""
    if not tensors:
        yield f"{folder}: it holds no weights, required model*.safetensors"
    listed = _json(folder / _INDEX).get("weight_map", {})
    if wrong := sorted(name for name, file in listed.items() if name not in tensors or tensors[name].file.name != file):
        yield f"{folder / _INDEX}: {', '.join(wrong[:_SHOWN])} not in the file that it names; export the model again"
    for name, tensor in tensors.items():
        if not tensor.size:
            yield f"{tensor.file}: {name} is empty; export the model again"
        elif (bad := tensor.non_finite()) is not None:
            count, first = bad
            yield (
                f"{tensor.file}: {name} holds {count:,} value{'s' * (count > 1)} that {'are' if count > 1 else 'is'} "
                f"not finite (NaN or infinite), the first at {first:,}; export an earlier checkpoint of the run"
            )


def _learned(folder: Path, tensors: Mapping[str, Tensor], base: Path) -> list[str]:
    """Weights that are still the base's, though the run trained them."""
    try:
        before = tensors_in(base)
    except ValueError:
        return []  # weights in another form: nothing to compare with
    shared = {name for name, tensor in tensors.items() if name in before and before[name].shape == tensor.shape}
    same = {name for name in shared if is_same(tensors[name], before[name])}
    has_adapter = (folder / ADAPTER / _ADAPTER_CONFIG).is_file()
    if same and same == set(tensors):
        why = (
            f"the adapter in {folder / ADAPTER} is not merged into them; merge it: sftdist export run.dir=R"
            if has_adapter
            else "nothing was learned, or the base was put in the place of the tuned model; name the run's own export"
        )
        return [f"{folder}: its weights are those of the base {base}: {why}"]
    if not has_adapter:
        return []
    skipped = [name for name in sorted(same) if _changes(folder / ADAPTER, before[name], tensors[name].dtype)]
    return [
        f"{folder}: {name} is as in the base {base}, but the adapter changes it: it was left out of the merge; merge "
        "again: sftdist export run.dir=R"
        for name in skipped
    ]


def is_same(tuned: Tensor, base: Tensor) -> bool:
    """Whether a tensor holds the base's values: also where those were only rounded to another dtype."""
    if tuned.dtype == base.dtype:
        return all(np.array_equal(a, b) for a, b in zip(tuned.blocks(), base.blocks(), strict=True))
    try:
        return all(
            np.array_equal(a, rounded(b, tuned.dtype)) for a, b in zip(tuned.values(), base.values(), strict=True)
        )
    except ValueError:  # integers beside floats
        return False


def _changes(adapter: Path, base: Tensor, dtype: str) -> bool:
    """Whether an adapter, merged into a tensor of the base, changes what `dtype` can hold of it: base + s·B·A."""
    config, parts = _json(adapter / _ADAPTER_CONFIG), tensors_in(adapter)
    stem = f"base_model.model.{base.name.removesuffix('.weight')}"
    pair = [parts.get(f"{stem}.lora_{side}.weight") for side in "BA"]
    if pair[0] is None or pair[1] is None or len(base.shape) != 2:
        return False
    up, down = (_matrix(part) for part in pair if part is not None)
    rank = down.shape[0]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    change, before = (up @ down) * np.float32(scale), _matrix(base)
    change = change if change.shape == before.shape else change.T  # layers that hold their weight turned around
    return not np.array_equal(rounded(before + change, dtype), rounded(before, dtype))


def _matrix(tensor: Tensor) -> NDArray[np.float32]:
    return np.concatenate([*tensor.values()]).reshape(tensor.shape)
