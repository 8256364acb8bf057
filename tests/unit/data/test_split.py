"""The split is a pure function of the prompt: stable, in the asked proportions, the same for equal prompts."""

from __future__ import annotations

from collections import Counter

import pytest

from sftdist.data.keys import prompt_key
from sftdist.data.schema import Conversation, Message
from sftdist.data.split import split_of


def row(prompt: str, answer: str = "a", system: str | None = None) -> Conversation:
    head = (Message("system", system),) if system else ()
    return Conversation("x", (*head, Message("user", prompt), Message("assistant", answer)))


def test_only_what_precedes_the_first_answer_counts() -> None:
    first = row("How  do I\nreset?", "so")
    longer = Conversation("y", (*row(" How do I reset?").messages, Message("user", "and?"), Message("assistant", "b")))
    assert prompt_key(first) == prompt_key(longer)
    assert prompt_key(first) != prompt_key(row("How do I reset!"))
    assert prompt_key(first) != prompt_key(row("How do I reset?", system="s"))


def test_fields_cannot_run_into_each_other() -> None:
    assert prompt_key(row("b", system="a")) != prompt_key(row("a b"))


@pytest.mark.parametrize(("validation", "holdout"), [(0.02, 0.02), (0.3, 0.1), (0.0, 0.0), (0.5, 0.5)])
def test_fractions_are_kept(validation: float, holdout: float) -> None:
    n = 20_000
    found = Counter(
        split_of(prompt_key(row(f"question {i}")), validation=validation, holdout=holdout) for i in range(n)
    )
    assert found[1] / n == pytest.approx(validation, abs=0.012)
    assert found[2] / n == pytest.approx(holdout, abs=0.012)


def test_a_larger_validation_share_moves_no_holdout_row() -> None:
    prompts = [prompt_key(row(f"question {i}")) for i in range(2000)]
    small = [split_of(p, validation=0.02, holdout=0.1) for p in prompts]
    large = [split_of(p, validation=0.4, holdout=0.1) for p in prompts]
    assert [s == 2 for s in small] == [s == 2 for s in large]
    assert all(after == 1 for before, after in zip(small, large, strict=True) if before == 1)


def test_the_split_of_a_prompt_never_changes() -> None:
    """A change here would mix held-out prompts of old runs into training: raise SPLIT_VERSION, and know why."""
    assert prompt_key(row("How do I reset my password?")).hex() == "16e9b6149029309e3d00800c47591f3d"
