"""The training job: `torchrun ... -m sftdist.train +exp=X`, `sftdist train +exp=X`, or `run(cfg)` from Python.

What is trained with is built here, from the configuration, and handed to the loop.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from sftdist.assets import quickstart
from sftdist.core import agent, config
from sftdist.core.distributed import (
    StopSignal,
    World,
    die_with_parent,
    ignore_stop_signals,
    is_worker,
    restart_count,
    session,
)
from sftdist.core.errors import CheckpointError, TrainingError
from sftdist.core.nodes import Nodes
from sftdist.core.ranklog import rank_log
from sftdist.core.settings import TrainConfig, TrainJobConfig
from sftdist.core.snapshot import of_run
from sftdist.core.storage import disk_explained
from sftdist.core.words import word
from sftdist.data.corpus import Corpus, validation_rows, validation_sources
from sftdist.data.loader import Batch, Loader, Step
from sftdist.data.pipeline import Prepared
from sftdist.data.planned import pack_tokens
from sftdist.data.request import prepare_small, request_of
from sftdist.evals.loss import evaluate_loss
from sftdist.evals.rows import evaluation_batches
from sftdist.model.text_part import causal_lm
from sftdist.release.start import require_start
from sftdist.training.auto import chosen_words, settled, settled_on_all
from sftdist.training.build import Trained
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.console import open_console
from sftdist.training.contract import contract
from sftdist.training.dry_run import print_plan
from sftdist.training.ending import ending, record_in_ledger
from sftdist.training.export import ExportSpec, export_model, is_adapter_alone
from sftdist.training.export_proof import FreshCheck
from sftdist.training.followers import followers_of
from sftdist.training.loop import Calls, Flags, LoopSpec, NonFinite, StepDone, TrainState, evaluation_is_due, run_steps
from sftdist.training.meter import Meter, StepFacts, memory_gib, peak_flops
from sftdist.training.non_finite import explained
from sftdist.training.offline import write_outline
from sftdist.training.opening import Opening, finished_before, open_run, refuse_other_config, refuse_other_data
from sftdist.training.overfit import (
    causes_of,
    chosen_documents,
    lay_out_overfit,
    overfit,
    overfit_issues,
    overfit_settings,
    verdict,
    write_report,
)
from sftdist.training.own_code import own_code_found
from sftdist.training.parts import base_of, build_parts
from sftdist.training.profiling import profile_of
from sftdist.training.replay import (
    lay_out_replay,
    replay_issues,
    replay_settings,
    replay_step,
    report_lines,
    write_replay,
)
from sftdist.training.retention import Keep
from sftdist.training.schedule import rate_of
from sftdist.training.shortage import shortage_explained
from sftdist.training.startup import run_checks
from sftdist.training.tracking import Sink, Tracker, evaluated, open_tracker, standing
from sftdist.training.wandb_process import wandb_of
from sftdist.training.zero_config import override_issues

MODULE = "sftdist.train"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `state` is done or preempted; `export` is the verified Hugging Face folder of a done one."""

    state: str
    step: int
    run_dir: Path
    export: Path | None


def main() -> int:
    """The command line. Under torchrun this process is a rank; alone it starts torchrun's agent."""
    work = run_rank if is_worker() else start
    checks = [engine_issues, own_code_found, job_issues]
    return config.main(TrainJobConfig, work, "train", checks=checks, makes_runs=True, settle=settle)


def settle(cfg: TrainJobConfig, given: frozenset[str]) -> TrainJobConfig:
    """What `auto` leaves to the machine, decided once; a replay has the settings of its run."""
    if cfg.replay is not None:
        return cfg
    if cfg.auto:
        quickstart.lay_out(cfg)
    chosen = settled(cfg, given, partial(print, flush=True))
    return replace(cfg, **{item.name: getattr(chosen, item.name) for item in fields(TrainConfig)})


def job_issues(cfg: TrainJobConfig) -> list[str]:
    """What the keys of `train` alone need."""
    return [*replay_issues(cfg), *overfit_issues(cfg)]


def engine_issues(cfg: TrainConfig) -> list[str]:
    """Keys of `zero.deepspeed` that the trainer owns, found with all other issues before any rank starts."""
    return override_issues(cfg.zero.deepspeed)


def start(cfg: TrainJobConfig) -> int:
    """`sftdist train`: print the plan, or prepare small data and start the ranks of this machine. Where it is one of
    several nodes, the data is left to rank 0."""
    if cfg.replay is not None:
        return start_ranks(lay_out_replay(cfg), [])
    if cfg.overfit is not None and not cfg.dry_run:
        return start_ranks(lay_out_overfit(cfg), [same_run(cfg), *chosen_words(cfg)])
    return start_ranks(cfg, [same_run(cfg), *chosen_words(cfg)])


def start_ranks(cfg: TrainConfig, words: list[str]) -> int:
    """`words`: what the ranks are told beside the command line."""
    if cfg.dry_run:
        print_plan(cfg, partial(ready_data, cfg))
        return agent.DONE
    run_dir = Path(str(cfg.run.dir))
    with agent.stoppable():
        refuse_other_config(cfg, run_dir)
        if cfg.launch.nodes == 1:
            refuse_other_data(run_dir, ready_data(cfg))  # bad data ends here, before any rank exists
        if finished_before(run_dir) is not None:
            return agent.DONE
    nproc, grace_seconds = agent.ranks_here(cfg.launch.nproc), cfg.checkpoint.grace_seconds
    argv = [*sys.argv[1:], *words]
    ranks = f"{nproc} rank{'s' * (nproc != 1)}" + " on this node" * (cfg.launch.nodes > 1)
    print(f"starting {ranks}: the run is in {run_dir}, what each rank says in {run_dir / 'log'}", flush=True)
    return agent.launch(MODULE, argv, nproc, run_dir, grace_seconds, cfg.launch.max_restarts, nodes_of(cfg))


def nodes_of(cfg: TrainConfig) -> Nodes | None:
    """Who trains together; None where this machine does so alone."""
    launch = cfg.launch
    if launch.nodes == 1:
        return None
    return Nodes(launch.nodes, str(launch.address), launch.node_rank, launch.join_seconds)


def same_run(cfg: TrainConfig) -> str:
    """The word that holds the ranks to this run directory, also where a preset is edited before they start again: a
    run's name and directory come from its configuration. Without a preset `run.dir` would make the run's own file the
    base, and the command line's silence on a key would no longer mean its default."""
    if cfg.exp == TrainConfig().exp:
        return word("run.name", str(cfg.run.name))
    return word("run.dir", str(cfg.run.dir))


def run_rank(cfg: TrainJobConfig) -> int:
    """One rank under torchrun. A preempted one leaves with 0 too: torchrun would call any other code a failure."""
    die_with_parent()
    if cfg.dry_run:
        if os.environ["RANK"] == "0":
            print_plan(cfg, partial(ready_data, cfg))
        return agent.DONE
    if cfg.replay is not None:
        run_replay(cfg)
    elif cfg.overfit is not None:
        run_overfit(cfg, cfg.overfit)
    else:
        run_settled(of_run(cfg))
    ignore_stop_signals()  # a cluster may repeat them, and this rank's work is done
    return agent.DONE


def run(cfg: TrainConfig, *, dataset: Any = None, tokenizer: Any = None) -> TrainResult:
    """Train as configured, in this process or as one rank of torchrun's, and export the model.

    `dataset`: conversations (or rows of any supported shape) in memory instead of `data.*`: a list or a
    `datasets.Dataset`; `tokenizer`: a transformers tokenizer instead of the model's. Raises an `SftdistError` that
    says what was given, what is required and what to change; the run directory then holds the last good checkpoint.
    """
    return run_settled(settled_on_all(cfg, partial(print, flush=True)), dataset=dataset, tokenizer=tokenizer)


def run_settled(cfg: TrainConfig, *, dataset: Any = None, tokenizer: Any = None) -> TrainResult:
    """The same, where `auto` has made its choice."""
    run_dir = Path(str(cfg.run.dir))
    with joined(cfg, run_dir, partial(ready_to_train, cfg, dataset, tokenizer)) as (opening, world, stop):
        if world is None:
            return TrainResult("done", opening.step, run_dir, run_dir / "export")
        result = train(cfg, opening, world, stop, run_dir)
        if world.is_main:  # below the bar, and after what W&B had to say
            print(ending(run_dir, result.state, result.step), flush=True)
        return result


@contextmanager
def joined(
    cfg: TrainConfig, run_dir: Path, ready: Callable[[], Prepared]
) -> Iterator[tuple[Opening, World | None, StopSignal]]:
    """The run directory opened, the data ready, this rank among the others, and whatever fails inside explained; no
    world where the run was finished before."""
    with ExitStack() as stack:
        if is_worker():
            stack.enter_context(rank_log(run_dir, restart_count() + 1))
        stop = stack.enter_context(stop_signals())
        opening = open_run(cfg, run_dir, stack, ready)
        if opening.finished:
            yield opening, None, stop
            return
        if (command := agent.idle_gpus(MODULE, sys.argv[1:])) is not None and os.environ.get("RANK") == "0":
            print(f"This host has more GPUs than ranks were started. All of them: {command}", flush=True)
        lost, hang = cfg.launch.lost_seconds, cfg.launch.hang_seconds
        watched = session(report=partial(agent.report, run_dir), lost_seconds=lost, hang_seconds=hang)
        world = stack.enter_context(watched)
        stack.enter_context(disk_explained(run_dir))
        stack.enter_context(shortage_explained(cfg, world))
        yield opening, world, stop


def run_replay(cfg: TrainJobConfig) -> None:
    """One rank of a replay: the step, its report on the screen and in R/log/replay-N.json."""
    if os.environ["RANK"] == "0":
        lay_out_replay(cfg)
    own, source, number = replay_settings(cfg), Path(str(cfg.replay)), cfg.step or 0
    run_dir = Path(str(own.run.dir))
    with joined(own, run_dir, partial(ready_data, own)) as (opening, world, stop):
        assert world is not None  # lay_out_replay has removed how an earlier one ended
        say = partial(print, flush=True) if world.is_main else silent
        parts = build_parts(own, opening, run_dir, world, say)
        replay = replay_step(own, parts, source, number, world, lambda: stop.requested, say)
        if world.is_main:
            file = write_replay(replay, source)
            for line in report_lines(replay, source):
                say(line)
            say(f"all of it is in {file}; the run itself is as it was")
            agent.write_status(run_dir, "done", agent.DONE, "", step=number)
        world.barrier()


def run_overfit(cfg: TrainJobConfig, count: int) -> None:
    """One rank that learns a few rows by heart. Raises TrainingError with what is broken where that fails."""
    if os.environ["RANK"] == "0":
        lay_out_overfit(cfg)
    own = overfit_settings(cfg)
    run_dir = Path(str(own.run.dir))
    with joined(own, run_dir, partial(ready_to_train, own, None, None)) as (opening, world, stop):
        assert world is not None  # lay_out_overfit has removed how an earlier one ended
        say = partial(print, flush=True) if world.is_main else silent
        parts = build_parts(own, opening, run_dir, world, say)
        rows = chosen_documents(parts.corpus, count, own.seed)
        facts = overfit(parts.trained.engine, rows, pack_tokens(own), own.optimizer.lr, lambda: stop.requested, say)
        causes = causes_of(facts)
        if world.is_main:
            write_report(facts, causes, run_dir)
        if causes:
            raise TrainingError(verdict(facts, causes))
        say(verdict(facts, causes))
        if world.is_main:
            agent.write_status(run_dir, "done", agent.DONE, "", step=len(facts.losses))
        world.barrier()


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    stop = StopSignal()
    stop.install()
    try:
        yield stop
    finally:
        stop.uninstall()


def ready_to_train(cfg: TrainConfig, dataset: Any, tokenizer: Any) -> Prepared:
    """The data; and where the run begins with a release, that is whole."""
    if finished_before(Path(str(cfg.run.dir))) is None:
        require_start(cfg.model.path, partial(print, flush=True))
    return ready_data(cfg, dataset, tokenizer)


def ready_data(cfg: TrainConfig, dataset: Any = None, tokenizer: Any = None) -> Prepared:
    """Find the stores, or make them where that is quick. Raises DataError that names `prepare` where it is not."""
    quickstart.lay_out(cfg)
    request = request_of(cfg.data, cfg.model, dataset=dataset, tokenizer=tokenizer)
    command = f"sftdist prepare {shlex.join(word for word in sys.argv[1:] if '=' in word)}"
    return prepare_small(request, command, say=partial(print, flush=True))


@dataclass(frozen=True)
class Job:
    """The parts of a run that its phases share; `steps` is the number of optimizer steps of the whole run, `say` prints
    a line on rank 0, `check` is the process that will prove the export."""

    cfg: TrainConfig
    run_dir: Path
    world: World
    stop: StopSignal
    corpus: Corpus
    trained: Trained
    checkpoints: Checkpoints
    steps: int
    say: Callable[[str], None]
    check: FreshCheck

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.stop.requested

    def any_stop_requested(self) -> bool:
        """Whether any rank was asked to stop; a collective."""
        return self.stop.agreed(self.world)

    def status(self, code: int, doing: str, step: int) -> None:
        """Say what the run is doing; `code` applies if a signal ends it there."""
        if self.world.is_main:
            agent.write_status(self.run_dir, "running", code, f"{doing}, or ended there without a word", step=step)


def train(cfg: TrainConfig, opening: Opening, world: World, stop: StopSignal, run_dir: Path) -> TrainResult:
    """Build everything, check it, run the loop, export."""
    say = partial(print, flush=True) if world.is_main else silent
    parts = build_parts(cfg, opening, run_dir, world, say)
    corpus, plan, totals, trained = parts.corpus, parts.plan, parts.totals, parts.trained
    if world.is_main:
        write_outline(run_dir, causal_lm(trained.engine.module.model), corpus.template, trained.untrained)
    checkpoints = checkpoints_of(cfg, run_dir, trained, world)
    saved = checkpoints.load_latest(trained.engine, say)
    state = TrainState(**saved["run"]) if saved else TrainState()
    if cfg.train.startup_checks:
        run_checks(world, contract(cfg, corpus, plan, trained, world, run_dir), say)
    job = Job(cfg, run_dir, world, stop, corpus, trained, checkpoints, totals.steps, say, FreshCheck())
    if job.any_stop_requested():  # nothing is lost: the last checkpoint is the newest there can be
        return finish(job, state, None)
    position = saved["data"] if saved else None
    loader = Loader(plan, corpus.stores, rank=world.rank, world_size=world.size, state=position, device=world.device)
    tracker = tracker_of(cfg, run_dir, state.step, totals.steps, say) if world.is_main else Tracker()
    try:
        state, stopped = run_loop(job, loader, tracker, state)
        # The export can wait for the next start.
        export = None if stopped or job.any_stop_requested() else export_of(job, state)
        tracker.sync()  # what can fail, fails before the run is called done
        result = finish(job, state, export)
    except BaseException:
        with suppress(OSError):  # the disk may be what has failed
            tracker.close("failed")
        raise
    finally:
        job.check.kill()
        loader.close()
    tracker.close(result.state)
    return result


def run_loop(job: Job, loader: Loader, tracker: Tracker, state: TrainState) -> tuple[TrainState, bool]:
    """Give the loop what it calls: where figures go, what a checkpoint holds, what is evaluated."""
    cfg, world, engine, checkpoints = job.cfg, job.world, job.trained.engine, job.checkpoints
    meter = Meter(job.corpus.names, peak_flops_per_second=peak_flops(world.device, world.size))
    rate = rate_of(cfg.optimizer, job.steps)
    batches = validation_batches(cfg, job.corpus, world)
    names = [store.name for store in validation_sources(job.corpus)]
    profile = profile_of(cfg.train.profile, job.steps, state.step, job.run_dir, world, job.say)
    if not batches and cfg.eval.every_steps and world.is_main:
        print("no validation rows: nothing is evaluated (data.val, data.val_fraction)", flush=True)

    def begin(step: Step) -> None:
        world.progress.begin_step(step.step + 1, step.row_ids)
        tracker.rows_of(step.step + 1, step.row_ids)
        profile.begin(step.step + 1)
        if world.is_main and step.step + 1 == job.steps:  # its imports take longer than to export a small model
            job.check.start(adapter=is_adapter_alone(engine, export_spec(job, job.steps)))

    def track(state: TrainState, done: StepDone) -> None:
        profile.end(state.step)
        tracker.report({"kind": "train", **meter.line(facts(state, done, world))})

    def save(state: TrainState) -> None:
        tracker.sync()
        checkpoints.save(engine, {"run": asdict(state), "data": loader.state()}, state.step)
        job.status(agent.FAILED, "training", state.step)

    def evaluate(state: TrainState) -> bool:
        if batches:
            figures = evaluate_loss(engine.evaluate, batches, world, names, job.stop_requested)
            if figures is None:
                return False
            tracker.report({"kind": "eval", "step": state.step, **figures})
        return True

    spec = LoopSpec(job.steps, rate, save_every=cfg.checkpoint.every_steps, eval_every=cfg.eval.every_steps)
    job.status(agent.FAILED, "training", state.step)
    # Rank 0 alone reads the file that it has just cut: another rank would map what is being cut off.
    known = world.broadcast_object(world.is_main and evaluated(job.run_dir, state.step))
    missed = evaluation_is_due(spec, state) and not known
    if missed and not evaluate(state):  # the run ended between a checkpoint and its evaluation, and again there
        return state, True
    calls = Calls(lambda: Flags(job.stop.requested, checkpoints.failed), begin, track, save, checkpoints.wait, evaluate)
    try:
        with profile:
            state, stopped = run_steps(engine, loader, world, spec, state, calls)
    except TrainingError as error:  # raised by every rank at the same step: the save under way can end
        told = explained(error, engine, world, job.run_dir) if isinstance(error, NonFinite) else error
        try:
            checkpoints.wait()
        except CheckpointError as failed:  # another try would still end in the same step
            raise TrainingError(f"{told} And a save has failed: {failed}") from error
        raise told from error.__cause__
    checkpoints.wait()
    return state, stopped


def checkpoints_of(cfg: TrainConfig, run_dir: Path, trained: Trained, world: World) -> Checkpoints:
    settings = cfg.checkpoint
    best = partial(standing, run_dir, settings.best) if settings.keep_best else None
    return Checkpoints(
        run_dir / "checkpoints",
        Keep(settings.keep_last, settings.keep_every, best),
        base=base_of(cfg, trained, world),
        background=world.beside() if settings.background else None,
    )


def validation_batches(cfg: TrainConfig, corpus: Corpus, world: World) -> list[Batch]:
    stores = validation_sources(corpus)
    return evaluation_batches(
        stores,
        validation_rows(stores, cfg.data.max_len, cfg.eval.max_conversations),
        pack_tokens(cfg),
        rank=world.rank,
        world_size=world.size,
        packing=cfg.train.packing,
    )


def facts(state: TrainState, done: StepDone, world: World) -> StepFacts:
    step, losses = done.step, done.losses
    return StepFacts(
        step=state.step,
        lr=done.lr,
        grad_norm=done.outcome.grad_norm,
        seconds=done.seconds,
        data_wait_seconds=losses.data_wait_seconds,
        tokens=step.tokens,
        supervised_tokens=step.targets,
        conversations=step.conversations,
        flops=step.flops,
        pack_fill=step.pack_fill,
        rank_balance=step.rank_balance,
        memory_gib=memory_gib(world.device),
        loss_sums=losses.sums,
        loss_weights=losses.weights,
        denominator=step.denominator,
        rows=step.rows,
    )


def tracker_of(cfg: TrainConfig, run_dir: Path, step: int, steps: int, say: Callable[[str], None]) -> Tracker:
    """Rank 0's: metrics.jsonl first, then those who follow it."""
    tracker = open_tracker(run_dir, resumed_step=step)
    others: list[Sink] = [*wandb_of(cfg, run_dir, say), *followers_of(cfg, run_dir, step, say)]
    return tracker.followed_by(*open_console(steps, first_step=step), *others)


def export_of(job: Job, state: TrainState) -> Path | None:
    """The verified model of a run that has taken its last step; None where a rank was asked to stop meanwhile."""
    job.status(agent.PREEMPTED, "exporting", state.step)
    engine, template, folder = job.trained.engine, job.corpus.template, job.run_dir / "export"
    spec = export_spec(job, state.step)
    return export_model(engine, template, folder, spec, stopped=job.stop_requested, say=job.say, check=job.check)


def export_spec(job: Job, step: int) -> ExportSpec:
    settings = job.cfg.export
    return ExportSpec(settings.dtype.value, int(settings.shard_gib * 2**30), settings.merge, step)


def finish(job: Job, state: TrainState, export: Path | None) -> TrainResult:
    """Say in `status.json` and in the ledger how the run ended: without an export it was stopped."""
    name = "preempted" if export is None else "done"
    if job.world.is_main:
        code = agent.PREEMPTED if export is None else agent.DONE
        agent.write_status(job.run_dir, name, code, "", step=state.step)
        record_in_ledger(job.cfg, job.corpus, name, state)
    job.world.barrier()  # nobody leaves before the file says how it ended
    return TrainResult(name, state.step, job.run_dir, export)


def silent(text: str) -> None:
    """What the ranks other than 0 say."""


if __name__ == "__main__":
    sys.exit(main())
