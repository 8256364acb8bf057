"""Answers of a released model, counted when it is published and again when it is live: form, refusals, loops, length.

Which source an answer belongs to is told by its prompt both times, so the two are counted in one way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sftdist.core.errors import ConfigError
from sftdist.core.storage import write_json
from sftdist.data.answer_rules import Check, Fault
from sftdist.data.answer_schema import schema_check
from sftdist.data.contract import Contract
from sftdist.data.contract_file import read_contract_file, read_file
from sftdist.evals.features import Features
from sftdist.evals.probes.behaviour import loops
from sftdist.evals.probes.refusal import refuses
from sftdist.evals.probes.words import words_of
from sftdist.evals.profile import OUT, Model, length_counts
from sftdist.evals.shift import Statistic, ordered, rate

CONTRACTS = "contracts"  # a folder of a release: <source>.json, and <source>.schema.json of evals.schemas
SCHEMA = ".schema.json"


@dataclass(frozen=True)
class Forms:
    """What the answers of each source must fulfil: its contract, and its JSON Schema."""

    contracts: Mapping[str, Contract] = field(default_factory=dict)
    schemas: Mapping[str, Check] = field(default_factory=dict)

    @classmethod
    def read(cls, release: Path) -> Forms:
        """Those that travel with a release; none where it has none. Raises ConfigError for one that is unreadable."""
        files = sorted((release / CONTRACTS).glob("*.json"))
        contracts = {file.stem: file for file in files if not file.name.endswith(SCHEMA)}
        return cls(
            {source: Contract.load(file) for source, file in contracts.items()},
            {source: _schema(file) for source, file in schema_files(release).items()},
        )

    def kept(self, source: str, answer: str) -> dict[str, bool]:
        """Whether an answer has the form of its source, by name of the check."""
        found = {}
        if source in self.contracts:
            found["contract"] = not self.contracts[source].breaches(answer)
        if source in self.schemas:
            found["schema"] = not any(True for _ in self.schemas[source](answer))
        return found


def schema_files(release: Path) -> dict[str, Path]:
    """The file with the JSON Schema of each source."""
    return {file.name.removesuffix(SCHEMA): file for file in sorted((release / CONTRACTS).glob(f"*{SCHEMA}"))}


def _schema(file: Path) -> Check:
    try:
        return schema_check(read_contract_file(file, read_file(file)))
    except Fault as fault:
        raise ConfigError(f"{file}: {fault}") from None


def write_forms(release: Path, contracts: Mapping[str, Path], schemas: Mapping[str, Path]) -> None:
    """Put the contracts and schemas of sources into a release, each as one file that names no other."""
    folder = release / CONTRACTS
    if contracts or schemas:
        folder.mkdir(parents=True, exist_ok=True)
    for source, file in contracts.items():
        values = read_contract_file(file, read_file(file))
        if isinstance(values.get("schema"), str):
            schema = file.parent / values["schema"]
            values["schema"] = read_contract_file(schema, read_file(schema))
        write_json(folder / f"{source}.json", {key: value for key, value in values.items() if key != "guideline"})
    for source, file in schemas.items():
        write_json(folder / f"{source}{SCHEMA}", read_contract_file(file, read_file(file)))


@dataclass(frozen=True)
class AnswerCounts:
    """Of `answers` answers: by length, how many refuse, how many loop; `forms`: [kept, all] by `<source>.<check>`."""

    answers: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    refusals: int = 0
    loops: int = 0
    forms: dict[str, list[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `profile_of`."""
        return asdict(self)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> AnswerCounts:
        """Of what `to_json` gave, also from a file; of nothing, no answers."""
        if not found:
            return cls()
        return cls(**{**found, "lengths": {int(key): count for key, count in found["lengths"].items()}})


def answer_counts(model: Model, prompts: Features, answers: Sequence[str], forms: Forms) -> AnswerCounts:
    """Count the answers to some prompts. An answer is held against the form of the source that its prompt is like; a
    prompt that is out of the profile is like none."""
    sources, typical = model.likely_sources(prompts), model.typical(prompts)
    kept: dict[str, list[int]] = {}
    for source, level, answer in zip(sources, typical, answers, strict=True):
        if level == OUT:
            continue
        name = model.sources[source]
        for check, right in forms.kept(name, answer).items():
            counts = kept.setdefault(f"{name}.{check}", [0, 0])
            counts[0] += right
            counts[1] += 1
    return AnswerCounts(
        answers=len(answers),
        lengths=length_counts(np.array([len(words_of(answer)) for answer in answers], dtype=np.int64)),
        refusals=sum(refuses(answer) for answer in answers),
        loops=sum(loops(answer) for answer in answers),
        forms=dict(sorted(kept.items())),
    )


def answer_statistics(before: AnswerCounts, now: AnswerCounts, rng: np.random.Generator) -> list[Statistic]:
    """Comparisons of live answers with the release's own; none where either has no answers."""
    if not before.answers or not now.answers:
        return []
    of = (before.answers, now.answers)
    found = [
        ordered("answer_length", "how long the answers are, in words", before.lengths, now.lengths, rng),
        rate("refusal", "answers that refuse", before.refusals, of[0], now.refusals, of[1]),
        rate(
            "repetition",
            "answers that say the same over and over",
            before.loops,
            of[0],
            now.loops,
            of[1],
            minded="more",
        ),
    ]
    for name in sorted({*before.forms} & {*now.forms}):
        (kept, all_before), (live_kept, all_now) = before.forms[name], now.forms[name]
        source, _, check = name.rpartition(".")
        meaning = f"answers of {source} that keep its {check}"
        found.append(rate(name, meaning, kept, all_before, live_kept, all_now, minded="less"))
    return found
