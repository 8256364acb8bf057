"""Opening a run directory: one run at a time, one configuration, one data; rank 0 decides before any group exists."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sftdist.core import agent, snapshot
from sftdist.core.distributed import is_worker, share_text
from sftdist.core.errors import ConfigError, SftdistError, StartupError, TrainingError
from sftdist.core.lock import RunLock
from sftdist.core.settings import TrainConfig
from sftdist.core.start import adopt_start, this_start
from sftdist.core.storage import disk_explained, read_json, remove_temporaries, write_json
from sftdist.data.manifest import MANIFEST
from sftdist.data.pipeline import Prepared
from sftdist.training.trial import TRIAL

DATA_FILE = "data.json"
STARTING = "starting, or ended there without a word"
SHARED_SECONDS = 60.0  # what a network file system may take to show another host's file
OPENING_SECONDS = 3600.0  # how long the other ranks wait while rank 0 tokenises a small source


class NotRestarted(TrainingError):
    """torchrun has started the ranks again after an end that another try would only meet again."""


@dataclass(frozen=True)
class Opening:
    """What rank 0 found: the token stores by source, or that the run had ended at `step`."""

    stores: dict[str, str]
    held_out: dict[str, str]
    overlay: str | None = None  # of the rows that leak
    finished: bool = False
    step: int = 0


def open_run(cfg: TrainConfig, run_dir: Path, stack: ExitStack, ready: Callable[[], Prepared]) -> Opening:
    """Rank 0 locks the run directory and makes the data ready; the others hear of it through the rendezvous store.

    The lock is given up when `stack` closes. Raises ConfigError where the directory belongs to another configuration
    or other data; `status.json` is written only by a process that holds the lock.
    """
    if is_worker() and os.environ["RANK"] != "0":
        answer = json.loads(share_text("opening", None, OPENING_SECONDS))
        if "error" in answer:
            raise SystemExit(agent.FAILED)  # rank 0 has printed it
        adopt_start(answer["start"])
        opening = Opening(**answer["opening"])
        if not opening.finished:
            require_shared(run_dir, answer["start"])
        return opening
    try:
        with disk_explained(run_dir):
            opening = _open_alone(cfg, run_dir, stack, ready)
    except BaseException as error:
        share_text("opening", json.dumps({"error": str(error)}))
        raise
    share_text("opening", json.dumps({"opening": asdict(opening), "start": this_start()}))
    return opening


def _open_alone(cfg: TrainConfig, run_dir: Path, stack: ExitStack, ready: Callable[[], Prepared]) -> Opening:
    refused = agent.restart_refused(run_dir)
    if refused is not None:
        ended = f"{refused['state']}: {refused['reason']}"
        raise NotRestarted(f"not started again by torchrun, since another try would end the same way: {ended}")
    stack.enter_context(RunLock(run_dir))
    for name in ("*.json", "export", TRIAL):  # of a start that was killed, on whatever host
        remove_temporaries(run_dir, name)
    try:
        refuse_other_config(cfg, run_dir)
        prepared = ready()
        refuse_other_data(run_dir, prepared)
    except SftdistError as error:
        if not ended_well(run_dir):
            with suppress(OSError):  # a full disk does not hide the error, which is printed
                agent.write_status(run_dir, "failed", error.exit_code, str(error), rank=0)
        raise
    if (step := finished_before(run_dir)) is not None:
        return Opening({}, {}, finished=True, step=step)
    snapshot.write_config(run_dir, cfg)
    write_json(run_dir / DATA_FILE, data_keys(prepared))
    write_json(run_dir / MANIFEST, prepared.manifest)
    agent.write_status(run_dir, "running", agent.PREEMPTED, STARTING)
    return Opening(
        {name: str(store.path) for name, store in prepared.stores.items()},
        {name: str(store.path) for name, store in prepared.held_out.items()},
        None if prepared.overlay is None else str(prepared.overlay.path),
    )


def require_shared(run_dir: Path, start: str | None, seconds: float = SHARED_SECONDS) -> None:
    """Raises StartupError where this host has another directory under the same name: rank 0 has just written there."""
    deadline = time.monotonic() + seconds
    while (status := agent.read_status(run_dir)) is None or status["start"] != start:
        if time.monotonic() > deadline:
            raise StartupError(
                f"run.dir={run_dir}: on {socket.gethostname()} this is not the directory that rank 0 writes to; put it "
                "on a file system that all nodes share, under the same path, and start in the same folder on each node"
            )
        time.sleep(0.2)


def ended_well(run_dir: Path) -> bool:
    status = agent.read_status(run_dir)
    return status is not None and status["state"] == "done"


def finished_before(run_dir: Path) -> int | None:
    """The last step, said on the screen, where the run has ended well; else None."""
    status = agent.read_status(run_dir)
    if status is None or status["state"] != "done":
        return None
    print(f"{run_dir} is finished (step {status['step']}); its model is in {run_dir / 'export'}", flush=True)
    return int(status["step"])


def refuse_other_config(cfg: TrainConfig, run_dir: Path) -> None:
    """A run directory belongs to one configuration, but for the sections that a resume may change."""
    if not (run_dir / snapshot.FILE).is_file():
        return
    differences = snapshot.differences(snapshot.read_config(run_dir), cfg)
    if differences:
        raise ConfigError(
            [f"run.dir={run_dir} was begun with another configuration; use it again, or give another run.dir:"]
            + [f"  {_changed(key, old, new)}" for key, (old, new) in differences.items()]
        )


def _changed(key: str, old: object, new: object) -> str:
    if key.startswith("code.") and old and new:
        return f"{key.removeprefix('code.')}: its source, or what that uses of its folder, has been edited since"
    return f"{key}: was {old!r}, now {new!r}"


def refuse_other_data(run_dir: Path, prepared: Prepared) -> None:
    """And to one data: rows in memory and edited files have the same configuration, but not the same content key."""
    if not (run_dir / DATA_FILE).is_file():
        return
    before, now = read_json(run_dir / DATA_FILE), data_keys(prepared)
    changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    if changed:
        raise ConfigError(
            f"run.dir={run_dir} was begun with other data or another tokenizer (source {', '.join(changed)}); "
            "give another run.dir, or bring the earlier data back"
        )


def data_keys(prepared: Prepared) -> dict[str, str]:
    """The content key of every store: input, tokenizer, template, cleaning, split and masks."""
    return {name: store.manifest["key"] for name, store in {**prepared.stores, **prepared.held_out}.items()}
