"""Live answers beside the release's own: form, refusals, loops, and the contracts that travel with a release."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sftdist.assets import desk
from sftdist.core.errors import ConfigError
from sftdist.evals.features import features_of
from sftdist.evals.live import CONTRACTS, AnswerCounts, Forms, answer_counts, answer_statistics, write_forms
from sftdist.evals.profile import Profile, ProfiledPrompt, profile_of
from sftdist.evals.shift import judged
from tests.live_prompts import answer, prompt

PLACES = range(300, 360)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_of(ProfiledPrompt(prompt(s, i), s) for s in ("domain", "format") for i in range(300))


@pytest.fixture
def forms(tmp_path: Path) -> Forms:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ticket.json").write_text(json.dumps(desk.SCHEMA))
    (tmp_path / "data" / "guide.md").write_text("Write tickets.")
    (tmp_path / "data" / "c.yaml").write_text("schema: ticket.json\nguideline: guide.md\nrules: {max_words: 60}\n")
    release = tmp_path / "release"
    write_forms(release, {"format": tmp_path / "data" / "c.yaml"}, {"format": tmp_path / "data" / "ticket.json"})
    for file in (tmp_path / "data").iterdir():
        file.unlink()  # what a release needs is in it
    return Forms.read(release)


def counted(profile: Profile, forms: Forms, spoil: int = 0, words: str = "I cannot help with that.") -> AnswerCounts:
    """Right answers to tickets and mails, the first `spoil` of each replaced."""
    asked = [(s, i) for s in ("domain", "format") for i in PLACES]
    answers = [words if i - PLACES[0] < spoil else answer(s, i) for s, i in asked]
    return answer_counts(profile.model, features_of([prompt(s, i) for s, i in asked]), answers, forms)


def changed(before: AnswerCounts, now: AnswerCounts) -> set[str]:
    return {one.name for one in judged(answer_statistics(before, now, np.random.default_rng(0))) if one.drift}


def test_answers_are_counted_by_form_refusal_and_loop(profile: Profile, forms: Forms) -> None:
    right, wrong = counted(profile, forms), counted(profile, forms, spoil=10)
    assert (right.answers, right.refusals, right.loops) == (120, 0, 0)
    assert right.forms["format.contract"][0] == right.forms["format.contract"][1] > 50
    assert wrong.refusals == 20
    kept, of = wrong.forms["format.schema"]
    assert 8 <= of - kept <= 10
    assert counted(profile, forms, spoil=5, words="na " * 200).loops == 10
    assert AnswerCounts.of_json(json.loads(json.dumps(wrong.to_json()))) == wrong


def test_what_became_worse_is_found_and_what_did_not_is_not(profile: Profile, forms: Forms) -> None:
    right = counted(profile, forms)
    assert changed(right, right) == set()
    assert {"refusal", "format.contract", "format.schema"} <= changed(right, counted(profile, forms, spoil=30))
    assert "repetition" in changed(right, counted(profile, forms, spoil=30, words="na " * 200))
    # Fewer loops and more right forms are no reason to wake anybody up.
    better = changed(counted(profile, forms, spoil=30, words="na " * 200), right)
    assert better & {"repetition", "format.contract", "format.schema"} == set()


def test_without_answers_nothing_is_compared(profile: Profile, forms: Forms) -> None:
    assert answer_statistics(AnswerCounts.of_json({}), counted(profile, forms), np.random.default_rng(0)) == []
    assert answer_statistics(counted(profile, forms), AnswerCounts(), np.random.default_rng(0)) == []


def test_answers_out_of_the_profile_are_held_against_no_form(profile: Profile, forms: Forms) -> None:
    asked = features_of([prompt("general", i) for i in range(50)])
    found = answer_counts(profile.model, asked, ["No JSON."] * 50, forms)
    assert sum(of for _, of in found.forms.values()) <= 5


def test_a_release_without_forms_and_one_with_a_bad_one(tmp_path: Path) -> None:
    assert Forms.read(tmp_path) == Forms()
    write_forms(tmp_path, {}, {})
    assert not (tmp_path / CONTRACTS).exists()
    (tmp_path / CONTRACTS).mkdir()
    (tmp_path / CONTRACTS / "format.schema.json").write_text('{"type": "thing"}')
    with pytest.raises(ConfigError, match=r"format\.schema\.json"):
        Forms.read(tmp_path)
