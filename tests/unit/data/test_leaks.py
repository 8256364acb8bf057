"""Train rows in or near what is held out, by whatever source: left out, listed, refused; held-out rows never leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sftdist.core.errors import DataError
from sftdist.core.settings import Leaks
from sftdist.data.leaks import EXACT, NEAR_PROMPT, NEAR_TEXT, Overlay
from sftdist.data.near import Near
from sftdist.data.pipeline import Prepared, PrepareRequest, SourceRequest, prepare
from sftdist.data.sources import Source
from sftdist.data.store import HOLDOUT, LEAKED, TRAIN, VALIDATION, TokenStore
from sftdist.data.vocabulary import train_tokenizer

Rows = list[dict[str, Any]]
Make = Callable[..., PrepareRequest]
NEAR = Near(0.8, 3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["system user assistant"] * 3, 300)


@pytest.fixture
def request_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """A request over files; `validation` and `holdout` are the user's own, the other keywords are sources."""

    def make(*, validation: Rows | None = None, holdout: Rows | None = None, near: bool = True, **given: Any) -> Any:
        settings = ("leaks", "validation_fraction", "holdout_fraction")
        options = {name: given.pop(name) for name in settings if name in given}
        own = {"validation": validation, "holdout": holdout}
        files: dict[str, Any] = {name: entry(tmp_path, name, rows) for name, rows in own.items() if rows is not None}
        return PrepareRequest(
            sources=tuple(entry(tmp_path, name, rows) for name, rows in given.items()),
            store_dir=tmp_path / "stores",
            tokenizer=tokenizer,
            chat_template="chatml",
            near=NEAR if near else None,
            **{"validation_fraction": 0.0, "holdout_fraction": 0.0, **options},
            **files,
        )

    return make


def entry(folder: Path, name: str, rows: Rows) -> SourceRequest:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceRequest(Source(name, str(path)))


def row(id: str, prompt: str, answer: str) -> dict[str, Any]:
    return {"id": id, "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def prose(seed: int, count: int = 40) -> str:
    return " ".join(f"w{number}" for number in np.random.default_rng(seed).integers(3000, size=count))


def rows_of(name: str, seeds: range, change: Callable[[str], str] = str) -> Rows:
    return [row(f"{name}{i}", change(prose(i)), prose(1000 + i, 10)) for i in seeds]


def ids(store: TokenStore, split: int) -> list[str]:
    return store.row_ids(np.flatnonzero(store.split == split))


def by_id(store: TokenStore) -> dict[str, int]:
    return dict(zip(store.row_ids(range(len(store))), store.split.tolist(), strict=True))


def listed(prepared: Prepared) -> dict[str, tuple[str, str]]:
    assert prepared.overlay is not None
    return {one["id"]: (one["reason"], one["twin"]) for one in prepared.overlay.dropped()}


def word_more(text: str) -> str:
    return f"{text} please"


# --- what leaks -------------------------------------------------------------------------------------------


def test_train_rows_leave_for_the_users_own_files(request_for: Make) -> None:
    train = [
        *rows_of("t", range(10)),
        row("exact", prose(50).upper(), "other"),  # another prompt key, nearly the same prompt
        row("spaced", prose(51).replace(" ", "  "), "other"),
        row("near", word_more(prose(52)), "other"),
        row("text", "short prompt", prose(1053, 60)),
        row("free", prose(99), "other"),
    ]
    held = [row(f"h{i}", prose(50 + i), "held out answer") for i in range(3)]
    held.append(row("h3", "another prompt", prose(1053, 60)))
    prepared = prepare(request_for(a=train, holdout=held, leaks=Leaks.drop))
    store = prepared.stores["a"]
    assert listed(prepared) == {
        "exact": (NEAR_PROMPT, "h0"),
        "spaced": (EXACT, "h1"),
        "near": (NEAR_PROMPT, "h2"),
        "text": (NEAR_TEXT, "h3"),
    }
    assert sorted(ids(store, LEAKED)) == ["exact", "near", "spaced", "text"]
    assert sorted(ids(store, TRAIN)) == sorted([f"t{i}" for i in range(10)] + ["free"])
    assert ids(prepared.held_out["holdout"], HOLDOUT) == ["h0", "h1", "h2", "h3"]


def test_rows_of_any_source_leave_for_held_out_rows_of_any_source(request_for: Make) -> None:
    """The wrong variant lets the held-out row go, or looks within a source only."""
    first, second = rows_of("a", range(60)), rows_of("b", range(60), word_more)
    prepared = prepare(request_for(a=first, b=second, validation_fraction=0.2, holdout_fraction=0.2))
    a, b = prepared.stores["a"], prepared.stores["b"]
    place = {**by_id(a), **by_id(b)}
    original = {**by_id(TokenStore.open(a.path)), **by_id(TokenStore.open(b.path))}
    crossing = 0
    for i in range(60):
        one, other = original[f"a{i}"], original[f"b{i}"]
        assert place[f"a{i}"] == (LEAKED if one == TRAIN and other != TRAIN else one)
        assert place[f"b{i}"] == (LEAKED if other == TRAIN and one != TRAIN else other)
        crossing += (one == TRAIN) != (other == TRAIN)
    assert crossing > 10
    assert len(listed(prepared)) == crossing
    assert prepared.report["leaks"]["rows"] == {store.name: len(ids(store, LEAKED)) for store in (a, b)}


def test_the_figures_of_a_store_are_those_without_what_leaks(request_for: Make) -> None:
    train = [*rows_of("t", range(5)), row("leak", prose(9), "one two three")]
    request = request_for(a=train, holdout=[row("h", prose(9), "x")], leaks=Leaks.drop)
    prepared = prepare(request)
    store = prepared.stores["a"]
    here = store.split == TRAIN
    manifest = store.manifest
    assert manifest["splits"]["train"]["rows"] == here.sum() == 5
    assert manifest["splits"]["train"]["tokens"] == store.lengths[here].sum()
    assert manifest["splits"]["train"]["targets"] == store.targets[here].sum()
    assert manifest["counts"]["leaked"]["rows"] == 1
    assert prepared.report["sources"]["a"]["stages"]["leaked"]["rows"] == 1
    unchanged = TokenStore.open(store.path)
    assert unchanged.manifest["key"] != manifest["key"]  # another data is trained on
    assert unchanged.split.tolist() == [TRAIN] * 6
    assert prepared.overlay is not None
    again = Overlay(prepared.overlay.path).over(unchanged)
    assert again.manifest["key"] == manifest["key"]
    assert again.split.tolist() == store.split.tolist()


def test_a_store_without_leaks_is_the_same_with_and_without_the_overlay(request_for: Make) -> None:
    prepared = prepare(request_for(a=rows_of("t", range(5)), holdout=[row("h", prose(9), "x")]))
    store = prepared.stores["a"]
    assert store.manifest["key"] == TokenStore.open(store.path).manifest["key"]
    assert listed(prepared) == {}
    assert "rows" not in prepared.report["leaks"]


def test_nothing_is_held_out_and_nothing_leaks(request_for: Make) -> None:
    prepared = prepare(request_for(a=rows_of("t", range(5))))
    assert prepared.overlay is None
    assert not list(prepared.stores["a"].path.parent.glob("leaks-*"))


def test_the_same_rows_in_two_sources_are_counted_and_stay(request_for: Make) -> None:
    prepared = prepare(
        request_for(a=rows_of("a", range(9)), b=rows_of("b", range(5, 12)), holdout=[row("h", "x", "y")])
    )
    assert prepared.report["leaks"]["also in another source"] == {"b": 4}
    assert prepared.stores["b"].split.tolist() == [TRAIN] * 7


# --- validation and holdout of the user's own ----------------------------------------------------------------


@pytest.mark.parametrize(("policy", "near"), [(Leaks.drop, True), (Leaks.off, False)])
def test_exact_prompts_of_own_files_never_stay(request_for: Make, policy: Leaks, near: bool) -> None:
    validation = [row("v0", prose(20), "v"), row("v1", prose(21), "v"), row("v2", prose(22), "v")]
    holdout = [row("h1", prose(21), "h"), row("h3", prose(23), "h")]
    train = rows_of("t", range(18, 26))
    prepared = prepare(request_for(a=train, validation=validation, holdout=holdout, leaks=policy, near=near))
    assert ids(prepared.stores["a"], TRAIN) == ["t18", "t19", "t24", "t25"]
    assert ids(prepared.held_out["validation"], VALIDATION) == ["v0", "v2"]  # v1 belongs to the holdout
    assert ids(prepared.held_out["holdout"], HOLDOUT) == ["h1", "h3"]


def test_off_looks_at_nothing_but_exact_prompts_of_own_files(request_for: Make) -> None:
    rows = [*rows_of("a", range(40)), *rows_of("b", range(40), word_more)]
    prepared = prepare(request_for(a=rows, holdout_fraction=0.3, leaks=Leaks.off))
    assert prepared.overlay is None
    held = [row("h", word_more(prose(3)), "h")]
    prepared = prepare(request_for(a=rows_of("a", range(9)), holdout=held, leaks=Leaks.off))
    assert listed(prepared) == {}


def test_rows_that_leak_the_users_own_holdout_are_refused_by_default(request_for: Make) -> None:
    train = [*rows_of("t", range(5)), row("leak", word_more(prose(9)), "x")]
    request = request_for(a=train, holdout=[row("h", prose(9), "y")])
    with pytest.raises(DataError) as caught:
        prepare(request)
    lines = str(caught.value).splitlines()
    assert "1 row in or near the rows that are held out" in lines[0]
    assert any("a.jsonl:6: nearly the same prompt as holdout h" in line for line in lines)
    assert lines[-1] == "data.leaks=drop"
    dropped = prepare(replace(request, leaks=Leaks.drop))
    assert ids(dropped.stores["a"], LEAKED) == ["leak"]


@pytest.mark.parametrize(("policy", "refused"), [(None, False), (Leaks.drop, False), (Leaks.error, True)])
def test_other_leaks_are_refused_only_when_asked(request_for: Make, policy: Leaks | None, refused: bool) -> None:
    train = [*rows_of("t", range(5)), row("leak", word_more(prose(9)), "x")]
    request = request_for(a=train, validation=[row("v", prose(9), "y")], leaks=policy)
    if refused:
        with pytest.raises(DataError, match=r"data\.leaks=drop$"):
            prepare(request)
    else:
        assert ids(prepare(request).stores["a"], LEAKED) == ["leak"]


# --- found again ----------------------------------------------------------------------------------------------


def test_the_same_stores_find_their_overlay_and_compute_nothing(request_for: Make) -> None:
    request = request_for(a=rows_of("t", range(9)), holdout=[row("h", prose(3), "y")], leaks=Leaks.drop)
    said: list[str] = []
    first = prepare(request, said.append)
    assert sum("held out" in line for line in said) == 1
    said.clear()
    second = prepare(replace(request, workers=2), said.append)
    assert not [line for line in said if "held out" in line]
    assert first.overlay == second.overlay
    assert second.overlay is not None
    file = second.overlay.path / "a.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert ids(prepare(request).stores["a"], LEAKED) == ["t3"]  # a damaged one is made again
    assert file.read_bytes() == whole


def test_another_source_touches_no_store(request_for: Make) -> None:
    """But the rows of that one may be kept out, and those of others for what it holds out."""
    one = request_for(a=rows_of("a", range(30)), validation_fraction=0.3)
    store = prepare(one).stores["a"]
    written = (store.path / "ids.bin").stat().st_mtime_ns
    two = prepare(request_for(a=rows_of("a", range(30)), b=rows_of("b", range(30), word_more), validation_fraction=0.3))
    assert two.stores["a"].path == store.path
    assert (store.path / "ids.bin").stat().st_mtime_ns == written
    assert ids(two.stores["a"], LEAKED)
    assert two.stores["a"].manifest["key"] != store.manifest["key"]


def test_which_rows_leak_does_not_depend_on_their_order(request_for: Make) -> None:
    rows = [*rows_of("a", range(50)), *rows_of("b", range(50), word_more)]
    found = []
    for order in (rows, rows[::-1]):
        prepared = prepare(request_for(a=order, validation_fraction=0.2, holdout_fraction=0.2))
        found.append(sorted(ids(prepared.stores["a"], LEAKED)))
    assert found[0] == found[1] != []
