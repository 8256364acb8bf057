"""A look at live traffic: what has changed against the profile of a release, in figures and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from sftdist.core.errors import DataError
from sftdist.evals.features import features_of
from sftdist.evals.label_sample import Candidate, candidates
from sftdist.evals.live import AnswerCounts, Forms, answer_counts, answer_statistics
from sftdist.evals.profile import Profile
from sftdist.evals.shift import ALPHA, Statistic, judged, prompt_statistics
from sftdist.evals.traffic import Traffic

MONITOR_FORMAT = 1
LEAST_ROWS = 50  # fewer live prompts say nothing, and "no drift" would be read as news
SHOWN_EXAMPLES = 20
SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class Compared:
    """The statistics of a look, judged together, and the prompts out of the profile, the most surprising first."""

    statistics: list[Statistic]
    out: list[Candidate]
    answers: int

    @property
    def drift(self) -> bool:
        return any(one.drift for one in self.statistics)


def compare(profile: Profile, forms: Forms, traffic: Traffic) -> Compared:
    """Live rows against the profile of a release. Raises DataError for fewer than `LEAST_ROWS` rows."""
    rows = traffic.rows
    if len(rows) < LEAST_ROWS:
        raise DataError(
            f"traffic: given {len(rows)} prompts, required at least {LEAST_ROWS} to tell drift from chance; "
            "collect more, or give more files"
        )
    prompts = [row.prompt for row in rows]
    live = features_of(prompts)
    found = prompt_statistics(profile, live, prompts)
    said = [i for i, row in enumerate(rows) if row.answer is not None]
    answered = live.take(np.array(said, dtype=np.int64))
    now = answer_counts(profile.model, answered, [str(rows[i].answer) for i in said], forms)
    found += answer_statistics(AnswerCounts.of_json(profile.answers), now, np.random.default_rng(0))
    return Compared(judged(found), candidates(profile, live, rows), len(said))


def monitor_report(release: str, profile: Profile, traffic: Traffic, compared: Compared) -> dict[str, Any]:
    """The look as plain values, which `monitor.json` and the page show."""
    return {
        "format": MONITOR_FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "release": release,
        "drift": compared.drift,
        "regressed": False,
        "regression": None,
        "findings": [sentence(one) for one in compared.statistics if one.drift],
        "alpha": ALPHA,
        "traffic": {
            "rows": len(traffic.rows),
            "answers": compared.answers,
            "bad_rows": sum(traffic.reasons.values()),
            "reasons": traffic.reasons,
            "named": traffic.bad,
            "torn": traffic.torn,
        },
        "profile": {"prompts": profile.prompts, "sources": profile.by_source},
        "statistics": [asdict(one) for one in compared.statistics],
        "out_of_profile": len(compared.out),
        "examples": [example(one) for one in compared.out[:SHOWN_EXAMPLES]],
    }


def sentence(one: Statistic) -> str:
    """What a statistic found, for people."""
    if one.profile is not None and one.live is not None:
        now, before = f"{one.live.value:.1%}", f"{one.profile.value:.1%}"
        return f"{one.meaning}: {now}, in the profile {before} ({_chance(one)})"
    moved = sorted(one.parts, key=lambda part: -abs(part.live - part.profile))[:3]
    parts = ", ".join(f"{part.label} {part.live:.1%} instead of {part.profile:.1%}" for part in moved)
    size = "" if one.psi is None else f"PSI {one.psi.value:.2f}, "
    return f"{one.meaning}: {parts} ({size}{_chance(one)})"


def _chance(one: Statistic) -> str:
    return (
        "by chance in less than 1 of 1,000 looks"
        if one.adjusted < 0.001
        else f"by chance in {one.adjusted:.1%} of looks"
    )


def example(one: Candidate) -> dict[str, Any]:
    text = one.row.prompt
    return {
        "place": one.row.place,
        "prompt": text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...",
        "bits": round(one.surprise, 2),
        "kind": list(one.stratum),
    }


def summary_lines(report: dict[str, Any]) -> Sequence[str]:
    """The look in a few lines, for a terminal or a log."""
    traffic = report["traffic"]
    given = f"{traffic['rows']:,} prompts and {traffic['answers']:,} answers against {report['release']}"
    bad = f"; {traffic['bad_rows']:,} bad rows left out" if traffic["bad_rows"] else ""
    lines = [given + bad]
    if not report["drift"]:
        lines.append("no drift: chance alone explains every difference, or it is too small to mind")
    if report["regression"]:
        again = report["regression"]
        held = "worse than when it was published" if report["regressed"] else "as good as when it was published"
        lines.append(f"{again['prompts']:,} prompts of the holdout asked again at {again['asked']}: {held}")
        if again["not_again"]:
            lines.append(f"not measured again: {', '.join(again['not_again'])}")
    return [*lines, *(f"  - {finding}" for finding in report["findings"])]
