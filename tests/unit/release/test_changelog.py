"""What changed between two releases, from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftdist.core.errors import GateError
from sftdist.core.settings import DataSettings, OptimizerSettings, SourceSettings, TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import write_json
from sftdist.release.changelog import Contents, changes, entry, extended
from tests.evaluations import report, rows


def release(folder: Path, lr: float, lam: float, count: int, files: dict[str, str], sources: list[Any]) -> Contents:
    source = SourceSettings(path=f"{folder.name}/a.jsonl", lam=lam)
    write_config(folder, TrainConfig(data=DataSettings(sources={"a": source}), optimizer=OptimizerSettings(lr=lr)))
    report(rows(count)).write(folder / "report")
    listed = {name: {"bytes": 1, "sha256": sha} for name, sha in files.items()}
    write_json(folder / "release.json", {"files": listed, "mixture": sources, "run": {"steps": 7}})
    return Contents.of(folder)


def test_each_section(tmp_path: Path) -> None:
    both = [{"name": "a", "asked": 0.5, "share": 0.52}, {"name": "b", "asked": 0.5, "share": 0.48}]
    more = [{"name": "a", "asked": 0.4, "share": None}, {"name": "c", "asked": None, "share": 1.0}]
    one = release(tmp_path / "v1", 1e-3, 0.5, 60, {"x": "1", "y": "1", "z": "1"}, both)
    two = release(tmp_path / "v2", 2e-3, 0.4, 50, {"y": "2", "z": "1", "w": "1"}, more)
    found = changes(one, two, ["a: 3 added"])
    assert list(found.mixture) == [
        "a: lambda 0.5, 52.0% of the supervised tokens -> lambda 0.4",
        "b: lambda 0.5, 48.0% of the supervised tokens -> not there",
        "c: not there -> no lambda, 100.0% of the supervised tokens",
    ]
    assert list(found.settings) == ["optimizer.lr: 0.001 -> 0.002"], "a path and a lambda stand elsewhere"
    assert list(found.files) == ["w: added", "x: removed", "y: changed"]
    figures = [contents.report.metrics["format.exact_match"].figures().tuned for contents in (one, two)]
    texts = [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in figures]
    assert f"format.exact_match: {texts[0]} -> {texts[1]}" in found.metrics
    assert not any("damaged" in line for line in found.metrics)

    text = entry(2, "2026-11-23T04:00:00Z", 1, found)
    assert text.startswith("## v2 (2026-11-23)\n\nCompared with v1")
    assert "### Data\n\n- a: 3 added\n" in text
    same = changes(one, one, [])
    assert all(lines == ["no change"] for lines in same.sections().values())


def test_a_changelog_grows_at_its_top() -> None:
    first = extended(None, entry(1, "2026-11-01", None, None))
    assert first == "# Changelog\n\n## v1 (2026-11-01)\n\nThe first release.\n"
    second = extended(first, "## v2\n\nmore\n")
    assert second == "# Changelog\n\n## v2\n\nmore\n\n## v1 (2026-11-01)\n\nThe first release.\n"


def test_a_release_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for text in ("", "{}", '{"files": {}, "mixture": 3}'):
        (tmp_path / "release.json").write_text(text)
        with pytest.raises(GateError, match="sftdist release verify says what is wrong"):
            Contents.of(tmp_path)
