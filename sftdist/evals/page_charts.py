"""The charts of an evaluation: small pure functions from figures to inline SVG, in the manner of `data.report_charts`.

Places along a chart are in percent, so that it fits any width. What tells two marks apart is a shape or a dash as well
as a colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from sftdist.data.report_charts import svg
from sftdist.evals.intervals import Estimate

BASE_Y, TUNED_Y, INTERVAL_HEIGHT, TICKS_HEIGHT = 9, 24, 34, 14  # pixels
LINES_HEIGHT, FOOT = 170, 18
GUTTER = 13  # percent of a line chart, for the numbers at its left
INNER = 1000  # units of the stretched part of a line chart, along both sides
MOST_POINTS = 300  # of one line
SHAPES = (  # of the points of a line, one for each of the page's styles of lines
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M-4 -4h8v8h-8z",
    "M0 -5L5 4H-5z",
    "M0 -5L5 0L0 5L-5 0z",
    "M0 5L5 -4H-5z",
    "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
)


@dataclass(frozen=True)
class Axis:
    """From where to where the values of a chart go, and which of them are written below it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """In percent of the width."""
        return 100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


SHARE = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def axis_of(low: float | None, high: float | None, estimates: Sequence[Estimate], *further: float) -> Axis:
    """0 to 1 where the values are shares, so that all such charts compare; else what is shown, with some room."""
    if (low, high) == (0.0, 1.0):
        return SHARE
    inside = [value for one in estimates for value in (one.low, one.value, one.high)] + list(further)
    least, most = min(inside), max(inside)
    room = 0.05 * (most - least) or abs(most) / 10 or 1.0
    ticks = nice(least - room, most + room, 5)
    return Axis(least - room, most + room, tuple(ticks))


def interval_chart(base: Estimate | None, tuned: Estimate, axis: Axis, label: str, mark: float | None = None) -> Markup:
    """The base above the tuned model, each a point in its interval. `mark`: what a rule of the gate asks for."""
    bottom = INTERVAL_HEIGHT
    parts = [
        f'<line class="grid" x1="{axis.place(tick):.2f}%" x2="{axis.place(tick):.2f}%" y1="0" y2="{bottom}"/>'
        f'<text x="{axis.place(tick):.2f}%" y="{bottom + 11}" text-anchor="{_anchor(axis.place(tick))}">{tick:g}</text>'
        for tick in axis.ticks
    ]
    if mark is not None:
        parts.append(_upright("mark", axis.place(mark), 0, bottom))
    parts += [] if base is None else _interval("base", base, axis, BASE_Y)
    parts += _interval("tuned", tuned, axis, TUNED_Y)
    return svg("".join(parts), INTERVAL_HEIGHT + TICKS_HEIGHT, label)


def interval_key(kind: str) -> Markup:
    """How the interval of a model is drawn, `base` or `tuned`, for a legend."""
    return svg("".join(_interval(kind, Estimate(0.5, 0.0, 1.0), SHARE, 7)), 14, "")


def _interval(kind: str, one: Estimate, axis: Axis, y: int) -> list[str]:
    low, high, value = axis.place(one.low), axis.place(one.high), axis.place(one.value)
    whiskers = [_upright(kind, place, y - 4, y + 4) for place in (low, high)]
    line = f'<line class="{kind}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'
    return [line, *whiskers, f'<circle class="{kind}" cx="{value:.2f}%" cy="{y}" r="4.5"/>']


def _upright(kind: str, place: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{place:.2f}%" x2="{place:.2f}%" y1="{top}" y2="{bottom}"/>'


@dataclass(frozen=True)
class Line:
    """A curve over optimizer steps: `style` counts from 0, `dots` shows its points as well."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dots: bool = False


def line_chart(lines: Sequence[Line], label: str, *, from_zero: bool = False) -> Markup:
    """Lines over one axis of steps; `from_zero` lets the axis of values begin there. Needs a point at least."""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    first, last = min(steps), max(steps)
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = 0.06 * (high - low) or abs(high) / 10 or 1.0
    across = Axis(first, last, ()) if last > first else Axis(first - 1, last + 1, ())
    down = Axis(low if from_zero else low - room, high + room, tuple(nice(low, high, 5)))
    plot = LINES_HEIGHT - FOOT
    parts = [_level(tick, plot * (1 - down.place(tick) / 100)) for tick in down.ticks]
    strokes = []
    for line in lines:
        kind = line.style % len(SHAPES)
        places = [(across.place(step) / 100, 1 - down.place(value) / 100) for step, value in thinned(line.points)]
        points = " ".join(f"{x * INNER:.1f},{y * INNER:.1f}" for x, y in places)
        strokes.append(f'<polyline class="s{kind}" points="{points}"/>')
        if line.dots or len(places) == 1:
            parts += [_dot(kind, GUTTER + (100 - GUTTER) * x, plot * y) for x, y in places]
    stretched = f'viewBox="0 0 {INNER} {INNER}" preserveAspectRatio="none"'
    inside = f'<svg x="{GUTTER}%" y="0" width="{100 - GUTTER}%" height="{plot}" {stretched}>{"".join(strokes)}</svg>'
    axis = f'<line class="axis" x1="{GUTTER}%" x2="100%" y1="{plot}" y2="{plot}"/>'
    foot = f'<text x="{GUTTER}%" y="{LINES_HEIGHT - 4}">step {first:,.0f}</text>'
    if last > first:
        foot += f'<text x="100%" y="{LINES_HEIGHT - 4}" text-anchor="end">{last:,.0f}</text>'
    return svg("".join([*parts, inside, axis, foot]), LINES_HEIGHT, label)


def _level(value: float, y: float) -> str:
    """A value of the upright axis: a line, and its number at the left."""
    line = f'<line class="grid" x1="{GUTTER}%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{GUTTER - 1}%" y="{max(y + 4, 10):.1f}" text-anchor="end">{value:,.6g}</text>'


def _dot(kind: int, x: float, y: float) -> str:
    """A point of a line: each style has a shape of its own."""
    return f'<svg x="{x:.2f}%" y="{y:.1f}" width="1" height="1"><path class="s{kind}" d="{SHAPES[kind]}"/></svg>'


def line_key(line: Line) -> Markup:
    """How a line is drawn, for a legend."""
    kind = line.style % len(SHAPES)
    drawn = f'<line class="s{kind}" x1="0" x2="100%" y1="7" y2="7"/>' if len(line.points) > 1 else ""
    return svg(drawn + (_dot(kind, 50, 7) if line.dots or not drawn else ""), 14, "")


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of equally long stretches, the last one of which ends with the last point."""
    if len(points) <= most:
        return list(points)
    borders = [len(points) * n // most for n in range(most + 1)]
    return [_middle(points[start:stop]) for start, stop in pairwise(borders)]


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def nice(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` and one at most: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _anchor(place: float) -> str:
    return "start" if place < 5 else "end" if place > 95 else "middle"
