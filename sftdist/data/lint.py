"""What makes the tone of a source unstable, seen row by row in bounded memory.

Parts of a source can be looked at by different processes: merged in any grouping, they give the same figures.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from sftdist.core.settings import TrainOn
from sftdist.data.answers import Answer, trained_answers
from sftdist.data.demands import demands_in, standing_demands
from sftdist.data.language import LOOKED_AT, language_of
from sftdist.data.schema import Conversation
from sftdist.data.smallest import Entry, Smallest, smallest
from sftdist.data.style import SIGNS, TONE, bucket, end_of, signs_of, words_at

LINT_VERSION = 1  # grows whenever other figures may come of the same rows
HASHES = 2**64
# The language of one row in so many is looked at, and of at least LANGUAGE_ROWS. Of very few rows it is not: the model
# takes as long to load as 5,000 rows take to read.
LANGUAGE_SHARE = 16
LANGUAGE_KEYS = HASHES // LANGUAGE_SHARE
LANGUAGE_ROWS = 128
LANGUAGES_FROM = 100
SYSTEM_PROMPTS = 256  # distinct ones that are remembered
EXAMPLES = 5
EXTREMES = 16
SHOWN = 120  # characters of a system prompt, an id
MIXED = (0.05, 0.95)  # a sign of tone that some answers have and others have not
RARE = 0.05  # a language, or an ending, of fewer answers than that is told with its rows
UNREAD = ""  # in place of a language
QUANTILES = {"shortest 5 %": 0.05, "half": 0.5, "longest 5 %": 0.95}
LEAST_SPREAD = 4  # bars: answers that are all about as long are no outliers of each other
FENCES = 3.0  # quartile distances, of the logarithm, beyond which a length is an outlier (Tukey's outer fences)


class Lint:
    """Figures of the trained answers of one source: `observe` its rows, then ask for `figures`."""

    def __init__(self) -> None:
        self.rows = 0
        self.answers = 0
        self.without_system = 0
        self.systems = Smallest(SYSTEM_PROMPTS)
        self.signs: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.demands: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.unread = Smallest(LANGUAGE_ROWS)  # rows whose language is looked at in the end, however many there are
        self.examples: dict[str, Smallest] = {}
        self.extremes: dict[str, list[list[Any]]] = {"shortest": [], "longest": []}

    def observe(self, conversation: Conversation, train_on: TrainOn) -> None:
        """Look at a row; one in which nothing is trained is passed over."""
        answers = list(trained_answers(conversation, train_on))
        if not answers:
            return
        self.rows += 1
        key = _hash(f"{conversation.id}\0{answers[0].text}")
        name = conversation.id[:SHOWN]
        system = self._observe_system(conversation, key, name)
        for answer in answers:
            self._observe_answer(conversation, answer, system, key, name)
        self._observe_language(answers[0].text, key, name)

    def _observe_system(self, conversation: Conversation, key: int, name: str) -> str:
        parts = [m.content for m in conversation.messages[:2] if m.role in ("system", "developer")]
        if not parts:
            self.without_system += 1
            return ""
        system = "\n".join(parts)
        if self.systems.wants(place := _hash_of_system(system)):
            self.systems.add(place, [key, name, system[:SHOWN]])
        return system

    def _observe_answer(self, conversation: Conversation, answer: Answer, system: str, key: int, name: str) -> None:
        text = answer.text
        self.answers += 1
        self.signs.update(signs_of(text))
        end = end_of(text)
        self.ends[end] += 1
        self._example(f"end {end}", key, name)
        words = len(text.split())
        self.lengths[bucket(words)] += 1
        self._extreme("shortest", words, name)
        self._extreme("longest", -words, name)
        before = conversation.messages[answer.place - 1]
        asked = demands_in(before.content) if before.role == "user" else ()
        for demand in {demand.name: demand for demand in (*standing_demands(system), *asked)}.values():
            self.demands[demand.name] += 1
            if demand.broken(text):
                self.broken[demand.name] += 1
                self._example(f"broken {demand.name}", key, name)

    def _observe_language(self, text: str, key: int, name: str) -> None:
        if key < LANGUAGE_KEYS or self.unread.wants(key):
            left = self.unread.add(key, [name, text[:LOOKED_AT], UNREAD])
            self._count_languages([left] if left else [])

    def _count_languages(self, left: Iterable[Entry]) -> None:
        """Read those that will not be read later, and by their key are to be."""
        for key, count, (name, text, language) in left:
            if key < LANGUAGE_KEYS:
                self._count_language(language or _language(text), key, name, count)

    def read_ahead(self) -> None:
        """Read the languages of a part of many now, where many can do that at the same time; no figure changes."""
        for entry in self.unread:
            if entry[0] < LANGUAGE_KEYS and entry[2][2] == UNREAD:
                entry[2][2] = _language(entry[2][1])

    def _count_language(self, language: str, key: int, name: str, count: int) -> None:
        self.languages[language] += count
        self._example(f"language {language}", key, name)

    def _example(self, what: str, key: int, name: str) -> None:
        if (found := self.examples.get(what)) is None:
            found = self.examples[what] = Smallest(EXAMPLES)
        if found.wants(key):
            found.add(key, name)

    def _extreme(self, which: str, rank: int, name: str) -> None:
        found = self.extremes[which]
        if len(found) < EXTREMES or (rank <= found[-1][0] and [rank, name] < found[-1]):
            self.extremes[which] = smallest([*found, [rank, name]], EXTREMES)

    # --- parts ------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All of it, for `merged`."""
        return {
            "version": LINT_VERSION,
            "numbers": [self.rows, self.answers, self.without_system],
            "counts": [sorted(map(list, counts.items())) for counts in self._counters()],
            "systems": self.systems.to_json(),
            "unread": self.unread.to_json(),
            "examples": {what: found.to_json() for what, found in sorted(self.examples.items())},
            "extremes": self.extremes,
        }

    @classmethod
    def merged(cls, parts: Iterable[Mapping[str, Any]]) -> Lint:
        """The figures of all parts together, from their `to_json`."""
        lint = cls()
        for part in parts:
            lint.add(part)
        return lint

    def add(self, part: Mapping[str, Any]) -> None:
        """Take in a part, from its `to_json`."""
        rows, answers, without = part["numbers"]
        self.rows += rows
        self.answers += answers
        self.without_system += without
        for counter, counts in zip(self._counters(), part["counts"], strict=True):
            for key, count in counts:
                counter[key] += count
        self.systems.merge(part["systems"])
        self._count_languages(self.unread.merge(part["unread"]))
        for what, found in part["examples"].items():
            self.examples.setdefault(what, Smallest(EXAMPLES)).merge(found)
        for which, found in part["extremes"].items():
            self.extremes[which] = smallest([*self.extremes[which], *found], EXTREMES)

    def _counters(self) -> tuple[Counter[Any], ...]:
        return (self.signs, self.ends, self.lengths, self.demands, self.broken, self.languages)

    # --- figures ------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """What a person reads: shares are of answers (languages: of the rows that were looked at), lengths in words."""
        signs = [_share(sign, self.signs[sign], self.answers) for sign in SIGNS if self.signs[sign]]
        return {
            "rows": self.rows,
            "answers": self.answers,
            "system prompts": self._system_figures(),
            "style": signs,
            "mixed tone": [item["what"] for item in signs if item["what"] in TONE and _between(item["share"], MIXED)],
            "length in words": {name: self._quantile(share) for name, share in QUANTILES.items()},
            "length outliers": self._length_outliers(),
            "endings": self._rare(self.ends, "end", self.examples),
            "contradicted instructions": [
                {"what": name, "given": given, "contradicted": self.broken[name], "rows": self._ids(f"broken {name}")}
                for name, given in sorted(self.demands.items())
            ],
            "languages": self._language_figures(),
        }

    def _system_figures(self) -> dict[str, Any]:
        found = sorted(self.systems, key=lambda entry: (-entry[1], entry[0]))[:EXAMPLES]
        return {
            "distinct": self.systems.distinct(HASHES),
            "estimated": self.systems.overflowed,
            "rows without one": self.without_system,
            "most frequent": [{"rows": count, "text": text, "example": name} for _, count, (_, name, text) in found],
        }

    def _quantile(self, share: float) -> int:
        return round(words_at(self._bar(share)))

    def _bar(self, share: float) -> int:
        """The bar of the histogram up to which this share of the answers is."""
        seen = 0
        for bar in sorted(self.lengths):
            seen += self.lengths[bar]
            if seen >= share * self.answers:
                return bar
        return 0

    def _length_outliers(self) -> dict[str, Any]:
        low, high = self._bar(0.25), self._bar(0.75)
        reach = FENCES * max(high - low, LEAST_SPREAD)
        beyond = {bar for bar in self.lengths if bar < low - reach or bar > high + reach}
        found = {
            which: [{"id": name, "words": abs(rank)} for rank, name in entries if bucket(abs(rank)) in beyond]
            for which, entries in self.extremes.items()
        }
        return {"answers": sum(self.lengths[bar] for bar in beyond), **found}

    def _language_figures(self) -> dict[str, Any]:
        if self.rows < LANGUAGES_FROM:
            return {"rows looked at": 0, "chosen": f"none of fewer than {LANGUAGES_FROM} rows", "found": []}
        read = Lint.merged([self.to_json()])  # this one stays as it is: it may be merged yet
        for key, count, (name, text, language) in self.unread:
            read._count_language(language or _language(text), key, name, count)
        looked_at = sum(read.languages.values())
        return {
            "rows looked at": looked_at,
            "chosen": "all rows" if looked_at == self.rows else f"by hash, about 1 in {LANGUAGE_SHARE}",
            "found": read._rare(read.languages, "language", read.examples),
        }

    def _rare(self, counts: Counter[str], kind: str, examples: Mapping[str, Smallest]) -> list[dict[str, Any]]:
        """Each with its share; where others are the rule, with rows that show it."""
        total = sum(counts.values())
        return [
            _share(what, count, total)
            | ({"rows": [name for _, _, name in examples[f"{kind} {what}"]]} if count < RARE * total else {})
            for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def _ids(self, what: str) -> list[str]:
        return [name for _, _, name in self.examples.get(what, ())]


def _language(text: str) -> str:
    return language_of(text) or "not sure"


def _share(what: str, count: int, total: int) -> dict[str, Any]:
    return {"what": what, "count": count, "share": round(count / total, 4)}


def _between(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] < value < limits[1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@lru_cache(maxsize=4096)
def _hash_of_system(text: str) -> int:
    return _hash(text)
