"""Proof 7 (A11): nothing that a run writes is a pickle, so nothing that a run reads can run code."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from safetensors import safe_open

from tests.faults import Job
from tests.saving import Shape

FULL, LORA = Shape(stage=3, steps=4), Shape(stage=2, steps=4, exp="lora")


def open_tensors(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        assert list(file.keys())


def open_lines(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def open_template(path: Path) -> None:
    jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(path.read_text(encoding="utf-8"))


def open_latest(path: Path) -> None:
    assert re.fullmatch(r"checkpoints/step-\d{8}\n", path.read_text(encoding="utf-8"))


OPENERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": open_tensors,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": open_lines,
    ".jinja": open_template,
    ".yaml": lambda path: yaml.safe_load(path.read_text(encoding="utf-8")),
    ".log": lambda path: path.read_text(encoding="utf-8"),
    "LATEST": open_latest,
}


def require_plain(path: Path) -> None:
    """Opens with what its name promises, and does not begin as pickles and torch's zip files do."""
    opener = OPENERS.get(path.suffix) or OPENERS.get(path.name)
    assert opener is not None, f"{path}: what is this?"
    head = path.read_bytes()[:4]
    assert not re.match(rb"\x80[\x00-\x05]|PK\x03\x04|PK\x05\x06", head), f"{path} begins as a pickle does: {head!r}"
    opener(path)


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Path]:
    """A full and a LoRA run, of one rank each, at the same time, with their checkpoints and exports."""
    found = {name: home / f"plain-{name}" for name in ("full", "lora")}
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(Job(1, shape.overrides(run_dir), home))
            for shape, run_dir in zip((FULL, LORA), found.values(), strict=True)
        ]
        for job in jobs:
            assert job.codes(120) == [0], job.screen()
    return found


def test_every_file_of_a_run_is_plain(runs: dict[str, Path]) -> None:
    for run_dir in runs.values():
        for path in run_dir.rglob("*"):
            if path.is_file() and path.name != ".lock" and path.suffix != ".txt":
                require_plain(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", {"checkpoints/step-00000004/part-00000-00.safetensors", "export/model.safetensors"}),
        (
            "lora",
            {
                "checkpoints/step-00000004/part-00000-00.safetensors",
                "export/model.safetensors",
                "export/adapter/adapter_model.safetensors",
                "export/adapter/adapter_config.json",
            },
        ),
    ],
)
def test_what_a_checkpoint_and_an_export_consist_of(runs: dict[str, Path], name: str, expected: set[str]) -> None:
    """The list is known: a file of a new kind has to be looked at here."""
    found = {path.relative_to(runs[name]).as_posix() for path in runs[name].rglob("*") if path.is_file()}
    assert expected <= found
    suffixes = {Path(file).suffix for file in found if file.startswith(("checkpoints/", "export/"))}
    assert suffixes == {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy", "old protocol"])
def test_a_pickle_is_seen(tmp_path: Path, kind: str) -> None:
    """Under a name that promises something else, too."""
    content = {
        "pickle": lambda: pickle.dumps({"step": 3}),
        "torch": lambda: torch_bytes(legacy=False),
        "legacy": lambda: torch_bytes(legacy=True),
        "old protocol": lambda: pickle.dumps({"step": 3}, protocol=0),
    }[kind]()
    for name in ("part-00000-00.safetensors", "state.json", "optimizer.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Exception, match=r".+"):
            require_plain(tmp_path / name)


def torch_bytes(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()
