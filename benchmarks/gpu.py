"""Tokens/s, MFU, memory and kernels on one GPU beside TRL: one command, one table, within nine minutes of an H200.

    python -m benchmarks.gpu --list-wheels           # what to bring along to a machine without a network
    python -m benchmarks.gpu --prepare FILE          # the lengths of real conversations, where they are
    python -m benchmarks.gpu --wheels DIR            # on the GPU
    python -m benchmarks.gpu --tiny                  # the whole script on a CPU, with tiny shapes: a proof, no figures

Models have random weights of their true architecture. Each row runs in a child process: one that fails says why, the
others go on, and the command ends with 1. Rows come by importance; when the budget is used up the rest is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import FULL, PREPARED, prepare, shape
from benchmarks.gpu_wheels import absent, command_lines, install, slim
from benchmarks.gpu_worker import Answer, Job, Worker
from benchmarks.machine import GIB, RESULTS, Result, command
from sftdist.model import cost

TIMES_TRL = 1.25
MEMORY_OFF = 0.10  # share by which a predicted peak may be off, and a peak above its floor
HOST_BYTES = 16  # a parameter under zero.offload=optimizer: float32 master, gradient and two moments on the host
HOST_ROOM = 0.85
PATIENCE = 1.5
TRIALS = 0.7  # share of a row's seconds for trying settings; the fastest is measured further after them
NEEDED = 20.0  # seconds without which no row is begun


@dataclass(frozen=True)
class Row:
    """One job for our worker. `seconds`: what it should take, its process is ended after `PATIENCE` times as long;
    `aim`: share of the matmul rate it should reach; `peer_seconds`: what TRL should take, 0 where it is not asked."""

    name: str
    kind: str
    seconds: float
    job: Job = field(default_factory=dict)
    aim: float | None = None
    peer_seconds: float = 0.0


def training(name: str, model: str, method: str, seconds: float, peer_seconds: float, **more: Any) -> Row:
    aim = more.pop("aim", None)
    job = {"model": model, "method": method, "packs": 4 if model.startswith("qwen") else 2, **more}
    return Row(name, "train", seconds, job, aim, peer_seconds)


# By importance; the first with a peer also finds the fastest setting of TRL's, which is cheap on a small model.
ROWS = (
    Row("matmul", "matmul", 30),
    training("Qwen2.5-1.5B full", "qwen1.5b", "full", 80, 40),
    training("Llama-3.1-8B LoRA", "llama8b", "lora", 130, 50, aim=0.55),
    Row("attention", "attention", 20),
    Row("loss", "loss", 20),
    training("Llama-3.1-8B full", "llama8b", "full", 80, 40, aim=0.60, cut=True),
    Row("memory", "memory", 20, {"model": "qwen1.5b-248k", "method": "full", "recompute": False}),
    Row("memory, recomputed", "memory", 20, {"model": "qwen1.5b-248k", "method": "full", "recompute": True}),
    training("Qwen2.5-0.5B full", "qwen0.5b", "full", 75, 30),
    training("Llama-3.1-8B QLoRA", "llama8b", "qlora", 60, 0),
    training("Llama-3.1-8B full, offload", "llama8b", "full", 120, 0, stage=2, offload=True),
)


@dataclass
class Outcome:
    """What became of a row: its figures, or why there are none. `peer`: TRL's answer beside it."""

    row: Row
    answer: Answer
    peer: Answer = field(default_factory=dict)
    note: str = ""

    @property
    def figures(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.answer.get("figures")
        return found

    @property
    def state(self) -> str:
        return "measured" if self.figures else str(self.answer.get("absent") or f"FAILED: {self.answer.get('error')}")


@dataclass
class Run:
    """All rows of one run. `common`: what every job is told."""

    common: Job
    until: float
    ours: Worker
    trl: Worker | None
    peer_setting: dict[str, Any] | None = None
    memory_bytes: float | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def measure(self, rows: Iterable[Row]) -> None:
        for row in rows:
            outcome = self._one(row)
            self.outcomes.append(outcome)
            print(f"{row.name}: {outcome.state}", file=sys.stderr, flush=True)
            if row.kind == "matmul" and outcome.figures:
                self.memory_bytes = outcome.figures["memory_bytes"]

    def _left(self) -> float:
        return self.until - time.monotonic()

    def _one(self, row: Row) -> Outcome:
        if self._left() < NEEDED:
            return Outcome(row, {"absent": "left out: the budget was used up"})
        job, note, reason = self._job(row)
        if reason:
            return Outcome(row, {"absent": reason})
        limit = min(row.seconds, self._left())
        words = {**job, "kind": row.kind, "trial_seconds": TRIALS * limit}
        answer = self.ours.ask(words, PATIENCE * limit, self._left())
        outcome = Outcome(row, answer, note=note)
        if row.peer_seconds and outcome.figures:
            outcome.peer = self._peer(row, job, bool(outcome.figures["recomputed_layers"]))
        return outcome

    def _job(self, row: Row) -> tuple[Job, str, str]:
        """The job, what is to be said of it, and why it cannot be done ('' if it can)."""
        job = {**self.common, **row.job}
        if job.get("offload"):
            return job, "", self._no_offload(job)
        if not job.pop("cut", False) or self.memory_bytes is None:
            return job, "", ""
        layers, reason = layers_that_fit(job["model"], self.memory_bytes)
        return {**job, "layers": layers}, reason, ""

    def _no_offload(self, job: Job) -> str:
        if job["tiny"]:
            return "offload is for 8 B parameters"
        needs = HOST_BYTES * cost.parameters(shape(job["model"])).total
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needs <= HOST_ROOM * there:
            return ""
        return (
            f"the host would have to hold {needs / GIB:.0f} GiB of masters, gradients and moments; "
            f"it has {there / GIB:.0f} GiB"
        )

    def _peer(self, row: Row, job: Job, recompute: bool) -> Answer:
        if self.trl is None:
            return {"absent": "trl is not there"}
        if self._left() < NEEDED:
            return {"absent": "left out: the budget was used up"}
        limit = min(row.peer_seconds if self.peer_setting else 2 * row.peer_seconds, self._left())
        settings = [{**known, "recompute": recompute} for known in self._peer_settings()]
        if not recompute:  # where it does not fit like ours
            settings.append({**settings[0], "recompute": True, "only_if_none": True})
        job = {**job, "kind": "peer", "settings": settings, "trial_seconds": TRIALS * limit}
        answer = self.trl.ask(job, PATIENCE * limit, self._left())
        if "figures" in answer and self.peer_setting is None:
            self.peer_setting = answer["figures"]["setting"]
        return answer

    def _peer_settings(self) -> list[dict[str, Any]]:
        """Its attentions by speed, as far as they are there; its own fused head and Liger's. Once the fastest is
        found, that one alone."""
        if self.peer_setting is not None:
            return [{key: self.peer_setting[key] for key in ("attention", "liger")}]
        if self.common["device"] == "cpu":
            return [{"attention": "sdpa", "liger": False}]
        attentions = ["flash_attention_2"] if find_spec("flash_attn") else []
        attentions += ["sdpa", "flex_attention"]
        found = [{"attention": name, "liger": False} for name in attentions]
        return found + ([{"attention": attentions[0], "liger": True}] if find_spec("liger_kernel") else [])


def layers_that_fit(model: str, memory_bytes: float) -> tuple[int, str]:
    """How many layers of a model a full fine-tune on one GPU has room for with nothing recomputed, and what to say.

    18 bytes a parameter (bf16 weights; float32 masters, gradients and two moments): 8 B need 135 GiB before the first
    activation. The widths, and with them the rate of each layer, stay the true ones.
    """
    mapping = shape(model)
    whole = int(mapping["num_hidden_layers"])
    setup = cost.Setup(stage=0, world=1, pack_tokens=FULL.pack, loss_chunk=FULL.chunk)
    for layers in range(whole, 1, -1):
        if sum(cost.memory({**mapping, "num_hidden_layers": layers}, setup).values()) < 0.9 * memory_bytes:
            break
    states = 18 * cost.parameters(mapping).total / GIB
    if layers == whole:
        return whole, ""
    return layers, (
        f"{layers} of {whole} layers, at their true widths: weights and states of all {whole} are {states:.0f} GiB, "
        f"the GPU holds {memory_bytes / GIB:.0f} GiB"
    )


# The tables ---------------------------------------------------------------------------------------------------------


def verdict(value: float | None, aim: float, *, at_most: bool = False) -> str:
    """The figure with its aim and whether it was reached; '-' where there is no figure."""
    if value is None:
        return "-"
    reached = value <= aim if at_most else value >= aim
    return f"{value:.3g} (aim {'<=' if at_most else '>='} {aim:g}: {'reached' if reached else 'missed'})"


def gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def main_row(outcome: Outcome, rate: float | None, sheet: float | None) -> dict[str, Any]:
    """One line of the main table. Shares of the measured matmul rate, and of the data sheet's."""
    row, figures = outcome.row, outcome.figures
    heads: tuple[str, ...] = (
        "sftdist tokens/s",
        "TRL tokens/s",
        "times TRL",
        "of matmul rate",
        "as if full",
        "of data sheet",
    )
    heads += ("long tail, tokens/s", "peak GiB", "predicted GiB", "off by", "setting", "state")
    line: dict[str, Any] = {"row": row.name, **dict.fromkeys(heads, "-"), "state": outcome.state}
    if figures is None:
        return line
    peer = outcome.peer.get("figures")
    flops = figures["flops_per_second"]
    line["sftdist tokens/s"] = figures["tokens_per_second"]
    if peer:
        line["TRL tokens/s"] = peer["tokens_per_second"]
        line["times TRL"] = verdict(figures["tokens_per_second"] / peer["tokens_per_second"], TIMES_TRL)
    else:
        line["TRL tokens/s"] = str(outcome.peer.get("absent") or outcome.peer.get("error") or "not asked")
    if rate:
        share = flops / rate
        line["of matmul rate"] = share if row.aim is None else verdict(share, row.aim)
        line["as if full"] = figures["flops_per_second_as_full"] / rate
    line["of data sheet"] = flops / sheet if sheet else "-"
    line["long tail, tokens/s"] = figures["long_tail"]["tokens_per_second"]
    line["peak GiB"], line["predicted GiB"] = gib(figures["peak_bytes"]), gib(figures["predicted_bytes"])
    if figures["peak_bytes"]:
        off = abs(figures["predicted_bytes"] / figures["peak_bytes"] - 1)
        line["off by"] = verdict(off, MEMORY_OFF, at_most=True)
    line["setting"] = f"{figures['setting']}; {figures['runs']}"
    line["state"] = f"{outcome.state}; {outcome.note}" if outcome.note else outcome.state
    return line


def attention_table(figures: dict[str, Any], rate: float | None) -> list[dict[str, Any]]:
    table = []
    for one in figures["rows"]:
        line: dict[str, Any] = {"backend": one["backend"], "lengths": one["lengths"]}
        for way in ("forward", "backward"):
            seconds, flops = one.get(f"{way}_seconds"), one.get(f"{way}_flops_per_second")
            line[f"{way} ms"] = "-" if seconds is None else 1e3 * seconds
            line[f"{way} TFLOP/s"] = "-" if flops is None else flops / 1e12
            line[f"{way}, of matmul rate"] = flops / rate if flops and rate else "-"
        table.append({**line, "state": one.get("absent", "measured")})
    return table


def loss_table(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "loss": one["loss"],
            "ms": 1e3 * one["seconds"] if "seconds" in one else "-",
            "extra GiB": gib(one.get("extra_bytes")),
            "differs by": one.get("difference", "-"),
            "state": one.get("absent", "measured"),
        }
        for one in figures["rows"]
    ]


def memory_table(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    table = []
    for outcome in outcomes:
        figures = outcome.figures or {}
        peak, floor, predicted = (figures.get(key) for key in ("peak_bytes", "floor_bytes", "predicted_bytes"))
        over = peak / floor if peak and floor else None
        off = abs(predicted / peak - 1) if peak and predicted else None
        table.append(
            {
                "row": outcome.row.name,
                "tokens": figures.get("tokens", "-"),
                "vocabulary": figures.get("vocabulary", "-"),
                "peak GiB": gib(peak),
                "floor GiB": gib(floor),
                "peak over floor": verdict(over, 1 + MEMORY_OFF, at_most=True),
                "predicted GiB": gib(predicted),
                "off by": verdict(off, MEMORY_OFF, at_most=True),
                "state": outcome.state,
            }
        )
    return table


def result_of(outcomes: list[Outcome], words: str, *, tiny: bool) -> Result:
    """The table of all rows, with the figures behind it."""
    found = {outcome.row.kind: outcome for outcome in outcomes}
    matmul = found["matmul"].figures if "matmul" in found else None
    rate, sheet = (matmul["flops_per_second"], matmul["data_sheet"]) if matmul else (None, None)
    figures: dict[str, Any] = {
        "device": matmul["device"] if matmul else "unknown",
        "matmul_flops_per_second": rate,
        "data_sheet_flops_per_second": sheet,
        "absent": absent(),
        "rows": {
            outcome.row.name: {"answer": outcome.answer, "trl": outcome.peer, "note": outcome.note}
            for outcome in outcomes
        },
    }
    table = [main_row(outcome, rate, sheet) for outcome in outcomes if outcome.row.kind == "train"]
    others = [outcome for outcome in outcomes if outcome.row.kind in ("attention", "loss") and outcome.figures]
    more = {
        f"{outcome.row.name} kernels": attention_table(outcome.figures, rate)
        if outcome.row.kind == "attention"
        else loss_table(outcome.figures)
        for outcome in others
        if outcome.figures
    }
    memories = [outcome for outcome in outcomes if outcome.row.kind == "memory"]
    if memories:
        more["memory at a long pack and a large vocabulary"] = memory_table(memories)
    more["every row"] = [{"row": outcome.row.name, "state": outcome.state} for outcome in outcomes]
    about = "One GPU beside TRL." if not tiny else "Tiny shapes: proves that the script runs, and measures nothing."
    return GpuResult("gpu-tiny" if tiny else "gpu", words, figures, table, about, more, notes(outcomes))


class GpuResult(Result):
    """Its Markdown leaves the raw figures to the JSON file."""

    def markdown(self, date: str) -> str:
        short = {key: value for key, value in self.figures.items() if key != "rows"}
        return Result(
            self.name, self.command, short, self.table, self.about, self.more, self.notes, self.where
        ).markdown(date)


def notes(outcomes: Iterable[Outcome]) -> list[str]:
    lines = [
        "Seconds are medians over rounds of the same optimizer step, after warm-up. FLOPs are the model's: attention "
        "by the true lengths of the documents, the head at supervised positions, nothing for recomputation; under an "
        "adapter the frozen weights need no gradient (`as if full` counts them all the same). Attention's backward "
        "counts 2.5 times its forward. Peak memory is what torch allocated; the floor is weights, masters and moments, "
        "float32 gradients and what the decoder kept for its backward."
    ]
    for outcome in outcomes:
        tried = (outcome.figures or {}).get("tried", [])
        peer = (outcome.peer.get("figures") or {}).get("tried", [])
        if tried:
            lines.append(f"{outcome.row.name}, tried: {'; '.join(tried)}.")
        if peer:
            lines.append(f"{outcome.row.name}, TRL, tried: {'; '.join(peer)}.")
    return lines


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list-wheels", action="store_true", help="print the commands that fill the folder of wheels")
    parser.add_argument("--slim", type=Path, metavar="DIR", help="make the wheel of bitsandbytes in DIR small")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the lengths of the real conversations")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder with wheels of what is not installed")
    parser.add_argument("--lengths", type=Path, metavar="FILE", default=PREPARED, help="what --prepare wrote")
    parser.add_argument("--rows", default="", help="names of rows, separated by ';' (all)")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for all rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda; with --tiny cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(words)


def chosen_rows(names: str) -> list[Row]:
    """Raises ValueError for a name that no row has. The matmul rate is always measured: shares are of it."""
    wanted = [name.strip() for name in names.split(";") if name.strip()]
    known = [row.name for row in ROWS]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"no row is called {', '.join(unknown)}; they are: {'; '.join(known)}")
    return [row for row in ROWS if not wanted or row.name in wanted or row.kind == "matmul"]


def measure(args: argparse.Namespace, began: float) -> int:
    rows = chosen_rows(args.rows)
    device = args.device or ("cpu" if args.tiny else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is there; --tiny runs the script on a CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        problem = install(args.wheels, Path(folder) / "site") if args.wheels else ""
        if problem:
            print(f"the wheels were not installed: {problem}", file=sys.stderr)
        ours = Worker([sys.executable, "-m", "benchmarks.gpu_ours"])
        has_peer = all(find_spec(name) for name in ("trl", "datasets", "pyarrow", "peft"))
        trl = Worker([sys.executable, "-m", "benchmarks.gpu_trl"]) if has_peer else None
        common = {"device": device, "tiny": args.tiny, "rows": str(args.lengths.resolve())}
        run = Run(common, began + args.budget, ours, trl)
        try:
            run.measure(rows)
        finally:
            for worker in (ours, trl):
                if worker is not None:
                    sys.stderr.write(worker.errors()[-8000:])
                    worker.close()
        result_of(run.outcomes, command("benchmarks.gpu"), tiny=args.tiny).save(args.out)
    failed = [outcome for outcome in run.outcomes if "error" in outcome.answer or "error" in outcome.peer]
    return 1 if failed or problem else 0


def main() -> int:
    began = time.monotonic()
    args = arguments()
    if args.list_wheels:
        print("\n".join(command_lines()))
        return 0
    if args.slim:
        for wheel in args.slim.glob("bitsandbytes-*.whl"):
            slim(wheel)
        return 0
    if args.prepare:
        print(f"{prepare(args.prepare)} conversations in {args.prepare}")
        return 0
    return measure(args, began)


if __name__ == "__main__":
    sys.exit(main())
