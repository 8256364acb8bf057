"""Two manifests compared: every row is accounted for once, by what it says, not by where it stands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sftdist.core.errors import DataError
from sftdist.data.comparison import Comparison, Some, SourceChanges, compare, compare_rows, show_comparison
from sftdist.data.manifest import Provenance, Rows, read_manifest, rows_behind
from sftdist.data.rowset import RowSet
from sftdist.data.store import SPLITS
from tests.unit.data.rowsets import Row, row_set

ROWS: list[Row] = [(f"r{i}", f"question {i}", f"answer {i}") for i in range(30)]


def sources(fraction: float = 0.3, **rows: list[Row]) -> dict[str, RowSet]:
    return {name: row_set(name, given_rows, fraction) for name, given_rows in rows.items()}


def changes(then: list[Row], now: list[Row], **stages: str) -> SourceChanges:
    return compare_rows(sources(a=then), sources(a=now), lambda source: stages)["a"]


def test_order_and_copies_are_no_change() -> None:
    assert changes(ROWS, [*ROWS[::-1], *ROWS[:5]]) == SourceChanges()


def test_what_is_added_and_dropped_is_named_in_order_and_counted() -> None:
    found = changes(ROWS[:20], ROWS[7:], r0="near_duplicate", r1="near_duplicate", r2="breach")
    assert found.added == Some(10, [f"r{i}" for i in range(20, 25)])
    assert str(found.added) == "r20, r21, r22, r23, r24 and 5 more"
    assert found.dropped == Some(7, [f"r{i}" for i in range(5)])
    assert found.left == {"gone": 4, "near_duplicate": 2, "breach": 1}
    assert (found.changed, found.re_split, found.moved) == (Some(), {}, {})


def test_another_text_under_the_same_id_has_changed() -> None:
    """The wrong variant compares ids: it would see nothing."""
    found = changes(ROWS, [(i, p, f"new {a}") if i in ("r3", "r4") else (i, p, a) for i, p, a in ROWS])
    assert found == SourceChanges(changed=Some(2, ["r3", "r4"]))


def test_another_row_in_the_same_place_has_not() -> None:
    then = [(f"x.jsonl:{n}", p, a) for n, (_, p, a) in enumerate(ROWS[:-1])]
    now = [(f"x.jsonl:{n}", p, a) for n, (_, p, a) in enumerate(ROWS[1:])]
    found = changes(then, now)
    assert (found.dropped.rows, found.added.rows, found.changed.rows) == (1, 1, 0)
    at_the_end = [*then[:-1], (then[-1][0], "a new question", "x")]
    found = changes(then, at_the_end)
    assert (found.dropped.rows, found.added.rows, found.changed.rows) == (1, 1, 0)


def test_rows_in_another_split() -> None:
    then, now = sources(0.2, a=ROWS), sources(0.5, a=ROWS[::-1])
    found = compare_rows(then, now)["a"]
    held = [i for (i, _, _), split in zip(ROWS, then["a"].split, strict=True) if split == 2]
    more = [i for (i, _, _), split in zip(ROWS[::-1], now["a"].split, strict=True) if split == 2 and i not in held]
    assert found == SourceChanges(re_split={"train -> holdout": Some(len(more), more[:5])})
    assert len(more) > 2


def test_a_row_that_left_one_source_for_another_has_moved() -> None:
    found = compare_rows(sources(a=ROWS[:10], b=ROWS[10:]), sources(a=ROWS[:8], b=ROWS[8:], c=ROWS[29:]))
    assert found["a"] == SourceChanges(moved={"to b": Some(2, ["r8", "r9"])})
    assert found["b"] == SourceChanges()
    assert found["c"] == SourceChanges(added=Some(1, ["r29"])), "it is a copy: the row is in b still"


def test_a_source_of_another_name_has_moved_and_a_new_one_is_added() -> None:
    found = compare_rows(sources(a=ROWS[:10]), sources(b=ROWS[:10], c=ROWS[10:12]))
    assert found["a"].moved["to b"].rows == 10
    assert found["b"] == SourceChanges()
    assert found["c"].added.rows == 2


NUMBERS = st.lists(st.integers(0, 29), max_size=20)


@settings(deadline=None, max_examples=150)
@given(then=st.tuples(NUMBERS, NUMBERS), now=st.tuples(NUMBERS, NUMBERS))
def test_no_row_is_lost_in_a_comparison(then: tuple[list[int], list[int]], now: tuple[list[int], list[int]]) -> None:
    """Per source: what was there, less what was dropped, has changed or moved away, and what came, is what is there."""
    named = zip("ab", then, now, strict=True)
    found = compare_rows(
        sources(a=[ROWS[i] for i in then[0]], b=[ROWS[i] for i in then[1]]),
        sources(a=[ROWS[i] for i in now[0]], b=[ROWS[i] for i in now[1]]),
    )
    came = {
        name: sum(some.rows for other in found.values() for some in other.moved.values() if f"to {name}" in other.moved)
        for name in "ab"
    }
    for name, before, after in named:
        rows = found[name]
        gone = rows.dropped.rows + sum(some.rows for some in rows.moved.values())
        assert len(set(before)) - gone + rows.added.rows + came[name] == len(set(after))
        assert rows.dropped.rows == sum(rows.left.values())
        assert rows.changed.rows == 0
        assert rows.re_split == {}


# --- manifests ------------------------------------------------------------------------------------------------


def source(train: tuple[int, int, float], store: str = "a-1", **said: Any) -> dict[str, Any]:
    counts = dict(zip(("rows", "tokens", "targets"), train, strict=True))
    entry = {"store": store, "splits": dict.fromkeys(SPLITS, counts), "made_of": {"input": "x"}}
    return {**entry, **asdict(Provenance()), **said}


def manifest(**entries: dict[str, Any]) -> dict[str, Any]:
    return {"format": 1, "sources": entries}


def shown(found: Comparison) -> str:
    console = Console(width=120, record=True, highlight=False)
    show_comparison(found, console)
    return console.export_text()


def test_what_a_person_reads() -> None:
    old = manifest(a=source((20, 200, 100.0)), b=source((5, 100, 100.0)))
    new = manifest(
        a=source((23, 230, 150.0), licence="MIT", made_of={"input": "y"}), c=source((1, 10, 50.0), store="c-1")
    )
    then = Rows(sources(0.2, a=ROWS[:20]), {"b": "its store b-1 is not in stores"})
    now = Rows(sources(0.3, a=ROWS[2:25], c=[("n", "new", "x")]))
    text = shown(compare(old, new, then, now, lambda name: {"r0": "contradiction"}))
    assert text.splitlines()[:7] == [
        "a: input, licence changed",
        "b: it is not there any more",
        "c: it is new",
        "b: its rows cannot be compared, only their counts: its store b-1 is not in stores",
        "a: 5 added: r20, r21, r22, r23, r24",
        "a: 2 dropped: r0, r1 (1 contradiction, 1 gone)",
        f"a: {text.split('a: ')[4].splitlines()[0]}",
    ]
    assert "re-split train -> holdout: r" in text.splitlines()[6]
    assert text.splitlines()[8:] == [
        "a, train: 20 -> 23 rows, 200 -> 230 tokens, 100 -> 150 supervised, 50.0% -> 75.0% of all supervised (+25.0)",
        "b, train: 5 -> 0 rows, 100 -> 0 tokens, 100 -> 0 supervised, 50.0% -> 0.0% of all supervised (-50.0)",
        "c, train: 0 -> 1 rows, 0 -> 10 tokens, 0 -> 50 supervised, 0.0% -> 25.0% of all supervised (+25.0)",
    ]


def test_a_share_that_hardly_moves_has_no_sign() -> None:
    then, now = (manifest(a=source((1, 1, 1e6)), b=source((1, 1, b))) for b in (1e6, 1e6 + 1))
    text = shown(compare(then, now, Rows(), Rows()))
    assert "50.0% -> 50.0% of all supervised (+0.0)" in text
    assert "-0.0" not in text


def test_nothing_has_changed() -> None:
    same = manifest(a=source((20, 200, 100.0)))
    text = shown(compare(same, same, Rows(sources(a=ROWS)), Rows(sources(a=ROWS))))
    assert text.splitlines()[0] == "a: the rows are the same, and in the same splits"


def test_a_source_that_is_gone_on_one_side_is_compared_on_neither() -> None:
    """The wrong variant tells that all of its rows were added."""
    both = manifest(a=source((20, 200, 100.0)))
    found = compare(both, both, Rows({}, {"a": "why"}), Rows(sources(a=ROWS)))
    assert found.rows == {}
    assert found.gone == {"a": "why"}


def test_stores_that_are_not_there_are_named(tmp_path: Path) -> None:
    found = rows_behind(
        manifest(a=source((1, 1, 1.0), store="a-123")), [tmp_path / "x", tmp_path / "y", tmp_path / "x"]
    )
    assert found == Rows({}, {"a": f"its store a-123 is not in {tmp_path / 'x'} or {tmp_path / 'y'}"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "given a file that cannot be read"),
        ("{", "given a file that cannot be read"),
        ("[]", "given a file that is no data manifest, required a data-manifest.json"),
        (json.dumps({"format": 1, "version": 1}), "is no data manifest"),
        (json.dumps({"format": 1, "sources": {"a": {"store": "a-1"}}}), "is no data manifest"),
        (json.dumps({"format": 2, "sources": {}}), "given a manifest of format 2, required format 1 or earlier"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "m.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(path)
