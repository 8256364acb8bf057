"""The view of `inspect` on a terminal, written row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

ROLE_STYLES = {"system": "magenta", "developer": "magenta", "user": "cyan", "tool": "yellow", "assistant": "white"}
SUPERVISED_STYLE = "underline black on green"
WEIGHT_STYLE = "bold green"


def print_terminal(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Each conversation with its supervised tokens underlined on green, and the roles in colours.

    Where there is no terminal (a file, a pipe) they stand between ⟦ and ⟧. A weight that is not 1 follows them.
    """
    console = Console(file=out, highlight=False, soft_wrap=True)
    count = refused = tokens = supervised = 0
    for row in rows:
        count += 1
        trained = sum(token["supervised"] for token in row["tokens"])
        tokens, supervised = tokens + len(row["tokens"]), supervised + trained
        refused += row["refused"] is not None
        console.rule(
            Text(f"{row['id']}  {trained} of {len(row['tokens'])} tokens supervised{_loss(row)}"), align="left"
        )
        if row["refused"] is not None:
            console.print(Text(f"refused: {row['refused']}", style="bold red"))
        console.print(_coloured(row, marked=not console.is_terminal))
    share = f"{supervised:,} of {tokens:,} tokens supervised"
    console.rule(Text(f"{count:,} rows, {refused:,} refused, {share}"), align="left")


def _loss(row: Mapping[str, Any]) -> str:
    """Of a row of `worst=N`: its loss and its worst tokens."""
    if "loss" not in row:
        return ""
    tokens = ", ".join(f"{token['text']!r} {token['loss']:.2f}" for token in row["worst_tokens"])
    return f"  loss {row['loss']:.3f}, worst {tokens}"


def _coloured(row: dict[str, Any], marked: bool) -> Text:
    text = Text()
    reached = 0
    for (weight, role), group in groupby(row["tokens"], key=lambda token: (token["weight"], token["role"])):
        end = max(token["end"] for token in group)
        piece = row["text"][reached:end]
        if weight > 0:
            text.append(f"⟦{piece}⟧" if marked else piece, style=SUPERVISED_STYLE)
            text.append("" if weight == 1 else f"(weight {weight:g})", style=WEIGHT_STYLE)
        else:
            text.append(piece, style=ROLE_STYLES.get(role, ""))
        reached = max(reached, end)
    text.append(row["text"][reached:])
    return text
