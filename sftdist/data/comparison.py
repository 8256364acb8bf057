"""What became of the rows from one data manifest to another: by digest, so the order and the files do not matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from sftdist.data.manifest import Rows, read_manifest, rows_behind
from sftdist.data.rowset import RowSet, as_keys, first_places, is_place, split_name
from sftdist.data.store import SPLITS, TRAIN

EXAMPLES = 5
StagesOf = Callable[[str], Mapping[str, str]]


@dataclass
class Some:
    """Rows of one kind: how many, and the ids of the first few."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(name)

    def __str__(self) -> str:
        more = self.rows - len(self.examples)
        return ", ".join(self.examples) + (f" and {more:,} more" if more else "")


@dataclass(frozen=True)
class SourceChanges:
    """What became of the conversations of a source; one that stands in several rows counts once.

    `changed` have the id that they had and another text, `re_split` is by `train -> holdout`, `moved` by `to NAME`;
    `left` counts the dropped ones by the stage at which they leave now (`gone`: not in the input any more).
    """

    added: Some = field(default_factory=Some)
    dropped: Some = field(default_factory=Some)
    changed: Some = field(default_factory=Some)
    re_split: dict[str, Some] = field(default_factory=dict)
    moved: dict[str, Some] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Comparison:
    """`rows`: by source, of those that could be compared; `gone`: why the others could not; `made_of`: by source what
    it is made of or with that has changed; `shares`: by source the figures of its train split, then and now."""

    rows: dict[str, SourceChanges]
    gone: dict[str, str]
    made_of: dict[str, str]
    shares: dict[str, tuple[dict[str, float], dict[str, float]]]


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], then: Rows, now: Rows, stages: StagesOf = lambda source: {}
) -> Comparison:
    """What was added, dropped and re-split between two manifests, and how the shares of tokens moved.

    `then`, `now`: the rows behind them; `stages` tells at which stage rows of a source leave now, by id.
    """
    gone = {**then.gone, **now.gone}
    before, after = shares_of(old), shares_of(new)
    return Comparison(
        rows=compare_rows(
            {name: rows for name, rows in then.found.items() if name not in gone},
            {name: rows for name, rows in now.found.items() if name not in gone},
            stages,
        ),
        gone=gone,
        made_of=_made_of(old["sources"], new["sources"]),
        shares={name: (before.get(name, _NOTHING), after.get(name, _NOTHING)) for name in {**before, **after}},
    )


_NOTHING = {"rows": 0, "tokens": 0, "targets": 0.0, "share": 0.0}


def shares_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per source the rows, tokens and supervised weight of its train split; `share` of all supervised weight."""
    train = {name: entry["splits"][SPLITS[TRAIN]] for name, entry in manifest["sources"].items()}
    whole = sum(count["targets"] for count in train.values())
    return {name: {**count, "share": count["targets"] / whole if whole else 0.0} for name, count in train.items()}


def _made_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in {**old, **new}:
        if name not in old or name not in new:
            found[name] = "it is new" if name in new else "it is not there any more"
            continue
        then, now = ({**entry["made_of"], **_said(entry)} for entry in (old[name], new[name]))
        if changed := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
            found[name] = f"{', '.join(changed)} changed"
    return found


def _said(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of a source, and changes no row of it."""
    return {key: entry[key] for key in ("licence", "origin", "guideline")}


def data_changes(old: Path, new: Path, folders: Sequence[Path]) -> list[str]:
    """From one manifest (a file) to another, as lines. The stores of both are looked for in `folders`; where they are
    gone, only the counts are compared. Raises DataError for a file that is no manifest."""
    then, now = read_manifest(old), read_manifest(new)
    return comparison_lines(compare(then, now, rows_behind(then, folders), rows_behind(now, folders)))


# --- rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """The conversations of a source, each once: `keys` of their contents, the `places` of their first rows."""

    keys: NDArray[Any]
    places: NDArray[np.int64]
    rows: RowSet | None

    @classmethod
    def of(cls, rows: RowSet | None) -> _Side:
        if rows is None:
            return cls(np.empty(0, "S16"), np.empty(0, np.int64), None)
        places = first_places(rows.contents)
        return cls(as_keys(rows.contents[places]), places, rows)

    def named(self, which: NDArray[Any]) -> list[tuple[bytes, str, int]]:
        """Key, id and split of some of them, in the order of the source."""
        if self.rows is None or not len(which):
            return []
        places = self.places[which]
        columns = (self.keys[which].tolist(), self.rows.ids(places), self.rows.split[places].tolist())
        return list(zip(*columns, strict=True))


class _Pair:
    """One source then and now; `dropped` and `added` are what only one of the two has."""

    def __init__(self, then: RowSet | None, now: RowSet | None) -> None:
        old, new = _Side.of(then), _Side.of(now)
        stayed = np.isin(new.keys, old.keys)
        self.dropped = old.named(np.flatnonzero(~np.isin(old.keys, new.keys)))
        self.added = new.named(np.flatnonzero(~stayed))
        self.re_split = _re_split(old, new, np.flatnonzero(stayed))


def _re_split(old: _Side, new: _Side, stayed: NDArray[np.int64]) -> list[tuple[str, str]]:
    """Way and id of the conversations whose split is another one."""
    if old.rows is None or new.rows is None:
        return []
    order = np.argsort(old.keys)
    before = old.rows.split[old.places[order[np.searchsorted(old.keys, new.keys[stayed], sorter=order)]]]
    other = before != new.rows.split[new.places[stayed]]
    named = new.named(stayed[other])
    return [
        (f"{split_name(was)} -> {split_name(split)}", row)
        for was, (_, row, split) in zip(before[other].tolist(), named, strict=True)
    ]


def compare_rows(
    then: Mapping[str, RowSet], now: Mapping[str, RowSet], stages: StagesOf = lambda source: {}
) -> dict[str, SourceChanges]:
    """By the digest of the content, source by source; what left one source and came into another has moved."""
    pairs = {name: _Pair(then.get(name), now.get(name)) for name in {**then, **now}}
    came_to = {key: name for name, pair in pairs.items() for key, _, _ in pair.added}
    left = {key for pair in pairs.values() for key, _, _ in pair.dropped}
    return {
        name: _changes(
            added=[row for key, row, _ in pair.added if not (key in left and came_to[key] == name)],
            dropped=[(row, came_to.get(key)) for key, row, _ in pair.dropped],
            re_split=pair.re_split,
            left_at=stages(name) if pair.dropped and name in now else {},
        )
        for name, pair in pairs.items()
    }


def _changes(
    added: list[str],
    dropped: list[tuple[str, str | None]],
    re_split: Iterable[tuple[str, str]],
    left_at: Mapping[str, str],
) -> SourceChanges:
    found = SourceChanges()
    rewritten = {row for row in added if not is_place(row)} & {row for row, to in dropped if to is None}
    for row, to in dropped:
        if to is not None:
            found.moved.setdefault(f"to {to}", Some()).add(row)
        elif row in rewritten:
            found.changed.add(row)
        else:
            found.dropped.add(row)
            found.left[left_at.get(row, "gone")] += 1
    for row in added:
        if row not in rewritten:
            found.added.add(row)
    for way, row in re_split:
        found.re_split.setdefault(way, Some()).add(row)
    return found


# --- on the screen ------------------------------------------------------------------------------------


def show_comparison(found: Comparison, console: Console) -> None:
    """Print what changed, source by source, then how the shares of the supervised tokens moved."""
    for line in comparison_lines(found):
        console.print(line, markup=False, soft_wrap=True)


def comparison_lines(found: Comparison) -> list[str]:
    """What `show_comparison` prints, a line each."""
    rows = [*_row_lines(found.rows)]
    if found.rows and not rows:
        rows = [f"{', '.join(found.rows)}: the rows are the same, and in the same splits"]
    said = [f"{name}: {what}" for name, what in found.made_of.items()]
    said += [f"{name}: its rows cannot be compared, only their counts: {why}" for name, why in found.gone.items()]
    return [*said, *rows, *_share_lines(found.shares)]


def _row_lines(sources: Mapping[str, SourceChanges]) -> Iterable[str]:
    for name, rows in sources.items():
        kinds = {"added": rows.added, "dropped": rows.dropped, "changed (same id, another text)": rows.changed}
        kinds |= {f"moved {to}": some for to, some in rows.moved.items()}
        kinds |= {f"re-split {way}": some for way, some in rows.re_split.items()}
        for kind, some in kinds.items():
            if some.rows:
                at = ", ".join(f"{count:,} {stage}" for stage, count in rows.left.most_common())
                yield f"{name}: {some.rows:,} {kind}: {some}" + (f" ({at})" if kind == "dropped" else "")


def _share_lines(shares: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> Iterable[str]:
    """A line a source: a table with both counts of each column does not fit a terminal."""
    counts = {"rows": "rows", "tokens": "tokens", "targets": "supervised"}
    for name, (then, now) in shares.items():
        if not (then["rows"] or now["rows"]):
            continue  # a file of held-out rows
        moved = ", ".join(f"{then[key]:,.0f} -> {now[key]:,.0f} {what}" for key, what in counts.items())
        share = f"{then['share']:.1%} -> {now['share']:.1%} of all supervised"
        points = round(100 * (now["share"] - then["share"]), 1) + 0.0  # no -0.0
        yield f"{name}, train: {moved}, {share} ({points:+.1f})"
