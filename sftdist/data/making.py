"""Having the store of a task: found, or made in shards that outlive a killed process, one process at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sftdist.core.lock import alone
from sftdist.core.storage import (
    read_json,
    remove_abandoned,
    remove_path,
    verify_directory,
)
from sftdist.data.build import build_store
from sftdist.data.duplicates import decide
from sftdist.data.encode import encode_chunk
from sftdist.data.report import Preparation
from sftdist.data.shards import TORN, Piece, works
from sftdist.data.sources import Part, not_at_rest, places, read_chunk
from sftdist.data.store import TokenStore
from sftdist.data.tasks import PrepareRequest, Task
from sftdist.data.workers import Workers

LOCK = "lock"
FEW_CHUNKS = 4  # an input of fewer chunks than this is done before a shard is written or a process started


def have_store(
    request: PrepareRequest,
    task: Task,
    number: int,
    workers: Workers,
    say: Callable[[str], None],
    tick: Callable[[str], None],
) -> Preparation:
    """Find the store of the task with this number, or make it; `say` and `tick` as in `prepare`."""
    if _is_whole(task, say=None):
        remove_abandoned(task.path)  # as large as a store, and nobody will write this one again
        return Preparation(TokenStore.open(task.path), reused=True, changed=[])
    changed = changed_ingredients(task.path, task.name, task.ingredients)
    if changed:
        say(f"{task.name}: tokenised again, for these have changed: {', '.join(changed)}")
    with alone(
        task.work / LOCK, lambda who: say(f"{task.name}: waiting for {who}, which prepares the same store")
    ) as locked:
        if locked:
            _remove_torn(task)
        try:
            if made := not _is_whole(task, say):
                _make_store(request, task, number, workers, tick)
        except OSError:
            # Without locks others work on the same store, and have published it and tidied up before we were through.
            if not _is_whole(task, say=None):
                raise
            made = False
        _remove_work(task)
    return Preparation(TokenStore.open(task.path), reused=not made, changed=changed)


def _is_whole(task: Task, say: Callable[[str], None] | None) -> bool:
    """Whether the store is there; a damaged one is taken away where it may be said, else left as it is."""
    if not task.path.is_dir():
        return False
    damaged = verify_directory(task.path)
    if damaged and say is not None:
        say(f"{task.name}: the store is damaged and is written again ({damaged[0]})")
        with suppress(FileNotFoundError):  # another process has found it, too
            remove_path(task.path)
    return not damaged


def _make_store(
    request: PrepareRequest, task: Task, number: int, workers: Workers, tick: Callable[[str], None]
) -> None:
    stats = _input_stats(task.job.parts)

    def verify() -> None:
        if _input_stats(task.job.parts) != stats:
            _remove_work(task)
            raise not_at_rest(task.job.parts)

    build_store(
        task.path,
        task.job,
        _pieces(task, number, workers),
        decide=partial(
            decide,
            deduplicate=request.deduplicate,
            near=request.near,
            near_duplicates=request.near_duplicates,
            contradictions=request.contradictions,
        ),
        ingredients=task.ingredients,
        work=task.work,
        tick=tick,
        verify=verify,
    )


def _pieces(task: Task, number: int, workers: Workers) -> Iterator[Piece]:
    """The encoded input, shard by shard: of a large one in files that outlive this process."""
    found = places(task.job.parts)
    first = list(islice(found, FEW_CHUNKS))
    if len(first) < FEW_CHUNKS:
        return (encode_chunk(task.job, read_chunk(place, task.job.parts)) for place in first)
    return workers.make(works(number, chain(first, found), task.work))


def _remove_torn(task: Task) -> None:
    """What killed processes were writing; only for one who knows that nobody else writes there."""
    for torn in task.work.glob(f"*{TORN}"):
        torn.unlink(missing_ok=True)


def _remove_work(task: Task) -> None:
    with suppress(FileNotFoundError):
        remove_path(task.work)
    remove_abandoned(task.work)


def changed_ingredients(path: Path, name: str, ingredients: dict[str, Any]) -> list[str]:
    """How the newest other store of the same source differs from the one that is wanted."""
    folders = [f for f in path.parent.glob(f"{name}-*") if f != path and (f / "store.json").is_file()]
    manifests = [read_json(folder / "store.json") for folder in sorted(folders, key=lambda f: -f.stat().st_mtime_ns)]
    newest = next((m for m in manifests if m.get("name") == name), None)
    if newest is None:
        return []
    before = newest["ingredients"]
    return [key for key in {**before, **ingredients} if before.get(key) != ingredients.get(key)]


def _input_stats(parts: Iterable[Part]) -> list[tuple[int, int]]:
    stats = [part.file.stat() for part in parts if part.file is not None]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]
