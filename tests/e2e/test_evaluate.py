"""`sftdist evaluate` as a user types it, on a small real run: alone, under torchrun, of other models, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftdist.core import agent
from sftdist.core.figures import watched
from sftdist.core.snapshot import read_config, write_config
from sftdist.core.storage import read_json, read_jsonl
from sftdist.evals.identity import identify
from sftdist.evals.looks import looks
from tests.e2e.workshop import SMALL, environment, evaluations, model_folder, rows, sftdist, write_rows
from tests.suites import found
from tests.suites import write_rows as write

pytestmark = pytest.mark.long

RUN = "runs/small"
QUICK = ("evals.adversarial=false", "evals.max_new_tokens=6", "evals.resamples=100")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on three quarters of `my.jsonl`, with its checkpoint and its export."""
    folder = tmp_path_factory.mktemp("shop")
    model_folder(folder / "model")
    write_rows(folder / "my.jsonl", 160)
    words = ("model.path=model", "data.train=my.jsonl", f"run.dir={RUN}", "train.max_steps=2", "eval.every_steps=2")
    more = ("data.val_fraction=0.15", "data.holdout_fraction=0.1", "launch.nproc=1", "precision=fp32")
    done = sftdist(["train", *SMALL, *words, *more], folder, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def evaluate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return sftdist(["evaluate", *QUICK, *words], folder, timeout=600)


def sound(folder: Path, *words: str) -> str:
    done = evaluate(folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def judged(shop: Path) -> str:
    """What the screen says of `evaluate run.dir=R`."""
    return sound(shop, f"run.dir={RUN}", "evals.max_prompts=null")


def test_the_run_against_its_base(shop: Path, judged: str) -> None:
    report, lines = found(shop / RUN)
    export = identify(shop / RUN / "export")
    assert report["tuned"]["sha256"] == export.sha256
    assert report["base"]["path"] == "model"
    assert report["run"]["dir"] == RUN
    (store,) = read_json(shop / RUN / "data-manifest.json")["sources"].values()
    assert sum(json.loads(line)["variant"] is None for line in lines) == store["splits"]["validation"]["rows"]
    for words in ("train.token_f1", "train.loss", "the report: runs/small/report/validation/report.html"):
        assert words in judged, words
    assert not looks(shop / "stores")


def test_its_loss_is_the_one_that_training_said_last(shop: Path, judged: str) -> None:
    """But for the rounding of the export, bf16."""
    last = evaluations(shop / RUN)[-1]
    one = found(shop / RUN)[0]["metrics"]["train.loss"]
    loss = sum(map(float.__mul__, one["tuned"], one["weights"])) / sum(one["weights"])
    assert loss == pytest.approx(last["eval/loss"], rel=3e-3)
    assert loss != pytest.approx(sum(one["tuned"]) / len(one["tuned"]), rel=1e-4)


def test_under_torchrun_it_is_the_same_from_the_cache_and_anew(shop: Path, judged: str) -> None:
    before = found(shop / RUN)
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for cache in ((), ("evals.cache=anew",)):
        command = [*run, "-m", "sftdist.evaluate", *QUICK, f"run.dir={RUN}", "evals.max_prompts=null", *cache]
        done = subprocess.run(command, cwd=shop, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("the report:") == 1, "rank 0 alone speaks"
        assert found(shop / RUN) == before


def test_another_model_has_a_folder_of_its_own(shop: Path, judged: str) -> None:
    before = found(shop / RUN)
    sound(shop, f"run.dir={RUN}", "candidate=model", "evals.probes=[task]")
    split = f"validation-{identify(shop / 'model').sha256[:8]}"
    report, _ = found(shop / RUN, split)
    assert report["tuned"]["path"] == "model"
    assert found(shop / RUN) == before, "the run's own report stays"


def test_each_look_at_the_holdout_is_counted(shop: Path) -> None:
    for count in (1, 2):
        sound(shop, f"run.dir={RUN}", "split=holdout", "evals.probes=[task]")
        report, _ = found(shop / RUN, "holdout")
        assert report["data"]["looks"] == count == len(looks(shop / "stores"))


def test_without_a_run(shop: Path) -> None:
    """A folder and a file; only one model, and no look at a holdout."""
    write(shop / "fresh.jsonl", [{**row, "id": f"fresh-{n}"} for n, row in enumerate(rows(300)[200:230])])
    said = sound(shop, "model.path=model", "data.val=fresh.jsonl", "run.dir=out", "data.store_dir=other")
    report, lines = found(shop / "out")
    assert (report["base"], report["run"], report["tuned"]["path"]) == (None, {}, "model")
    assert {"validation.token_f1", "validation.loss"} <= set(report["metrics"])
    assert sum(json.loads(line)["variant"] is None for line in lines) == 30
    assert "out/report/validation/report.html" in said


def test_fresh_rows_for_a_run_do_not_prepare_its_sources_again(shop: Path) -> None:
    write(shop / "fresh.jsonl", [{**row, "id": f"fresh-{n}"} for n, row in enumerate(rows(300)[200:230])])
    before = sorted(path.name for path in (shop / "stores").glob("train-*"))
    sound(shop, f"run.dir={RUN}", "data.val=fresh.jsonl", "evals.probes=[task]", "candidate=model")
    assert sorted(path.name for path in (shop / "stores").glob("train-*")) == before
    assert len(list((shop / "stores").glob("validation-*"))) == 1


TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/colours.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{question}}}}'
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("words", [(f"run.dir={RUN}",), ("model.path=model", "base=model", "run.dir=bench")])
def test_tasks_of_lm_eval(shop: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run, and of a folder without any data."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sftdist[evals]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(shop / "datasets"))
    asked = [{"question": f"Colour {n}?", "choices": ["red", "green"], "gold": n % 2} for n in range(8)]
    write(shop / "colours.jsonl", asked)
    (shop / "colours.yaml").write_text(TASK.format(folder=shop))
    said = sound(shop, "evals=lm_eval", "tasks=[colours.yaml]", "gate=chat", *words)
    out = next(word.removeprefix("run.dir=") for word in words if word.startswith("run.dir="))
    one = found(shop / out, "benchmarks")[0]["metrics"]["benchmarks.colours.acc"]
    assert (len(one["tuned"]), len(one["base"]), one["higher_is_better"]) == (8, 8, True)
    line = next(line for line in said.splitlines() if line.startswith("benchmarks.colours.acc"))
    assert "[" in line, "with its interval"
    assert "gate: not asked: only benchmarks were measured, and no rule is about one\n" in said
    assert "refused" not in said
    rules = 'gate.rules=[{rule: "benchmarks.colours.acc >= base - 1", min_prompts: 8},"*.token_f1 >= 0.1"]'
    said = sound(shop, "evals=lm_eval", "tasks=[colours.yaml]", rules, *words)
    assert any(line.split()[:2] == ["refused", "*.token_f1"] for line in said.splitlines())
    assert "benchmarks.colours.acc" in said.partition("gate: not passed")[2]


@pytest.mark.parametrize("state", ["failed", "preempted"])
def test_a_watch_ends_as_its_run_has_ended(shop: Path, state: str) -> None:
    """Not at once, for it may be started again; and with its checkpoints scored."""
    run_dir = shop / "runs" / f"watched-{state}"
    shutil.copytree(shop / RUN, run_dir)
    cfg = read_config(run_dir)
    cfg.run.dir, cfg.launch.lost_seconds, cfg.launch.hang_seconds = str(run_dir), 1.0, 1.0
    write_config(run_dir, cfg)
    code = {"failed": 3, "preempted": 75}[state]
    agent.write_status(run_dir, state, code, "rows are gone\nlook there" if state == "failed" else "", step=4)
    done = evaluate(shop, "watch=true", f"run.dir={run_dir}", "watch_seconds=0.2", "evals.probes=[task]")
    assert done.returncode == code, done.stderr
    why = {"failed": "has failed at step 4: rows are gone", "preempted": "was preempted, and did not go on at step 4"}
    assert done.stderr.splitlines()[-1] == (
        f"sftdist evaluate: {run_dir}: the run {why[state]}; "
        "its checkpoints are scored: where it goes on, start the watch again"
    )
    assert [line["step"] for line in watched(run_dir)] == [2]


# --- refused -------------------------------------------------------------------------------------------------


def without_export(run: Path) -> None:
    shutil.rmtree(run / "export")


def without_stores(run: Path) -> None:
    manifest = read_json(run / "data-manifest.json")
    for source in manifest["sources"].values():
        source["store"] = "gone-0123456789abcdef"
    (run / "data-manifest.json").write_text(json.dumps(manifest))


def without_manifest(run: Path) -> None:
    (run / "data-manifest.json").unlink()


def untouched(run: Path) -> None:
    pass


CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], int, str]] = {
    "no export": (without_export, (), 2, "given a run without export, required its exported model"),
    "no stores": (without_stores, (), 2, "given no store of what was trained on"),
    "no manifest": (without_manifest, (), 2, "given a run without data-manifest.json"),
    "no base": (untouched, ("base=nowhere",), 2, "base: given nowhere"),
    "no schema": (untouched, ("evals.schemas={train: no.json}",), 2, "no.json: given a file that cannot be read"),
    "no probe": (untouched, ("evals.probes=[tusk]",), 2, "evals.probes: given tusk"),
    "no rows": (untouched, ("data.max_len=4",), 3, "given no conversation in the validation split"),
    "trained on": (untouched, ("data.val=my.jsonl",), 3, "whose content the model was trained on, in source train"),
    "no task": (untouched, ("evals=lm_eval",), 2, "tasks: given none"),
    "a task that is none": (untouched, ("evals=lm_eval", "tasks=[no.yaml]"), 2, "given no.yaml, required a task file"),
    "a gate that cannot be read": (untouched, ('gate.rules=["x > 1"]',), 2, "gate.rules"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_judged_is_refused_with_a_reason(shop: Path, case: str) -> None:
    plant, words, code, said = CASES[case]
    run = Path("runs") / case.replace(" ", "-")
    shutil.copytree(shop / RUN, shop / run, ignore=shutil.ignore_patterns("checkpoints", "report"))
    plant(shop / run)
    done = evaluate(shop, f"run.dir={run}", *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shop / run / "report").exists()


def test_a_folder_that_is_no_run(shop: Path) -> None:
    done = evaluate(shop, "run.dir=nowhere")
    assert done.returncode == 2
    assert "run.dir: given nowhere, required the directory of a run (it holds config.yaml)" in done.stderr
    done = evaluate(shop)
    assert done.returncode == 2
    assert "evaluate: given no model, required run.dir=R, candidate=FOLDER or model.path=FOLDER" in done.stderr


def test_nothing_is_measured_of_a_row_twice(shop: Path, judged: str) -> None:
    lines: list[dict[str, Any]] = list(read_jsonl(shop / RUN / "report/validation/rows.jsonl"))
    assert len({line["id"] for line in lines}) == len(lines)
