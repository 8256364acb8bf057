"""What a model is asked in an evaluation: a prompt, what the answer is held against, and where it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sftdist.core.storage import sha256_json
from sftdist.data.message import Message

# At the start alone; the end is missing where the answer was cut off.
_THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>\s*|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages up to the answer that is asked for, and the answer that was given there (`reference`).

    `id` is unique in an evaluation, `<source>/<id of the row>`; `source` is a source of the data, or the set of prompts
    that a probe brings along. `checks` is what the answer must fulfil beside being like the reference: `schema`,
    `instructions`, `stance`, `forbidden` and so on, each read by the probe that knows it. `variant_of`: the id of the
    prompt that this one says in another way, `variant`: in which.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    reference: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tags: tuple[str, ...] = ()
    turn: int = 0  # assistant turns that stand before
    checks: Mapping[str, Any] = field(default_factory=dict)
    variant_of: str | None = None
    variant: str | None = None

    @property
    def sha256(self) -> str:
        """The hash of all that is asked and that the answer is held against: the same hash, the same task."""
        messages = [asdict(message) for message in self.messages]
        return sha256_json([messages, self.reference, self.tools, dict(self.checks)])

    @property
    def question(self) -> str:
        """The last user message."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, without the stop token; `finished` is False where `max_new_tokens` cut it off, `opened` is
    True where the prompt ended in `<think>`, so that the text begins inside of a thought."""

    text: str
    tokens: int
    finished: bool
    opened: bool = False

    @property
    def spoken(self) -> str:
        """The text without the thoughts that stand before it: what a user would read."""
        return _THOUGHTS.sub("", f"<think>{self.text}" if self.opened else self.text, count=1)
