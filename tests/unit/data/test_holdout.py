"""The lock of the holdout: refused is exactly what changes it, and every message says what to do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.errors import DataError
from sftdist.data.holdout import Data, Held, Lock, compare, read_lock, settle
from sftdist.data.split import SPLIT_VERSION
from sftdist.data.store import HOLDOUT, TRAIN
from tests.unit.data.rowsets import Row, row_set

Change = Callable[[list[Row]], list[Row]]


def data(fraction: float = 0.3, **sources: list[Row]) -> Data:
    made_with = {"split_version": SPLIT_VERSION, "data.holdout_fraction": fraction}
    return Data([row_set(name, rows, fraction) for name, rows in sources.items()], made_with)


ROWS: list[Row] = [(f"r{i}", f"secret question {i}", f"secret answer {i}") for i in range(60)]
OUT = [row for row, split in zip(ROWS, data(a=ROWS).rows[0].split, strict=True) if split == HOLDOUT]
IN = [row for row in ROWS if row not in OUT]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "conf" / "holdout.json"
    settle(path, "write", data(a=ROWS), print)
    return path


def refusal(lock: Path, found: Data, action: str | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        settle(lock, action, found, print)
    return str(caught.value).splitlines()


def prompt_in(split: int, text: str) -> str:
    """A prompt of that split at the fraction of `data`."""
    texts = (f"{text} {i}" for i in range(1000))
    return next(t for t in texts if (row_set("x", [("", t, "a")], 0.3).split[0] == HOLDOUT) == (split == HOLDOUT))


# --- what is no change of the holdout ------------------------------------------------------------------------


SAME: dict[str, Data] = {
    "the same": data(a=ROWS),
    "reordered": data(a=ROWS[::-1]),
    "more train rows": data(a=[*ROWS, ("new", prompt_in(TRAIN, "more"), "x")]),
    "fewer train rows": data(a=[*OUT, *IN[:3]]),
    "other train rows": data(a=[*OUT, *((i, p, "another answer") for i, p, _ in IN)]),
    "split into two sources": data(a=ROWS[:30], b=ROWS[30:]),
    "in a source of another name": data(other=ROWS),
    "with other ids": data(a=[(f"x{i}", p, a) for i, p, a in ROWS]),
    "with copies": data(a=[*ROWS, *ROWS], b=OUT),
    "a larger fraction that catches no row": data(0.3000001, a=ROWS),
}


@pytest.mark.parametrize("name", SAME)
def test_what_leaves_the_holdout_as_it_is(lock: Path, name: str) -> None:
    before = lock.read_bytes()
    assert len(settle(lock, None, SAME[name], print)) == len(OUT)
    for action in ("write", "extend", "withdraw"):
        settle(lock, action, SAME[name], print)
    assert lock.read_bytes() == before, "a command that has nothing to do writes nothing"
    assert [f.name for f in lock.parent.iterdir()] == [lock.name]


# --- what is one ---------------------------------------------------------------------------------------------


def test_every_kind_of_change_is_told_apart_and_counted(lock: Path) -> None:
    (i, p, _), (j, *_), (k, *_) = OUT[:3]
    new = prompt_in(HOLDOUT, "new")
    rows = [row for row in ROWS if row[0] not in (i, j, k)]
    rows += [(i, p, "corrected"), (j, prompt_in(TRAIN, "typo"), "x"), ("n1", new, "y")]
    assert refusal(lock, data(a=rows)) == [
        f"data.holdout_lock={lock}: given a holdout that is not the locked one (version 1):",
        "  added: 1 row held out, but not in the lock: a n1",
        f"  removed: 1 row in the lock, but not in the data: a {k}",
        *[f"  changed: 2 rows in the lock with another text: {names}" for names in changed_names(lock, i, j)],
        "required the same rows: bring the earlier data and settings back; or, where the change is meant:",
        "  lock=withdraw gives up the rows that are gone or have another text, for good",
        "  then lock=extend takes in the rows that are new",
    ]


def changed_names(lock: Path, stays: str, moves: str) -> list[str]:
    """In the order of the lock, which is that of the digests."""
    order = [row.id for row in read_lock(lock).rows["a"]]
    names = {stays: f"a {stays}", moves: f"a {moves} (now in train)"}
    return [", ".join(names[i] for i in sorted(names, key=order.index))]


def test_a_text_that_changed_under_the_same_id_is_refused(lock: Path) -> None:
    """The wrong variant compares ids (or prompts) alone: here they are all the same."""
    i, p, _ = OUT[0]
    changed = data(a=[(i, p, "another answer") if row[0] == i else row for row in ROWS])
    held = changed.held_out()["a"]
    assert {(row.id, row.prompt) for row in held} == {(row.id, row.prompt) for row in read_lock(lock).rows["a"]}
    assert compare(read_lock(lock), changed).changed == [f"a {i}"]
    assert refusal(lock, changed)[1] == f"  changed: 1 row in the lock with another text: a {i}"


def test_a_corrected_answer_is_found_without_an_id_too(lock: Path) -> None:
    _, p, _ = OUT[0]
    found = compare(read_lock(lock), data(a=[("other", p, "corrected") if row == OUT[0] else row for row in ROWS]))
    assert (found.changed, found.added, found.removed) == ([f"a {OUT[0][0]}"], [], [])


def test_another_row_that_moves_to_the_place_of_one_is_not_the_same_row(tmp_path: Path) -> None:
    placed: list[Row] = [(f"x.jsonl:{n + 1}", p, a) for n, (_, p, a) in enumerate(ROWS)]
    settle(tmp_path / "l.json", "write", data(a=placed), print)
    left = [(f"x.jsonl:{n + 1}", p, a) for n, (_, p, a) in enumerate(row for row in ROWS if row != OUT[0])]
    found = compare(read_lock(tmp_path / "l.json"), data(a=left))
    assert (len(found.removed), found.changed, found.added, found.moved) == (1, [], [], [])


def test_where_a_row_has_left_is_told(lock: Path) -> None:
    """A row without a provable mask is not in the store: who reads only `removed` would look for it in vain."""
    gone = OUT[0][0]
    left = replace(data(a=[row for row in ROWS if row[0] != gone]), left_at=lambda source: {gone: "refused"})
    assert compare(read_lock(lock), left).removed == [f"a {gone} (left: refused)"]
    elsewhere = replace(left, left_at=lambda source: {"another": "refused"})
    assert compare(read_lock(lock), elsewhere).removed == [f"a {gone}"]


def test_the_same_id_in_another_source_says_nothing(lock: Path) -> None:
    gone = [row for row in ROWS if row != OUT[0]]
    found = compare(read_lock(lock), data(a=gone, b=[(OUT[0][0], prompt_in(TRAIN, "b"), "x")]))
    assert (len(found.removed), found.changed) == (1, [])


def test_a_smaller_fraction_is_named_and_nothing_gives_up_what_is_there(lock: Path) -> None:
    smaller = data(0.1, a=ROWS)
    left = len(smaller.held_out()["a"])
    lines = refusal(lock, smaller)
    names = next(line for line in lines if line.startswith("  moved"))
    assert names.startswith(f"  moved: {len(OUT) - left} rows in the lock and in the data, but not held out: a r")
    assert "(now in train)" in names
    assert names.endswith(f" and {len(OUT) - left - 5} more")
    assert "  data.holdout_fraction was 0.3 when it was locked, now 0.1" in lines
    assert not any("withdraw" in line for line in lines)
    assert refusal(lock, smaller, "withdraw") == lines == refusal(lock, smaller, "extend")
    assert len(read_lock(lock)) == len(OUT)


def test_a_file_of_ones_own_works_the_same_way(tmp_path: Path) -> None:
    def own(rows: list[Row]) -> Data:
        made_with = {"split_version": SPLIT_VERSION, "data.holdout": "a file"}
        train = row_set("train", [("t", "anything", "x")], 0.0)
        return Data([train, row_set("holdout", rows, 0.0, HOLDOUT)], made_with)

    path = tmp_path / "lock.json"
    settle(path, "write", own(ROWS[:5]), print)
    settle(path, None, own(ROWS[4::-1]), print)
    assert "  removed: 1 row in the lock, but not in the data: holdout r0" in refusal(path, own(ROWS[1:5]))
    by_hash = refusal(path, data(a=ROWS))
    assert "  data.holdout was a file when it was locked, now not set" in by_hash
    assert "  data.holdout_fraction was not set when it was locked, now 0.3" in by_hash


# --- writing a lock ------------------------------------------------------------------------------------------


def test_a_lock_holds_no_text(lock: Path) -> None:
    text = lock.read_text()
    assert "secret" not in text
    assert "question" not in text
    rows = json.loads(text)["rows"]["a"]
    assert [len(row) for row in rows] == [3] * len(OUT)
    assert {row[2] for row in rows} == {row[0] for row in OUT}


def test_the_file_is_the_same_whatever_the_order_and_has_a_line_a_row(lock: Path, tmp_path: Path) -> None:
    shuffled = ROWS.copy()
    random.Random(0).shuffle(shuffled)
    settle(tmp_path / "again.json", "write", data(a=shuffled), print)
    assert (tmp_path / "again.json").read_bytes() == lock.read_bytes()
    lines = lock.read_text().splitlines()
    assert sum(line.startswith("   [") for line in lines) == len(OUT)


def test_a_second_write_replaces_nothing(lock: Path) -> None:
    before = lock.read_bytes()
    assert refusal(lock, data(a=ROWS[:20]), "write")[0].endswith("is not the locked one (version 1):")
    assert lock.read_bytes() == before


def test_nothing_to_lock_is_refused(tmp_path: Path) -> None:
    lines = refusal(tmp_path / "l.json", data(0.0, a=ROWS), "write")
    assert lines == [
        "lock=write: given no row that is held out, required at least one to lock; raise data.holdout_fraction, or "
        "give data.holdout=FILE"
    ]
    assert not (tmp_path / "l.json").exists()


def test_extending_keeps_every_row_and_the_version_before(lock: Path) -> None:
    more = data(a=[*ROWS, ("n1", prompt_in(HOLDOUT, "one"), "x"), ("n2", prompt_in(HOLDOUT, "two"), "x")])
    assert "lock=extend takes in the rows that are new" in refusal(lock, more)[-1]
    first = lock.read_bytes()
    said: list[str] = []
    new = settle(lock, "extend", more, said.append)
    assert new == read_lock(lock)
    assert (new.version, len(new)) == (2, len(OUT) + 2)
    assert set(read_lock(lock).rows["a"]) > {Held(*row) for row in json.loads(first)["rows"]["a"]}
    assert (lock.parent / "holdout.v1.json").read_bytes() == first
    assert new.history == [
        {"version": 1, "rows": len(OUT)},
        {"version": 2, "rows": len(OUT) + 2, "added": 2},
    ]
    assert "2 of them new; version 1 is kept in" in said[0]
    settle(lock, None, more, print)


def test_a_larger_fraction_is_an_extension(lock: Path) -> None:
    larger = data(0.5, a=ROWS)
    assert "  data.holdout_fraction was 0.3 when it was locked, now 0.5" in refusal(lock, larger)
    new = settle(lock, "extend", larger, print)
    assert len(new) > len(OUT)
    assert new.made_with["data.holdout_fraction"] == 0.5


@pytest.mark.parametrize("change", [lambda r: r[1:], lambda r: [(*r[0][:2], "other"), *r[1:]]])
def test_extending_never_loses_a_row(lock: Path, change: Change) -> None:
    """Also where rows are added in the same step: the wrong variant writes what is held out now."""
    found = data(a=[*IN, *change(OUT), ("n", prompt_in(HOLDOUT, "new"), "x")])
    before = lock.read_bytes()
    lines = refusal(lock, found, "extend")
    assert "  lock=withdraw gives up the rows that are gone or have another text, for good" in lines
    assert lock.read_bytes() == before
    assert [f.name for f in lock.parent.iterdir()] == [lock.name]


def test_a_row_that_had_to_be_deleted_is_withdrawn_by_name_and_leaves_no_trace(lock: Path) -> None:
    gone = OUT[0]
    left = data(a=[row for row in ROWS if row != gone] + [("n", prompt_in(HOLDOUT, "new"), "x")])
    said: list[str] = []
    new = settle(lock, "withdraw", left, said.append)
    assert (new.version, len(new)) == (2, len(OUT) - 1)
    assert new.history[-1] == {"version": 2, "rows": len(OUT) - 1, "withdrawn": 1}
    assert f'"{gone[0]}"' not in lock.read_text()
    assert [f.name for f in lock.parent.iterdir()] == [lock.name], "the version before would hold what had to go"
    assert said[0].endswith(f"1 row withdrawn: a {gone[0]}")
    # Nothing came in by the way: that is the other command.
    assert refusal(lock, left)[1] == "  added: 1 row held out, but not in the lock: a n"
    settle(lock, "extend", left, print)
    said.clear()
    settle(lock, "withdraw", data(a=[row for row in ROWS if row not in OUT[:2]]), said.append)
    assert "holdout.v2.json" in said[1], "files of earlier versions that hold the row are named"


# --- reading one ---------------------------------------------------------------------------------------------


def test_a_lock_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    for action in (None, "extend", "withdraw"):
        assert refusal(tmp_path / "l.json", data(a=ROWS), action) == [
            f"data.holdout_lock: given {tmp_path / 'l.json'}, which does not exist, required the committed lock; "
            "lock=write makes the first one"
        ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "is no lock of a holdout (Unterminated string"),
        (lambda text: "<<<<<<< HEAD\n" + text, "is no lock of a holdout (Expecting value"),
        (lambda text: "[]", "is no lock of a holdout (it has no format)"),
        (lambda text: "\udcff", "is no lock of a holdout"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "given a lock of format 2, required format 1"),
        (lambda text: text.replace('"format": 1', '"format": "1"'), "it has no format"),
        (lambda text: text.replace('"version": 1', '"version": "1"', 1), "its version, made_with or history"),
        (lambda text: '{"format": 1, "version": 1, "made_with": {}, "history": [], "rows": []}', "its rows are"),
        (lambda text: text.replace('", "r', '", 7, "r', 1), "of a is not [prompt, content, id]"),
        (lambda text: text.replace('["', '["x', 1), "of a is not [prompt, content, id]"),
    ],
)
def test_what_is_no_lock_is_refused(lock: Path, damage: Callable[[str], str], message: str) -> None:
    lock.write_bytes(damage(lock.read_text()).encode("utf-8", "surrogateescape"))
    for action in (None, "write", "extend", "withdraw"):
        assert message in refusal(lock, data(a=ROWS), action)[0]


def test_a_folder_is_no_lock(tmp_path: Path) -> None:
    assert "no lock of a holdout" in refusal(tmp_path, data(a=ROWS))[0]


def test_a_row_that_is_taken_out_of_the_file_by_hand_is_missed(lock: Path) -> None:
    held = json.loads(lock.read_text())
    row = held["rows"]["a"].pop()
    lock.write_text(json.dumps(held))
    assert refusal(lock, data(a=ROWS))[1] == f"  added: 1 row held out, but not in the lock: a {row[2]}"


# --- the property --------------------------------------------------------------------------------------------

CONTENTS = st.lists(st.integers(0, 40), unique=True, max_size=25)


@settings(deadline=None, max_examples=150)
@given(before=CONTENTS, after=CONTENTS, seed=st.integers(0, 9))
def test_a_lock_accepts_exactly_the_same_set_of_held_out_conversations(
    before: list[int], after: list[int], seed: int
) -> None:
    def found(numbers: list[int]) -> Data:
        mixed = random.Random(seed).sample(numbers, len(numbers))
        return data(a=[ROWS[i] for i in mixed[::2]], b=[ROWS[i] for i in mixed[1::2]])

    then, now = found(before), found(after)
    changes = compare(Lock(1, {}, [], then.held_out()), now)
    held = {i for i in range(41) if ROWS[i] in OUT}
    new, gone = (set(after) - set(before)) & held, (set(before) - set(after)) & held
    assert bool(changes) == bool(new | gone)
    assert [len(changes.added), len(changes.removed)] == [len(new), len(gone)]
    assert replace(changes, added=[], removed=[]) == replace(changes, added=[], removed=[], changed=[], moved=[])


def test_ids_are_read_only_where_they_are_needed(lock: Path) -> None:
    """A million train rows have no name as long as nothing is wrong."""
    asked: list[int] = []

    def names(places: Any) -> list[str]:
        asked.extend(places)
        return [ROWS[place][0] for place in places]

    rows = replace(data(a=ROWS).rows[0], ids=names)
    settle(lock, None, Data([rows], data(a=ROWS).made_with), print)
    assert len(asked) == len(OUT)
