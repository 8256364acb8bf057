from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from sftdist.core import config
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.mix import lambdas_of
from sftdist.core.settings import InspectConfig, PlanConfig, Precision, PrepareConfig, TrainConfig
from sftdist.core.typed import ANY_NAME, options
from tests.conftest import ROOT

PRESETS = ["chat_small", "full", "llama8b", "llama8b_lora", "lora", "qlora", "quickstart"]
OWN_DATA = ["model.path=some/model", "data.train=my.jsonl"]
HYDRA_SPEAK = r"full_key|Config search path|DictConfig|ListConfig|object_type|[Cc]ompos|[Ii]nterpolation|LexerNoViable"
GROUPS = [
    (folder.name, file.stem)
    for folder in sorted((ROOT / "conf").iterdir())
    for file in sorted(folder.glob("*.yaml"))
    if folder.name not in ("exp", "mix")
]


@pytest.fixture(autouse=True)
def _neutral(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SFTDIST_DATA", "SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def issues_of(*overrides: str, exp: str | None = "quickstart") -> list[str]:
    """What the command line would print, a line each; empty where it would run."""
    words = [f"+exp={exp}", *overrides] if exp else overrides
    try:
        compose(None, words, complete=True)
    except ConfigError as error:
        return str(error).splitlines()
    return []


# Every file in conf


def test_all_presets_are_known_here() -> None:
    assert config.presets() == PRESETS
    assert sorted(path.stem for path in (ROOT / "conf/exp").glob("*.yaml")) == PRESETS


@pytest.mark.parametrize("exp", PRESETS)
def test_every_preset_composes_and_is_complete(exp: str) -> None:
    cfg = compose(exp, OWN_DATA if exp in ("full", "lora", "qlora") else [])
    assert config.check(cfg) == []
    assert cfg.exp == exp
    assert cfg.train.packs_per_step is not None
    assert cfg.run.dir == f"runs/{cfg.run.name}"
    again = config.from_dict(yaml.safe_load(config.to_yaml(cfg)))
    assert again == cfg
    assert config.config_hash(again) == config.config_hash(cfg)


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_group_file_can_be_chosen_over_a_preset(group: str, name: str) -> None:
    cfg = compose(None, ["+exp=full", f"{group}={name}"])
    values = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
    chosen = config.to_dict(cfg)[group]
    assert {key: chosen[key] for key in values if key != "shape"} == {k: v for k, v in values.items() if k != "shape"}
    assert chosen.get("shape") == values.get("shape")


@pytest.mark.parametrize("name", ["domain_heavy", "balanced"])
def test_every_mix_file_gives_lambdas(name: str) -> None:
    cfg = compose("quickstart", [f"data.mix={name}"])
    lambdas = {source: settings.lam for source, settings in cfg.data.sources.items()}
    given = yaml.safe_load((ROOT / f"conf/mix/{name}.yaml").read_text())
    assert lambdas == pytest.approx({source: lam / sum(given.values()) for source, lam in given.items()})


def test_the_issues_own_configurations() -> None:
    full, lora, small = (compose(name, ["data.dir=/data"]) for name in ("llama8b", "llama8b_lora", "chat_small"))
    assert (full.precision, full.zero.stage, full.train.pack_tokens, full.train.epochs) == (Precision.bf16, 3, 8192, 2)
    assert (full.optimizer.lr, full.optimizer.schedule, full.model.activation_checkpointing) == (2e-5, "cosine", True)
    assert list(full.data.sources) == ["domain", "general", "format"]
    assert full.model.shape is not None
    assert (full.model.shape["hidden_size"], full.model.shape["num_key_value_heads"]) == (4096, 8)
    assert (lora.tune.method, lora.tune.r, lora.tune.alpha, lora.tune.target) == ("lora", 16, 32, "all-linear")
    assert (lora.zero.stage, lora.model.shape) == (2, full.model.shape)
    assert small.model.shape is not None
    assert (small.model.shape["hidden_size"], small.model.vocabulary) == (384, 8192)
    assert small.data.sources["domain"].path == "/data/domain_gsm8k.messages.jsonl"


def test_data_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTDIST_DATA", "/elsewhere")
    cfg = compose("llama8b", ["data.sources.domain.path=[a.jsonl,/b.jsonl,hub:c/d]"])
    assert cfg.data.sources["domain"].path == ["/elsewhere/a.jsonl", "/b.jsonl", "hub:c/d"]
    assert compose("lora", OWN_DATA).data.sources["train"].path == "my.jsonl", "a user's file is where the user is"


# Typos


ALL_KEYS = [key for key, _, _ in options(TrainConfig)]


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_typo_in_any_key_is_refused_with_the_key(plus: str) -> None:
    typos = {}
    for key in (key.replace(ANY_NAME, "domain") for key in ALL_KEYS):
        section, dot, leaf = key.rpartition(".")
        typos[f"{section}{dot}{leaf[:-1]}z{leaf[-1]}" if len(leaf) > 2 else f"{key}s"] = key
    with pytest.raises(ConfigError) as caught:
        compose("quickstart", [f"{plus}{typo}=1" for typo in typos])
    expected = {f"{typo}: unknown key; did you mean {key}?" for typo, key in typos.items()}
    assert set(caught.value.issues) == expected


@pytest.mark.parametrize("section", ["data", "data.sources.domain", "train", "zero", "tracking"])
def test_a_typo_in_a_users_yaml_is_refused(tmp_path: Path, section: str) -> None:
    folder = tmp_path / "conf" / "exp"
    folder.mkdir(parents=True)
    body: dict[str, object] = {"typpo": 1}
    for name in reversed(section.split(".")):
        body = {name: body}
    text = "# @package _global_\ndefaults: [quickstart, _self_]\n" + yaml.safe_dump(body)
    (folder / "mine.yaml").write_text(text)
    (issue,) = issues_of(exp="mine")
    assert issue.startswith(f"{section}.typpo: unknown key")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("learning_rate=1", "optimizer.lr"),
        ("train.gradient_accumulation_steps=1", "train.packs_per_step"),
        ("lr=1", "optimizer.lr"),
        ("epochs=1", "train.epochs"),
        ("train.lr=1", "optimizer.lr"),
        ("data.packs_per_step=1", "train.packs_per_step"),
        ("mix=balanced", "data.mix"),
    ],
)
def test_the_nearest_name_is_the_meant_one(given: str, meant: str) -> None:
    (issue,) = issues_of(given)
    assert f"did you mean {meant}?" in issue


def test_hydras_advice_to_add_a_plus_never_appears() -> None:
    for word in ("optimizer.learning_rate=1", "nonsense=1", "a.b.c=1", "model.path.x=1", "~train.nothing", "zero=7"):
        text = "\n".join(issues_of(word))
        assert text
        assert "+" not in text.replace("+exp", "")


# Values


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("precision=bf61", ["precision", "'bf61'", "one of bf16, fp16, fp32", "did you mean bf16?"]),
        ("tune.method=qlorra", ["tune.method", "'qlorra'", "one of full, lora, qlora", "did you mean qlora?"]),
        ("tune.double_quant=false", ["tune.double_quant", "given false", "tune.method=qlora"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "a number"]),
        ("optimizer.lr=nan", ["optimizer.lr", "nan", "a number"]),
        ("optimizer.lr=0", ["optimizer.lr", "above 0"]),
        ("train.epochs=true", ["train.epochs", "true", "a number"]),
        ("train.max_steps=1.5", ["train.max_steps", "1.5", "whole number"]),
        ("train.packing=1", ["train.packing", "1", "true or false"]),
        ("data.sources=3", ["data.sources", "3", "section"]),
        ("run=somewhere", ["run", "'somewhere'", "run.dir"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "two numbers"]),
        ("optimizer.betas=[0.9,x]", ["optimizer.betas[1]", "'x'", "a number"]),
        ("tracking.wandb=ofline", ["tracking.wandb", "'ofline'", "offline, online, disabled"]),
        ("tracking.tags=[a,[b]]", ["tracking.tags[1]", "text"]),
        ("zero.stage=4", ["zero.stage", "4", "0, 1, 2 or 3"]),
        ("model.recompute_layers=2", ["model.recompute_layers", "given 2", "model.activation_checkpointing=true"]),
        ("data.val_fraction=1", ["data.val_fraction", "below 1"]),
        ("train.pack_tokens=512", ["train.pack_tokens", "512", "data.max_len=1024", "data.max_len=512"]),
        ("train.tokens_per_step=4096", ["packs_per_step and train.tokens_per_step", "exactly one"]),
        ("train.packs_per_step=null", ["given by none", "exactly one"]),
        ("train.epochs=null", ["epochs", "max_steps"]),
        ("model.path=null", ["model.path", "model.init=random"]),
        ("model.vocabulary=4096", ["model.vocabulary", "model.init=random"]),
        ("data.sources.domain.lam=null", ["general, format have a lam and domain have none"]),
        ("data.sources.domain.lam=-1", ["lambda of domain is -1", "at least 0"]),
        ("data.sources.mine.lam=1", ["data.sources.mine.path", "null", "hub:NAME"]),
        ("data.temperature=2", ["data.temperature", "remove it"]),
        ("config_version=2", ["config_version", "given 2", "reads 1"]),
        ("run.dir=/x/lr=1e-4", ["""'run.dir="/x/lr=1e-4"'"""]),
        ("data.train=a.jsonl,b.jsonl", ["data.train", "several values", "'data.train=[a.jsonl,b.jsonl]'"]),
        ("model=/my/model", ["conf/model", "model.path="]),
        ("zero=5", ["zero=5", "0, 1, 2, 3"]),
        ("data.mix=domain_heavi", ["domain_heavi", "did you mean domain_heavy?"]),
        ("run.note=${nothing}", ["nothing"]),
        ("train.max_steps=???", ["train.max_steps", "must be set"]),
        ("justaword", ["justaword", "key=value"]),
        ("--verbose", ["--verbose", "--help"]),
    ],
)
def test_a_wrong_value_says_what_was_given_and_what_is_required(word: str, parts: list[str]) -> None:
    lines = issues_of(word)
    assert any(all(part in line for part in parts) for line in lines), lines
    assert len(lines) <= 2


def test_all_issues_at_once_in_ten_lines() -> None:
    words = ["precision=bf61", "+optimizer.learning_rate=1", "zero.stage=9", "data.mix=[1,2]", "train.max_step=3"]
    assert len(issues_of(*words)) == 5
    many = [f"wrong_key_{number}=1" for number in range(30)]
    lines = issues_of(*words, *many)
    assert len(lines) == 10
    assert lines[-1] == "... and 26 more"


def test_without_a_preset_the_presets_are_listed() -> None:
    lines = issues_of(exp=None)
    assert lines[0].startswith("exp: none is given")
    assert "llama8b_lora" in lines[0]
    step = ["train.packs_per_step=4", "train.epochs=1"]
    assert issues_of(*OWN_DATA, *step, exp=None) == [], "a preset is not needed"


def test_inspect_needs_neither_a_preset_nor_training_settings() -> None:
    cfg = compose(None, [*OWN_DATA, "output=jsonl", "limit=3"], InspectConfig, complete=True)
    assert (cfg.limit, cfg.output, cfg.train.packs_per_step) == (3, "jsonl", None)
    with pytest.raises(ConfigError, match=r"output.*terminal, html, jsonl"):
        compose(None, [*OWN_DATA, "output=pdf"], InspectConfig)
    with pytest.raises(ConfigError, match="limit: unknown key"):
        compose("lora", [*OWN_DATA, "limit=3"])


def test_a_lock_is_written_to_a_file_that_is_named() -> None:
    with pytest.raises(ConfigError, match=r"lock: given '?frob'?, required one of write, extend, withdraw"):
        compose(None, [*OWN_DATA, "data.holdout_lock=l.json", "lock=frob"], PrepareConfig)
    with pytest.raises(ConfigError, match=r"lock: given '?write'? without data.holdout_lock; say which file"):
        compose(None, [*OWN_DATA, "lock=write"], PrepareConfig)
    assert compose(None, [*OWN_DATA, "data.holdout_lock=l.json", "lock=write"], PrepareConfig).lock == "write"
    with pytest.raises(ConfigError, match="lock: unknown key"):
        compose("lora", [*OWN_DATA, "lock=write"])


def test_in_memory_data_may_come_later() -> None:
    cfg = compose("lora", ["optimizer.lr=1e-5"])
    assert cfg.optimizer.lr == 1e-5
    assert len(config.check(cfg)) == 3
    assert config.check(cfg, complete=False) == []


def test_further_rules_are_reported_with_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        compose("quickstart", ["zero.stage=9"], checks=[lambda cfg: [f"a rule about {cfg.exp}"]])
    assert caught.value.issues[1:] == ["a rule about quickstart"]


# The mixture


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("mix", ["{domain:6,general:3,format:1}", "[0.6,0.3,0.1]", "{format:.1,domain:.6,general:.3}"])
def test_every_form_of_a_mix(plus: str, mix: str) -> None:
    cfg = compose("quickstart", [f"{plus}data.mix={mix}"])
    assert [source.lam for source in cfg.data.sources.values()] == pytest.approx([0.6, 0.3, 0.1])
    assert cfg.data.mix is None
    assert config.config_hash(cfg) == config.config_hash(compose("quickstart", ["data.mix=[6,3,1]"]))


def test_a_mix_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "conf" / "mix").mkdir(parents=True)
    (tmp_path / "conf" / "mix" / "mine.yaml").write_text("domain: 1\ngeneral: 0\nformat: 1\n")
    cfg = compose("quickstart", ["+data.mix=mine"])
    assert [source.lam for source in cfg.data.sources.values()] == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("mix", "issue"),
    [
        ({"a": 1}, "no lambda for source 'b'"),
        ({"a": 1, "b": 1, "c": 1}, "no source is named 'c'"),
        ({"a": 1, "b": -1}, "lambda of b is -1"),
        ({"a": 1, "b": float("inf")}, "lambda of b is inf"),
        ({"a": 1, "b": True}, "lambda of b is true"),
        ({"a": 0, "b": 0}, "sum to 0"),
        ([1], "given [1]"),
        ([1, 2, 3], "given [1, 2, 3]"),
        (0.5, "given 0.5"),
    ],
)
def test_a_wrong_mix_is_refused(mix: object, issue: str) -> None:
    lambdas, issues = lambdas_of(mix, ["a", "b"])
    assert lambdas == {}
    assert any(issue in found for found in issues)


def test_lambdas_keep_their_spelling_where_they_sum_to_one() -> None:
    assert lambdas_of([0.6, 0.3, 0.1], ["a", "b", "c"])[0] == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert compose("quickstart", ["data.sources.domain.lam=0.9"]).data.sources["domain"].lam == pytest.approx(
        0.9 / 1.45
    )


# Names, hashes, run directories


def test_the_name_is_the_hash_of_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    base = compose("quickstart")
    same = ["zero.stage=3", "run.note=x", "tracking.wandb=disabled", "launch.nproc=2", "checkpoint.keep_last=5"]
    same += ["eval.every_steps=7", "dry_run=true", "tracking.group=g", "tracking.tags=[a]", "run.note=${now:%f}"]
    same += ["launch.nodes=2", "launch.address=h:1", "launch.node_rank=1", "launch.max_restarts=3", "sweep.metric=loss"]
    assert compose("quickstart", same).run.name == base.run.name
    for word in ("optimizer.lr=1", "data.mix=balanced", "train.packs_per_step=3"):
        assert compose("quickstart", [word]).run.name != base.run.name, word
    plan = compose("quickstart", ["cluster.gpus=4"], PlanConfig)
    assert plan.run.name == base.run.name, "a command's own keys are no part of it"


def test_a_jobs_number_is_the_name_under_slurm_and_stays_it_when_the_job_is_requeued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each task of an array has a number of its own, which SLURM keeps when it starts the task again."""
    by_hash = compose("quickstart").run.name
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = compose("quickstart")
    assert (first.run.name, first.run.dir) == ("quickstart-4711", "runs/quickstart-4711")
    again = {"SLURM_RESTART_COUNT": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "9", "SLURM_JOB_NODELIST": "n[5-6]"}
    for name, value in {**again, "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert compose("quickstart").run.name == first.run.name
    names = {first.run.name}
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4712")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setenv("SLURM_JOB_ID", str(4712 + int(task)))
        names |= {compose("quickstart").run.name, compose("quickstart", ["launch.nproc=2"]).run.name}
    assert len(names) == 3
    assert compose("quickstart", ["run.name=mine"]).run.dir == "runs/mine"
    monkeypatch.setenv("SLURM_JOB_ID", "")
    assert compose("quickstart").run.name == by_hash


@pytest.mark.parametrize("exp", ["a,b{c}", "k=v", "größe x", "a'b"])
def test_generated_names_hold_no_special_characters(tmp_path: Path, exp: str) -> None:
    folder = tmp_path / "conf" / "exp"
    folder.mkdir(parents=True)
    (folder / f"{exp}.yaml").write_text("# @package _global_\ndefaults: [quickstart, _self_]\n")
    cfg = compose(exp)
    assert cfg.run.name is not None
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", cfg.run.name)


def test_an_existing_run_is_the_base(tmp_path: Path) -> None:
    first = compose("quickstart", ["run.dir=out/a run", "data.mix=[1,2,1]", "optimizer.lr=3e-4"])
    config.write_config(Path("out/a run"), first)
    again = compose(None, ["run.dir=out/a run"])
    assert again == first
    changed = compose(None, ["run.dir=out/a run", "optimizer.lr=4e-4", "zero=2"])
    assert config.differences(first, changed) == {"optimizer.lr": (3e-4, 4e-4)}
    assert changed.zero.stage == 2
    (Path("out/a run") / "config.yaml").write_text("trian: {}\n")
    with pytest.raises(ConfigError, match="trian: unknown key; did you mean"):
        compose(None, ["run.dir=out/a run"])
    (Path("out/a run") / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        compose(None, ["run.dir=out/a run"])


def test_a_users_own_data_replaces_the_presets_sources() -> None:
    for value, path in (
        ("my.jsonl", "my.jsonl"),
        ("[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("hub:x/y", "hub:x/y"),
    ):
        cfg = compose("llama8b", [f"data.train={value}"])
        assert list(cfg.data.sources) == ["train"]
        assert cfg.data.sources["train"].path == path
        assert cfg.data.sources["train"].lam is None
    cfg = compose("lora", [*OWN_DATA, "data.sources.train.shape=alpaca", "data.val=v.jsonl"])
    assert (cfg.data.sources["train"].shape, cfg.data.sources["train"].path) == ("alpaca", "my.jsonl")


@pytest.mark.parametrize("words", [["data.train=my.jsonl"], ["~data.sources.format"]])
def test_a_source_that_is_replaced_takes_its_schema_along(words: list[str]) -> None:
    assert compose("quickstart").evals.schemas.keys() == {"format"}
    assert compose("quickstart", words).evals.schemas == {}


def test_what_the_user_says_of_a_source_stays_to_be_used_or_refused() -> None:
    """Also where the preset has a source of that name: only its own schema goes with it."""
    for name in ("train", "format", "fromat"):
        cfg = compose("quickstart", ["data.train=my.jsonl", f"evals.schemas.{name}=x.json"])
        assert cfg.evals.schemas == {name: "x.json"}
    assert compose("quickstart", ["evals.schemas.fromat=x.json"]).evals.schemas.keys() == {"format", "fromat"}


def test_a_users_preset_may_replace_the_sources_of_another(tmp_path: Path) -> None:
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [quickstart, _self_]\ndata: {train: my.jsonl}\n"
    (tmp_path / "conf" / "exp" / "mine.yaml").write_text(text)
    cfg = compose("mine")
    assert (list(cfg.data.sources), cfg.evals.schemas) == (["train"], {})


@pytest.mark.parametrize("section", ["evals.schemas", "data.sources"])
def test_no_section_where_one_is_required_is_an_issue_beside_data_of_ones_own(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}: given null, required a section"):
        compose("quickstart", ["data.train=my.jsonl", f"{section}=null"])


# The working directory's conf


def test_a_users_preset_and_groups(tmp_path: Path) -> None:
    own = tmp_path / "conf"
    for name in ("exp", "model", "data"):
        (own / name).mkdir(parents=True)
    (own / "exp" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [lora, {override /model: tiny}, {override /data: desk}, _self_]\n"
        "zero: {stage: 3}\n"
    )
    (own / "model" / "tiny.yaml").write_text("path: tiny/model\n")
    (own / "data" / "desk.yaml").write_text("sources: {desk: {path: desk.jsonl}}\n")
    (own / "exp" / "lora.yaml").write_text("# @package _global_\nseed: 99\n")
    cfg = compose("mine")
    assert (cfg.model.path, cfg.tune.method, cfg.zero.stage) == ("tiny/model", "lora", 3)
    assert list(cfg.data.sources) == ["desk"]
    assert cfg.seed == 0, "the package's presets come first"
    assert compose("mine", ["zero=1"]).zero.stage == 1, "what the command line chooses wins over the preset's body"


@pytest.mark.parametrize(
    ("text", "issue"),
    [
        ("seed: 1\n", "# @package _global_"),
        ("", "# @package _global_"),
        ("# @package _global_\nseed: [\n", "conf/exp/mine.yaml:3: not readable as YAML"),
        ("# @package _global_\nseed: 1\nseed: 2\n", "conf/exp/mine.yaml:3: not readable as YAML (found duplicate key"),
        ("# @package _global_\nseed: ${\n", "conf: a ${...} cannot be read"),
        ("# @package _global_\nseed: ${oc.env:NOT_SET_ANYWHERE}\n", "NOT_SET_ANYWHERE is not set"),
        ("# @package _global_\ndefaults: [nothing_here]\n", "conf/exp/mine.yaml: its defaults name exp/nothing_here"),
        ("# @package _global_\ndefaults: [mine]\n", "lead back to the preset itself"),
        ("# @package _global_\ndefaults: 3\n", "conf/exp/mine.yaml: its defaults are no list"),
        ("# @package _global_\ndefaults: [{override /zero: 3}]\n", "by int, required text in quotes"),
        (
            "# @package _global_\ndefaults: [{override /zero: '9'}]\n",
            "a preset chooses zero=9, not in conf/zero, which",
        ),
        ("# @package _global_\ndefaults: [lora, {override /zoro: '3'}]\n", "which is no group; the groups are evals, "),
        ("# @package _global_\ndefaults: [lora, _self_]\noptimizer: {betas: {a: 1}}\n", "conf/exp/mine.yaml: gives a"),
        ("# @package _global_\ndefaults: [lora, _self_]\noptimizer: 3\n", "did you mean optimizer.lr=3?"),
    ],
)
def test_a_broken_yaml_is_an_issue_on_one_line(tmp_path: Path, text: str, issue: str) -> None:
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    (tmp_path / "conf" / "exp" / "mine.yaml").write_text(text)
    lines = issues_of(exp="mine")
    assert any(issue in line for line in lines), lines
    assert not [line for line in lines if re.search(HYDRA_SPEAK, line)]


# The command line


def test_cfg_job_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    def never(cfg: TrainConfig) -> None:
        raise AssertionError("nothing is run")

    assert config.main(TrainConfig, never, "train", ["+exp=quickstart", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert config.from_dict(shown) == compose("quickstart")
    assert config.main(InspectConfig, never, "inspect", ["--help"]) == 0
    text = capsys.readouterr().out
    for key in (*ALL_KEYS, "limit", *PRESETS):
        assert key in text


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def run(cfg: TrainConfig) -> int:
        return 75

    def broken(cfg: TrainConfig) -> None:
        raise ZeroDivisionError

    assert config.main(TrainConfig, run, "train", ["+exp=quickstart"]) == 75
    assert config.main(TrainConfig, run, "train", ["+exp=quickstart", "zero.stage=9"]) == 2
    err = capsys.readouterr().err
    assert err == "sftdist train: error: zero.stage: given 9, required 0, 1, 2 or 3\n"
    assert config.main(TrainConfig, run, "train", ["--cfg", "hydra", "+exp=quickstart"]) == 2
    assert config.main(TrainConfig, broken, "train", ["+exp=quickstart"]) == 1
    assert "Traceback" in capsys.readouterr().err, "a fault of ours shows where it is"


def test_a_sweep_inside_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sftdist.core.command.die_with_parent", lambda: None)
    assert config.main(TrainConfig, print, "train", ["-m", "+exp=lora", "seed=1,2"]) == 2
    assert "sftdist train -m +exp=lora seed=1,2" in capsys.readouterr().err


def test_unknown_commands_name_the_nearest() -> None:
    done = subprocess.run([sys.executable, "-m", "sftdist.cli", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'train'?" in done.stderr.replace("train?", "'train'?")
    listing = subprocess.run([sys.executable, "-m", "sftdist.cli"], capture_output=True, text=True, check=True).stdout
    assert "inspect" in listing


def test_a_wheel_brings_every_file(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    place, empty = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(place)
    empty.mkdir()
    script = "from sftdist.core.config import compose, conf_folder; print(conf_folder(), compose('llama8b').zero.stage)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(place / "sftdist" / "conf"), "3"]
    shipped = {"sftdist": "sftdist", "conf": "sftdist/conf", "slurm": "sftdist/slurm"}
    files = [
        Path(target) / path.relative_to(ROOT / folder)
        for folder, target in shipped.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 300
    assert [str(file) for file in files if not (place / file).is_file()] == []
