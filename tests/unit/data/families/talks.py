"""The conversations that every imitated family of templates is tried on, and the templates themselves."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import yaml

from sftdist.core.settings import Reasoning, TrainOn
from sftdist.data.schema import Message
from sftdist.data.template import ChatTemplate, MaskOptions
from tests.tokenizers import CONTROL, byte_tokenizer
from tests.unit.data.stock import TOOL, assistant, system, talk, user

FOLDER = Path(__file__).parent
FAMILIES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
# Tokens that such models list as eos_token_id in generation_config.json.
STOPS = ("<|eot_id|>", "<|call|>", "<|tool_response>", "<|END_OF_TURN_TOKEN|>")


def call(id: str, **arguments: object) -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def result(text: str, id: str) -> Message:
    return Message("tool", text, name="get_weather", tool_call_id=id)


NESTED = call("abcdefgh1", city='the "old" town', at={"lat": 1.5, "tags": ["a", "ü"]})
SECOND = call("abcdefgh2", city="Bonn")
THINKING = "Two and two\nmake four."
TALKS = {
    found.id: found
    for found in (
        talk("single", user("Hello"), assistant("Hi there.")),
        talk("system", system("Be brief."), user("Hello"), assistant("Hi there.")),
        talk("turns", user("One"), assistant("two"), user("Three"), assistant("four"), user("Five"), assistant("six")),
        talk("system turns", system("Be brief."), user("One"), assistant("two"), user("Three"), assistant("four")),
        talk("twice", user("One"), assistant("two"), assistant("three"), user("Four"), assistant("five")),
        talk("texts", user(" \n السلام 🗼 "), assistant("\n\n  é e\u0301 👩\u200d🚀\n    שלום \n")),
        talk("empty", user("Say nothing."), assistant("")),
        talk("definitions", user("Hello"), assistant("Hi there."), tools=[TOOL]),
        talk(
            "calls",
            user("Weather?"),
            assistant("", tool_calls=(NESTED,)),
            result("sunny", "abcdefgh1"),
            assistant("Sun."),
            tools=[TOOL],
        ),
        talk("ends with a call", user("Weather?"), assistant("", tool_calls=(SECOND,)), tools=[TOOL]),
        talk(
            "parallel",
            user("Weather?"),
            assistant("", tool_calls=(NESTED, SECOND)),
            result("sunny", "abcdefgh1"),
            result("rain", "abcdefgh2"),
            assistant("Mixed."),
            tools=[TOOL],
        ),
        talk(
            "text and call",
            user("Weather?"),
            assistant("I look.", tool_calls=(SECOND,)),
            result("rain", "abcdefgh2"),
            assistant("Rain."),
            tools=[TOOL],
        ),
        talk("reasoning", user("2+2?"), assistant("4", reasoning=THINKING)),
        talk(
            "reasoned twice",
            user("2+2?"),
            assistant("4", reasoning=THINKING),
            user("3+3?"),
            assistant("6", reasoning="Six."),
        ),
    )
}
OPTIONS = {
    "all": MaskOptions(),
    "last": MaskOptions(train_on=TrainOn.last),
    "expand": MaskOptions(expand_turns=True),
    "drop": MaskOptions(reasoning=Reasoning.drop),
    "drop, expand": MaskOptions(reasoning=Reasoning.drop, expand_turns=True),
    "tools unrendered": MaskOptions(allow_unrendered=("tools",)),
    "reasoning unrendered": MaskOptions(allow_unrendered=("reasoning",)),
}


def text_of(family: str) -> str:
    return (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")


def expectations(family: str) -> dict[str, list[str] | str]:
    """`talk` or `talk, option` -> the supervised texts in order, or the reason of the refusal."""
    found: dict[str, list[str] | str] = yaml.safe_load((FOLDER / f"{family}.yaml").read_text(encoding="utf-8"))
    return found


@lru_cache
def template_of(family: str, **arguments: bool) -> ChatTemplate:
    text = text_of(family)
    tokenizer = byte_tokenizer(text, specials=sorted({*CONTROL.findall(text), *(t for t in STOPS if t in text)}))
    stops = [tokenizer.vocab[word] for word in STOPS if word in tokenizer.vocab]
    return ChatTemplate.of(tokenizer, stop_ids=stops, arguments=arguments)
