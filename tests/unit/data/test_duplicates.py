"""Which rows of a source stay: exact and near duplicates, contradictions, flags; held-out rows keep their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.settings import NearDuplicates, OnFinding
from sftdist.data.duplicates import FLAGS, STAGES, Decision, Facts, decide
from sftdist.data.keys import answer_key, content_key, prompt_key
from sftdist.data.near import Near, near_twins, signatures
from sftdist.data.schema import Conversation, Message

NEAR = Near(0.8, 3)
LONG = (
    "Explain in a few plain words how a lake in the mountains freezes in winter and why the fish survive below the ice"
)


def chat(prompt: str, answer: str, *more: str) -> Conversation:
    turns = (prompt, answer, *more)
    return Conversation("x", tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))


def facts(rows: list[Conversation], **given: Any) -> Facts:
    def digests(key: Any) -> Any:
        return np.frombuffer(b"".join(map(key, rows)), dtype=np.uint8).reshape(len(rows), 16)

    columns = {
        "split": np.zeros(len(rows), np.uint8),
        "refused": np.zeros(len(rows), bool),
        "flags": np.zeros(len(rows), np.uint8),
        **{name: np.array(values, np.uint8) for name, values in given.items()},
    }
    columns["refused"] = columns["refused"].astype(bool)
    return Facts(
        digests(content_key), digests(prompt_key), digests(answer_key), signatures=signatures(rows, NEAR), **columns
    )


def decided(found: Facts, **given: Any) -> Decision:
    policies = {
        "deduplicate": True,
        "near": NEAR,
        "near_duplicates": NearDuplicates.drop,
        "contradictions": OnFinding.report,
        **given,
    }
    return decide(found, **policies)


def left(decision: Decision) -> list[tuple[str, int]]:
    return [(STAGES[stage], twin) for stage, twin in zip(decision.stage.tolist(), decision.twin.tolist(), strict=True)]


KEPT = ("kept", -1)


def test_of_exact_duplicates_the_first_stays() -> None:
    rows = [chat("a?", "one"), chat("b?", "two"), chat(" a?", "one "), chat("a?", "one")]
    assert left(decided(facts(rows))) == [KEPT, KEPT, ("duplicate", 0), ("duplicate", 0)]
    assert decided(facts(rows)).found == {"duplicate": 2}
    assert decided(facts(rows)).examples == {"duplicate": [(2, 0), (3, 0)]}
    # Without deduplicating they are near duplicates of each other, which are told apart.
    assert left(decided(facts(rows), deduplicate=False, near_duplicates=NearDuplicates.off)) == [KEPT] * 4


@pytest.mark.parametrize(("policy", "stage"), [("drop", "near_duplicate"), ("report", "kept"), ("off", "kept")])
def test_near_duplicates_follow_their_policy(policy: str, stage: str) -> None:
    rows = [chat(LONG, "It freezes from above."), chat("b?", "two"), chat(LONG + " layer", "It freezes from above.")]
    decision = decided(facts(rows), near_duplicates=NearDuplicates(policy))
    assert left(decision) == [KEPT, KEPT, (stage, 0 if stage != "kept" else -1)]
    assert decision.found == ({} if policy == "off" else {"near_duplicate": 1})


def test_held_out_rows_never_leave_for_what_is_near_or_contradicts() -> None:
    """The wrong variant compares all splits together: then the holdout row, which comes later, would leave."""
    rows = [chat(LONG, "It freezes."), chat(LONG + " sheet", "It freezes."), chat(LONG + " (sheet)", "It freezes.")]
    rows += [chat("same?", "yes"), chat("same?", "no")]
    assert near_twins(signatures(rows, NEAR)[:, 0], NEAR)[:3].tolist() == [-1, 0, 1]
    for split in ([0, 2, 2, 2, 2], [0, 1, 1, 1, 1], [0, 2, 1, 1, 1]):
        decision = decided(facts(rows, split=split), contradictions=OnFinding.drop)
        assert left(decision) == [KEPT] * 5
        assert decision.found["contradiction"] == 2
    assert decided(facts(rows, split=[0, 2, 2, 2, 2])).found["near_duplicate"] == 1


@pytest.mark.parametrize("policy", list(OnFinding))
def test_one_prompt_with_different_answers(policy: OnFinding) -> None:
    rows = [
        chat("p", "yes"),
        chat("q", "1"),
        chat("p ", "no"),
        chat("p", "yes", "sure?", "yes"),
        chat("q", "1", "and?", "2"),
    ]
    decision = decided(facts(rows), contradictions=policy)
    assert decision.found == {"contradiction": 3}
    assert decision.examples["contradiction"] == [(0, 2), (2, 0), (3, 2)]
    gone = [("contradiction", 2), KEPT, ("contradiction", 0), ("contradiction", 2), KEPT]
    assert left(decision) == (gone if policy is OnFinding.drop else [KEPT] * 5)


def test_other_tools_are_another_question() -> None:
    with_tool = replace(chat("p", "yes"), tools=({"type": "function", "function": {"name": "f"}},))
    rows = [with_tool, chat("p", "no"), replace(with_tool, id="y")]
    assert "contradiction" not in decided(facts(rows)).found
    rows[2] = replace(chat("p", "no"), tools=with_tool.tools)
    assert decided(facts(rows)).examples["contradiction"] == [(0, 2), (2, 0)]


def test_a_contradiction_is_no_near_duplicate() -> None:
    rows = [chat(LONG, "At 0 degrees."), chat(LONG, "At 4 degrees.")]
    assert left(decided(facts(rows), contradictions=OnFinding.drop)) == [("contradiction", 1), ("contradiction", 0)]


def test_rows_that_left_are_nobodys_twins() -> None:
    rows = [chat(LONG, "It freezes."), chat(LONG + " sheet", "It freezes."), chat("p", "yes"), chat("p", "no")]
    decision = decided(facts(rows, refused=[1, 0, 1, 0]), contradictions=OnFinding.drop)
    assert left(decision) == [("refused", -1), KEPT, ("refused", -1), KEPT]


@pytest.mark.parametrize("name", list(FLAGS))
def test_flagged_train_rows_leave(name: str) -> None:
    rows = [chat(f"question {i}", f"answer {i}") for i in range(3)]
    decision = decided(facts(rows, flags=[FLAGS[name]] * 3, split=[0, 1, 2]))
    assert left(decision) == [(name, -1), KEPT, KEPT]


def test_nothing_is_decided_of_no_rows() -> None:
    assert left(decided(facts([chat("a", "b")][:0]))) == []


row = st.builds(
    chat, st.sampled_from(["p", "q", LONG, LONG + " now", LONG + " here"]), st.sampled_from(["yes", "no", "yes indeed"])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(row, max_size=12), st.sampled_from(list(OnFinding)), st.data())
def test_every_row_is_kept_or_has_a_reason(rows: list[Conversation], policy: OnFinding, data: st.DataObject) -> None:
    split_of = {prompt: data.draw(st.integers(0, 2)) for prompt in sorted({row.messages[0].content for row in rows})}
    found = facts(rows, split=[split_of[row.messages[0].content] for row in rows])
    decision = decided(found, contradictions=policy)
    for i, (stage, twin) in enumerate(left(decision)):
        if stage == "kept":
            assert twin == -1
        elif stage == "duplicate":
            assert content_key(rows[twin]) == content_key(rows[i])
            assert STAGES[decision.stage[twin]] != "duplicate"
        elif stage == "contradiction":
            assert prompt_key(rows[twin]) == prompt_key(rows[i])
            assert answer_key(rows[twin]) != answer_key(rows[i])
        else:
            assert stage == "near_duplicate"
            assert twin < i
        assert stage in ("kept", "duplicate") or found.split[i] == 0
        assert twin < 0 or found.split[twin] == found.split[i]
    kept = np.flatnonzero(decision.stage == STAGES.index("kept"))
    assert len({content_key(rows[i]) for i in kept}) == len(kept)
