"""Where the time of one optimizer step of `exp=chat_small` goes, by torch.profiler: rank 0 of two with ZeRO 1.

    python -m benchmarks.profile_step [--ranks 2] [OVERRIDE ...]

Keeps the trace (`benchmarks/results/<date>-step-trace.json.gz`, for chrome://tracing or ui.perfetto.dev), and a table
by kind of work and one by operator. Shares are of the profiled step on the rank's main thread, which runs forward,
backward and update; what is in no operator is Python and DeepSpeed's own hooks. The same steps without the profiler
say how much it slows down.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.machine import RESULTS, Result, command, run_on_ranks, shared_data
from benchmarks.training import Trainer, training

STEP = "one optimizer step"
# An operator belongs to the first kind whose beginnings match its own name or that of a range around it.
RANGES = {
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad"),
    "attention": (
        "_ShortAttention",
        "aten::scaled_dot_product",
        "autograd::engine::evaluate_function: _ShortAttention",
    ),
    "loss and head": ("_FusedHead", "autograd::engine::evaluate_function: _FusedHead"),
    "collectives, waited for": ("c10d::", "gloo:"),
}
OPERATORS = {
    "matrix products of the layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::cat", "aten::clone", "aten::contiguous"),
    "Python and hooks": (STEP,),
}
REST = "elementwise and small"
# What work of ours could save at most: none of it is arithmetic of the model.
OVERHEAD = ("optimizer", "collectives, waited for", "copies and casts", "Python and hooks")


def kind_of(event: Any) -> str:
    """The kind of work of an event of the profiler."""
    around, names = event, []
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    for kind, beginnings in RANGES.items():
        if any(name.startswith(beginnings) for name in names):
            return kind
    for kind, beginnings in OPERATORS.items():
        if event.name.startswith(beginnings):
            return kind
    return REST


def measure(trainer: Trainer, trace: Path, plain: int) -> dict[str, Any]:
    """Steps without the profiler, then one with it; only rank 0 profiles."""
    steps = [trainer.step().seconds for _ in range(plain + 2)][2:]
    if not trainer.world.is_main:
        trainer.step()
        return {}
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled, record_function(STEP):
        began = time.perf_counter()
        done = trainer.step()
        seconds = time.perf_counter() - began
    by_kind: dict[str, float] = defaultdict(float)
    by_operator: dict[tuple[str, str], list[float]] = defaultdict(list)
    (whole,) = (event for event in profiled.events() if event.name == STEP)
    for event in profiled.events():
        if event.thread == whole.thread:
            kind = kind_of(event)
            by_kind[kind] += event.self_cpu_time_total / 1e6
            by_operator[kind, event.name].append(event.self_cpu_time_total / 1e6)
    keep(profiled, trace)
    operators = sorted(by_operator.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "step_seconds": median(steps),
        "profiled_seconds": seconds,
        "tokens": done.tokens,
        "kinds": [
            {"work": kind, "seconds": spent, "share": spent / seconds}
            for kind, spent in sorted(by_kind.items(), key=lambda item: -item[1])
        ],
        "operators": [
            {
                "operator": name,
                "work": kind,
                "calls": len(all_of),
                "seconds": sum(all_of),
                "share": sum(all_of) / seconds,
            }
            for (kind, name), all_of in operators
        ],
    }


def keep(profiled: profile, trace: Path) -> None:
    """The trace, small: times to the microsecond, and of the events' arguments none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        whole = json.loads(file.read_text(encoding="utf-8"))
    events = [{key: value for key, value in event.items() if key != "args"} for event in whole["traceEvents"]]
    for event in events:
        event.update({key: round(event[key]) for key in ("ts", "dur") if key in event})
    names = [event for event in whole["traceEvents"] if event.get("ph") == "M"]  # of processes and threads
    events = [event for event in events if event.get("ph") == "X"]
    packed = json.dumps({"traceEvents": names + events}, separators=(",", ":")).encode()
    trace.write_bytes(gzip.compress(packed, mtime=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plain", type=int, default=4, help="steps without the profiler")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--worker", type=Path, help="be one rank; the file of the result")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.worker is not None:
        with training(args.run_dir, args.overrides, threads=1) as trainer:
            found = measure(trainer, args.trace, args.plain)
        if found:
            args.worker.write_text(json.dumps(found), encoding="utf-8")
        return 0
    os.environ["SFTDIST_DATA"] = str(shared_data())
    trace = RESULTS / time.strftime("%Y-%m-%d-step-trace.json.gz", time.gmtime())
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "benchmarks.profile_step", "--run-dir", f"{folder}/run", "--trace", str(trace)]
        words += ["--plain", str(args.plain), f"data.store_dir={folder}/stores", *args.overrides]
        found = run_on_ranks(args.ranks, words)
    figures = {key: found[key] for key in ("step_seconds", "profiled_seconds", "tokens")}
    figures["share_that_is_not_the_models_arithmetic"] = sum(
        one["share"] for one in found["kinds"] if one["work"] in OVERHEAD
    )
    figures |= {"trace": trace.name, "trace_bytes": trace.stat().st_size}
    more = {"By operator, own time": found["operators"]}
    about = str(__doc__).split("\n")[0]
    Result("profile_step", command("benchmarks.profile_step"), figures, found["kinds"], about, more).save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
