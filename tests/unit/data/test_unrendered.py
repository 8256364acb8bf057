"""No field of a row is lost in silence (S25): reasoning, tools and names that a template never renders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sftdist.core.errors import ConfigError
from sftdist.core.settings import DataSettings, ModelSettings, Reasoning, TrainOn
from sftdist.data.mask import MaskOptions, Refusal
from sftdist.data.render import Unproven
from sftdist.data.request import request_of
from sftdist.data.schema import Conversation, Message
from sftdist.data.template import ChatTemplate
from tests.tokenizers import byte_tokenizer
from tests.unit.data.families.talks import NESTED, TALKS, result, template_of
from tests.unit.data.stock import TOOL, assistant, talk, user

NAMED = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{% if m.name %} ({{ m.name }}){% endif %}"
    "{{ '\n' + m.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
REASONED = talk("earlier", user("a"), assistant("1", reasoning="first"), user("b"), assistant("2"))
WHO = talk("who", Message("user", "a", name="Ann"), assistant("1"))


def only(template: ChatTemplate, conversation: Conversation, *allowed: str, **options: object) -> object:
    (found,) = template.samples(conversation, MaskOptions(allow_unrendered=allowed, **options))  # type: ignore[arg-type]
    return found.reason if isinstance(found, Refusal) else [found.text[s.start : s.end] for s in found.spans]


@pytest.mark.parametrize(
    ("conversation", "field", "dropped", "expected"),
    [
        (TALKS["reasoning"], "reasoning", "the reasoning of the last assistant turn", ["4<|im_end|>"]),
        (REASONED, "reasoning", "the reasoning of the last assistant turn", ["1<|im_end|>", "2<|im_end|>"]),
        (TALKS["definitions"], "tools", "the list of tools", ["Hi there.<|im_end|>"]),
        (WHO, "name", "the name of the speaker of an user message", ["1<|im_end|>"]),
    ],
)
def test_a_field_that_is_never_rendered(
    conversation: Conversation, field: str, dropped: str, expected: list[str]
) -> None:
    template = template_of("phi4")
    (refused,) = template.samples(conversation, MaskOptions())
    assert isinstance(refused, Refusal)
    assert refused.id == conversation.id
    assert refused.reason == f"template drops {dropped}"
    assert f"data.allow_unrendered=[{field}]" in refused.detail
    assert only(template, conversation, field) == expected
    others = [word for word in ("reasoning", "tools", "name") if word != field]
    assert only(template, conversation, *others) == refused.reason


def test_all_of_them_at_once() -> None:
    messages = (replace(WHO.messages[0]), assistant("1", reasoning="hm"))
    everything = talk("all", *messages, tools=[TOOL])
    assert only(template_of("phi4"), everything, "name", "tools", "reasoning") == ["1<|im_end|>"]
    assert str(only(template_of("phi4"), everything, "name", "tools")).startswith("template drops the reasoning")


def test_reasoning_that_only_history_drops_is_not_lost() -> None:
    """It is what serving sends, too; the template shows reasoning where its turn is the last."""
    assert only(template_of("qwen3"), REASONED, train_on=TrainOn.last) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    assert str(only(template_of("phi4"), REASONED, train_on=TrainOn.last)).startswith("template drops the reasoning")
    assert only(template_of("phi4"), REASONED, reasoning=Reasoning.drop) == ["1<|im_end|>", "2<|im_end|>"]


def test_a_name_that_is_rendered() -> None:
    template = ChatTemplate.of(byte_tokenizer(NAMED))
    assert only(template, WHO) == ["1<|im_end|>"]
    assert "(Ann)" in template.render(WHO.messages)


def test_the_name_of_a_tool_result() -> None:
    """That of a call stands with the call; any other has to be rendered."""
    calls = (user("Weather?"), assistant("", tool_calls=(NESTED,)))
    known = talk("known", *calls, result("sunny", "abcdefgh1"), assistant("Sun."), tools=[TOOL])
    other = replace(known, messages=(*calls, replace(known.messages[2], name="radio"), known.messages[3]))
    template = template_of("qwen25")
    assert len(only(template, known)) == 2  # type: ignore[arg-type]
    assert only(template, other) == "template drops the name of the speaker of a tool message"
    assert len(only(template, other, "name")) == 2  # type: ignore[arg-type]


def test_a_call_cannot_be_left_out() -> None:
    assert only(template_of("phi4"), TALKS["calls"], "tools", "name", "reasoning") == (
        "template drops the name of a tool call"
    )


def test_other_words_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.allow_unrendered: given content, required reasoning \| tools \| name"
    ):
        MaskOptions(allow_unrendered=("content",))
    data = DataSettings(allow_unrendered=["names"])
    with pytest.raises(ConfigError, match=r"data\.allow_unrendered: given names"):
        request_of(data, ModelSettings(path="x"), dataset=[{"messages": []}])


def test_a_prompt_may_lose_what_its_conversation_may() -> None:
    """What an evaluation asks is what was trained on, also where the template leaves a field out."""
    template, plain = template_of("phi4"), template_of("phi4").encode_prompt([user("a")])
    named, tools = [Message("user", "a", name="Ann")], [TOOL]
    with pytest.raises(Unproven, match="template drops"):
        template.encode_prompt(named, tools, ["name"])
    assert template.encode_prompt(named, tools, ["name", "tools"]) == plain
    named_template = ChatTemplate.of(byte_tokenizer(NAMED))
    assert named_template.encode_prompt(named, (), ["name"]) != named_template.encode_prompt([user("a")])
