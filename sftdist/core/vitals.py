"""What a rank tells the others of itself: that it lives, and what it is doing."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace

from sftdist.core.failure import Failure, here
from sftdist.core.progress import Activity


@dataclass(frozen=True)
class Vitals:
    """`count`: how many activities the rank has begun; `beat` changes each time that it says so."""

    rank: int
    host: str
    pid: int
    step: int | None
    phase: str
    count: int
    beat: int

    @classmethod
    def of(cls, rank: int, doing: Activity, beat: int) -> Vitals:
        return cls(rank, socket.gethostname(), os.getpid(), doing.step, doing.phase, doing.count, beat)

    @classmethod
    def unpacked(cls, text: str | bytes) -> Vitals:
        return cls(**json.loads(text))

    def packed(self) -> str:
        return json.dumps(asdict(self))

    def failure(self, kind: str, rows: tuple[str, ...], message: str, trace: str = "") -> Failure:
        """What another rank reports of this one."""
        found = here(kind, self.rank, Activity(self.phase, self.step, rows), message)
        return replace(found, host=self.host, pid=self.pid, traceback=trace)
