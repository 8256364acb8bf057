"""One rank of `benchmarks/step.py`: steps of `exp=chat_small`, and between them the step's own matrix products alone.

    torchrun --nproc-per-node N -m benchmarks.share --run-dir DIR --threads N --worker FILE [OVERRIDE ...]

FLOPs of a step over its seconds, as a share of the rate at which its products (each linear layer's forward and the two
of its backward, at the model's own shapes) run alone, on the same ranks and threads, a moment later. FLOPs of the
attention count in the step, their rate does not count among the products.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.training import Trainer, products_rate, training


def measure(trainer: Trainer, steps: int, warmup: int) -> dict[str, Any]:
    """Medians over the steps, of all ranks together."""
    rates, shares, tokens = [], [], []
    by_shape: dict[str, float] = {}
    for number in range(warmup + steps):
        done = trainer.step()
        if number < warmup:
            continue
        found = products_rate(trainer, done.packs)
        rate = trainer.world.all_reduce_sum(torch.tensor([found.per_second], dtype=torch.float64)).item()
        rates.append(rate)
        shares.append(done.flops / done.seconds / rate)
        tokens.append(done.tokens / done.seconds)
        by_shape = {shape: round(gflops, 1) for shape, gflops in found.by_shape.items()}
    return {
        "tokens_per_second": median(tokens),
        "products_gflops": median(rates) / 1e9,
        "share_of_products": median(shares),
        "gflops_by_shape": by_shape,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--worker", type=Path, required=True, help="the file of the result")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with training(args.run_dir, args.overrides, args.threads) as trainer:
        found = measure(trainer, args.steps, args.warmup)
        if trainer.world.is_main:
            args.worker.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
