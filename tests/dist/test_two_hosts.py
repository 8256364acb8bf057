"""Two hosts lose one another in the middle of a step: both say so and end; with the cable back, the same command goes
on as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sftdist.core.failure import read_failure
from sftdist.core.storage import read_json
from tests import stepper
from tests.conftest import ROOT
from tests.e2e.workshop import SMALL, metrics, model_folder, write_rows
from tests.hosts import Pair, TwoHosts

LOST = 4.0
EXACT = ("step", "loss", "grad_norm", "lr", "rows")


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as both:
        yield both


def require_causes(start: Pair, run_dir: Path) -> None:
    """Each side names what it knows, and the file holds one of the two (each has seen the other go)."""
    here, there = start.texts()
    assert "rank 1 on host-1" in here
    assert "the network is cut, the host is down" in here
    assert "no contact with the rendezvous store at 10.77.0.1:29411" in there
    failure = read_failure(run_dir)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.host) == ("lost", 1, "host-1")
    assert failure.step
    assert failure.rows


def test_a_cut_between_two_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    steps, state = 100, stepper.state_file(tmp_path)
    arguments = ["-m", "tests.stepper", str(tmp_path), str(steps), str(LOST)]
    first = hosts.torchrun(arguments, ROOT, tmp_path / "first")
    first.until(lambda: state.exists() and read_json(state)["step"] >= 40)
    hosts.cut()
    assert first.codes(within=LOST + 15) == [1, 1]
    require_causes(first, tmp_path)
    assert 40 <= read_json(state)["step"] < steps
    hosts.mend()
    again = hosts.torchrun(arguments, ROOT, tmp_path / "again")
    assert again.codes(within=100) == [0, 0], again.texts()
    expected = stepper.START
    for _ in range(steps):
        expected = stepper.after(expected, stepper.part(expected, 0) + stepper.part(expected, 1))
    assert read_json(state) == expected


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_across_a_cut_is_bit_equal(hosts: TwoHosts, tmp_path: Path) -> None:
    """The trainer itself. The run that nobody touches is on the same two hosts."""
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl")
    own = ["model.path=model", "data.train=my.jsonl", *SMALL, "train.epochs=8", "zero.stage=2", "precision=fp32"]
    own += ["checkpoint.every_steps=2", f"launch.lost_seconds={LOST}"]
    command = ["-m", "sftdist.train", "+exp=full", *own]
    whole = hosts.torchrun([*command, "run.dir=whole"], tmp_path, tmp_path / "whole-log")
    assert whole.codes(within=200) == [0, 0], whole.texts()
    figures = tmp_path / "cut" / "metrics.jsonl"
    cut = hosts.torchrun([*command, "run.dir=cut"], tmp_path, tmp_path / "cut-log")
    cut.until(lambda: figures.is_file() and figures.read_text().count('"train"') >= 5)
    hosts.cut()
    assert cut.codes(within=LOST + 20) == [1, 1]
    require_causes(cut, tmp_path / "cut")
    reached = len(metrics(tmp_path / "cut", "step"))
    assert 5 <= reached < len(metrics(tmp_path / "whole", "step"))
    hosts.mend()
    again = hosts.torchrun([*command, "run.dir=cut"], tmp_path, tmp_path / "again-log")
    assert again.codes(within=200) == [0, 0], again.texts()
    assert metrics(tmp_path / "cut", *EXACT) == metrics(tmp_path / "whole", *EXACT)
