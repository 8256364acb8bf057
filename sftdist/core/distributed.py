"""Ranks: the process group, its reductions, and what happens when one of them fails or is told to stop."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sftdist.core.errors import ConfigError, SftdistError
from sftdist.core.failure import Failure, failure_of, print_failure
from sftdist.core.generation import Generation, no_word
from sftdist.core.peers import Patience, PeerError, Peers, Rank
from sftdist.core.progress import Progress

# DeepSpeed looks for its accelerator when it is imported, and says loudly that it found none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

TIMEOUT_SECONDS = 3600.0
CONNECT_SECONDS = 60.0
LEAVE_SECONDS = 8.0  # for the clean-up of a rank that has failed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
PARENT_VARIABLE = "SFTDIST_PARENT"  # the process id of the agent that started this process, where it was ours
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """This process among its ranks. Every collective is the identity where there is one process."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    progress: Progress = field(default_factory=Progress, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, as a new tensor of the same shape, dtype and device."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def all_reduce_max(self, value: float) -> float:
        """The largest of every rank's value."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return float(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value (picklable), in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value (picklable) on every rank; what the others pass is ignored."""
        if self.size == 1:
            return value
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Rank `source`'s tensor, put into the others' of the same shape, dtype and device."""
        if self.size > 1:
            dist.broadcast(tensor, source, group=self.group)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_reduce_max(0.0)

    def agree(self, ok: bool) -> bool:
        """True where every rank says True."""
        return self.all_reduce_max(0.0 if ok else 1.0) == 0.0

    def beside(self) -> World:
        """The same ranks with a process group (gloo) of their own, whose collectives a thread may use while the main
        thread uses this one's. A collective."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
        return replace(self, device=torch.device("cpu"), group=group)


def is_worker() -> bool:
    """True in a process that torchrun (or another launcher that sets RANK) has started."""
    return "RANK" in os.environ


def restart_count() -> int:
    """How often this host's torchrun has started its workers again after a failure; others may count differently."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def started_again() -> bool:
    """Whether torchrun has started this worker group before, on this host or another; rank 0 knows after its first
    `share_text`."""
    return restart_count() > 0 or (is_worker() and _generation().number(TIMEOUT_SECONDS) > 1)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends: a killed torchrun agent leaves no orphans (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Taken out of the environment: what this process starts has another parent.
    if os.environ.pop(PARENT_VARIABLE, str(os.getppid())) != str(os.getppid()):  # it died before we could ask
        os._exit(1)


def share_text(key: str, text: str | None, timeout_seconds: float = 300.0) -> str:
    """Rank 0's text on every rank, through the rendezvous store: it needs no process group.

    Every rank calls it the same number of times per key. Rank 0 gives the text, the others None.
    Raises StartupError on a rank that waited `timeout_seconds` for it, and on rank 0 where another rank did not start.
    """
    if not is_worker():
        return _given(key, text)
    store = _store()
    name = f"{_prefix(timeout_seconds, repr(key))}/text/{key}/{_next_use(key)}"
    if int(os.environ["RANK"]) == 0:
        store.set(name, _given(key, text))
        return _given(key, text)
    try:
        store.wait([name], timedelta(seconds=timeout_seconds))
    except dist.DistError as error:
        raise no_word(int(os.environ["RANK"]), timeout_seconds, repr(key)) from error
    return store.get(name).decode("utf-8")


@contextmanager
def session(
    timeout_seconds: float = TIMEOUT_SECONDS,
    device: torch.device | None = None,
    report: Callable[[Failure], None] = print_failure,
    lost_seconds: float = 60.0,
    hang_seconds: float = 1800.0,
) -> Iterator[World]:
    """The ranks for the length of a block: process group (gloo, with NCCL on CUDA) and failure watch.

    Reads torchrun's environment; without it the world is one process. `timeout_seconds` bounds every collective.
    `report(failure)` is called once over all ranks that can reach one another: on the first rank that raises, or on
    one that notices that another has died, was not heard of for `lost_seconds`, or holds up the rest, which have not
    got on for `hang_seconds` (`World.progress`; the watch begins with the first activity). The others end within
    seconds, in a blocked collective too; one whose own exception came later raises PeerError.
    The process group outlives the block, and the next session uses it again (so it does a script's own): DeepSpeed
    keeps hold of the first one that it has seen. Raises ConfigError where this host has fewer GPUs than ranks.
    """
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES)
    device = device or _device(local_rank)
    if not dist.is_initialized():
        _init_process_group(rank, size, device, timedelta(seconds=timeout_seconds))
    world = World(rank, size, local_rank, device)
    peers = _peers(world, Patience(lost_seconds, hang_seconds), report) if is_worker() else None
    try:
        yield world
    except PeerError:  # of a session within this one
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            _leave(peers)
            raise
        if isinstance(error, SftdistError) or peers is not None:
            vars(error)["reported"] = True
        if peers is None:
            report(failure_of(error, rank, world.progress.now))
            raise
        first = peers.fail(error)
        _leave_within(LEAVE_SECONDS)
        if not first:
            raise PeerError(f"rank {rank} stops: another rank failed before") from error
        raise
    _leave(peers)


class StopSignal:
    """TERM, USR1, USR2 and INT ask for a stop at the next step boundary; a second INT stops at once.

    torchrun passes a second Ctrl-C on as TERM, so a TERM after an INT stops at once, too. Any other repetition
    is ignored: a cluster may signal every process of a job and the launcher forwards the same signal again.
    `on_abort` is called before a stop at once, which ends the process with 130 even inside a blocked collective.
    """

    def __init__(self, on_abort: Callable[[], None] | None = None) -> None:
        self._on_abort = on_abort
        self._requested = False
        self._seen: Counter[int] = Counter()
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on, in this process."""
        return self._requested

    def agreed(self, world: World) -> bool:
        """True on every rank when any rank was asked to stop. A collective."""
        return world.all_reduce_max(float(self._requested)) > 0

    def install(self) -> None:
        """Take the signals over; does nothing outside of the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread() or self._pipe:
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = read, write
        # Python runs handlers between bytecodes only: a main thread inside a collective would never see the second
        # Ctrl-C. The C handler writes the number to this pipe at once, and a thread reads it.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), name="stop-signal", daemon=True).start()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Give the signals back to those who had them."""
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._pipe[1])
        self._pipe = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _watch(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while data := pipe.read(1):
                if data[0] not in STOP_SIGNALS:
                    continue
                self._requested = True
                if stops_at_once(self._seen, data[0]):
                    self._abort()
                self._seen[data[0]] += 1

    def _abort(self) -> None:
        try:
            if self._on_abort is not None:
                self._on_abort()
        finally:
            os._exit(130)


def ignore_stop_signals() -> None:
    """For a process that has done its work and is about to end with 0."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def stops_at_once(seen: Counter[int], number: int) -> bool:
    """True where `number`, after the signals `seen` so far, means "now" instead of "after this step"."""
    return seen[signal.SIGINT] > 0 and number in (signal.SIGINT, signal.SIGTERM)


_RANK_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
_uses: Counter[str] = Counter()
_session_number = itertools.count()


@functools.cache
def _store() -> dist.Store:
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_SECONDS))))
    return store


@functools.cache
def _generation() -> Generation:
    return Generation(_store(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def _prefix(timeout_seconds: float, awaited: str) -> str:
    """Of every key in the rendezvous store, where those of earlier starts of the worker group still are."""
    return f"sftdist/{_generation().number(timeout_seconds, awaited)}"


def _next_use(key: str) -> int:
    _uses[key] += 1
    return _uses[key]


def _given(key: str, text: str | None) -> str:
    if text is None:
        raise ValueError(f"share_text({key!r}): rank 0 gives the text, got None")
    return text


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks were started on a host with {gpus} GPUs; each rank needs a GPU of its own. "
            f"Start with --nproc-per-node {gpus}."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_process_group(rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store: dist.Store = dist.HashStore()
    if is_worker():
        store = dist.PrefixStore(f"{_prefix(timeout.total_seconds(), 'the start')}/group", _store())
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    if size > 1:
        atexit.register(dist.destroy_process_group)


def _peers(world: World, patience: Patience, report: Callable[[Failure], None]) -> Peers:
    """Join the failure watch, over store connections of its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    prefix = f"{_prefix(TIMEOUT_SECONDS, 'the start')}/session/{next(_session_number)}"

    def connect() -> dist.Store:
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False)
        return dist.PrefixStore(prefix, store)

    first = world.rank - world.local_rank
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    peers = Peers(Rank(world.rank, world.size, local), connect, world.progress, patience, report)
    peers.join()
    return peers


def _leave(peers: Peers | None) -> None:
    if peers is not None:
        peers.leave()


def _leave_within(seconds: float) -> None:
    """End the process even if it stays busy, and without the clean-up of its exit: that would wait for a dead peer, or
    end in an abort while a thread is inside of torch."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    atexit.register(_leave_now)  # the last to be registered is the first to run


def _leave_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
