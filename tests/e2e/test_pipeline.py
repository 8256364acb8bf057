"""`sftdist pipeline`: the stages in order, the first that fails, a stop that reaches the stage."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from sftdist.commands import pipeline
from tests.e2e.jobs import KEYS, Running
from tests.e2e.workshop import metrics, sftdist, status

pytestmark = pytest.mark.timeout(600)
PIPELINE = (sys.executable, "-m", "sftdist.cli", "pipeline")


def test_what_this_version_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["--stages"]) == 0
    shown = capsys.readouterr()
    stages = shown.out.split()
    assert stages[:2] == ["prepare", "train"]
    assert all((name in stages) != (name in shown.err) for name in pipeline.STAGES), "the others are named"


def test_a_typo_is_found_before_the_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["+exp=quickstart", "optimizer.learning_rate=1"]) == 2
    shown = capsys.readouterr()
    assert "sftdist pipeline: error: optimizer.learning_rate: unknown key; did you mean optimizer.lr?" in shown.err
    assert "stage" not in shown.out


def test_the_first_stage_that_fails_ends_it(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    words = ["+exp=full", "model.path=model", "data.train=bad.jsonl", "model.tokenizer=nowhere"]
    done = sftdist(["pipeline", *words], tmp_path)
    assert done.returncode not in (0, 75), done.stderr
    assert f"sftdist pipeline: prepare failed with exit code {done.returncode}; not run: train" in done.stderr
    assert "stage 1 of" in done.stdout
    assert "stage 2 of" not in done.stdout


@pytest.mark.long
def test_a_stop_reaches_the_stage_and_the_same_line_goes_on(home: Path) -> None:
    command = [*PIPELINE, *KEYS, "train.max_steps=15", "run.dir=runs/line"]
    run_dir = home / "runs/line"
    with Running(command, home) as job:
        job.until_step(run_dir, 3)
        job.tell(signal.SIGTERM)
        assert job.end() == 75, job.screen
        assert "sftdist pipeline: train was stopped" in job.screen
        assert "the same line goes on from there" in job.screen
    stopped = status(run_dir)["step"]
    with Running(command, home) as job:
        assert job.end() == 0, job.screen
        assert "pipeline: done, prepare, train" in job.screen
    assert metrics(run_dir, "step")[-1][0] > stopped
