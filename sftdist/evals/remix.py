"""A mixture for the next run: what fell gets more of the training, the others give it in proportion.

A source that lost 20 points or more gets twice its share, one that lost less so much less; one that was not trained on
gets 5 %. No source gives more than half of its share. One step of a search, not its end: train, evaluate, look again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sftdist.core.advice import for_a_shell

WHOLE_FALL = 0.2  # points lost that double a share
MOST_GIVEN = 0.5  # of its share
START = 0.05  # the share of a source that had none
_DIGITS = 3


@dataclass(frozen=True)
class Mixture:
    """Shares by source that sum to 1; `why` has a sentence per source that changes for a reason of its own."""

    present: dict[str, float]
    proposed: dict[str, float]
    why: list[str]
    override: str  # as one would type it into a shell


def propose(lambdas: Mapping[str, float], falls: Mapping[str, float]) -> Mixture | str:
    """The next mixture, or why there is none.

    `lambdas`: the present ones, of any sum. `falls`: by source how far its main score fell, 0.0 to 1.0; only where that
    is beyond doubt.
    """
    total = sum(lambdas.values())
    present = {name: lam / total for name, lam in lambdas.items()} if total > 0 else {}
    fell = {name: fall for name, fall in falls.items() if name in present}
    if not fell:
        return "the main score of no source fell: nothing here speaks for another mixture"
    room = sum(share for name, share in present.items() if name not in fell)
    if room == 0:
        return "every source fell: no mixture mends that; try a lower optimizer.lr or fewer train.epochs"
    wanted = {name: _more(present[name], fall) for name, fall in fell.items()}
    given = min(sum(wanted.values()), MOST_GIVEN * room)
    grown = {name: present[name] + more * given / sum(wanted.values()) for name, more in wanted.items()}
    proposed = _rounded({name: grown.get(name, share * (1 - given / room)) for name, share in present.items()})
    why = [
        f"{name} fell by {fall:.3f}: {present[name]:.3g} becomes {proposed[name]:.3g}" for name, fall in fell.items()
    ]
    return Mixture(present, proposed, why, override(proposed))


def override(mixture: Mapping[str, float]) -> str:
    """The word that sets it, quoted for a shell."""
    return for_a_shell(f"data.mix={{{','.join(f'{name}:{share:g}' for name, share in mixture.items())}}}")


def _more(share: float, fall: float) -> float:
    return share * min(1.0, fall / WHOLE_FALL) if share > 0 else START


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """To a few digits, with the sum 1: the largest takes what is left over."""
    found = {name: round(share, _DIGITS) for name, share in shares.items()}
    largest = max(found, key=lambda name: found[name])
    found[largest] = round(found[largest] + 1 - sum(found.values()), _DIGITS)
    return found
