"""The number that an answer ends with."""

from __future__ import annotations

from decimal import Decimal

import regex

from sftdist.evals.probes.words import last

_SIGN = "[-\u2212]"
_SPACE = "[ \u00a0\u2009\u202f]"
_POWER = r"[eE][-+]?\d{1,3}(?!\w)"
# All that is written together, be it a number or not: 1,234.50 and 1 000, but also 1.2.3, 1/2 and 05/17/2024.
_AMOUNT = (
    rf"(?:(?<!\d{_SPACE})\d{{1,3}}(?:{_SPACE}\d{{3}}(?!\d))++|\d+|(?<!\.)\.\d+)(?:(?:[.,]|\ ?/\ ?)\d+)*+(?:{_POWER})?+"
)
# Not the 2 of H2O nor the 5 of v1.5; the sign is none in 5-3.
_NUMBER = (
    rf"(?P<sign>(?<![\w)\]]){_SIGN})?(?:\p{{Sc}}\s?(?P<behind>{_SIGN})?)?"
    rf"(?<![A-Za-z_\d]|\d[.,]|\d\ ?/\ ?)(?P<amount>{_AMOUNT})"
)
_PLAIN = regex.compile(rf"(?:(?!0)\d{{1,3}}(?:,\d{{3}})+|\d*)(?:\.\d+)?(?:{_POWER})?")
_SPACED = regex.compile(rf"(?!0)\d{{1,3}}(?:{_SPACE}\d{{3}})+(?:[.,]\d+)?")
_DOTTED = regex.compile(r"(?!0)\d{1,3}(?:\.\d{3})+,\d+")
_ANYWHERE = regex.compile(_NUMBER)
_MARKED = regex.compile(rf"####[ \t]*{_NUMBER}")
_ALONE = regex.compile(rf"\s*{_NUMBER}\s*%?\.?\s*")


def number_of(answer: str) -> Decimal | None:
    """The number behind the last `####`, as answers to GSM8K end (Cobbe et al. 2021, arXiv:2110.14168); else the last
    number of the text. `1,000`, `1 000` and `$1000.00` are the same, `1.000` is one, `1.000,50` a thousand and a half;
    none where it is written in no such way: `12,34`, `1/2`, `1.2.3`."""
    found = last(_MARKED, answer) or last(_ANYWHERE, answer)
    return None if found is None else _value(found)


def reference_number(reference: str) -> Decimal | None:
    """The number of a reference that is about one: behind `####`, or all that it says."""
    found = last(_MARKED, reference) or _ALONE.fullmatch(reference)
    return None if found is None else _value(found)


def _value(found: regex.Match[str]) -> Decimal | None:
    written = _written_plainly(found["amount"])
    if written is None:
        return None
    value = Decimal(written)
    return -value if found["sign"] or found["behind"] else value


def _written_plainly(amount: str) -> str | None:
    """Digits and a decimal point alone; None for what is no number, or can be read in two ways."""
    if _PLAIN.fullmatch(amount):
        return amount.replace(",", "")
    if _SPACED.fullmatch(amount):
        return regex.sub(_SPACE, "", amount).replace(",", ".")
    if _DOTTED.fullmatch(amount):
        return amount.replace(".", "").replace(",", ".")
    return None
