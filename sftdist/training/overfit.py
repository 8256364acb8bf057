"""A few rows of the training data, until the model knows them by heart: `sftdist train overfit=8 +exp=X`.

A sound setup brings their loss to about 0 within some hundred steps. What does not is broken, and is named.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from torch import nn

from sftdist.core.agent import STATUS
from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from sftdist.core.settings import TrainConfig, TrainJobConfig
from sftdist.core.snapshot import FILE, of_run
from sftdist.core.storage import write_json
from sftdist.data.corpus import Corpus
from sftdist.data.loader import Batch, Document, Step, empty_pack, pack_documents, rows_digest
from sftdist.data.steps import LoaderState, WindowState
from sftdist.training.engine import Engine
from sftdist.training.loop import Flags, run_micro_batches
from sftdist.training.opening import DATA_FILE
from sftdist.training.optimizer import full_shape

REPORT = "overfit.json"
GOAL = 0.05  # nats per supervised token, above what any model can reach
STEPS = 400
_SAID_EVERY = 20
_FLAT_AFTER = 60  # steps without a fall of `_FLAT` are enough to say so
_FLAT = 0.01
_DIVERGED = 1.5  # times the first loss
_FEW = 0.01  # share of the parameters


class Cause(StrEnum):
    """Why the loss did not get to 0."""

    FROZEN = "frozen"
    MASK = "mask"
    RATE_LOW = "rate too low"
    RATE_HIGH = "rate too high"
    NO_GRADIENT = "no gradient"
    FLAT = "flat"
    CONTRADICTION = "contradiction"
    FEW_PARAMETERS = "few parameters"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Facts:
    """What was seen. `losses`: of each step, before its update; `floor`: the least loss that any model can reach on
    these rows, above 0 where `contradictions` (row ids) go on differently after the same tokens; `moved`, `silent`:
    trainable tensors that changed, and those without a gradient, of `tensors`."""

    rows: int
    tokens: int
    supervised: int
    lr: float
    losses: list[float]
    floor: float
    contradictions: list[str]
    trainable: int
    parameters: int
    tensors: int
    moved: int
    silent: list[str]

    @property
    def reached(self) -> bool:
        return bool(self.losses) and self.losses[-1] <= self.floor + GOAL


def overfit_issues(cfg: TrainJobConfig) -> list[str]:
    """What is wrong with `overfit`, before anything starts."""
    if cfg.overfit is not None and cfg.overfit < 1:
        return [f"overfit={cfg.overfit}: required a number of rows, from 1 (8 is a good one)"]
    return []


def overfit_settings(cfg: TrainJobConfig) -> TrainConfig:
    """The run's own, in a directory beside that of the run, on one node."""
    launch = replace(cfg.launch, nodes=1, max_restarts=0)
    run = replace(cfg.run, dir=f"{cfg.run.dir}-overfit")
    return replace(of_run(cfg), run=run, launch=launch, auto=False)


def lay_out_overfit(cfg: TrainJobConfig) -> TrainConfig:
    """Its directory as one that has not begun: each try is a new one, also with other data and settings."""
    own = overfit_settings(cfg)
    for name in (STATUS, FILE, DATA_FILE, REPORT):
        (Path(str(own.run.dir)) / name).unlink(missing_ok=True)
    return own


def chosen_documents(corpus: Corpus, count: int, seed: int) -> list[Document]:
    """`count` rows of what is trained on, drawn from all sources that have a share; all where there are fewer."""
    sizes = [len(table.rows) if table.lam > 0 else 0 for table in corpus.tables]
    ends = np.cumsum(sizes)
    # Floyd's draw for few out of many: no list of 10^8 rows is made.
    drawn = np.sort(np.random.default_rng(seed).choice(ends[-1], min(count, int(ends[-1])), replace=False))
    documents = []
    for place in drawn.tolist():
        source = int(np.searchsorted(ends, place, side="right"))
        at = place - int(ends[source]) + sizes[source]
        table, store, here = corpus.tables[source], corpus.stores[source], slice(at, at + 1)
        rows, length = table.rows[here], int(table.lengths[here][0])
        ids, weights = store.tokens(int(rows[0]))
        name = f"{store.name}/{store.row_ids(rows)[0]}"
        documents.append(Document(ids[:length], weights[:length], source, name))
    return documents


def step_of_rows(documents: Sequence[Document], pack_tokens: int, world: World) -> Step:
    """All of them in one step: dealt to the ranks in turn, each rank's in packs of at most `pack_tokens`."""
    dealt = [packs_of(documents[rank :: world.size], pack_tokens) for rank in range(world.size)]
    mine, most = dealt[world.rank], max(map(len, dealt))
    names = [document.row_id for document in documents]
    weight = sum(float(document.weights[1:].sum(dtype=np.float64)) for document in documents)
    tokens = sum(len(document.ids) for document in documents)
    return Step(
        step=0,
        micro=[*mine, *(empty_pack() for _ in range(most - len(mine)))],
        denominator=weight,
        row_ids=names,
        rows=rows_digest(names),
        shares={},
        tokens=tokens,
        targets=weight,
        conversations=len(names),
        rank_balance=1.0,
        pack_fill=1.0,
        flops=0.0,
        after=LoaderState(0, WindowState.start(1), ""),
    )


def packs_of(documents: Sequence[Document], pack_tokens: int) -> list[Batch]:
    """In their order, as many in a pack as fit."""
    packs: list[list[Document]] = []
    for document in documents:
        if packs and sum(len(one.ids) for one in packs[-1]) + len(document.ids) <= pack_tokens:
            packs[-1].append(document)
        else:
            packs.append([document])
    return [pack_documents(pack) for pack in packs]


def floor_of(documents: Sequence[Document]) -> tuple[float, list[str]]:
    """The least mean loss that a model of these rows can have, and the rows that go on differently after the same
    tokens: there the best that it can say is how often each token comes."""
    after: dict[bytes, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    users: dict[bytes, list[str]] = defaultdict(list)
    for document in documents:
        ids = np.ascontiguousarray(document.ids, np.int32)
        for at in np.flatnonzero(document.weights[1:] > 0) + 1:
            key = ids[:at].tobytes()
            after[key][int(ids[at])] += float(document.weights[at])
            users[key].append(document.row_id)
    total = sum(sum(nexts.values()) for nexts in after.values())
    lost, rows = 0.0, list[str]()
    for key, nexts in after.items():
        if len(nexts) > 1:
            mass = sum(nexts.values())
            lost -= sum(weight * math.log(weight / mass) for weight in nexts.values())
            rows += users[key]
    return (lost / total if total else 0.0), list(dict.fromkeys(rows))


def overfit(
    engine: Engine,
    documents: Sequence[Document],
    pack_tokens: int,
    lr: float,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> Facts:
    """Train on these rows alone, at one learning rate and without dropout, to the goal or to the end of patience.
    Collective. Raises TrainingError on every rank where one was asked to stop."""
    world, step = engine.world, step_of_rows(documents, pack_tokens, engine.world)
    for part in engine.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    floor, contradictions = floor_of(documents)
    trainable = sum(shape.numel() for shape in engine.shapes().values())
    before, after, silent, losses = weight_marks(engine), dict[str, tuple[float, float]](), list[str](), list[float]()
    supervised = sum(int((document.weights[1:] > 0).sum()) for document in documents)
    for number in range(STEPS if supervised and trainable else 0):
        world.progress.begin_step(number + 1, step.row_ids)
        sums = run_micro_batches(engine, step, world, lambda: Flags(stopped()))
        if sums.any_rank.stop:
            raise TrainingError("stopped before the end; nothing was found out")
        losses.append(sums.mean(step.denominator))
        if number % _SAID_EVERY == 0:
            say(f"step {number}  loss {losses[-1]:.4f}")
        if not math.isfinite(losses[-1]) or losses[-1] <= floor + GOAL or _is_enough(losses):
            break
        if number == 2:  # an adapter's second half has its first gradient after one update
            silent = [name for name, norm in engine.gradient_norms().items() if norm == 0.0]
        try:
            engine.step(lr)
        except TrainingError:  # a gradient that is not finite
            losses.append(math.nan)
            break
        if number == 2:
            after = weight_marks(engine)
    after = after or weight_marks(engine)
    return Facts(
        rows=len(documents),
        tokens=step.tokens,
        supervised=supervised,
        lr=lr,
        losses=losses,
        floor=floor,
        contradictions=contradictions,
        trainable=trainable,
        parameters=sum(full_shape(one).numel() for one in engine.module.parameters()),
        tensors=len(before),
        moved=sum(before[name] != after[name] for name in before),
        silent=silent,
    )


def weight_marks(engine: Engine) -> dict[str, tuple[float, float]]:
    """Sum and norm of each trainable tensor: what changes when it does. Collective."""
    marks = {}
    for piece in engine.state():
        value = piece.tensors["value"].double()
        marks[piece.name] = (float(value.sum()), float(value.norm()))
    return marks


def _is_enough(losses: Sequence[float]) -> bool:
    """It diverges, or has not moved in all this time."""
    if len(losses) > 5 and losses[-1] > _DIVERGED * losses[0] + GOAL:
        return True
    return len(losses) == _FLAT_AFTER and min(losses) > (1 - _FLAT) * losses[0]


def causes_of(facts: Facts) -> list[tuple[Cause, str]]:
    """What is broken, with what to change; empty where nothing is."""
    found = list(_of_rows(facts))
    if facts.reached or (found and not facts.losses):
        return found
    return [*found, _of_training(facts)]


def _of_rows(facts: Facts) -> list[tuple[Cause, str]]:
    found = []
    if facts.supervised < 2 * facts.rows:
        what = "nothing is supervised" if not facts.supervised else "little more than the stop token is supervised"
        found.append(
            (
                Cause.MASK,
                f"{what}: {facts.supervised} of {facts.tokens} tokens in {facts.rows} rows are targets. Look at them: "
                "sftdist inspect; then at data.train_on, data.max_len (does it cut the answers off?) and the template",
            )
        )
    if facts.floor > _FLAT:
        names = ", ".join(facts.contradictions[:6])
        found.append(
            (
                Cause.CONTRADICTION,
                f"the same tokens go on in different ways in rows {names}: no model can get below {facts.floor:.3f} on "
                "them. Keep one answer per prompt (data.contradictions finds them in all of the data)",
            )
        )
    return found


def _of_training(facts: Facts) -> tuple[Cause, str]:
    losses, lr = facts.losses, facts.lr
    share = facts.trainable / max(1, facts.parameters)
    if not facts.trainable:
        return Cause.FROZEN, "no parameter trains: look at tune.method and tune.target"
    if not losses:
        return Cause.UNKNOWN, "no step was taken"
    if not math.isfinite(losses[-1]) or losses[-1] > _DIVERGED * losses[0] + GOAL:
        return (
            Cause.RATE_HIGH,
            f"the loss diverges, from {losses[0]:.3f} to {losses[-1]:.3f}: optimizer.lr={lr:g} is too high; "
            f"try {lr / 10:g}",
        )
    if len(facts.silent) == facts.tensors:
        return Cause.NO_GRADIENT, "every gradient is exactly 0: the loss does not reach the weights; look at train.loss"
    if not facts.moved:
        return Cause.FROZEN, f"no weight has changed in three updates at optimizer.lr={lr:g}: look at the optimizer"
    fell = losses[0] - min(losses)
    if share < _FEW and fell < 0.5 * losses[0]:
        return (
            Cause.FEW_PARAMETERS,
            f"only {facts.trainable:,} of {facts.parameters:,} parameters train ({share:.2%}), and the loss stays at "
            f"{losses[-1]:.3f}: look at tune.target, tune.r and what is frozen",
        )
    if losses[-1] - min(losses) > 0.25 * losses[0]:
        return Cause.RATE_HIGH, f"the loss jumps up and down: optimizer.lr={lr:g} is too high; try {lr / 10:g}"
    if _still_falls(losses):
        return (
            Cause.RATE_LOW,
            f"the loss falls, but in {len(losses)} steps only from {losses[0]:.3f} to {losses[-1]:.3f}: "
            f"optimizer.lr={lr:g} is too low; try {lr * 10:g}",
        )
    silent = f"; without any gradient: {', '.join(facts.silent[:6])}" if facts.silent else ""
    return (
        Cause.FLAT,
        f"the loss does not fall: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps at "
        f"optimizer.lr={lr:g}{silent}. Look at train.loss, the optimizer and the rows (sftdist inspect)",
    )


def _still_falls(losses: Sequence[float]) -> bool:
    """The mean of each third is below that of the one before."""
    third = len(losses) // 3
    if third < 2:
        return False
    means = [sum(losses[place : place + third]) / third for place in (0, third, 2 * third)]
    return means[0] > means[1] > means[2]


def write_report(facts: Facts, causes: Sequence[tuple[Cause, str]], run_dir: Path) -> None:
    """`run_dir/overfit.json`; a loss that is not finite is a string."""
    losses = [loss if math.isfinite(loss) else str(loss) for loss in facts.losses]
    told = [{"cause": str(cause), "words": words} for cause, words in causes]
    write_json(run_dir / REPORT, {**asdict(facts), "losses": losses, "reached": facts.reached, "causes": told})


def verdict(facts: Facts, causes: Sequence[tuple[Cause, str]]) -> str:
    """What the screen says at the end."""
    if not causes:
        return (
            f"overfit: the loss of {facts.rows} rows fell from {facts.losses[0]:.3f} to {facts.losses[-1]:.4f} in "
            f"{len(facts.losses)} steps: rows, mask, gradients and optimizer work together"
        )
    where = f"ended at {facts.losses[-1]:.4f}" if facts.losses else "was never taken"
    return "\n".join(
        [
            f"overfit: the loss of {facts.rows} rows {where}, required at most {GOAL:g}",
            *(f"{cause}: {words}" for cause, words in causes),
        ]
    )
