"""What runs were made with, and where that differs: the code, by the ledger; the data, by their data manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftdist.commands.compare_runs import Run
from sftdist.core import ledger
from sftdist.core.typed import shown

By = dict[str, dict[str, Any]]  # by what differs, then by the label of a run
SHOWN_KEY = 12  # characters of a commit


def code_differences(runs: Sequence[Run]) -> tuple[By, list[str]]:
    """The commit, versions and machine of each run's last start where not all are the same; and a note for each run
    of which the ledger has no line, since that is written when a run ends."""
    found = {run.label: _code(run) for run in runs}
    unknown = [label for label, code in found.items() if not code]
    known = {label: code for label, code in found.items() if code}
    said = f"{', '.join(unknown)}: no line in the ledger (it is written when a run ends), so its code is not known"
    return _differing(known), [said] if unknown else []


def data_differences(runs: Sequence[Run]) -> tuple[By, list[str]]:
    """By source the rows, tokens and store of each run, and what the stores are made of, where not all are the same."""
    unknown = [run.label for run in runs if not run.facts.data]
    known = [run for run in runs if run.facts.data]
    found = {run.label: _data(run.facts.data) for run in known}
    said = f"{', '.join(unknown)}: no data manifest, so its data are not known"
    return _differing(found), [said] if unknown else []


def lines_of(title: str, differing: By) -> list[str]:
    """A line per difference with the value of each run, below a title; nothing where nothing differs."""
    if not differing:
        return []
    return [
        "",
        title,
        *(
            f"  {key}: {', '.join(f'{label} {_plain(value)}' for label, value in values.items())}"
            for key, values in differing.items()
        ),
    ]


def _code(run: Run) -> dict[str, Any]:
    path, name = run.facts.path.resolve().parent / ledger.FILE, run.facts.path.resolve().name
    entries = [one for one in ledger.read(path) if str(one["dir"]).rstrip("/").rpartition("/")[2] == name]
    if not entries:
        return {}
    last = entries[-1]
    commit = last["git"]["commit"]
    edited = " with changes that are in no commit" if last["git"]["dirty"] else ""
    return {
        "commit": "none" if commit is None else commit[:SHOWN_KEY] + edited,
        **last["versions"],
        **last["hardware"],
    }


def _data(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, source in manifest["sources"].items():
        for split, counts in source["splits"].items():
            found[f"{name}, {split}"] = f"{counts['rows']:,} rows with {counts['targets']:,.0f} supervised tokens"
        found[f"{name}, store"] = source["key"]
        for key in ("licence", "origin", "contract", "guideline"):
            found[f"{name}, {key}"] = source[key]
        for key, value in source["made_of"].items():
            found[f"{name}, {key}"] = value
    return found


def _differing(found: Mapping[str, Mapping[str, Any]]) -> By:
    keys = dict.fromkeys(key for one in found.values() for key in one)
    rows = {key: {label: one.get(key) for label, one in found.items()} for key in keys}
    return {key: values for key, values in rows.items() if _differ(list(values.values()))}


def _differ(values: Sequence[Any]) -> bool:
    return any(one != values[0] for one in values)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else shown(value)
