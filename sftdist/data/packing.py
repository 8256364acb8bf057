"""Lengths -> packs -> ranks: integers and numpy only, pure functions.

The packs of a window are a grid: `steps` columns of `slots` packs. Documents are dealt into it in
descending length (best fit decreasing), a batch at a time, never row by row in Python:

1. Costly documents. A document whose attention alone exceeds that of an average pack makes a pack
   that no company can make cheap. Such packs are put beside their equals, at most a quarter of a
   step (half of a small one): one 8,192-token document makes seven ranks wait, two of them make
   six. They get no company that would make the step slower than its costliest document does, and
   for each of them three packs of its step are given less to do: less attention, and where that
   is not enough fewer tokens. A rank that gets all four is no slower than the others.
2. The bulk. Each batch goes to the emptiest steps, and in them to the packs with the least
   attention work so far (longest processing time first, Graham 1969). So packs of one step cost
   the same, and all steps see every length alike. In a batch each source's documents go to the
   steps that have least of that source.
3. Closing. Every pack takes the longest document that still fits, until none does.
4. Exchange. A pack that is not full swaps a document for one of the same source that is longer by
   just what is missing, out of those that stay behind.

Every quantity that decides is a whole number and every sort is stable, so all machines agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftdist.data.permutation import hash64

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

STEP_WEIGHT = 64.0  # weight of "this step is emptier" against "this pack has less attention work"
COSTLY_SHARE = 4  # at most 1 / COSTLY_SHARE of a step's packs are costly ones
SMALL_STEP = 16  # packs; up to here a rank may have one pack a step, and then only equals help: half may be costly
RELIEF = 3  # packs that do less for each costly one
RELIEF_FACTOR = 1.3  # times what the costly pack exceeds the average by: not every rank gets its very own three
SPARED = 0.8  # of an average pack's attention can be saved by short documents
MASS_UNIT = 64.0  # masses are rounded to 1/64 of a supervised token where they decide
EXCHANGES = 5
FULL = 0.9998  # no more exchanges beyond this fill
OVERDUE = 2  # a document that was left over so often is placed before all others


@dataclass(frozen=True)
class CostModel:
    """FLOPs of training on a document, forward and backward.

    `tokens`: FLOPs per token, `head`: per supervised one, of which there is a share of `supervised` in the mean.
    `attention`: (FLOPs per query-key pair, window or None) per kind of layer, summed over the layers of that kind.
    Pairs are causal: n (n + 1) / 2 without a window.
    """

    tokens: float
    attention: tuple[tuple[float, int | None], ...] = ()
    head: float = 0.0
    supervised: float = 0.0

    @property
    def dense(self) -> float:
        """FLOPs per token, the head's at the mean share included."""
        return self.tokens + self.supervised * self.head

    def attention_of(self, lengths: NDArray[np.integer]) -> Floats:
        """Attention FLOPs per document, float64, same shape as `lengths`."""
        n = np.asarray(lengths, np.float64)
        flops = np.zeros_like(n)
        for per_pair, window in self.attention:
            full = n if window is None else np.minimum(n, window)
            flops += per_pair * (full * (full + 1) / 2 + (n - full) * full)
        return flops

    def of(self, lengths: NDArray[np.integer]) -> Floats:
        """FLOPs per document, float64, same shape as `lengths`."""
        return self.dense * np.asarray(lengths, np.float64) + self.attention_of(lengths)

    def exact(self, planned: float, tokens: int, supervised: float) -> float:
        """FLOPs of documents that were planned to take `planned`, now that their supervised tokens are counted."""
        return planned + self.head * (supervised - self.supervised * tokens)


class _Grid:
    """A window in the making. Pack p stands in step p % steps; documents are in dealing order."""

    def __init__(
        self,
        length: Ints,
        work: Floats,
        source: Ints,
        mass: Floats,
        capacity: int,
        steps: int,
        slots: int,
        token_work: float,
        seed: int,
    ) -> None:
        self.length, self.work, self.source, self.mass = length, work, source, mass
        self.capacity, self.steps, self.slots, self.token_work = capacity, steps, slots, token_work
        self.packs = steps * slots
        self.sources = int(source.max(initial=0)) + 1
        self.pack = np.full(len(length), -1, np.int64)
        self.room = np.full(self.packs, capacity, np.int64)
        self.load = np.zeros(self.packs)
        self.step = np.tile(np.arange(steps), slots)
        self.have = np.zeros((self.sources, steps))
        # distinct in [0, 1/1024): equal packs are chosen in no particular order
        hashed = hash64(np.arange(self.packs, dtype=np.uint64) + np.uint64(seed % (1 << 63)))
        self.tie = (hashed >> np.uint64(11)).astype(np.float64) / 2**63

    def put(self, documents: Ints, packs: Ints) -> None:
        self.pack[documents] = packs
        np.subtract.at(self.room, packs, self.length[documents])
        np.add.at(self.load, packs, self.work[documents])
        np.add.at(self.have, (self.source[documents], self.step[packs]), self.mass[documents])

    def deal_costly(self, documents: Ints, average: float) -> int:
        """Place the documents that are costlier than an average pack; returns how many those are."""
        group = -(-self.slots // (2 if self.slots <= SMALL_STEP else COSTLY_SHARE))
        number = min(int(np.count_nonzero(self.work[documents] > average)), group * self.steps)
        i = np.arange(number)
        self.put(documents[:number], i % group * self.steps + i // group)
        excess = self._excess(group, average)
        self._relieve(group, average, excess)
        return number

    def _excess(self, group: int, average: float) -> Floats:
        """Work of the first `group` packs of each step beyond an average pack, 0 where there is none.

        They get no more company than makes them as costly as the costliest document of their step is by itself.
        """
        load, room = (column.reshape(self.slots, self.steps)[:group] for column in (self.load, self.room))
        excess = load - average
        if self.token_work:
            alone = load + self.token_work * (self.capacity - room)
            limit = np.maximum(alone.max(0), average + self.token_work * self.capacity)
            company = np.minimum(room, ((limit - alone) // self.token_work).astype(np.int64))
            excess -= self.token_work * (room - company)
            room[:] = company
        return np.maximum(excess, 0.0)

    def _relieve(self, group: int, average: float, excess: Floats) -> None:
        """For each of the first `group` packs of a step let three others do less.

        As work that they seem to have already: the bulk passes them by until only short documents are left. In a step
        so small that a rank may have one pack of it, nobody would gain by fewer tokens.
        """
        load, room = (column.reshape(self.slots, self.steps) for column in (self.load, self.room))
        others = slice(group, min(self.slots, group + RELIEF * group))
        wanted = np.repeat(excess, RELIEF, axis=0)[: others.stop - group]
        wanted = np.rint(wanted * (RELIEF_FACTOR / RELIEF))
        load[others] += np.minimum(wanted, np.rint(SPARED * average))
        if self.token_work and self.slots > SMALL_STEP:
            tokens = np.maximum(wanted - np.rint(SPARED * average), 0.0) // self.token_work
            room[others] -= np.minimum(tokens, self.capacity).astype(np.int64)

    def deal_bulk(self, documents: Ints, average: float) -> Ints:
        """Deal documents of descending length until they no longer fit half of the packs; returns the rest."""
        batch = -(-self.packs // 2)
        i = 0
        while i < len(documents):
            longest = self.length[documents[i]]
            each = max(1, int(self.room.max()) // (3 * int(longest)))  # short documents are dealt by the handful
            able = (self.room >= each * longest).nonzero()[0]
            if len(able) < batch:
                break
            if len(able) > batch:
                room = np.add.reduce(self.room.reshape(self.slots, self.steps))
                key = (self.load / average + self.tie).reshape(self.slots, self.steps)
                key -= room * (STEP_WEIGHT / (self.capacity * self.slots))
                able = able[key.ravel()[able].argsort(kind="stable")[:batch]]
            chosen = documents[i : i + each * len(able)]
            able = (np.tile(able, each) if each > 1 else able)[: len(chosen)]
            self.put(chosen, self._by_source(chosen, able))
            i += len(chosen)
        return documents[i:]

    def _by_source(self, documents: Ints, packs: Ints) -> Ints:
        """Which document goes to which of the packs: each source to the steps that have least of it."""
        if self.sources == 1:
            return packs
        packs = packs[self.step[packs].argsort(kind="stable")]
        source = self.source[documents]
        counts = np.bincount(source, minlength=self.sources)
        chosen = np.empty(len(documents), np.int64)
        rarest_first = counts.argsort(kind="stable")
        for s in rarest_first[:-1]:
            if not counts[s]:
                continue
            mine = (source == s).nonzero()[0]
            # the second pack of a step is chosen as if the first had got a document of this source
            step = self.step[packs]
            repeat = np.arange(len(packs)) - step.searchsorted(step)
            typical = float(np.add.reduce(self.mass[documents[mine]])) / len(mine)
            best = (self.have[s][step] + repeat * typical + self.tie[packs]).argsort(kind="stable")[: len(mine)]
            chosen[mine] = packs[best]
            free = np.ones(len(packs), np.bool_)
            free[best] = False
            packs = packs[free]
        chosen[source == rarest_first[-1]] = packs
        return chosen

    def close(self, documents: Ints) -> None:
        """Give every pack, the emptiest first, the longest document that fits, until none does."""
        documents = documents[(-self.length[documents]).argsort(kind="stable")]
        packs = np.arange(self.packs)
        while len(documents):
            shortest = self.length[documents[-1]]
            packs = packs[self.room[packs] >= shortest]
            packs = packs[(-self.room[packs]).argsort(kind="stable")]
            fits = (-self.length[documents]).searchsorted(-self.room[packs])
            slot = np.arange(len(packs))
            taken = np.maximum.accumulate(fits - slot) + slot  # the first that fits and is not yet taken
            packs, taken = packs[taken < len(documents)], taken[taken < len(documents)]
            if not len(taken):
                break
            self.put(documents[taken], packs)
            left = np.ones(len(documents), np.bool_)
            left[taken] = False
            documents = documents[left]

    def exchange(self, fixed: NDArray[np.bool_]) -> None:
        """Swap documents of unfull packs for longer ones of the same source among those left over."""
        scale = self.capacity + 1
        code = self.source * scale + self.length
        for number in range(EXCHANGES):
            if int(self.room.sum()) <= (1 - FULL) * self.packs * self.capacity:
                return
            spare = (self.pack < 0).nonzero()[0]
            spare = spare[code[spare].argsort(kind="stable")]
            held = ((self.pack >= 0) & ~fixed).nonzero()[0]
            held = held[self.room[self.pack[held]] > 0]
            if not len(spare) or not len(held):
                return
            wanted = code[held] + self.room[self.pack[held]]
            found = code[spare].searchsorted(wanted, side="right") - 1
            gain = np.where(found >= 0, code[spare[found]] - code[held], 0)  # a shorter or another source's: <= 0
            held, found, gain = held[gain > 0], found[gain > 0], gain[gain > 0]
            out = self._best_per_pack(held, gain, number)
            out = out[found[out].argsort(kind="stable")]
            # the second pack that wants a document takes the one before it, if it is as long
            place = found[out] - (np.arange(len(out)) - found[out].searchsorted(found[out]))
            same = (place >= 0) & (code[spare[np.maximum(place, 0)]] == code[spare[found[out]]])
            self._swap(held[out[same]], spare[place[same]])

    def _best_per_pack(self, held: Ints, gain: Ints, number: int) -> Ints:
        """For each pack the place in `held` of the swap with the largest gain; equals by lot."""
        lot = (hash64(held.astype(np.uint64) + np.uint64(number << 32)) >> np.uint64(44)).astype(np.int64)
        order = np.argsort((self.pack[held] * (self.capacity + 1) + gain) * (1 << 20) + lot, kind="stable")
        pack = self.pack[held[order]]
        last = np.ones(len(pack), np.bool_)
        last[:-1] = pack[1:] != pack[:-1]
        return order[last]

    def _swap(self, out: Ints, into: Ints) -> None:
        packs = self.pack[out]
        self.pack[into], self.pack[out] = packs, -1
        self.room[packs] += self.length[out] - self.length[into]


def pack_grid(
    lengths: NDArray[np.integer],
    capacity: int,
    steps: int,
    slots: int,
    *,
    attention: Floats | None = None,
    source: NDArray[np.integer] | None = None,
    mass: Floats | None = None,
    age: NDArray[np.integer] | None = None,
    dense: float = 0.0,
    seed: int = 0,
) -> Ints:
    """Pack documents, in mixture order, into `steps` x `slots` packs of at most `capacity` tokens.

    `attention` float64 [n] FLOPs; `dense` FLOPs per token (0: unknown, no pack is given fewer tokens);
    `source` int [n]; `mass` float64 [n] weight over targets; `age` int [n]: how often a document was
    left over before; those who waited twice are placed first.
    Returns int64 [n]: the pack of each document, step = pack // slots; -1 for those left over.
    """
    length = np.asarray(lengths, np.int64)
    n = len(length)
    work = np.zeros(n) if attention is None else attention
    unit = 2.0**24 / max(float(work.max(initial=0.0)), 1e-300)
    work = np.rint(work * unit)
    grid = _Grid(
        length,
        work,
        np.zeros(n, np.int64) if source is None else np.asarray(source, np.int64),
        np.zeros(n) if mass is None else np.rint(mass * MASS_UNIT),
        capacity,
        steps,
        slots,
        np.rint(dense * unit),
        seed,
    )
    age = np.zeros(n, np.int64) if age is None else np.asarray(age, np.int64)
    # the rest of the window is there to choose from when packs are closed, and opens the next one
    candidates = np.arange(int(np.searchsorted(np.add.accumulate(length), grid.packs * capacity, side="right")))
    candidates = candidates[np.argsort(-length[candidates], kind="stable")]
    average = max(float(work[candidates].sum()) / grid.packs, 1.0)
    waiting = candidates[grid.deal_costly(candidates, average) :]
    left = []
    turn = np.where(age < OVERDUE, 0, age)[waiting]
    for one in range(int(turn.max(initial=0)), -1, -1):
        left.append(grid.deal_bulk(waiting[turn == one], average))
    for documents in left:
        grid.close(documents)
    grid.exchange(age >= OVERDUE)
    if (grid.room > 0).any():
        grid.close(np.flatnonzero(grid.pack < 0))
    placed = grid.pack >= 0
    return np.where(placed, grid.pack % steps * slots + grid.pack // steps, -1)


def deal(costs: Floats | Sequence[float], world_size: int) -> Ints:
    """Deal a step's packs to the ranks: the same number each, the same cost as nearly as possible.

    `costs` float64 [packs]. Returns int64 [world_size, ceil(packs / world_size)] of pack numbers,
    -1: an empty pack. Column j holds the j-th micro-batch of every rank; rows are in descending
    cost, so ranks that meet at each micro-batch meet with packs alike.
    """
    cost = np.asarray(costs, np.float64)
    micro = -(-len(cost) // world_size)
    padded = np.concatenate([cost, np.zeros(micro * world_size - len(cost))])
    order = np.argsort(-padded, kind="stable").reshape(micro, world_size)
    ranks = np.empty((world_size, micro), np.int64)
    load = np.zeros(world_size)
    for j, block in enumerate(order):
        lightest = np.argsort(load, kind="stable")
        ranks[lightest, j] = block
        load[lightest] += padded[block]
    if micro > 1:
        _even_out(ranks, padded)
    ranks = np.take_along_axis(ranks, np.argsort(-padded[ranks], axis=1, kind="stable"), axis=1)
    return np.where(ranks < len(cost), ranks, -1)


def _even_out(ranks: Ints, cost: Floats) -> None:
    """Swap packs between the costliest rank and another while that lowers the larger of the two."""
    load = np.add.accumulate(cost[ranks], axis=1)[:, -1]
    for _ in range(4 * ranks.size):
        high = int(np.argmax(load))
        moved = cost[ranks[high]][:, None, None] - cost[ranks][None]  # [own pack, rank, its pack]
        larger = np.maximum(load[high] - moved, load[None, :, None] + moved)
        own, other, theirs = np.unravel_index(int(np.argmin(larger)), larger.shape)
        if larger[own, other, theirs] >= load[high] * (1 - 1e-9):
            return
        ranks[high, own], ranks[other, theirs] = ranks[other, theirs], ranks[high, own]
        load[high] -= moved[own, other, theirs]
        load[other] += moved[own, other, theirs]
