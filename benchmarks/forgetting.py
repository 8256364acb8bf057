"""What narrow data makes a model forget, and what a mixture keeps: six mixtures, three seeds, the quickstart's data.

    python -m benchmarks.forgetting [--seeds 0 1 2] [--steps 160] [--folder DIR]

First a generalist is trained: the quickstart's base on the sources general and format alone. It is then fine-tuned on
the domain, with less and less of its own data beside it. Each of these runs is the real `sftdist train`, judged by
`sftdist evaluate` against the generalist on held-out rows. `forgets` is how far a mixture's mean over the seeds lies
below the generalist's own score. A run that is there already is not trained again (--folder). Writes a table and a
chart to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from benchmarks.curve import Line, draw
from benchmarks.machine import Result, command, load
from sftdist.evals.report import EvalReport

MIXTURES = {  # lambda of domain, general, format
    "domain only": (1.0, 0.0, 0.0),
    "95 % domain": (0.95, 0.025, 0.025),
    "90 % domain": (0.9, 0.05, 0.05),
    "80 % domain": (0.8, 0.1, 0.1),
    "60 % domain": (0.6, 0.2, 0.2),
    "a third each": (0.34, 0.33, 0.33),
}
METRICS = ("domain.same_answer", "general.exact_match", "format.fields_right", "format.schema_valid", "all.loss")
SHOWN = METRICS[:4]
GENERALIST = (0.0, 0.5, 0.5)
GENERALIST_STEPS = 420


@dataclass(frozen=True)
class Scored:
    """A run's figures by metric, and those of the generalist on the same prompts."""

    tuned: dict[str, float]
    before: dict[str, float]


def sftdist(folder: Path, *words: str) -> None:
    """Run a command of sftdist in a folder; ends the benchmark where it fails."""
    done = subprocess.run([sys.executable, "-m", "sftdist.cli", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"sftdist {' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def mix(lambdas: Sequence[float]) -> str:
    domain, general, form = lambdas
    return f"+data.mix={{domain:{domain},general:{general},format:{form}}}"


def train(folder: Path, name: str, *words: str) -> None:
    """One training run, in `folder/runs/<name>`."""
    if not (folder / "runs" / name / "export").is_dir():
        quiet = (
            "data.max_passes=null",
            "checkpoint.every_steps=0",
            "eval.every_steps=0",
            "tracking.wandb=disabled",
        )
        sftdist(folder, "train", "+exp=quickstart", f"run.dir=runs/{name}", *quiet, *words)


def scored(folder: Path, name: str, base: str) -> Scored:
    """The run against the generalist, on everything that is held out for validation."""
    run = folder / "runs" / name
    words = ("evals=quick", "evals.max_prompts=null", "evals.probes=[task,format,loss]", f"base={base}")
    if not (run / "report/validation/report.json").is_file():
        sftdist(folder, "evaluate", f"run.dir=runs/{name}", *words)
    report = EvalReport.read(run / "report/validation/report.json")
    found = {metric: report.metrics[metric] for metric in METRICS}
    tuned = {metric: float(np.average(one.tuned, weights=one.weights)) for metric, one in found.items()}
    before = {metric: float(np.average(one.base, weights=one.weights)) for metric, one in found.items() if one.base}
    return Scored(tuned, before)


def rows(found: dict[str, list[Scored]]) -> list[dict[str, Any]]:
    """A row per mixture, with mean and spread over the seeds; the generalist is the first."""
    before = next(iter(found.values()))[0].before
    table: list[dict[str, Any]] = [{"mixture": "before: the generalist", **{m: f"{before[m]:.3f}" for m in METRICS}}]
    for name, several in found.items():
        figures = {metric: [one.tuned[metric] for one in several] for metric in METRICS}
        cells = {metric: f"{fmean(values):.3f} ± {pstdev(values):.3f}" for metric, values in figures.items()}
        forgets = {
            f"forgets {metric.partition('.')[0]}": f"{max(0.0, before[metric] - fmean(figures[metric])):.3f}"
            for metric in METRICS[1:3]
        }
        table.append({"mixture": name, **cells, **forgets})
    return table


def chart(found: dict[str, list[Scored]]) -> str:
    """Every metric over the share of the domain: a dot per seed, a line through the means."""
    lines = []
    for metric in SHOWN:
        means = [
            (100 * MIXTURES[name][0], fmean(one.tuned[metric] for one in several)) for name, several in found.items()
        ]
        dots = [(100 * MIXTURES[name][0], one.tuned[metric]) for name, several in found.items() for one in several]
        lines += [Line(metric, sorted(means)), Line(metric, dots, dots=True)]
    return draw(
        lines, title="What a fine-tune on the domain keeps", x="domain in the mixture, %", y="score on held-out rows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--folder", type=Path, help="kept, and gone on in; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sftdist(folder, "prepare", "+exp=quickstart")
        train(folder, "generalist", mix(GENERALIST), f"train.max_steps={GENERALIST_STEPS}", "train.epochs=null")
        base = "runs/generalist/export"
        found: dict[str, list[Scored]] = {}
        for name, lambdas in MIXTURES.items():
            for seed in args.seeds:
                run = f"{name.replace(' ', '-').replace('%', 'percent')}-{seed}"
                words = (f"model.path={base}", f"seed={seed}", f"train.max_steps={args.steps}", "train.epochs=null")
                train(folder, run, mix(lambdas), *words)
                found.setdefault(name, []).append(scored(folder, run, base))
                print(
                    name, seed, {metric: round(value, 3) for metric, value in found[name][-1].tuned.items()}, flush=True
                )
    each = [
        {"mixture": name, "seed": seed, **{metric: one.tuned[metric] for metric in METRICS}}
        for name, several in found.items()
        for seed, one in zip(args.seeds, several, strict=True)
    ]
    path = Result(
        "forgetting",
        command("benchmarks.forgetting"),
        {"steps": args.steps, "generalist_steps": GENERALIST_STEPS, "load": load()},
        rows(found),
        "What a fine-tune on the domain alone forgets, and what a mixture keeps; mean and spread over the seeds.",
        {"Each run": each},
    ).save()
    path.with_suffix(".svg").write_text(chart(found), encoding="utf-8")


if __name__ == "__main__":
    main()
