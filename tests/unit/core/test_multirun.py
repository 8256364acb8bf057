"""Sweeps from the command line to the words of each job, and what has become of it in a table."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.sftdist_launchers.torchrun import TorchrunLauncher
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core import config
from sftdist.core.errors import ConfigError
from sftdist.core.multirun import multirun, split_words
from sftdist.core.resolve import literal
from sftdist.core.settings import DataConfig, TrainConfig
from sftdist.core.sweep import FILE, sweep_name
from sftdist.core.words import word
from tests.conftest import ROOT

PROGRAM = (sys.executable, str(ROOT / "tests" / "swept.py"))
DATA = ("+exp=full", "model.path=m", "data.train=x.jsonl")


@pytest.fixture(autouse=True)
def _neutral(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SFTDIST_DATA", "SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a sweep that must not start says."""
    assert config.main(TrainConfig, print, "train", ["-m", *words], makes_runs=True) == 2
    assert not list(Path().rglob(FILE)), "nothing was begun"
    return capsys.readouterr().err


# Words


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=10) | st.text(alphabet="ab'\"\\,{}[]()=: $~+;", max_size=8))
def test_any_text_reaches_a_job_as_it_is(text: str) -> None:
    """As a word, and as what the basic sweeper makes of that word."""
    parser = OverridesParser.create()
    read = parser.parse_override(word("run.note", text))
    (made,) = BasicSweeper.split_arguments([read], None)[0]
    assert read.value() == parser.parse_override(made[0]).value() == literal(text)


@pytest.mark.parametrize("text", ['a b, "c"', "it's", "back\\", "\\'", "${seed}", "x=1,2", "", "null", "1e-4", "{a:1}"])
def test_a_text_is_composed_as_it_is(text: str) -> None:
    assert config.compose(None, [*DATA, word("run.note", text)]).run.note == text


def test_words_for_hydra_need_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DATA, "hydra/launcher=slurm", "hydra.sweep.dir=x", "parallel=2"]
    assert config.main(TrainConfig, print, "train", words) == 2
    error = capsys.readouterr().err
    for key in ("hydra/launcher", "hydra.sweep.dir", "parallel"):
        assert f"{key}: it belongs to a sweep; add -m, or remove it" in error


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("[--partition=gpu]", ["--partition=gpu"]),
        ("[--partition=gpu,--exclude=n1,n2, -t 10:00]", ["--partition=gpu", "--exclude=n1,n2", "-t 10:00"]),
        ("['--comment=a b','--hold']", ["--comment=a b", "--hold"]),
        ("[]", []),
    ],
)
def test_options_for_sbatch_need_no_quotes(text: str, options: list[str]) -> None:
    hydra_words, words = split_words([f"hydra.launcher.options={text}", "seed=1,2"])
    assert words == ["seed=1,2"]
    assert OverridesParser.create().parse_override(hydra_words[0]).value() == options


# What is refused before any job starts


def test_a_typo_in_one_job_names_that_job(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "+exp=quickstart", "optimizer.name=adamw,adamW", "seed=1,2")
    assert "job 2, 3: optimizer.name" in error
    assert "job 0" not in error


def test_a_typo_in_every_job_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "+exp=quickstart", "optimizer.lrr=1", "seed=1,2,3")
    assert error.count("optimizer.lrr") == 1
    assert "job" not in error.replace("jobs", "")


def test_a_typo_beyond_the_first_batch_is_found_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "job 1: zero.stage" in refused(capsys, "+exp=quickstart", "zero.stage=1,9", "hydra.sweeper.max_batch_size=1")


def test_unreadable_words_are_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "+exp=quickstart", "run.note=a=b", "--wrong", "seed=1,2")
    assert "run.note" in error
    assert "--wrong" in error


def test_a_mixture_as_json_is_read_once_its_keys_have_no_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    json_like = '+data.mix={"domain":0.8,"general":0.1,"format":0.1},{"domain":0.6,"general":0.3,"format":0.1}'
    error = refused(capsys, "+exp=quickstart", json_like)
    assert "keys stand without quotes: write" in error
    assert len(swept("+exp=quickstart", "run.note=fine", *shlex.split(error.partition(" write ")[2]))) == 2


def test_one_jobs_configuration_is_no_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--cfg", "job"], ["--cfg=job"], ["-c", "job"]):
        assert "--cfg job and -m do not go together" in refused(capsys, "+exp=quickstart", "seed=1,2", *option)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_parallel_with_or_without_a_plus(plus: str) -> None:
    assert split_words([f"{plus}parallel=2", "seed=1,2"]) == (["hydra.launcher.parallel=2"], ["seed=1,2"])


def test_two_jobs_with_one_run_directory_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """What only `zero`, which names no run, tells apart would be trained twice in one place."""
    error = refused(capsys, "+exp=quickstart", "zero.stage=1,2")
    assert "error: jobs 0 and 1 have one run directory, runs/quickstart-" in error
    assert "jobs 0 and 1" in refused(capsys, "+exp=quickstart", "seed=1,1")
    assert "jobs 0 and 1" in refused(capsys, "+exp=quickstart", "seed=1,2", "run.dir=here")


@pytest.mark.parametrize(
    ("given_word", "said"),
    [
        ("hydra/launcher=basic", "hydra/launcher: given basic, required one that starts whole jobs: torchrun, slurm"),
        ("hydra/launcher=joblib", "hydra/launcher: given joblib, required one that starts whole jobs: torchrun, slurm"),
        ("hydra/launcher=slurm,torchrun", "hydra/launcher: given several values, required one"),
        ("hydra/sweeper=optunah", "hydra/sweeper: given optunah, required one of basic"),
        ("hydra.launcher.parallel=many", "hydra.launcher.parallel: given many, required a whole number"),
        ("parallel=two", "hydra.launcher.parallel: given two, required a whole number"),
        ("+parallel=", "hydra.launcher.parallel: given nothing, required a whole number"),
        ("parallel=1,2", "hydra.launcher.parallel: given several values, required one"),
        ("hydra.launcher.paralel=2", "hydra.launcher.paralel: unknown key; the keys of hydra.launcher are parallel\n"),
        ("+hydra.launcher.foo=1", "hydra.launcher.foo: unknown key; the keys of hydra.launcher are parallel\n"),
        (
            "hydra.launcher.parallel.a=1",
            "hydra.launcher.parallel.a: unknown key; the keys of hydra.launcher are parallel",
        ),
        ("hydra.sweeper.foo=1", "hydra.sweeper.foo: unknown key; the keys of hydra.sweeper are max_batch_size, params"),
        ("hydra/sweeper/sampler=tpe", "hydra/sweeper/sampler: this sweeper has none; add hydra/sweeper=optuna"),
        ("+hydra.sweeper.foo=1", "hydra.sweeper.foo: unknown key"),
        ("parallel=0", "hydra.launcher.parallel: given 0, required at least 1"),
        ("hydra.run.dir=x", "hydra.run.dir: a sweep takes only"),
        ("hydra.sweep.subdir=x", "hydra.sweep.subdir: a sweep takes only"),
        ("launch.nodes=2", "launch.nodes: given 2"),
    ],
)
def test_words_that_no_sweep_can_follow(given_word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "+exp=quickstart", "seed=1,2", "launch.address=h:1", given_word]
    assert config.main(TrainConfig, print, "train", words, makes_runs=True) == 2
    assert said in capsys.readouterr().err


def test_a_sweeper_that_is_not_installed_is_named_with_the_way_to_it() -> None:
    """In a process that sees no plugin of Hydra's but our own."""
    program = (
        f"import sys, hydra_plugins; hydra_plugins.__path__ = [{str(ROOT / 'launch/hydra_plugins')!r}]\n"
        "from sftdist.train import main\n"
        "sys.exit(main())"
    )
    words = ["-m", "+exp=quickstart", "seed=1,2", "hydra/sweeper=optuna"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2
    assert (
        "hydra/sweeper: given optuna, which is not installed; install it: pip install 'sftdist[sweep]'" in ended.stderr
    )


def test_an_interval_is_for_a_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "+exp=quickstart", "optimizer.lr=interval(1e-5,1e-3)")
    assert "BasicSweeper does not support sweep type : INTERVAL_SWEEP" in error


# What each job is given


def swept(*words: str, code: int = 0) -> list[dict[str, Any]]:
    """A sweep of jobs that end at once; its entries, each with the words that its job got."""
    load = partial(config.compose, None, complete=True)
    assert multirun("train", load, words, config.search_path(), makes_runs=True, program=PROGRAM) == code
    file = max(Path().rglob(FILE), key=lambda path: path.stat().st_mtime_ns)
    entries: list[dict[str, Any]] = json.loads(file.read_text())["jobs"]
    return [entry | {"words": _words(file.parent, entry["number"])} for entry in entries]


def _words(folder: Path, number: int) -> list[str]:
    return (folder / "jobs" / f"{number:05}").read_text().split("\0")[:-1]


def test_a_job_per_combination_of_names_lists_and_mappings(capsys: pytest.CaptureFixture[str]) -> None:
    mixes = ("{domain:0.8,general:0.1,format:0.1}", "[0.6,0.3,0.1]", "balanced")
    entries = swept("+exp=quickstart", f"+data.mix={','.join(mixes)}", "optimizer.lr=1e-4,3e-4", "run.note=fine")
    made = [(entry["overrides"][1], entry["overrides"][2]) for entry in entries]
    assert made == [(f"+data.mix={mix}", f"optimizer.lr={lr}") for mix in mixes for lr in ("0.0001", "0.0003")]
    assert len({entry["run_dir"] for entry in entries}) == 6
    (folder,) = Path("runs").glob("sweep-*")
    for entry in entries[:3]:
        cfg = config.compose(None, entry["words"])
        assert cfg.tracking.group == folder.name
        assert entry["run_dir"] == cfg.run.dir == f"runs/quickstart-{config.config_hash(cfg)[:8]}"
        assert cfg.run.dir == config.compose(None, entry["overrides"]).run.dir, "as without a sweep"
    out = capsys.readouterr().out
    assert "6 jobs of sftdist train" in out
    table = out[out.index("job  overrides") :].splitlines()
    assert len(table) == 7
    assert "+exp" not in "".join(table)


def test_quotes_commas_and_spaces_arrive() -> None:
    (entry,) = swept("+exp=lora", "model.path=m", "data.train=x y.jsonl", "run.note='a b, \"c\"'")
    cfg = config.compose(None, entry["words"])
    assert (cfg.run.note, cfg.data.sources["train"].path) == ('a b, "c"', "x y.jsonl")


def test_a_group_of_ones_own_stays() -> None:
    entries = swept("+exp=quickstart", "run.note=fine", "run.name=${tracking.group}", "tracking.group=theirs,mine")
    assert [config.compose(None, entry["words"]).tracking.group for entry in entries] == ["theirs", "mine"]


def test_a_slurm_job_does_not_name_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    entries = swept("+exp=quickstart", "seed=1,2", "run.note=fine")
    assert len({entry["run_dir"] for entry in entries}) == 2
    for entry in entries:
        assert "4711" not in entry["run_dir"]
        assert config.compose(None, entry["words"]).run.name == Path(entry["run_dir"]).name
    assert os.environ["SLURM_JOB_ID"] == "4711"


def test_the_folder_of_the_runs_and_names_of_ones_own() -> None:
    entries = swept("+exp=quickstart", "seed=1,2", "run.note=fine", "hydra.sweep.dir='my runs'", "run.name='s${seed}'")
    assert [entry["run_dir"] for entry in entries] == ["my runs/s1", "my runs/s2"]
    names = {path.name for path in Path("my runs").iterdir()}
    (folder,) = names - {"s1", "s2"}
    assert {path.name for path in Path("my runs", folder).iterdir()} == {".lock", "jobs", "multirun.yaml", FILE}
    assert not Path("runs").exists()
    assert not Path("multirun").exists()


def test_run_directories_of_ones_own() -> None:
    entries = swept("+exp=quickstart", "run.note=fine", "run.dir=a/${seed}", "seed=1,2")
    assert [entry["run_dir"] for entry in entries] == ["a/1", "a/2"]


@pytest.mark.parametrize(
    "params",
    [
        ["+hydra.sweeper.params={seed:'1,2',optimizer.lr:'1e-4,3e-4'}"],
        ["hydra.sweeper.params.seed=1,2", "hydra.sweeper.params.optimizer.lr='1e-4,3e-4'"],
    ],
)
def test_the_sweepers_own_params(params: list[str]) -> None:
    entries = swept("+exp=quickstart", "run.note=fine", *params)
    assert [entry["overrides"][:2] for entry in entries] == [
        [f"seed={seed}", f"optimizer.lr={lr}"] for seed in (1, 2) for lr in ("0.0001", "0.0003")
    ]


def test_a_failed_job_in_a_batch_of_one_does_not_stop_the_rest() -> None:
    notes = "run.note=mute,fail,fine"
    entries = swept(
        "+exp=quickstart", notes, "'run.name=${run.note}'".strip("'"), "hydra.sweeper.max_batch_size=1", code=3
    )
    assert [entry["state"] for entry in entries] == ["failed", "failed", "done"]


def test_a_second_sweep_of_the_same_words_is_the_same_sweep() -> None:
    first = swept("+exp=quickstart", "seed=1,2", "run.note=fine")
    again = swept("+exp=quickstart", "seed=1,2", "run.note=fine", "parallel=2")
    assert len(list(Path("runs").glob("sweep-*"))) == 1
    assert [entry["run_dir"] for entry in again] == [entry["run_dir"] for entry in first]
    assert sweep_name("train", ["seed=1,2"]) != sweep_name("train", ["seed=1,3"]) != sweep_name("prepare", ["seed=1,3"])


def test_two_sweeps_at_once_in_one_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+exp=quickstart", "seed=1,2", "run.note=fine"]
    folder = Path("runs", sweep_name("train", words))
    hold = "import sys,time;from pathlib import Path;from sftdist.core.lock import RunLock\n"
    hold += f"with RunLock(Path({str(folder)!r})): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert config.main(TrainConfig, print, "train", ["-m", *words], makes_runs=True) == 1
        assert f"{folder} is in use by process {holder.pid}" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()


def test_other_commands_have_no_run_directory(capfd: pytest.CaptureFixture[str]) -> None:
    """`prepare -m`: the real command, with no run directory; what it ends with is its job's end."""
    words = ["-m", "+exp=lora", "model.path=m", "data.train=there-is-none.jsonl"]
    assert config.main(DataConfig, print, "prepare", words) == 3
    out = capfd.readouterr().out
    assert "failed  3" in out
    (file,) = Path().rglob(FILE)
    assert [entry["run_dir"] for entry in json.loads(file.read_text())["jobs"]] == [None]


def test_a_launcher_of_ours_is_no_launcher_of_others() -> None:
    launcher = TorchrunLauncher(parallel=1)
    with pytest.raises(ConfigError, match="use it with sftdist COMMAND -m"):
        launcher.setup(hydra_context=None, task_function=print, config=None)


# Optuna's sweeper


def searched(*words: str, code: int = 0) -> list[dict[str, Any]]:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    return swept("+exp=quickstart", "hydra/sweeper=optuna", "hydra.sweeper.direction=minimize", *words, code=code)


def test_optuna_minimises_the_metric() -> None:
    entries = searched("seed=range(1,9)", "run.note=fine", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2")
    best = min(entries, key=lambda entry: entry["metric"])
    (results,) = Path("runs").rglob("optimization_results.yaml")
    assert f"best_value: {best['metric']}" in results.read_text()
    assert [entry["overrides"][0] for entry in entries] == [f"seed={entry['metric']:.0f}" for entry in entries]


def test_what_a_sampler_proposes_twice_is_one_run() -> None:
    entries = searched("seed=choice(1,2)", "run.note=fine", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3")
    assert len(entries) == 6
    assert {entry["state"] for entry in entries} == {"done"}
    assert {(entry["run_dir"], entry["metric"]) for entry in entries} == {
        (entry["run_dir"], float(entry["overrides"][0][-1])) for entry in entries
    }
    assert len({entry["run_dir"] for entry in entries}) <= 2


def test_trials_that_fail_do_not_end_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run.note=choice(fine,fail)", "run.name=${run.note}", "hydra.sweeper.n_trials=8")
    entries = searched(*words, "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=3", code=1)
    assert {entry["state"] for entry in entries} == {"done", "failed"}
    assert len(entries) == 8
    entries = searched("run.note=choice(fail)", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=other", code=1)
    assert "hydra/sweeper: No trials are completed yet" in capsys.readouterr().out


def test_a_proposal_that_cannot_be_composed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    words = ["-m", "+exp=quickstart", "hydra/sweeper=optuna", "zero.stage=choice(9)", "hydra.sweeper.n_trials=1"]
    assert config.main(TrainConfig, print, "train", words, makes_runs=True) == 2
    assert "job 0 (zero.stage=9 +exp=quickstart): zero.stage: given 9" in capsys.readouterr().err
