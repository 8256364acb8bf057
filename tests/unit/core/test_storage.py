from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from sftdist.core import ledger, storage
from sftdist.core.storage import (
    append_jsonl,
    publish_directory,
    read_json,
    read_jsonl,
    read_manifest,
    remove_path,
    remove_temporaries,
    sha256_file,
    sha256_json,
    verify_directory,
    write_json,
    write_manifest,
)


def _fill(folder: Path, writer: int = 0) -> None:
    (folder / "deep").mkdir()
    for number in range(20):
        (folder / f"{number}.bin").write_bytes(bytes([writer]) * 1000)
    (folder / "deep" / "rows.jsonl").write_text('{"a": 1}\n')


def test_a_published_directory_is_what_its_manifest_says(tmp_path: Path) -> None:
    final = tmp_path / "stores" / "domain-1a2b"
    with publish_directory(final) as folder:
        _fill(folder)
        assert not final.exists()
    assert verify_directory(final) == []
    manifest = read_json(final / "manifest.json")
    assert manifest["format"] == 1
    assert manifest["files"]["deep/rows.jsonl"] == {
        "bytes": 9,
        "sha256": sha256_file(final / "deep" / "rows.jsonl"),
    }
    assert os.listdir(final.parent) == [final.name]


def test_each_damage_is_named_by_its_file(tmp_path: Path) -> None:
    final = tmp_path / "store"
    with publish_directory(final) as folder:
        _fill(folder)
    (final / "0.bin").write_bytes(b"\x01" + bytes(999))
    (final / "1.bin").write_bytes(b"short")
    (final / "2.bin").unlink()
    (final / "extra").touch()
    problems = verify_directory(final)
    assert len(problems) == 4
    for name in ("0.bin", "1.bin", "2.bin", "extra"):
        assert any(str(final / name) in problem for problem in problems), name
    assert len(verify_directory(final, content=False)) == 3, "without reading, a changed byte is not seen"


def test_every_changed_byte_of_a_manifest_is_named(tmp_path: Path) -> None:
    """At all positions every single bit; and white space for white space, which JSON takes for the same."""
    final = tmp_path / "store"
    with publish_directory(final) as folder:
        (folder / "a.bin").write_bytes(b"a")
    manifest = final / "manifest.json"
    content = manifest.read_bytes()
    for place, byte in enumerate(content):
        for other in [*(byte ^ (1 << bit) for bit in range(8)), *(b"\t\r" if chr(byte).isspace() else b"")]:
            manifest.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
            assert any("manifest.json" in problem for problem in verify_directory(final)), (place, byte, other)
    manifest.write_bytes(content)
    assert verify_directory(final) == []


def test_a_known_file_is_in_the_manifest_though_it_is_not_listed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory's entries on a network file system may be those of a moment ago."""
    (tmp_path / "mine").write_bytes(b"1")
    (tmp_path / "theirs").write_bytes(b"22")
    entry = {"bytes": 2, "sha256": sha256_file(tmp_path / "theirs")}
    monkeypatch.setattr(storage, "_file_names", lambda folder, manifest: ["mine"])
    write_manifest(tmp_path, {"theirs": entry})
    assert read_manifest(tmp_path)["theirs"] == entry
    (tmp_path / "theirs").unlink()
    with pytest.raises(FileNotFoundError, match="theirs"):
        write_manifest(tmp_path, {"theirs": entry})


@pytest.mark.parametrize("manifest", [None, "{", '{"format": 2, "files": {}}', '{"files": {}}', "[]"])
def test_a_directory_without_a_readable_manifest_was_not_published(tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert len(verify_directory(tmp_path)) == 1


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def publish() -> None:
        with publish_directory(tmp_path / "store") as folder:
            _fill(folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish()
    assert list(tmp_path.iterdir()) == []


def test_eight_writers_at_once_one_of_them_killed(tmp_path: Path) -> None:
    final = tmp_path / "store"
    writers = []
    for writer in range(8):
        pid = os.fork()
        if pid == 0:
            with publish_directory(final) as folder:
                _fill(folder, writer)
                if writer == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        writers.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers]
    assert codes == [0, 0, 0, -signal.SIGKILL, 0, 0, 0, 0], "those who came too late have done nothing wrong"
    assert verify_directory(final) == []
    contents = {path.read_bytes() for path in final.glob("*.bin")}
    assert len(contents) == 1, "all files are one writer's"
    left = [path for path in tmp_path.iterdir() if path != final]
    assert len(left) <= 1, "only the killed writer could not clean up (unless a later one did it)"
    with publish_directory(final) as folder:
        _fill(folder)
    assert list(tmp_path.iterdir()) == [final]


def test_a_running_writers_directory_is_not_swept(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "store") as mine:
        (mine / "a").write_text("a")
        with publish_directory(tmp_path / "store") as other:
            (other / "b").write_text("b")
        assert (mine / "a").exists()
    assert (tmp_path / "store" / "b").exists()


def test_the_one_writer_sweeps_what_any_start_left(tmp_path: Path) -> None:
    """Of any name that fits, any host and process; a file, too; and nothing else."""
    for name in (".step-2.@host@1@ab.tmp", f".step-1.@{os.uname().nodename}@{os.getpid()}@ab.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    for name in (".step-3.0123abcd.tmp", "step-1", ".other.0123.tmp", "step-4.tmp"):
        (tmp_path / name).write_text("x")
    remove_temporaries(tmp_path, "step-*")
    assert sorted(os.listdir(tmp_path)) == [".other.0123.tmp", "step-1", "step-4.tmp"]


def test_a_removal_that_was_broken_off_leaves_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "step-1"
    with publish_directory(final) as folder:
        _fill(folder)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
        remove_path(final)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".step-1.")
    remove_temporaries(tmp_path, "step-*")
    assert list(tmp_path.iterdir()) == []


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_torn_line_is_neither_read_nor_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 1}, {"step": 2, "text": "é"}])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    append_jsonl(path, [{"step": 3}])
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_many_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    pids = []
    for writer in range(6):
        pid = os.fork()
        if pid == 0:
            for number in range(30):
                ledger.record(path, {"writer": writer, "number": number, "note": "x" * 5000})
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    rows = ledger.read(path)
    assert sorted((row["writer"], row["number"]) for row in rows) == [(w, n) for w in range(6) for n in range(30)]
    assert all(json.dumps(row) for row in rows)


def test_canonical_json_has_one_hash() -> None:
    assert sha256_json({"a": 1, "b": [1.5, "é"]}) == sha256_json({"b": [1.5, "é"], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        sha256_json(float("nan"))


def test_versions_and_commit_are_recorded(tmp_path: Path) -> None:
    assert {"python", "torch", "deepspeed", "transformers"} <= set(ledger.versions())
    assert ledger.git_state(tmp_path) == {"commit": None, "dirty": None}
    assert ledger.read(tmp_path / "none.jsonl") == []
