"""A judged data report with every section that there is, and a hostile text in each place that text can come from."""

from __future__ import annotations

from typing import Any

from sftdist.data.report_verdict import judged

EVIL = '</script><b onclick="x()">&amp;\'"<img src="http://x.invalid/p.png">'
NAME = f"e{EVIL}"  # of a source


def count(rows: int, tokens: int = 0, share: float | None = None) -> dict[str, Any]:
    return {"rows": rows, "tokens": tokens, "targets": tokens * (share or 0.0), "share": share}


def source(**changes: Any) -> dict[str, Any]:
    """A sound source of 1,000 rows."""
    return {
        "store": "stores/a-0123",
        "reused": False,
        "held_out": False,
        "changed": [],
        "stages": {
            "read": count(1000),
            "left_out": count(0),
            "bad": count(0),
            "duplicate": count(0),
            "kept": count(1000, 100_000, 0.5),
            "train": count(960, 96_000, 0.5),
            "validation": count(20, 2_000, 0.5),
            "holdout": count(20, 2_000, 0.5),
        },
        "lengths": {
            "from": [81, 97, 113],
            "to": [96, 112, 128],
            "rows": [400, 500, 60],
            "quantiles": {"0.5": 100, "0.9": 110, "0.99": 125},
        },
        "lost_at_max_len": {"1024": {"rows": 0, "tokens": 0, "targets": 0.0}},
        "longest": 127,
        **changes,
    }


def report(sources: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {"version": 2, "sources": sources or {"a": source()}, "dropped": [], "conversations": [], **sections}


def planned(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "lam": 1.0, "share": 1.0, "passes": 1.0, "conversations": 9, "targets": 100.0, **changes}


def training(*sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    plan = {
        "steps": 100,
        "packs": 800,
        "conversations": 900,
        "tokens": 96_000,
        "targets": 48_000.0,
        "fill": 0.99,
        "assumed_packs": None,
        "epochs": 1.0,
        "repeats": 2.5,
        "epochs_asked": 2.5,
        "pack_tokens": 128,
        "packing": True,
        "sources": list(sources),
    }
    return {"max_len": 112, "overlong": "drop", "over": {}, "plan": {**plan, **changes}}


def full() -> dict[str, Any]:
    """Every section, everything in it from a hostile row."""
    stages = {**source()["stages"], "bad": count(3), "near_duplicate": count(70, 7_000, 0.5), EVIL: count(4)}
    evil = source(
        store=EVIL,
        changed=[EVIL],
        stages=stages,
        rules={"unicode_nfc": 12, EVIL: 1},
        found={"contradiction": 5},
        examples={
            "near_duplicate": [{"id": EVIL, "twin": EVIL, "text": EVIL, "twin_text": EVIL}],
            "contradiction": [{"id": EVIL, "twin": EVIL}],
        },
        lint={
            "answers": 960,
            "system prompts": {"distinct": 1, EVIL: 3, "most frequent": [{"rows": 3}, {"rows": 1, "text": EVIL}]},
            "style": [{"what": EVIL, "share": 0.5}],
            "mixed tone": [EVIL],
            "contradicted instructions": [{"what": EVIL, "given": 9, "contradicted": 4, "rows": [EVIL] * 12}],
            "languages": {"found": [{"what": EVIL, "share": 0.1}] * 10},
        },
        contract={"file": EVIL, "sha256": "00ff", "breaches": 0},
        coverage={"tags": {EVIL: 4, "math": 600}, "origins": {f"synthetic:{EVIL}": 960}},
    )
    over = {"rows": 60, "tokens": 7_200, "targets": 3_600.0}
    runs = [{"text": EVIL, "weight": 0.0}, {"text": EVIL * 40, "weight": 1.0}, {"text": EVIL, "weight": 0.5}]
    return judged(
        report(
            {"a": source(), NAME: evil},
            refused=f"given\n{EVIL}",
            required={"tags": {"math": 500, EVIL: 10}, "origins": {}},
            leaks={"key": "00", "rows": {NAME: 2}, "examples": [{"id": EVIL, "near": EVIL}]},
            holdout={"locked": False, "file": None, "rows": 40},
            training={
                **training(planned("a", lam=0.5, share=0.42), planned(NAME, lam=0.5, share=0.58, passes=3.0)),
                "over": {"a": {"rows": 0, "tokens": 0, "targets": 0.0}, NAME: over},
            },
            dropped=[{"kind": "bad", "reason": EVIL, "rows": 3, "examples": [EVIL, EVIL]}],
            conversations=[{"source": NAME, "id": EVIL, "split": "train", "runs": runs}],
        )
    )
