"""Personal data and secrets in a text, by patterns that are checked: digits by checksums, addresses by ranges.

Made for few false alarms, since a gate counts them: an order number is no card, a version is no address, a mailbox of
a role or of example.com is nobody's, a placeholder is no key. Names and postal addresses are not looked for.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """`kind` of what was found and the text; `key` is equal for other spellings of the same (`+49 30/1`, `+49301`)."""

    kind: str
    text: str
    key: str


Holds = Callable[[re.Match[str]], bool]
_CONTEXT = 32  # characters before a number that may say what it counts
_COUNTED = re.compile(
    r"(?:order|ticket|case|invoice|tracking|reference|ref|serial|part|article|item|product|sku|isbn|ean|model|account|"
    r"customer|booking|confirmation|batch|lot|transaction|request|issue|bestell\w*|rechnung\w*|artikel\w*|auftrag\w*|kunden\w*|vorgang\w*)"
    r"[\s_-]*(?:no|nr|num|number|nummer|code|id)?(?:\s+(?:is|was|ist|lautet))?[\s.:#=]*$|#\s*$",
    re.IGNORECASE,
)
_VERSION = re.compile(
    r"(?:\bversions?|\bv|\brelease|\bbuild|\bfirmware|\bdriver|\bpackage|\bsection|\bchapter|§|==|>=)[\s.:=]*$",
    re.IGNORECASE,
)


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - _CONTEXT) : match.start()]


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


# --- personal data --------------------------------------------------------------------------------------

# Mailboxes of a role (RFC 2142) and common ones beside them.
ROLES = frozenset({
    "info", "marketing", "sales", "support", "abuse", "noc", "security", "postmaster", "hostmaster", "usenet", "news",
    "webmaster", "www", "uucp", "ftp", "help", "helpdesk", "contact", "kontakt", "hello", "service", "office", "admin",
    "billing", "team", "noreply", "no-reply", "donotreply", "feedback", "press", "jobs", "careers", "privacy", "legal",
    "orders", "returns", "booking", "bookings", "reception", "user", "username", "name", "email", "mail", "someone",
    "you",
})  # fmt: skip
# Reserved for documentation (RFC 2606, RFC 6761), and what everybody takes for it.
_NOBODYS_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net|edu)|(?:your|my)?-?(?:domain|company|email|website)\.\w+|test|example|invalid|localhost|local)$"
)
_PUBLIC_RESOLVERS = frozenset(("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222"))
_TOLL_FREE = frozenset(("800", "833", "844", "855", "866", "877", "888"))
_NEVER_ISSUED = frozenset(("078051120", "219099999", "123456789"))  # printed on samples, withdrawn or never given
# Length by country: SWIFT IBAN Registry, release 97.
IBAN_LENGTHS = {
    country: int(length)
    for length, countries in (
        line.split(": ")
        for line in (
            "15: NO", "16: BE", "18: DK FK FI FO GL NL SD", "19: MK SI", "20: AT BA EE KZ LT LU XK", "21: CH HR LI LV",
            "22: BG BH CR DE GB GE IE ME RS VA", "23: AE GI IL IQ OM SO TL", "24: AD CZ ES MD PK RO SA SE SK TN VG",
            "25: LY PT ST", "26: IS TR", "27: BI DJ FR GR IT MC MR SM", "28: AL AZ BY CY DO GT HU LB NI PL SV",
            "29: BR EG PS QA UA", "30: JO KW MU YE", "31: MT SC", "32: LC", "33: RU",
        )
    )
    for country in countries.split()
}  # fmt: skip


def _persons_mailbox(match: re.Match[str]) -> bool:
    name, _, domain = match.group().lower().rpartition("@")
    return name.partition("+")[0] not in ROLES and not _NOBODYS_DOMAIN.search(domain)


def _phone(match: re.Match[str]) -> bool:
    text, digits = match.group(), _digits(match.group())
    if _COUNTED.search(_before(match)):
        return False
    if text.startswith("+"):
        national = digits[1:] if digits.startswith("1") else digits
        return 8 <= len(digits) <= 15 and not (digits.startswith("1") and _is_nobodys(national))
    return not _is_nobodys(digits[-10:])


def _is_nobodys(national: str) -> bool:
    """Of the North American plan: toll-free, or 555-0100 to 555-0199, which is kept for fiction."""
    return national[:3] in _TOLL_FREE or national[3:8] == "55501"


def _named_phone(match: re.Match[str]) -> bool:
    digits = _digits(match.group())
    return 7 <= len(digits) <= 13 and not _is_nobodys(digits[-10:])


def _iban(match: re.Match[str]) -> bool:
    """The remainder mod 97 is 1 (ISO 13616)."""
    text = re.sub(r"[\s-]", "", match.group()).upper()
    if len(text) != IBAN_LENGTHS.get(text[:2]):
        return False
    return int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1


def luhn(digits: str) -> bool:
    """Whether the check digit is right (ISO/IEC 7812-1, annex B)."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _card(match: re.Match[str]) -> bool:
    digits = _digits(match.group())
    return luhn(digits) and len(set(digits)) > 2 and not _COUNTED.search(_before(match))


def _ssn(match: re.Match[str]) -> bool:
    """Area 000, 666 and 9xx, group 00 and serial 0000 are never given (SSA, POMS RM 10201.035)."""
    area, group, serial = match.group().split("-")
    given = area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
    return given and area + group + serial not in _NEVER_ISSUED and not _COUNTED.search(_before(match))


def _address(match: re.Match[str]) -> bool:
    """Public addresses that could be somebody's: none of private, reserved or documentation ranges."""
    if _VERSION.search(_before(match)) or match.group() in _PUBLIC_RESOLVERS:
        return False
    try:
        return ipaddress.IPv4Address(match.group()).is_global and not match.group().endswith((".0", ".0.1"))
    except ValueError:
        return False


_PERSONAL: tuple[tuple[str, re.Pattern[str], Holds], ...] = (
    ("e-mail", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}\b"),
     _persons_mailbox),
    ("IBAN", re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,4})?\b"), _iban),
    ("credit card", re.compile(
        r"(?<![\w.-])(?:(?:4\d{3}|5[1-5]\d{2}|2[2-7]\d{2}|6(?:011|5\d{2}|4[4-9]\d)|35\d{2})(?:[ -]?\d{4}){3}"
        r"|3[47]\d{2}[ -]?\d{6}[ -]?\d{5}|3(?:0[0-5]|[68]\d)\d[ -]?\d{6}[ -]?\d{4})(?![\w-]|\.\d)"), _card),
    ("social security number", re.compile(r"(?<![\w.-])\d{3}-\d{2}-\d{4}(?![\w-]|\.\d)"), _ssn),
    ("phone number", re.compile(r"(?<![\w.+-])\+\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}(?!\w|\.\d)"), _phone),
    ("phone number", re.compile(
        r"(?<![\w.+/-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}(?![\w-]|\.\d)"), _phone),
    ("phone number", re.compile(
        r"(?:\b(?:tel|telefon|telephone|phone|mobile|mobil|cell|handy|whatsapp|fax|call "
        r"(?:me|him|her|them)(?: (?:at|on))?)"
        r"(?: ?(?:no|nr|number|nummer))?\b[.:]{0,2} ?(?:is |ist )?)"
        r"(\(?0\d{1,5}\)?(?:[ ./-]{0,3}\d{2,8}){1,4})(?!\w|\.\d)",
        re.IGNORECASE), _named_phone),
    ("IP address", re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)"), _address),
)  # fmt: skip


# --- secrets --------------------------------------------------------------------------------------------


def _drawn(match: re.Match[str]) -> bool:
    """Whether a key could have been drawn at random: no placeholder as `sk-xxxx`, no EXAMPLE as in AWS's manuals."""
    text = match[match.lastindex or 0]
    return len(set(text[8:])) >= min(10, len(text) // 3) and not re.search(
        r"example|your|x{5}|1234567|abcdefg|\*{3}|\.{3}", text, re.IGNORECASE
    )


# What stands for a password in manuals: `password`, `DB_PASSWORD`, `my-secret1`, `$PASS`.
_SAMPLE = re.compile(
    r"(?:[a-z]+[_-])*(?:my|your|the|some|db|user|admin|super|strong|top)*[_-]?"
    r"(?:pass(?:word|wd|phrase|code)?|pwd?|secret|token|key|change[_-]?(?:me|it|this))(?:[_-]?here)?[_-]?\d{0,4}!?"
    r"|\$.*|.*(?:example|x{3}|\*{3}|\.{3}|123456).*",
    re.IGNORECASE,
)
_SIGNS = (re.compile("[a-z]"), re.compile("[A-Z]"), re.compile(r"[\W\d_]"))
_EXAMPLE_HOST = re.compile(r"(?:^|\.)example(?:\.|$)", re.IGNORECASE)


def _password(match: re.Match[str]) -> bool:
    """Of two kinds of signs at least and more than a capital letter before small ones: a word alone is a sample, as is
    the user's own name."""
    text = match["password"]
    mixed = sum(sign.search(text[1:]) is not None for sign in _SIGNS) > 1
    own = text.lower() == match["user"].lower()
    return mixed and not own and not _SAMPLE.fullmatch(text) and not _EXAMPLE_HOST.search(match["host"])


def _jwt(match: re.Match[str]) -> bool:
    """The first part is a JSON object that names an algorithm (RFC 7519, section 5)."""
    head = match.group().split(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(header, dict) and "alg" in header


_SECRET: tuple[tuple[str, re.Pattern[str], Holds], ...] = (
    ("private key", re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----\s+(?:[\w-]+: [^\n]*\n\s*)*([A-Za-z0-9+/=\s]+)"),
     lambda match: len("".join(match.group(1).split())) >= 48),
    ("AWS key", re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b"), _drawn),
    ("GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})\b"),
     _drawn),
    ("Slack token", re.compile(r"\bxox[abeoprs]-(?:\d+-)?[A-Za-z0-9-]{10,250}\b"), _drawn),
    ("Anthropic key", re.compile(r"\bsk-ant-[A-Za-z0-9_-]{32,250}"), _drawn),
    ("OpenAI key", re.compile(r"\bsk-(?!ant-)(?:proj-|svcacct-|admin-|None-)?[A-Za-z0-9_-]{32,250}"), _drawn),
    ("Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,60}\b"), _drawn),
    ("Google key", re.compile(r"\bAIza[A-Za-z0-9_-]{35}(?![\w-])"), _drawn),
    ("GitLab token", re.compile(r"\bglpat-[A-Za-z0-9_-]{20,300}(?:\.[a-z0-9]{2}\.[a-z0-9]{9})?"), _drawn),
    ("Stripe key", re.compile(r"\b[rs]k_live_[A-Za-z0-9]{16,250}\b"), _drawn),
    ("npm token", re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"), _drawn),
    ("AWS secret key", re.compile(
        r"secret[ _-]?access[ _-]?key[\"'`]?\s{0,4}(?:=>|[:=]|\bis\b)\s{0,4}[\"'`]?([A-Za-z0-9/+]{40})(?![\w/+=])",
        re.IGNORECASE), _drawn),
    ("JSON Web Token", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"), _jwt),
    ("password in a URL", re.compile(
        r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://(?P<user>[^\s:/@<>{}]{0,64})"
        r":(?P<password>[^\s/<>{}()\[\]\"'`]{6,128})@(?P<host>[\w.-]+)"),
     _password),
)  # fmt: skip


def personal_data(text: str) -> list[Found]:
    """E-mail addresses, IBANs, card numbers, US social security numbers, phone numbers and public IPv4 addresses."""
    return list(_search(text, _PERSONAL))


def secrets(text: str) -> list[Found]:
    """Private keys, keys and tokens of well-known services, JSON Web Tokens, passwords in URLs."""
    return list(_search(text, _SECRET))


def _search(text: str, kinds: tuple[tuple[str, re.Pattern[str], Holds], ...]) -> Iterator[Found]:
    """Each place of a text once, by the first kind that claims it."""
    taken: list[tuple[int, int]] = []
    for kind, pattern, holds in kinds:
        for match in pattern.finditer(text):
            span = match.span()
            if any(start < span[1] and span[0] < end for start, end in taken) or not holds(match):
                continue
            taken.append(span)
            value = match["password"] if "password" in pattern.groupindex else match[min(pattern.groups, 1)]
            yield Found(kind, value, _key(kind, value))


def _key(kind: str, value: str) -> str:
    if kind == "phone number":
        return _digits(value)[-9:]  # with and without the country's code
    return re.sub(r"[\s-]", "", value).lower()
