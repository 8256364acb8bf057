"""Which rows, and which layer: what is looked up once a loss or a gradient was not finite.

The packs of the step run again with a watch over every module, from the weights that the step has left as they were. A
healthy step pays nothing for it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from sftdist.data.loader import Batch, Step
from sftdist.training.engine import Engine
from sftdist.training.layer_watch import FORWARD, Event, LayerWatch
from sftdist.training.loop import Flags, NonFinite, named_rows, run_micro_batches

SHOWN = 10  # rows


@dataclass(frozen=True)
class Found:
    """On one rank: the pack, from 0, the words for the place in the model, and the rows that can be to blame."""

    rank: int
    pack: int
    place: str
    in_forward: bool
    rows: list[str]

    def __str__(self) -> str:
        more = "" if len(self.rows) <= SHOWN else f" and {len(self.rows) - SHOWN} more"
        named = f", row {self.rows[0]}" if len(self.rows) == 1 else f", rows {', '.join(self.rows[:SHOWN])}{more}"
        return f"{self.place}: pack {self.pack + 1} of rank {self.rank}{named if self.rows else ''}"


def explained(error: NonFinite, engine: Engine, world: World, run_dir: Path) -> TrainingError:
    """The error with the place, the rows, and what to do next; the same on every rank."""
    number, run = error.step.step + 1, shlex.quote(str(run_dir))
    return TrainingError(
        f"{error} {first_non_finite(engine, error.step, world)}\n"
        f"The step again, layer by layer: sftdist train replay={run} step={number}\n"
        f"Its rows as they are trained: sftdist inspect run.dir={run} step={number}\n"
        "Where they are sound, lower optimizer.lr or optimizer.max_grad_norm in a new run. "
        f"{named_rows(error.step)}"
    )


def first_non_finite(engine: Engine, step: Step, world: World) -> str:
    """A sentence: where in the model, in which pack and rows the first such value came up. All ranks call it together,
    after the step has failed, and get the same words."""
    world.progress.note("looking for the layer and the rows")
    engine.discard()
    with LayerWatch(engine.module) as watch:
        run_micro_batches(engine, step, world, Flags)
    engine.discard()
    found = first_of(watch, step, world)
    if found is None:
        return (
            "Run once more, every value of these packs was finite: look at dropout, at the learning rate of the step "
            "before, and at the hardware (sftdist doctor)."
        )
    return f"The first value that is not finite is {found}."


def first_of(watch: LayerWatch, step: Step, world: World) -> str | None:
    """The first such value that any rank has seen, in words; None where all were finite. Collective."""
    mine = None if watch.first is None else _found(watch.first, step.micro[watch.first.pack], world.rank)
    found = [one for one in world.gather_objects(mine) if one is not None]
    if not found:
        return None
    # A bad value of one rank's backward is in what all ranks reduce; one of a forward can only be its own.
    first = min(found, key=lambda one: (not one.in_forward, one.pack, one.rank))
    return f"{first} (and on {len(found) - 1} more ranks)" if len(found) > 1 else str(first)


def _found(event: Event, batch: Batch, rank: int) -> Found:
    in_forward = event.phase == FORWARD
    place = f"in the output of {event.name}" if in_forward else f"in the backward, in the gradient of {event.name}"
    return Found(rank, event.pack, place, in_forward, rows_at(batch, event.positions))


def rows_at(batch: Batch, positions: torch.Tensor | None) -> list[str]:
    """The rows that hold these positions of a pack, in their order; None: all of them."""
    if positions is None or not batch.row_ids:
        return list(batch.row_ids)
    documents = torch.searchsorted(batch.cu_seqlens.cpu().long(), positions.cpu(), right=True) - 1
    return [batch.row_ids[at] for at in documents.unique().tolist() if at < len(batch.row_ids)]
