"""Tokens per second of `exp=chat_small` on two CPU ranks beside TRL's SFTTrainer, alternating in one run.

    python -m benchmarks.step [--rounds 3] [--steps 10]

Both train the same model shape from random weights with AdamW on the same rows (those that our run drew, by id, in
their order), in packs of the same length and as many packs a step. TRL packs with `bfd`, computes
`assistant_only_loss`, and runs in the fastest of the settings that are tried in the first round. The first steps are
not timed. Ours is measured by its own `metrics.jsonl` (from taking the batch to the end of the update), TRL from the
end of a step to the end of the next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from benchmarks.machine import ROOT, SOURCES, Result, command, load, shared_data
from sftdist.core.settings import RowShape
from sftdist.core.storage import read_jsonl
from sftdist.data.schema import Conversation, parse

RANKS = 2
BAR = 2.5  # times TRL


@dataclass(frozen=True)
class PeerSetting:
    """How TRL is run: processes (each with the other share of the cores as threads) and dtype."""

    processes: int
    dtype: str

    def __str__(self) -> str:
        return f"TRL {self.dtype}, {self.processes} processes"


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def run_child(words: list[str], data: Path, threads: int) -> str:
    """Standard output of a child at the root of the repository; its whole output is shown where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "SFTDIST_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def run_ours(work: Path, data: Path, name: str, steps: int, warmup: int, overrides: list[str]) -> dict[str, Any]:
    """Train `steps` steps; tokens over seconds of all but the first `warmup`."""
    run_dir = work / name
    words = [*torchrun(RANKS), "-m", "sftdist.train", "+exp=chat_small", f"train.max_steps={steps}"]
    words += [f"run.dir={run_dir}", f"data.store_dir={work / 'stores'}", "tracking.wandb=disabled"]
    words += ["checkpoint.every_steps=0", "eval.every_steps=0", *overrides]
    loaded = load()
    run_child(words, data, threads=1)
    lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line["kind"] == "train"][warmup:]
    tokens, seconds = sum(line["tokens"] for line in lines), sum(line["step_seconds"] for line in lines)
    return {"trainer": "sftdist", "tokens_per_second": tokens / seconds, "load": loaded, "last_loss": lines[-1]["loss"]}


def run_peer(work: Path, data: Path, ours: Path, setting: PeerSetting, steps: int, warmup: int) -> dict[str, Any]:
    """The same model, tokenizer, rows, pack length, packs a step and learning rate through TRL."""
    config = OmegaConf.load(ours / "config.yaml")
    rows = work / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, ours, data)
    words = torchrun(setting.processes) if setting.processes > 1 else [sys.executable]
    words += ["benchmarks/peer_trl.py", "--config", str(ours / "export"), "--tokenizer", str(ours / "export")]
    words += ["--rows", str(rows), "--work", str(work / "trl"), "--dtype", setting.dtype]
    words += ["--pack-tokens", str(config.train.pack_tokens), "--packs-per-step", str(config.train.packs_per_step)]
    words += ["--steps", str(steps), "--warmup", str(warmup), "--lr", str(config.optimizer.lr)]
    loaded = load()
    output = run_child(words, data, threads=max(1, RANKS // setting.processes))
    result = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).split(" ", 1)[1])
    return {
        "trainer": str(setting),
        "tokens_per_second": result["tokens_per_second"],
        "load": loaded,
        "last_loss": result["losses"][-1],
    }


def write_rows(path: Path, ours: Path, data: Path) -> None:
    """The conversations that our run drew, in their order, as rows with `messages`."""
    texts: dict[str, list[dict[str, str]]] = {}
    for source, name in zip(("domain", "general", "format"), SOURCES, strict=True):
        for line, row in enumerate(read_jsonl(data / name), start=1):
            found = parse(row, RowShape.auto, file=name, line=line, id=None)
            assert isinstance(found, Conversation), found
            messages = [{"role": message.role, "content": message.content} for message in found.messages]
            texts[f"{source}/{found.id}"] = messages
    drawn = [row for step in read_jsonl(ours / "log" / "rows.jsonl") for row in step["rows"]]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": texts[row]}) + "\n" for row in drawn)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--peers", default="2:bf16_weights,2:bf16_autocast", help="processes:dtype, tried in round 1")
    parser.add_argument("overrides", nargs="*", help="further overrides of our run")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    data = shared_data()
    peers = [PeerSetting(int(word.split(":")[0]), word.split(":")[1]) for word in args.peers.split(",")]
    table: list[dict[str, Any]] = []
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for number in range(1, args.rounds + 1):
            ours = run_ours(work, data, f"ours-{number}", args.steps, args.warmup, args.overrides)
            tried = [run_peer(work, data, work / "ours-1", peer, args.steps, args.warmup) for peer in peers]
            rates = [entry["tokens_per_second"] for entry in tried]
            ratios.append(ours["tokens_per_second"] / max(rates))
            for entry in (ours, *tried):
                table.append({"round": number, **entry})
                print(table[-1], flush=True)
            peers = [peers[rates.index(max(rates))]]
    figures = {"ratio": median(ratios), "ratio_of_each_round": [round(ratio, 2) for ratio in ratios], "bar": BAR}
    Result("step", command("benchmarks.step"), figures, table, about=str(__doc__).split("\n")[0]).save()
    return 0 if median(ratios) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
