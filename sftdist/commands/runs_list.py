"""The runs of a folder: what their directories say, and for those that are gone what the ledger beside them keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sftdist.core import ledger, snapshot
from sftdist.core.agent import STATUS, read_status
from sftdist.core.errors import ConfigError, GateError
from sftdist.core.figures import METRICS, REPORTS, losses
from sftdist.core.lock import holder
from sftdist.core.table import columns
from sftdist.core.warm_start import parent_of
from sftdist.release.gate import DECISION, Decision
from sftdist.training.checkpoint_files import age

SPLITS = ("holdout", "validation")  # the holdout's decision is the one that counts
NO_LOSSES: Mapping[str, float | None] = {"first": None, "last": None, "eval": None}
GONE = "its directory is gone; this is from the ledger"


@dataclass(frozen=True)
class Listed:
    """One run. `changed`: seconds since 1970 at which it last said something; `code`: the exit code that its state
    stands for; `parent`: the release or run that it began with; `losses`: first, last and eval; `starts`: how many
    lines the ledger has of it, one for each start that ended by itself."""

    run: str
    name: str
    state: str
    step: int | None = None
    code: int | None = None
    changed: float = 0.0
    reason: str = ""
    note: str = ""
    parent: Mapping[str, Any] | None = None
    losses: Mapping[str, float | None] = field(default_factory=lambda: dict(NO_LOSSES))
    gate: str = ""
    starts: int = 0


def listed(folder: Path) -> list[Listed]:
    """The runs below a folder (or the one that it is), the one that changed last at the end."""
    alone = is_run(folder)
    known = _by_directory(ledger.read((folder.resolve().parent if alone else folder) / ledger.FILE))
    found = [folder] if alone else [path for path in folder.iterdir() if is_run(path) or (path / STATUS).is_file()]
    rows = [_of_directory(path, known.get(path.resolve().name, [])) for path in found]
    if not alone:
        here = {path.name for path in found}
        rows += [_of_ledger(name, entries) for name, entries in known.items() if name not in here]
    return sorted(rows, key=lambda one: one.changed)


def is_run(folder: Path) -> bool:
    return (folder / snapshot.FILE).is_file()


def table_of(runs: Sequence[Listed]) -> list[tuple[str, ...]]:
    """A head and a row per run; what no run has anything to say about is left out."""
    rows = [_cells(one) for one in runs]
    fixed = ("run", "state", "step", "code", "age")
    shown = [key for key in rows[0] if key in fixed or any(row[key] for row in rows)]
    return [tuple(shown), *(tuple(row[key] for key in shown) for row in rows)]


def as_json(runs: Sequence[Listed]) -> list[dict[str, Any]]:
    """The same as mappings; a loss that is no finite number is null."""
    return [{**asdict(one), "losses": {key: _finite(value) for key, value in one.losses.items()}} for one in runs]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cells(one: Listed) -> dict[str, str]:
    first, last = one.losses.get("first"), one.losses.get("last")
    eval_loss = one.losses.get("eval")
    return {
        "run": one.run,
        "state": one.state,
        "step": "" if one.step is None else str(one.step),
        "code": "" if one.code is None else str(one.code),
        "age": age(time.time() - one.changed),
        "loss": "" if first is None or last is None else f"{first:.4f} > {last:.4f}",
        "eval/loss": "" if eval_loss is None else f"{eval_loss:.4f}",
        "gate": one.gate,
        "parent": _parent(one.parent),
        "name": one.name if one.name != one.run else "",
        "note": one.note,
        "reason": one.reason,
    }


def _parent(parent: Mapping[str, Any] | None) -> str:
    if parent is None:
        return ""
    if "release" in parent:
        return str(parent["release"])
    step = parent.get("step")
    return str(parent.get("run")) + (f", step {step}" if step is not None else "")


def _of_directory(run_dir: Path, entries: Sequence[Mapping[str, Any]]) -> Listed:
    status, name = read_status(run_dir), run_dir.resolve().name
    state, step, code, reason = "not started", None, None, ""
    if status is not None:
        state, step, code = str(status["state"]), status["step"], status["code"]
        reason = str(status["reason"]).partition("\n")[0]
        if state == "running":
            user, code = holder(run_dir), None
            state, reason = ("running", f"by {user}") if user else ("ended", "without a word; run it again to go on")
    own, note, parent = name, "", None
    try:
        cfg = snapshot.read_config(run_dir)
        own, note, parent = cfg.run.name or name, cfg.run.note, parent_of(cfg.model.path)
    except ConfigError as error:  # of another version, edited, or not written yet: the rest is told all the same
        reason = reason or (str(error).partition("\n")[0] if is_run(run_dir) else "")
    if entries and parent is None:  # the folder that it began with may be gone
        parent = entries[-1].get("parent")
    return Listed(
        run=run_dir.name or name,
        name=own,
        state=state,
        step=step,
        code=code,
        changed=_changed(run_dir),
        reason=reason,
        note=note,
        parent=parent,
        losses=losses(run_dir),
        gate=_gate(run_dir),
        starts=len(entries),
    )


def _of_ledger(name: str, entries: Sequence[Mapping[str, Any]]) -> Listed:
    last = entries[-1]
    return Listed(
        run=name,
        name=str(last.get("run") or name),
        state=str(last.get("outcome", "")),
        step=last.get("step"),
        changed=ledger.seconds_of(last),
        reason=GONE,
        note=str(last.get("note") or ""),
        parent=last.get("parent"),
        losses=last.get("losses") or dict(NO_LOSSES),
        starts=len(entries),
    )


def _by_directory(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of each run directory, oldest first: by its name, since the folder may have been moved."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(Path(str(entry["dir"])).name, []).append(entry)
    return found


def _gate(run_dir: Path) -> str:
    """What the gate said last: of the holdout, else of the validation split."""
    for split in SPLITS:
        path = run_dir / REPORTS / split / DECISION
        if path.is_file():
            try:
                return Decision.read(path).in_short() + (f", {split}" if split == "holdout" else "")
            except GateError:
                return "not readable"
    return ""


def _changed(run_dir: Path) -> float:
    names = (STATUS, METRICS, snapshot.FILE)
    return max(path.stat().st_mtime for name in names if (path := run_dir / name).is_file())


def lines_of(runs: Sequence[Listed]) -> Iterator[str]:
    """For a terminal."""
    yield from (line.rstrip() for line in columns(table_of(runs)))
