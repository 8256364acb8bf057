"""What `sftdist runs` says of each run: its note, where it began, losses, the gate; and of runs that are gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftdist.commands.runs import main
from sftdist.core import ledger
from sftdist.core.agent import write_status
from sftdist.core.settings import ModelSettings, RunSettings, TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import append_jsonl, write_json, write_manifest
from sftdist.release.gate import Decision, Outcome, Verdict


def make_run(run_dir: Path, note: str = "", model: str | None = None, steps: int = 3) -> Path:
    cfg = TrainConfig(run=RunSettings(name=f"{run_dir.name}-1a2b", note=note), model=ModelSettings(path=model))
    write_config(run_dir, cfg)
    write_status(run_dir, "done", 0, step=steps)
    lines: list[dict[str, Any]] = [{"kind": "train", "step": n, "loss": 2.0 - n / 8} for n in range(1, steps + 1)]
    append_jsonl(run_dir / "metrics.jsonl", [*lines, {"kind": "eval", "step": steps, "eval/loss": 1.75}])
    return run_dir


def enter(run_dir: Path, **changes: Any) -> None:
    found = {"first": 1.875, "last": 1.625, "eval": 1.75}
    entry = {"run": f"{run_dir.name}-1a2b", "dir": f"elsewhere/{run_dir.name}", "note": "from the ledger"}
    more = {"outcome": "done", "parent": None, "step": 3, "losses": found}
    ledger.record(run_dir.parent / ledger.FILE, {**entry, **more, **changes})


def decide(run_dir: Path, split: str, *outcomes: Outcome) -> None:
    verdicts = [Verdict(rule=f"a.x >= {n}", metric="a.x", outcome=one, words="") for n, one in enumerate(outcomes)]
    passed = all(one == Outcome.passed for one in outcomes)
    Decision(passed, [], verdicts, "m", None, None, split, "r").write(run_dir / "report" / split)


def table(capsys: pytest.CaptureFixture[str], folder: Path) -> list[str]:
    assert main([str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def found(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    assert main([str(folder), "--json"]) == 0
    return {one["run"]: one for one in json.loads(capsys.readouterr().out)}


def test_losses_note_and_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decide(make_run(tmp_path / "a", note="lower rate"), "validation", Outcome.passed, Outcome.failed, Outcome.failed)
    decide(make_run(tmp_path / "b"), "validation", Outcome.failed)
    decide(tmp_path / "b", "holdout", Outcome.passed)
    head, *rows = table(capsys, tmp_path)
    assert head.split() == ["run", "state", "step", "code", "age", "loss", "eval/loss", "gate", "name", "note"]
    (a,) = (row for row in rows if row.startswith("a "))
    assert "  1.8750 > 1.6250  1.7500     2 failed" in a
    assert a.endswith("a-1a2b  lower rate")
    assert "passed, holdout" in "".join(rows)
    runs = found(capsys, tmp_path)
    assert runs["a"]["losses"] == {"first": 1.875, "last": 1.625, "eval": 1.75}
    assert (runs["a"]["gate"], runs["b"]["gate"]) == ("2 failed", "passed, holdout")
    assert (runs["a"]["name"], runs["a"]["note"], runs["a"]["starts"]) == ("a-1a2b", "lower rate", 0)


def test_what_a_run_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path / "first")
    (first / "export").mkdir()
    (first / "export" / "config.json").write_text("{}")
    write_manifest(first / "export")
    manifest = json.loads((first / "export" / "manifest.json").read_text())
    write_json(first / "export" / "manifest.json", {**manifest, "step": 3})
    make_run(tmp_path / "second", model=str(first / "export"))
    assert any(row.startswith("second") and "first, step 3" in row for row in table(capsys, tmp_path))
    enter(tmp_path / "third", parent={"release": "bot@v3", "path": "x"})
    make_run(tmp_path / "third", model=str(tmp_path / "gone"))  # the folder is gone, the ledger still knows
    runs = found(capsys, tmp_path)
    assert runs["second"]["parent"]["run"] == "first"
    assert runs["third"]["parent"]["release"] == "bot@v3"
    assert runs["first"]["parent"] is None


def test_a_run_whose_directory_is_gone_is_told_from_the_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(make_run(tmp_path / "kept"), outcome="preempted", step=2)
    enter(tmp_path / "kept")
    enter(make_run(tmp_path / "lost"))
    shutil.rmtree(tmp_path / "lost")
    (row,) = (row for row in table(capsys, tmp_path) if row.startswith("lost"))
    assert row.split()[1:3] == ["done", "3"]
    assert "1.8750 > 1.6250" in row
    assert row.endswith("from the ledger  its directory is gone; this is from the ledger")
    runs = found(capsys, tmp_path)
    assert sorted(runs) == ["kept", "lost"]
    assert (runs["kept"]["starts"], runs["kept"]["reason"]) == (2, "")
    assert found(capsys, tmp_path / "kept")["kept"]["starts"] == 2  # of one run alone, too


def test_a_line_of_an_earlier_ledger_has_no_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter(tmp_path / "old", losses=None)
    assert found(capsys, tmp_path)["old"]["losses"] == {"first": None, "last": None, "eval": None}


def test_half_a_line_and_infinite_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_run(tmp_path / "torn") / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "train", "step": 4, "loss": "nan"}\n{"kind": "train", "lo')
    assert any("1.8750 > nan" in row for row in table(capsys, tmp_path))
    assert found(capsys, tmp_path)["torn"]["losses"] == {"first": 1.875, "last": None, "eval": 1.75}


def test_a_configuration_that_cannot_be_read_costs_a_word_not_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make_run(tmp_path / "edited") / "config.yaml").write_text("a: [1\n")
    (row,) = (row for row in table(capsys, tmp_path) if row.startswith("edited"))
    assert "not readable as YAML" in row
    assert "1.8750 > 1.6250" in row
