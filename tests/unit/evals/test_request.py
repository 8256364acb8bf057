"""From a configuration of evaluate to plain values: which model and base, which prompts, what was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdist.assets import quickstart
from sftdist.core import snapshot
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError, DataError
from sftdist.core.settings import EvaluateConfig, TrainConfig
from sftdist.core.storage import write_json
from sftdist.data.pipeline import prepare
from sftdist.data.request import request_of as data_request_of
from sftdist.evals.questions import refuse_trained
from sftdist.evals.request import SuiteSpec, read_schema, request_of
from tests.e2e.workshop import SPECIALS, write_rows
from tests.tokenizers import byte_tokenizer

DATA = ("data.val_fraction=0.3", "data.workers=1")
ROWS = ("model.path=base", "data.train=rows.jsonl")
CONTRACT = "rules:\n  max_words: 50\n"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base model (its tokenizer; nothing here loads weights) and rows."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        tokenizer = byte_tokenizer(specials=SPECIALS)
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        )
        tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        tokenizer.save_pretrained(name)
    write_rows(tmp_path / "rows.jsonl", 40)
    return tmp_path


def configured(*words: str) -> EvaluateConfig:
    return compose("full", [*DATA, *words], EvaluateConfig)


def spec_of(*words: str) -> SuiteSpec:
    return request_of(configured(*words), lambda key, name: Path(name), torch.device("cpu"))


def a_run(*words: str) -> str:
    """What a finished training leaves that evaluate reads."""
    cfg = compose("full", [*DATA, *ROWS, "run.dir=runs/r", *words], TrainConfig)
    run_dir = Path("runs/r")
    (run_dir / "export").mkdir(parents=True)
    shutil.copytree("base", run_dir / "export", dirs_exist_ok=True)
    snapshot.write_config(run_dir, cfg)
    write_json(run_dir / "data-manifest.json", prepare(data_request_of(cfg.data, cfg.model)).manifest)
    return "run.dir=runs/r"


# --- which models ---------------------------------------------------------------------------------------------


def test_a_run_is_judged_by_its_export_beside_its_base(shop: Path) -> None:
    run = a_run()
    spec = spec_of(run, *ROWS)
    assert (spec.candidate, spec.base, spec.named) == (Path("runs/r/export"), Path("base"), False)
    assert spec.folder == Path("runs/r/report/validation")
    assert spec.run["dir"] == "runs/r"
    assert spec.data["sources"] == {store.name: store.manifest["key"] for store in spec.stores}
    spec = spec_of(run, *ROWS, "candidate=other", "base=other", "split=holdout")
    assert (spec.candidate, spec.base, spec.named) == (Path("other"), Path("other"), True)
    assert spec.folder == Path("runs/r/report/holdout")


def test_a_run_without_export_says_how_to_come_by_one(shop: Path) -> None:
    run = a_run()
    shutil.rmtree("runs/r/export")
    with pytest.raises(ConfigError, match=r"a run without export.*sftdist export run\.dir=runs/r\): candidate=FOLDER"):
        spec_of(run, *ROWS)
    assert spec_of(run, *ROWS, "candidate=other").candidate == Path("other")
    assert spec_of(run, *ROWS, "watch=true").candidate == Path("runs/r/export"), "a watch brings its models along"


def test_a_model_from_scratch_has_no_base(shop: Path) -> None:
    shape = "model.shape={model_type:llama,hidden_size:8}"
    words = (*ROWS, "model.init=random", shape)
    assert spec_of(a_run("model.init=random", shape), *words).base is None


def test_without_a_run_the_model_is_judged_alone_an_adapter_beside_its_base(shop: Path) -> None:
    spec = spec_of(*ROWS, "run.dir=out")
    assert (spec.candidate, spec.base, spec.named) == (Path("base"), None, False)
    assert (spec.folder, spec.run, spec.trained) == (Path("out/report/validation"), {}, [])
    write_json(shop / "other" / "adapter_config.json", {"base_model_name_or_path": str(shop / "base")})
    assert spec_of("data.train=rows.jsonl", "model.path=other").base == shop / "base"
    with pytest.raises(ConfigError, match=r"given no model, required run\.dir=R, candidate=FOLDER or model\.path"):
        spec_of("data.train=rows.jsonl")


# --- which prompts --------------------------------------------------------------------------------------------


def test_a_file_of_ones_own_is_asked_from_without_any_source(shop: Path) -> None:
    spec = spec_of("model.path=base", "data.val=rows.jsonl")
    assert [(store.name, len(store)) for store in spec.stores] == [("validation", 40)]
    spec = spec_of(*ROWS)
    assert [store.name for store in spec.stores] == ["train"]


def test_the_contract_of_the_only_source_is_that_of_ones_own_file(shop: Path) -> None:
    (shop / "c.yaml").write_text(CONTRACT)
    words = ("model.path=base", "data.sources={a: {path: rows.jsonl, contract: c.yaml}}")
    assert list(spec_of(*words).measures.contracts) == ["a"]
    assert list(spec_of(*words, "data.val=rows.jsonl").measures.contracts) == ["validation"]


@pytest.mark.parametrize("text", ["[1]", "broken: [", ""])
def test_a_schema_is_an_object(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.yaml"):
        read_schema(file)
    file.write_text("type: object")
    assert read_schema(file) == {"type": "object"}


# --- what was trained on ----------------------------------------------------------------------------------------


def refused(spec: SuiteSpec) -> str:
    with pytest.raises(DataError) as caught:
        refuse_trained(spec.stores, spec.split, spec.trained)
    return str(caught.value)


def test_rows_that_a_run_was_trained_on_are_known_to_all_who_ask_its_model(shop: Path) -> None:
    """By the run itself, with another file; by the folder of its export; and by another run that names it."""
    run = a_run()
    spec = spec_of(run, *ROWS)
    refuse_trained(spec.stores, spec.split, spec.trained)
    own = "data.val=rows.jsonl"
    assert "content the model was trained on, in source train" in refused(spec_of(run, "model.path=base", own))
    elsewhere = (own, "data.store_dir=elsewhere")
    assert "in source train" in refused(spec_of("model.path=runs/r/export", *elsewhere))
    assert "in source train" in refused(spec_of("model.path=base", "candidate=runs/r/export", *elsewhere))
    alone = spec_of("model.path=base", *elsewhere)
    assert alone.trained == []


def test_a_run_whose_training_rows_are_gone_is_not_asked(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run()
    shutil.rmtree("stores")
    with pytest.raises(
        ConfigError, match=r"(?s)train: given no store of what was trained on.*required the stores of the run"
    ):
        spec_of(run, "model.path=base", "data.val=rows.jsonl", "data.store_dir=elsewhere")
    assert spec_of("model.path=runs/r/export", "data.val=rows.jsonl", "data.store_dir=elsewhere").trained == []
    assert "runs/r/export: the prompts are not compared with its training source train" in capsys.readouterr().out
    Path("runs/r/data-manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"given a run without data-manifest\.json"):
        spec_of(run, *ROWS)


def test_what_is_decided_by_the_config_stands_in_the_spec(shop: Path) -> None:
    words = ("evals.max_prompts=7", "evals.max_new_tokens=9", "evals.batch_size=3", "evals.precision=bf16", "seed=5")
    spec = spec_of(*ROWS, *words, "data.allow_unrendered=[tools]", "evals.cache=kept")
    decoding: dict[str, Any] = spec.decoding.facts()
    assert (decoding["max_new_tokens"], decoding["batch_size"], decoding["dtype"]) == (9, 3, "bf16")
    assert (spec.max_prompts, spec.measures.seed, spec.cache) == (7, 5, Path("kept"))
    assert list(spec.allow_unrendered) == ["tools"]
    assert json.dumps(spec.data), "it goes into the report"


def test_data_of_ones_own_in_place_of_the_quickstarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare makes its store, and evaluate asks from it; the schema of a source that is gone is no misspelt one."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my.jsonl", 40)
    cfg = compose("quickstart", [*DATA, "data.train=my.jsonl", "candidate=quickstart/base"], EvaluateConfig)
    quickstart.lay_out(cfg)
    assert list(prepare(data_request_of(cfg.data, cfg.model)).stores) == ["train"]
    spec = request_of(cfg, lambda key, name: Path(name), torch.device("cpu"))
    assert [store.name for store in spec.stores] == ["train"]
    assert spec.measures.schemas == {}
    cfg.evals.schemas = {"format": "my.jsonl"}  # a user's own word
    with pytest.raises(ConfigError, match="given the source format, required one of train"):
        request_of(cfg, lambda key, name: Path(name), torch.device("cpu"))
