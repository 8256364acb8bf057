"""Plan + stores -> batches: assembled in a thread, the same on every run, with a small JSON state."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftdist.core.errors import DataError
from sftdist.data.plan import Plan
from sftdist.data.steps import LoaderState, Pack, StepPlan

IGNORED = -100
CLOSE_SECONDS = 5.0
COUNT_TOLERANCE = 1e-4  # relative: float32 token weights against the float64 sums of the plan


class Store(Protocol):
    """What the loader needs of a token store."""

    @property
    def name(self) -> str: ...

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...

    def row_ids(self, rows: NDArray[np.int64]) -> list[str]: ...


@dataclass
class Batch:
    """One pack, a row of T tokens and D documents.

    `ids`, `targets` (-100: not supervised), `positions` int64 [T]; `weights` float32 [T] beside
    `targets`, or None when every one is 1; `cu_seqlens` int32 [D + 1]; `source` int64 [D]; `row_ids`
    one per document, none in an empty pack. Two more say what a device would else be asked for, and
    made to wait: `lengths`, the D lengths as Python's integers, and `index` int64 [N], the places of
    the targets (0 where there is none, so that the graph and its collectives stay).
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    weights: Tensor | None
    cu_seqlens: Tensor
    source: Tensor
    lengths: tuple[int, ...]
    index: Tensor
    row_ids: list[str]

    def to(self, device: torch.device) -> Batch:
        """On a device; from pinned memory the program does not wait for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of `LossModel.forward`."""
        return {name: value for name, value in vars(self).items() if name != "row_ids"}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **changed})


@dataclass(frozen=True)
class Document:
    """A tokenised conversation: `ids` int32 [n], `weights` float32 [n] of each token as a target."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    source: int
    row_id: str
    scale: float = 1.0  # factor on the weights


@dataclass(frozen=True)
class Step:
    """One optimizer step as one rank sees it.

    `micro`: this rank's packs, equally many on every rank. `denominator`: sum of the token weights
    of all ranks. `row_ids`: of all ranks, in the order of the plan; `rows` is their sha256. The
    rest is of all ranks as well: `shares` per source of the weights, `tokens`, `targets` (sum of
    the store's weights), `conversations`, `rank_balance` (mean / max cost), `pack_fill`.
    """

    step: int
    micro: list[Batch]
    denominator: float
    row_ids: list[str]
    rows: str
    shares: dict[str, float]
    tokens: int
    targets: float
    conversations: int
    rank_balance: float
    pack_fill: float
    flops: float
    after: LoaderState
    data_wait_seconds: float = 0.0


def rows_digest(row_ids: Sequence[str]) -> str:
    """sha256 of the ordered row ids."""
    return hashlib.sha256("\n".join(row_ids).encode()).hexdigest()


def pack_documents(documents: Sequence[Document]) -> Batch:
    """Documents -> one batch: targets are shifted inside each, its last token has none, positions restart."""
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    ids = np.concatenate([document.ids for document in documents]).astype(np.int64)
    targets = np.full(total, IGNORED, np.int64)
    weights = np.zeros(total, np.float32)
    weights[:-1] = np.concatenate([np.asarray(d.weights, np.float32) * np.float32(d.scale) for d in documents])[1:]
    weights[ends - 1] = 0
    supervised = np.flatnonzero(weights > 0)
    targets[supervised] = ids[supervised + 1]
    plain = bool((weights[supervised] == 1).all())
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(np.arange(total) - np.repeat(ends - lengths, lengths)),
        weights=None if plain else torch.from_numpy(weights),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        source=torch.tensor([document.source for document in documents], dtype=torch.int64),
        lengths=tuple(lengths.tolist()),
        index=torch.from_numpy(supervised if len(supervised) else np.zeros(1, np.int64)),
        row_ids=[document.row_id for document in documents],
    )


def empty_pack() -> Batch:
    """A micro-batch without a target: it keeps a rank in step with the others and weighs nothing."""
    batch = pack_documents([Document(np.zeros(1, np.int32), np.zeros(1, np.float32), 0, "")])
    batch.row_ids = []
    return batch


def supervised_weight(batch: Batch) -> float:
    """Sum of the weights over the targets of a batch: its part of the denominator."""
    if batch.weights is None:
        return float((batch.targets != IGNORED).sum())
    return float(batch.weights.double().sum())


class Assembler:
    """Turns planned steps into batches of one rank. `stores[s]` is the store of source s of the plan."""

    def __init__(self, plan: Plan, stores: Sequence[Store], *, rank: int, world_size: int) -> None:
        self.plan, self.stores, self.rank, self.world_size = plan, list(stores), rank, world_size

    def step(self, planned: StepPlan) -> Step:
        costs = planned.costs(self.plan.cost)
        ranks = planned.deal(self.world_size, self.plan.cost)
        loads = [sum(costs[p] for p in packs if p >= 0) for packs in ranks]
        row_ids = [self.row_ids(pack) for pack in planned.packs]
        ordered = [one for ids in row_ids for one in ids]
        tokens = sum(int(pack.length.sum()) for pack in planned.packs)
        return Step(
            step=planned.step,
            micro=[self.batch(planned.packs[p], row_ids[p]) if p >= 0 else empty_pack() for p in ranks[self.rank]],
            denominator=planned.denominator,
            row_ids=ordered,
            rows=rows_digest(ordered),
            shares={store.name: float(one) for store, one in zip(self.stores, planned.shares, strict=True)},
            tokens=tokens,
            targets=planned.targets,
            conversations=len(ordered),
            rank_balance=float(np.mean(loads) / np.max(loads)),
            pack_fill=tokens / (len(planned.packs) * self.plan.spec.pack_tokens),
            flops=self.plan.cost.exact(float(costs.sum()), tokens, planned.targets),
            after=planned.after,
        )

    def row_ids(self, pack: Pack) -> list[str]:
        """`source/id` of each document of a pack."""
        ids = [""] * len(pack.row)
        for s in np.unique(pack.source):
            mine = np.flatnonzero(pack.source == s)
            store = self.stores[s]
            for place, row_id in zip(mine, store.row_ids(pack.row[mine]), strict=True):
                ids[place] = f"{store.name}/{row_id}"
        return ids

    def batch(self, pack: Pack, row_ids: Sequence[str]) -> Batch:
        """Raises DataError when the store does not hold what the plan was made of."""
        batch = pack_documents([self._document(pack, place, row_ids[place]) for place in range(len(pack.row))])
        found = supervised_weight(batch)
        if abs(found - pack.weight) > COUNT_TOLERANCE * max(1.0, pack.weight):
            raise DataError(
                f"a pack holds {found:g} supervised tokens (weighted), its plan says {pack.weight:g}: "
                "the token store is not the one the plan was made of; run sftdist prepare again "
                f"(rows {', '.join(row_ids[:3])} ...)"
            )
        return batch

    def _document(self, pack: Pack, place: int, row_id: str) -> Document:
        source, length = int(pack.source[place]), int(pack.length[place])
        ids, weights = self.stores[source].tokens(int(pack.row[place]))
        if len(ids) < length:
            raise DataError(
                f"{row_id}: {len(ids)} tokens in the store, {length} in the plan; run sftdist prepare again"
            )
        return Document(ids[:length], weights[:length], source, row_id, float(pack.scale[place]))


class Loader:
    """The steps of one rank, assembled ahead in a thread. Errors of the thread are raised by `take`.

    For a GPU as the `device` the thread pins the packs, so that their copies there hold up nobody. The copies
    themselves need no stream of their own: a pack of 16k tokens is half a megabyte, some ten microseconds.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Store],
        *,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        prefetch: int = 2,
        device: torch.device | None = None,
    ) -> None:
        position = plan.start() if state is None else LoaderState.from_json(state)
        self._position = position
        self._ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
        self._closed = threading.Event()
        self._finished = False
        self._gpu = device if device is not None and device.type == "cuda" else None
        steps = plan.steps_from(position)
        assembler = Assembler(plan, stores, rank=rank, world_size=world_size)
        self._thread = threading.Thread(target=self._work, args=(steps, assembler), name="loader", daemon=True)
        self._thread.start()

    def _work(self, steps: Iterator[StepPlan], assembler: Assembler) -> None:
        try:
            if self._gpu is not None:  # of this thread: else each rank would open a context on the first GPU
                torch.cuda.set_device(self._gpu)
            for planned in steps:
                step = assembler.step(planned)
                if self._gpu is not None:
                    step = replace(step, micro=[batch.pinned() for batch in step.micro])
                if not self._hand_over(step):
                    return
            self._hand_over(None)
        except BaseException as error:  # it belongs to whoever takes the next step
            self._hand_over(error)

    def _hand_over(self, item: Step | BaseException | None) -> bool:
        """Wait for room in the queue; False when the loader was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take(self) -> Step:
        """The next step. Raises StopIteration after the last one, and whatever went wrong in the thread."""
        if self._finished or self._closed.is_set():
            raise StopIteration
        waited = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, Step):
            self._position = item.after
            return replace(item, data_wait_seconds=time.perf_counter() - waited)
        self._finished = True
        if item is None:
            raise StopIteration
        raise item

    def __iter__(self) -> Iterator[Step]:
        while not self._finished:
            try:
                yield self.take()
            except StopIteration:
                return

    def state(self) -> dict[str, Any]:
        """JSON of the position after the last step that was taken."""
        return self._position.to_json()

    def close(self) -> None:
        """Stop the thread; steps that were assembled ahead are dropped. One that a file system holds up is left to end
        with the process: nobody waits for it."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
