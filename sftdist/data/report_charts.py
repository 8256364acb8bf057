"""The charts of the report: small pure functions from figures to inline SVG.

Places are in percent of the width, sizes of text in pixels: a chart fits any width, and its text stays readable. The
colours are classes of the page. No script, no style, no text from the data but what is escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from markupsafe import Markup

HEIGHT, FOOT, HEAD = 150, 20, 18  # pixels: of the chart, of its axis, of the words above the bars
MOST_TICKS = 6


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` rows have a length above `borders[i]` and up to `borders[i + 1]`."""

    borders: Sequence[int]
    counts: Sequence[int]


def axis_of(histograms: Sequence[Histogram], mark: int | None) -> tuple[int, int]:
    """From where to where the lengths of several charts go, so that they can be compared; the mark is in it."""
    inside = [border for one in histograms if one.counts for border in (one.borders[0] or 1, one.borders[-1])]
    inside += [] if mark is None else [mark]
    low, high = min(inside, default=1), max(inside, default=2)
    return low, max(high * 5 // 4, low + 1)  # room at the right for the bar beyond the mark


def histogram(one: Histogram, axis: tuple[int, int], mark: int | None, label: str) -> Markup:
    """Bars over a logarithmic axis; those beyond `mark` are hatched. `label`: the chart in a sentence."""
    bottom, top = HEIGHT - FOOT, max(one.counts, default=0)
    parts = []
    for i, count in enumerate(one.counts):
        if not count:
            continue
        left, right = (_place(max(1, border), axis) for border in (one.borders[i], one.borders[i + 1]))
        tall = max(1.0, (bottom - HEAD) * count / top)
        lost = mark is not None and one.borders[i] >= mark
        parts.append(
            f'<rect class="{"lost" if lost else "kept"}" x="{left:.2f}%" y="{bottom - tall:.1f}" '
            f'width="{max(0.3, right - left - 0.3):.2f}%" height="{tall:.1f}"><title>{one.borders[i] + 1:,} to '
            f"{one.borders[i + 1]:,} tokens: {count:,} rows</title></rect>"
        )
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{bottom}" y2="{bottom}"/>')
    for tick in _ticks(axis):
        place = _place(tick, axis)
        anchor = "start" if place < 5 else "end" if place > 95 else "middle"
        parts.append(f'<text class="tick" x="{place:.2f}%" y="{HEIGHT - 5}" text-anchor="{anchor}">{tick:,}</text>')
    if mark is not None:
        place = _place(mark, axis)
        anchor, gap = ("end", -4) if place > 50 else ("start", 4)
        parts.append(f'<line class="mark" x1="{place:.2f}%" x2="{place:.2f}%" y1="2" y2="{bottom}"/>')
        parts.append(
            f'<text class="note" x="{place:.2f}%" dx="{gap}" y="12" text-anchor="{anchor}">max_len {mark:,}</text>'
        )
    return svg("".join(parts), HEIGHT, label)


def bar(shares: Sequence[tuple[str, float]], label: str, mark: float | None = None) -> Markup:
    """One horizontal bar: (class of the page, share of the width) from left to right. `mark`: a line at that share."""
    parts, start = ['<rect class="track" width="100%" height="14"/>'], 0.0
    for kind, share in shares:
        wide = max(0.4, 100 * share) if share else 0.0
        parts.append(f'<rect class="{kind}" x="{100 * start:.2f}%" width="{wide:.2f}%" height="14"/>')
        start += share
    if mark is not None:
        parts.append(f'<line class="mark" x1="{100 * mark:.2f}%" x2="{100 * mark:.2f}%" y1="0" y2="14"/>')
    return svg("".join(parts), 14, label)


def svg(inside: str, height: int, label: str) -> Markup:
    """A chart as wide as its place; `inside` is trusted, `label` (the chart in a sentence) is escaped."""
    return Markup('<svg width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        height, label, Markup(inside)
    )


def _place(length: int, axis: tuple[int, int]) -> float:
    low, high = axis
    return 100 * log2(max(length, low) / low) / log2(high / low)


def _ticks(axis: tuple[int, int]) -> list[int]:
    """Powers of two, at most some of them, evenly spread."""
    low, high = axis
    powers = [1 << n for n in range(high.bit_length()) if low <= 1 << n <= high]
    every = -(-len(powers) // MOST_TICKS)
    return powers[::-1][::every][::-1] if every else [low]
