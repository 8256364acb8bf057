"""`sftdist.train` whose checkpoints take SLOW_SAVE seconds more, in the middle of a save: between its files and the
rename that publishes them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sftdist import train

plain_rename = Path.rename


def slow_rename(self: Path, target: str | os.PathLike[str]) -> Path:
    if Path(target).name.startswith("step-"):
        print(f"publishing {Path(target).name}", flush=True)
        time.sleep(float(os.environ["SLOW_SAVE"]))
    return plain_rename(self, target)


if __name__ == "__main__":
    Path.rename = slow_rename  # type: ignore[method-assign, assignment]
    sys.exit(train.main())
