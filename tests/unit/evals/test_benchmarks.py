"""Benchmarks of lm-eval on a task file of one's own, with the base model of the quickstart, document by document."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftdist.core.errors import ConfigError, DataError
from sftdist.data.message import Message
from sftdist.evals import benchmarks as module
from sftdist.evals.backends.hf import HfEngine
from sftdist.evals.benchmarks import Benchmarked, Measured, benchmarks, require_lm_eval
from sftdist.evals.decoding import Decoding
from sftdist.evals.prompts import Prompt
from sftdist.evals.voice import Voice
from tests.conftest import ROOT

BASE = ROOT / "sftdist" / "assets" / "base"
CPU = torch.device("cpu")
QUESTIONS = [f"book room {number} for {number + 1}" for number in range(6)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks on six documents: pick a choice, and write an answer that is cut out by two filters."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sftdist[evals]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": text, "choices": ["yes", "no"], "gold": place % 2} for place, text in enumerate(QUESTIONS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        "task: rooms_choice\noutput_type: multiple_choice\n"
        + head
        + "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        "task: rooms_write\noutput_type: generate_until\n"
        + head
        + "doc_to_text: '{{question}}'\ndoc_to_target: '{{choices[gold]}}'\n"
        "generation_kwargs: {until: ['@@'], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list:\n"
        "  - {name: whole, filter: [{function: take_first}]}\n"
        "  - {name: number, filter: [{function: regex, regex_pattern: '(\\d+)'}, {function: take_first}]}\n"
    )
    return tmp_path


def decoding() -> Decoding:
    return Decoding(max_new_tokens=8, batch_size=4, engine="hf", dtype="fp32")


def by_hand(folder: Path, voice: Voice) -> list[float]:
    """Which of the two choices the model finds likelier after the prompt, held against the right one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for place, question in enumerate(QUESTIONS):
        prompt = voice.template.ids(voice.template.render([Message("user", question)], add_generation_prompt=True))
        sums = []
        for choice in ("yes", "no"):
            ids = prompt + voice.template.ids(choice)
            with torch.no_grad():
                chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(chances[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
        found.append(float(sums.index(max(sums)) == place % 2))
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with noise on its weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(BASE, folder)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=chance)
    model.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_two_models_on_two_tasks_of_ones_own(tasks: Path, other: Path) -> None:
    voice = Voice.load(BASE, other)
    files = [str(tasks / "choice.yaml"), str(tasks / "write.yaml")]
    both = benchmarks({"tuned": BASE, "base": other}, files, voice, decoding(), CPU)
    found = both.metrics
    assert sorted(found) == [
        "benchmarks.rooms_choice.acc",
        "benchmarks.rooms_write.exact_match.number",
        "benchmarks.rooms_write.exact_match.whole",
    ]
    choice = found["benchmarks.rooms_choice.acc"]
    assert choice.ids == [f"rooms_choice/{place}" for place in range(6)]
    assert choice.tuned == by_hand(BASE, voice)
    assert choice.base == by_hand(other, voice)
    assert {*choice.tuned, *choice.base} == {0.0, 1.0}
    assert (choice.low, choice.high, choice.higher_is_better) == (0.0, 1.0, True)
    # In another order and in other batches: the same values.
    alone = benchmarks({"tuned": other}, files[:1], voice, Decoding(8, 1), CPU)
    assert alone.metrics["benchmarks.rooms_choice.acc"].tuned == choice.base
    assert alone.metrics["benchmarks.rooms_choice.acc"].base is None
    # Another model was asked the same, by which a release and the one before it are compared.
    assert {*both.asked} == {f"rooms_{task}/{place}" for task in ("choice", "write") for place in range(6)}
    assert len(set(both.asked.values())) == 12
    assert alone.asked.items() < both.asked.items()
    rows = (tasks / "rows.jsonl").read_text()
    (tasks / "rows.jsonl").write_text(rows.replace('"gold": 1', '"gold": 0', 1))
    changed = benchmarks({"tuned": other}, files[:1], voice, decoding(), CPU).asked
    assert [id for id, asked in alone.asked.items() if changed[id] != asked] == ["rooms_choice/1"]


def test_an_answer_is_that_of_the_engine(tasks: Path) -> None:
    """What lm-eval makes the model write is what the model writes elsewhere, to the stop id and no further."""
    from_file = json.loads((tasks / "rows.jsonl").read_text().splitlines()[0])["question"]
    voice = Voice.load(BASE)
    prompt = Prompt("a/1", "a", (Message("user", from_file),))
    engine = HfEngine.load(BASE, voice.stop_ids, dtype="fp32", device=CPU, rows=voice.rows)
    (ids,) = engine.continued([voice.encode(prompt)], 8)
    said = voice.read(ids).text
    rows = (tasks / "rows.jsonl").read_text().splitlines()
    row = {**json.loads(rows[0]), "choices": [said, said]}
    (tasks / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = benchmarks({"tuned": BASE}, [str(tasks / "write.yaml")], voice, decoding(), CPU)
    assert said.strip()
    assert found.metrics["benchmarks.rooms_write.exact_match.whole"].tuned == [1.0]


def test_tasks_that_cannot_be_run(tasks: Path) -> None:
    voice = Voice.load(BASE)

    def run(*names: str) -> None:
        benchmarks({"tuned": BASE}, names, voice, decoding(), CPU)

    with pytest.raises(ConfigError, match="required a task file that exists"):
        run(str(tasks / "none.yaml"))
    rows = (tasks / "rows.jsonl").read_text()
    long = json.dumps({"question": "room " * 4000, "choices": ["yes", "no"], "gold": 0})
    (tasks / "rows.jsonl").write_text(long + "\n")
    for file in ("choice.yaml", "write.yaml"):
        with pytest.raises(DataError, match=r"room for .* positions"):
            run(str(tasks / file))
    (tasks / "rows.jsonl").write_text(rows)
    text = (tasks / "write.yaml").read_text().replace("exact_match, aggregation: mean", "bleu, aggregation: bleu")
    (tasks / "bleu.yaml").write_text(text.split("filter_list")[0])
    with pytest.raises(DataError, match="no number for each document"):
        run(str(tasks / "bleu.yaml"))
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        run(str(tasks / "choice.yaml"))


@pytest.mark.long  # lm-eval looks through 14,000 tasks
def test_a_task_of_another_name_is_answered_with_the_nearest(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"given gsm8kk, .* did you mean .*gsm8k"):
        benchmarks({"tuned": BASE}, ["gsm8kk"], Voice.load(BASE), decoding(), CPU)


def test_without_lm_eval_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sftdist\[evals\]'"):
        benchmarks({"tuned": BASE}, ["gsm8k"], Voice.load(BASE), decoding(), CPU)
    assert benchmarks({"tuned": BASE}, [], Voice.load(BASE), decoding(), CPU) == Benchmarked()


def test_two_models_are_compared_on_the_same_documents_only() -> None:
    one, two = (Measured("t", "acc", ids, [1.0] * len(ids), ids, True) for ids in (["t/0", "t/1"], ["t/0"]))
    with pytest.raises(DataError, match="2 documents of the tuned model and 1 others"):
        module._scores("t.acc", one, two)


def test_benchmarks_without_tasks() -> None:
    require_lm_eval([])
    with pytest.raises(ConfigError, match=r"tasks=\[gsm8k,FILE\.yaml\]"):
        require_lm_eval([], asked=True)
