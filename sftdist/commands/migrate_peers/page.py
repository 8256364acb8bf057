"""The experiment file that a migration writes, and what it prints: the same account, as comments and as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from sftdist.commands.migrate_peers.account import Account, Kind
from sftdist.commands.migrate_peers.rule import NONE, Peer
from sftdist.core.snapshot import SECTIONS

WIDTH = 116
HEADS = {
    Kind.unknown: "Unknown keys",
    Kind.differs: "Different in meaning",
    Kind.left: "Not carried over",
    Kind.unneeded: "Not needed here",
    Kind.carried: "Carried over",
}


def report(account: Account) -> list[str]:
    """What became of every key, the most important first."""
    lines: list[str] = []
    for kind, head in HEADS.items():
        notes = list(dict.fromkeys((note.key, note.text) for note in account.notes if note.kind is kind))
        if notes:
            lines += [f"{head} ({len(notes)})", *(line for key, text in notes for line in _entry(key, text)), ""]
    if account.needs:
        lines += ["Before it runs", *(line for text in account.needs for line in _wrapped(text, "  - ", "    ")), ""]
    return lines[:-1]


def _entry(key: str, text: str) -> list[str]:
    return _wrapped(f"{key}: {text}", "  ", "      ")


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def experiment(account: Account, peer: Peer, file: str, name: str) -> str:
    """The text of conf/exp/NAME.yaml, every value with where it comes from."""
    head = [f"From {file} of {peer.title}, by sftdist migrate. It trains with: sftdist train +exp={name}", ""]
    comments = [f"# {line}".rstrip() for line in (*head, *report(account))]
    return "\n".join(["# @package _global_", *comments, "", *_values(account), ""])


def _values(account: Account) -> Iterator[str]:
    """Our keys as YAML, section by section."""
    for section in SECTIONS:
        if section in account.values:
            yield _line(section, account.values[section], account.origins[section])
        below = {key: value for key, value in account.values.items() if key.startswith(f"{section}.")}
        if below:
            yield f"{section}:"
        for key, value in below.items():
            short = key.partition(".")[2]
            if key == "data.sources":
                yield f"  {short}:"
                yield from (f"    {line}" for line in _yaml(value).splitlines())
            else:
                yield f"  {_line(short, value, account.origins[key])}"


def _line(key: str, value: Any, origin: str) -> str:
    return f"{key}: {_inline(value)}  # {origin}"


def _inline(value: Any) -> str:
    """A value on one line."""
    flow = isinstance(value, list | Mapping)
    text = yaml.safe_dump(value, default_flow_style=flow, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000)


def table(peer: Peer) -> list[str]:
    """The keys of a peer as a table of Markdown: those that are carried over, then the others by reason."""
    carried = [rule for rule in peer.rules if rule.ours != NONE]
    lines = [f"| {peer.title} | sftdist | |", "|---|---|---|"]
    lines += [f"| {_code(rule.keys)} | {rule.ours} | {rule.about} |" for rule in carried]
    lines += ["", f"| Not carried over from {peer.title} | |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for rule in peer.rules:
        if rule.ours == NONE:
            reasons.setdefault(rule.about, []).extend(rule.keys)
    return [*lines, *(f"| {about} | {_code(tuple(keys))} |" for about, keys in reasons.items())]


def _code(keys: tuple[str, ...]) -> str:
    return " ".join(f"`{key}`" for key in keys)
