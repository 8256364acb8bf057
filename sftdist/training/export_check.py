"""Is an exported folder the model that was trained? Run as a process of its own, which knows nothing but the files.

`python -m sftdist.training.export_check FOLDER [PROBE]` ends with 0, or with 1 and the reason. Without arguments it
reads them from standard input, a line each: it is started before the folder is written, for its imports take longer
than the check of a small model.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from sftdist.core.distributed import STOP_SIGNALS, die_with_parent
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import verify_directory
from sftdist.model.load import load_strictly

PROBE = "probe.json"
LOGITS = "probe.safetensors"


@dataclass(frozen=True)
class Probe:
    """A prompt, its rendered text and training ids, the template's further variables and the time it was rendered at
    (ISO 8601), and how far logits may be off (`logits_error`)."""

    messages: list[dict[str, Any]]
    text: str
    ids: list[int]
    variables: dict[str, Any]
    clock: str
    tolerance: float


def problems_of(folder: Path) -> list[str]:
    """What is wrong with the files, each by its name: against the manifest, and tensors empty or not finite."""
    problems = verify_directory(folder)
    if problems:
        return problems
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            problems += [f"{path}: {problem}" for problem in _tensor_problems(path)]
        except (OSError, SafetensorError) as error:
            problems.append(f"{path}: cannot be read ({error})")
    return problems


def _tensor_problems(path: Path) -> list[str]:
    problems = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                problems.append(f"{name} is empty")
            elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                problems.append(f"{name} is not finite")
    return problems


@torch.no_grad()
def logits_error(model: nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference to the expected logits [R,T,V] over rows of ids [R,T], as a share of theirs.

    Not the largest difference: rounding alone makes that of a few logits as large as a small fault's.
    """
    got = torch.stack([model(input_ids=row[None], use_cache=False).logits[0].float() for row in ids])
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def check(folder: Path, probe_folder: Path | None, load: Callable[[Path], nn.Module]) -> str:
    """The figures of a folder that passes; CheckpointError for one that does not."""
    problems = problems_of(folder)
    if problems:
        raise CheckpointError("; ".join(problems[:5]))
    model = load(folder)
    if probe_folder is None:
        return f"{sum(p.numel() for p in model.parameters())} parameters"
    probe = Probe(**json.loads((probe_folder / PROBE).read_text(encoding="utf-8")))
    tensors = load_file(probe_folder / LOGITS)
    error = logits_error(model, tensors["ids"], tensors["logits"])
    if not error <= probe.tolerance:
        raise CheckpointError(
            f"logits differ from the live model's by {error:.2e} of their size (allowed: {probe.tolerance:.0e})"
        )
    check_prompt(folder, probe)
    return f"logits within {error:.1e} of the live model's"


def check_prompt(folder: Path, probe: Probe) -> None:
    """The exported tokenizer and template must give the very ids of training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    variables = {**probe.variables, "strftime_now": datetime.fromisoformat(probe.clock).strftime}
    text = tokenizer.apply_chat_template(probe.messages, tokenize=False, add_generation_prompt=True, **variables)
    if text != probe.text:
        raise CheckpointError(f"the exported chat template renders {text!r}, training rendered {probe.text!r}")
    encoded = tokenizer.apply_chat_template(probe.messages, tokenize=True, add_generation_prompt=True, **variables)
    ids = list(encoded["input_ids"] if not isinstance(encoded, list) else encoded)
    if ids != probe.ids:
        raise CheckpointError(f"the exported tokenizer gives {ids[:20]}, training had {probe.ids[:20]}")


def main(arguments: Sequence[str], load: Callable[[Path], nn.Module] = load_strictly) -> int:
    """The exit code; the figures or the reason are printed."""
    die_with_parent()
    logging.disable_progress_bar()
    for number in STOP_SIGNALS:  # a cluster signals every process of a job; the parent decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    words = arguments or sys.stdin.read().splitlines()
    if not words:  # the export was given up, or the parent has ended
        return 1
    folder, *probe = map(Path, words)
    try:
        print(check(folder, probe[0] if probe else None, load))
    except CheckpointError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
