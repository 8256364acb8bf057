"""A whole evaluation of tiny models without a run: what a user would name, and the way to judge it on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sftdist import evaluate as command
from sftdist.core.config import compose
from sftdist.core.distributed import World
from sftdist.core.settings import EvaluateConfig
from sftdist.core.storage import read_json
from sftdist.data.template import ChatTemplate
from sftdist.evals.report import REPORT, ROWS
from tests.e2e.workshop import SPECIALS
from tests.models import tiny_model
from tests.tokenizers import byte_tokenizer

COLOURS = ("red", "green", "blue", "amber")
QUICK = ("evals.adversarial=false", "evals.max_new_tokens=5", "data.workers=1", "evals.resamples=100")


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A conversation of one or two turns, some of them much longer than others."""
    colour = COLOURS[number % len(COLOURS)]
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What colour is the thing {number}{' or so' * (number % 7)}?"},
        {"role": "assistant", "content": f"The thing {number} is {colour}."},
    ]
    if number % 3 == 0:
        said += [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": f"Yes, {colour}!"}]
    return {"id": f"row-{number}", "messages": said, "tags": [colour], **fields}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def home(folder: Path) -> Path:
    """`tuned` and `base`, two models with one tokenizer, and rows of which neither has seen any."""
    template = ChatTemplate.of(byte_tokenizer(specials=SPECIALS), "chatml")
    for name, wide in (("tuned", 0.25), ("base", 0.2)):
        model = tiny_model("llama", vocab_size=len(template.tokenizer), initializer_range=wide)
        model.save_pretrained(folder / name)
        template.save(folder / name)
    checks = {"instructions": [{"kind": "no_commas"}], "regex": "[a-z]"}
    write_rows(folder / "val.jsonl", [row(n, checks=checks if n % 2 else {}) for n in range(11)])
    write_rows(folder / "hold.jsonl", [row(n) for n in range(11, 16)])
    return folder


def configured(folder: Path, *words: str) -> EvaluateConfig:
    """`sftdist evaluate candidate=tuned base=base data.val=val.jsonl WORDS`, with the stores in `folder`."""
    own = {
        "candidate": folder / "tuned",
        "base": folder / "base",
        "data.val": folder / "val.jsonl",
        "data.store_dir": folder / "stores",
        "run.dir": folder / "out",
    }
    given = {word.split("=")[0] for word in words}
    asked = [*(f"{key}={value}" for key, value in own.items() if key not in given), *words]
    return compose(None, [*QUICK, *asked], EvaluateConfig, complete=True)


def judge(world: World, folder: Path, *words: str) -> str:
    """What `sftdist evaluate` does, on one rank of any number; the hash of its report."""
    cfg = configured(folder, *words)
    return command.judged(cfg, command.spec_of(cfg, world), world, lambda text: None).report.sha256


def alone() -> World:
    return World(0, 1, 0, torch.device("cpu"))


def found(out: Path, split: str = "validation") -> tuple[dict[str, Any], list[str]]:
    """The report without when and how fast it was made, and the lines of rows.jsonl."""
    report = read_json(out / "report" / split / REPORT)
    del report["created"], report["seconds"]
    return report, (out / "report" / split / ROWS).read_text().splitlines()
