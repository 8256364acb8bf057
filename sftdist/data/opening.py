"""A generation prompt that begins the turn itself: `<think>` before an answer that the template renders without it.

Serving sends the prompt with its opening; what the model has to emit goes on from there. So a turn is trained as
prompt and continuation, also where the template's own render of the turn lacks or shortens the opening:

    opening          render of the turn   continuation
    <think>\n        Hi                   \n</think>\n\nHi      what was opened is closed, spaced as it was opened
    <think>\n        <think></think>Hi    </think>Hi            the render closes it
    <think></think>  </think>Hi           Hi                    it was closed already

Whether an opening is closed is read from the way in which control words are written in pairs, never from a family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What a marker or a header is made of: white space, <control>, [CONTROL], or a run of other text.
UNIT = re.compile(r"\s+|<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<\[]+|.", re.DOTALL)
# A control word that begins a block, and the one that ends it.
PAIRS = (
    (re.compile(r"<([A-Za-z][\w-]*)>"), "</{}>"),
    (re.compile(r"<\|([A-Za-z]\w*)>"), "<{}|>"),
    (re.compile(r"<\|START_(\w+)\|>"), "<|END_{}|>"),
    (re.compile(r"\[([A-Z][A-Z_]*)\]"), "[/{}]"),
)


@dataclass(frozen=True, slots=True)
class Opening:
    """How a generation prompt goes on after the header that the turn's render shares with it.

    `closer` ends the block that the prompt left open; None where it is closed.
    """

    at: int  # where the prompt and the render part
    text: str
    closer: str | None

    @property
    def is_unseen(self) -> bool:
        """The render shows nothing of a block that the prompt left open."""
        return self.closer is not None and bool(self.text.strip())

    def continuation(self, render: str, reasoning: str) -> str | None:
        """What the model emits after the prompt; `render` is that of the turn, after `at`. None: that is not known."""
        if self.closer is None:
            return None if reasoning and reasoning in render else render[_overlap(self.text, render) :]
        if not self.text.strip() or render.lstrip().startswith(self.closer):
            return render if self.closer in render else None
        if reasoning and reasoning in render:
            return None
        space = self.text[len(self.text.rstrip()) :]
        return f"{reasoning}{space}{self.closer}{space * 2}{render}"


def find_opening(prompt: str, render: str, header_at: int) -> Opening | None:
    """What a prompt has more than the render that should continue it; None where that is no block of control words.

    `header_at`: where the generation prompt begins, in the prompt.
    """
    at, before = header_at, ""
    for unit in UNIT.finditer(prompt, header_at):
        if not render.startswith(unit.group(), unit.start()):
            break
        at, before = unit.end(), unit.group()
    text = prompt[at:]
    units = [unit.group() for unit in UNIT.finditer(text) if unit.group().strip()]
    closer = closer_of(units[0] if units else before)
    if closer is None or at == header_at:
        return None
    if not units or units == [units[0]]:
        return Opening(at, text, closer)
    return Opening(at, text, None) if units[-1] == closer else None


def closer_of(unit: str) -> str | None:
    """The control word that ends a block which `unit` begins."""
    for begins, ends in PAIRS:
        found = begins.fullmatch(unit)
        if found:
            return ends.format(found.group(1))
    return None


def _overlap(opening: str, render: str) -> int:
    """How many characters at the end of the opening are also the beginning of the render, in whole control words."""
    starts = [unit.start() for unit in UNIT.finditer(opening)]
    return next((len(opening) - at for at in starts if render.startswith(opening[at:])), 0)
