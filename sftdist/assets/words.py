"""Words, names and numbers that the base text and the quickstart's sources are made of."""

from __future__ import annotations

from random import Random


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": listed("fox dog cat horse bird mouse bear wolf sheep goat rabbit fish snake duck"),
    "fruit": listed("apple pear plum cherry lemon grape peach melon orange banana berry fig"),
    "colour": listed("red blue green yellow black white brown pink grey purple"),
    "tool": listed("hammer saw spade drill rope knife brush needle ladder bucket"),
    "drink": listed("tea coffee milk water juice cocoa soda cider"),
    "plant": listed("tree grass rose moss oak pine ivy fern tulip clover"),
}
THINGS = listed(
    "lamp chair table kettle radio phone clock mirror basket bottle window door carpet pillow candle "
    "book letter map coin ring key box bag hat coat shoe boat wagon drum bell flag tower bridge garden "
    "river stone hill road field island forest valley harbour market village castle station kitchen "
    "morning evening winter summer number town street colour name day hour year place friend teacher "
    "doctor farmer sailor baker"
)
ADJECTIVES = listed("big small old new warm cold quiet loud bright dark heavy light clean broken round long")
VERBS = listed("see find buy sell paint carry bring keep move open")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALL_WORDS = tuple(dict.fromkeys([*THINGS, *ADJECTIVES, *(word for words in CATEGORIES.values() for word in words)]))

_ONSETS = listed("b br d f g h j k l m n p r s st t tr v w z ch sh")
_VOWELS = listed("a a e e i i o o u ai ea")
_ENDS = ("", "", "", "n", "r", "l", "s", "k", "m", "nd", "rt")


def name(rng: Random) -> str:
    """A capitalised made-up name of two or three syllables: some hundred thousand of them exist."""
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))]
    return ("".join(syllables) + rng.choice(_ENDS)).capitalize()


def digits(rng: Random, low: int, high: int) -> str:
    """A number of `low` to `high` digits without a leading zero."""
    length = rng.randint(low, high)
    return str(rng.randint(10 ** (length - 1), 10**length - 1))


def join_and(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
