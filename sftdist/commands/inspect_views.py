"""The two views of `inspect` for people: a terminal, and one self-contained HTML page. Both are written row by row."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import groupby
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

ROLE_STYLES = {"system": "magenta", "developer": "magenta", "user": "cyan", "tool": "yellow", "assistant": "white"}
SUPERVISED_STYLE = "black on green"
PAGE_START = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sftdist inspect</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
article { border: 1px solid #ddd; border-radius: 6px; margin: 1rem 0; padding: .6rem 1rem; }
h2 { font-size: 1rem; margin: 0 0 .4rem; } h2 small { font-weight: normal; color: #777; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.6 ui-monospace, monospace; }
.refused { color: #b00020; }
.system, .developer { color: #8e24aa; } .user { color: #00708a; } .tool { color: #8a6d00; } .assistant { color: #888; }
.on { background: #b7ebc6; color: #111; border-radius: 2px; }
span:hover { outline: 1px solid #777; }
</style>
<h1>What is trained</h1>
<p><span class="on">supervised</span> <span class="assistant">assistant</span> <span class="user">user</span>
<span class="system">system</span> <span class="tool">tool</span>. Point at a token for its id, turn and weight.</p>
"""


def print_terminal(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Each conversation with its supervised tokens on green and the roles in colours."""
    console = Console(file=out, highlight=False, soft_wrap=True)
    count = refused = tokens = supervised = 0
    for row in rows:
        count += 1
        trained = sum(token["supervised"] for token in row["tokens"])
        tokens, supervised = tokens + len(row["tokens"]), supervised + trained
        refused += row["refused"] is not None
        console.rule(Text(f"{row['id']}  {trained} of {len(row['tokens'])} tokens supervised"), align="left")
        if row["refused"] is not None:
            console.print(Text(f"refused: {row['refused']}", style="bold red"))
        console.print(_coloured(row))
    share = f"{supervised:,} of {tokens:,} tokens supervised"
    console.rule(Text(f"{count:,} rows, {refused:,} refused, {share}"), align="left")


def _coloured(row: dict[str, Any]) -> Text:
    text = Text()
    reached = 0
    for (supervised, role), group in groupby(row["tokens"], key=lambda token: (token["supervised"], token["role"])):
        end = max(token["end"] for token in group)
        style = SUPERVISED_STYLE if supervised else ROLE_STYLES.get(role, "")
        text.append(row["text"][reached:end], style=style)
        reached = max(reached, end)
    text.append(row["text"][reached:])
    return text


def write_html(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """One page without any outside file."""
    out.write(PAGE_START)
    count = 0
    for row in rows:
        count += 1
        trained = sum(token["supervised"] for token in row["tokens"])
        out.write(f"<article><h2>{escape(row['id'])} <small>{trained} of {len(row['tokens'])} tokens</small></h2>\n")
        if row["refused"] is not None:
            out.write(f'<p class="refused">refused: {escape(row["refused"])}</p>\n')
        out.write("<pre>" + "".join(_html_tokens(row)) + "</pre></article>\n")
    out.write(f"<p>{count:,} rows</p>\n</html>\n")


def _html_tokens(row: dict[str, Any]) -> Iterable[str]:
    reached = 0
    for token in row["tokens"]:
        yield escape(row["text"][reached : token["start"]])  # characters that no token covers
        name = "on" if token["supervised"] else token["role"]
        title = f"id {token['id']}, {token['role']}, turn {token['turn']}, weight {token['weight']:g}"
        yield f'<span class="{name}" title="{title}">{escape(token["text"])}</span>'
        reached = max(reached, token["end"])
    yield escape(row["text"][reached:])
