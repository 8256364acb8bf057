"""docs/serving.md: an export is what other programs read, and its preference example takes a step in TRL."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from sftdist.core.config import compose
from sftdist.data.message import Message
from sftdist.data.template import ChatTemplate
from sftdist.evals.prompts import Prompt
from sftdist.evals.voice import Voice
from sftdist.train import run
from tests.conftest import ROOT
from tests.e2e.workshop import SMALL, environment, model_folder, write_rows
from tests.evaluated import BASE
from tests.serving import PAGE, Modelfile, lines, modelfiles
from tests.tokenizers import byte_tokenizer

TALK = (
    Message("system", "Be brief."),
    Message("user", "Say again: river\nand lamp"),
    Message("assistant", "river"),
    Message("user", "  And now {{ .Content }}?"),
)
SPECIALS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def plain(messages: Sequence[Message] = TALK) -> list[dict[str, Any]]:
    return [{"role": one.role, "content": one.content} for one in messages]


def test_transformers_asks_with_the_tokens_of_an_evaluation() -> None:
    """And so does vLLM, which takes its prompts from there."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer.apply_chat_template(plain(), add_generation_prompt=True, return_dict=False)
    voice = Voice.load(BASE)
    assert tuple(ids) == voice.encode(Prompt("a", "a", TALK))
    assert GenerationConfig.from_pretrained(BASE).eos_token_id == [2, 0]
    assert set(voice.stop_ids) == {2, 0}


def template_of(name: str) -> ChatTemplate:
    return ChatTemplate.of(byte_tokenizer(specials=SPECIALS[name]), name)


@pytest.mark.parametrize(("number", "name"), enumerate(SPECIALS))
def test_ollama_would_ask_with_the_prompt_of_the_template(number: int, name: str) -> None:
    file, template = modelfiles(ROOT)[number], template_of(name)
    talk = [Message(one.role, one.content.strip()) for one in TALK]
    wanted = template.render(talk, add_generation_prompt=True)
    bos = "<s>" if name == "llama3" else ""
    assert wanted.startswith(bos), "which Ollama writes itself"
    assert file.render(plain(talk)) == wanted.removeprefix(bos)
    ends = {template.tokenizer.decode([stop]) for stop in template.stop_ids}
    assert set(file.stops) <= ends
    assert file.greedy


def test_a_modelfile_that_asks_otherwise_is_seen() -> None:
    wanted = template_of("chatml").render(list(TALK), add_generation_prompt=True)
    file = modelfiles(ROOT)[0]
    for wrong in (file.template.replace("<|im_end|>\n", "<|im_end|>"), file.template[:-1], f" {file.template}"):
        assert Modelfile(file.source, wrong, file.stops, greedy=True).render(plain()) != wanted
    assert file.render(plain()) == wanted


def test_each_line_names_what_an_export_has() -> None:
    """The page speaks of folders by the names that a run and a registry give them."""
    said = [*lines(ROOT, "vllm serve"), *lines(ROOT, "python llama.cpp"), *(one.source for one in modelfiles(ROOT))]
    assert len(said) == 6
    known = re.compile(r"runs/NAME/export(/adapter)?|registry/support-bot/v\d+|DIR")
    assert all(known.search(line) for line in said)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/NAME/export, of two steps of a tiny model."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model_folder(folder / "model")
        write_rows(folder / "my.jsonl", 60)
        keys = ("data.train=my.jsonl", *SMALL, "precision=fp32", "export.dtype=fp32", "train.max_steps=2")
        run(compose("full", ["model.path=model", *keys, "zero.stage=1", "run.dir=runs/NAME"]))
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_preference_tuning_goes_on_from_an_export(exported: Path) -> None:
    """The example of the page, in a process of its own, on a CPU."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / PAGE).read_text(), re.M | re.S)
    (code,) = [block for block in blocks if "DPOTrainer" in block]
    if find_spec("trl") is None:
        pytest.skip("trl is not installed (pip install 'sftdist[dev]')")
    (exported / "dpo.py").write_text(
        code.replace('report_to="none"', 'report_to="none", use_cpu=True, bf16=False, logging_steps=1')
        + "\nprint('LOSS', trainer.state.log_history[0]['loss'])\n"
    )
    done = subprocess.run(
        [sys.executable, "dpo.py"],
        cwd=exported,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (loss,) = re.findall(r"^LOSS (\S+)$", done.stdout, re.M)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-3), "before the step the model is its own reference"
    before, after = (load_file(exported / name / "model.safetensors") for name in ("runs/NAME/export", "dpo/final"))
    assert before.keys() == after.keys(), "TRL has kept every tensor"
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    ours, theirs = (AutoTokenizer.from_pretrained(exported / name) for name in ("runs/NAME/export", "dpo/final"))
    assert ours.chat_template == theirs.chat_template


@pytest.mark.long
@pytest.mark.timeout(900)
def test_llama_cpp_converts_an_export(exported: Path, tmp_path: Path) -> None:
    """Where LLAMA_CPP names a checkout of it. Its list of tokenizers does not know a tokenizer made for tests, so that
    here it is told what it would find out of a real one."""
    checkout = os.environ.get("LLAMA_CPP")
    if checkout is None:
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp")
    (line,) = lines(ROOT, "python llama.cpp")
    shutil.copytree(exported / "runs", tmp_path / "runs")
    words = line.replace("llama.cpp/convert", f"{checkout}/convert").split()[1:]
    told = (
        "import runpy, sys\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    paths = os.pathsep.join([checkout, f"{checkout}/gguf-py", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", told, *words],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    content = (tmp_path / "support-bot.gguf").read_bytes()
    assert content[:4] == b"GGUF"
    template = template_of("chatml").text.encode()
    assert template in content, "the template goes along"
