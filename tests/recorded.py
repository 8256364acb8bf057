"""Ranks that note the configuration that they train; `torchrun ... -m tests.recorded WORDS` is such a program."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftdist import train
from sftdist.core import config
from sftdist.core.settings import TrainJobConfig
from sftdist.core.snapshot import of_run

NOTES = "RECORDED"  # the variable that names the folder for them


@dataclass(frozen=True)
class Recorded:
    """Every rank writes its configuration into `folder` before it trains."""

    folder: Path

    def __call__(self, rank: int, pipe: Any = None) -> None:
        original = train.run_rank

        def run_rank(cfg: TrainJobConfig) -> int:
            (self.folder / str(rank)).write_text(config.to_yaml(of_run(cfg)))
            return original(cfg)

        train.run_rank = run_rank


if __name__ == "__main__":
    Recorded(Path(os.environ[NOTES]))(int(os.environ["RANK"]))
    sys.exit(train.main())
