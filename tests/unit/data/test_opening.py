"""Prompts that begin the turn, white space that a template strips, prompts that are always there."""

from __future__ import annotations

import pytest

from sftdist.data.mask import MaskOptions, Refusal
from sftdist.data.opening import closer_of, find_opening
from sftdist.data.template import ChatTemplate
from sftdist.data.tokens import Sample
from tests.tokenizers import byte_tokenizer
from tests.unit.data.families.talks import FAMILIES, NESTED, TALKS, template_of
from tests.unit.data.stock import SPACE, TOOL, assistant, system, talk, user

EOT = "<|eot_id|>"


@pytest.mark.parametrize(
    ("prompt", "render", "reasoning", "expected"),
    [
        ("<A><think>\n", "<A>Hi", "", "\n</think>\n\nHi"),
        ("<A><think>\n", "<A>Hi", "Hm.", "Hm.\n</think>\n\nHi"),
        ("<A><think>", "<A>Hi", "", "</think>Hi"),
        ("<A>\n<think>\n", "<A>\n<think></think>Hi", "", "</think>Hi"),
        ("<A><think>\n", "<A><think>Hm.</think>Hi", "Hm.", "Hm.</think>Hi"),
        ("<A><think>", "<A></think>Hi", "", "</think>Hi"),
        ("<A><think></think>", "<A></think>Hi", "", "Hi"),
        ("<A><think></think>", "<A>Hi", "", "Hi"),
        ("<A><think>\n\n</think>\n\n", "<A>Hi", "", "Hi"),
        ("<A><|channel>thought\n<channel|>", "<A>Hi", "", "Hi"),
        ("<A>[THINK]", "<A>Hi", "", "[/THINK]Hi"),
        ("<A><|START_THINKING|>", "<A><|START_TEXT|>Hi", "", "<|END_THINKING|><|START_TEXT|>Hi"),
        # Not what serving would be answered with: thinking behind the block that the prompt has closed.
        ("<A><think></think>", "<A><think>Hm.</think>Hi", "Hm.", None),
        ("<A><|channel>thought\n", "<A>Hi", "", None),  # a block with a name, left open
        ("<A><bot>\n", "<A><bot>Hi", "", None),  # a header that is written in two ways
        ("<A>Here are my thoughts:\n", "<A>Hi", "", None),
        ("<A><|assistant|>", "<A>Hi", "", None),
        ("<B>", "<A>Hi", "", None),
    ],
)
def test_what_the_model_emits_after_a_prompt(prompt: str, render: str, reasoning: str, expected: str | None) -> None:
    opening = find_opening(prompt, render, 0)
    found = opening.continuation(render[opening.at :], reasoning) if opening else None
    assert found == expected


@pytest.mark.parametrize(
    ("unit", "closer"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<|channel>", "<channel|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|im_start|>", None),
        ("</think>", None),
        ("think", None),
    ],
)
def test_pairs_of_control_words(unit: str, closer: str | None) -> None:
    assert closer_of(unit) == closer


# --- the end of a turn ------------------------------------------------------------------------------------

ALWAYS = "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}<|head|>assistant\n"


def test_a_prompt_that_is_always_there_is_no_end_of_a_turn() -> None:
    """`<|eot_id|><|head|>` follows every turn, last or not; the model stops at the first of the two."""
    tokenizer = byte_tokenizer(specials=["<|head|>", EOT])
    template = ChatTemplate.of(tokenizer, ALWAYS, stop_ids=[tokenizer.vocab[EOT]])
    assert template.stop_text == EOT
    (unknown,) = ChatTemplate.of(tokenizer, ALWAYS).samples(TALKS["single"], MaskOptions())
    assert isinstance(unknown, Refusal)
    assert unknown.reason == "no end-of-turn marker"


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        ("glm4", {"<|user|>", "<|eos|>"}),
        ("glm45", {"<|user|>", "<|observation|>", "<|eos|>"}),
        ("vicuna_between", {"<|eos|>"}),
        ("phi3", {"<|end|>", "<|eos|>"}),
    ],
)
def test_what_ends_a_turn_ends_generation(family: str, stops: set[str]) -> None:
    """S11: published with the model, so that it stops where it was taught to."""
    template = template_of(family)
    assert set(template.tokenizer.convert_ids_to_tokens(list(template.stop_ids))) == stops
    assert stops - {"<|eos|>"} <= set(template.tokenizer.convert_ids_to_tokens(sorted(template.used_token_ids())))


def test_the_header_of_an_assistant_ends_no_turn() -> None:
    """GLM: an answer that another one follows would be taught to go on with the header."""
    (refused,) = template_of("glm4").samples(TALKS["twice"], MaskOptions())
    assert isinstance(refused, Refusal)
    assert "<|assistant|>" in refused.detail


def test_a_stop_inside_an_answer_is_refused() -> None:
    for text in ("one<|user|>two", "one<|observation|>two", "one<|eos|>two"):
        (refused,) = template_of("glm45").samples(talk("stop", user("a"), assistant(text)), MaskOptions())
        assert isinstance(refused, Refusal)
        assert refused.reason == "end-of-turn marker inside a message"


# --- white space ------------------------------------------------------------------------------------------

TRIMMED = {
    "command_r": {"system", "user", "assistant", "developer"},
    "gemma2": {"user", "assistant", "developer"},
    "gemma3": {"user", "assistant"},
    "gemma4": {"system", "user", "assistant", "developer"},
    "glm45": {"assistant"},
    "llama2": {"user", "assistant"},
    "llama31": {"system", "user", "assistant", "developer"},
    "llama3_always_prompts": {"system", "user", "assistant", "developer"},
    "nemotron": {"assistant"},
    "qwen3": {"assistant"},
    "qwen3_thinking": {"assistant"},
    "smollm3": {"assistant"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_whose_white_space_is_stripped(family: str) -> None:
    assert template_of(family).trimmed_roles == TRIMMED.get(family, set())


@pytest.mark.parametrize("family", ["gemma2", "nemotron", "llama31"])
def test_white_space_that_was_not_stripped_before_is_told(family: str) -> None:
    """Every character of an answer is trained or the row is refused; the rule `template_trim` takes them out."""
    (refused,) = template_of(family).samples(SPACE, MaskOptions())
    assert isinstance(refused, Refusal)
    assert refused.reason == "template strips white space of an answer"
    assert "data.normalise.template_trim=true" in refused.detail


def test_white_space_of_others_is_no_reason_to_refuse() -> None:
    messages = (system(" be brief "), user("\n hello\n"), assistant("Hi."))
    (found,) = template_of("llama31").samples(talk("padded", *messages, tools=[TOOL]), MaskOptions())
    assert isinstance(found, Sample)


def test_white_space_beside_a_call() -> None:
    calling = talk("call", user("Weather?"), assistant("I look. \n", tool_calls=(NESTED,)), tools=[TOOL])
    (found,) = template_of("qwen25").samples(calling, MaskOptions())
    assert isinstance(found, Sample)
    (refused,) = template_of("gemma4").samples(calling, MaskOptions())
    assert isinstance(refused, Refusal)
    assert refused.reason == "template strips white space of an answer"
