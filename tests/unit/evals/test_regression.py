"""The prompts of a release asked again, as they were asked when it was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.config import compose
from sftdist.core.errors import DataError
from sftdist.data.message import Message
from sftdist.evals.decoding import Decoding
from sftdist.evals.endpoint import Endpoint
from sftdist.evals.prompts import Prompt
from sftdist.evals.regression import from_endpoint, from_folder, voice_of
from sftdist.evals.voice import Voice
from tests.chat_server import said, serving
from tests.evaluated import BASE
from tests.suites import alone, home

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_what_the_template_never_renders_may_be_left_out_as_it_was_in_training(tmp_path: Path) -> None:
    release = home(tmp_path) / "tuned"
    plain = Prompt("a/1", "a", (Message("user", "What colour is it?"),))
    with_tools = Prompt("a/2", "a", plain.messages, tools=(TOOL,))
    how = Decoding(max_new_tokens=4, batch_size=2, engine="hf", dtype="fp32")
    voice = voice_of(release, compose("full", ["data.allow_unrendered=[tools]"]))
    one, other = from_folder(release, [plain, with_tools], how, voice, alone())
    assert one == other
    assert one.tokens > 0
    with pytest.raises(DataError, match=r"prompt a/2: the chat template refuses it .*tools"):
        from_folder(release, [plain, with_tools], how, voice_of(release, compose("full")), alone())


def test_a_thought_that_the_prompt_opened_is_no_answer_of_a_served_model() -> None:
    """Nor is an answer lost where the server has taken the thought out."""
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    plain += "{% if add_generation_prompt %}<|im_start|>assistant\n"
    prompt = Prompt("a/1", "a", (Message("user", "What colour is it?"),))
    texts = []
    for opening in ("", "<think>\n"):
        voice = Voice.load(BASE, chat_template=plain + opening + "{% endif %}")
        for text in ("hm</think>red", "red"):
            with serving((200, {}, {"data": [{"id": "bot"}]}), said(text)) as served:
                (answer,) = from_endpoint(Endpoint(served.url, None, None), [prompt], 4, voice)
            texts.append(answer.spoken)
    assert texts == ["hm</think>red", "red", "red", "red"]
