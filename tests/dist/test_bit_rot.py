"""Proof 3 (A7): a checkpoint whose bytes changed is refused by file name; the run walks back and ends bit-equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sftdist.training.checkpoint_files import checkpoints_in, directory_name, verify
from tests.faults import Job
from tests.held import Hold
from tests.saving import RANKS, Shape, Whole, assert_equal_runs, assert_no_litter, go_on_to_the_end

Damage = Callable[[Path], Path]  # damages a checkpoint; the file that must be named

FILES = (
    "part-00000-00.safetensors",
    "part-00001-00.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
)
STOPPED = 12  # the step whose save is never finished


def flip(path: Path, share: float) -> None:
    """One byte of a file becomes another one."""
    data = bytearray(path.read_bytes())
    data[min(int(share * len(data)), len(data) - 1)] ^= 0x10
    path.write_bytes(data)


def flipped(name: str, share: float) -> Damage:
    def damage(folder: Path) -> Path:
        flip(folder / name, share)
        return folder / name

    return damage


def truncated(name: str, share: float) -> Damage:
    def damage(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return path

    return damage


def missing(name: str) -> Damage:
    def damage(folder: Path) -> Path:
        (folder / name).unlink()
        return folder / name

    return damage


def one_more(folder: Path) -> Path:
    (folder / "part-00002-00.safetensors").write_bytes((folder / FILES[0]).read_bytes())
    return folder / "part-00002-00.safetensors"


def exchanged(folder: Path) -> Path:
    """Both files are sound, but each has the other's name."""
    first, second = folder / FILES[0], folder / FILES[1]
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    return first


def emptied(folder: Path) -> Path:
    """The directory alone: no manifest, nothing."""
    shutil.rmtree(folder)
    folder.mkdir()
    return folder / "manifest.json"


SHARES = (0.0, 0.01, 0.5, 0.99, 1.0)
ALL: dict[str, Damage] = {f"{name} at {share}": flipped(name, share) for name in FILES for share in SHARES}
ALL |= {f"{name} cut to {share}": truncated(name, share) for name in FILES for share in (0.0, 0.5)}
ALL |= {f"{name} missing": missing(name) for name in FILES}
ALL |= {"a file more": one_more, "two exchanged": exchanged, "nothing in it": emptied}


@pytest.fixture(scope="module")
def kept(shape: Shape) -> Shape:
    """The same run with more checkpoints."""
    return replace(shape, more=("checkpoint.keep_last=20",))


@pytest.fixture(scope="module")
def stopped(home: Path, kept: Shape) -> Path:
    """A run that was killed when it began to save step 12; it has kept the eleven checkpoints before."""
    run_dir = home / "stopped"
    with Job(RANKS, kept.overrides(run_dir), home, Hold(run_dir, STOPPED, number=0)) as job:
        job.hear(0, "held")
    return run_dir


def copy_of(stopped: Path, name: str) -> Path:
    return Path(shutil.copytree(stopped, stopped.with_name(name)))


def damaged(run_dir: Path, damages: list[Damage]) -> list[Path]:
    """Damage the newest checkpoints, one each; the files that must be named, the newest first."""
    newest = [info.path for info in reversed(checkpoints_in(run_dir / "checkpoints"))]
    return [damage(path) for damage, path in zip(damages, newest, strict=False)]


@pytest.mark.parametrize("name", list(ALL))
def test_every_damage_is_seen_and_named(stopped: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(checkpoints_in(stopped / "checkpoints")[-1].path, tmp_path / "step-00000011"))
    assert verify(folder) == []
    file = ALL[name](folder)
    problems = verify(folder)
    assert any(problem.startswith(str(folder)) and file.name in problem for problem in problems), problems


def test_a_run_walks_back_over_all_that_is_damaged(home: Path, stopped: Path, kept: Shape, whole: Whole) -> None:
    """One start that passes over nine checkpoints, each damaged in another way, and over a LATEST that lies."""
    run_dir = copy_of(stopped, "walk")
    damages = [flipped(name, 0.7) for name in FILES]
    damages += [truncated(FILES[1], 0.0), missing("state.json"), one_more, emptied]
    files = damaged(run_dir, damages)
    (run_dir / "LATEST").write_bytes(b"\xff\x00checkpoints/step-99999999\n")
    screen = go_on_to_the_end(home, kept, run_dir, STOPPED - 1 - len(damages))
    refusals = [line for line in screen.splitlines() if "does not verify" in line]
    assert len(refusals) == len(files)
    for line, file in zip(refusals, files, strict=True):
        assert file.parent.name in line
        assert file.name in line
    assert_equal_runs(run_dir, whole.run_dir)
    assert_no_litter(run_dir)
    assert all(verify(info.path) == [] for info in checkpoints_in(run_dir / "checkpoints"))
    assert (run_dir / "LATEST").read_text() == f"checkpoints/{directory_name(kept.steps)}\n"


def test_nothing_is_trained_where_no_checkpoint_is_whole(home: Path, stopped: Path, kept: Shape) -> None:
    """Not from the beginning either: what is left may be worth a repair."""
    run_dir = copy_of(stopped, "lost")
    damaged(run_dir, [flipped(FILES[0], 0.5)] * (STOPPED - 1))
    before = [info.path for info in checkpoints_in(run_dir / "checkpoints")]
    with Job(RANKS, kept.overrides(run_dir), home) as job:
        assert job.codes() == [1] * RANKS
        assert "none of the 11 checkpoints" in job.screen()
    assert [info.path for info in checkpoints_in(run_dir / "checkpoints")] == before


@pytest.mark.long
@pytest.mark.parametrize("name", list(ALL))
def test_one_damage_at_a_time(home: Path, stopped: Path, kept: Shape, whole: Whole, name: str) -> None:
    run_dir = copy_of(stopped, f"one-{list(ALL).index(name)}")
    (file,) = damaged(run_dir, [ALL[name]])
    screen = go_on_to_the_end(home, kept, run_dir, STOPPED - 2)
    (refusal,) = [line for line in screen.splitlines() if "does not verify" in line]
    assert file.name in refusal
    assert_equal_runs(run_dir, whole.run_dir)
    assert_no_litter(run_dir)


@pytest.mark.long
@pytest.mark.parametrize("text", [None, b"", b"checkpoints/step-00000999\n", b"checkpoints/step-00000001\n", b"\xff"])
def test_latest_is_a_sign_for_people_only(
    home: Path, stopped: Path, kept: Shape, whole: Whole, text: bytes | None
) -> None:
    """Missing, empty, pointing nowhere, to an old one, or not text: the newest whole checkpoint is taken up."""
    run_dir = copy_of(stopped, f"latest-{'missing' if text is None else text.hex()}")
    if text is None:
        (run_dir / "LATEST").unlink()
    else:
        (run_dir / "LATEST").write_bytes(text)
    go_on_to_the_end(home, kept, run_dir, STOPPED - 1)
    assert_equal_runs(run_dir, whole.run_dir)
