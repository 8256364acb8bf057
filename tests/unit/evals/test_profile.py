"""The profile of a release: the same for the same prompts, without their text, and refused where it says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sftdist.core.errors import DataError
from sftdist.evals.features import features_of
from sftdist.evals.profile import LEAST_PROMPTS, LEVELS, OUT, Profile, ProfiledPrompt, profile_of
from tests.live_prompts import prompt

PROMPTS = [ProfiledPrompt(prompt(source, i), source) for source in ("domain", "format") for i in range(150)]


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_of(PROMPTS)


def test_it_is_the_same_in_any_order_and_after_a_file(profile: Profile, tmp_path: Path) -> None:
    profile.write(tmp_path / "profile.json")
    read = Profile.read(tmp_path / "profile.json")
    assert (
        json.dumps(read.to_json()) == json.dumps(profile.to_json()) == json.dumps(profile_of(PROMPTS[::-1]).to_json())
    )
    live = features_of([one.text for one in PROMPTS[:20]])
    assert np.array_equal(read.model.topics(live), profile.model.topics(live))
    assert np.array_equal(read.model.surprise(live), profile.model.surprise(live))


def test_it_holds_no_text(profile: Profile) -> None:
    text = json.dumps(profile.to_json()).lower()
    words = {word.strip(".,:").lower() for one in PROMPTS for word in one.text.split() if word.isalpha()}
    assert {word for word in words if len(word) > 4 and f'"{word}' in text} <= {"format", "domain"}  # names of sources
    assert "refund" not in text


def test_counts_add_up(profile: Profile) -> None:
    assert profile.by_source == {"domain": 150, "format": 150}
    assert sum(profile.lengths.values()) == sum(profile.languages.values()) == 300
    assert profile.measured.typical.sum() == profile.measured.topics.sum() == 200
    assert profile.words.max() <= 300


def test_its_own_kind_is_typical_and_another_is_not(profile: Profile) -> None:
    own = features_of([prompt("domain", i) for i in range(300, 500)])
    other = features_of([prompt("general", i) for i in range(200)])
    assert np.mean(profile.model.typical(own) == OUT) < 5 * LEVELS[0]
    assert np.mean(profile.model.typical(other) == OUT) > 0.9
    assert np.mean(profile.model.likely_sources(own) == 0) > 0.98


def test_prompts_without_a_word_are_counted(profile: Profile) -> None:
    empty = features_of(["", "?!", "\U0001f600"])
    assert profile.model.topics(empty).tolist() == [len(profile.model.centres)] * 3
    assert profile.model.surprise(empty).tolist() == [0.0] * 3
    assert profile_of([*PROMPTS, ProfiledPrompt("...", "domain")]).prompts == 301


def test_all_prompts_alike_make_a_profile() -> None:
    found = profile_of([ProfiledPrompt("Say hello.", "one")] * 40)
    assert found.measured.typical.sum() == found.measured.topics.sum() == 27
    assert np.isfinite(found.model.borders).all()


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(DataError, match=rf"given 19 prompts, required at least {LEAST_PROMPTS}"):
        profile_of(PROMPTS[:19])


def test_a_file_that_is_no_profile_of_ours_is_refused(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with pytest.raises(DataError, match="given no file"):
        Profile.read(file)
    wrongs: list[object] = [[], {}, {**profile.to_json(), "features": 0}]
    for wrong in wrongs:
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="publish the release again"):
            Profile.read(file)
