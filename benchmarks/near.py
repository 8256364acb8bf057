"""Near duplicates: how many of 500 edited copies are found among real rows, and how many other rows are taken for them.

    python -m benchmarks.near [--copies 500] [--seed 0] [--threshold T] [--shingle WORDS] [--show 0]

The copies are of rows of the three sources of the real chat data, drawn at random, each edited in one way (the kinds
are in the table), and put back at random places of their source. Found: the copy and its original end in one group, so
that the later of the two leaves. Other rows: all that are neither copy nor original, of which many have real twins
in this data (`--show N` prints N pairs to judge by eye). Signatures are made on one core. Writes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import SOURCES, Result, command, load, shared_data
from sftdist.core.settings import NearSettings
from sftdist.data import near as near_module
from sftdist.data.keys import content_key
from sftdist.data.near import Near, near_twins, signatures, text_signatures, whole_text, words
from sftdist.data.schema import Conversation
from sftdist.data.sources import Source, conversations

SHINGLES, THRESHOLDS = (1, 2, 3, 5), (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)
SENTENCES = (
    "Please think about it carefully first.",
    "Keep the answer short and clear.",
    "I need this for my homework tonight.",
    "If something is missing, make a sensible assumption.",
)
OTHER_WORDS = {
    "write": "create", "find": "look up", "calculate": "compute", "how": "exactly how", "many": "lots", "a": "one",
    "the": "this", "function": "routine", "is": "equals", "of": "from", "get": "fetch", "what": "which",
    "to": "in order to", "he": "she", "number": "count", "in": "within", "and": "plus", "each": "every",
    "for": "per", "use": "apply",
}  # fmt: skip

NOTES = [
    "Of the other rows that 3 words take for near duplicates (seed 0), pairs drawn at random were judged by eye: does "
    "one ask for something else than the other? From 0.65 on 1 of 57 did, between 0.6 and 0.65 4 of 50, between 0.55 "
    "and 0.6 8 of 35 (of the format source alone). Taken for all, about 0.05 % of the other rows are dropped wrongly "
    "at 0.65, 0.15 % at 0.6 and 0.4 % at 0.55; the rest are real near duplicates, most of them of the format source "
    "(the same question to the same tool in other words).",
]

Edit = Callable[[str, Random], str]


# --- edits ------------------------------------------------------------------------------------------------


def case_and_punctuation(text: str, random: Random) -> str:
    return re.sub(r"[.,;:!?\"]+(?=\s|$)", "", text.lower())


def layout(text: str, random: Random) -> str:
    return "\n\n".join("  " + line.strip() for line in re.split(r"\n|(?<=[.!?]) ", text))


def typos(text: str, random: Random) -> str:
    """Two letters swapped in one of 50 words, in one at least."""
    return _words_changed(text, random, 0.02, lambda word: _swapped(word, random))


def other_words(text: str, random: Random) -> str:
    """Another word for one of 33, for one at least."""
    return _words_changed(text, random, 0.03, lambda word: OTHER_WORDS.get(word.lower(), f"{word[:-1] or word}ing"))


def one_number(text: str, random: Random) -> str:
    """One number changed, where there is one."""
    found = list(re.finditer(r"\d+", text))
    if not found:
        return typos(text, random)
    at = random.choice(found)
    return f"{text[: at.start()]}{int(at.group()) + random.randint(1, 9)}{text[at.end() :]}"


def sentence_more(text: str, random: Random) -> str:
    return _at_a_border(text, random, random.choice(SENTENCES))


def sentence_less(text: str, random: Random) -> str:
    """The shortest sentence taken out, where there are three."""
    parts = _sentences(text)
    if len(parts) < 3:
        return typos(text, random)
    parts.remove(min(parts, key=len))
    return " ".join(parts)


def sentences_swapped(text: str, random: Random) -> str:
    """Two neighbours change places: sentences, or entries of a list."""
    lines = text.split("\n")
    joint = "\n" if len(lines) > 2 else " "
    parts = lines if len(lines) > 2 else _sentences(text)
    if len(parts) < 2:
        return typos(text, random)
    at = random.randrange(len(parts) - 1)
    parts[at : at + 2] = parts[at + 1], parts[at]
    return joint.join(parts)


def greeting(text: str, random: Random) -> str:
    return f"Hi! {text} Thanks."


def typos_and_layout(text: str, random: Random) -> str:
    return layout(typos(case_and_punctuation(text, random), random), random)


# In which turns each is done: user and assistant, or one of them.
KINDS: dict[str, tuple[Edit, str]] = {
    "case and punctuation": (case_and_punctuation, "both"),
    "layout": (layout, "both"),
    "typos": (typos, "both"),
    "other words": (other_words, "both"),
    "one number": (one_number, "user"),
    "a sentence more": (sentence_more, "user"),
    "a sentence less": (sentence_less, "assistant"),
    "neighbours swapped": (sentences_swapped, "assistant"),
    "greeting and thanks": (greeting, "user"),
    "typos, case and layout": (typos_and_layout, "both"),
}


def edited(row: Conversation, kind: str, random: Random) -> Conversation:
    edit, roles = KINDS[kind]
    messages = tuple(
        replace(m, content=edit(m.content, random)) if m.role != "system" and roles in ("both", m.role) else m
        for m in row.messages
    )
    return replace(row, id=f"copy of {row.id}", messages=messages)


def _words_changed(text: str, random: Random, share: float, change: Callable[[str], str]) -> str:
    pieces = re.split(r"(\w+)", text)
    at = [i for i in range(1, len(pieces), 2) if len(pieces[i]) > 1]
    for i in random.sample(at, min(len(at), max(1, round(share * len(at))))):
        pieces[i] = change(pieces[i])
    return "".join(pieces)


def _swapped(word: str, random: Random) -> str:
    at = random.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :] if word[at] != word[at + 1] else word + word[-1]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def _at_a_border(text: str, random: Random, sentence: str) -> str:
    parts = _sentences(text)
    parts.insert(random.randrange(len(parts) + 1), sentence)
    return " ".join(parts)


# --- planting and finding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """The rows of a source with copies among them: `pairs` are (place of the copy, of its original, kind)."""

    name: str
    rows: list[Conversation]
    pairs: list[tuple[int, int, str]]


def planted(sources: dict[str, list[Conversation]], copies: int, seed: int) -> list[Planted]:
    random = Random(seed)
    every = [(name, i) for name, rows in sources.items() for i in range(len(rows))]
    chosen = Counter[str]()
    copied: dict[str, list[tuple[Conversation, int, str]]] = {name: [] for name in sources}
    for number, (name, i) in enumerate(random.sample(every, copies)):
        kind = list(KINDS)[number % len(KINDS)]
        copied[name].append((edited(sources[name][i], kind, random), i, kind))
        chosen[name] += 1
    found = []
    for name, rows in sources.items():
        order = random.sample(range(len(rows) + chosen[name]), len(rows) + chosen[name])
        place = np.argsort(order)
        everything = [*rows, *(row for row, _, _ in copied[name])]
        pairs = [(int(place[len(rows) + k]), int(place[i]), kind) for k, (_, i, kind) in enumerate(copied[name])]
        found.append(Planted(name, [everything[i] for i in order], pairs))
    return found


@dataclass(frozen=True)
class Outcome:
    """Copies found by kind and by source, and the pairs of other rows of which one would leave."""

    found: Counter[str]
    found_in: Counter[str]
    others: list[tuple[str, int, int]]
    rows: int


def outcome(sources: list[Planted], near: Near, made: dict[str, NDArray[np.uint16]]) -> Outcome:
    found, found_in, others, rows = Counter[str](), Counter[str](), [], 0
    for source in sources:
        twin = near_twins(made[source.name], near)
        root = np.arange(len(twin))
        for row in np.flatnonzero(twin >= 0):
            root[row] = root[twin[row]]
        kinds = [kind for copy, original, kind in source.pairs if root[copy] == root[original]]
        found.update(kinds)
        found_in[source.name] = len(kinds)
        planted_here = {place for copy, original, _ in source.pairs for place in (copy, original)}
        others += [(source.name, int(i), int(twin[i])) for i in np.flatnonzero(twin >= 0) if int(i) not in planted_here]
        rows += len(twin) - len(planted_here)
    return Outcome(found, found_in, others, rows)


def made_for(sources: list[Planted], shingle: int) -> dict[str, NDArray[np.uint16]]:
    near = Near(1.0, shingle)
    return {source.name: text_signatures([whole_text(row) for row in source.rows], near) for source in sources}


def without_exact(rows: Iterator[Any]) -> list[Conversation]:
    """Exact duplicates are another rule's."""
    return list({content_key(row): row for row in rows if isinstance(row, Conversation)}.values())


# --- speed ----------------------------------------------------------------------------------------------------


def signatures_per_second(rows: list[Conversation], near: Near) -> tuple[float, float]:
    """Both signatures of conversations, on one core: rows, and words of their texts, in a second of CPU time."""
    signatures(rows[:10], near)
    began = time.process_time()
    signatures(rows, near)
    seconds = time.process_time() - began
    return len(rows) / seconds, sum(len(words(whole_text(row))) for row in rows) / seconds


def seconds_for(found: NDArray[np.uint16], near: Near) -> tuple[float, float]:
    """CPU seconds of near_twins, and MiB of memory beside the signatures."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    near_twins(found, near)
    seconds = time.process_time() - began
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def random_signatures(rows: int, common: float) -> NDArray[np.uint16]:
    """A tenth are copies that differ in ten values; `common`: the share of the values that come from a template."""
    random = np.random.default_rng(0)
    found = random.integers(2**16, size=(rows, near_module.PERMUTATIONS), dtype=np.uint16)
    for start in range(0, rows, 10_000):
        part = found[start : start + 10_000]
        template = random.random(part.shape) < common
        part[template] = np.broadcast_to(found[0], part.shape)[template]
    copies = rows // 10
    found[-copies:] = found[:copies]
    found[-copies:, :10] += 1
    return found


# --- all of it -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=NearSettings().threshold)
    parser.add_argument("--shingle", type=int, default=NearSettings().shingle, choices=SHINGLES)
    parser.add_argument("--show", type=int, default=0, help="pairs of other rows to print")
    parser.add_argument("--rows", type=int, default=1_000_000, help="signatures whose twins are timed")
    options = parser.parse_args()
    near = Near(options.threshold, options.shingle)
    folder = shared_data()
    sources = {name.split("_")[0]: without_exact(conversations(Source(name, str(folder / name)))) for name in SOURCES}
    rows = [row for own in sources.values() for row in own]
    rate, said = signatures_per_second([row for row in rows if 700 < len(whole_text(row)) < 1100], near)
    plants = planted(sources, options.copies, options.seed)
    made = {shingle: made_for(plants, shingle) for shingle in SHINGLES}
    best = outcome(plants, near, made[near.shingle])
    show(best, plants, options.show, options.seed)
    more = {f"shingle {shingle}": by_threshold(plants, shingle, made[shingle]) for shingle in SHINGLES}
    with template_as_text():
        title = f"shingle {near.shingle}, where a template counts as text"
        more[title] = by_threshold(plants, near.shingle, made[near.shingle])
    seconds, memory = seconds_for(random_signatures(options.rows, 0.0), near)
    templated, _ = seconds_for(random_signatures(options.rows, 0.5), near)
    figures = {
        "rows of the three sources without exact duplicates": len(rows),
        "copies found": best.found.total() / options.copies,
        "other rows dropped": len(best.others) / best.rows,
        "other rows dropped by source": ", ".join(f"{n} {c}" for n, c in Counter(n for n, _, _ in best.others).items()),
        "bands, and the share of pairs at the threshold that they miss": f"{len(near.bands())}, {missed(near):.1e}",
        "conversations of about 200 tokens a second on one core, both signatures": rate,
        "the same in words a second": said,
        f"twins of {options.rows:,} signatures, CPU seconds": seconds,
        "memory beside them, MiB": memory,
        f"twins of {options.rows:,} signatures with half of their values from a template, CPU seconds": templated,
        "load when the speed was measured": load(),
    }
    about = " ".join(__doc__.split("\n\n")[2].split()) + f" Threshold {near.threshold}, {near.shingle} words."
    Result("near", command("benchmarks.near"), figures, by_kind(best, plants), about, more, NOTES).save()


def by_kind(best: Outcome, plants: list[Planted]) -> list[dict[str, Any]]:
    copies = Counter(kind for plant in plants for _, _, kind in plant.pairs)
    return [{"kind": kind, "copies": copies[kind], "found": best.found[kind] / copies[kind]} for kind in KINDS]


def by_threshold(plants: list[Planted], shingle: int, made: dict[str, NDArray[np.uint16]]) -> list[dict[str, Any]]:
    return [
        {"threshold": threshold, **shares(outcome(plants, Near(threshold, shingle), made), plants)}
        for threshold in THRESHOLDS
    ]


def shares(found: Outcome, plants: list[Planted]) -> dict[str, Any]:
    """Of all copies, of those in each source, and of the other rows."""
    copies = {plant.name: len(plant.pairs) for plant in plants}
    return {
        "copies found": found.found.total() / sum(copies.values()),
        **{f"in {name}": found.found_in[name] / count for name, count in copies.items()},
        "other rows dropped": len(found.others) / found.rows,
    }


def show(found: Outcome, plants: list[Planted], number: int, seed: int) -> None:
    """Print pairs of other rows, drawn at random."""
    for name, one, other in Random(seed).sample(found.others, min(number, len(found.others))):
        own = next(plant.rows for plant in plants if plant.name == name)
        print(f"--- {name}\n{whole_text(own[other])}\n>>>\n{whole_text(own[one])}\n")


def missed(near: Near) -> float:
    widths = [band.stop - band.start for band in near.bands()]
    return near_module.share_missed(widths, near_module.PERMUTATIONS - near.least_equal)


@contextmanager
def template_as_text() -> Iterator[None]:
    """The plain rule: no shingle is common, so that rows with one template are near."""
    before, near_module.COMMON_ROWS = near_module.COMMON_ROWS, 10**9
    yield
    near_module.COMMON_ROWS = before


if __name__ == "__main__":
    main()
