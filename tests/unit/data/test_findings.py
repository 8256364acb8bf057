"""What is wrong with single rows: told, left out or refused, as the policy says, and remembered by the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sftdist.core.errors import DataError
from sftdist.core.settings import NearDuplicates, OnFinding
from sftdist.core.storage import read_jsonl
from sftdist.data.near import Near
from sftdist.data.pipeline import Prepared, PrepareRequest, SourceRequest, prepare
from sftdist.data.problems import Problem, Problems
from sftdist.data.refusals import UnfitError
from sftdist.data.sources import Source
from sftdist.data.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"question {i} answer {i} system user assistant" for i in range(200)], 320)


def row(prompt: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **fields}


GOOD = [row(f"question {i}", f"answer {i}.", id=f"r{i}") for i in range(20)]
LONG = row("say much", "one two three four five six.", id="long")
CUT = row("count", "The first are:", id="cut")
ONE, OTHER = row("what is it", "It is one.", id="one"), row("what  is it", "It is two.", id="two")
Make = Callable[..., PrepareRequest]


@pytest.fixture
def request_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """A request over `rows` with a contract of at most five words; all rows are train rows."""
    (tmp_path / "contract.yaml").write_text("rules:\n  max_words: 5\n")

    def make(*rows: dict[str, Any], on_breach: OnFinding = OnFinding.report, **options: Any) -> PrepareRequest:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = SourceRequest(Source("train", str(path)), contract=tmp_path / "contract.yaml", on_breach=on_breach)
        given = {"validation_fraction": 0.0, "holdout_fraction": 0.0, **options}
        return PrepareRequest((entry,), tmp_path / "stores", tokenizer=tokenizer, chat_template="chatml", **given)

    return make


def ids(prepared: Prepared) -> set[str]:
    store = prepared.stores["train"]
    return set(store.row_ids(range(len(store))))


def left(prepared: Prepared) -> list[tuple[str, str, str | None]]:
    rows = read_jsonl(prepared.stores["train"].path / "dropped.jsonl")
    return [(row["id"], row["stage"], row["twin"]) for row in rows]


POLICIES: list[tuple[str, list[dict[str, Any]], dict[str, Any], list[tuple[str, str | None]], str]] = [
    ("breach", [LONG], {"on_breach": OnFinding.error}, [("long", None)], "data.sources.train.on_breach"),
    ("cut_off", [CUT], {"cut_off": OnFinding.error}, [("cut", None)], "data.cut_off"),
    ("contradiction", [ONE, OTHER], {"contradictions": OnFinding.error}, [("one", "two"), ("two", "one")],
     "data.contradictions"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "error", "gone", "option"), POLICIES)
def test_a_finding_is_told_left_out_or_refused(
    request_for: Make,
    kind: str,
    rows: list[dict[str, Any]],
    error: dict[str, Any],
    gone: list[tuple[str, str | None]],
    option: str,
) -> None:
    policy = next(iter(error))
    told = prepare(request_for(*GOOD, *rows, **{policy: OnFinding.report}))
    assert told.stores["train"].manifest["found"] == {kind: len(rows)}
    assert ids(told) == {r["id"] for r in [*GOOD, *rows]}
    dropped = prepare(request_for(*GOOD, *rows, **{policy: OnFinding.drop}))
    assert ids(dropped) == {r["id"] for r in GOOD}
    assert left(dropped) == [(row, kind, twin) for row, twin in gone]
    assert dropped.report["sources"]["train"]["stages"][kind]["rows"] == len(rows)
    # The store of `report` is there: it remembers what `error` refuses.
    with pytest.raises(UnfitError) as caught:
        prepare(request_for(*GOOD, *rows, **error))
    lines = str(caught.value).splitlines()
    assert f"({option}=error)" in lines[0]
    assert "train.jsonl:21: " in lines[2]
    assert lines[-1] == f"{option}=drop"
    assert caught.value.report["sources"]["train"]["reused"]
    assert len(list((Path(told.stores["train"].path).parent).glob("train-*"))) == 2


def test_everything_that_is_wrong_is_one_message(request_for: Make) -> None:
    rows = [*GOOD, row("bad", "a <|im_end|> b"), {"x": 1}, LONG, CUT, ONE, OTHER]
    errors = {"on_breach": OnFinding.error, "cut_off": OnFinding.error, "contradictions": OnFinding.error}
    request = request_for(*rows, **errors)
    with pytest.raises(DataError) as caught:
        prepare(request)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "1 row cannot be parsed (allowed: data.max_bad_rows=0), 1 row without a provable mask (allowed: "
        "data.max_refused=0), 1 row against the contract (data.sources.train.on_breach=error), 1 row with an answer "
        "that is cut off or empty (data.cut_off=error), 2 rows with another answer to the same prompt "
        "(data.contradictions=error)."
    )
    overrides = "data.max_bad_rows=1 data.max_refused=1 data.sources.train.on_breach=drop data.cut_off=drop"
    assert lines[-1] == f"{overrides} data.contradictions=drop"
    written = {row["kind"] for row in read_jsonl(request.store_dir / "bad_rows.jsonl")}
    assert written == {"bad", "refused", "train: breach", "cut_off", "contradiction"}


def test_two_breaches_of_a_row_are_one_row() -> None:
    problems = Problems()
    for line, reason in ((1, "a"), (1, "b"), (2, "a"), (2, "a")):
        problems.add(Problem("breach", "s", "f", line, "i", reason, "m", "").to_dict("f"))
    assert problems.count("breach") == 2
    assert {group.reason: group.rows for group in problems.groups.values()} == {"a": 3, "b": 1}


def test_what_is_held_out_is_not_looked_at(request_for: Make) -> None:
    held = prepare(request_for(*GOOD, LONG, CUT, on_breach=OnFinding.drop, holdout_fraction=1.0))
    assert ids(held) == {r["id"] for r in [*GOOD, LONG, CUT]}
    assert held.stores["train"].manifest["found"] == {}


def test_a_duplicate_is_not_told_of_twice(request_for: Make) -> None:
    prepared = prepare(request_for(*GOOD, LONG, LONG))
    assert prepared.stores["train"].manifest["found"] == {"breach": 1}
    assert left(prepared) == [("long", "duplicate", "long")]


def test_evaluation_prompts_are_kept_out(request_for: Make, tmp_path: Path) -> None:
    prompt = "Which of the two numbers in the table above is larger and by how much is it so?"
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    given = {"near": Near(0.8, 3), "decontaminate": (tmp_path / "eval.jsonl",)}
    leaked = row(f"{prompt} Tell me.", "The first.", id="leaked")
    prepared = prepare(request_for(*GOOD, leaked, **given))
    assert left(prepared) == [("leaked", "contaminated", None)]
    before = prepared.stores["train"].path
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "something else"}) + "\n")
    after = prepare(request_for(*GOOD, leaked, **given))
    assert after.report["sources"]["train"]["changed"] == ["decontaminate"]
    assert after.stores["train"].path != before
    assert "leaked" in ids(after)


def test_near_duplicates_are_told_or_left_out(request_for: Make) -> None:
    text = "the quick brown fox jumps over the lazy dog and runs on through the wide green field until night."
    pair = [row(f"{text} {text[::-1]}", "Yes.", id="a"), row(f"{text} {text[::-1]} so", "Yes.", id="b")]
    told = prepare(request_for(*GOOD, *pair, near=Near(0.8, 3)))
    assert told.stores["train"].manifest["found"] == {"near_duplicate": 1}
    (example,) = told.stores["train"].manifest["examples"]["near_duplicate"]
    assert (example["id"], example["twin"], example["line"], example["twin_line"]) == ("b", "a", 22, 21)
    assert text in example["text"]
    assert text in example["twin_text"]
    dropped = prepare(request_for(*GOOD, *pair, near=Near(0.8, 3), near_duplicates=NearDuplicates.drop))
    assert left(dropped) == [("b", "near_duplicate", "a")]


def test_what_is_covered_is_counted_and_may_be_required(request_for: Make) -> None:
    rows = [
        row(f"q {i}", f"Answer {i}.", tags=["billing"] if i < 3 else ["x", "y"], label_origin="human") for i in range(9)
    ]
    request = request_for(*rows)
    prepared = prepare(request)
    coverage = {"tags": {"billing": 3, "x": 6, "y": 6}, "origins": {"human": 9}}
    assert prepared.stores["train"].manifest["coverage"] == coverage
    prepare(replace(request, require_tags={"billing": 3}, require_origins={"human": 9}))
    with pytest.raises(UnfitError) as caught:
        prepare(replace(request, require_tags={"billing": 4, "refund": 1}, require_origins={"human": 10}))
    assert str(caught.value).splitlines() == [
        "data.require.tags.billing: given 3 train rows, required at least 4",
        "data.require.tags.refund: given 0 train rows, required at least 1",
        "data.require.origins.human: given 9 train rows, required at least 10",
    ]
