"""Prepare as one function: keys, counts, splits, problems, and the same bytes whatever the number of workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.settings import Leaks, OnFinding, Reasoning, RowShape, TrainOn
from sftdist.core.storage import read_json, read_jsonl
from sftdist.data.clean import Rules
from sftdist.data.mask import MaskOptions
from sftdist.data.near import Near
from sftdist.data.pipeline import Prepared, PrepareRequest, SourceRequest, prepare, survey
from sftdist.data.report import LENGTHS, lost_at
from sftdist.data.sources import CHUNK_ROWS, Source
from sftdist.data.store import LEAKED, TRAIN, TokenStore
from sftdist.data.tasks import parts_by_name, roles_of, vocabulary_path
from sftdist.data.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"question {i} answer {i} system user assistant" for i in range(200)], 320)


def row(prompt: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **fields}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


ROWS = [row(f"question {i}", f"answer {i}", id=f"r{i}") for i in range(60)]
Make = Callable[..., PrepareRequest]


@pytest.fixture
def request_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """A request over files: each keyword is a source name and its rows."""

    def make(rows: list[Any] | None = None, **sources: list[Any]) -> PrepareRequest:
        named = {"train": rows} if rows is not None else sources
        found = []
        for name, given in named.items():
            path = write(tmp_path / "raw" / f"{name}.jsonl", given)
            found.append(SourceRequest(Source(name, path=str(path), key=f"data.sources.{name}.path")))
        return PrepareRequest(
            sources=tuple(found), store_dir=tmp_path / "stores", tokenizer=tokenizer, chat_template="chatml"
        )

    return make


def path_of(prepared: Prepared, name: str = "train") -> Path:
    return prepared.stores[name].path


def counts(prepared: Prepared, name: str = "train") -> dict[str, int]:
    stages = prepared.report["sources"][name]["stages"]
    return {stage: count["rows"] for stage, count in stages.items()}


def ids_of(store: TokenStore, split: int | None = None) -> list[str]:
    rows = np.arange(len(store)) if split is None else np.flatnonzero(store.split == split)
    return store.row_ids(rows)


# --- what is in a store ---------------------------------------------------------------------------------------


def test_a_row_is_its_render_and_only_the_answer_is_supervised(request_for: Make) -> None:
    prepared = prepare(request_for(ROWS))
    store, tok = prepared.stores["train"], prepared.template.tokenizer
    assert ids_of(store) == [f"r{i}" for i in range(60)]
    assert store.origin(5) == ("train.jsonl", 6)
    ids, weights = store.tokens(5)
    render = "<|im_start|>user\nquestion 5<|im_end|>\n<|im_start|>assistant\nanswer 5<|im_end|>\n"
    assert tok.decode(ids, skip_special_tokens=False) == render
    assert tok.decode(ids[weights > 0], skip_special_tokens=False) == "answer 5<|im_end|>"
    assert store.targets[5] == weights.sum()
    assert store.manifest["stop_ids"] == [0, 2]
    assert store.manifest["stop_share"] == 1.0
    assert (store.path / "tokenizer" / "tokenizer.json").is_file()


def test_rows_are_conserved_and_every_drop_is_counted(request_for: Make) -> None:
    rows = [*ROWS, ROWS[3], row("question 4", " answer 4 \r\n"), "{broken", row("q", "stop <|im_end|> here"), ROWS[0]]
    prepared = prepare(replace(request_for(rows), max_bad_rows=1, max_refused=1))
    found = counts(prepared)
    assert found["read"] == len(rows)
    assert (found["bad"], found["duplicate"], found["refused"], found["kept"]) == (1, 3, 1, 60)
    assert found["train"] + found["validation"] + found["holdout"] == found["kept"]
    stages = prepared.report["sources"]["train"]["stages"]
    assert stages["duplicate"]["tokens"] > 0
    assert stages["kept"]["tokens"] == prepared.stores["train"].lengths.sum()
    assert stages["kept"]["targets"] == pytest.approx(prepared.stores["train"].targets.sum())


def test_without_deduplication_all_rows_stay(request_for: Make) -> None:
    prepared = prepare(replace(request_for([*ROWS, ROWS[3]]), deduplicate=False))
    assert counts(prepared)["kept"] == 61


def test_expanded_turns_are_rows_of_their_own(request_for: Make) -> None:
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    request = request_for([{"id": "x#y", "messages": [{"role": r, "content": c} for r, c in turns]}, *ROWS])
    entry = replace(request.sources[0], mask=MaskOptions(expand_turns=True))
    store = prepare(replace(request, sources=(entry,))).stores["train"]
    assert ids_of(store)[:3] == ["x#y#0", "x#y#1", "r0#0"]
    assert store.split[0] == store.split[1]


def test_bos_is_rendered_once(request_for: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    with_bos = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", bos_token="<|pad|>"
    )
    once = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    once += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    turns = [row("q", "a")["messages"] + row("q2", "a2")["messages"]]
    request = replace(request_for([*ROWS, {"messages": turns[0]}]), tokenizer=with_bos, chat_template=once)
    store = prepare(request).stores["train"]
    assert all(store.tokens(i)[0].tolist().count(3) == 1 for i in range(len(store)))
    assert store.tokens(60)[0][0] == 3
    doubled = once.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    with pytest.raises(DataError, match="BOS"):
        prepare(replace(request, chat_template=doubled))


# --- the content key ------------------------------------------------------------------------------------------


def entry_of(request: PrepareRequest, **mask: Any) -> PrepareRequest:
    return replace(request, sources=(replace(request.sources[0], mask=MaskOptions(**mask)),))


def named_shape(request: PrepareRequest) -> PrepareRequest:
    source = replace(request.sources[0].source, shape=RowShape.messages)
    return replace(request, sources=(replace(request.sources[0], source=source),))


def other_tokenizer(request: PrepareRequest) -> PrepareRequest:
    return replace(request, tokenizer=train_tokenizer(["abc abd " * 50], 300))


def with_holdout(request: PrepareRequest) -> PrepareRequest:
    path = write(request.store_dir.parent / "held.jsonl", [row("never seen", "x")])
    return replace(request, holdout=SourceRequest(Source("holdout", path=str(path))))


def other_bytes(request: PrepareRequest) -> PrepareRequest:
    write(Path(str(request.sources[0].source.path)), [*ROWS, row("one", "more")])
    return request


LATIN = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
LATIN += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
CHANGES: list[tuple[Callable[[PrepareRequest], PrepareRequest], list[str]]] = [
    (other_bytes, ["input"]),
    (other_tokenizer, ["tokenizer"]),
    (lambda r: replace(r, chat_template=LATIN), ["template"]),
    (named_shape, ["shape"]),
    (lambda r: replace(r, rules=Rules(unicode_nfc=False)), ["clean"]),
    (lambda r: replace(r, deduplicate=False), ["duplicates"]),
    (lambda r: replace(r, contradictions=OnFinding.drop), ["duplicates"]),
    (lambda r: replace(r, near=Near(0.8, 3)), ["near"]),
    (lambda r: replace(r, validation_fraction=0.3), ["split"]),
    (lambda r: replace(r, holdout_fraction=0.3), ["split"]),
    (lambda r: entry_of(r, train_on=TrainOn.last), ["mask"]),
    (lambda r: entry_of(r, reasoning=Reasoning.drop), ["mask"]),
    (lambda r: entry_of(r, expand_turns=True), ["mask"]),
    (with_holdout, ["split"]),
]


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_a_changed_ingredient_makes_another_store_and_is_named(
    request_for: Make, change: Callable[[PrepareRequest], PrepareRequest], names: list[str]
) -> None:
    request = request_for(ROWS)
    before = prepare(request)
    said: list[str] = []
    after = prepare(change(request), said.append)
    assert path_of(after) != path_of(before)
    assert after.report["sources"]["train"]["changed"] == names
    assert f"train: tokenised again, for these have changed: {', '.join(names)}" in said


def moved(request: PrepareRequest) -> PrepareRequest:
    old = Path(str(request.sources[0].source.path))
    new = old.parent.parent / "elsewhere" / old.name
    new.parent.mkdir()
    old.rename(new)
    return replace(request, sources=(replace(request.sources[0], source=Source("train", path=str(new))),))


def other_source(request: PrepareRequest) -> PrepareRequest:
    path = write(request.store_dir.parent / "other.jsonl", [row("other", "x")])
    return replace(request, sources=(*request.sources, SourceRequest(Source("other", path=str(path)))))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, workers=2),
        lambda r: replace(r, max_bad_rows=9, max_refused=9),
        lambda r: replace(r, contradictions=OnFinding.error),
        moved,
        other_source,
    ],
)
def test_what_does_not_change_the_bytes_re_tokenises_nothing(
    request_for: Make, change: Callable[[PrepareRequest], PrepareRequest]
) -> None:
    request = request_for(ROWS)
    before = prepare(request)
    written = (path_of(before) / "ids.bin").stat().st_mtime_ns
    after = prepare(change(request))
    assert after.report["sources"]["train"]["reused"]
    assert path_of(after) == path_of(before)
    assert (path_of(after) / "ids.bin").stat().st_mtime_ns == written


def test_the_output_does_not_depend_on_the_number_of_workers(request_for: Make, tmp_path: Path) -> None:
    rows: list[Any] = [row(f"question {i % 2900}", f"answer {i % 2900}") for i in range(CHUNK_ROWS * 6)]
    rows[1000] = "{broken"
    request = replace(request_for(rows), max_bad_rows=1, validation_fraction=0.2, near=Near(0.8, 3))
    manifests = []
    for workers in (1, 2, 3):
        prepared = prepare(replace(request, workers=workers, store_dir=tmp_path / f"stores{workers}"))
        manifests.append(read_json(path_of(prepared) / "manifest.json"))
    assert counts(prepared)["duplicate"] > 0
    assert manifests[0] == manifests[1] == manifests[2]


def test_a_damaged_store_is_written_again(request_for: Make) -> None:
    request = request_for(ROWS)
    ids = path_of(prepare(request)) / "ids.bin"
    sound = ids.read_bytes()
    ids.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    said: list[str] = []
    assert not prepare(request, said.append).report["sources"]["train"]["reused"]
    assert ids.read_bytes() == sound
    assert "train: the store is damaged and is written again" in said[0]


# --- splits ---------------------------------------------------------------------------------------------------


def test_the_split_follows_the_prompt_through_all_sources(request_for: Make) -> None:
    rows = [row(f"question {i}", "first") for i in range(200)]
    again = [row(f" question  {i}", "second") for i in range(200)]
    request = replace(request_for(a=rows, b=again), validation_fraction=0.2, holdout_fraction=0.2)
    stores = prepare(request).stores
    assert stores["a"].split.tolist() == stores["b"].split.tolist()
    assert set(stores["a"].split.tolist()) == {0, 1, 2}


def test_files_of_their_own_for_validation_and_holdout(request_for: Make, tmp_path: Path) -> None:
    held = {
        "validation": [row("question 1", "v"), row("question 2", "v"), row("new v", "v")],
        "holdout": [row("question  2", "h"), row("new h", "h")],
    }
    entries = {
        name: SourceRequest(Source(name, path=str(write(tmp_path / f"{name}.jsonl", rows))))
        for name, rows in held.items()
    }
    request = replace(request_for(ROWS), **entries)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        prepare(request)
    assert str(caught.value).splitlines()[-1] == "data.leaks=drop"
    listed = list(read_jsonl(request.store_dir / "bad_rows.jsonl"))
    assert [(one["id"], one["kind"]) for one in listed] == [("r2", "leak")]  # validation is not the user's holdout
    prepared = prepare(replace(request, leaks=Leaks.drop))
    assert counts(prepared)["leaked"] == 2
    assert set(prepared.stores) == {"train"}
    assert set(ids_of(prepared.stores["train"], TRAIN)) == {f"r{i}" for i in range(60) if i not in (1, 2)}
    assert set(ids_of(prepared.stores["train"], LEAKED)) == {"r1", "r2"}
    assert prepared.held_out["validation"].split.tolist() == [1, LEAKED, 1]  # question 2 belongs to the holdout
    assert prepared.held_out["holdout"].split.tolist() == [2, 2]


# --- problems -------------------------------------------------------------------------------------------------


def test_all_problems_of_all_sources_come_at_once(request_for: Make) -> None:
    good = [row(f"question {i}", "a") for i in range(10)]
    first = [*good, *[row("q", "")] * 5, "{x", row("q", "a <|im_end|> b", id="r1")]
    second = [row("q", "1 <|im_end|>", id="r2"), "[1, 2]", *good]
    request = request_for(a=first, b=second)
    with pytest.raises(DataError) as caught:
        prepare(request)
    lines = str(caught.value).splitlines()
    raw = request.store_dir.parent / "raw"
    assert lines[:6] == [
        "7 rows cannot be parsed (allowed: data.max_bad_rows=0), "
        "2 rows without a provable mask (allowed: data.max_refused=0).",
        "bad: empty content: 5 rows",
        f"  {raw}/a.jsonl:11: messages[1].content: given empty text, required text",
        f"  {raw}/a.jsonl:12: messages[1].content: given empty text, required text",
        f"  {raw}/a.jsonl:13: messages[1].content: given empty text, required text",
        "bad: not JSON: 1 row",
    ]
    assert f"  {raw}/b.jsonl:2: row: given [1, 2], required a JSON object" in lines
    assert lines[-1] == "data.max_bad_rows=7 data.max_refused=2"
    bad_rows = request.store_dir / "bad_rows.jsonl"
    assert str(bad_rows) in lines[-2]
    written = list(read_jsonl(bad_rows))
    assert [(w["source"], w["line"], w["kind"]) for w in written] == [
        ("a", 11, "bad"),
        ("a", 12, "bad"),
        ("a", 13, "bad"),
        ("a", 14, "bad"),
        ("a", 15, "bad"),
        ("a", 16, "bad"),
        ("a", 17, "refused"),
        ("b", 2, "bad"),
        ("b", 1, "refused"),
    ]
    assert json.loads(written[6]["row"])["id"] == "r1"


def test_the_overrides_that_are_offered_work_and_lower_ones_do_not(request_for: Make) -> None:
    request = request_for([*ROWS, "{x", "{y", row("q", "a <|im_end|> b")])
    for bad, refused in ((0, 0), (1, 1), (2, 0), (1, 1)):
        with pytest.raises(DataError) as caught:
            prepare(replace(request, max_bad_rows=bad, max_refused=refused))
        assert str(caught.value).splitlines()[-1] == "data.max_bad_rows=2 data.max_refused=1"
    prepared = prepare(replace(request, max_bad_rows=2, max_refused=1))
    assert counts(prepared)["kept"] == 60
    # The store is there now; a run with lower limits is refused all the same.
    with pytest.raises(DataError, match="2 rows cannot be parsed"):
        prepare(replace(request, max_bad_rows=1, max_refused=1))


def test_a_clean_run_leaves_no_old_problems(request_for: Make) -> None:
    request = request_for([*ROWS, "{x"])
    with pytest.raises(DataError):
        prepare(request)
    assert (request.store_dir / "bad_rows.jsonl").is_file()
    prepare(request_for(ROWS))
    assert not (request.store_dir / "bad_rows.jsonl").exists()


@pytest.mark.parametrize("rows", [["", " "], ["{x"]])
def test_a_source_of_which_nothing_is_left(request_for: Make, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="bad: given no conversation that can be trained on"):
        prepare(replace(request_for(good=ROWS, bad=rows), max_bad_rows=9))


def test_every_missing_source_is_named(request_for: Make) -> None:
    request = request_for(a=ROWS, b=ROWS)
    for entry in request.sources:
        Path(str(entry.source.path)).unlink()
    with pytest.raises(DataError) as caught:
        prepare(request)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "data.sources.a.path",
        "data.sources.b.path",
    ]


def test_names_must_differ_and_a_tokenizer_must_be_there(request_for: Make) -> None:
    request = request_for(ROWS)
    with pytest.raises(ConfigError, match="required each name once"):
        prepare(replace(request, sources=request.sources * 2))
    with pytest.raises(ConfigError, match=r"set model\.path or model\.tokenizer"):
        prepare(replace(request, tokenizer=None))


# --- the trained vocabulary, the survey, the report -----------------------------------------------------------


def test_a_vocabulary_is_trained_once_on_train_rows_alone(request_for: Make) -> None:
    rows = [row(f"question {i}", f"answer {i}") for i in range(300)]
    request = replace(request_for(rows), tokenizer=None, vocabulary=320, validation_fraction=0.3, chat_template=None)
    assert survey(request, at_most=1000).missing == ("train",)
    store = prepare(request).stores["train"]
    held = [r for r, split in zip(rows, store.split, strict=True) if split]
    assert held
    folder = next(request.store_dir.glob("tokenizer-*"))
    before = (folder / "tokenizer.json").read_bytes()
    again = prepare(replace(request, workers=2))
    assert again.report["sources"]["train"]["reused"]
    assert [f.name for f in request.store_dir.glob("tokenizer-*")] == [folder.name]
    assert (folder / "tokenizer.json").read_bytes() == before
    texts = [t for r, s in zip(rows, store.split, strict=True) if not s for t in _texts(r)]
    assert json.loads(before)["model"] == json.loads(train_tokenizer(texts, 320).backend_tokenizer.to_str())["model"]


def test_a_vocabulary_of_other_cleaning_is_another_one(request_for: Make) -> None:
    rows = [row(f"question  {i}  \r\nand more", f"answer {i}") for i in range(50)]
    request = replace(request_for(rows), tokenizer=None, vocabulary=320, chat_template=None)
    kept = replace(request, rules=Rules(line_ends=False, unicode_nfc=False, trailing_blanks=False))
    first, other = (vocabulary_path(one, parts_by_name(roles_of(one))) for one in (request, kept))
    assert first != other


def _texts(row: dict[str, Any]) -> list[str]:
    return [text for m in row["messages"] for text in (m["role"], m["content"])]


def test_the_survey_counts_what_is_missing(request_for: Make) -> None:
    request = request_for(a=ROWS, b=ROWS[:10])
    assert (survey(request, 1000).missing, survey(request, 1000).rows) == (("a", "b"), 70)
    assert survey(request, 15).rows == 15
    prepare(replace(request, sources=request.sources[:1]))
    assert (survey(request, 1000).missing, survey(request, 1000).rows) == (("b",), 10)
    prepare(request)
    assert survey(request, 1000).missing == ()


def test_the_report_counts_what_a_length_would_lose(request_for: Make) -> None:
    rows = [row("q", "a" * n) for n in (10, 3000, 9000)]
    request = replace(request_for(rows), validation_fraction=0.0, holdout_fraction=0.0)
    store = prepare(request).stores["train"]
    lost = {limit: lost_at(store, limit) for limit in LENGTHS}
    for limit, figures in lost.items():
        over = store.lengths > limit
        assert figures["rows"] == over.sum()
        assert figures["tokens"] == store.lengths[over].sum()
        assert figures["targets"] == store.targets[over].sum()
    assert [figures["rows"] for figures in lost.values()] == [2, 2, 1, 1, 0, 0]


def test_the_report_shows_ten_conversations_with_what_is_trained(request_for: Make) -> None:
    shown = prepare(request_for(a=ROWS, b=ROWS[:3])).report["conversations"]
    assert [c["source"] for c in shown] == ["a"] * 5 + ["b"] * 3  # b has no more
    assert len({c["id"] for c in shown[:5]}) == 5
    runs = shown[0]["runs"]
    assert runs[0] == {"text": "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n", "weight": 0.0}
    assert runs[1] == {"text": "answer 0<|im_end|>", "weight": 1.0}
    assert json.loads(json.dumps(shown)) == shown
