"""What the configured training makes of the stores: what `data.max_len` costs, pack fill, the realised mixture.

It is the plan that `train` makes, over one pass at most: lengths and supervised counts alone, no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sftdist.data.corpus import Corpus
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan, PlanSpec
from sftdist.data.report import lost_at
from sftdist.data.store import TokenStore

ASSUMED_PACKS = 8  # a step, where no size of a step is given: fill and shares hardly depend on it
# Packs are balanced by their attention work. Whatever its size, a model without sliding windows gives this plan.
FULL_ATTENTION = CostModel(0.0, attention=((1.0, None),))


def length_figures(stores: Mapping[str, TokenStore], max_len: int, overlong: str) -> dict[str, Any]:
    """Per source the train rows longer than `data.max_len`, with their tokens and supervised weight."""
    return {
        "max_len": max_len,
        "overlong": overlong,
        "over": {name: lost_at(store, max_len) for name, store in stores.items()},
    }


def plan_figures(corpus: Corpus, spec: PlanSpec) -> dict[str, Any]:
    """Steps, packs, fill and shares of one pass. Raises ConfigError and DataError as the plan of `train` does.

    `repeats`: the whole run in multiples of that. `assumed_packs`: packs a step where no size of a step is given,
    else null.
    """
    epochs = min(spec.epochs or 1.0, 1.0)
    assumed = ASSUMED_PACKS if spec.packs_per_step is None and spec.conversations_per_step is None else None
    spec = replace(spec, packs_per_step=spec.packs_per_step or assumed)
    totals = Plan(corpus.tables, replace(spec, epochs=epochs), FULL_ATTENTION).totals()
    asked = [spec.epochs / epochs] if spec.epochs else []
    asked += [spec.max_steps / totals.steps] if spec.max_steps else []
    return {
        **asdict(totals),
        "sources": [asdict(source) for source in totals.sources],  # a list, as in the file
        "assumed_packs": assumed,
        "epochs": epochs,
        "repeats": min(asked, default=1.0),
        "epochs_asked": spec.epochs,
        "pack_tokens": spec.pack_tokens,
        "packs_per_step": spec.packs_per_step,
        "conversations_per_step": spec.conversations_per_step,
        "packing": spec.packing,
        "mix_mode": spec.mix_mode,
    }
