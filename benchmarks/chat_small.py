"""One full pass of `exp=chat_small` over the real chat data: does the loss of each source fall?

    python -m benchmarks.chat_small [--run DIR] [overrides]

Trains on two CPU ranks (or reads the finished run in DIR) and writes the curve: JSON and a table, all steps as CSV,
a picture as SVG. Ends with 1 where the loss of a source has not fallen.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.curve import Line, draw
from benchmarks.machine import ROOT, Result, command, shared_data
from sftdist.core.storage import read_jsonl

RANKS = 2
ENDS = 10  # steps at the start and at the end that are compared
WINDOW = 10  # steps of the moving mean in the picture
PREFIX = "loss/"


def train(run_dir: Path, data: Path, overrides: Sequence[str]) -> None:
    """The full pass, its console shown as it goes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    words += ["-m", "sftdist.train", "+exp=chat_small", f"run.dir={run_dir}", "tracking.wandb=offline", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SFTDIST_DATA": str(data)}
    subprocess.run(words, cwd=ROOT, env=environment, check=True)


def moving_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value as the mean of itself and those before it, `WINDOW` at most."""
    return [
        (step, fmean(value for _, value in points[max(0, index - WINDOW + 1) : index + 1]))
        for index, (step, _) in enumerate(points)
    ]


def points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def sources_table(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss at both ends of training and of the evaluations, in total and per source."""
    keys = ["loss", *sorted({key for line in steps for key in line if key.startswith(PREFIX)})]
    table = []
    for key in keys:
        losses = [value for _, value in points(steps, key)]
        evaluated = [value for _, value in points(evaluations, f"eval/{key}")]
        table.append(
            {
                "source": key.removeprefix(PREFIX) if key != "loss" else "all",
                f"first {ENDS} steps": fmean(losses[:ENDS]),
                f"last {ENDS} steps": fmean(losses[-ENDS:]),
                "first evaluation": evaluated[0] if evaluated else "-",
                "last evaluation": evaluated[-1] if evaluated else "-",
                "share of supervised tokens": share(steps, key),
            }
        )
    return table


def share(steps: list[dict[str, Any]], key: str) -> float:
    """Realised share of a source over the whole pass."""
    if key == "loss":
        return 1.0
    total = sum(line["supervised_tokens"] for line in steps)
    name = key.removeprefix(PREFIX)
    return float(sum(line[f"share/{name}"] * line["supervised_tokens"] for line in steps) / total)


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Every line of the run, one column per figure."""
    columns = list(dict.fromkeys(key for line in lines for key in line if key != "rows"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], names: list[str]) -> str:
    """Training loss (moving mean) as lines and evaluation loss as dots, in one colour per source."""
    lines = []
    for name in names:
        lines.append(Line(name, moving_mean(points(steps, PREFIX + name))))
        lines.append(Line(name, points(evaluations, f"eval/loss/{name}"), dots=True))
    return draw(lines, title="chat_small: loss per source, evaluation as dots", x="optimizer step", y="loss per token")


def figures(steps: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(line["step_seconds"] for line in steps)
    tokens = sum(line["tokens"] for line in steps)
    return {
        "steps": len(steps),
        "tokens": tokens,
        "supervised_tokens": sum(line["supervised_tokens"] for line in steps),
        "conversations": sum(line["conversations"] for line in steps),
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "pack_fill": fmean(line["pack_fill"] for line in steps),
        "rank_balance": fmean(line["rank_balance"] for line in steps),
        "data_wait_share": sum(line["data_wait_seconds"] for line in steps) / seconds,
        "median_grad_norm": median(line["grad_norm"] for line in steps),
        "memory_gib": max(line["memory_gib"] for line in steps),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="read this finished run instead of training one")
    parser.add_argument("overrides", nargs="*", help="overrides of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = args.run or Path(folder) / "chat_small"
        if args.run is None:
            train(run_dir, shared_data(), [f"data.store_dir={folder}/stores", *args.overrides])
        lines = list(read_jsonl(run_dir / "metrics.jsonl"))
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    table = sources_table(steps, evaluations)
    about = "One pass over the three real sources: 12 M-parameter Llama from random weights, two CPU ranks, bf16."
    words = command("benchmarks.chat_small") if args.run is None else "python -m benchmarks.chat_small"
    path = Result("chat_small", words, figures(steps), table, about).save()
    write_csv(path.with_suffix(".csv"), lines)
    names = [row["source"] for row in table if row["source"] != "all"]
    path.with_suffix(".svg").write_text(curve(steps, evaluations, names), encoding="utf-8")
    fallen = [row[f"last {ENDS} steps"] < row[f"first {ENDS} steps"] for row in table]
    return 0 if all(fallen) else 1


if __name__ == "__main__":
    sys.exit(main())
