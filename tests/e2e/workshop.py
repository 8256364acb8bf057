"""A tiny model folder, tiny data and the command line, for the tests of the whole program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftdist.data.template import ChatTemplate
from tests.models import tiny_model
from tests.tokenizers import byte_tokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>")
WORDS = ("red", "green", "blue", "amber", "violet", "teal", "coral", "ivory")
SMALL = (
    "data.max_len=256",
    "data.workers=1",
    "train.packs_per_step=4",
    "optimizer.lr=1e-3",
    "tracking.wandb=disabled",
    "eval.every_steps=0",
)


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two turns, no two alike."""
    made = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        messages = [
            {"role": "user", "content": f"What colour is thing {number}?"},
            {"role": "assistant", "content": f"Thing {number} is {word}. " * (1 + number % 3)},
        ]
        if number % 4 == 0:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": f"Yes, {word}."}]
        made.append({"id": f"row-{number}", "messages": messages})
    return made


def write_rows(path: Path, count: int = 120) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
    return path


def model_folder(path: Path, family: str = "llama", *, padding: int = 0, **changes: Any) -> Path:
    """A tiny random model of the family with a ChatML byte tokenizer, as a user's own model folder. `padding`: rows of
    its vocabulary beyond the tokenizer."""
    template = ChatTemplate.of(byte_tokenizer(specials=SPECIALS), "chatml")
    tokens = len(template.tokenizer)
    model = tiny_model(family, vocab_size=tokens + padding, **changes)
    model.save_pretrained(path)
    template.save(path)
    return path


def sftdist(arguments: Sequence[str], folder: Path, *, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """`sftdist ARGUMENTS` in `folder`, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "sftdist.cli", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment() -> dict[str, str]:
    """Without a torchrun of the test's own, one thread a rank."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def metrics(run_dir: Path, *names: str) -> list[tuple[Any, ...]]:
    """The named fields of every training line."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if line["kind"] == "train"]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Every evaluation line."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"]


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found
