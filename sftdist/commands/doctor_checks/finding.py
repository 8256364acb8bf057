"""What the doctor has to say of one thing, and how a list of that is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

FORMAT = 1  # of the JSON
WIDTH = 100
GIB = 2**30
_UNITS = ((2**40, "TiB"), (GIB, "GiB"))
_STATE_COLUMN, _NAME_COLUMN = 8, 14
_WHOLE = "    "  # a line of advice that begins so is a command or a name, to be copied


class State(StrEnum):
    ok = "ok"
    note = "note"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """`name` stays the same for scripts; `found`: what was seen; `advice`: what to do, a line per paragraph, and a line
    that begins with four spaces for what is to be copied; "" where nothing is to be done."""

    name: str
    state: State
    found: str
    advice: str = ""


def ok(name: str, found: str, advice: str = "") -> Finding:
    return Finding(name, State.ok, found, advice)


def note(name: str, found: str, advice: str = "") -> Finding:
    """Training would run, but not as well as it could, or as it was meant."""
    return Finding(name, State.note, found, advice)


def problem(name: str, found: str, advice: str = "") -> Finding:
    """Training would not run, or not on this machine's GPUs."""
    return Finding(name, State.problem, found, advice)


def names_of(findings: Iterable[Finding], state: State) -> list[str]:
    return [finding.name for finding in findings if finding.state == state]


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`{"format", "problems", "notes", "findings": [{"name", "state", "found", "advice"}]}`."""
    return {
        "format": FORMAT,
        "problems": len(names_of(findings, State.problem)),
        "notes": len(names_of(findings, State.note)),
        "findings": [asdict(finding) for finding in findings],
    }


def render(findings: Sequence[Finding]) -> str:
    """The findings as text of at most 100 columns; only a command or a file name that is longer stays whole."""
    lines = [line for finding in findings for line in _lines(finding)]
    return "\n".join([*lines, "", *textwrap.wrap(_verdict(findings), WIDTH)]) + "\n"


def size(count: int) -> str:
    """Bytes for people."""
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), (2**20, "MiB"))
    return f"{count / unit:.0f} {name}" if count >= 100 * unit else f"{count / unit:.3g} {name}"


def _lines(finding: Finding) -> list[str]:
    margin = " " * (_STATE_COLUMN + _NAME_COLUMN)
    state = finding.state.upper() if finding.state == State.problem else finding.state
    lines = _wrapped(finding.found, margin, margin)
    for paragraph in finding.advice.splitlines():
        is_whole = paragraph.startswith(_WHOLE)
        lines += (
            [f"{margin}   {paragraph.strip()}"] if is_whole else _wrapped(paragraph, f"{margin}-> ", f"{margin}   ")
        )
    lines[0] = state.ljust(_STATE_COLUMN) + finding.name.ljust(_NAME_COLUMN) + lines[0].lstrip()
    return lines


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _verdict(findings: Sequence[Finding]) -> str:
    problems, notes = names_of(findings, State.problem), names_of(findings, State.note)
    further = f" Notes: {', '.join(notes)}." if notes else ""
    if problems:
        return f"Training would NOT run here as it should. To mend first: {', '.join(problems)}.{further}"
    return f"Training would run here.{further}"
