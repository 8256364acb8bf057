"""The registry: whole versions or none, one number each, `latest` last, every byte accounted for."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sftdist.core import lock
from sftdist.core.errors import ConfigError, GateError
from sftdist.core.releases import Release, find, latest, names, resolve, versions
from sftdist.core.storage import read_json
from sftdist.release import registry as registry_module
from sftdist.release.registry import Draft, Entries, finished, history, problems_of, release, rollback
from tests.conftest import ROOT


def fill(folder: Path) -> Entries:
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return {}


def describe(draft: Draft) -> Mapping[str, Any]:
    (draft.folder / "CHANGELOG.md").write_text(f"{draft.version} after {draft.last}")
    return {"model_sha256": "abc"}


def make(folder: Path, name: str = "bot") -> Release:
    return release(folder, name, fill, describe)


def test_versions_count_up_and_latest_is_the_last_one(tmp_path: Path) -> None:
    assert (versions(tmp_path, "bot"), latest(tmp_path, "bot"), names(tmp_path)) == ([], None, [])
    one, two = make(tmp_path), make(tmp_path)
    assert [str(one), str(two)] == ["bot@v1", "bot@v2"]
    assert (tmp_path / "bot" / "latest").read_text() == "v2\n"
    assert two.facts()["model_sha256"] == "abc"
    assert (two.path / "CHANGELOG.md").read_text() == "2 after bot@v1"
    assert sorted(two.facts()["files"]) == ["CHANGELOG.md", "adapter/adapter_config.json", "model.safetensors"]
    assert names(tmp_path) == ["bot"]
    assert [line["event"] for line in history(tmp_path, "bot")] == ["release", "release"]
    assert sorted(path.name for path in (tmp_path / "bot").iterdir()) == [".lock", "latest", "log.jsonl", "v1", "v2"]


def test_v10_comes_after_v9_and_a_gap_is_not_filled(tmp_path: Path) -> None:
    """By number, not by name; and a number that was taken once is not given again while a later one is there."""
    for number in (1, 9, 10):
        (tmp_path / "bot" / f"v{number}").mkdir(parents=True)
    (tmp_path / "bot" / "v011").mkdir()
    assert make(tmp_path).version == 11
    assert [one.version for one in versions(tmp_path, "bot")] == [1, 9, 10, 11]


def test_references(tmp_path: Path) -> None:
    one, two = make(tmp_path), make(tmp_path)
    assert resolve(tmp_path, "bot") == resolve(tmp_path, "bot@latest") == two.path
    assert resolve(tmp_path, "bot@v1") == one.path
    assert find(tmp_path / "elsewhere", str(one.path)) == one
    for wrong, words in {
        "bot@v3": "bot has v1, v2",
        "bot@3": "given the version '3'",
        "bto": "did you mean bot?",
        "../bot@v1": "given no release, required NAME@vN",
        "": "given no release",
    }.items():
        with pytest.raises(ConfigError, match=words):
            resolve(tmp_path, wrong)
    for name in ("a/b", ".hidden", "", "a b", "bot@v1"):
        with pytest.raises(ConfigError, match="name: given"):
            make(tmp_path, name)


def test_rollback_moves_latest_alone_and_is_in_the_log(tmp_path: Path) -> None:
    for _ in range(3):
        make(tmp_path)
    before, now = rollback(tmp_path, "bot@v1")
    assert (before, now.version) == ("v3", 1)
    assert latest(tmp_path, "bot") == now
    line = history(tmp_path, "bot")[-1]
    assert (line["event"], line["version"], line["was"]) == ("rollback", 1, "v3")
    assert [one.version for one in versions(tmp_path, "bot")] == [1, 2, 3], "nothing is removed"
    made = make(tmp_path)
    assert made.version == 4, "the next one is no second v2"
    assert (made.path / "CHANGELOG.md").read_text() == "4 after bot@v1", "it is compared with what was in use"
    with pytest.raises(ConfigError, match="it is not in"):
        rollback(tmp_path / "other", str(made.path))


def test_a_pointer_that_points_nowhere_is_said_and_mended_by_rollback(tmp_path: Path) -> None:
    make(tmp_path)
    for wrong in ("v7", "", "../../etc"):
        (tmp_path / "bot" / "latest").write_text(wrong)
        with pytest.raises(ConfigError, match="required one of the versions beside it"):
            resolve(tmp_path, "bot")
        rollback(tmp_path, "bot@v1")
        assert resolve(tmp_path, "bot").name == "v1"


def test_what_fails_leaves_nothing_and_latest_where_it_was(tmp_path: Path) -> None:
    make(tmp_path)

    def refuse(draft: Draft) -> Mapping[str, Any]:
        raise GateError("no")

    def full(folder: Path) -> Entries:
        fill(folder)
        raise OSError(28, "No space left on device")

    for error, first, second in ((GateError, fill, refuse), (OSError, full, describe)):
        with pytest.raises(error):
            release(tmp_path, "bot", first, second)
    left = sorted(path.name for path in (tmp_path / "bot").iterdir())
    assert left == [".lock", "latest", "log.jsonl", "v1"]
    assert make(tmp_path).version == 2


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert problems_of(made) == []
    weights, listed = made.path / "model.safetensors", made.path / "release.json"
    assert not weights.stat().st_mode & 0o222, "nobody edits a release by accident"
    weights.chmod(0o644)
    weights.write_bytes(bytes(999) + b"x")
    (made.path / "adapter" / "adapter_config.json").unlink()
    (made.path / "adapter" / "more.bin").write_bytes(b"")
    found = problems_of(made)
    assert len(found) == 3
    assert "more.bin: not in release.json" in found[0]
    assert "adapter_config.json: missing" in found[1]
    assert "model.safetensors: its sha256 is not the one in release.json" in found[2]
    assert len(problems_of(made, below=["adapter/"])) == 1
    assert problems_of(made, below=["CHANGELOG"]) == []
    for work in (lambda: rollback(tmp_path, "bot@v1"), lambda: finished(tmp_path, "bot", "abc")):
        with pytest.raises(GateError, match=r"bot@v1 is not what was published:\n.*more\.bin: not in release\.json"):
            work()

    made = make(tmp_path)
    listed = made.path / "release.json"
    listed.chmod(0o644)
    listed.write_text(listed.read_text().replace('"abc"', '"abd"'))
    assert "its sha256 is not the one in the registry's log.jsonl" in problems_of(made)[0]
    assert problems_of(made, below=["CHANGELOG"]) == problems_of(made)
    (made.path.parent / "log.jsonl").unlink()
    assert "log.jsonl: says nothing of v2" in problems_of(made)[0]


def test_a_release_taken_elsewhere_may_lack_the_rows_alone(tmp_path: Path) -> None:
    def with_report(folder: Path) -> Entries:
        (folder / "report").mkdir()
        for name in ("report.json", "rows.jsonl", "report.html"):
            (folder / "report" / name).write_text(name)
        return fill(folder)

    made = release(tmp_path, "bot", with_report, describe)
    taken = Path(shutil.copytree(made.path, tmp_path / "taken"))
    (taken / "report").chmod(0o755)
    for name in ("rows.jsonl", "report.html"):
        (taken / "report" / name).unlink()
    assert problems_of(find(tmp_path, str(taken))) == []
    (made.path / "report" / "rows.jsonl").unlink()
    assert "rows.jsonl: missing" in problems_of(made)[0], "in the registry nothing may be missing"
    (taken / "report" / "report.json").unlink()
    assert "report.json: missing" in problems_of(find(tmp_path, str(taken)))[0]


def _publish_several(folder: Path, count: int) -> None:
    for _ in range(count):
        make(folder)


@pytest.mark.parametrize("locks", [True, False])
def test_two_publishers_never_get_the_same_number(tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no locks: there the rename decides, and the text is written for the new number."""
    if not locks:
        monkeypatch.setattr(lock, "_try_lock", lambda file: (_ for _ in ()).throw(OSError(37, "No locks available")))
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_publish_several, args=(tmp_path, 5)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
    made = versions(tmp_path, "bot")
    assert [one.version for one in made] == list(range(1, 16))
    for one in made:
        assert (one.path / "CHANGELOG.md").read_text().startswith(f"{one.version} after")
        assert one.facts()["version"] == one.version
        assert problems_of(one) == []
    assert latest(tmp_path, "bot") == made[-1]


_STOPS: dict[str, tuple[str, bool]] = {  # where it is killed, and whether the version is whole then
    "fill": ("write_manifest", False),
    "listed": ("_log", False),
    "logged": ("commit_directory", False),
    "renamed": ("_point", True),
}


@pytest.mark.parametrize("place", _STOPS)
def test_a_kill_leaves_a_whole_version_or_none(tmp_path: Path, place: str) -> None:
    """Killed right before each step; what is there afterwards verifies, and the next publisher goes on."""
    make(tmp_path)
    name, whole = _STOPS[place]
    pid = os.fork()
    if pid == 0:

        def die(*given: object, **named: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(registry_module, name, die)
        make(tmp_path)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert [one.version for one in versions(tmp_path, "bot")] == ([1, 2] if whole else [1])
    assert resolve(tmp_path, "bot").name == "v1", "latest moves last"
    assert all(problems_of(one) == [] for one in versions(tmp_path, "bot"))
    made = make(tmp_path)
    assert (made.version, resolve(tmp_path, "bot")) == (3 if whole else 2, made.path)
    assert not list((tmp_path / "bot").glob(".release*")), "what the killed one had begun is gone"


def test_the_same_model_again_is_the_same_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that was killed before `latest` moved is finished; what a rollback has done is not undone."""
    assert finished(tmp_path, "bot", "abc") is None
    make(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(registry_module, "_point", lambda home, version: None)
        two = make(tmp_path)
    assert resolve(tmp_path, "bot").name == "v1"
    assert finished(tmp_path, "bot", "other") is None
    assert finished(tmp_path, "bot", "abc") == two
    assert resolve(tmp_path, "bot") == two.path
    rollback(tmp_path, "bot@v1")
    assert finished(tmp_path, "bot", "abc") == two
    assert resolve(tmp_path, "bot").name == "v1"


_PUBLISH = """
import sys; from pathlib import Path; from tests.unit.release.test_registry import make
for _ in range(40): make(Path(sys.argv[1]))
"""


@pytest.mark.long
def test_a_kill_at_any_moment(tmp_path: Path) -> None:
    def publisher() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", _PUBLISH, str(tmp_path)], cwd=ROOT)

    for moment in range(12):
        child = publisher()
        _until(lambda: bool(versions(tmp_path, "bot")))
        time.sleep(0.01 * moment + 0.7 * (moment > 0))
        child.kill()
        child.wait()
        made = versions(tmp_path, "bot")
        assert [one.version for one in made] == list(range(1, len(made) + 1))
        assert all(problems_of(one) == [] for one in made)
        assert find(tmp_path, "bot").version in (len(made), len(made) - 1)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_release_json_is_plain(tmp_path: Path) -> None:
    facts = read_json(make(tmp_path).path / "release.json")
    assert list(facts) == ["format", "name", "version", "created", "model_sha256", "files"]
