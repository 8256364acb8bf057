"""The tokenizer and the chat template: conversations become ids and proven loss weights.

A chat template is an input, not a trusted party. Each conversation is rendered once, in full; each assistant turn is
located by prefix renders (`spans`), proven against the message (`proof`) and against its own tokens (`tokens`). What
cannot be proven is a `Refusal` that names the construct; nothing is masked by token id, nothing is guessed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sftdist.core.errors import ConfigError
from sftdist.data.mask import Encoded, MaskOptions, Refusal, trained_turns, with_reasoning, without_field
from sftdist.data.message import Message
from sftdist.data.proof import prove_fields, prove_turn
from sftdist.data.render import (
    CALLING,
    CLOCK,
    PLAIN,
    Renderer,
    Shape,
    Unproven,
    Unrendered,
    as_dict,
    sentinel_messages,
    sentinel_tool,
)
from sftdist.data.schema import Conversation
from sftdist.data.spans import Closing, Locator, Span, find_closing
from sftdist.data.tokens import Encoder, Sample, Tokens
from sftdist.data.trimming import trimmed_roles

SPANS_VERSION = 2  # raise it when the same row would get other spans: stores made before are then made again
BUILT_IN = ("chatml", "llama3")


class ChatTemplate:
    """A tokenizer with its chat template. Picklable; safe to use from several threads and after a fork."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        arguments: Mapping[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.arguments, self._model_stops = dict(arguments or {}), tuple(stop_ids)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self._encoder = Encoder(tokenizer.backend_tokenizer, self.bos_token_id)
        try:
            self._renderer = Renderer(text, {**tokenizer.special_tokens_map, **self.arguments})
        except TemplateError as problem:
            given = f"model.chat_template: the template is not valid jinja: {problem}"
            raise ConfigError(f"{given}; correct it, or use model.chat_template=chatml|llama3|FILE") from problem
        self._frames: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.tokenizer, self.text, self.arguments, self._model_stops)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> ChatTemplate:
        """The tokenizer of a folder or Hub name. `ConfigError` without a tokenizer or without a template."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        except (OSError, ValueError, KeyError) as problem:
            given = f"model.path={path}: no tokenizer could be loaded ({str(problem).splitlines()[0]})"
            required = "a folder or Hub name with tokenizer.json and tokenizer_config.json"
            raise ConfigError(
                f"{given}; required is {required}; correct model.path or set model.tokenizer"
            ) from problem
        return cls.of(tokenizer, chat_template, arguments=arguments, stop_ids=_stop_ids_of(Path(path)), name=path)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
        name: str = "the tokenizer",
    ) -> ChatTemplate:
        """A tokenizer in memory; `chat_template` is chatml, llama3, a file or jinja text, else the tokenizer's own.

        `arguments` are further template variables, such as `enable_thinking`; `stop_ids` further tokens that end a
        turn (`eos_token_id` of the model's generation config).
        """
        if not tokenizer.is_fast:
            given = f"model.path={name}: {type(tokenizer).__name__} has no tokenizer.json"
            raise ConfigError(f"{given}; a fast tokenizer is required: save one with tokenizer.json beside it")
        text = _template_text(chat_template) if chat_template is not None else _own_template(tokenizer, name)
        if tokenizer.chat_template != text:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = text
        return cls(tokenizer, text, arguments, stop_ids)

    @cached_property
    def _closing(self) -> Closing | Unproven:
        stops = {*self._model_stops, self.tokenizer.eos_token_id}
        ends = self._end_tokens, [self._encoder.added[i] for i in stops if i in self._encoder.added]
        try:
            return find_closing(self._renderer, *ends)
        except Unproven as problem:
            found = problem
        try:  # a template of conversations with tools alone
            return find_closing(self._renderer, *ends, [sentinel_tool()])
        except Unproven:
            return found

    @property
    def stop_text(self) -> str | None:
        """What an assistant turn ends with; None when the template ends none. May be several tokens."""
        return self._closing.marker if isinstance(self._closing, Closing) else None

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end generation: the end-of-turn marker's, where it is a token, and the tokenizer's EOS."""
        stops = {*self._model_stops, self.tokenizer.eos_token_id}
        for marker in self._closing.markers if isinstance(self._closing, Closing) else ():
            last = self._encoder.ids(marker)[-1]
            stops |= {last} if last in self._encoder.added else set()
        return tuple(sorted(i for i in stops if i is not None))

    @cached_property
    def trimmed_roles(self) -> frozenset[str]:
        """The roles whose outer white space the template strips, whether always or in some turns only."""
        return trimmed_roles(self._renderer)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The rendered text. `Unproven` when the template refuses the conversation or drops a field of it.

        The reasoning of turns that are history may be dropped: what serving sends is what the template makes of it.
        """
        history = add_generation_prompt
        dialect = self._renderer.dialect(messages, tools=bool(tools), prompt=history, without_reasoning=history)
        dicts = [as_dict(message, dialect) for message in messages]
        return self._renderer.render(dicts, tools, prompt=add_generation_prompt)

    def preview(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """For display: the render even where it drops a field, "" where the template refuses the messages."""
        return self._renderer.preview(messages, tools)

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text; no special token is added."""
        return self._encoder.ids(text)

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), optional: Sequence[str] = ()
    ) -> list[int]:
        """Ids to generate from, generation prompt included: the same tokens that a trained turn follows.

        `optional`: fields that may be lost where the template never renders them (`MaskOptions.allow_unrendered`).
        """
        try:
            return self._encoder.ids(self.render(messages, tools=tools, add_generation_prompt=True))
        except Unrendered as problem:
            if problem.field not in optional:
                raise
            dropped = problem.field
        messages, tools = without_field(messages, tools, dropped)
        return self.encode_prompt(messages, tools, [field for field in optional if field != dropped])

    def encode(self, conversations: Sequence[Conversation], options: MaskOptions) -> list[Encoded | Refusal]:
        """Render, locate, prove and tokenise in a batch; one entry per conversation, in order.

        With `expand_turns` one entry per trained turn, with ids `<id>#<turn>`, rendered as at inference.
        """
        found = [entry for conversation in conversations for entry in self.samples(conversation, options)]
        samples = [entry for entry in found if isinstance(entry, Sample)]
        tokens = iter(self.tokenise(samples))
        return [_encoded(entry, next(tokens)) if isinstance(entry, Sample) else entry for entry in found]

    def samples(self, conversation: Conversation, options: MaskOptions) -> list[Sample | Refusal]:
        """Text and proven spans of a conversation: one sample, or one per trained turn."""
        try:
            trained = trained_turns(conversation.messages, options.train_on)
        except Unproven as problem:
            return [_refusal(conversation.id, problem)]
        if not options.expand_turns:
            return [self._sample(conversation.id, conversation.messages, conversation.tools, trained, options)]
        return [
            self._sample(
                f"{conversation.id}#{number}",
                conversation.messages[: index + 1],
                conversation.tools,
                {number: index},
                options,
            )
            for number, index in trained.items()
        ]

    def _sample(
        self,
        id: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        trained: Mapping[int, int],
        options: MaskOptions,
    ) -> Sample | Refusal:
        try:
            self._require_no_bos(messages)
            found = self._located(with_reasoning(messages, options.reasoning), tools, trained, options.allow_unrendered)
            prove_fields(found, trained.values())
            spans = []
            for number, index in trained.items():
                turn = found.locate(index, number)
                prove_turn(found, turn, self._frames)
                start = len(turn.prompt)
                spans.append(Span(start, start + turn.end, number, messages[index].weight))
            return Sample(id, found.text, tuple(spans))
        except Unproven as problem:
            return _refusal(id, problem)

    def _located(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        trained: Mapping[int, int],
        optional: Sequence[str],
    ) -> Locator:
        """The renders of a conversation, less those `optional` fields that the template never renders."""
        if isinstance(self._closing, Unproven):
            raise Unproven(self._closing.reason, self._closing.detail)
        try:
            return Locator(self._renderer, self._closing, self._stop_texts, messages, tools, trained)
        except Unrendered as problem:
            if problem.field not in optional:
                raise
            dropped = problem.field
        messages, tools = without_field(messages, tools, dropped)
        return self._located(messages, tools, trained, [field for field in optional if field != dropped])

    def _require_no_bos(self, messages: Sequence[Message]) -> None:
        """Where BOS stands is the template's choice; in the text of a message it would be one more."""
        bos = self.tokenizer.bos_token
        if bos is None or self.bos_token_id in self.stop_ids:
            return
        for i, message in enumerate(messages):
            if bos in message.content or bos in (message.reasoning or ""):
                given = f"the {message.role} message {i} holds the BOS token {bos!r} as text"
                raise Unproven("BOS inside a message", f"{given}, which would be tokenised as one more BOS; remove it")

    @cached_property
    def _stop_texts(self) -> tuple[str, ...]:
        """What ends a turn, as text: tokens, and the template's markers, which may be several."""
        markers = self._closing.markers if isinstance(self._closing, Closing) else ()
        return tuple(sorted({*markers, *(self._encoder.added[i] for i in self.stop_ids if i in self._encoder.added)}))

    @cached_property
    def _end_tokens(self) -> tuple[str, ...]:
        """Added tokens that may end a turn: all but BOS, which is none."""
        eos = self.tokenizer.eos_token_id
        return tuple(t for i, t in self._encoder.added.items() if i != self.bos_token_id or i == eos)

    def tokenise(self, samples: Sequence[Sample]) -> list[Tokens | Refusal]:
        """Ids and token ranges of samples, proven by decoding."""
        tokens = self._encoder.tokenise(samples) if samples else []
        pairs = zip(samples, tokens, strict=True)
        return [_refusal(s.id, found) if isinstance(found, Unproven) else found for s, found in pairs]

    def offsets(self, sample: Sample, tokens: Tokens) -> list[tuple[int, int]]:
        """Characters [start, end) of each token of a sample, for display."""
        return self._encoder.offsets(sample, tokens)

    def used_token_ids(self) -> set[int]:
        """Added tokens that the template writes into conversations, tool calls included where it supports them."""
        text = "".join(self._closing.markers) if isinstance(self._closing, Closing) else ""
        for structure in (PLAIN, PLAIN * 2, (Shape("system"), *PLAIN)):
            messages, _ = sentinel_messages(structure)
            text += self._render_if_possible(messages) + self._render_if_possible(messages[:-1], prompt=True)
        calls, _ = sentinel_messages(CALLING)
        text += self._render_if_possible(calls, tools=(sentinel_tool(),))
        return set(self._encoder.ids(text)) & set(self._encoder.added)

    def _render_if_possible(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False
    ) -> str:
        try:
            return self.render(messages, tools=tools, add_generation_prompt=prompt)
        except Unproven:
            return ""  # a structure that the template does not support writes no tokens

    def fingerprint(self) -> dict[str, str]:
        """What the ids and weights of a row depend on, beside the row and the options."""
        template = json.dumps([self.text, self.arguments, CLOCK.isoformat(), SPANS_VERSION], sort_keys=True)
        specials = json.dumps([self._encoder.sha256, self.tokenizer.special_tokens_map], sort_keys=True)
        return {
            "tokenizer": hashlib.sha256(specials.encode()).hexdigest(),
            "template": hashlib.sha256(template.encode()).hexdigest(),
        }

    def save(self, folder: Path) -> None:
        """Write the tokenizer with exactly this template, as `from_pretrained` reads it."""
        self.tokenizer.save_pretrained(str(folder))


def _encoded(sample: Sample, tokens: Tokens | Refusal) -> Encoded | Refusal:
    if isinstance(tokens, Refusal):
        return tokens
    weights = np.zeros(len(tokens.ids), np.float32)
    for span, (start, end) in zip(sample.spans, tokens.ranges, strict=True):
        weights[start:end] = span.weight
    return Encoded(sample.id, np.array(tokens.ids, np.int32), weights)


def _refusal(id: str, problem: Unproven) -> Refusal:
    return Refusal(id, problem.reason, problem.detail, problem.turn)


def _template_text(given: str) -> str:
    if given in BUILT_IN:
        return files("sftdist.data").joinpath("builtin_templates", f"{given}.jinja").read_text(encoding="utf-8")
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        required = f"{'|'.join(BUILT_IN)} or a jinja file that can be read"
        message = f"model.chat_template={given}: {problem}; required is {required}; correct the path"
        raise ConfigError(message) from problem


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        given = f"model.path={name}: this tokenizer has no chat template (a base model's has none)"
        choice = f"choose the one to train with: model.chat_template={'|'.join(BUILT_IN)}|FILE"
        raise ConfigError(f"{given}; a template is required; {choice}")
    return str(own)


def _stop_ids_of(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of a folder's generation_config.json, where there is one."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return ()
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
