"""The same prompts in other words: with typos, in other case, paraphrased, without the system message.

Only the last user message changes, and nothing in it that decides the answer: numbers and number words, names, quoted
text, code, addresses, negations, and words that the reference holds. Made from a seed and the prompt's id alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.data.language import language_of
from sftdist.evals.prompts import Prompt

# The metrics that a fall is measured on: the first that both answers have.
PRIMARY = (
    "accuracy", "numeric_match", "tool_calls_right", "fields_right", "schema_valid", "instructions_strict",
    "contract_kept", "refusal", "deflection", "over_refusal", "token_f1", "same_answer", "exact_match", "rouge_l",
)  # fmt: skip
LOWER_IS_BETTER = frozenset(("over_refusal",))
TYPO_SHARE = 0.12  # of the words that may be misspelt; at least one
# Left as they are: code, quoted text, what is in brackets, addresses, anything with a digit, and marks within a word.
_KEPT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»|(?<!\w)'[^'\n]+'(?!\w)|\{.*\}|\[.*\]|<[^>\n]+>|"
    r"(?<!\S)\S*(?:\d|@|://|[\w)][._/\\:=|<>+*^~$%&#][\w(])\S*|^(?: {4}|\t|[|>#]).*$",
    re.DOTALL | re.MULTILINE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?:]\s)|(?<=\n))\S")
_START = re.compile(r"(?:^|[.!?:\n])\s*$")
# Words that turn an answer round, and numbers.
_DECIDING = frozenset({
    "not", "no", "never", "none", "nothing", "without", "only", "except", "but", "least", "most", "more", "less",
    "fewer", "before", "after", "above", "below", "under", "over", "all", "any", "each", "every", "both", "either",
    "neither", "nor", "same", "different", "true", "false", "yes", "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve", "dozen", "twenty", "thirty", "forty", "fifty", "hundred",
    "thousand", "million", "billion", "half", "twice", "double", "triple", "third", "quarter", "first", "second",
    "last", "left", "right", "nicht", "kein", "keine", "keinen", "keiner", "nie", "ohne", "nur", "außer", "alle",
    "jede", "jeder", "beide", "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
    "elf", "zwölf", "hundert", "tausend", "halb", "doppelt",
})  # fmt: skip
# The next key on the keyboard.
_NEIGHBOURS = dict(zip("abcdefghijklmnopqrstuvwxyz", "svvfrghjoklknbpowtdyicezux", strict=True))

Change = Callable[[Prompt, random.Random], Prompt | None]


def variants(prompts: Sequence[Prompt], kinds: Sequence[str], seed: int) -> list[Prompt]:
    """Each prompt in each of `kinds` that changes it, with `variant_of` and `variant`; ids are `<id>~<kind>`.

    Raises ConfigError for an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"evals.robustness: given {unknown[0]}, required some of {', '.join(KINDS)}")
    return [found for kind in kinds for prompt in prompts for found in _variant(prompt, kind, seed)]


def fall(original: Mapping[str, float], variant: Mapping[str, float]) -> float | None:
    """How far the main score moves from an answer to the one in other words: below 0 where it falls, -1 to 1.

    None where the two have no metric of `PRIMARY` in common.
    """
    name = next((name for name in PRIMARY if name in original and name in variant), None)
    if name is None:
        return None
    moved = variant[name] - original[name]
    return -moved if name in LOWER_IS_BETTER else moved


def _variant(prompt: Prompt, kind: str, seed: int) -> Iterator[Prompt]:
    changed = KINDS[kind](prompt, random.Random(f"{seed}/{kind}/{prompt.id}"))
    if changed is not None:
        yield replace(changed, id=f"{prompt.id}~{kind}", variant_of=prompt.id, variant=kind)


def _without_system(prompt: Prompt, _: random.Random) -> Prompt | None:
    left = tuple(message for message in prompt.messages if message.role not in ("system", "developer"))
    return None if len(left) == len(prompt.messages) else replace(prompt, messages=left)


def _reworded(change: Callable[[Prompt, str, random.Random], str]) -> Change:
    """`change` on the last user message; None where nothing is left to change."""

    def reword(prompt: Prompt, chance: random.Random) -> Prompt | None:
        place = max((i for i, message in enumerate(prompt.messages) if message.role == "user"), default=None)
        if place is None:
            return None
        text = change(prompt, prompt.messages[place].content, chance)
        if text == prompt.messages[place].content:
            return None
        messages = list(prompt.messages)
        messages[place] = replace(messages[place], content=text)
        return replace(prompt, messages=tuple(messages))

    return reword


# --- words that may change ----------------------------------------------------------------------------------


def _free(prompt: Prompt, text: str) -> list[re.Match[str]]:
    """The words of a text that decide nothing."""
    kept = [match.span() for match in _KEPT.finditer(text)]
    names = {match.group() for match in _WORD.finditer(text) if _is_name(match)}
    decisive = {word.lower() for word in _WORD.findall(f"{prompt.reference or ''} {_named(prompt.checks)}")}
    return [
        match
        for match in _WORD.finditer(text)
        if not any(start < match.end() and match.start() < end for start, end in kept)
        and match.group().lower() not in _DECIDING
        and match.group().lower() not in decisive
        and match.group() not in names
    ]


def _named(checks: object) -> str:
    """All text in a prompt's checks."""
    if isinstance(checks, Mapping):
        return " ".join(f"{key} {_named(value)}" for key, value in checks.items())
    if isinstance(checks, list | tuple):
        return " ".join(map(_named, checks))
    return checks if isinstance(checks, str) else ""


def _is_name(match: re.Match[str]) -> bool:
    """A capital letter that does not only begin a sentence; German nouns count, which does no harm. A name that stands
    at the begin of sentences alone looks like any word there: its letters stay, their case may not."""
    word = match.group()
    if word in ("I", "I'm", "I'd", "I'll", "I've", "I\u2019m", "I\u2019d"):
        return False
    inner = any(letter.isupper() for letter in word[1:])
    return inner or (word[0].isupper() and not _START.search(match.string[: match.start()]))


def _replaced(text: str, words: Mapping[tuple[int, int], str]) -> str:
    edges = [0, *(edge for span in sorted(words) for edge in span), len(text)]
    return "".join(words.get((start, end), text[start:end]) for start, end in pairwise(edges))


# --- the kinds ------------------------------------------------------------------------------------------------


def _typos(prompt: Prompt, text: str, chance: random.Random) -> str:
    long_enough = [match for match in _free(prompt, text) if len(match.group()) >= 4 and match.group().islower()]
    if not long_enough:
        return text
    count = max(1, round(TYPO_SHARE * len(long_enough)))
    return _replaced(
        text, {match.span(): _misspelt(match.group(), chance) for match in chance.sample(long_enough, count)}
    )


def _misspelt(word: str, chance: random.Random) -> str:
    """One slip of the fingers behind the first letter: two letters swapped, one lost, doubled, or the next key."""
    slips = [
        lambda at: word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        lambda at: word[:at] + word[at + 1 :],
        lambda at: word[:at] + word[at] + word[at:],
        lambda at: word[:at] + _NEIGHBOURS.get(word[at], word[at]) + word[at + 1 :],
    ]
    chance.shuffle(slips)
    at = chance.randrange(1, len(word) - 1)
    return next((found for found in (slip(at) for slip in slips) if found != word), word)


def _case(prompt: Prompt, text: str, chance: random.Random) -> str:
    """All in small letters or all in capitals, by chance; small letters where they change something."""
    free = _free(prompt, text)
    lower = {match.span(): match.group().lower() for match in free}
    changed = _replaced(text, lower)
    if chance.random() < 0.5 and changed != text:
        return changed
    return _replaced(text, {match.span(): match.group().upper() for match in free})


# What is said, and what says the same; each is tried where it stands at the start of a sentence.
_SAYINGS: tuple[tuple[str, str], ...] = (
    (r"what's\b", "what is"),
    (r"what is\b", "could you tell me what is"),
    (r"what are\b", "could you tell me what are"),
    (r"how many\b", "what number of"),
    (r"how much does (\w+ \w+) cost\b", r"what is the price of \1"),
    (r"who (is|was)\b", r"could you tell me who \1"),
    (r"why (is|are|was|were|do|does|did)\b", r"for what reason \1"),
    (r"when (is|was)\b", r"at what time \1"),
    (r"can you\b", "could you"),
    (r"could you\b", "would you"),
    (r"i want to\b", "I would like to"),
    (r"i need to\b", "I have to"),
    (r"i need\b", "I require"),
    (r"please\b,? (\w)", r"\1"),
    (r"write\b", "please compose"),
    (r"calculate\b", "please work out"),
    (r"compute\b", "please work out"),
    (r"summari[sz]e\b", "please give a summary of"),
    (r"translate\b", "please give a translation of"),
    (r"explain\b", "please make clear"),
    (r"give me\b", "please provide me with"),
    (r"tell me\b", "please let me know"),
    (r"find\b", "please determine"),
    (r"list\b", "please name"),
    (r"extract\b", "please pull out"),
    (r"was ist\b", "eine Frage: was ist"),
    (r"wie viele\b", "eine Frage: wie viele"),
    (r"bitte\b,? (\w)", r"\1"),
    (r"ich möchte\b", "ich würde gern"),
    (r"kannst du\b", "könntest du"),
    (r"können sie\b", "könnten Sie"),
)
_RULES = tuple((re.compile(said, re.IGNORECASE), same) for said, same in _SAYINGS)


# Said before a request, on a line of its own.
_FRAMES = {
    "en": ("I have a question for you.", "Could you help me with this?", "Here is something for you to do."),
    "de": ("Ich habe eine Frage an dich.", "Kannst du mir dabei helfen?", "Hier ist etwas für dich zu tun."),
    "fr": ("J'ai une question pour toi.", "Peux-tu m'aider avec ceci ?", "Voici quelque chose à faire."),
    "es": ("Tengo una pregunta para ti.", "¿Puedes ayudarme con esto?", "Aquí hay algo que hacer."),
}
_QUOTES_THE_PROMPT = ("repeats", "starts_with", "ends_with")  # instructions that an added line could turn into others


def _paraphrase(prompt: Prompt, text: str, chance: random.Random) -> str:
    """One saying for another at the begin of sentences. Where none is known, a line before the request, but only where
    the text is all that is said: under a system message (translate what follows) it could be material."""
    kept = [match.span() for match in _KEPT.finditer(text)]
    changed: dict[tuple[int, int], str] = {}
    for start in _SENTENCE_START.finditer(text):
        found = next(((match, same) for rule, same in _RULES if (match := rule.match(text, start.start()))), None)
        if found is not None and not any(begin <= start.start() < end for begin, end in kept):
            match, same = found
            changed[match.span()] = _begun_like(match.group(), match.expand(same))
    frames = _FRAMES.get(language_of(text) or "")
    if changed or frames is None or len(prompt.messages) > 1 or _is_quoted_back(prompt.checks):
        return _replaced(text, changed)
    return f"{chance.choice(frames)}\n\n{text}"


def _is_quoted_back(checks: Mapping[str, Any]) -> bool:
    return any(one.get("kind") in _QUOTES_THE_PROMPT for one in checks.get("instructions") or ())


def _begun_like(said: str, same: str) -> str:
    return same[:1].upper() + same[1:] if said[0].isupper() else same


KINDS: dict[str, Change] = {
    "typos": _reworded(_typos),
    "case": _reworded(_case),
    "paraphrase": _reworded(_paraphrase),
    "no_system": _without_system,
}
