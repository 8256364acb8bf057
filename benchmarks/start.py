"""From `torchrun` to the end of step 1 of `exp=chat_small`, and from its last step to the checked export of its model.

    python -m benchmarks.start [--rounds 3]

Two ranks on two cores; the data is prepared by a run that is not counted. Times are those at which a run's own files
appear. Beside it, in each round, what cannot be saved: two ranks under torchrun that import torch, transformers and
DeepSpeed and do nothing; and a process that imports torch and transformers and loads the exported folder.

- the export itself: from the end of the last checkpoint to the last written file (weights, tokenizer, card, manifest);
- with its check: until the run says done. A fresh process has loaded the folder by then and compared its logits and
  its tokens with the live model's;
- with what that costs the last step: the process starts in the last step, whose ranks then share their cores with it;
  the seconds by which that step is longer than the median of the others are added.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import ROOT, Result, command, load, shared_data
from benchmarks.step import RANKS, run_child, torchrun
from sftdist.core.storage import read_json, read_jsonl

STEPS = 5
START_SECONDS, EXPORT_SECONDS = 20.0, 3.0  # aims
IMPORTS = "import torch, transformers, deepspeed"
LOAD = (
    "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
    "AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1])"
)
# What a run has done when a file is there, in its order; seconds are from the one before.
PHASES = {
    "torchrun and imports": ".lock",
    "opening the data": "config.yaml",
    "process group and plan": "plan.json",
    "model and engine": "model",
    "start-up checks and step 1": "metrics.jsonl",
}


def train(run_dir: Path, data: Path, stores: Path, steps: int) -> dict[str, float]:
    """Run a job; its seconds by phase."""
    words = [*torchrun(RANKS), "-m", "sftdist.train", "+exp=chat_small", f"train.max_steps={steps}"]
    words += [f"run.dir={run_dir}", f"data.store_dir={stores}", "tracking.wandb=disabled"]
    words += ["checkpoint.every_steps=0", "eval.every_steps=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SFTDIST_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    began = time.time()
    with (run_dir.parent / f"{run_dir.name}.log").open("wb") as log:
        job = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        seen = watch(job, run_dir)
    if job.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with {job.returncode}: see {log.name}\n{Path(log.name).read_text()[-4000:]}")
    phases, before = {}, began
    for phase, name in PHASES.items():
        phases[phase] = seen[name] - before
        before = seen[name]
    lines = [line["step_seconds"] for line in read_jsonl(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    return {**phases, "start to step 1": before - began, **of_the_end(run_dir, lines)}


def watch(job: subprocess.Popen[bytes], run_dir: Path) -> dict[str, float]:
    """When each phase's file first had something in it, until the job ends."""
    seen: dict[str, float] = {}
    while job.poll() is None:
        for name in PHASES.values():
            path = run_dir / name
            if name not in seen and path.exists() and (path.is_dir() or path.stat().st_size):
                seen[name] = time.time()
        time.sleep(0.02)
    return seen


def of_the_end(run_dir: Path, step_seconds: list[float]) -> dict[str, float]:
    """Seconds at the end of a run, by its files; `status.json` is written last."""
    assert read_json(run_dir / "status.json")["state"] == "done"
    names = ("metrics.jsonl", "LATEST", "export/manifest.json", "status.json")
    last_step, saved, written, done = ((run_dir / name).stat().st_mtime for name in names)
    longer = max(0.0, step_seconds[-1] - median(step_seconds[1:-1])) if len(step_seconds) > 2 else 0.0
    return {
        "last checkpoint": saved - last_step,
        "export itself": written - saved,
        "export with its check": done - saved,
        "the last step is longer by": longer,
        "export, check and longer step": done - saved + longer,
        "last step to done": done - last_step,
    }


def seconds_of(words: list[str], data: Path) -> float:
    began = time.perf_counter()
    run_child(words, data, threads=1)
    return time.perf_counter() - began


def measure(work: Path, data: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each round, after a run that prepares the data and warms the page cache."""
    stores = work / "stores"
    train(work / "warm", data, stores, 1)
    imports = work / "imports.py"
    imports.write_text(IMPORTS, encoding="utf-8")
    rows = []
    for number in range(1, rounds + 1):
        loaded = load()
        found = train(work / f"run-{number}", data, stores, STEPS)
        bare = seconds_of([*torchrun(RANKS), str(imports)], data)
        alone = seconds_of([sys.executable, "-c", LOAD, str(work / f"run-{number}" / "export")], data)
        rows.append({"round": number, **found, "imports alone": bare, "loading alone": alone, "load": loaded})
        print(rows[-1], flush=True)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What nobody could save over what it takes, within a round; larger is better."""
    return {
        "imports / start to step 1": median(row["imports alone"] / row["start to step 1"] for row in rows),
        "loading / export, check and longer step": median(
            row["loading alone"] / row["export, check and longer step"] for row in rows
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), shared_data(), args.rounds)
    names = ("start to step 1", "export itself", "export with its check", "export, check and longer step")
    medians = {f"{name}, s": median(row[name] for row in rows) for name in names}
    aims = {"start to step 1, s": START_SECONDS, "export itself, s": EXPORT_SECONDS}
    table = [{"seconds": name, **{f"round {row['round']}": row[name] for row in rows}} for name in list(rows[0])[1:]]
    figures = {**medians, **ratios(rows), "aims": aims}
    Result("start", command("benchmarks.start"), figures, table, str(__doc__).split("\n")[0], notes=NOTES).save()
    return 0 if all(medians[name] <= aim for name, aim in aims.items()) else 1


NOTES = [
    "The export itself writes weights, tokenizer, configuration, card and manifest. Its check costs a process of its "
    "own, which must import torch and transformers again: that is nearly all of what it takes ('loading alone' does "
    "no more). The process starts in the last step. Where a host has a core to spare, as one with GPUs has, these "
    "imports are over when the export is written; on two cores with two ranks they take them from the last step.",
]


if __name__ == "__main__":
    sys.exit(main())
