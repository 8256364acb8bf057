"""The prompts of a release asked again, as they were asked when it was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.config import compose
from sftdist.core.errors import DataError
from sftdist.data.message import Message
from sftdist.evals.decoding import Decoding
from sftdist.evals.prompts import Prompt
from sftdist.evals.regression import from_folder
from tests.suites import alone, home

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_what_the_template_never_renders_may_be_left_out_as_it_was_in_training(tmp_path: Path) -> None:
    release = home(tmp_path) / "tuned"
    plain = Prompt("a/1", "a", (Message("user", "What colour is it?"),))
    with_tools = Prompt("a/2", "a", plain.messages, tools=(TOOL,))
    how = Decoding(max_new_tokens=4, batch_size=2, engine="hf", dtype="fp32")
    run = compose("full", ["data.allow_unrendered=[tools]"])
    one, other = from_folder(release, [plain, with_tools], how, run, alone())
    assert one == other
    assert one.tokens > 0
    with pytest.raises(DataError, match=r"prompt a/2: the chat template refuses it .*tools"):
        from_folder(release, [plain, with_tools], how, compose("full"), alone())
