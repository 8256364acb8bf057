"""A peer's YAML as an experiment of ours: every key is accounted for, and what is written composes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from sftdist.commands import migrate as command
from sftdist.commands.migrate_peers.account import Account, Kind
from sftdist.commands.migrate_peers.page import table
from sftdist.commands.migrate_peers.peers import PEERS, migrate, whose
from sftdist.commands.migrate_peers.trl import _ENTRY
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import from_dict, read_yaml
from tests.conftest import ROOT

HERE = Path(__file__).parent


def examples(peer: str) -> dict[str, dict[str, Any]]:
    """The ten files of a peer, by name."""
    texts = (HERE / f"{peer}.yaml").read_text(encoding="utf-8").partition("\n")[2].split("\n---\n")
    return {text.split("\n")[0].removeprefix("# "): yaml.safe_load(text) for text in texts}


ALL = [(peer, name) for peer in PEERS for name in examples(peer)]
# What these still need before they run: rows that are no conversations, or files that are not there to look at.
TO_DO = {
    ("axolotl", "completion_of_text"): "rows of completion are no conversations",
    ("axolotl", "own_columns"): "write data/asked.csv as JSON lines",
    ("llamafactory", "lora_sft"): "source identity: look at its path",
    ("llamafactory", "preferences"): "stage: given dpo",
    ("llamafactory", "qlora_with_fsdp"): "such as the chosen answers",
    ("trl", "dora_and_more"): "tune.dora=true with zero.stage=3",
    ("llamafactory", "freeze"): "its columns have other names (prompt is question, response is answer)",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the two files that some examples name."""
    (tmp_path / "info").mkdir()
    shutil.copy(HERE / "dataset_info.json", tmp_path / "info")
    (tmp_path / "zero3.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(values: dict[str, Any], name: str = "mine", *words: str) -> tuple[int, TrainConfig | None]:
    """`sftdist migrate` on these keys; its exit code, and what it wrote: composed, and complete, where it is to run."""
    Path("file.yml").write_text(yaml.safe_dump(values, sort_keys=False))
    code = command.main(["file.yml", "--name", f"{name}-1", *words])
    written = Path("conf/exp", f"{name}-1.yaml")
    if code == 2:
        assert not written.exists()
        return code, None
    return code, compose(f"{name}-1", complete=True) if code == 0 else from_dict(read_yaml(written))


def account_of(peer: str, **values: Any) -> Account:
    return migrate(values, PEERS[peer], folder=Path(), gpus=1)


def test_new_tokens_are_added_once_whatever_key_they_come_under() -> None:
    found = account_of("llamafactory", add_tokens="<a>, <b>", add_special_tokens=["<b>", "<c>"], resize_vocab=True)
    assert found.values["model.add_tokens"] == ["<a>", "<b>", "<c>"]
    assert noted(found, "add_tokens") == [(Kind.carried, "model.add_tokens has <a>, <b>")]
    ((kind, text),) = noted(found, "add_special_tokens")
    assert (kind, text.startswith("model.add_tokens has <b>, <c>, special there")) == (Kind.differs, True)
    assert noted(found, "resize_vocab")[0][0] is Kind.unneeded
    given = {"tokens": ["<a>"], "special_tokens": {"additional_special_tokens": ["<b>"], "pad_token": "<pad>"}}
    other = account_of("axolotl", **given)
    assert other.values["model.add_tokens"] == ["<b>", "<a>"]
    assert "additional_special_tokens: model.add_tokens has <b>" in noted(other, "special_tokens")[0][1]
    with pytest.raises(ConfigError, match="tokens: given 3, required a list of words"):
        account_of("axolotl", tokens=3)


def noted(account: Account, key: str) -> list[tuple[Kind, str]]:
    return [(note.kind, note.text) for note in account.notes if note.key == key]


def test_each_peer_has_its_ten() -> None:
    assert {peer: len(examples(peer)) for peer in PEERS} == dict.fromkeys(PEERS, 10)


@pytest.mark.parametrize(("peer", "name"), ALL)
def test_an_example_is_carried_over_whole(
    peer: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = examples(peer)[name]
    assert whose(values).name == peer
    code, cfg = run(values, name)
    printed = capsys.readouterr()
    assert printed.err == ""
    todo = TO_DO.get((peer, name))
    assert code == (1 if todo else 0)
    assert (todo or "") in " ".join(printed.out.split())
    assert cfg is not None
    assert cfg.model.path == values.get("base_model", values.get("model_name_or_path"))
    text = (folder / "conf/exp" / f"{name}-1.yaml").read_text()
    missing = [key for key in values if f"#   {key}:" not in text]
    assert missing == [], "each key of the file stands in the comments, too"


def expected(peer: str, name: str, *words: str) -> TrainConfig:
    cfg = run(examples(peer)[name], name, *words)[1]
    assert cfg is not None
    return cfg


def test_axolotl_by_its_values(folder: Path) -> None:
    cfg = expected("axolotl", "full_with_deepspeed", "--gpus", "8")
    sources = {name: source.path for name, source in cfg.data.sources.items()}
    assert sources == {"train": "data/*.jsonl", "two": ["more/one.jsonl", "more/two.jsonl"]}
    assert cfg.data.val == "data/validation.jsonl"
    assert (cfg.train.packs_per_step, cfg.train.conversations_per_step) == (64, None)
    assert (cfg.train.max_steps, cfg.train.epochs) == (500, None)
    assert (cfg.optimizer.betas, cfg.optimizer.eps, cfg.optimizer.lr) == ([0.9, 0.95], 1e-5, 5e-6)
    assert (cfg.optimizer.min_lr_ratio, cfg.optimizer.warmup_ratio) == (0.1, 0.1)
    assert (cfg.zero.stage, cfg.tune.method, cfg.precision) == (3, "full", "bf16")
    assert (cfg.checkpoint.keep_best, cfg.checkpoint.every_steps, cfg.eval.every_steps) == (True, 50, 50)
    assert (cfg.checkpoint.keep_last, cfg.checkpoint.best) == (3, "eval/loss")
    assert (cfg.tracking.wandb, cfg.tracking.project, cfg.run.name) == ("offline", "mistral", "first try")


def test_axolotl_sets_and_templates(folder: Path) -> None:
    cfg = expected("axolotl", "full_with_fsdp")
    fine = cfg.data.sources["FineTome-100k"]
    assert (fine.path, fine.shape, fine.hub_split) == ("hub:mlabonne/FineTome-100k", "sharegpt", "train")
    assert (cfg.model.chat_template, cfg.zero.stage, cfg.zero.offload) == ("llama3", 3, "optimizer")
    qwen = expected("axolotl", "qwen_with_thinking")
    assert (qwen.tune.rslora, qwen.tune.target) == (True, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert (qwen.data.overlong, qwen.data.deduplicate, qwen.model.compile, qwen.seed) == ("truncate", True, True, 7)
    assert (qwen.eval.every_steps, qwen.optimizer.schedule, qwen.model.template_args) == (
        *(0, "constant"),
        {"enable_thinking": False},
    )
    assert expected("axolotl", "qlora").tune.method == "qlora"
    assert expected("axolotl", "own_columns").train.conversations_per_step == 16


def test_llamafactory_by_its_values(folder: Path) -> None:
    cfg = expected("llamafactory", "neat_packing")
    sources = cfg.data.sources
    assert (sources["support"].path, sources["support"].shape, sources["support"].lam) == (
        *("info/support.json", "messages"),
        0.7,
    )
    assert (sources["talks"].path, sources["talks"].shape, sources["talks"].hub_config) == (
        *("hub:us/talks", "sharegpt"),
        "en",
    )
    assert (cfg.train.packs_per_step, cfg.data.max_len, cfg.data.train_on) == (8, 8192, "last")
    assert (cfg.tune.r, cfg.tune.alpha, cfg.tune.target, cfg.tune.rslora) == (8, 16.0, "all-linear", True)
    assert (cfg.optimizer.warmup_ratio, cfg.optimizer.min_lr_ratio) == (0.1, 0.1)
    assert (cfg.model.activation_checkpointing, cfg.model.template_args) == (False, {"enable_thinking": False})
    assert (cfg.tracking.wandb, cfg.run.name) == (None, "neat")
    qlora = expected("llamafactory", "qlora")
    assert (qlora.tune.method, qlora.tune.double_quant, qlora.precision) == ("qlora", False, "fp16")
    assert qlora.model.activation_checkpointing
    plus = expected("llamafactory", "loraplus")
    assert (plus.data.val, plus.optimizer.schedule, plus.optimizer.warmup_ratio) == ("info/checked.json", "linear", 0)


def test_trl_by_its_values(folder: Path) -> None:
    cfg = expected("trl", "assistants_only")
    assert (cfg.model.chat_template, cfg.data.sources["support"].path) == ("templates/own.jinja", "data/support.jsonl")
    assert (cfg.data.max_len, cfg.data.overlong, cfg.train.packs_per_step) == (4096, "truncate", 8)
    assert (cfg.optimizer.warmup_ratio, cfg.optimizer.min_lr_ratio, cfg.optimizer.betas) == (0.05, 0.1, [0.9, 0.95])
    assert (cfg.optimizer.weight_decay, cfg.optimizer.max_grad_norm) == (0.01, 0.5)
    qlora = expected("trl", "qlora")
    assert (qlora.tune.method, qlora.tune.double_quant, qlora.optimizer.warmup_ratio) == ("qlora", True, 0.1)
    mixture = expected("trl", "mixture")
    assert {name: source.path for name, source in mixture.data.sources.items()} == {
        "Capybara": "hub:trl-lib/Capybara",
        "own": "data/own.jsonl",
        "third": "hub:us/third",
    }
    assert (mixture.data.sources["third"].hub_config, mixture.data.val_fraction) == ("chat", 0.05)
    pairs = expected("trl", "completions")
    assert (pairs.zero.stage, pairs.zero.offload, pairs.train.conversations_per_step) == (3, "optimizer", 16)


def test_what_a_peer_takes_without_a_key_is_written(folder: Path) -> None:
    """Else the file would train with our defaults, which are others."""
    trl = expected("trl", "nearly_nothing")
    assert (trl.optimizer.lr, trl.optimizer.schedule, trl.optimizer.min_lr_ratio) == (2e-5, "linear", 0.0)
    assert (trl.optimizer.betas, trl.optimizer.warmup_ratio) == ([0.9, 0.999], 0.0)
    assert (trl.train.epochs, trl.train.conversations_per_step, trl.data.max_len) == (3.0, 8, 1024)
    assert (trl.seed, trl.data.overlong, trl.precision) == (42, "truncate", "bf16")
    assert (trl.model.activation_checkpointing, trl.tracking.wandb) == (True, "disabled")
    theirs = SFTConfig(output_dir="out", use_cpu=True)
    assert trl.optimizer.lr == theirs.learning_rate
    assert trl.optimizer.betas == [theirs.adam_beta1, theirs.adam_beta2]
    assert trl.optimizer.schedule == theirs.lr_scheduler_type
    assert (trl.data.max_len, trl.train.epochs) == (theirs.max_length, theirs.num_train_epochs)
    assert trl.train.conversations_per_step == theirs.per_device_train_batch_size
    assert (trl.seed, trl.optimizer.eps) == (theirs.seed, theirs.adam_epsilon)
    assert trl.model.activation_checkpointing == theirs.gradient_checkpointing
    model = ModelConfig()
    values = account_of("trl", model_name_or_path="m", dataset_name="d", use_peft=True).values
    assert values["tune.r"] == model.lora_r
    assert (values["tune.alpha"], values["tune.dropout"]) == (model.lora_alpha, model.lora_dropout)


def test_every_key_of_trl_is_known() -> None:
    """Read from the version that is installed: a new key of TRL fails here."""
    classes = (SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
    theirs = {field.name for one in classes for field in dataclasses.fields(one)}
    assert theirs - set(PEERS["trl"].known) == set()
    entry = {field.name for field in dataclasses.fields(DatasetConfig)}
    assert entry - {key for rule in _ENTRY for key in rule.keys} == set()


def test_every_key_of_transformers_is_known_to_llamafactory() -> None:
    theirs = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert theirs - set(PEERS["llamafactory"].known) == set()


@pytest.mark.parametrize("peer", PEERS)
def test_no_key_has_two_rules(peer: str) -> None:
    known = PEERS[peer].known
    assert sorted({key for key in known if known.count(key) > 1}) == []


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "value", [True, False, 1, 0, 0.5, 300, "no", "words", ["a", "b"], {"a": 1}, [{"path": "a.jsonl"}]]
)
def test_a_known_key_is_never_passed_over(peer: str, value: Any) -> None:
    """Whatever its value: a note, or an error that names the key. A rule that says nothing breaks an assertion."""
    named: list[tuple[str, str]] = []
    for key in PEERS[peer].known:
        try:
            account = account_of(peer, **{key: value})
        except ConfigError as error:
            named.append((key, str(error).partition(":")[0].partition("[")[0].partition(".")[0]))
        else:
            kinds = {note.kind for note in account.notes if note.key == key}
            assert kinds
            assert Kind.unknown not in kinds
    assert [(key, name) for key, name in named if key != name] == []


@pytest.mark.parametrize("peer", PEERS)
def test_a_key_without_a_value_says_nothing(peer: str) -> None:
    known = PEERS[peer].known
    bare, empty = account_of(peer), account_of(peer, **dict.fromkeys(known))
    assert empty.values == bare.values
    assert {note.key for note in empty.notes if note.kind is Kind.unneeded} >= set(known)


def test_an_unknown_key_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**examples("axolotl")["qlora"], "sample_paking": True, "colour": "red", "empty_one": None}
    code, cfg = run(values)
    said = capsys.readouterr()
    assert (code, cfg) == (2, None)
    assert "sample_paking: did you mean sample_packing?" in said.out
    assert "sample_paking, colour, empty_one: not known as keys of Axolotl; nothing was written" in said.err
    code, cfg = run(values, "mine", "--keep-going")
    assert (code, cfg is None) == (0, False)
    assert "#   colour: no key that is known here" in Path("conf/exp/mine-1.yaml").read_text()


def test_a_file_is_never_replaced_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yml").write_text(yaml.safe_dump(examples("axolotl")["qlora"]))
    assert command.main(["mine.yml"]) == 0
    Path("conf/exp/mine.yaml").write_text("# by hand\n")
    assert command.main(["mine.yml"]) == 2
    assert "conf/exp/mine.yaml: is there already; give another --name, or --force" in capsys.readouterr().err
    assert Path("conf/exp/mine.yaml").read_text() == "# by hand\n"
    assert command.main(["mine.yml", "--name", "other", "--folder", "else"]) == 0
    assert Path("else/conf/exp/other.yaml").is_file()
    assert command.main(["mine.yml", "--force"]) == 0
    assert "From mine.yml of Axolotl" in Path("conf/exp/mine.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (
            "colour: red\n",
            (),
            "required a file of axolotl, llamafactory, trl: say which with --from NAME",
        ),
        ("- a\n- b\n", (), "given list, required a mapping of keys"),
        ("a: [1\n", (), "not readable as YAML"),
        ("base_model: m\nlora_r: many\nadapter: lora\n", (), "lora_r: given 'many', required a number"),
        ("base_model: m\nmicro_batch_size: 1.5\n", (), "micro_batch_size: given 1.5, required a whole number"),
        ("base_model: m\ndatasets: rows.jsonl\n", (), "datasets: given 'rows.jsonl', required a list of datasets"),
        ("base_model: m\ndatasets: [{type: alpaca}]\n", (), "path: given null, required a file, a folder or a set"),
        ("base_model: m\nlora_r: 8\nlora_r: 16\n", (), "lora_r is given twice in"),
        ("base_model: m\n", ("--name", "a/b"), "--name: given 'a/b', required letters, digits"),
    ],
)
def test_what_cannot_be_read_is_said(
    text: str, words: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yml").write_text(text)
    assert command.main(["mine.yml", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("conf").exists()


def test_a_value_may_take_the_place_of_one_that_a_merge_brings(folder: Path) -> None:
    Path("mine.yml").write_text("common: &common {a: 1, b: 2}\nmine: {<<: *common, a: 3}\nagain: {<<: *common}\n")
    assert read_yaml(Path("mine.yml"))["mine"] == {"a": 3, "b": 2}


def test_a_missing_file_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["none.yml"]) == 2
    assert "none.yml: not there; give the YAML file that the peer trains with" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "given no file" in capsys.readouterr().err


def test_the_same_file_read_as_another_peers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yml").write_text(yaml.safe_dump(examples("trl")["lora"]))
    assert command.main(["mine.yml", "--from", "axolotl"]) == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_what_the_rules_of_a_configuration_find_is_to_be_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**examples("axolotl")["qlora"], "lora_dropout": 1.5}
    assert run(values)[0] == 1
    assert "- tune.dropout: given 1.5, required a fraction" in capsys.readouterr().out


def test_a_name_that_a_preset_has_would_never_be_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`+exp=lora` finds the preset of the package first."""
    Path("lora.yml").write_text(yaml.safe_dump(examples("axolotl")["lora_small"]))
    assert command.main(["lora.yml", "--name", "lora"]) == 2
    assert "--name: given lora, the name of a preset that sftdist brings" in capsys.readouterr().err
    assert command.main(["lora.yml"]) == 0
    assert compose("lora_axolotl").model.path == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize(
    ("values", "ratio"),
    [
        ({}, 0.0),
        ({"warmup_ratio": 0.1}, 0.1),
        ({"warmup_steps": 0.05}, 0.05),
        ({"warmup_steps": 10, "max_steps": 200}, 0.05),
        ({"warmup_steps": 10, "warmup_ratio": 0.2, "max_steps": 200}, 0.05),
        ({"warmup_steps": 0, "warmup_ratio": 0.2}, 0.2),
        ({"warmup_steps": 10}, 0.03),
        ({"warmup_steps": 10, "max_steps": 5}, 1.0),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, 0.0),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant_with_warmup"}, 0.1),
    ],
)
def test_warm_up(values: dict[str, Any], ratio: float) -> None:
    assert account_of("trl", **values).values["optimizer.warmup_ratio"] == ratio


def test_steps_of_warm_up_without_a_number_of_steps_are_told() -> None:
    ((kind, text),) = noted(account_of("trl", warmup_steps=10), "warmup_steps")
    assert kind is Kind.differs
    assert "given 10; ours is a share of all steps" in text


@pytest.mark.parametrize(
    ("given", "stage", "offload"),
    [
        ("zero3.json", 3, "optimizer"),
        ("deepspeed_configs/zero1.json", 1, None),
        ("examples/deepspeed/ds_z2_offload_config.json", 2, "optimizer"),
        ({"zero_optimization": {"stage": 1}}, 1, None),
        ("fast.json", None, None),
    ],
)
def test_deepspeed(given: Any, stage: int | None, offload: str | None, folder: Path) -> None:
    account = account_of("trl", deepspeed=given)
    assert (account.values.get("zero.stage"), account.values.get("zero.offload")) == (stage, offload)
    if stage is None:
        ((kind, text),) = noted(account, "deepspeed")
        assert (kind, "set zero.stage" in text) == (Kind.left, True)


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        ({"bf16": "auto"}, "bf16"),
        ({"bf16": True, "fp16": False}, "bf16"),
        ({"bf16": False}, "fp32"),
        ({"fp16": True}, "fp16"),
        ({}, "bf16"),
    ],
)
def test_precision_of_axolotl(values: dict[str, Any], precision: str) -> None:
    assert account_of("axolotl", **values).values["precision"] == precision


def test_precision_of_llamafactory_is_fp32_unless_it_says_otherwise() -> None:
    assert account_of("llamafactory").values["precision"] == "fp32"


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("us/chats", "hub:us/chats"),
        ("data/chats.jsonl", "data/chats.jsonl"),
        ("./chats", "./chats"),
        ("chats", "hub:chats"),
        ("here", "here"),
        ("/data/rows", "/data/rows"),
        ("a/b/c", "a/b/c"),
    ],
)
def test_a_path_is_a_file_or_a_set_of_the_hub(path: str, ours: str, folder: Path) -> None:
    (folder / "here").mkdir()
    account = account_of("axolotl", datasets=[{"path": path, "type": "chat_template"}])
    (source,) = account.values["data.sources"].values()
    assert source["path"] == ours


def test_the_old_jobs_folder_is_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    assert account_of("trl", output_dir="out").values["run.dir"] == "out", "an empty one"
    (folder / "out" / "adapter_model.safetensors").touch()
    account = account_of("trl", output_dir="out/")
    assert account.values["run.dir"] == "out-sftdist"
    assert noted(account, "output_dir")[0][0] is Kind.differs
    (folder / "out" / "config.yaml").touch()
    assert account_of("trl", output_dir="out").values["run.dir"] == "out", "a run of ours"


@pytest.mark.parametrize("path", ["s3://bucket/rows.jsonl", "data/rows.csv"])
def test_files_that_are_not_read_are_to_be_brought(path: str) -> None:
    account = account_of("axolotl", datasets=[{"path": path, "type": "chat_template"}])
    assert "data.sources" not in account.values
    assert any(path in need for need in account.needs)


def test_names_of_sources_are_ours_to_take() -> None:
    given = [{"path": path} for path in ("a/rows.jsonl", "b/rows.jsonl", "safety.jsonl", "us/so.many dots")]
    assert list(account_of("axolotl", datasets=given).values["data.sources"]) == [
        *("rows", "rows_2", "safety_rows"),
        "so",
    ]


def test_a_page_of_keys_is_what_the_docs_show(capsys: pytest.CaptureFixture[str]) -> None:
    docs = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    for name, peer in PEERS.items():
        assert command.main(["--keys", name]) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines() == table(peer)
        assert all(f"`{key}`" in printed for key in peer.known)
        assert "\n".join(table(peer)[: table(peer).index("")]) in docs, f"run: sftdist migrate --keys {name}"


BASE = {"base_model": "model", "datasets": [{"path": "my.jsonl", "type": "chat_template"}]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sequence_len": float("inf")}, "sequence_len: given inf, required a number"),
        ({"sequence_len": float("nan")}, "sequence_len: given nan, required a number"),
        ({"eval_steps": float("inf")}, "eval_steps: given inf, required a number"),
        ({"micro_batch_size": 0, "batch_size": 4}, "micro_batch_size: given 0, required a whole number of at least 1"),
        ({"warmup_steps": -3}, "warmup_steps: given -3, required 0 or more"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed: zero_optimization: given 3, required a mapping"),
        ({"deepspeed": {"zero_optimization": {"stage": "auto"}}}, "zero_optimization.stage: given 'auto'"),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": "cpu"}}}, "offload_optimizer: given 'cpu'"),
        ({"deepspeed": "list.json"}, "list.json: given a list, required an object"),
        ({3: "x"}, "given the keys 3, required names"),
    ],
)
def test_values_that_mean_nothing_are_told(
    values: dict[Any, Any], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "list.json").write_text("[]")
    assert run({**BASE, **values}, "mine", "--from", "axolotl")[0] == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_preferences_are_not_trained_as_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    assert run({**BASE, "rl": "dpo"}, "mine", "--from", "axolotl")[0] == 1
    assert "rl: given dpo; required conversations with answers" in " ".join(capsys.readouterr().out.split())
