"""The end of a run: its last line on the screen, and its line in the ledger."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sftdist.core import ledger, snapshot
from sftdist.core.figures import losses
from sftdist.core.settings import TrainConfig
from sftdist.core.warm_start import parent_of
from sftdist.data.corpus import Corpus
from sftdist.training.loop import TrainState


def ending(run_dir: Path, state: str, step: int) -> str:
    """The last line of a run: where its model is, or how it goes on."""
    if state == "preempted":
        return f"stopped after step {step} with everything saved; run the same command again to go on"
    return f"done after step {step}: the verified model is in {run_dir / 'export'}"


def record_in_ledger(cfg: TrainConfig, corpus: Corpus, outcome: str, state: TrainState) -> None:
    """One line per start. A ledger that cannot be written costs a line on the screen, not a finished run."""
    path = Path(str(cfg.run.dir)).parent / ledger.FILE
    try:
        ledger.record(path, ledger_entry(cfg, corpus, outcome, state))
    except OSError as error:
        print(f"{path}: this run is not in the ledger ({error})", flush=True)


def ledger_entry(cfg: TrainConfig, corpus: Corpus, outcome: str, state: TrainState) -> dict[str, Any]:
    """What the ledger keeps of a run: enough to say later what it was trained on, by which code, and how it ended."""
    return {
        "run": cfg.run.name,
        "dir": str(cfg.run.dir),
        "note": cfg.run.note,
        "outcome": outcome,
        "parent": parent_of(cfg.model.path),
        "config": snapshot.config_hash(cfg),
        "data": {store.name: store.manifest["key"] for store in corpus.stores},
        "git": ledger.git_state(),
        "versions": ledger.versions(),
        "hardware": hardware(),
        "losses": losses(Path(str(cfg.run.dir))),
        **asdict(state),
    }


def hardware() -> dict[str, Any]:
    """What this rank trained on, and with how many others."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"ranks": int(os.environ.get("WORLD_SIZE", "1")), "device": gpu or f"CPU ({platform.machine()})"}
