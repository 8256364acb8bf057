"""The data report: its figures, its verdicts, its charts, and the page and the lines that show it."""

from __future__ import annotations

import io
import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sftdist.core.errors import ConfigError
from sftdist.data.corpus import Mix, open_corpus
from sftdist.data.plan import PlanSpec
from sftdist.data.report import EDGES, lengths_of, lost_at
from sftdist.data.report_charts import Histogram, axis_of, bar, histogram
from sftdist.data.report_page import page, write_report
from sftdist.data.report_terminal import show_report
from sftdist.data.report_training import length_figures, plan_figures
from sftdist.data.report_verdict import FIT, LOOK, UNFIT, judged
from sftdist.data.store import TRAIN, Block, TokenStore, write_store
from sftdist.data.template import ChatTemplate
from tests.pages import foreign_parts
from tests.reports import EVIL, NAME, count, full, planned, report, source, training
from tests.tokenizers import byte_tokenizer


def store_of(path: Path, lengths: list[int], split: list[int] | None = None) -> TokenStore:
    """A store of rows of these lengths, the second half of each supervised."""
    rows = len(lengths)
    weights = [np.arange(n) >= n - n // 2 for n in lengths]
    block = Block(
        ids=np.zeros(sum(lengths), np.int32),
        weights=np.concatenate(weights).astype(np.float32),
        lengths=np.array(lengths, np.int32),
        split=np.array(split or [TRAIN] * rows, np.uint8),
        files=np.zeros(rows, np.int64),
        lines=np.arange(rows),
        row_ids=[f"row-{i}" for i in range(rows)],
        contents=np.zeros((rows, 16), np.uint8),
        prompts=np.zeros((rows, 16), np.uint8),
        labels=np.zeros(rows, np.int32),
        signatures=None,
    )
    (path.parent).mkdir(parents=True, exist_ok=True)
    return write_store(path, lambda _: [block], name="train", vocabulary=300, describe=lambda _: {"key": "k"})


# --- the figures ----------------------------------------------------------------------------------------------


def test_the_histogram_counts_every_train_row_in_the_bar_of_its_length(tmp_path: Path) -> None:
    lengths = [2, 3, 4, 5, 31, 32, 33, 1024, 1025, 5000]
    store = store_of(tmp_path / "s", [*lengths, 77], [0] * len(lengths) + [1])
    found = lengths_of(store)
    bars = list(zip(found["from"], found["to"], found["rows"], strict=True))
    assert sum(rows for *_, rows in bars) == len(lengths)
    for first, last, rows in bars:
        assert rows == sum(first <= length <= last for length in lengths)
    assert [later for later, *_ in bars[1:]] == [last + 1 for _, last, _ in bars[:-1]]
    assert {32, 1024} <= {last for _, last, _ in bars}  # a usual data.max_len ends a bar
    assert found["quantiles"] == {"0.5": 31, "0.9": 1025, "0.99": 5000}
    assert json.loads(json.dumps(found)) == found


def test_lengths_beyond_the_last_bar_and_no_train_row_at_all(tmp_path: Path) -> None:
    assert sorted(set(EDGES)) == list(EDGES)
    store = store_of(tmp_path / "s", [EDGES[-1] + 1 if EDGES[-1] < 10_000 else 3])
    assert sum(lengths_of(store)["rows"]) == 1
    nothing = store_of(tmp_path / "t", [5], [1])
    assert lengths_of(nothing) == {"from": [], "to": [], "rows": [], "quantiles": {}}


def test_what_a_length_would_lose(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [10, 3000, 9000, 9000], [0, 0, 0, 2])
    assert lost_at(store, 3000) == {"rows": 1, "tokens": 9000, "targets": 4500.0}
    assert lost_at(store, 2999) == {"rows": 2, "tokens": 12000, "targets": 6000.0}
    assert length_figures({"a": store}, 10, "drop")["over"]["a"]["rows"] == 2


def test_packs_and_mixture_of_one_pass_at_most(tmp_path: Path) -> None:
    stores = {name: store_of(tmp_path / name, [10 + i % 20 for i in range(200)]) for name in ("a", "b")}
    stores["b"] = TokenStore(**{**vars(stores["b"]), "name": "b"})
    stores["a"] = TokenStore(**{**vars(stores["a"]), "name": "a"})
    template = ChatTemplate.of(byte_tokenizer(specials=["<|im_start|>", "<|im_end|>"]), "chatml")
    mixes = {"a": Mix(0.75), "b": Mix(0.25)}
    corpus = open_corpus(stores, {}, template, mixes, max_len=64, overlong="drop")
    found = plan_figures(corpus, PlanSpec(64, packs_per_step=2, epochs=30.0))
    once = sum(store.targets.sum() for store in stores.values())
    assert found["targets"] == pytest.approx(once, rel=0.05)  # 30 epochs would be 30 times as much
    assert (found["epochs"], found["epochs_asked"]) == (1.0, 30.0)
    assert [one["share"] for one in found["sources"]] == pytest.approx([0.75, 0.25], abs=0.02)
    assert 0.9 < found["fill"] <= 1.0
    assert json.loads(json.dumps(found))["sources"][0]["name"] == "a"
    few = plan_figures(corpus, PlanSpec(64, packs_per_step=2, max_steps=3, epochs=30.0))
    assert (few["steps"], few["repeats"], found["repeats"]) == (3, 1.0, 30.0)
    many = plan_figures(corpus, PlanSpec(64, packs_per_step=2, max_steps=3 * found["steps"]))
    assert (many["steps"], many["repeats"]) == (found["steps"], 3.0)
    assumed = plan_figures(corpus, PlanSpec(64))
    assert (assumed["assumed_packs"], assumed["packs_per_step"], found["assumed_packs"]) == (8, 8, None)
    with pytest.raises(ConfigError, match="mix_mode=best"):
        plan_figures(corpus, PlanSpec(64, mix_mode="best"))


# --- the verdict ----------------------------------------------------------------------------------------------


def stages(**changes: Any) -> dict[str, Any]:
    return {**source()["stages"], **changes}


def told(contradicted: int) -> dict[str, Any]:
    given = {"what": "be concise", "given": 99, "contradicted": contradicted, "rows": []}
    return {"answers": 2000, "contradicted instructions": [given]}


def over(rows: int, targets: float, overlong: str = "drop") -> dict[str, Any]:
    return {"max_len": 100, "overlong": overlong, "over": {"a": {"rows": rows, "tokens": 1, "targets": targets}}}


@pytest.mark.parametrize(
    ("made", "level", "said"),
    [
        (report(), FIT, ""),
        (report({"a": source(stages=stages(duplicate=count(10)))}), FIT, "10 rows (1.0 % of those read) left: exact"),
        (report({"a": source(stages=stages(duplicate=count(50)))}), LOOK, "50 rows"),
        (report({"a": source(stages=stages(bad=count(1)))}), LOOK, "1 row (0.1 % of those read) left: bad"),
        (report({"a": source(stages=stages(bad=count(500)))}), UNFIT, "500 rows"),
        (report({"a": source(stages=stages(train=count(0)))}), UNFIT, "no row is left"),
        (report({"a": source(stages=stages(train=count(0)), held_out=True)}), FIT, ""),
        (report({"a": source(stages=stages(train=count(9, 999, 0.04)))}), LOOK, "only 4.0 %"),
        (report({"a": source(found={"contradiction": 1})}), LOOK, "1 row (0.1 %) found and kept: contradicts"),
        (report({"a": source(found={"near_duplicate": 49})}), FIT, "found and kept: near duplicate"),
        (report(training=over(3, 479.0)), FIT, "3 rows with 1.0 % of the supervised tokens are longer"),
        (report(training=over(3, 481.0)), LOOK, "data.max_len=100"),
        (report(training=over(3, 9_600.0)), UNFIT, "20.0 %"),
        (report(training=over(1, 1.0, "error")), UNFIT, "data.overlong=error"),
        (report(training=training(planned("a", lam=0.4, share=0.46))), LOOK, "0.460, asked for is 0.400"),
        (report(training=training(planned("a", passes=1.7))), LOOK, "about 4.2 times"),
        (report(training=training(planned("a", passes=1.5))), FIT, ""),
        (report({"a": source(stages=stages(leaked=count(60)))}), LOOK, "near a held-out row"),
        (report({"a": source(lint={"mixed tone": ["greeting"]})}), LOOK, "others have not: greeting"),
        (report({"a": source(lint=told(0))}), FIT, ""),
        (report({"a": source(lint=told(1))}), FIT, "contradicts what was asked for in 1 row: be concise"),
        (report({"a": source(lint=told(9))}), LOOK, "in 9 rows"),
    ],
)
def test_the_verdict_on_a_source(made: dict[str, Any], level: str, said: str) -> None:
    verdict = judged(made)["sources"]["a"]["verdict"]
    assert verdict["level"] == level
    texts = [finding["text"] for finding in verdict["findings"]]
    assert any(said in text for text in texts) if said else not texts


@pytest.mark.parametrize(
    ("made", "level", "said"),
    [
        (report({"a": source(stages=stages(bad=count(500)))}), UNFIT, "source a"),
        (report(refused="2 rows"), UNFIT, "prepare refuses"),
        (report(holdout={}), FIT, ""),
        (report(training={**over(0, 0.0), "not_computed": "no step size"}), LOOK, "no step size"),
        (report(training=training(fill=0.6)), LOOK, "only 60.0 % full"),
        (report({"a": source(stages=stages(holdout=count(0)))}), LOOK, "no row in the holdout split"),
        (report(holdout={"locked": False}), LOOK, "data.holdout_lock=FILE"),
        (report(holdout={"locked": True}), FIT, ""),
        (report(required={"tags": {"law": 5}}), UNFIT, "tags: 0 rows of law, required 5"),
        (report({"a": source(coverage={"tags": {"law": 5}})}, required={"tags": {"law": 5}}), FIT, ""),
    ],
)
def test_the_verdict_on_all(made: dict[str, Any], level: str, said: str) -> None:
    verdict = judged(made)["verdict"]
    assert verdict["level"] == level
    assert said in " ".join(finding["text"] for finding in verdict["findings"])


def test_the_gravest_finding_comes_first() -> None:
    made = report({"a": source(stages=stages(duplicate=count(1), bad=count(2), refused=count(600)))})
    levels = [finding["level"] for finding in judged(made)["sources"]["a"]["verdict"]["findings"]]
    assert levels == [UNFIT, LOOK, FIT]


# --- the charts -----------------------------------------------------------------------------------------------


def test_bars_beyond_the_mark_are_hatched_and_all_are_inside() -> None:
    one = Histogram([95, 112, 128, 160], [4, 0, 2])
    chart = str(histogram(one, axis_of([one], 128), 128, "of <a>"))
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)%" y="([\d.]+)" width="([\d.]+)%"', chart)
    assert [kind for kind, *_ in bars] == ["kept", "lost"]
    assert all(float(x) >= 0 and float(x) + float(wide) <= 100.01 and float(y) >= 0 for _, x, y, wide in bars)
    assert float(bars[0][2]) < float(bars[1][2])  # more rows, a higher bar
    assert "max_len 128" in chart
    assert "of &lt;a&gt;" in chart
    assert chart.count('class="tick"') <= 6


@pytest.mark.parametrize("one", [Histogram([], []), Histogram([0, 1], [3]), Histogram([0, 1, 2, 1 << 30], [1, 1, 1])])
@pytest.mark.parametrize("mark", [None, 1, 8192])
def test_charts_of_little_and_of_much(one: Histogram, mark: int | None) -> None:
    chart = str(histogram(one, axis_of([one], mark), mark, ""))
    assert all(0 <= float(place) <= 100 for place in re.findall(r'x\d?="([\d.-]+)%"', chart))
    assert "nan" not in chart
    assert foreign_parts(chart) == []


def test_a_stacked_bar_is_as_wide_as_its_shares() -> None:
    parts = re.findall(r'class="(\w+)" x="([\d.]+)%" width="([\d.]+)%"', str(bar([("kept", 0.25), ("lost", 0.5)], "")))
    assert parts == [("kept", "0.00", "25.00"), ("lost", "25.00", "50.00")]
    assert 'width="0.00%"' in str(bar([("kept", 0.0)], ""))  # nothing is no sliver
    assert 'width="0.40%"' in str(bar([("kept", 0.001)], ""))  # little can be seen


# --- the page and the terminal --------------------------------------------------------------------------------


def test_the_page_shows_every_section_in_one_file_and_escapes_all_text() -> None:
    shown = page(full())
    assert foreign_parts(shown) == []
    assert "<script" not in shown
    for title in ("Lengths", "From the rows read", "twins", "Normalising rules", "Style", "Contracts", "Tags"):
        assert title in shown
    for title in ("Label origins", "Leaks", "Holdout", "Packs and mixture", "Sample conversations", "too few"):
        assert title in shown
    evil = str(escape(EVIL)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    places = shown.split(evil)
    assert len(places) > 25
    for place in range(1, len(places)):  # each of its places without escaping is seen
        wrong = evil.join(places[:place]) + EVIL + evil.join(places[place:])
        assert foreign_parts(wrong) != [], places[place - 1][-80:]


def test_sections_that_are_not_there_are_left_out() -> None:
    shown = page(judged(report()))
    assert foreign_parts(shown) == []
    for title in (
        "twins",
        "Normalising",
        "Style",
        "Contracts",
        "Coverage",
        "Leaks",
        "Holdout</h2>",
        "Packs and mixture",
    ):
        assert title not in shown


def test_the_figures_stand_beside_the_page(tmp_path: Path) -> None:
    file = write_report(full(), tmp_path)
    assert file == tmp_path / "report.html"
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == full()
    assert write_report(full(), tmp_path).read_bytes() == page(full()).encode()


def test_a_long_conversation_is_cut_on_the_page_only() -> None:
    runs = [{"text": "x" * 2999, "weight": 0.0}, {"text": "yy", "weight": 1.0}, {"text": "z" * 7, "weight": 0.0}]
    conversation = {"source": "a", "id": "long", "split": "train", "runs": runs}
    shown = page(judged(report(conversations=[conversation])))
    assert "<u>y</u>" in shown
    assert "8 more characters" in shown
    assert "zz" not in shown


def test_the_terminal_shows_the_verdict_the_first_findings_and_where_the_page_is() -> None:
    out = io.StringIO()
    show_report(full(), Path("stores/report.html"), Console(file=out, width=200, highlight=False))
    shown = out.getvalue()
    assert "Look first" in shown
    assert "stores/report.html" in shown
    assert NAME in shown
    assert "more in the report" in shown
    assert len(shown.splitlines()) < 25
