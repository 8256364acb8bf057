"""The W&B process of a run: follows `metrics.jsonl` and hands its lines to wandb; the only wandb import.

`python -m sftdist.training.wandb_sink FILE` is started by `sftdist.training.wandb_process`; the file holds a
`WandbSpec` as JSON. A process of its own can hang, raise or be killed without the trainer noticing; no rank pays for
the import of wandb (0.2 s beside torch, 0.4 s alone), and wandb's exit hooks, which wait long for a server that
never answers, do not hold the trainer. The file is the queue: nothing is dropped, however slow the server is.
"""

from __future__ import annotations

import json
import netrc
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from sftdist.core.storage import read_json, write_json
from sftdist.training.tail import Tail, final_state
from sftdist.training.wandb_process import KEPT_OFFLINE, WandbSpec

STEP = "trainer/step"
PROBE, PROBE_STEP = "probe", "probe/step"


def main(spec: WandbSpec) -> int:
    mode = spec.mode or ("online" if has_key(dict(os.environ)) else "offline")
    run, mode_now = start(spec, mode)
    # Our own axis: wandb drops figures of a step that it has already seen, and a resumed run makes steps again.
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    tail, probes = Tail(Path(spec.metrics), spec.offset), Probes(Path(spec.watched), Path(spec.watched_mark))
    state = ""
    while not state:
        state = final_state(spec.parent)
        for line in tail.lines():
            run.log(figures(line))
        probes.log(run)
    signal.alarm(round(spec.close_seconds) + 1)  # ends this process if the trainer is gone and the server never answers
    if state == "preempted":
        run.mark_preempting()
    run.finish(exit_code=0 if state == "done" else 1)
    return 0 if mode_now == mode else KEPT_OFFLINE


def start(spec: WandbSpec, mode: str) -> tuple[wandb.Run, str]:
    """A wandb run in `mode`, or offline if the server cannot be reached or refuses the key; nothing is lost by that."""
    try:
        return init(spec, mode), mode
    except wandb.Error as error:
        if mode == "offline":
            raise
        wandb.teardown()  # the failed run holds the id
        reason = str(error).splitlines()[0]
        print(f"W&B cannot be reached ({reason}), so the run was kept offline", flush=True)
        return init(spec, "offline"), "offline"


def init(spec: WandbSpec, mode: str) -> wandb.Run:
    return wandb.init(
        project=spec.project,
        entity=spec.entity,
        group=spec.group,
        tags=spec.tags,
        name=spec.name,
        notes=spec.notes,
        id=spec.run_id,
        resume="allow",
        config=spec.config,
        settings=wandb.Settings(
            mode=mode,
            root_dir=spec.folder,
            use_dot_wandb=False,
            # What is sent is the figures and the config: no console, no code, no git remote, no package list,
            # and offline nothing that could open a socket.
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=mode == "offline",
            x_stats_pid=spec.parent,
            x_save_requirements=False,
            silent=True,
            init_timeout=spec.init_seconds,
            finish_timeout=spec.close_seconds,
            x_transaction_log_flush_interval=2.0,
        ),
    )


class Probes:
    """What a watch finds of the run's checkpoints, on a step of its own: it is found later than the steps that were
    trained meanwhile. How far the lines were logged is kept in a file: the next process of the run goes on there."""

    def __init__(self, path: Path, mark: Path) -> None:
        self._path, self._mark = path, mark
        self._tail = Tail(path, read_json(mark)["bytes"] if mark.is_file() else 0)
        self._defined: set[str] = set()

    def log(self, run: wandb.Run) -> None:
        """Log the lines that are new."""
        before = self._tail.offset
        for line in self._tail.lines() if self._path.is_file() else ():
            known = {f"{PROBE}/{name}": value for name, value in figures(line).items() if name != STEP}
            for name in sorted(known.keys() - self._defined):  # by its whole name, which counts more than "*"
                run.define_metric(name, step_metric=PROBE_STEP)
            self._defined |= known.keys()
            run.log({PROBE_STEP: line["step"], **known})
        if self._tail.offset != before:
            write_json(self._mark, {"bytes": self._tail.offset})


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under their own names, `step` as our axis."""
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
    return {STEP: line["step"], **numbers} if "step" in line else numbers


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb can log in without asking: a key or an identity token in the environment, or a netrc entry."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    file = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    return file.is_file() and netrc.netrc(file).authenticators(host) is not None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the trainer; its last state reaches us by the pipe
    sys.exit(main(WandbSpec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
