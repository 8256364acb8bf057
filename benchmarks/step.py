"""Tokens per second of `exp=chat_small` on two cores: beside TRL, beside one process, beside its own matrix products.

    python -m benchmarks.step [--rounds 2] [--steps 7]

- Beside TRL's SFTTrainer: the same model shape from random weights with AdamW on the same rows (those that our run
  drew, by id, in their order), in packs of the same length, as many a step, `assistant_only_loss`, no gradient
  checkpointing. Each of TRL's settings (packs by `bfd`, or padded batches of like lengths; bf16 weights, bf16 autocast,
  float32; two processes, or one with two threads) is tried for a few short steps; the fastest runs in every round.
- Two ranks with ZeRO 1 and a thread each beside one process with two threads.
- The FLOPs of a step over its seconds, as a share of the rate at which the step's own matrix products run alone
  (`benchmarks/share.py`).

Everything alternates in one run, and ratios are taken within a round. The first steps are not timed, nor is the last
one, in which the process that checks the export starts. Ours is measured by its own `metrics.jsonl` (from taking the
batch to the end of the update), TRL from the end of a step to the end of the next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from benchmarks.machine import ROOT, SOURCES, Result, command, load, run_on_ranks, shared_data
from sftdist.core.settings import RowShape
from sftdist.core.storage import read_jsonl
from sftdist.data.schema import Conversation, parse

RANKS = 2
BARS = {"ours / TRL": 3.0, "2 ranks / 2 threads": 0.9}
# Processes and threads of ours by name, with the stage that suits them.
OURS = {"2 ranks": (2, 1, "1"), "1 process, 2 threads": (1, 2, "0")}
SHORT = ("--steps", "4", "--warmup", "1", "--packs-per-step", "2")  # for telling TRL's settings apart


@dataclass(frozen=True)
class PeerSetting:
    """How TRL is run: processes (each with the other share of the cores as threads), dtype, packs or padded batches."""

    processes: int
    dtype: str
    layout: str = "packed"

    @classmethod
    def of(cls, word: str) -> PeerSetting:
        """From `processes:dtype[:padded]`."""
        processes, dtype, *layout = word.split(":")
        return cls(int(processes), dtype, *layout)

    def __str__(self) -> str:
        return f"TRL {self.dtype}, {self.layout}, {self.processes} processes"


PEERS = "2:bf16_weights,2:bf16_autocast,2:fp32,1:bf16_weights"
PEERS += ",2:bf16_weights:padded,2:bf16_autocast:padded,2:fp32:padded,1:bf16_weights:padded"


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def run_child(words: list[str], data: Path, threads: int) -> str:
    """Standard output of a child at the root of the repository; its whole output is shown where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "SFTDIST_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


@dataclass(frozen=True)
class Bench:
    """Where the runs of one benchmark lie, and how long they are."""

    work: Path
    data: Path
    steps: int
    warmup: int
    overrides: list[str]

    def ours(self, name: str, number: int) -> dict[str, Any]:
        """Train; tokens over seconds of the timed steps."""
        processes, threads, stage = OURS[name]
        run_dir = self.run_dir(name, number)
        words = [*torchrun(processes), "-m", "sftdist.train", "+exp=chat_small", f"train.max_steps={self.steps}"]
        words += [f"run.dir={run_dir}", f"data.store_dir={self.work / 'stores'}", "tracking.wandb=disabled"]
        words += ["checkpoint.every_steps=0", "eval.every_steps=0", f"zero.stage={stage}", *self.overrides]
        loaded = load()
        run_child(words, self.data, threads)
        lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line["kind"] == "train"][self.warmup : -1]
        tokens, seconds = sum(line["tokens"] for line in lines), sum(line["step_seconds"] for line in lines)
        return row(f"sftdist, {name}", tokens / seconds, loaded, lines[-1]["loss"])

    def share(self, name: str, number: int) -> dict[str, Any]:
        """What `benchmarks/share.py` finds."""
        processes, threads, stage = OURS[name]
        words = ["-m", "benchmarks.share", "--run-dir", f"{self.run_dir(name, number)}-share"]
        words += ["--threads", str(threads), "--steps", str(self.steps - self.warmup - 1), "--warmup", str(self.warmup)]
        words += [f"data.store_dir={self.work / 'stores'}", f"zero.stage={stage}", *self.overrides]
        os.environ["SFTDIST_DATA"] = str(self.data)
        return run_on_ranks(processes, words)

    def peer(self, setting: PeerSetting, *further: str) -> dict[str, Any]:
        """The same model, tokenizer, rows, pack length, packs a step and learning rate through TRL."""
        ours = self.run_dir("2 ranks", 1)
        config = OmegaConf.load(ours / "config.yaml")
        rows = self.work / "rows.jsonl"
        if not rows.exists():
            write_rows(rows, ours, self.data)
        packs = int(config.train.packs_per_step)
        words = torchrun(setting.processes) if setting.processes > 1 else [sys.executable]
        words += ["benchmarks/peer_trl.py", "--config", str(ours / "export"), "--tokenizer", str(ours / "export")]
        words += ["--rows", str(rows), "--work", str(self.work / "trl"), "--dtype", setting.dtype]
        words += ["--pack-tokens", str(config.train.pack_tokens), "--packs-per-step", str(packs)]
        words += ["--steps", str(self.steps), "--warmup", str(self.warmup), "--lr", str(config.optimizer.lr)]
        if setting.layout == "padded":  # about the tokens of a pack
            drawn = len(rows.read_text(encoding="utf-8").splitlines())
            words += ["--padded", str(round(drawn / (self.steps * packs)))]
        loaded = load()
        output = run_child([*words, *further], self.data, threads=max(1, RANKS // setting.processes))
        result = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).split(" ", 1)[1])
        return row(str(setting), result["tokens_per_second"], loaded, result["losses"][-1])

    def run_dir(self, name: str, number: int) -> Path:
        return self.work / f"{name.split(',')[0].replace(' ', '-')}-{number}"


def row(trainer: str, tokens_per_second: float, loaded: float, loss: float) -> dict[str, Any]:
    return {"trainer": trainer, "tokens_per_second": tokens_per_second, "load": loaded, "last_loss": loss}


def write_rows(path: Path, ours: Path, data: Path) -> None:
    """The conversations that our run drew, in their order, as rows with `messages`."""
    texts: dict[str, list[dict[str, str]]] = {}
    for source, name in zip(("domain", "general", "format"), SOURCES, strict=True):
        for line, raw in enumerate(read_jsonl(data / name), start=1):
            found = parse(raw, RowShape.auto, file=name, line=line, id=None)
            assert isinstance(found, Conversation), found
            messages = [{"role": message.role, "content": message.content} for message in found.messages]
            texts[f"{source}/{found.id}"] = messages
    drawn = [one for step in read_jsonl(ours / "log" / "rows.jsonl") for one in step["rows"]]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": texts[one]}) + "\n" for one in drawn)


@dataclass(frozen=True)
class Found:
    """Ratios and shares by name, one for each round; the rows of the table; TRL's settings, tried shortly."""

    ratios: dict[str, list[float]]
    shares: dict[str, list[dict[str, Any]]]
    table: list[dict[str, Any]]
    tried: list[dict[str, Any]]

    def medians(self) -> dict[str, float]:
        shares = {
            f"share of products, {name}": median(one["share_of_products"] for one in found)
            for name, found in self.shares.items()
        }
        return {name: median(ratios) for name, ratios in self.ratios.items()} | shares


def measure(bench: Bench, rounds: int, peers: list[PeerSetting], further: Sequence[str] = ()) -> Found:
    """Everything in turn, so often. One peer is not tried first; `further`: its options."""
    found = Found({name: [] for name in BARS}, {name: [] for name in OURS}, [], [])
    best = peers[0]
    for number in range(1, rounds + 1):
        rates = {}
        for name in OURS:
            entry = bench.ours(name, number)
            rates[name] = entry["tokens_per_second"]
            found.table.append({"round": number, **entry})
            print(found.table[-1], flush=True)
            found.shares[name].append(bench.share(name, number))
        if number == 1 and len(peers) > 1:
            for setting in peers:
                found.tried.append({**bench.peer(setting, *SHORT)})
                print(found.tried[-1], flush=True)
            speeds = [entry["tokens_per_second"] for entry in found.tried]
            best = peers[speeds.index(max(speeds))]
        entry = bench.peer(best, *further)
        found.table.append({"round": number, **entry})
        print(found.table[-1], flush=True)
        found.ratios["ours / TRL"].append(rates["2 ranks"] / entry["tokens_per_second"])
        found.ratios["2 ranks / 2 threads"].append(rates["2 ranks"] / rates["1 process, 2 threads"])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--peers", default=PEERS, help="processes:dtype[:padded], tried in round 1")
    parser.add_argument("overrides", nargs="*", help="further overrides of our run")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    peers = [PeerSetting.of(word) for word in args.peers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), shared_data(), args.steps, args.warmup, args.overrides)
        found = measure(bench, args.rounds, peers)
    medians = found.medians()
    figures: dict[str, Any] = {**medians, "aims": BARS}
    figures |= {f"{name}, by round": [round(one, 3) for one in ratios] for name, ratios in found.ratios.items()}
    shares = [
        {"ranks": name, **{key: value for key, value in one.items() if key != "gflops_by_shape"}}
        for name, several in found.shares.items()
        for one in several
    ]
    rates = [
        {"ranks": name, "tokens x inputs x outputs": shape, "GFLOP/s": rate}
        for name, several in found.shares.items()
        for shape, rate in several[-1]["gflops_by_shape"].items()
    ]
    more = {
        "Share of the rate of the step's own matrix products": shares,
        "A linear layer's three products alone, per rank": rates,
        "TRL's settings, a few short steps each": found.tried,
    }
    notes = [
        *NOTES,
        *(f"MISSED: {name} is {medians[name]:.2f}, the aim {bar}." for name, bar in missed(medians).items()),
    ]
    Result("step", command("benchmarks.step"), figures, found.table, str(__doc__).split("\n")[0], more, notes).save()
    return 1 if missed(medians) else 0


def missed(medians: dict[str, float]) -> dict[str, float]:
    """The aims that were not reached, by name."""
    return {name: bar for name, bar in BARS.items() if not medians[name] >= bar}


NOTES = [
    "TRL's packs of 2,048 tokens go through a dense mask on a CPU, whose cost is quadratic in the pack: that is why "
    "padded batches of like lengths are tried beside them. The products alone run on the same tensors again and again, "
    "out of the caches: no step reaches their rate. What else a step does is in results/*-profile_step.md.",
]


if __name__ == "__main__":
    sys.exit(main())
