"""The command line of every module that takes a configuration: options, one error message, exit codes."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sftdist.core.distributed import PARENT_VARIABLE, die_with_parent, is_worker, share_text
from sftdist.core.errors import ConfigError, SftdistError
from sftdist.core.peers import PeerError

T = TypeVar("T")
FAILED, INTERRUPTED = 1, 130
SPEAKER_SECONDS = 30.0


@dataclass(frozen=True)
class Command(Generic[T]):
    """What `config.main` knows about a command; all that this file needs of a configuration.

    `load(overrides)` composes and checks, `pack` and `unpack` carry a configuration between ranks, `show` is its
    YAML, `help` the list of keys, `sweep(words)` runs the jobs of `-m`, `run` does the work. `settle(cfg, overrides)`
    decides what the configuration leaves to the machine, before it is shared; what is only shown stays as it is.
    """

    name: str
    load: Callable[[Sequence[str]], T]
    pack: Callable[[T], dict[str, Any]]
    unpack: Callable[[dict[str, Any]], T]
    show: Callable[[T], str]
    help: Callable[[], str]
    sweep: Callable[[Sequence[str]], int]
    run: Callable[[T], object]
    settle: Callable[[T, Sequence[str]], T] = lambda cfg, overrides: cfg


def run_command(command: Command[T], argv: Sequence[str]) -> int:
    """Carry out a command line; the exit code. Errors that a user can cause are printed without a traceback, once."""
    if is_worker() or PARENT_VARIABLE in os.environ:
        die_with_parent()
    try:
        return _dispatch(command, list(argv))
    except PeerError:
        return FAILED  # another rank has reported what happened
    except SftdistError as error:
        _record(error)
        if not error.reported:
            print(f"sftdist {command.name}: error: {_where()}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"sftdist {command.name}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:  # the boundary: a fault of ours keeps its traceback and still ends with a code
        _record(error)
        if not vars(error).get("reported"):  # a session has said it, traceback and all
            traceback.print_exc()
        return FAILED


def _dispatch(command: Command[T], argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        if _speaks():
            print(command.help())
        return 0
    if "-m" in argv or "--multirun" in argv:
        words = [word for word in argv if word not in ("-m", "--multirun")]
        if _without_cfg(words)[1]:
            raise ConfigError(
                "--cfg job and -m do not go together, for each job of a sweep has a configuration of its own; to print "
                "one job's, leave -m out and give every key one value"
            )
        return _sweep(command, words)
    overrides, show = _without_cfg(argv)
    cfg = _shared(command, overrides, settle=not show)
    if cfg is None:
        return FAILED  # rank 0 has printed why
    if show:
        if _speaks():
            print(command.show(cfg), end="")
        return 0
    code = command.run(cfg)
    return code if isinstance(code, int) else 0


def _shared(command: Command[T], overrides: Sequence[str], *, settle: bool) -> T | None:
    """One configuration for all ranks: rank 0 composes it, the others get it, or None where it is refused."""

    def load() -> T:
        cfg = command.load(overrides)
        return command.settle(cfg, overrides) if settle else cfg

    if not is_worker():
        return load()
    if not _speaks():
        packed = json.loads(share_text("config", None))
        return None if packed is None else command.unpack(packed)
    try:
        cfg = load()
    except BaseException:
        share_text("config", "null")
        raise
    share_text("config", json.dumps(command.pack(cfg)))
    return cfg


def _without_cfg(argv: list[str]) -> tuple[list[str], bool]:
    """The overrides, and whether `--cfg job` stood among them."""
    words, show = list(argv), False
    for flag in ("--cfg", "-c"):
        if flag in words:
            at = words.index(flag)
            if words[at + 1 : at + 2] != ["job"]:
                raise ConfigError(f"{' '.join(words[at : at + 2])}: required --cfg job, which prints the configuration")
            words[at : at + 2], show = [], True
    if "--cfg=job" in words:
        words.remove("--cfg=job")
        show = True
    return words, show


def _sweep(command: Command[T], overrides: list[str]) -> int:
    """A sweep is several jobs, each with ranks of its own: it is no job of torchrun's."""
    if not is_worker():
        return command.sweep(overrides)
    if not _speaks():
        time.sleep(SPEAKER_SECONDS)  # torchrun ends this rank when rank 0 has spoken; the first to fail ends the others
        return FAILED
    raise ConfigError(
        "-m: torchrun runs one job, a sweep is several; let each job start its own ranks: "
        f"sftdist {command.name} -m {shlex.join(overrides)}"
    )


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _where() -> str:
    return "" if _speaks() else f"rank {os.environ['RANK']}: "


def _record(error: Exception) -> None:
    """Hand the error to torchrun, whose own table would otherwise say that there is none."""
    if is_worker() and "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
