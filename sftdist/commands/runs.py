"""`sftdist runs [FOLDER]`: the runs of a folder. `sftdist runs checkpoints R [--fast]`: the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sftdist.commands.runs_list import as_json, is_run, lines_of, listed
from sftdist.core import snapshot
from sftdist.core.agent import FAILED
from sftdist.core.errors import ConfigError
from sftdist.core.storage import verify_directory
from sftdist.core.table import columns
from sftdist.training.checkpoint_files import FOLDER, CheckpointInfo, age, checkpoints_in
from sftdist.training.retention import best_step
from sftdist.training.tracking import evaluation_losses, standing

_CHECKPOINTS = "checkpoints"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when a checkpoint does not verify, 2 where the run's configuration cannot be read.

    argparse ends with 2 where an argument is wrong.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    if words[:1] == [_CHECKPOINTS]:
        given = parser.parse_args(words)
        if not is_run(given.run):
            parser.error(f"{given.run} is no run: required a run directory, which holds {snapshot.FILE}")
        try:
            return show_checkpoints(given.run, fast=given.fast)
        except ConfigError as error:  # of another version, or edited
            print(f"sftdist runs: error: {error}", file=sys.stderr)
            return error.exit_code
    given = parser.parse_args(["list", *words] if words[:1] not in (["list"], ["-h"], ["--help"]) else words)
    if not given.folder.is_dir():
        parser.error(f"{given.folder}: there is no such folder; give the one that holds your run directories")
    show_runs(given.folder, in_json=given.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist runs",
        description="The runs of a folder; sftdist runs FOLDER is short for sftdist runs list FOLDER.",
    )
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="every run below a folder, and those of its ledger that are gone")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    listing.add_argument("--json", action="store_true", help="the same as JSON, with all that is known")
    checkpoints = commands.add_parser(
        _CHECKPOINTS,
        help="every checkpoint of a run, verified",
        description="Every checkpoint of a run: step, size, the shape it was saved on, age, why it is kept, and "
        "whether each of its files is what was written. Exit code 1 when one is not.",
    )
    checkpoints.add_argument("run", type=Path, metavar="R", help="the run directory")
    checkpoints.add_argument("--fast", action="store_true", help="compare names and sizes only, without reading files")
    return parser


def show_runs(folder: Path, *, in_json: bool = False) -> None:
    """A line per run below `folder` (or of `folder`, where it is one), the one that changed last at the end."""
    found = listed(folder)
    if in_json:
        print(json.dumps(as_json(found), indent=2, ensure_ascii=False, allow_nan=False))
        return
    if not found:
        print(f"no run below {folder}")
    for line in lines_of(found) if found else ():
        print(line)


def show_checkpoints(run_dir: Path, *, fast: bool = False) -> int:
    """A line per checkpoint, oldest step first, each with what is wrong in it; 1 where something is."""
    infos = checkpoints_in(run_dir / FOLDER)
    if not infos:
        print(f"{run_dir}: there is no checkpoint yet")
        return 0
    if fast:
        print("sizes only (--fast): no file is read")
    why, losses = reasons_to_keep(run_dir, infos), evaluation_losses(run_dir)
    rows = [("step", "size", "saved on", "age", "eval/loss", "kept as")]
    for info in infos:
        loss = f"{losses[info.step]:.4f}" if info.step in losses else ""
        saved = age(time.time() - info.saved_at) if info.saved_at else "?"
        rows.append((str(info.step), _size(info.bytes), _shape(info), saved, loss, why[info.step]))
    header, *lines = columns(rows)
    print(f"{header}  verdict")
    broken = 0
    for info, line in zip(infos, lines, strict=True):
        problems = verify_directory(info.path, content=not fast)
        broken += bool(problems)
        good = "sizes are right" if fast else "verifies"
        print(f"{line}  {'; '.join(problems) or good}", flush=True)  # one by one: a large one takes its time
    return FAILED if broken else 0


def reasons_to_keep(run_dir: Path, infos: Sequence[CheckpointInfo]) -> dict[int, str]:
    """By step: latest, best, every N, or last."""
    settings = snapshot.read_config(run_dir).checkpoint
    steps = [info.step for info in infos]
    best = best_step(steps, standing(run_dir, settings.best))
    reasons = {}
    for step in steps:
        found = ["latest"] if step == steps[-1] else []
        found += ["best"] if step == best else []
        found += [f"every {settings.keep_every}"] if settings.keep_every and step % settings.keep_every == 0 else []
        found += ["last"] if step in steps[-settings.keep_last : -1] else []
        reasons[step] = ", ".join(found)
    return reasons


def _shape(info: CheckpointInfo) -> str:
    if not info.world_size:
        return "?"
    return f"{info.world_size} rank{'s' if info.world_size > 1 else ''}, ZeRO {info.stage}, {info.precision}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
