"""A watch scores each checkpoint once, in order, also those that come while it works; and says what it cannot score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.figures import BETTER, WATCHED, watched
from sftdist.evals.report import EvalReport, ModelFacts, Scores
from sftdist.evals.watch import WatchedRun, line_of, watch
from sftdist.training.checkpoint_files import directory_name, steps_in
from sftdist.training.retention import Standing
from sftdist.training.tracking import standing
from tests.evaluated import alone

METRIC = "general.exact_match"


def report(value: float) -> EvalReport:
    """Two prompts, one of which weighs three times as much; a metric to lower, and one that describes."""
    metrics = {
        METRIC: Scores(["a", "b"], [value, 0.0], weights=[3.0, 1.0]),
        "all.loss": Scores(["a"], [1.5], higher_is_better=False, high=None),
        "len": Scores(["a"], [7.0], higher_is_better=None, high=None),
    }
    return EvalReport("now", "validation", ModelFacts("folder", "0" * 64), None, {}, {}, metrics)


@dataclass
class Trainer:
    """A run directory into which a checkpoint is written at each look, until there are `last` of them."""

    folder: Path
    last: int
    gone: tuple[int, ...] = ()
    exports: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def over(self) -> bool:
        done = len(self.steps())
        if done < self.last:
            (self.folder / "checkpoints" / directory_name(10 * (done + 1))).mkdir(parents=True)
        return done >= self.last

    def steps(self) -> list[int]:
        return steps_in(self.folder / "checkpoints")

    @contextmanager
    def exported(self, step: int) -> Iterator[Path]:
        if step in self.gone:
            raise CheckpointError("it was pruned")
        self.exports.append(step)
        yield self.folder / f"export-{step}"

    def watched(self, follows: str | None = METRIC) -> int:
        run = WatchedRun(self.folder, self.steps, self.over, self.exported, follows)
        return watch(run, alone(), self.score, seconds=0.0, say=self.said.append)

    def score(self, folder: Path, step: int) -> EvalReport:
        assert folder.name == f"export-{step}"
        return report(step / 100)


def test_each_checkpoint_is_scored_once_and_in_order(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, 4)
    assert trainer.watched() == 4
    assert trainer.exports == [10, 20, 30, 40]
    assert [(line["kind"], line["step"], line[METRIC]) for line in watched(tmp_path)] == [
        ("probe", step, pytest.approx(0.75 * step / 100)) for step in trainer.exports
    ]
    assert trainer.watched() == 0, "a second watch scores nothing again"
    assert trainer.said[0].startswith("step 10: 3 metrics in ")
    assert trainer.said[0].endswith(f", {METRIC} 0.0750")


def test_a_checkpoint_that_is_gone_is_passed_over_with_a_word(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, 3, gone=(20,))
    assert trainer.watched() == 2
    assert [line["step"] for line in watched(tmp_path)] == [10, 30]
    assert "step 20 is passed over: it was pruned" in trainer.said


def test_a_metric_that_is_none_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.best: given general.exact_mach, .* such as general.exact_match"):
        Trainer(tmp_path, 1).watched("general.exact_mach")
    with pytest.raises(ConfigError, match=r"checkpoint.best: given len, required a metric that can be better or worse"):
        Trainer(tmp_path, 1).watched("len")


def test_a_line_holds_weighted_means_and_directions() -> None:
    assert line_of(5, report(float("nan"))) == {
        "kind": "probe",
        "step": 5,
        METRIC: "nan",
        "all.loss": 1.5,
        "len": 7.0,
        BETTER: {METRIC: True, "all.loss": False, "len": None},
    }


def test_the_run_reads_how_its_checkpoints_stand(tmp_path: Path) -> None:
    assert standing(tmp_path, METRIC) == Standing(metric=METRIC)
    Trainer(tmp_path, 3).watched()
    with (tmp_path / WATCHED).open("ab") as torn:
        torn.write(b'{"kind": "probe", "st')
    known = standing(tmp_path, METRIC)
    assert known.values == pytest.approx({10: 0.075, 20: 0.15, 30: 0.225})
    assert (known.metric, known.higher_is_better, known.awaited) == (METRIC, True, False)
    assert standing(tmp_path, "all.loss") == Standing({10: 1.5, 20: 1.5, 30: 1.5}, "all.loss")
    assert standing(tmp_path, "len").values == {}
    assert standing(tmp_path, "eval/loss") == Standing()
