"""Schedules of the user's own, and warmup-stable-decay, the shipped one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sftdist.core.errors import ConfigError, TrainingError
from sftdist.core.settings import OptimizerSettings
from sftdist.examples.schedules import wsd
from sftdist.training.optimizer import lr_at
from sftdist.training.schedule import TRIED, rate_of

OWN = """
import itertools

counter = itertools.count()


def line(step, total, warmup, min_ratio, *, slope=1.0):
    return 1.0 - slope * step / total


def negative(step, total, warmup, min_ratio):
    return 1.0 - 2 * step / total


def other(step, total, warmup, min_ratio):
    return next(counter) % 7 / 7


def text(step, total, warmup, min_ratio):
    return "half"


def late(step, total, warmup, min_ratio):
    if step == 3:
        raise KeyError("three")
    return 1.0


def short(step):
    return 1.0
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_schedules.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("own_schedules", None)


def settings(name: str, **args: Any) -> OptimizerSettings:
    return OptimizerSettings(schedule=f"own_schedules:{name}", schedule_args=args, lr=0.5, warmup_ratio=0.1)


def test_the_rate_is_the_share_times_the_peak() -> None:
    rate = rate_of(settings("line", slope=0.5), 100)
    assert [rate(0), rate(50), rate(99)] == [0.5, 0.5 * 0.75, 0.5 * (1 - 0.5 * 0.99)]


def test_ours_is_the_closed_form() -> None:
    ours = OptimizerSettings(schedule="linear", lr=0.5, warmup_ratio=0.1, min_lr_ratio=0.2)
    expected = [lr_at(k, lr=0.5, total=30, warmup=3, schedule="linear", min_ratio=0.2) for k in range(30)]
    assert [rate_of(ours, 30)(k) for k in range(30)] == expected


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("negative", {}, "gave -.* at step .*, required a share of optimizer.lr, 0 or more"),
        ("other", {}, "gave .* and then .* for step 0, required the same each time"),
        ("text", {}, "raised ValueError: could not convert string to float: 'half'"),
        ("late", {}, r"raised KeyError: 'three' \(own_schedules.py, line 25\) at step 3 of 100"),
        ("short", {}, r"required a function \(step, total, warmup, min_ratio, .*too many positional arguments"),
        ("line", {"slop": 1}, "unexpected keyword argument 'slop'"),
    ],
)
def test_one_that_is_none_is_refused_before_the_first_update(name: str, args: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.schedule: (given )?own_schedules:{name}.*{said}"):
        rate_of(settings(name, **args), 100)


def test_one_that_fails_between_the_steps_that_were_tried_ends_the_training_in_words() -> None:
    rate = rate_of(settings("late"), 2 * TRIED)  # every second one was tried
    with pytest.raises(TrainingError, match=r"optimizer.schedule: own_schedules:late raised KeyError: 'three'"):
        rate(3)


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_wsd_warms_up_stays_and_ends_at_the_floor(shape: str) -> None:
    total, warmup, decay = 200, 20, 0.25
    shares = [wsd(step, total, warmup, 0.1, decay=decay, shape=shape) for step in range(total)]
    assert shares[0] == 1 / 21
    assert shares[:warmup] == sorted(shares[:warmup])
    assert set(shares[warmup:150]) == {1.0}
    assert shares[150] < 1.0
    assert shares[150:] == sorted(shares[150:], reverse=True)
    assert shares[-1] == pytest.approx(0.1, abs=1e-12)
    middle = 0.1 + 0.9 * (0.5 if shape == "linear" else 1 - 0.5**0.5)
    assert shares[150 + 24] == pytest.approx(middle)


def test_wsd_of_a_run_of_one_step_and_with_wrong_words() -> None:
    assert wsd(0, 1, 0, 0.1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="required decay above 0 and up to 1"):
        wsd(0, 10, 1, 0.1, shape="cosine")
