"""`sftdist pipeline`: the stages in order, the first that fails, a stop that reaches the stage."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from sftdist.commands import pipeline
from tests.e2e.jobs import KEYS, Running
from tests.e2e.workshop import metrics, sftdist, status

pytestmark = pytest.mark.timeout(600)
PIPELINE = (sys.executable, "-m", "sftdist.cli", "pipeline")


def test_each_stage_gets_the_words_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    for_all = ["+exp=quickstart", "data.holdout_lock=my.json", "run.note='a  *'", "++seed=1"]
    own = ["name=desk", "++hub_private=false", "lock=write", "base=null"]
    assert pipeline.main(["--plan", *for_all, *own]) == 0
    plan = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(plan) == ["prepare", "train", "evaluate", "publish"]
    (run_name,) = {shlex.split(line)[-1] for line in plan.values()}
    assert re.fullmatch(r"run\.name=quickstart-[0-9a-f]{8}", run_name)
    assert {
        stage: [word for word in shlex.split(line) if word not in (*for_all, run_name)] for stage, line in plan.items()
    } == {
        "prepare": ["lock=write"],
        "train": [],
        "evaluate": ["base=null"],
        "publish": ["name=desk", "++hub_private=false", "base=null"],
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["name=desk", "optimizer.learning_rate=1"],
            "optimizer.learning_rate: unknown key; did you mean optimizer.lr?",
        ),
        (["name=desk", "nmae=desk"], "nmae: unknown key; did you mean name?"),
        ([], "name: given '', required letters"),
        (["name=desk", "split=validation"], "split: given validation, but a release is decided on the holdout"),
        (["name=desk", "gate.rules=[]"], "gate.rules: given none, required at least one"),
    ],
)
def test_what_any_stage_would_refuse_is_refused_before_the_first(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main(["+exp=quickstart", *words]) == 2
    shown = capsys.readouterr()
    assert f"sftdist pipeline: error: {said}" in shown.err
    assert "stage" not in shown.out


def test_the_first_stage_that_fails_ends_it(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    words = [
        "+exp=full",
        "model.path=model",
        "data.train=bad.jsonl",
        "model.tokenizer=nowhere",
        "name=bot",
        "gate=chat",
    ]
    done = sftdist(["pipeline", *words], tmp_path)
    assert done.returncode not in (0, 75), done.stderr
    assert f"sftdist pipeline: prepare failed with exit code {done.returncode}; not run: train" in done.stderr
    assert "stage 1 of" in done.stdout
    assert "stage 2 of" not in done.stdout


@pytest.mark.long
def test_a_stop_reaches_the_stage_and_the_same_line_goes_on(home: Path) -> None:
    command = [*PIPELINE, *KEYS, "name=bot", "gate=chat", "train.max_steps=15", "run.dir=runs/line"]
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
