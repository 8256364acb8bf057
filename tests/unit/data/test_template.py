"""The chat template: loading, options, BOS and EOS, tokens at the borders, what is lost, what is saved."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sftdist.core.errors import ConfigError
from sftdist.core.settings import Reasoning, TrainOn
from sftdist.data.schema import Conversation
from sftdist.data.template import ChatTemplate, Encoded, MaskOptions, Refusal
from tests.tokenizers import BOS, byte_tokenizer
from tests.unit.data.stock import (
    CALL,
    MULTI,
    REASONING,
    SINGLE,
    SPACE,
    TOOL,
    TOOLS,
    UNICODE,
    assistant,
    dicts,
    runs,
    stock_text,
    system,
    talk,
    trimmed,
    user,
)

CHATML_WORDS = ["<|im_start|>", "<|im_end|>"]
ALL = MaskOptions()


def chatml(**options: Any) -> ChatTemplate:
    return ChatTemplate.of(byte_tokenizer(specials=CHATML_WORDS, **options), "chatml")


def encoded(template: ChatTemplate, conversation: Conversation, options: MaskOptions = ALL) -> Encoded:
    (found,) = template.encode([conversation], options)
    assert isinstance(found, Encoded), found
    return found


def refusal(template: ChatTemplate, conversation: Conversation, options: MaskOptions = ALL) -> Refusal:
    (found,) = template.encode([conversation], options)
    assert isinstance(found, Refusal), "expected a refusal"
    return found


def trained(template: ChatTemplate, conversation: Conversation, options: MaskOptions = ALL) -> list[str]:
    found = encoded(template, conversation, options)
    return [template.tokenizer.decode(found.ids[a:b]) for a, b in runs(found.weights.tolist())]


# --- loading ------------------------------------------------------------------------------------------


def test_a_base_model_without_a_template_gets_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*model\.chat_template=chatml\|llama3\|FILE"):
        ChatTemplate.of(byte_tokenizer(), None, name="base")


@pytest.mark.parametrize("given", ["chatml", "llama3"])
def test_built_in_templates_are_proven(given: str) -> None:
    template = ChatTemplate.of(byte_tokenizer(specials=[*CHATML_WORDS, "<|eot_id|>"]), given)
    space = trimmed(SPACE, template.trimmed_roles)
    assert [len(trained(template, c)) for c in (SINGLE, MULTI, UNICODE, space)] == [1, 3, 1, 1]
    assert refusal(template, TOOLS).reason.startswith("template drops")


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text(stock_text("gemma"), encoding="utf-8")
    byte_tokenizer(stock_text("gemma")).save_pretrained(tmp_path / "tokenizer")
    template = ChatTemplate.load(str(tmp_path / "tokenizer"), chat_template=str(file))
    assert trained(template, SINGLE) == ["Hi there.<end_of_turn>"]
    assert trained(ChatTemplate.load(str(tmp_path / "tokenizer")), SINGLE) == ["Hi there.<end_of_turn>"]


@pytest.mark.parametrize(
    ("path", "chat_template", "message"),
    [
        ("nowhere", None, r"model\.path=.*nowhere: no tokenizer could be loaded.*required.*correct"),
        ("tokenizer", "missing.jinja", r"model\.chat_template=missing\.jinja: .*required is chatml\|llama3"),
        ("tokenizer", "{% for x %}", r"not valid jinja"),
    ],
)
def test_config_errors_have_three_parts(tmp_path: Path, path: str, chat_template: str | None, message: str) -> None:
    byte_tokenizer("x").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=message):
        ChatTemplate.load(str(tmp_path / path), chat_template=chat_template)


def test_stop_ids_of_the_generation_config_are_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(stock_text("gptoss"))
    tokenizer.save_pretrained(tmp_path)
    assert "generation_config.json" in refusal(ChatTemplate.load(str(tmp_path)), TOOLS).detail
    call = tokenizer.convert_tokens_to_ids("<|call|>")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{call}]}}', encoding="utf-8")
    assert trained(ChatTemplate.load(str(tmp_path)), TOOLS)[0].endswith("<|call|>")


def test_saved_and_loaded_again_the_same_rows_are_trained(tmp_path: Path) -> None:
    """S11: the exact training template travels with the tokenizer."""
    template = chatml()
    template.save(tmp_path)
    again = ChatTemplate.load(str(tmp_path))
    assert again.text == template.text
    assert encoded(again, MULTI).ids.tolist() == encoded(template, MULTI).ids.tolist()
    plain = AutoTokenizer.from_pretrained(str(tmp_path))
    ids = plain.apply_chat_template(dicts(MULTI.messages), tokenize=True, return_dict=False)
    assert ids == encoded(template, MULTI).ids.tolist()


def test_the_given_tokenizer_is_not_changed() -> None:
    tokenizer = byte_tokenizer(specials=CHATML_WORDS)
    ChatTemplate.of(tokenizer, "chatml")
    assert tokenizer.chat_template is None


# --- which turns ----------------------------------------------------------------------------------------


def test_train_on_and_flags() -> None:
    template = chatml()
    flagged = talk("f", user("a"), assistant("1"), user("b"), assistant("2", train=True), user("c"), assistant("3"))
    unset = talk("u", user("a"), assistant("1", train=False), user("b"), assistant("2"))
    assert trained(template, MULTI) == ["two<|im_end|>", "four<|im_end|>", "six<|im_end|>"]
    assert trained(template, MULTI, MaskOptions(train_on=TrainOn.last)) == ["six<|im_end|>"]
    assert trained(template, flagged, MaskOptions(train_on=TrainOn.flagged)) == ["2<|im_end|>"]
    assert trained(template, unset) == ["2<|im_end|>"]
    assert refusal(template, MULTI, MaskOptions(train_on=TrainOn.flagged)).reason == "nothing to train"
    off = talk("o", user("a"), assistant("1", weight=0.0))
    assert refusal(template, off).reason == "nothing to train"


def test_weights_are_those_of_the_message() -> None:
    found = encoded(chatml(), talk("w", user("a"), assistant("1", weight=0.5), user("b"), assistant("2")))
    assert found.ids.dtype == np.int32
    assert found.weights.dtype == np.float32
    assert [found.weights[a:b].tolist() for a, b in runs(found.weights.tolist())] == [[0.5, 0.5], [1.0, 1.0]]


def test_one_refused_row_does_not_touch_the_others() -> None:
    found = chatml().encode([SINGLE, REASONING, MULTI], ALL)
    assert [type(entry) for entry in found] == [Encoded, Refusal, Encoded]
    assert [entry.id for entry in found] == ["single", "reasoning", "multi"]


# --- reasoning ------------------------------------------------------------------------------------------


def test_reasoning_keep_last_drop() -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text("qwen3_8")))
    both = talk("r", user("a"), assistant("1", reasoning="first"), user("b"), assistant("2", reasoning="second"))
    found = {mode: "".join(trained(template, both, MaskOptions(reasoning=mode))) for mode in Reasoning}
    assert [("first" in found[m], "second" in found[m]) for m in Reasoning] == [(1, 1), (0, 1), (0, 0)]


def test_reasoning_that_history_drops_is_refused_unless_turns_are_expanded() -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text("qwen3")))
    both = talk("r", user("a"), assistant("1", reasoning="first"), user("b"), assistant("2", reasoning="second"))
    assert refusal(template, both).reason == "history is rewritten at <think>"
    first, second = template.encode([both], MaskOptions(expand_turns=True))
    assert isinstance(first, Encoded)
    assert isinstance(second, Encoded)
    assert "first" in template.tokenizer.decode(first.ids)
    assert "first" not in template.tokenizer.decode(second.ids)  # as the serving engine sends it
    assert "second" in template.tokenizer.decode(second.ids)


def test_thinking_inside_the_content_is_refused_where_the_template_moves_it() -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text("qwen3")))
    moved = refusal(template, talk("t", user("a"), assistant("<think>hm</think>b")))
    assert moved.reason == "content is not in the rendered turn"
    assert "reasoning_content" in moved.detail


# --- BOS, EOS -------------------------------------------------------------------------------------------


def test_one_bos_where_template_and_tokenizer_both_bring_one() -> None:
    """S12."""
    template = ChatTemplate.of(byte_tokenizer(specials=["<|eot_id|>"], prepend_bos=True), "llama3")
    assert template.tokenizer("x").input_ids[0] == template.bos_token_id
    ids = encoded(template, MULTI).ids.tolist()
    assert ids.count(template.bos_token_id) == 1
    assert ids[0] == template.bos_token_id
    prompt = template.encode_prompt(MULTI.messages[:1])
    assert ids[: len(prompt)] == prompt


def test_no_bos_where_the_template_renders_none() -> None:
    """As apply_chat_template(tokenize=True) decides, and the serving engines with it."""
    template = chatml(prepend_bos=True)
    ids = encoded(template, SINGLE).ids.tolist()
    assert template.bos_token_id not in ids
    messages = dicts(SINGLE.messages)
    assert template.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == ids


def test_a_template_with_two_bos_and_a_row_with_one_are_refused() -> None:
    twice = ChatTemplate.of(byte_tokenizer(specials=CHATML_WORDS), "{{ bos_token }}{{ bos_token }}" + chatml().text)
    assert refusal(twice, SINGLE).reason == "BOS twice"
    assert refusal(chatml(), talk("b", user(f"what is {BOS}?"), assistant("x"))).reason == "BOS inside a message"


def test_a_template_may_begin_every_exchange_with_bos() -> None:
    """Llama 2's does; where BOS stands is the template's choice."""
    llama2 = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate.of(byte_tokenizer(specials=[]), llama2)
    assert encoded(template, MULTI).ids.tolist().count(template.bos_token_id) == 3
    assert trained(template, MULTI) == [" two <|eos|>", " four <|eos|>", " six <|eos|>"]


def test_the_end_is_trained_when_padding_is_the_same_token() -> None:
    """S10: nothing is masked by token id."""
    template = chatml(pad="<|im_end|>")
    assert template.tokenizer.pad_token_id == template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert trained(template, SINGLE) == ["Hi there.<|im_end|>"]


def test_a_template_without_an_end_is_refused() -> None:
    """S10."""
    endless = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    found = refusal(ChatTemplate.of(byte_tokenizer(specials=[]), endless), SINGLE)
    assert found.reason == "no end-of-turn marker"
    assert "model.chat_template" in found.detail


def test_the_marker_may_be_several_tokens() -> None:
    template = ChatTemplate.of(byte_tokenizer(specials=[]), "chatml")
    assert trained(template, MULTI) == ["two<|im_end|>", "four<|im_end|>", "six<|im_end|>"]
    assert template.stop_text == "<|im_end|>"
    assert template.stop_ids == (template.tokenizer.eos_token_id,)  # "|>" alone must not stop anything


def test_stop_ids_hold_the_marker_and_eos() -> None:
    template = chatml()
    names = {template.tokenizer.convert_ids_to_tokens(i) for i in template.stop_ids}
    assert names == {"<|im_end|>", "<|eos|>"}


# --- tokens at the borders --------------------------------------------------------------------------------


def test_leading_white_space_is_not_merged_with_the_header() -> None:
    """The prompt is tokenised alone at inference, so the header's line feed is no part of the answer's first token."""
    template = chatml()
    found = encoded(template, SPACE)
    ((start, _),) = runs(found.weights.tolist())
    assert found.ids[:start].tolist() == template.encode_prompt(SPACE.messages[:1])
    assert trained(template, SPACE) == ["\n\n  indented\n    code \n\n<|im_end|>"]
    whole = template.ids(template.render(SPACE.messages))
    assert whole != found.ids.tolist()  # the tokenizer would have merged them


def test_the_prompt_has_the_tokens_that_it_has_alone() -> None:
    """GPT-2's pattern splits the "\\n\\n" of Llama 3's header before a word and keeps it whole at the end of a text."""
    template = ChatTemplate.of(byte_tokenizer(stock_text("llama3")))
    found = encoded(template, MULTI, MaskOptions(train_on=TrainOn.last))
    ((start, _),) = runs(found.weights.tolist())
    assert found.ids[:start].tolist()[-3:] == template.encode_prompt(MULTI.messages[:5])[-3:]
    assert template.ids(template.render(MULTI.messages)) != found.ids.tolist()


def test_a_marker_that_swallows_the_white_space_behind_it() -> None:
    """Phi-3's `<|end|>` and `<|assistant|>` are added tokens with rstrip."""
    tokenizer = byte_tokenizer(stock_text("phi3"), rstrip=["<|end|>", "<|assistant|>", "<|user|>"])
    template = ChatTemplate.of(tokenizer)
    assert trained(template, MULTI) == ["two<|end|>", "four<|end|>", "six<|end|>"]
    assert trained(template, SPACE) == ["\n\n  indented\n    code \n\n<|end|>"]


def test_a_tokenizer_that_cannot_be_cut_is_refused() -> None:
    """SentencePiece puts a space before each piece: the answer would begin with one that nobody wrote."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz:.", ":b"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>"])
    joined = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    joined += "{% if add_generation_prompt %}assistant:{% endif %}"
    template = ChatTemplate.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), joined)
    assert trained(template, talk("a", user("q"), assistant("abc"))) == ["abc</s>"]
    found = refusal(template, talk("b", user("q"), assistant("bcd")))
    assert found.reason == "tokens cross the border of a span"


def test_a_tokenizer_that_composes_characters() -> None:
    """Qwen's normalises to NFC: the decoded answer is the composed one, and that is proven."""
    backend = Tokenizer.from_str(byte_tokenizer(specials=CHATML_WORDS).backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    template = ChatTemplate.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>"), "chatml")
    assert trained(template, talk("n", user("e\u0301"), assistant("e\u0301 o"))) == ["\u00e9 o<|im_end|>"]


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    backend = Tokenizer.from_str(byte_tokenizer(specials=CHATML_WORDS).backend_tokenizer.to_str())
    backend.decoder = None
    template = ChatTemplate.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>"), "chatml")
    found = refusal(template, talk("n", user("a b"), assistant("a b")))
    assert found.reason == "tokens do not decode to the text"
    assert "'a b<|im_end|>'" in found.detail


# --- nothing is lost (S25) --------------------------------------------------------------------------------


def test_every_dropped_field_is_named() -> None:
    drops_system = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + chatml().text
    template = ChatTemplate.of(byte_tokenizer(specials=CHATML_WORDS), drops_system)
    rows = {
        "the content of a system message": talk("s", system("x"), user("a"), assistant("b")),
        "the list of tools": talk("t", user("a"), assistant("b"), tools=[TOOL]),
        "the name of a tool call": talk("c", user("a"), assistant("b", tool_calls=(CALL,))),
        "the reasoning of the last assistant turn": talk("r", user("a"), assistant("b", reasoning="c")),
    }
    for what, row in rows.items():
        assert refusal(template, row).reason == f"template drops {what}"


def test_a_call_of_which_an_argument_is_lost_is_refused() -> None:
    """The structure is supported, this row's second argument is not rendered."""
    lossy = stock_text("qwen2_5").replace(
        "{{- tool_call.arguments | tojson }}",
        "{{- dict(tool_call.arguments, days=0) | tojson }}",
    )
    assert lossy != stock_text("qwen2_5")
    template = ChatTemplate.of(byte_tokenizer(lossy))
    assert refusal(template, TOOLS).reason == "tool call is not in the rendered turn"
    assert "'2'" in refusal(template, TOOLS).detail


def test_changed_content_is_refused() -> None:
    shouting = chatml().text.replace("message['content']", "(message['content'] | replace('there', 'THERE'))")
    template = ChatTemplate.of(byte_tokenizer(specials=CHATML_WORDS), shouting)
    assert refusal(template, SINGLE).reason == "content is not in the rendered turn"
    assert (
        refusal(template, talk("u", user("there"), assistant("x"))).reason == "template drops text of the user message"
    )


# --- what others build on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["qwen2_5", "llama3_1", "gemma3", "lfm2_v2", "idefics3"])
def test_renders_are_those_of_transformers(stem: str) -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text(stem)))
    for conversation in (SINGLE, MULTI, UNICODE, SPACE):
        messages = dicts(conversation.messages, parts=stem == "idefics3")
        for prompt in (False, True):
            given = messages[:-1] if prompt else messages
            ours = template.render(conversation.messages[: len(given)], add_generation_prompt=prompt)
            theirs = template.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=prompt)
            assert ours == theirs


def test_a_template_that_prints_the_date_is_rendered_the_same_every_day() -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text("llama3_2")))
    assert "Today Date: 26 Jul 2024" in template.render(SINGLE.messages)


def test_pickled_threaded_forked() -> None:
    template = chatml()
    expected = encoded(template, MULTI).ids.tolist()
    assert encoded(pickle.loads(pickle.dumps(template)), MULTI).ids.tolist() == expected
    with ThreadPoolExecutor(4) as pool:
        assert all(ids == expected for ids in pool.map(lambda _: encoded(template, MULTI).ids.tolist(), range(32)))
    with multiprocessing.get_context("fork").Pool(1) as workers:
        assert workers.apply(_ids, (template,)) == expected


def _ids(template: ChatTemplate) -> list[int]:
    return encoded(template, MULTI).ids.tolist()


def test_fingerprint_changes_with_what_changes_the_ids() -> None:
    base = chatml().fingerprint()
    assert base == chatml().fingerprint()
    assert base == chatml(prepend_bos=True).fingerprint()  # post-processing is never used
    assert (
        base["template"] != ChatTemplate.of(byte_tokenizer(specials=CHATML_WORDS), "llama3").fingerprint()["template"]
    )
    assert (
        base["tokenizer"]
        != ChatTemplate.of(byte_tokenizer(specials=["<|im_end|>"]), "chatml").fingerprint()["tokenizer"]
    )
    argued = ChatTemplate.of(byte_tokenizer(specials=CHATML_WORDS), "chatml", arguments={"x": 1})
    assert base["template"] != argued.fingerprint()["template"]


def test_used_tokens_are_those_that_conversations_hold() -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text("llama3_1") + "{# <|unused|> #}"))
    names = {template.tokenizer.convert_ids_to_tokens(i) for i in template.used_token_ids()}
    assert {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", BOS} <= names
    assert "<|unused|>" not in names
