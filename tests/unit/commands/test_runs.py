"""What `sftdist runs` says of runs and checkpoints on disk, and its exit code."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from sftdist.commands.runs import main
from sftdist.core.agent import write_status
from sftdist.core.lock import RunLock, holder
from sftdist.core.settings import CheckpointSettings, TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import write_json, write_manifest


def make_run(run_dir: Path, keep_every: int = 0) -> Path:
    write_config(run_dir, TrainConfig(checkpoint=CheckpointSettings(keep_every=keep_every)))
    return run_dir


def make_checkpoint(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    shape = {"world_size": 4, "stage": 3, "precision": "bf16"}
    write_json(path / "state.json", {"shape": shape, "saved_at": 1.0})
    (path / "part-00000-00.safetensors").write_bytes(bytes(2**20))
    write_manifest(path)
    return path


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_runs_with_state_step_code_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(make_run(tmp_path / "good"), "done", 0, step=120)
    write_status(make_run(tmp_path / "bad"), "failed", 3, "source a: no rows\nand more", step=None)
    write_status(make_run(tmp_path / "killed"), "running", 1, "still running", step=40)
    make_run(tmp_path / "waiting")
    (tmp_path / "no run").mkdir()
    assert main([str(tmp_path)]) == 0
    rows = {line.split()[0]: line.split() for line in lines_of(capsys)}
    assert rows["good"][1:4] == ["done", "120", "0"]
    assert rows["bad"][1:3] == ["failed", "3"]
    assert " ".join(rows["bad"]).endswith("source a: no rows")
    assert rows["killed"][1:3] == ["ended", "40"]
    assert rows["waiting"][1:3] == ["not", "started"]
    assert "no" not in rows


def test_a_run_that_goes_on_names_its_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "mine")
    write_status(run_dir, "running", 75)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(run_dir):
            os.write(write, b"locked")
            signal.pause()
    try:
        assert os.read(read, 6) == b"locked"
        assert main([str(run_dir)]) == 0
        assert f"by process {pid} on" in lines_of(capsys)[1]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert holder(run_dir) is None


def test_checkpoints_with_shape_age_and_why_they_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", keep_every=100)
    for step in (40, 100, 110, 120):
        make_checkpoint(run_dir, step)
    losses = {40: 1.25, 100: 2.0, 120: 1.5}
    evals = [{"kind": "eval", "step": step, "eval/loss": loss} for step, loss in losses.items()]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    assert main(["checkpoints", str(run_dir)]) == 0
    header, *lines = lines_of(capsys)
    assert header.split() == ["step", "size", "saved", "on", "age", "eval/loss", "kept", "as", "verdict"]
    assert [line.split()[0] for line in lines] == ["40", "100", "110", "120"]
    assert all("1.0 MiB  4 ranks, ZeRO 3, bf16" in line and line.endswith("verifies") for line in lines)
    assert "1.2500     best" in lines[0]
    assert "2.0000     every 100" in lines[1]
    assert "last  " in lines[2]
    assert "1.5000     latest" in lines[3]


def test_a_damaged_checkpoint_is_named_by_file_and_gives_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped byte is seen by reading only, and --fast says that it does not read; a short file is seen by both."""
    run_dir = make_run(tmp_path / "run")
    make_checkpoint(run_dir, 1)
    part = make_checkpoint(run_dir, 2) / "part-00000-00.safetensors"
    content = bytearray(part.read_bytes())
    content[1000] ^= 1
    part.write_bytes(content)
    assert main(["checkpoints", str(run_dir)]) == 1
    _, first, second = lines_of(capsys)
    assert first.endswith("verifies")
    assert "step-00000002/part-00000-00.safetensors: its sha256" in second

    assert main(["checkpoints", str(run_dir), "--fast"]) == 0
    assert lines_of(capsys)[0] == "sizes only (--fast): no file is read"
    part.write_bytes(content[:-1])
    assert main(["checkpoints", str(run_dir), "--fast"]) == 1
    assert "part-00000-00.safetensors: 1048575 bytes" in lines_of(capsys)[-1]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["checkpoints", str(tmp_path)], [str(tmp_path / "absent")]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} is no run: required a run directory, which holds config.yaml" in said
    assert "there is no such folder" in said
    assert main([str(tmp_path)]) == 0
    assert lines_of(capsys) == [f"no run below {tmp_path}"]


def test_a_run_of_a_later_version_is_listed_and_its_checkpoints_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "later")
    make_checkpoint(run_dir, 10)
    (run_dir / "config.yaml").write_text("config_version: 999\nfrom_the_future: 1\n")
    assert main([str(tmp_path)]) == 0
    assert lines_of(capsys)[1].split()[0] == "later"
    assert main(["checkpoints", str(run_dir)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sftdist runs: error: {run_dir}/config.yaml: config_version: given 999")
    assert said.count("\n") == 1
