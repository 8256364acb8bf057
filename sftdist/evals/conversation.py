"""Talking to a model: template, stop ids and greedy decoding of an evaluation, and text as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from sftdist.core.errors import DataError
from sftdist.data.message import Message
from sftdist.evals.backends.interface import Ids
from sftdist.evals.prompts import Answer, Prompt
from sftdist.evals.voice import Voice

_BROKEN = "\ufffd"  # what decoding makes of the first bytes of a letter


class Speaker(Protocol):
    """A model that says each new token at once."""

    def told(self, prompt: Ids, max_new_tokens: int, tell: Callable[[int], None]) -> Ids:
        """The new tokens after a prompt, up to and with a stop id; `tell` gets each of them when it is known."""
        ...


class Telling:
    """Turns ids into text that only ever grows: a part goes to `tell` when no later id can change it any more."""

    def __init__(self, decode: Callable[[Sequence[int]], str], tell: Callable[[str], None], *, by_words: bool) -> None:
        """`by_words`: decoding tidies blanks up (" ." becomes "."), so that the last word may still change."""
        self._decode, self._tell, self._by_words = decode, tell, by_words
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        text = self._decode(self._ids).rstrip(_BROKEN)
        if self._by_words:
            text = text[: max(text.rfind(" "), 0)]
        self._go_on(text)

    def end(self, text: str) -> None:
        """Tell what is left of the whole text; all of it once more where decoding has changed what was told."""
        if not text.startswith(self._told):
            self._tell("\n")
            self._told = ""
        self._go_on(text)

    def _go_on(self, text: str) -> None:
        if text.startswith(self._told) and text != self._told:
            self._tell(text[len(self._told) :])
            self._told = text


@dataclass
class Talk:
    """A conversation with one model; `messages` grow with each answer."""

    voice: Voice
    speaker: Speaker
    max_new_tokens: int
    messages: list[Message] = field(default_factory=list)

    def answer(self, text: str, tell: Callable[[str], None] = lambda part: None) -> Answer:
        """What the model says to the next user message; `tell` gets its text in parts, which add up to it.

        Raises DataError where the template refuses the messages, or where no position is left for an answer: the
        conversation is then what it was. An answer that is broken off (KeyboardInterrupt) stays, as far as it came.
        """
        asked = [*self.messages, Message("user", text)]
        ids = self._encode(asked)
        voice, tokenizer = self.voice, self.voice.template.tokenizer
        said: list[int] = []
        by_words = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        telling = Telling(lambda new: voice.read(tuple(new)).text, tell, by_words=by_words)

        def hear(token: int) -> None:
            said.append(token)
            if token not in voice.stop_ids:
                telling.add(token)

        new: Ids = ()
        try:
            new = self.speaker.told(ids, voice.room(ids, self.max_new_tokens), hear)
        finally:
            answer = replace(voice.read(new or tuple(said)), opened=voice.opens(ids))
            if said:
                self.messages = [*asked, Message("assistant", answer.spoken)]
        telling.end(answer.text)
        return answer

    def _encode(self, messages: Sequence[Message]) -> Ids:
        unbounded = replace(self.voice, positions=None)
        ids = unbounded.encode(Prompt("chat", "chat", tuple(messages)))
        if self.voice.positions is not None and len(ids) >= self.voice.positions:
            raise DataError(
                f"given a conversation of {len(ids)} tokens, but the model has {self.voice.positions} positions and "
                "one at least is required for the answer; shorten the message, or begin anew"
            )
        return ids
