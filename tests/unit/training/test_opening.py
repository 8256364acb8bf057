"""Opening a run directory: what was refused once stays refused, and the reason stays on file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from sftdist.core import agent
from sftdist.core.config import compose
from sftdist.core.errors import DataError
from sftdist.data.pipeline import Prepared
from sftdist.training.opening import NotRestarted, open_run


def never() -> Prepared:
    raise AssertionError("the data is not looked at")


def unreadable() -> Prepared:
    raise DataError("no row can be read")


@pytest.mark.parametrize(("code", "retry"), [(1, False), (3, True)])
def test_a_refused_restart_keeps_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, retry: bool
) -> None:
    """A second refusal that overwrote the first would let the third start train over a non-finite stop."""
    agent.write_status(tmp_path, "failed", code, "why it ended", retry=retry)
    before = agent.read_status(tmp_path)
    cfg = compose("full", ["model.path=x", "data.train=y"])
    for attempt in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with ExitStack() as stack, pytest.raises(NotRestarted, match="why it ended"):
            open_run(cfg, tmp_path, stack, never)
        assert agent.read_status(tmp_path) == before


def test_bad_data_stands_in_the_status_with_its_code(tmp_path: Path) -> None:
    cfg = compose("full", ["model.path=x", "data.train=y"])
    with ExitStack() as stack, pytest.raises(DataError):
        open_run(cfg, tmp_path, stack, unreadable)
    status = agent.read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["code"], status["reason"]) == ("failed", 3, "no row can be read")
