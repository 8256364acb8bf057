"""The page of `inspect`: roles, what is supervised with which weight, token by token; written row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from itertools import groupby
from typing import Any, TextIO

from markupsafe import Markup

from sftdist.data.pages import page_template

ROLES = ("system", "developer", "user", "assistant", "tool")


def write_html(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """One page without any outside file: about 20 bytes a token."""
    for part in page_template("inspect.html").generate(rows=_articles(rows)):
        out.write(part)


def _articles(rows: Iterable[dict[str, Any]]) -> Iterator[Markup]:
    count, pack = 0, None
    for row in rows:
        count += 1
        if row.get("pack") and row["pack"]["number"] != pack:
            pack = row["pack"]["number"]
            yield Markup(f'<h2 class="pack">{_pack_title(row["pack"])}</h2>')
        yield Markup("".join(_article(row)))
    yield Markup(f"<p>{count:,} rows</p>")


def _pack_title(pack: Mapping[str, Any]) -> str:
    documents = "1 document" if pack["documents"] == 1 else f"{pack['documents']:,} documents"
    return (
        f"pack {pack['number'] + 1:,} of {pack['packs']:,} "
        f"<small>{documents}, {pack['tokens']:,} of {pack['pack_tokens']:,} tokens</small>"
    )


def _article(row: Mapping[str, Any]) -> Iterator[str]:
    tokens = row["tokens"]
    trained = sum(token["supervised"] for token in tokens)
    place = ""
    if row.get("pack"):
        start = row["pack"]["start"]
        place = f", {start:,} to {start + len(tokens):,} of the pack"
    loss = f"loss {row['loss']:.3f}, " if "loss" in row else ""
    title = f"{loss}{trained:,} of {len(tokens):,} tokens supervised{place}"
    yield f"<article><h2>{escape(row['id'])} <small>{title}</small></h2>"
    if row["refused"] is not None:
        yield f'<p class="refused">refused: {escape(row["refused"])}</p>'
    if "worst_tokens" in row:
        worst = ", ".join(f"<code>{escape(repr(one['text']))}</code> {one['loss']:.2f}" for one in row["worst_tokens"])
        yield f"<p>worst tokens: {worst}</p>"
    if tokens or row["text"]:
        yield f'<pre tabindex="0" aria-label="{escape(row["id"])}">'
        yield from _messages(row)
        ids = " ".join(str(token["id"]) for token in tokens)
        yield f'</pre><details class="ids"><summary>token ids</summary><code>{ids}</code></details>'
    yield "</article>"


def _messages(row: Mapping[str, Any]) -> Iterator[str]:
    """A block per message, in it a `u` per stretch of one weight, in it an `i` per token."""
    text, reached = row["text"], 0
    for (role, turn), message in groupby(row["tokens"], key=lambda token: (token["role"], token["turn"])):
        name = role if role in ROLES else "other"
        yield f'<span class="m {name}" data-role="{escape(role)}" data-turn="{turn}">'
        for weight, run in groupby(message, key=lambda token: token["weight"]):
            yield _opening(weight) if weight > 0 else ""
            for token in run:
                yield escape(text[reached : token["start"]])  # characters that no token covers
                yield f"<i>{_visible(token['text'])}</i>"
                reached = max(reached, token["end"])
            yield "</u>" if weight > 0 else ""
        yield "</span>"
    yield escape(text[reached:])


def _visible(text: str) -> str:
    """A token with its line ends marked: the empty `s` shows a sign, and is not copied with the text."""
    return escape(text).replace("\n", "<s></s>\n")


def _opening(weight: float) -> str:
    return "<u>" if weight == 1 else f'<u data-w="{weight:g}" style="--w:{weight:g}">'
