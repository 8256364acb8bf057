"""One optimizer step of a run, taken again under a watch: what `sftdist train replay=R step=N` prints and writes.

The steps since the newest checkpoint before it are taken as the run took them; then every layer is listened to. The
run's directory is only read, but for the folder of the replay and its report.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftdist.core.agent import STATUS
from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError, TrainingError
from sftdist.core.figures import METRICS
from sftdist.core.settings import TrainConfig, TrainJobConfig
from sftdist.core.snapshot import differences, of_run, read_config, require_run
from sftdist.core.storage import read_jsonl, write_json, write_text
from sftdist.core.table import columns
from sftdist.data.loader import IGNORED, Batch, Loader, Step
from sftdist.model.loss import heard_losses
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.engine import Engine
from sftdist.training.layer_watch import LayerWatch
from sftdist.training.loop import Flags, run_micro_batches, update
from sftdist.training.non_finite import first_of
from sftdist.training.opening import DATA_FILE
from sftdist.training.parts import Parts, base_of
from sftdist.training.retention import Keep
from sftdist.training.schedule import rate_of

SHOWN = 20  # rows on the screen
_FRAMES = 12  # lines of what torch says of a forward


def replay_issues(cfg: TrainJobConfig) -> list[str]:
    """What is wrong with `replay` and `step`, before anything starts.

    Raises ConfigError where `replay` names no run: what else is missing then does not matter.
    """
    if cfg.replay is None:
        return [] if cfg.step is None else ["step: it goes with replay=R, which names a run"]
    source = require_run(cfg.replay, "replay")
    issues = []
    if cfg.step is None or cfg.step < 1:
        issues.append(f"step={cfg.step}: with replay, required the number of an optimizer step, from 1")
    if cfg.overfit is not None:
        issues.append("overfit: it begins a run of its own; give it or replay, not both")
    if Path(str(cfg.run.dir)).expanduser().resolve() != source.resolve():
        issues.append("replay: the configuration is that of the run; leave +exp and run.dir out")
    elif changed := differences(read_config(source), cfg):
        issues += [
            f"{key}: given {new!r}, but the run has {old!r}; a replay changes nothing that is trained"
            for key, (old, new) in changed.items()
        ]
    return issues


def replay_settings(cfg: TrainJobConfig) -> TrainConfig:
    """The run's own, in a folder below it, on one node."""
    plain = of_run(cfg)
    folder = Path(str(cfg.replay)).expanduser() / "log" / f"replay-{cfg.step}"
    launch = replace(cfg.launch, nodes=1, max_restarts=0)
    return replace(plain, run=replace(cfg.run, dir=str(folder)), launch=launch, auto=False)


def lay_out_replay(cfg: TrainJobConfig) -> TrainConfig:
    """The folder as a run that has not begun, with the run's own word on its data: other data are refused."""
    own, source = replay_settings(cfg), Path(str(cfg.replay)).expanduser()
    folder = Path(str(own.run.dir))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS).unlink(missing_ok=True)
    if (source / DATA_FILE).is_file():
        write_text(folder / DATA_FILE, (source / DATA_FILE).read_text(encoding="utf-8"))
    return own


def write_replay(replay: Replay, source: Path) -> Path:
    """The report as JSON; a number that is not finite is a string, as in metrics.jsonl."""
    file = source / "log" / f"replay-{replay.step}.json"
    write_json(file, _plain(asdict(replay)))
    return file


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class RowLoss:
    """A row of the step: the mean cross-entropy over its supervised tokens, and the largest of them."""

    id: str
    rank: int
    pack: int
    supervised: int
    loss: float
    worst: float


@dataclass(frozen=True)
class LayerReport:
    """`activation`: root of the sum of squares of what the layer gives, over all packs of all ranks; `output_gradient`:
    of the loss's gradient by that; `weight_gradient`: of the step's reduced gradient by the layer's weights, before
    clipping; None where nothing was trained there, or where it was not reached."""

    name: str
    activation: float | None
    output_gradient: float | None
    weight_gradient: float | None


@dataclass(frozen=True)
class Replay:
    """`recorded`: the run's own line of the step, None where it has none. `found`: the first value that is not finite;
    `anomaly`: what torch says of the backward that made it."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    recorded: dict[str, float] | None
    found: str | None
    anomaly: str | None
    layers: list[LayerReport]
    rows: list[RowLoss]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def replay_step(
    cfg: TrainConfig,
    parts: Parts,
    source: Path,
    number: int,
    world: World,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> Replay:
    """Take step `number` (from 1) of the run in `source` again; collective. Raises ConfigError for a step that the run
    does not have, TrainingError on every rank where one was asked to stop."""
    if not 1 <= number <= parts.totals.steps:
        raise ConfigError(f"step={number}: there is no such step, required 1 to {parts.totals.steps}")
    engine = parts.trained.engine
    saved = Checkpoints(source / "checkpoints", Keep(), base=base_of(cfg, parts.trained, world)).load_before(
        number, engine, say
    )
    position = saved["data"] if saved else None
    done = int(saved["run"]["step"]) if saved else 0
    if number - 1 > done:
        say(f"steps {done + 1} to {number - 1} first, as the run took them")
    rate = rate_of(cfg.optimizer, parts.totals.steps)
    loader = Loader(
        parts.plan, parts.corpus.stores, rank=world.rank, world_size=world.size, state=position, device=world.device
    )
    try:
        for at in range(done, number - 1):
            step = loader.take()
            world.progress.begin_step(at + 1, step.row_ids)
            losses, _ = update(engine, step, world, rate(at), lambda: Flags(stopped()))
            if losses.any_rank.stop:
                raise TrainingError(f"stopped before step {number} was reached; nothing was found out")
        step = loader.take()
    finally:
        loader.close()
    world.progress.begin_step(number, step.row_ids)
    return _watched(parts, step, world, rate(number - 1), recorded_line(source, number))


def _watched(parts: Parts, step: Step, world: World, lr: float, recorded: dict[str, float] | None) -> Replay:
    """The step itself, heard layer by layer."""
    engine = parts.trained.engine
    with heard_losses(engine.module) as caught, LayerWatch(engine.module) as watch:
        losses = run_micro_batches(engine, step, world, Flags)
    found = first_of(watch, step, world)
    by_weight, norm = engine.gradient_norms(), _norm_of_update(engine, lr)
    rows = [row for rows in world.gather_objects(row_losses(step, caught, world.rank)) for row in rows]
    return Replay(
        step=step.step + 1,
        loss=losses.mean(step.denominator),
        grad_norm=norm,
        lr=lr,
        recorded=recorded,
        found=found,
        anomaly=_anomaly(engine, step, watch, world) if found else None,
        layers=_layers(watch, by_weight, world),
        rows=sorted(rows, key=lambda row: (math.isfinite(row.loss), -row.loss)),
    )


def _norm_of_update(engine: Engine, lr: float) -> float:
    """Of the step's gradient, as the run has it; the update stays in this process. NaN where it was refused."""
    try:
        return engine.step(lr).grad_norm
    except TrainingError:
        return math.nan


def recorded_line(source: Path, number: int) -> dict[str, float] | None:
    """Loss, gradient norm and rate that the run has written of this step; None where it has not."""
    path = source / METRICS
    if not path.is_file():
        return None
    lines = [line for line in read_jsonl(path) if line["kind"] == "train" and line["step"] == number]
    return {key: float(lines[-1][key]) for key in ("loss", "grad_norm", "lr")} if lines else None


def row_losses(step: Step, tokens: list[Tensor], rank: int) -> list[RowLoss]:
    """`tokens`: float32 [N] for each pack, the loss at the places in its `index`."""
    return [
        row
        for pack, (batch, losses) in enumerate(zip(step.micro, tokens, strict=True))
        for row in _rows(batch, losses.cpu(), rank, pack)
    ]


def _rows(batch: Batch, losses: Tensor, rank: int, pack: int) -> Iterator[RowLoss]:
    supervised = batch.targets[batch.index] != IGNORED
    document = torch.searchsorted(batch.cu_seqlens.long(), batch.index, right=True) - 1
    for number, row in enumerate(batch.row_ids):
        mine = losses[supervised & (document == number)].double()
        if len(mine):
            yield RowLoss(row, rank, pack + 1, len(mine), float(mine.mean()), float(mine.max()))


def _layers(watch: LayerWatch, by_weight: dict[str, float], world: World) -> list[LayerReport]:
    """Of all ranks together; a weight belongs to the layer whose name it begins with, else to its own module."""
    ranks = world.gather_objects(watch.norms())
    names = [norms.name for norms in ranks[0]]
    weights: dict[str, list[float]] = {}
    for name, norm in by_weight.items():
        plain = name.removeprefix("base_model.model.")
        place = next((one for one in names if plain.startswith(f"{one}.")), plain.rpartition(".")[0])
        weights.setdefault(place, []).append(norm)
    reports = [
        LayerReport(
            here[0].name,
            _root(norms.activation for norms in here),
            _root(norms.gradient for norms in here if norms.gradient is not None)
            if here[0].gradient is not None
            else None,
            _root(weights[here[0].name]) if here[0].name in weights else None,
        )
        for here in zip(*ranks, strict=True)
    ]
    others = [LayerReport(name, None, None, _root(norms)) for name, norms in weights.items() if name not in names]
    return [*reports, *others]


def _root(norms: Iterable[float]) -> float:
    """The norm of what has these norms."""
    return math.sqrt(sum(norm * norm for norm in norms))


def _anomaly(engine: Engine, step: Step, watch: LayerWatch, world: World) -> str | None:
    """What torch's anomaly detection says of the backward that made the first such value, with the lines of the
    forward; None where only the forward has them, and at ZeRO 3 on several ranks, where a rank that ends a backward
    early would leave the others waiting."""
    if engine.spec.stage == 3 and world.size > 1:
        return None
    mine = None if watch.first is None else anomaly_of(engine, step.micro[watch.first.pack])
    return next((words for words in world.gather_objects(mine) if words), None)


def anomaly_of(engine: Engine, batch: Batch) -> str | None:
    """The same of one pack, on one rank."""
    weights = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    with warnings.catch_warnings(record=True) as said, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        total = engine.module(**batch.to(engine.world.device).inputs()).sum
        try:
            torch.autograd.grad(total, weights, allow_unused=True)
        except RuntimeError as error:
            forward = [str(one.message) for one in said if "Traceback of forward call" in str(one.message)]
            lines = forward[-1].rstrip().split("\n")[-_FRAMES:] if forward else []
            return "\n".join([str(error), *lines])
    return None


def report_lines(replay: Replay, source: Path) -> Iterator[str]:
    """What the screen shows."""
    yield f"step {replay.step} of {source}: learning rate {replay.lr:.4g}"
    for name, value in (("loss", replay.loss), ("grad_norm", replay.grad_norm)):
        yield f"  {name} {value:.6g}  ({_beside(value, replay.recorded, name)})"
    if replay.found is None:
        yield "every value of the forward and of the backward is finite"
    else:
        yield f"the first value that is not finite is {replay.found}"
    if replay.anomaly is not None:
        yield f"torch's anomaly detection: {replay.anomaly}"
    yield ""
    head = ("layer", "output", "gradient by its output", "gradient by its weights")
    cells = [
        (one.name, _figure(one.activation), _figure(one.output_gradient), _figure(one.weight_gradient))
        for one in replay.layers
    ]
    yield from columns([head, *cells])
    yield ""
    shown = replay.rows[:SHOWN]
    more = f", the {len(shown)} with the largest loss of {len(replay.rows)}" if len(replay.rows) > len(shown) else ""
    yield f"rows by loss{more}:"
    heads = ("loss", "worst token", "supervised", "rank", "pack", "row")
    yield from columns(
        [
            heads,
            *(
                (f"{row.loss:.3f}", f"{row.worst:.3f}", str(row.supervised), str(row.rank), str(row.pack), row.id)
                for row in shown
            ),
        ]
    )


def _beside(value: float, recorded: dict[str, float] | None, name: str) -> str:
    if recorded is None:
        return "the run has no line of this step"
    then = recorded[name]
    same = value == then or (math.isnan(value) and math.isnan(then))
    return "the same bits as the run's" if same else f"the run's was {then:.6g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
