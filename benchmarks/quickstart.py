"""What the quickstart's fine-tune taught: base and export answer the same held-out prompts.

    python benchmarks/quickstart.py [--base quickstart/base] [--tuned runs/quickstart-XXXXXXXX/export]

Held-out rows are those that `exp=quickstart` keeps out of training by the hash of their prompt. Prints a table and
writes `benchmarks/results/quickstart.json`; ends with 1 where the aims are not reached.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from sftdist.core.config import compose
from sftdist.core.ledger import versions
from sftdist.core.settings import RowShape
from sftdist.core.storage import read_json, read_jsonl, write_json
from sftdist.data.keys import prompt_key
from sftdist.data.schema import Conversation, parse
from sftdist.data.split import split_of
from sftdist.data.store import HOLDOUT
from sftdist.evals.generate import ask as answers_of
from sftdist.evals.probes.format import format_probe
from sftdist.evals.probes.task import task_probe
from sftdist.evals.prompts import Answer, Prompt

SOURCES = ("domain", "general", "format")
# What is shown of each source, and the metric that it is.
FIGURES = {
    "domain": {"domain right": "same_answer"},
    "general": {"general right": "exact_match"},
    "format": {"format valid": "schema_valid", "format fields": "fields_right", "format right": "exact_match"},
}
AIMS = {"format valid": 0.95, "format fields": 0.80, "domain right": 0.80}


def held_out(file: Path, *, validation: float, holdout: float) -> list[Conversation]:
    """The conversations of a file that training never sees."""
    found = []
    for line, row in enumerate(read_jsonl(file), start=1):
        conversation = parse(row, RowShape.auto, file=file.name, line=line, id=None)
        assert isinstance(conversation, Conversation), conversation
        if split_of(prompt_key(conversation), validation=validation, holdout=holdout) == HOLDOUT:
            found.append(conversation)
    return found


def score(source: str, answers: list[Answer], prompts: list[Prompt], schema: dict[str, Any]) -> dict[str, float]:
    """Mean scores of one source's answers."""
    probes = (task_probe(), format_probe({"format": schema}))
    scores = [
        {name: value for probe in probes for name, value in probe.score(prompt, answer).items()}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {shown: fmean(one[metric] for one in scores) for shown, metric in FIGURES[source].items()}


def ask(folder: Path, rows: dict[str, list[Conversation]], schema: dict[str, Any]) -> dict[str, Any]:
    """Scores of one model on the held-out rows, and its first answers of each source."""
    began = time.perf_counter()
    scores: dict[str, float] = {}
    examples: dict[str, list[dict[str, str]]] = {}
    for source, conversations in rows.items():
        prompts = [
            Prompt(row.id, source, row.messages[:-1], reference=row.messages[-1].content, tools=row.tools)
            for row in conversations
        ]
        answers = answers_of(folder, prompts, max_new_tokens=160)
        scores |= score(source, answers, prompts, schema)
        examples[source] = [
            {"prompt": prompt.question, "answer": answer.text, "reference": prompt.reference or ""}
            for prompt, answer in zip(prompts[:3], answers, strict=False)
        ]
    return {"scores": scores, "seconds": round(time.perf_counter() - began, 1), "examples": examples}


def newest_export(runs: Path) -> Path:
    """The export of the quickstart's newest run."""
    exports = sorted(runs.glob("quickstart*/export"), key=lambda path: path.stat().st_mtime)
    if not exports:
        given = f"{runs}: given no quickstart*/export, required a finished quickstart"
        raise SystemExit(f"{given}: run bash launch/quickstart.sh, or name a folder with --tuned")
    return exports[-1]


def table(models: dict[str, dict[str, Any]]) -> str:
    """One line a score, one column a model."""
    lines = [f"{'':16}" + "".join(f"{name:>10}" for name in models) + f"{'aim':>10}"]
    for key in next(iter(models.values()))["scores"]:
        cells = "".join(f"{100 * model['scores'][key]:9.1f}%" for model in models.values())
        aim = f"{100 * AIMS[key]:9.0f}%" if key in AIMS else ""
        lines.append(f"{key:16}{cells}{aim}")
    return "\n".join(lines)


def main() -> int:
    """Score both models, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart/data"))
    parser.add_argument("--base", type=Path, default=Path("quickstart/base"))
    parser.add_argument("--tuned", type=Path, help="default: the newest runs/quickstart*/export")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart.json"))
    parser.add_argument("overrides", nargs="*", help="those that the run was started with, where they move the split")
    args = parser.parse_args()
    split = compose("quickstart", args.overrides).data
    rows = {
        source: held_out(args.data / f"{source}.jsonl", validation=split.val_fraction, holdout=split.holdout_fraction)
        for source in SOURCES
    }
    schema = read_json(args.data / "ticket.schema.json")
    tuned = args.tuned or newest_export(Path("runs"))
    models = {"base": ask(args.base, rows, schema), "tuned": ask(tuned, rows, schema)}
    missed = [key for key, aim in AIMS.items() if models["tuned"]["scores"][key] < aim]
    print(table(models))
    print("held-out rows:", ", ".join(f"{source} {len(kept)}" for source, kept in rows.items()))
    print("aims reached" if not missed else f"below its aim: {', '.join(missed)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out,
        {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python benchmarks/quickstart.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {platform.system()}",
            "versions": versions(),
            "held_out_rows": {source: len(kept) for source, kept in rows.items()},
            "models": models,
            "aims": AIMS,
        },
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
