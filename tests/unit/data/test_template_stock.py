"""Every stock template of trl is proven on the conversations, or refused with a reason that names the construct."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from functools import lru_cache

import pytest
from transformers.utils import chat_template_utils

from sftdist.core.settings import TrainOn
from sftdist.data.render import CLOCK
from sftdist.data.schema import Conversation
from sftdist.data.template import ChatTemplate, Encoded, MaskOptions, Refusal
from tests.tokenizers import byte_tokenizer
from tests.unit.data.stock import (
    ECHO,
    MULTI,
    PLAIN,
    REASONING,
    SINGLE,
    SPACE,
    STOCK,
    SYSTEM,
    TAGGED,
    TOOL_STOPS,
    TOOLS,
    UNICODE,
    VISION,
    assert_mask,
    dicts,
    marker_of,
    runs,
    stock_text,
    tagged_text,
    trimmed,
)

NEMOTRON = ("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning")
# The generation prompt opens `<think>`, which the render of a turn without reasoning lacks or shortens.
OPENED = (*NEMOTRON, "deepseek_r1_distill", "deepseekv3")
# The header of the next message ends a turn; nothing is written behind the last one.
UNWRITTEN = {"glm4moe": "<|user|>"}
EVERY_TURN = {  # several turns in one text; proven with train_on=last and expand_turns
    "gptoss": "history is rewritten at <|return|>",
    "qwen3": "history is rewritten at <think>",
    "qwen3_5_nothink": "history is rewritten at <think>",
    "qwen3_5_think": "history is rewritten at <think>",
    "qwen3_6": "history is rewritten at <think>",
    "deepseek_r1_distill": "history is rewritten at <think>",
    "deepseekv3": "history is rewritten at <think>",
    **dict.fromkeys(NEMOTRON, "history is rewritten at </think>"),
}
SYSTEM_ROLE = {"gemma": "refused by the template (System role not supported)"}
TOOLS_PROVEN = {
    *("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "gptoss", "muse_glimmer"),
    *("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2", "llama3_1", "llama3_2"),
    *(
        "glm4moe",
        "qwen2_5",
        "qwen3_5_nothink",
        "qwen3_5_think",
        "qwen3_6",
        "qwen3_8",
        "qwen3_instruct_2507",
        "qwen3_vl",
    ),
}
TOOLS_REWRITTEN = {
    "qwen3": "history is rewritten at <think>",
    "diffusion_gemma": "generation prompt lacks <|turn>model",
    **dict.fromkeys(NEMOTRON, "history is rewritten at </think>"),
}
REASONING_PROVEN = {
    *("diffusion_gemma", "gemma4_v5", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "muse_glimmer"),
    *("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe", *OPENED),
}


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' `strftime_now` on the day that our renders have."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(CLOCK.year, CLOCK.month, CLOCK.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@lru_cache
def template_of(stem: str) -> ChatTemplate:
    text = stock_text(stem)
    tokenizer = byte_tokenizer(text)
    return ChatTemplate.of(
        tokenizer, stop_ids=[tokenizer.vocab[word] for word in TOOL_STOPS if word in tokenizer.vocab]
    )


def encode(stem: str, conversation: Conversation, options: MaskOptions) -> list[Encoded | Refusal]:
    template = template_of(stem)
    return template.encode([trimmed(conversation, template.trimmed_roles)], options)


def assert_proven(stem: str, conversation: Conversation, turns: Sequence[int] | None = None) -> None:
    options = MaskOptions(train_on=TrainOn.all if turns is None else TrainOn.last)
    (found,) = encode(stem, conversation, options)
    assert isinstance(found, Encoded), found
    template = template_of(stem)
    assert_mask(
        template.tokenizer,
        trimmed(conversation, template.trimmed_roles),
        found.ids.tolist(),
        found.weights.tolist(),
        marker_of(stem),
        turns=turns,
        parts=stem in VISION,
        behind=None if stem in OPENED else UNWRITTEN.get(stem, ""),
    )


def assert_refused(stem: str, conversation: Conversation, reason: str) -> None:
    (found,) = encode(stem, conversation, MaskOptions())
    assert isinstance(found, Refusal), "expected a refusal"
    assert found.reason == reason
    assert len(found.detail) > 20


@pytest.mark.parametrize("stem", STOCK)
@pytest.mark.parametrize("conversation", PLAIN, ids=lambda c: c.id)
def test_plain_conversations(stem: str, conversation: Conversation) -> None:
    reason = None
    if conversation in (MULTI, ECHO):
        reason = EVERY_TURN.get(stem)
    if conversation is SYSTEM:
        reason = SYSTEM_ROLE.get(stem)
    if reason is None:
        assert_proven(stem, conversation)
    else:
        assert_refused(stem, conversation, reason)


@pytest.mark.parametrize("stem", STOCK)
def test_the_last_turn_is_proven_where_history_is_rewritten(stem: str) -> None:
    assert_proven(stem, MULTI, turns=[2])


@pytest.mark.parametrize("stem", STOCK)
def test_expanded_turns_are_the_prompt_of_inference_and_the_completion(stem: str) -> None:
    template = template_of(stem)
    found = encode(stem, MULTI, MaskOptions(expand_turns=True))
    assert [entry.id for entry in found] == ["multi#0", "multi#1", "multi#2"]
    for turn, entry in enumerate(found):
        assert isinstance(entry, Encoded), entry
        ((start, end),) = runs(entry.weights.tolist())
        assert entry.ids[:start].tolist() == template.encode_prompt(MULTI.messages[: 2 * turn + 1])
        assert template.tokenizer.decode(entry.ids[start:end]).endswith(
            MULTI.messages[2 * turn + 1].content + marker_of(stem)
        )


@pytest.mark.parametrize("stem", sorted(NEMOTRON))
@pytest.mark.parametrize("conversation", PLAIN, ids=lambda c: c.id)
def test_a_template_argument_changes_the_generation_prompt(stem: str, conversation: Conversation) -> None:
    template = ChatTemplate.of(template_of(stem).tokenizer, arguments={"enable_thinking": False})
    conversation = trimmed(conversation, template.trimmed_roles)
    (found,) = template.encode([conversation], MaskOptions())
    assert isinstance(found, Encoded), found
    assert_mask(
        template.tokenizer,
        conversation,
        found.ids.tolist(),
        found.weights.tolist(),
        marker_of(stem),
        enable_thinking=False,
    )


@pytest.mark.parametrize("stem", STOCK)
def test_tools_and_tool_calls(stem: str) -> None:
    """Each name and each argument is in the trained text, or the row is refused: no field is lost (S25)."""
    if stem in TOOLS_PROVEN:
        assert_proven(stem, TOOLS)
        (found,) = encode(stem, TOOLS, MaskOptions())
        assert isinstance(found, Encoded)
        start, end = runs(found.weights.tolist())[0]
        call = template_of(stem).tokenizer.decode(found.ids[start:end])
        assert "get_weather" in call
        assert "old" in call
        assert "town" in call
        assert "days" in call
        return
    (refusal,) = encode(stem, TOOLS, MaskOptions())
    assert isinstance(refusal, Refusal)
    expected = TOOLS_REWRITTEN.get(stem)
    if expected is not None:
        assert refusal.reason == expected
    else:
        assert refusal.reason.startswith(("template drops the", "refused by the template ("))


@pytest.mark.parametrize("stem", STOCK)
def test_reasoning(stem: str) -> None:
    if stem in REASONING_PROVEN:
        assert_proven(stem, REASONING)
        return
    (refusal,) = encode(stem, REASONING, MaskOptions())
    assert isinstance(refusal, Refusal)
    # Qwen3.5 without thinking closes the reasoning in its generation prompt, so there is no place for any.
    known = {"qwen3_5_nothink": "generation prompt adds </think>"}
    assert refusal.reason == known.get(stem, "template drops the reasoning of the last assistant turn")


# Where a tag of trl's *_training.jinja and our span differ: what the tag has more, before and behind.
WHITE_SPACE = "the line feed behind the marker is written by the template, the model has stopped before it"
THINKING = "`<think>` stands in the generation prompt: it is sent, not emitted"
MORE_BEFORE = {
    "gptoss": ("<|start|>assistant", "the header is the generation prompt: it is sent, not emitted"),
    "muse_glimmer": ("<|start|>assistant", "the header is the generation prompt: it is sent, not emitted"),
    "qwen2_5": ("\n", "the line feed of the header is in the generation prompt"),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", THINKING),
    "qwen3_5_think": ("<think>\n", THINKING),
    "qwen3_6": ("<think>\n", THINKING),
    "qwen3_8": ("<think>\n", THINKING),
    **dict.fromkeys(NEMOTRON, ("<think>\n", THINKING)),
}
MORE_BEHIND = {"phi3": "\n<|eos|>", "phi3_5": "\n<|eos|>"}  # the model has ended its turn with <|end|>
# transformers gives a token that straddles the border of a tag to the tag: here the header's line feed, merged with
# those that the answer begins with.
STRADDLES = {"lfm2", "lfm2_v2", "phi3", "phi3_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"}
# transformers ends a tag at the first token of its last character: the other bytes of "﷽" get no loss.
CUT_CHARACTER = {("diffusion_gemma", "unicode")}


@pytest.mark.parametrize("stem", TAGGED)
def test_spans_equal_the_hand_set_tags(stem: str) -> None:
    """Found on the stock template, compared with `return_assistant_tokens_mask` on the tagged one."""
    tokenizer = byte_tokenizer(stock_text(stem) + tagged_text(stem))
    stops = [tokenizer.vocab[word] for word in TOOL_STOPS if word in tokenizer.vocab]
    template = ChatTemplate.of(tokenizer, stock_text(stem), stop_ids=stops)
    compared = 0
    for given in (*PLAIN, TOOLS, REASONING):
        conversation = trimmed(given, template.trimmed_roles)
        (found,) = template.encode([conversation], MaskOptions())
        if isinstance(found, Refusal):
            continue
        messages = dicts(conversation.messages, parts=stem in VISION)
        shared = {"tools": list(conversation.tools) or None, "chat_template": tagged_text(stem)}
        if tokenizer.apply_chat_template(messages, tokenize=False, **shared) != tokenizer.decode(found.ids):
            continue  # the tagged template renders another text
        tagged = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **shared)
        ours = _texts(template, found.ids.tolist(), found.weights.tolist())
        theirs = _texts(template, tagged["input_ids"], tagged["assistant_masks"])
        if (stem, conversation.id) in CUT_CHARACTER:
            assert "".join(theirs).rstrip() != "".join(ours)
            continue
        before = MORE_BEFORE.get(stem, ("", ""))[0]
        if given is SPACE and stem in STRADDLES:
            before = "\n"
        assert len(ours) == len(theirs)
        for i, (mine, tag) in enumerate(zip(ours, theirs, strict=True)):
            behind = MORE_BEHIND.get(stem, "") if i == len(ours) - 1 else ""
            assert tag.removesuffix(behind).rstrip() == (before + mine), WHITE_SPACE
        compared += 1
    assert compared > 0 or stem in ("deepseekv3", "deepseek_r1_distill")


def _texts(template: ChatTemplate, ids: Sequence[int], weights: Sequence[float]) -> list[str]:
    return [template.tokenizer.decode(ids[start:end]) for start, end in runs(weights)]


def test_no_stock_template_is_refused_always() -> None:
    assert {*OPENED, *UNWRITTEN, *EVERY_TURN, *SYSTEM_ROLE, *TOOLS_PROVEN, *REASONING_PROVEN} <= set(STOCK)
    assert len(STOCK) - len({*EVERY_TURN, *SYSTEM_ROLE}) >= 25
    assert {SINGLE, UNICODE} < set(PLAIN)
