"""`sftdist compare`: runs in one table, and what keeps their figures from being compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sftdist.commands.compare import main
from sftdist.core import ledger
from sftdist.core.agent import write_status
from sftdist.core.runfacts import DATA
from sftdist.core.settings import DataSettings, OptimizerSettings, SourceSettings, TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import append_jsonl, write_json, write_manifest
from sftdist.evals.identity import identify
from sftdist.evals.report import EvalReport
from sftdist.release.gate import decide
from sftdist.release.rule import read_rules
from tests.evaluations import report, row

RULES = ("a.exact_match >= 0.5",)


def make_run(path: Path, *, lr: float = 1e-4, lam: float = 0.7, steps: int = 4, loss: float = 0.5) -> Path:
    """A run of two sources that was trained, with an export."""
    sources = {"a": SourceSettings(path="a.jsonl", lam=lam), "b": SourceSettings(path="b.jsonl", lam=1 - lam)}
    cfg = TrainConfig(data=DataSettings(sources=sources), optimizer=OptimizerSettings(lr=lr))
    cfg.run.name = path.name
    write_config(path, cfg)
    write_status(path, "done", 0, step=steps)
    mixed = [{"name": name, "lam": one.lam, "share": one.lam, "passes": 1.0} for name, one in sources.items()]
    write_json(path / "plan.json", {"fingerprint": "", "steps": 4, "sources": mixed})
    figures = {"step_seconds": 15.0, "tokens": 100, "supervised_tokens": 50.0, "share/a": 0.6, "share/b": 0.4}
    append_jsonl(path / "metrics.jsonl", ({"kind": "train", "step": step + 1, **figures} for step in range(steps)))
    append_jsonl(path / "metrics.jsonl", [{"kind": "eval", "step": steps, "eval/loss": loss}])
    counts = {"train": {"rows": 100, "targets": 5000.0}}
    own = {"licence": None, "origin": None, "contract": None, "guideline": None, "made_of": {}, "splits": counts}
    write_json(path / DATA, {"sources": {name: {"key": f"key of {name}", **own} for name in sources}})
    made = {"git": {"commit": "c" * 40, "dirty": False}, "versions": {"torch": "2.13"}, "hardware": {"ranks": 2}}
    ledger.record(path.parent / ledger.FILE, {"dir": str(path), **made})
    (path / "export").mkdir()
    (path / "export" / "model.safetensors").write_bytes(path.name.encode())
    (path / "export" / "config.json").write_text("{}")
    write_manifest(path / "export")
    return path


def evaluate(run: Path, right: int, *, of: int = 40, rules: tuple[Any, ...] = RULES, **changes: Any) -> EvalReport:
    """The report of a run whose tuned model has so many of `of` answers right, and the gate's preview."""
    rows = [row("a", number, 1.0, float(number < right)) for number in range(of)]
    made = report(rows, tuned=identify(run / "export"), **changes)
    # What stands in the fixture for a page that shows all is none of this run's prompts.
    made = replace(made, metrics={name: scores for name, scores in made.metrics.items() if name.startswith("a.")})
    folder = run / "report" / "validation"
    made.write(folder)
    if rules:
        read, _ = read_rules(rules, min_prompts=10, confidence=0.95)
        decide(read, made, model_sha256=made.tuned.sha256).write(folder)
    return made


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    runs = [make_run(tmp_path / "low"), make_run(tmp_path / "high", lr=3e-4, lam=0.6, loss=0.4)]
    evaluate(runs[0], 8)
    evaluate(runs[1], 36)
    return runs


def said(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> str:
    assert main([str(word) for word in words]) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def entries(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    return dict(json.loads(said(capsys, *words, "--json")))


def test_a_line_for_each_run(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    head, low, high, *rest = said(capsys, *two).splitlines()
    assert head.split("  ")[0] == "run"
    assert "mix a/b" in head
    assert "a.exact_match" in head  # what the gate is about
    assert "a.rouge_l" not in head
    assert low.split()[:4] == ["low", "done", "4", "0:01:00"]
    assert "0.70/0.30 (became 0.60/0.40)" in low
    assert "  0.60/0.40   " in high  # as asked: said once
    assert "0.200 [0.09, 0.36]" in low  # Clopper and Pearson for 8 of 40: 0.091 to 0.356
    assert "0.900 [0.76, 0.97]" in high
    assert low.split("]")[1].split("  ")[1:] == ["1 failed", "optimizer.lr=0.0001"]
    assert high.split("]")[1].split() == ["passed", "optimizer.lr=0.0003"]
    assert rest == []


def test_json_has_what_the_table_has(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys, *two)
    low, high = found["runs"]
    assert (low["run"], low["steps"], low["planned"], low["seconds"], low["tokens"]) == ("low", 4, 4, 60.0, 400)
    assert low["mixture"]["a"] == {"asked": 0.7, "realised": pytest.approx(0.6)}
    assert high["eval/loss"] == 0.4
    assert high["metrics"]["a.exact_match"]["value"] == 0.9
    assert high["metrics"]["a.exact_match"]["change"]["value"] == pytest.approx(-0.1)
    assert low["gate"] == {"state": "1 failed", "passed": False, "stopping": ["a.exact_match >= 0.5"]}
    assert high["gate"] == {"state": "passed", "passed": True, "stopping": []}
    assert found["differs"] == {"optimizer.lr": {"low": 0.0001, "high": 0.0003}}
    assert found["notes"] == []


def test_other_code_and_other_data_are_told(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    edited = {"git": {"commit": "d" * 40, "dirty": True}, "versions": {"torch": "2.13"}, "hardware": {"ranks": 1}}
    ledger.record(two[1].parent / ledger.FILE, {"dir": str(two[1]), **edited})
    manifest = json.loads((two[1] / DATA).read_text())
    manifest["sources"]["a"] |= {"key": "another", "splits": {"train": {"rows": 90, "targets": 4000.0}}}
    write_json(two[1] / DATA, manifest)
    found = entries(capsys, *two)
    assert found["code"] == {
        "commit": {"low": "c" * 12, "high": f"{'d' * 12} with changes that are in no commit"},
        "ranks": {"low": 2, "high": 1},
    }
    assert found["data"] == {
        "a, train": {"low": "100 rows with 5,000 supervised tokens", "high": "90 rows with 4,000 supervised tokens"},
        "a, store": {"low": "key of a", "high": "another"},
    }
    shown = said(capsys, *two)
    assert "  a, train: low 100 rows with 5,000 supervised tokens, high 90 rows" in shown
    assert "  ranks: low 2, high 1" in shown


def test_what_is_not_known_of_code_and_data_is_said(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (two[0].parent / ledger.FILE).unlink()
    (two[0] / DATA).unlink()
    notes = entries(capsys, *two)["notes"]
    assert "low: no data manifest, so its data are not known" in notes
    assert any(note.startswith("low, high: no line in the ledger") for note in notes)


def test_the_page_has_both_curves_and_what_differs(two: list[Path], tmp_path: Path) -> None:
    assert main([*map(str, two), "--html", str(tmp_path / "compare.html")]) == 0
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "optimizer.lr" in page
    assert page.count("low") > 2
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("lam", "said"),
    [(0.7, "<p>Nothing: the same configuration"), (0.6, "<p>Nothing but the mixture: otherwise the same")],
)
def test_runs_that_differ_in_nothing_else_than_the_mixture_are_not_the_same(
    tmp_path: Path, lam: float, said: str
) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "other", lam=lam)]
    assert main([*map(str, runs), "--html", str(tmp_path / "compare.html")]) == 0
    assert said in (tmp_path / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "first"),
    [("a.exact_match", "high"), ("a.rouge_l", "high"), ("eval/loss", "high"), ("label", "high"), ("steps", "low")],
)
def test_the_best_comes_first(two: list[Path], capsys: pytest.CaptureFixture[str], key: str, first: str) -> None:
    assert entries(capsys, *two, "--sort", key)["runs"][0]["run"] == first


def test_where_lower_is_better_the_lowest_comes_first(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for run in two:
        path = run / "report" / "validation" / "report.json"
        made = EvalReport.read(path)
        lower = {name: replace(scores, higher_is_better=False) for name, scores in made.metrics.items()}
        replace(made, metrics=lower).write(path.parent)
    assert entries(capsys, *two, "--sort", "a.exact_match")["runs"][0]["run"] == "low"


def test_a_run_without_the_figure_comes_last(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    bare = make_run(two[0].parent / "bare")
    found = entries(capsys, bare, *two, "--sort", "a.exact_match")
    assert [run["run"] for run in found["runs"]] == ["high", "low", "bare"]
    assert found["notes"] == [f"bare: not evaluated: sftdist evaluate run.dir={bare}"]


def test_metrics_by_pattern(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    head = said(capsys, *two, "--metric", "*.rouge_l", "--metric", "a.length_ratio").splitlines()[0]
    assert "a.rouge_l" in head
    assert "a.length_ratio" in head
    assert "a.exact_match" not in head


def test_without_a_gate_the_main_metric_of_each_source_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        evaluate(run, 20, rules=())
    found = entries(capsys, *runs)
    assert [run["gate"]["state"] for run in found["runs"]] == ["no gate"] * 2
    assert len(found["runs"][0]["metrics"]) == 1


# --- figures that do not compare ----------------------------------------------------------------------


def test_other_prompts_are_told(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(two[1], 30, of=60)
    notes = entries(capsys, *two)["notes"]
    assert notes == ["a.exact_match: high had other prompts than low; these figures do not compare"]


def test_prompts_of_one_name_that_say_something_else_are_told(
    two: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for run, sha in zip(two, ("1", "2"), strict=True):
        evaluate(run, 20, asked={f"a/{number}": sha for number in range(40)})
    assert "other prompts" in entries(capsys, *two)["notes"][0]


def test_another_decoding_is_told(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(two[1], 20, decoding={"engine": "hf", "dtype": "bf16", "max_new_tokens": 256, "greedy": True})
    assert entries(capsys, *two)["notes"] == ["the models answered with different dtype: low fp32, high bf16"]


def test_the_report_of_another_export_is_not_shown(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (two[0] / "export" / "model.safetensors").write_bytes(b"another model")
    write_manifest(two[0] / "export")
    low = entries(capsys, *two)["runs"][0]
    assert low["metrics"] == {}
    assert low["model"] is None
    assert low["fault"] == "its report is of another export: evaluate it again"


def test_the_gate_of_another_report_is_not_shown(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(two[1], 2, rules=())  # the decision that is there says that the one before had passed
    high = entries(capsys, *two)["runs"][1]
    assert high["gate"] == {"state": "of another report", "passed": None, "stopping": []}


def test_the_holdout_is_not_read(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = two[0] / "report" / "validation"
    folder.rename(folder.parent / "holdout")
    assert entries(capsys, *two)["runs"][0]["metrics"] == {}


# --- sweeps -------------------------------------------------------------------------------------------


def make_sweep(folder: Path, run_dirs: list[str | None]) -> Path:
    jobs = [
        {"number": number, "overrides": [f"x={number}"], "run_dir": run_dir, "state": "waiting"}
        for number, run_dir in enumerate(run_dirs)
    ]
    folder.mkdir()
    write_json(folder / "sweep.json", {"command": "train", "jobs": jobs})
    return folder


def test_the_runs_of_a_sweep(
    two: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = two[0].parent
    sweep = make_sweep(parent / "sweep-0", [str(two[0]), "elsewhere/high", "elsewhere/none", None])
    found = entries(capsys, "--sweep", sweep)
    assert [run["run"] for run in found["runs"]] == ["low", "high"]  # one of them found beside the sweep
    assert found["notes"] == [f"job {number} (x={number}): waiting, it has no run yet" for number in (2, 3)]
    monkeypatch.chdir(parent)
    assert len(entries(capsys, "--sweep", "sweep-0")["runs"]) == 2


# --- what was given -----------------------------------------------------------------------------------


def test_errors_say_what_to_give(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, high = two
    for words, parts in (
        ([], ["two run directories or more", "--sweep DIR"]),
        ([low], ["given one run", "required two"]),
        ([low, high, "--sweep", tmp_path], ["or both"]),
        ([low, tmp_path / "low"], ["given one run twice"]),
        ([low, tmp_path, tmp_path / "no"], [f"{tmp_path}/config.yaml", f"{tmp_path}/no/config.yaml"]),
        (["--sweep", tmp_path], ["given no sweep.json there"]),
        (["--sweep", make_sweep(tmp_path / "s", ["gone"])], ["none of its jobs has a run yet"]),
        ([low, high, "--metric", "a.exact"], ["--metric a.exact: no such metric", "a.exact_match"]),
        ([low, high, "--sort", "a.exact"], ["--sort a.exact", "eval/loss", "a.exact_match"]),
    ):
        error = said(capsys, *map(str, words), code=2)
        assert all(part in error for part in parts), (words, error)


def test_a_damaged_report_and_a_wrong_confidence_are_refused(
    two: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(two[0] / "report" / "validation" / "report.json", {"format": 99})
    assert "report.json: given no report" in said(capsys, *two, code=2)
    with pytest.raises(SystemExit):
        main([*map(str, two), "--confidence", "95"])
    assert "required a number between 0 and 1" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / folder / "same") for folder in ("one", "two")]
    assert [run["run"] for run in entries(capsys, *runs)["runs"]] == [str(run) for run in runs]


def test_a_run_that_has_not_begun(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    new = two[0].parent / "new"
    write_config(new, TrainConfig())
    line = said(capsys, *two, new).splitlines()[3]
    assert line.split()[:4] == ["new", "not", "started", "0"]
