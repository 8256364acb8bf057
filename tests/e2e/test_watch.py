"""A watch beside a real training run: every checkpoint is exported, asked, scored, logged and forgotten again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftdist.core.errors import StartupError
from sftdist.core.figures import REPORTS, watched
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import write_text
from sftdist.data.message import Message
from sftdist.evals.generate import ask
from sftdist.evals.identity import identify
from sftdist.evals.prompts import Prompt
from sftdist.evals.report import EvalReport, Scores
from sftdist.training.retention import Keep, best_step, to_prune
from sftdist.training.tracking import standing
from sftdist.watch import Watched, clear_export, export_folder, exported, watch_run
from tests.e2e.workshop import SMALL, sftdist
from tests.evaluated import alone
from tests.wandb_runs import history, read, runs_of, within

METRIC = "test.middle"
RUN = Path("runs/watched")
PROMPTS = [Prompt(f"test/{number}", "test", (Message("user", f"What colour is thing {number}?"),)) for number in (1, 2)]


def score(folder: Path, step: int) -> EvalReport:
    """Real answers of the exported model; a score that is best in the middle of the run."""
    said = ask(folder, PROMPTS, max_new_tokens=4)
    metrics = {
        METRIC: Scores([prompt.id for prompt in PROMPTS], [float(step == 4), 0.5]),
        "test.tokens": Scores(["test/1"], [float(said[0].tokens)], higher_is_better=None, high=None),
    }
    return EvalReport("now", "validation", identify(folder), None, {}, {}, metrics)


@pytest.mark.long
def test_checkpoints_are_scored_while_the_run_trains(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    words = [
        *(word for word in SMALL if not word.startswith("tracking")),
        "model.path=model",
        "data.train=my.jsonl",
        f"run.dir={RUN}",
        "train.max_steps=6",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=3",
        "checkpoint.keep_best=true",
        f"checkpoint.best={METRIC}",
        "tracking.wandb=offline",
        "launch.nproc=1",
    ]
    command = [sys.executable, "-m", "sftdist.cli", "train", *words]
    said: list[str] = []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as training:
        assert within(120.0, (RUN / "config.yaml").is_file)
        scored = watch_run(RUN, alone(), score, seconds=0.2, say=said.append)
        assert training.wait() == 0
    assert (scored, [line["step"] for line in watched(RUN)]) == (Watched(3), [2, 4, 6])
    assert len(said) == 3, said
    assert [path.name for path in RUN.glob("export*")] == ["export"], "what a watch exports is removed again"
    found = [item for folder in runs_of(RUN) for item in history(read(folder)) if f"probe/{METRIC}" in item]
    assert [(item["probe/step"], item[f"probe/{METRIC}"]) for item in found] == [(2, 0.25), (4, 0.75), (6, 0.25)]
    assert best_step([2, 4, 6], standing(RUN, METRIC)) == 4
    assert to_prune([2, 4, 6, 8], 8, Keep(1), standing(RUN, METRIC)) == [2, 6]
    done = sftdist(["export", f"run.dir={RUN}", "step=best"], home)
    assert done.returncode == 0, done.stderr
    assert identify(RUN / "export-step-00000004").sha256 != identify(RUN / "export").sha256
    # a second watch has nothing to do, leaves the user's export alone, and there is one at a time
    assert watch_run(RUN, alone(), score, seconds=0.2, say=said.append) == Watched(0)
    assert (RUN / "export-step-00000004").is_dir()


def test_one_watch_at_a_time(tmp_path: Path) -> None:
    """Also: the run sees that it is watched, and by a lock that ends with the process."""
    lock = f"RunLock(Path({str(tmp_path / REPORTS)!r}))"
    code = f"from pathlib import Path\nfrom sftdist.core.lock import RunLock\nwith {lock}: print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert standing(tmp_path, METRIC).awaited
        write_config(tmp_path, TrainConfig())
        with pytest.raises(StartupError, match=r"is in use by process .* One watch at a time"):
            watch_run(tmp_path, alone(), score, seconds=0.0, say=print)
        other.communicate(b"\n")
    assert not standing(tmp_path, METRIC).awaited


def test_what_a_killed_watch_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    own, users = export_folder(tmp_path, 2), export_folder(tmp_path, 4)
    for folder in (own, users, tmp_path / REPORTS):
        folder.mkdir()
    clear_export(tmp_path)
    assert own.is_dir()
    write_text(tmp_path / REPORTS / "watched-export", own.name)
    with exported(tmp_path, 4) as folder:
        assert folder == users
    clear_export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export-step-00000004", REPORTS]
