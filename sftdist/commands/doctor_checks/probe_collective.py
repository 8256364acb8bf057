"""Run by the doctor in a process of its own: starts the two ranks of the collective test as training starts its own."""

from __future__ import annotations

import sys
from pathlib import Path

from sftdist.commands.doctor_checks import probe_ranks
from sftdist.core.agent import launch

_GRACE_SECONDS = 5.0


def main() -> int:
    """`FOLDER`: where the ranks leave what they have done."""
    folder = Path(sys.argv[1])
    return launch(probe_ranks.__name__, [str(folder)], probe_ranks.RANKS, folder, _GRACE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
