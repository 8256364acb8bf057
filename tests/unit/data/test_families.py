"""Templates of our own that imitate each family's construct: what is trained is a literal beside each of them.

Further: prompts are those of serving, token by token; wrong ways to mask are seen rejected; nothing of a system, user
or tool message is ever supervised, and every character of what the assistant says is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sftdist.core.settings import Reasoning, TrainOn
from sftdist.data.mask import MaskOptions, Refusal, with_reasoning
from sftdist.data.schema import Conversation, Message
from sftdist.data.template import ChatTemplate
from sftdist.data.tokens import Sample, Tokens
from tests.tokenizers import BOS, control_words
from tests.unit.data.families.talks import FAMILIES, OPTIONS, TALKS, call, expectations, result, template_of, text_of
from tests.unit.data.stock import TOOL, assistant, dicts, system, talk, trimmed, user

CASES = [(family, case) for family in FAMILIES for case in expectations(family)]
HISTORY_REWRITTEN = ("command_a", "deepseek_r1", "gemma4", "gpt_oss", "nemotron", "qwen3", "qwen3_thinking")


def trained(family: str, given: Conversation, options: MaskOptions) -> list[str] | str:
    """The supervised texts, after every check of this file on the tokens; a refusal's reason."""
    template = template_of(family)
    conversation = trimmed(given, template.trimmed_roles)
    samples = template.samples(conversation, options)
    for sample in samples:
        if isinstance(sample, Refusal):
            return sample.reason
    texts = [text for sample in samples if isinstance(sample, Sample) for text in checked(template, sample)]
    assert_prompts(template, conversation, options, [sample for sample in samples if isinstance(sample, Sample)])
    return texts


def checked(template: ChatTemplate, sample: Sample) -> list[str]:
    """The tokens of each span, decoded; they are those of the span's text, and end with a token that stops."""
    (tokens,) = template.tokenise([sample])
    assert isinstance(tokens, Tokens), tokens
    found = [template.tokenizer.decode(tokens.ids[start:end]) for start, end in tokens.ranges]
    assert found == [sample.text[span.start : span.end] for span in sample.spans]
    assert all(tokens.ids[end - 1] in template.stop_ids for _, end in tokens.ranges)
    return found


def assert_prompts(
    template: ChatTemplate, conversation: Conversation, options: MaskOptions, samples: Sequence[Sample]
) -> None:
    """What precedes a span is what serving sends: the same text; the same tokens where it is the sample's first."""
    spoken = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    tools = () if "tools" in options.allow_unrendered else conversation.tools
    for sample in samples:
        (tokens,) = template.tokenise([sample])
        assert isinstance(tokens, Tokens)
        for place, (span, (start, _)) in enumerate(zip(sample.spans, tokens.ranges, strict=True)):
            messages = with_reasoning(conversation.messages[: spoken[span.turn] + 1], options.reasoning)[:-1]
            sent = template.encode_prompt(messages, tools)
            assert template.tokenizer.decode(tokens.ids[:start]) == template.tokenizer.decode(sent)
            assert place > 0 or tokens.ids[:start] == sent


@pytest.mark.parametrize(("family", "case"), CASES)
def test_supervised_text(family: str, case: str) -> None:
    name, _, option = case.partition(", ")
    assert trained(family, TALKS[name], OPTIONS[option or "all"]) == expectations(family)[case]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_turn_alone(family: str) -> None:
    """Proven wherever one text of every turn or one text for every turn is."""
    every = expectations(family).get("turns, expand", expectations(family)["turns"])
    assert trained(family, TALKS["turns"], OPTIONS["last"]) == every[-1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_of_the_template_in_a_text(family: str) -> None:
    """In the text of a user any control word may stand, in an answer those that end no turn."""
    own = [word for word in control_words(text_of(family)) if word != BOS]
    answer = "Write [INST] or ### Response: and USER: or <|unknown|> there."
    given = talk("markers", user(" ".join(own)), assistant(answer))
    assert trained(family, given, MaskOptions()) == [expectations(family)["single"][0].replace("Hi there.", answer)]


@pytest.mark.parametrize("family", ["llama2", "qwen3", "glm45", "deepseek_r1"])
def test_turns_of_20_000_characters(family: str) -> None:
    answer = "word é " * 2900 + "end"
    given = talk("long", user("x " * 10_000), assistant(answer))
    assert trained(family, given, MaskOptions()) == [expectations(family)["single"][0].replace("Hi there.", answer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_train_flags_and_weights(family: str) -> None:
    """Exactly the spans of the turns that are wanted, each with its weight."""
    template = template_of(family)
    weighted = talk(
        "weighted",
        *(user("One"), assistant("two", weight=0.5)),
        *(user("Three"), assistant("four", train=True, weight=0.0)),
        *(user("Five"), assistant("six", train=True, weight=2.5)),
        *(user("Seven"), assistant("eight", train=False)),
    )
    every = "turns" if isinstance(expectations(family)["turns"], list) else "turns, expand"
    expand = every != "turns"
    two, six = expectations(family)[every][0], expectations(family)[every][2]
    for train_on, wanted in ((TrainOn.all, {two: 0.5, six: 2.5}), (TrainOn.flagged, {six: 2.5})):
        entries = template.encode([weighted], MaskOptions(train_on=train_on, expand_turns=expand))
        assert not any(isinstance(entry, Refusal) for entry in entries), entries
        found: dict[str, float] = {}
        for entry in entries:
            assert not isinstance(entry, Refusal)
            assert entry.weights.dtype == np.float32
            for weight in sorted(set(entry.weights.tolist()) - {0.0}):
                text = template.tokenizer.decode(entry.ids[entry.weights == np.float32(weight)])
                found[text] = weight
        assert found == wanted
    assert trained(family, weighted, MaskOptions(train_on=TrainOn.last)) == "nothing to train"


def test_names_of_functions_that_a_template_takes_from_the_ids() -> None:
    """Kimi K2 renders the id of a call, and no other name of the function."""
    named = call("functions.get_weather:0", city="Bonn")
    given = talk("named", user("Weather?"), assistant("", tool_calls=(named,)), tools=[TOOL])
    emitted = '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Bonn"}<|tool_call_end|>'
    expected = f"<|tool_calls_section_begin|>{emitted}<|tool_calls_section_end|><|im_end|>"
    assert trained("kimi_k2", given, MaskOptions()) == [expected]


# --- wrong ways to mask, judged by the same literals ------------------------------------------------------


def mask_of_end_tokens(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """Every token but those that are also padding or a stop (S10)."""
    (entry,) = template.encode([conversation], MaskOptions())
    assert not isinstance(entry, Refusal)
    weights = [0.0 if i in template.stop_ids else w for i, w in zip(entry.ids, entry.weights, strict=True)]
    return _runs(template, entry.ids.tolist(), weights)


def mask_by_prefixes(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """Differences of rendered prefixes, on the full render, unchecked (S2)."""
    render = template.tokenizer.apply_chat_template
    shared = {"tokenize": True, "return_dict": False}
    messages = dicts(conversation.messages)
    ids = render(messages, **shared)
    weights = [0.0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(render(messages[:i], add_generation_prompt=True, **shared))
            end = len(render(messages[: i + 1], **shared))
            weights[start:end] = [1.0] * (min(end, len(ids)) - start)
    return _runs(template, ids, weights[: len(ids)])


def mask_by_search(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """The first place where an answer's text stands, up to the template's marker."""
    text = template.render(conversation.messages)
    found = []
    for message in conversation.messages:
        if message.role == "assistant":
            start = text.index(message.content)
            marker = template.stop_text or ""
            found.append(text[start : text.index(marker, start) + len(marker)])
    return found


def _runs(template: ChatTemplate, ids: Sequence[int], weights: Sequence[float]) -> list[str]:
    marks = "".join("x" if weight > 0 else "." for weight in weights)
    return [template.tokenizer.decode(ids[run.start() : run.end()]) for run in re.finditer("x+", marks)]


@pytest.mark.parametrize(
    ("masker", "family", "conversation"),
    [
        (mask_of_end_tokens, "phi4", TALKS["turns"]),
        (mask_by_prefixes, "qwen3", TALKS["turns"]),
        (mask_by_prefixes, "nemotron", TALKS["turns"]),
        (mask_by_prefixes, "deepseek_r1", TALKS["single"]),
        (mask_by_prefixes, "glm4", TALKS["single"]),
        (mask_by_prefixes, "llama3_always_prompts", TALKS["single"]),
        (mask_by_search, "phi4", talk("echo", user("two or three?"), assistant("two"))),
    ],
)
def test_wrong_masks_differ_from_what_is_to_be_trained(
    masker: Callable[[ChatTemplate, Conversation], list[str]], family: str, conversation: Conversation
) -> None:
    expanded = trained(family, conversation, OPTIONS["expand"])
    assert isinstance(expanded, list)
    assert masker(template_of(family), conversation) != expanded


def test_the_wrong_masks_are_right_where_nothing_is_rewritten() -> None:
    """So the literals reject them for what they do wrong."""
    for masker in (mask_by_prefixes, mask_by_search):
        assert masker(template_of("phi4"), TALKS["turns"]) == expectations("phi4")["turns"]


@pytest.mark.parametrize("family", HISTORY_REWRITTEN)
def test_rewritten_history_says_what_helps(family: str) -> None:
    (refused,) = template_of(family).samples(TALKS["turns"], MaskOptions())
    assert isinstance(refused, Refusal)
    assert refused.turn == 0
    assert "data.train_on=last or data.expand_turns=true" in refused.detail
    assert "two" in refused.detail


# --- whatever is said ------------------------------------------------------------------------------------

# Letters of several scripts, marks that combine, line ends, quotes, brackets; words of one conversation never meet
# in another, so that a leak is seen.
TEXTS = st.text(st.sampled_from("abz éßшשع東🗼\u0301\u200d \n\t\"'\\{}<>|/[]#:"), max_size=40)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    number = iter(range(100))

    def said(mark: str) -> str:
        return f"{mark}{next(number)}q{draw(TEXTS)}q{mark}"

    messages = [system(said("SYS"))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(said("USR")))
        if draw(st.integers(0, 3)) == 0:
            calls = (call("abcdefgh1", city=said("CALL"), at={"nested": [said("CALL"), 7]}),)
            messages.append(assistant("" if draw(st.booleans()) else said("ANS"), tool_calls=calls))
            messages.append(result(said("TOOL"), "abcdefgh1"))
        reasoning = said("THINK") if draw(st.integers(0, 2)) == 0 else None
        messages.append(assistant(said("ANS"), reasoning=reasoning))
    calling = any(message.tool_calls for message in messages)
    return talk("random", *messages, tools=[TOOL] if calling else [])


@given(
    conversation=conversations(),
    family=st.sampled_from(FAMILIES),
    reasoning=st.sampled_from(Reasoning),
    expand=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_only_the_assistant_is_supervised_and_all_of_it(
    conversation: Conversation, family: str, reasoning: Reasoning, expand: bool
) -> None:
    assert_only_the_assistant(conversation, family, MaskOptions(reasoning=reasoning, expand_turns=expand))


@pytest.mark.long
@given(
    conversation=conversations(),
    family=st.sampled_from(FAMILIES),
    reasoning=st.sampled_from(Reasoning),
    expand=st.booleans(),
)
@settings(max_examples=5000, deadline=None)
def test_only_the_assistant_is_supervised_and_all_of_it_on_many(
    conversation: Conversation, family: str, reasoning: Reasoning, expand: bool
) -> None:
    assert_only_the_assistant(conversation, family, MaskOptions(reasoning=reasoning, expand_turns=expand))


def assert_only_the_assistant(conversation: Conversation, family: str, options: MaskOptions) -> None:
    template = template_of(family)
    conversation = trimmed(conversation, template.trimmed_roles)
    samples = template.samples(conversation, options)
    assume(not any(isinstance(sample, Refusal) for sample in samples))
    spoken = [m for m in conversation.messages if m.role == "assistant"]
    turns: list[int] = []
    for sample in samples:
        assert isinstance(sample, Sample)
        for span, text in zip(sample.spans, checked(template, sample), strict=True):
            turns.append(span.turn)
            message = with_reasoning_of(conversation, span.turn, options)
            assert not re.search(r"(SYS|USR|TOOL)\d+q", text)
            marks = re.findall(r"((?:CALL|ANS|THINK)\d+)q", text)
            assert set(marks) <= set(re.findall(r"((?:CALL|ANS|THINK)\d+)q", repr(message))), "of another turn"
            assert message.content in text
            assert (message.reasoning or "").strip() in text
            for made in message.tool_calls:
                at = made["function"]["arguments"]
                for value in (at["city"], at["at"]["nested"][0]):
                    escaped = json.dumps(value, ensure_ascii=False)[1:-1]
                    assert value in text or escaped in text or json.dumps(value)[1:-1] in text
    assert turns == list(range(len(spoken)))


def with_reasoning_of(conversation: Conversation, turn: int, options: MaskOptions) -> Message:
    """Assistant turn `turn` as it is to be trained under these options."""
    places = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    end = places[turn] + 1 if options.expand_turns else len(conversation.messages)
    return with_reasoning(conversation.messages[:end], options.reasoning)[places[turn]]
