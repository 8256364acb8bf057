"""The prompts to label next: out of the profile, of every kind, no two alike, and read by prepare once answered."""

from __future__ import annotations

from collections import Counter

import pytest

from sftdist.core.settings import RowShape
from sftdist.data.message import Message
from sftdist.data.schema import Conversation, parse
from sftdist.evals.features import features_of
from sftdist.evals.label_sample import Candidate, candidates, sample
from sftdist.evals.profile import Profile, ProfiledPrompt, profile_of
from sftdist.evals.traffic import LiveRow
from tests.live_prompts import prompt

FRENCH = "Bonjour, pourriez-vous me dire quand ma commande sera enfin livrée chez moi, s'il vous plaît ?"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_of(ProfiledPrompt(prompt("domain", i), "domain") for i in range(300))


def live(*texts: str) -> list[LiveRow]:
    return [LiveRow(f"live.jsonl:{i + 1}", (Message("user", text),), None) for i, text in enumerate(texts)]


def found(profile: Profile, rows: list[LiveRow]) -> list[Candidate]:
    return candidates(profile, features_of([row.prompt for row in rows]), rows)


def test_only_prompts_out_of_the_profile_are_taken(profile: Profile) -> None:
    usual = [prompt("domain", i) for i in range(300, 360)]
    strange = [prompt("general", i) for i in range(20)]
    places = {one.row.prompt for one in found(profile, live(*usual, *strange))}
    assert len(places & set(strange)) >= 15
    assert len(places & set(usual)) <= 3


def test_near_duplicates_are_taken_once(profile: Profile) -> None:
    text = "Please translate this long sentence about the weather in Norway into Spanish for my cousin"
    rows = live(text, text, f"{text}!", f"{text} today", FRENCH)
    assert [one.row.place for one in sorted(found(profile, rows), key=lambda one: one.row.place)] == [
        "live.jsonl:1",
        "live.jsonl:5",
    ]


def test_a_small_kind_is_not_crowded_out(profile: Profile) -> None:
    rows = live(*[f"Explain {word} matter {word}" for word in _words(60)], FRENCH)
    languages = Counter(row["tags"][2] for row in sample(found(profile, rows), 12))
    assert languages["language_fr"] == 1
    assert sum(languages.values()) == 12


def test_a_longer_sample_contains_the_shorter(profile: Profile) -> None:
    rows = found(profile, live(*[f"Explain {word} to me" for word in _words(40)]))
    ids = [[row["id"] for row in sample(rows, number)] for number in (5, 15, 1000)]
    assert len(set(ids[2])) == len(ids[2]) == len(rows)
    assert ids[2][:15] == ids[1]
    assert ids[1][:5] == ids[0]


def test_prepare_reads_a_row_once_it_is_answered(profile: Profile) -> None:
    said = (
        Message("system", "Be kind."),
        Message("user", "Hello."),
        Message("assistant", "Hi."),
        Message("user", FRENCH),
    )
    (row,) = sample(found(profile, [LiveRow("live.jsonl:1", said, "Demain.")]), 10)
    assert row["tags"][0] == "to_label"
    answered = {**row, "messages": [*row["messages"], {"role": "assistant", "content": "Demain."}]}
    read = parse(answered, RowShape.auto, file="label.jsonl", line=1, id=None)
    assert isinstance(read, Conversation)
    assert read.id == row["id"]
    # What the old model said is context: only the new answer is learned.
    assert [(m.role, m.train) for m in read.messages if m.role == "assistant"] == [
        ("assistant", False),
        ("assistant", None),
    ]


def test_no_prompt_is_out(profile: Profile) -> None:
    assert sample(found(profile, []), 10) == []


def _words(number: int) -> list[str]:
    return [f"{a}{b}{c}o" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"][:number]
