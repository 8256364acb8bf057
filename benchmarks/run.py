"""The guard: the CPU benchmarks in short, as ratios beside those of the last committed run; a fall ends with 1.

    python -m benchmarks.run [--quick] [--only step packing balance checkpoint start prepare]

Every ratio is of two things measured in this run, in turn, and larger is better: ours over TRL, two ranks over two
threads, a step's FLOPs over the rate of its matrix products alone, the planner's rate over TRL's packer's, the fill and
the balance of the packs, a training step over a save and over a load, imports alone over the start, loading alone over
the checked export, `datasets.map` over prepare. A ratio that is more than 10 % below the last `*-run.json` that git
has is named; its benchmark is run once more before that counts, for another job on the machine only ever slows down.
Writes benchmarks/results/<date>-run.json, to be committed with the change that it stands for. `--quick`: one round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from trl.data_utils import pack_dataset

from benchmarks import balance, checkpoint, packing, prepare, start, step
from benchmarks.guard import Verdict, compare, last_committed, table
from benchmarks.machine import ROOT, Result, command, load, machine, shared_data

PEER = "2:bf16_weights:padded"  # TRL's fastest setting in results/*-step.json
CONVERSATIONS, PEER_CONVERSATIONS = 1_000_000, 50_000

Ratios = dict[str, float]


def of_step(rounds: int) -> Ratios:
    with tempfile.TemporaryDirectory() as folder:
        bench = step.Bench(Path(folder), shared_data(), steps=6, warmup=2, overrides=[])
        return step.measure(bench, rounds, [step.PeerSetting.of(PEER)], step.SHORT).medians()


def of_packing(rounds: int) -> Ratios:
    """Conversations planned per CPU second beside those that TRL's `bfd` packs, of the same distribution."""
    tables, cost = packing.lognormal_tables(CONVERSATIONS), packing.llama8b()
    few = np.concatenate([one.lengths[: round(PEER_CONVERSATIONS * len(one.rows) / CONVERSATIONS)] for one in tables])
    rows = datasets.Dataset.from_dict({"input_ids": [np.zeros(length, np.int8) for length in few]})
    datasets.disable_progress_bars()
    ours, peer, fill = 0.0, 0.0, 0.0
    for number in range(rounds):
        found = packing.time_of_plan(tables, cost, None)
        ours = max(ours, found["conversations"] / found["CPU seconds"])
        fill = found["fill"]
        began = time.process_time()
        pack_dataset(rows, packing.PACK, "bfd", {"load_from_cache_file": False, "new_fingerprint": f"run-{number}"})
        peer = max(peer, len(few) / (time.process_time() - began))
    return {"ours / TRL's bfd": ours / peer, "fill": fill}


def of_balance(rounds: int) -> Ratios:
    """Mean over largest cost of 64 ranks; the same in every run."""
    tables, cost = balance.lognormal(100_000, 8192, 1.0), balance.cost_of(balance.LLAMA_7B)
    found = {each: balance.ours(tables, cost, 8192, 64, each, 8)["ours"] for each in (4, 1)}
    return {f"{each} packs a rank": value for each, value in found.items()}


def of_checkpoint(rounds: int) -> Ratios:
    found = checkpoint.run_setting(20, ranks=2, stage=2, repeats=2 * rounds + 1)
    return {"step / save": found["step_s"] / found["save_s"], "step / load": found["step_s"] / found["load_s"]}


def of_start(rounds: int) -> Ratios:
    with tempfile.TemporaryDirectory() as folder:
        return start.ratios(start.measure(Path(folder), shared_data(), rounds))


def of_prepare(rounds: int) -> Ratios:
    setting, _ = prepare.real_setting(1)
    found = prepare.measure(setting, 1, rounds)
    return {"map, batched / ours": found["ratio to map, batched"], "of CPU time": found["of CPU time, to map, batched"]}


# `prepare` comes last: it sets what its peer needs for the whole process.
PARTS: dict[str, Callable[[int], Ratios]] = {
    "step": of_step,
    "packing": of_packing,
    "balance": of_balance,
    "checkpoint": of_checkpoint,
    "start": of_start,
    "prepare": of_prepare,
}


def measured(part: str, rounds: int, before: Ratios) -> tuple[Ratios, int]:
    """The ratios of a part, and how often it ran: once more where one has fallen; the better of two counts."""
    found = named(part, rounds)
    if not compare(found, before).fallen:
        return found, 1
    again = named(part, rounds)
    return {name: max(value, again[name]) for name, value in found.items()}, 2


def named(part: str, rounds: int) -> Ratios:
    return {f"{part}: {name}": value for name, value in PARTS[part](rounds).items()}


def earlier(parts: list[str]) -> tuple[str, Ratios, dict[str, Any]]:
    """The last committed run: its name, those of its ratios that belong to these parts, and where it ran."""
    found = last_committed(ROOT, "benchmarks/results", "run")
    if found is None:
        return "none", {}, {}
    name, value = found
    ratios = {one: ratio for one, ratio in value["figures"]["ratios"].items() if one.split(":")[0] in parts}
    return name, ratios, value["where"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of everything")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these benchmarks")
    args = parser.parse_args()
    rounds = 1 if args.quick else 2
    name, before, where = earlier(args.only)
    ratios: Ratios = {}
    runs = []
    for part in args.only:
        began, loaded = time.perf_counter(), load()
        found, times = measured(part, rounds, before)
        ratios |= found
        runs.append({"benchmark": part, "runs": times, "seconds": time.perf_counter() - began, "load": loaded})
        print(f"{part}: {', '.join(f'{one} {ratio:.3g}' for one, ratio in found.items())}", flush=True)
    verdict = compare(ratios, before)
    save(ratios, before, verdict, name, where, runs, complete=set(args.only) == set(PARTS))
    print("\n".join(verdict.lines()) or f"no ratio has fallen by more than allowed since {name}")
    return 0 if verdict.passed else 1


def save(
    ratios: Ratios,
    before: Ratios,
    verdict: Verdict,
    name: str,
    where: dict[str, Any],
    runs: list[dict[str, Any]],
    *,
    complete: bool,
) -> None:
    """A run of some parts is kept under another name: the next run is compared with complete ones."""
    here = machine()
    other = [key for key in ("processor", "cores", "gpus") if where and where[key] != here[key]]
    figures = {"ratios": ratios, "compared with": name, "passed": verdict.passed, "verdict": verdict.lines()}
    notes = [f"The earlier run was on another machine: {', '.join(f'{key} {where[key]}' for key in other)}."]
    Result(
        "run" if complete else "run-part",
        command("benchmarks.run"),
        figures,
        table(ratios, before),
        str(__doc__).split("\n")[0],
        more={"What ran": runs},
        notes=notes if other else [],
    ).save()


if __name__ == "__main__":
    sys.exit(main())
