"""`sftdist export run.dir=R [step=latest|best|120] [merge=true]`: any checkpoint of a run as a verified folder.

One CPU process, offline, without the training data. The run's own configuration is the base, so only `export.*` and,
where the base of a LoRA run has moved, `model.path` are given anew.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from transformers.utils import logging

from sftdist.core import snapshot
from sftdist.core.config import main as command_line
from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.settings import ExportConfig, Method
from sftdist.training.checkpoint_files import find, verify
from sftdist.training.export import ExportSpec, export_model
from sftdist.training.offline import SavedModel, expected_memory, read_outline
from sftdist.training.tracking import standing

_OWN = ("export.", "model.path")
_GIB = 2**30


def main() -> int:
    """The command line."""
    return command_line(ExportConfig, run, "export", checks=[run_issues])


def run_issues(cfg: ExportConfig) -> list[str]:
    """Keys that differ from the run's own, though an export cannot change them. Raises ConfigError where `run.dir` is
    no run: what else is missing then does not matter."""
    changed = snapshot.differences(snapshot.read_config(snapshot.require_run(cfg.run.dir)), cfg)
    issues = [
        f"{key}: the run has {before!r}, given {now!r}; an export takes only merge, export.* and model.path"
        for key, (before, now) in changed.items()
        if not key.startswith(_OWN)
    ]
    if cfg.merge is False and cfg.tune.method == Method.full:
        issues.append("merge: given false, but this run trains all weights and has no adapter; leave merge out")
    return issues


def run(cfg: ExportConfig) -> Path:
    """Export the checkpoint and return its folder, `R/export-step-00000120`. Raises CheckpointError where it does not
    verify, and as `export_model` does."""
    if issues := run_issues(cfg):
        raise ConfigError(issues)
    logging.disable_progress_bar()
    say, run_dir = partial(print, flush=True), Path(str(cfg.run.dir))
    path = find(run_dir, cfg.step, standing(run_dir, cfg.checkpoint.best))
    outline = read_outline(run_dir)
    step = int(path.name.removeprefix("step-"))
    merge = cfg.export.merge if cfg.merge is None else cfg.merge
    spec = ExportSpec(cfg.export.dtype.value, int(cfg.export.shard_gib * _GIB), merge, step)
    say(f"{path}: its export needs about {expected_memory(cfg, outline, spec) / _GIB:.1f} GiB of memory at its peak")
    if problems := verify(path):
        raise CheckpointError(f"{path} does not verify: {'; '.join(problems[:5])}")
    source = SavedModel(cfg, path, outline)
    folder = run_dir / f"export-{path.name}"
    export_model(source, outline.template, folder, spec, written=source.release, say=say)
    say(f"the verified model of step {step} is in {folder}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
