"""What `sftdist train` hands to its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.config import compose, write_config
from sftdist.core.errors import ConfigError
from sftdist.core.nodes import Nodes
from sftdist.core.words import word
from sftdist.train import nodes_of, same_run
from sftdist.training.opening import refuse_other_config

DATA = ("model.path=model", "data.train=my.jsonl")
PRESET = """\
# @package _global_
defaults:
  - override /tune: full
  - _self_
train:
  packs_per_step: 8
  epochs: 2
"""


@pytest.fixture(autouse=True)
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preset of the user's own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "conf/exp/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(PRESET)
    return path


@pytest.mark.parametrize("own", [(), (word("run.dir", "here, and/it's=$there"),), ("run.name=mine",)])
@pytest.mark.parametrize("edit", ["optimizer:\n  lr: 3e-5\n", "run:\n  dir: elsewhere\n", "run:\n  name: another\n"])
def test_a_preset_that_is_edited_leads_to_the_same_run(preset: Path, own: tuple[str, ...], edit: str) -> None:
    words = ["+exp=mine", *DATA, *own]
    first = compose(overrides=words)
    run_dir = Path(str(first.run.dir))
    write_config(run_dir, first)
    preset.write_text(PRESET + edit)
    again = compose(overrides=[*words, same_run(first)])
    assert again.run.dir == first.run.dir
    if own == ():
        assert compose(overrides=words).run.dir != first.run.dir, "where it would go without the word"
    if "lr" in edit:
        with pytest.raises(ConfigError, match=r"optimizer.lr: was .*now 3e-05"):
            refuse_other_config(again, run_dir)


def test_without_a_preset_the_ranks_read_no_more_than_the_command_line() -> None:
    """The run's own file would be the base of a `run.dir` without a preset: a key that the line does not name any more
    would keep its earlier value in the ranks."""
    words = [*DATA, "tune.method=full", "train.packs_per_step=8", "train.epochs=2"]
    before = compose(overrides=[*words, "checkpoint.every_steps=7"])
    write_config(Path(str(before.run.dir)), before)
    now = compose(overrides=words)
    assert now.run.dir == before.run.dir
    ranks = compose(overrides=[*words, same_run(now)])
    assert ranks == now
    assert ranks.checkpoint.every_steps != 7


def test_who_trains_together() -> None:
    words = ["+exp=mine", *DATA]
    assert nodes_of(compose(overrides=[*words, "launch.address=n1:29500"])) is None
    several = [*words, "launch.nodes=2", "launch.address=n1:29500", "launch.join_seconds=60"]
    assert nodes_of(compose(overrides=several)) == Nodes(2, "n1:29500", None, 60.0)
    assert nodes_of(compose(overrides=[*several, "launch.node_rank=1"])) == Nodes(2, "n1:29500", 1, 60.0)
