"""One key of the experiment with its value and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Value:
    """`key` is dotted, as on a command line; `why` is one or two plain sentences; `command`: a line to copy."""

    key: str
    value: Any
    why: str
    command: str = ""
