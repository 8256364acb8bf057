"""The figures of a run for TensorBoard: `tracking.sinks=[sftdist.examples.tensorboard_tracker:TensorBoard]`.

Needs `pip install 'sftdist[tensorboard]'`; then `tensorboard --logdir runs` shows all runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as missing:
    raise ImportError(f"{missing}; pip install 'sftdist[tensorboard]'") from missing


class TensorBoard:
    """Writes event files below `run_dir/tensorboard`; every figure under its name in metrics.jsonl."""

    def __init__(self, run_dir: Path, config: dict[str, Any], step: int) -> None:
        # Figures of later steps, of before the run was resumed, are made again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("run", f"{config['run']['name']}: {config['run']['note']}")

    def line(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self, state: str) -> None:
        self._writer.close()
