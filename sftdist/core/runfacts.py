"""What a run was and how it went, from its directory alone: mixture, steps, time, curves, data, configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftdist.core import snapshot
from sftdist.core.figures import lines, number
from sftdist.core.storage import MANIFEST, read_json

PLAN, DATA = "plan.json", "data-manifest.json"
SHARE = "share/"  # the key of metrics.jsonl, before the name of the source
Curve = list[tuple[int, float]]  # (optimizer step, value), finite values only


@dataclass(frozen=True)
class Mixed:
    """One source: `asked` is its lambda, `share` what it was of the supervised tokens that were trained on."""

    name: str
    asked: float | None
    share: float | None
    passes: float | None  # over its train rows, in the whole plan


@dataclass(frozen=True)
class RunFacts:
    """`steps` were taken, `planned` are in the plan (None: no plan was made yet); `seconds`: of the steps alone.

    `curves`: a key of metrics.jsonl each. `data`: the data manifest, empty where there is none.
    """

    path: Path
    name: str
    steps: int
    planned: int | None
    seconds: float
    tokens: int
    mixture: tuple[Mixed, ...]
    curves: Mapping[str, Curve]
    config: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)

    def last(self, key: str) -> float | None:
        """The last value of a curve."""
        curve = self.curves.get(key)
        return curve[-1][1] if curve else None


@dataclass(frozen=True)
class _Step:
    seconds: float
    tokens: int
    supervised: float
    shares: Mapping[str, float]


def step_of(export: Path) -> int | None:
    """The step of a run at which a model was exported; None where the folder does not say so."""
    step: int | None = _json(export / MANIFEST).get("step")
    return step


def run_facts(run_dir: Path, until: int | None = None) -> RunFacts:
    """Of a run that may not have begun, be running or have ended; `until`: of its steps up to this one. Raises
    ConfigError where it is no run."""
    config = snapshot.to_dict(snapshot.read_config(run_dir))
    taken: list[_Step] = []
    curves: dict[str, Curve] = {}
    for line in lines(run_dir):
        if until is not None and line["step"] > until:
            continue
        taken += [_step(line)] if line["kind"] == "train" else []
        for key, value in line.items():
            if key != "step" and (found := number(value)) is not None and math.isfinite(found):
                curves.setdefault(key, []).append((line["step"], found))
    plan = _json(run_dir / PLAN)
    return RunFacts(
        path=run_dir,
        name=config["run"]["name"] or run_dir.name,
        steps=len(taken),
        planned=plan.get("steps"),
        seconds=sum(step.seconds for step in taken),
        tokens=sum(step.tokens for step in taken),
        mixture=tuple(_mixture(plan.get("sources", []), taken)),
        curves=curves,
        config=config,
        data=_json(run_dir / DATA),
    )


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _step(line: Mapping[str, Any]) -> _Step:
    shares = {key.removeprefix(SHARE): float(value) for key, value in line.items() if key.startswith(SHARE)}
    return _Step(line["step_seconds"], line["tokens"], line["supervised_tokens"], shares)


def _mixture(planned: Sequence[Mapping[str, Any]], taken: Sequence[_Step]) -> Iterator[Mixed]:
    """The sources of the plan; without one, those that the steps name."""
    whole = sum(step.supervised for step in taken)
    asked = {source["name"]: source for source in planned}
    for name in dict.fromkeys([*asked, *(name for step in taken for name in step.shares)]):
        share = sum(step.supervised * step.shares.get(name, 0.0) for step in taken) / whole if whole else None
        source = asked.get(name, {})
        yield Mixed(name, source.get("lam"), share, source.get("passes"))
