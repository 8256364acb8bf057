"""Live prompts against the profile of a release: every statistic, and whether chance alone explains it.

Drift is what chance alone would bring about in at most `ALPHA` of all comparisons, over all statistics together, and
what somebody would mind: where the whole interval is below that, traffic is large and the difference is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sftdist.data.style import words_at
from sftdist.evals.drift import (
    LEAST,
    Counts,
    Difference,
    basic_interval,
    common,
    difference,
    far_off,
    jensen_shannon,
    merged,
    neighbours,
    share,
    stability_index,
    tails,
)
from sftdist.evals.drift import holm as held_over_all
from sftdist.evals.features import WORDS, Features, word_places
from sftdist.evals.intervals import Estimate
from sftdist.evals.profile import LEVELS, OUT, Profile, length_counts
from sftdist.evals.topics import places_of

ALPHA = 0.01
MINDED_PSI = 0.02
MINDED_SHARE = 0.01
WORD_RESAMPLES = 300
SHOWN_WORDS = 12
LOOKED_AT = 50  # texts, to find out which word stands at a place
WORDS_OF_TOPIC = 3
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


@dataclass(frozen=True)
class Part:
    """One category of a statistic: its share of the profile and of the live items."""

    label: str
    profile: float
    live: float


@dataclass(frozen=True)
class Statistic:
    """One comparison. `p`: how often chance alone makes as much of a difference; `adjusted` holds over all of them.

    Of distributions `psi` and `js` say how far they are apart; of shares `profile` and `live` what they are.
    """

    name: str
    meaning: str
    p: float
    minded: bool  # large enough that somebody would mind
    psi: Estimate | None = None
    js: Estimate | None = None
    profile: Estimate | None = None
    live: Estimate | None = None
    parts: list[Part] = field(default_factory=list)
    adjusted: float = 1.0
    drift: bool = False


def judged(statistics: Sequence[Statistic], alpha: float = ALPHA) -> list[Statistic]:
    """The statistics with what holds over all of them together."""
    adjusted = held_over_all([one.p for one in statistics])
    return [
        replace(one, adjusted=p, drift=one.minded and p <= alpha) for one, p in zip(statistics, adjusted, strict=True)
    ]


def prompt_statistics(profile: Profile, live: Features, texts: Sequence[str]) -> list[Statistic]:
    """All comparisons of live prompts with the profile, not yet judged; `texts` are the prompts, for their words."""
    rng = np.random.default_rng(0)  # the same traffic gets the same report
    model, before = profile.model, profile.measured
    typical, topics = model.typical(live), model.topics(live)
    out = (int(before.typical[OUT]), int(before.typical.sum()), int((typical == OUT).sum()), len(live))
    found = [
        ordered("length", "how long the prompts are, in words", profile.lengths, length_counts(live.lengths), rng),
        named("language", "which language they are in", profile.languages, Counter(live.languages), rng),
        vocabulary(profile, live, texts, rng),
        numbered("topic", "what they are about", before.topics, topics, topic_labels(profile, topics, texts), rng),
        numbered("typical", "how usual their words are", before.typical, typical, level_labels(), rng),
        rate("out_of_profile", "prompts that are hardly like those of the profile", *out, minded="more"),
    ]
    if len(model.sources) > 1:
        meaning, likely = "which source of the data they are most like", model.likely_sources(live)
        found.append(numbered("source", meaning, before.sources, likely, model.sources, rng))
    return found


# --- distributions ------------------------------------------------------------------------------------


def ordered(
    name: str, meaning: str, profile: Mapping[int, int], live: Mapping[int, int], rng: np.random.Generator
) -> Statistic:
    """Compare counts of lengths by `style.bucket`."""
    keys = sorted({*profile, *live})
    one, other = _counts([profile.get(key, 0) for key in keys]), _counts([live.get(key, 0) for key in keys])
    numbers = neighbours(one + other)
    ends = [keys[np.flatnonzero(numbers == i)[-1]] for i in range(int(numbers.max()) + 1)]
    labels = [f"up to {words_at(end + 0.5):.0f}" for end in ends[:-1]] + ["longer"]
    return _distribution(name, meaning, merged(one, numbers), merged(other, numbers), labels, rng)


def named(
    name: str, meaning: str, profile: Mapping[str, int], live: Mapping[str, int], rng: np.random.Generator
) -> Statistic:
    """Compare counts of categories with names."""
    keys = sorted({*profile, *live})
    one, other = _counts([profile.get(key, 0) for key in keys]), _counts([live.get(key, 0) for key in keys])
    return _of_common(name, meaning, one, other, keys, rng)


def numbered(
    name: str,
    meaning: str,
    profile: Counts,
    live: NDArray[np.int64],
    labels: Sequence[str],
    rng: np.random.Generator,
) -> Statistic:
    """Compare the category of each live item with counts of them."""
    return _of_common(name, meaning, profile, np.bincount(live, minlength=len(profile)), labels, rng)


def _counts(counts: Sequence[int]) -> Counts:
    return np.array(counts, dtype=np.int64)


def _of_common(
    name: str, meaning: str, one: Counts, other: Counts, labels: Sequence[str], rng: np.random.Generator
) -> Statistic:
    numbers = common(one + other)
    kept = [label for label, number in zip(labels, one + other, strict=True) if number >= LEAST]
    return _distribution(name, meaning, merged(one, numbers), merged(other, numbers), [*kept, "others"], rng)


def _distribution(
    name: str, meaning: str, one: Counts, other: Counts, labels: Sequence[str], rng: np.random.Generator
) -> Statistic:
    found = difference(one, other, rng)
    shares = zip(labels, (one / one.sum()).tolist(), (other / other.sum()).tolist(), strict=False)
    parts = [Part(label, before, now) for label, before, now in shares if before or now]
    return _statistic(name, meaning, found, parts)


def _statistic(name: str, meaning: str, found: Difference, parts: list[Part]) -> Statistic:
    minded = found.psi.high >= MINDED_PSI
    return Statistic(name, meaning, found.p, minded, psi=found.psi, js=found.js, parts=parts)


def topic_labels(profile: Profile, topics: NDArray[np.int64], texts: Sequence[str]) -> list[str]:
    """What the live prompts of each topic say that others do not."""
    centres = profile.model.centres
    found = []
    for i, centre in enumerate(centres):
        here = [texts[row] for row in np.flatnonzero(topics == i)[:LOOKED_AT].tolist()]
        telling = np.argsort(-(centre - centres.mean(axis=0)), kind="stable")[:WORDS_OF_TOPIC].tolist()
        words = [word for place in telling if (word := _commonest(here, places_of(place)))]
        found.append(", ".join(dict.fromkeys(words)) or f"topic {i + 1}, which nobody asks about")
    return [*found, "no word that tells"]


def level_labels() -> list[str]:
    """Of the groups of `Model.typical`, in shares of the profile's prompts."""
    ends = [0.0, *LEVELS, 1.0]
    spans = [f"{100 * low:.0f}-{100 * high:.0f} %" for low, high in pairwise(ends)]
    return [f"the {spans[0]} least usual", *spans[1:]]


# --- shares -------------------------------------------------------------------------------------------


def rate(
    name: str,
    meaning: str,
    have: int,
    of: int,
    live: int,
    live_of: int,
    *,
    minded: Literal["more", "less"] | None = None,
) -> Statistic:
    """Compare two shares by Fisher's exact test; `minded`: the only change that would be."""
    few, many = (float(tail[0]) for tail in tails(_counts([have]), of, _counts([live]), live_of))
    p = {"more": many, "less": few, None: min(1.0, 2 * min(few, many))}[minded]
    before, now = share(have, of), share(live, live_of)
    changes = {"more": now.high - before.value, "less": before.value - now.low}
    large = max(changes.values()) if minded is None else changes[minded]
    return Statistic(name, meaning, p, large >= MINDED_SHARE, profile=before, live=now)


# --- words --------------------------------------------------------------------------------------------


def vocabulary(profile: Profile, live: Features, texts: Sequence[str], rng: np.random.Generator) -> Statistic:
    """Compare how many prompts have each word.

    The words of a prompt hang together, so the test is made for each place of the table alone (Fisher), times the
    number of places that enough prompts have; the intervals draw whole live prompts.
    """
    counts = live.counts()[:WORDS]
    tested = np.flatnonzero(profile.words + counts >= LEAST)
    before, now = profile.words[tested], counts[tested]
    of = (profile.prompts, len(live))
    moved = np.abs(now / of[1] - before / of[0]) >= MINDED_SHARE
    far = np.flatnonzero(moved & far_off(before, of[0], now, of[1]))
    few, many = tails(before[far], of[0], now[far], of[1])
    values = np.ones(len(tested))
    values[far] = np.minimum(1.0, 2 * np.minimum(few, many) * len(tested))
    apart = _apart(profile, live, tested, rng)
    least = np.argsort(values, kind="stable")[:SHOWN_WORDS]
    places = [int(tested[i]) for i in least if values[i] <= ALPHA]
    words = _words_at(places, live, texts)
    parts = [
        Part(words[place], float(profile.words[place] / profile.prompts), float(counts[place] / len(live)))
        for place in places
    ]
    meaning, p = "which words they use", float(values.min(initial=1.0))
    return _statistic("words", meaning, Difference(*apart, p), parts)


def _apart(
    profile: Profile, live: Features, tested: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Estimate, Estimate]:
    """PSI and Jensen-Shannon of the shares of all words, the rare ones together."""
    numbers = np.full(WORDS, len(tested))
    numbers[tested] = np.arange(len(tested))
    in_words = live.places < WORDS
    places, rows = numbers[live.places[in_words]], live.rows()[in_words]

    def of_live(weights: NDArray[np.int64]) -> Counts:
        return np.bincount(places, weights=weights[rows], minlength=len(tested) + 1).astype(np.int64)

    before, now = merged(profile.words, numbers), of_live(np.ones(len(live), dtype=np.int64))
    psi, js = np.empty(WORD_RESAMPLES), np.empty(WORD_RESAMPLES)
    for i in range(WORD_RESAMPLES):
        drawn = of_live(np.bincount(rng.integers(len(live), size=len(live)), minlength=len(live)))
        again = rng.poisson(before)
        psi[i], js[i] = stability_index(again, drawn), jensen_shannon(again, drawn)
    return (
        basic_interval(float(stability_index(before, now)), psi, 0.95, np.inf),
        basic_interval(float(jensen_shannon(before, now)), js, 0.95, 1.0),
    )


def _words_at(places: Sequence[int], live: Features, texts: Sequence[str]) -> dict[int, str]:
    """The word at each place that most live prompts have; of a place without any, that it is a word of the profile."""
    found = {}
    rows = live.rows()
    for place in places:
        here = [texts[row] for row in rows[live.places == place][:LOOKED_AT].tolist()]
        found[place] = _commonest(here, {place}) or "a word that is asked no more"
    return found


def _commonest(texts: Sequence[str], meant: Container[int]) -> str | None:
    """Of the words at these places, the one that most of them have."""
    counts = Counter(word for text in texts for word in {word.lower() for word in _WORD.findall(text)})
    for word, _ in counts.most_common():
        places = word_places(word)
        if len(places) == 1 and int(places[0]) in meant:
            # Numbers of as many digits are counted as one word.
            return f"a number of {len(word)} digits" if word.isdigit() else word
    return None
