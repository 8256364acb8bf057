"""What a run was, read from its directory: finished, running, torn, or not begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.errors import ConfigError
from sftdist.core.runfacts import Mixed, run_facts
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import append_jsonl, write_json


def step(number: int, supervised: float, share: float, loss: object = 1.0) -> dict[str, object]:
    shares = {"share/a": share, "share/b": 1 - share}
    figures = {"step_seconds": 2.0, "tokens": 100, "supervised_tokens": supervised, "mfu": None, "rows": "00ff"}
    return {"kind": "train", "step": number, "loss": loss, **figures, **shares}


def test_shares_are_weighed_by_supervised_tokens_and_curves_are_finite(tmp_path: Path) -> None:
    write_config(tmp_path, TrainConfig())
    planned = [{"name": name, "lam": lam, "share": 0.5, "passes": 2.0} for name, lam in (("a", 0.6), ("b", 0.4))]
    write_json(tmp_path / "plan.json", {"fingerprint": "", "steps": 7, "sources": planned})
    lines = [step(1, 30.0, 1.0), step(2, 10.0, 0.0, "nan"), {"kind": "eval", "step": 2, "eval/loss": 0.25}]
    append_jsonl(tmp_path / "metrics.jsonl", lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # torn by a kill
    found = run_facts(tmp_path)
    assert (found.name, found.steps, found.planned, found.seconds, found.tokens) == (tmp_path.name, 2, 7, 4.0, 200)
    assert found.mixture == (Mixed("a", 0.6, 0.75, 2.0), Mixed("b", 0.4, 0.25, 2.0))
    assert found.curves["loss"] == [(1, 1.0)]  # not the one that is no number
    assert found.last("eval/loss") == 0.25
    assert {"rows", "mfu", "step", "kind"} & set(found.curves) == set()
    early = run_facts(tmp_path, until=1)
    assert (early.steps, early.seconds, early.tokens, early.last("eval/loss")) == (1, 2.0, 100, None)
    assert early.mixture == (Mixed("a", 0.6, 1.0, 2.0), Mixed("b", 0.4, 0.0, 2.0))


def test_a_run_that_has_not_begun_and_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the directory of a run"):
        run_facts(tmp_path)
    write_config(tmp_path, TrainConfig())
    found = run_facts(tmp_path)
    assert (found.steps, found.planned, found.seconds, found.mixture, found.curves, found.data) == (
        0,
        None,
        0,
        (),
        {},
        {},
    )
    assert found.last("eval/loss") is None
