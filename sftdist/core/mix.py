"""The user's mixture, in any of its forms, as one lambda per source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sftdist.core.typed import shown


def lambdas_of(mix: Any, sources: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """`data.mix` as `{source: lambda}` that sum to 1, and the issues (then the lambdas are empty).

    `mix` is a mapping with every source, or a list with one lambda per source in the order of the sources.
    """
    form = f"required {{{','.join(f'{name}:L' for name in sources)}}} or [{','.join('L' for _ in sources)}]"
    if isinstance(mix, Sequence) and not isinstance(mix, str) and len(mix) == len(sources):
        mix = dict(zip(sources, mix, strict=True))
    if not isinstance(mix, Mapping):
        return {}, [f"data.mix: given {shown(mix)}, {form}, one lambda per source, or a name in conf/mix"]
    issues = [f"data.mix: no source is named {name!r}; {form}" for name in mix if name not in sources]
    issues += [
        f"data.mix: no lambda for source {name!r}; {form} (0 leaves it out)" for name in sources if name not in mix
    ]
    issues += [f"data.mix: {issue}" for name, lam in mix.items() if (issue := lambda_issue(name, lam))]
    if not issues and sum(mix.values()) <= 0:
        issues.append("data.mix: the lambdas sum to 0; at least one source needs a lambda above 0")
    return ({}, issues) if issues else (normalised({name: float(mix[name]) for name in sources}), [])


def lambda_issue(name: str, lam: Any) -> str | None:
    """What is wrong with one lambda, or None."""
    if isinstance(lam, int | float) and not isinstance(lam, bool) and math.isfinite(lam) and lam >= 0:
        return None
    return f"the lambda of {name} is {shown(lam)}, required a number of at least 0"


def normalised(lambdas: Mapping[str, float]) -> dict[str, float]:
    """The same proportions with the sum 1; lambdas that sum to 1 up to rounding stay as they were written."""
    total = sum(lambdas.values())
    exact = math.isclose(total, 1.0, abs_tol=1e-9)
    return {name: lam if exact else lam / total for name, lam in lambdas.items()}
