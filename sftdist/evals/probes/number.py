"""The number that an answer ends with."""

from __future__ import annotations

from decimal import Decimal

import regex

from sftdist.evals.probes.words import last

_SIGN = "[-\u2212]"
_AMOUNT = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|(?<!\.)\.\d+"
# Not the 2 of H2O nor the 5 of v1.5; the sign is none in 5-3.
_NUMBER = (
    rf"(?P<sign>(?<![\w)\]]){_SIGN})?(?:\p{{Sc}}\s?(?P<behind>{_SIGN})?)?"
    rf"(?<![A-Za-z_\d]|\d\.)(?P<amount>{_AMOUNT})"
)
_ANYWHERE = regex.compile(_NUMBER)
_MARKED = regex.compile(rf"####[ \t]*{_NUMBER}")
_ALONE = regex.compile(rf"\s*{_NUMBER}\s*%?\.?\s*")


def number_of(answer: str) -> Decimal | None:
    """The number behind the last `####`, as answers to GSM8K end (Cobbe et al. 2021, arXiv:2110.14168); else the last
    number of the text. `1,000` and `$1000.00` are the same, `1.000` is one."""
    found = last(_MARKED, answer) or last(_ANYWHERE, answer)
    return None if found is None else _value(found)


def reference_number(reference: str) -> Decimal | None:
    """The number of a reference that is about one: behind `####`, or all that it says."""
    found = last(_MARKED, reference) or _ALONE.fullmatch(reference)
    return None if found is None else _value(found)


def _value(found: regex.Match[str]) -> Decimal:
    value = Decimal(found["amount"].replace(",", ""))
    return -value if found["sign"] or found["behind"] else value
