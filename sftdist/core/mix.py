"""The short forms of the data section: `data.train`, `data.dir` and `data.mix` as sources with paths and lambdas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftdist.core.settings import DataSettings, SourceSettings
from sftdist.core.typed import shown


def expand(data: DataSettings, named: Callable[[str], tuple[Any, list[str]]]) -> list[str]:
    """Write the short forms of `data` into its sources, in place; the issues.

    `data.train` becomes the only source, relative source paths go below `data.dir` (once: a path that is there
    already stays), and `data.mix` becomes the `lam` of each source and is None then. `named(name)` gives the mixture
    in conf/mix, or the issue that there is none.
    """
    if data.train is not None:
        train = data.sources.get("train", SourceSettings())
        train.path = data.train
        data.sources = {"train": train}
    else:
        for source in data.sources.values():
            source.path = _below(data.dir, source.path)
    if data.mix is None:
        lambdas = {name: source.lam for name, source in data.sources.items() if source.lam is not None}
        if len(lambdas) == len(data.sources) and not any(lambda_issue(name, lam) for name, lam in lambdas.items()):
            _set(data, normalised(lambdas))
        return []
    mix, issues = named(data.mix) if isinstance(data.mix, str) else (data.mix, [])
    if not issues:
        lambdas, issues = lambdas_of(mix, list(data.sources))
        _set(data, lambdas)
    data.mix = None
    return issues


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
    keep = total == 0 or math.isclose(total, 1.0, abs_tol=1e-9)
    return {name: lam if keep else lam / total for name, lam in lambdas.items()}


def _set(data: DataSettings, lambdas: Mapping[str, float]) -> None:
    for name, lam in lambdas.items():
        data.sources[name].lam = lam


def _below(folder: str | None, path: Any) -> Any:
    if isinstance(path, list):
        return [_below(folder, part) for part in path]
    if not isinstance(path, str) or path.startswith("hub:") or folder is None or Path(path).is_relative_to(folder):
        return path
    return str(Path(folder) / path)
