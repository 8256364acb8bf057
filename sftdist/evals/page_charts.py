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
INNER = 1000  # units of the stretched part of a line chart, along both sides
MOST_POINTS = 300  # of one line
STYLES = 6  # ways to draw a line, as classes of the page


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


def _interval(kind: str, one: Estimate, axis: Axis, y: int) -> list[str]:
    low, high, value = axis.place(one.low), axis.place(one.high), axis.place(one.value)
    whiskers = [_upright(kind, place, y - 4, y + 4) for place in (low, high)]
    line = f'<line class="{kind}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'
    return [line, *whiskers, f'<circle class="{kind}" cx="{value:.2f}%" cy="{y}" r="4.5"/>']


def _upright(kind: str, place: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{place:.2f}%" x2="{place:.2f}%" y1="{top}" y2="{bottom}"/>'


@dataclass(frozen=True)
class Line:
    """A curve over optimizer steps: `style` is one of STYLES, `dots` shows its points instead of a line."""

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
    across = Axis(first, max(last, first + 1), ())
    down = Axis(low if from_zero else low - room, high + room, tuple(nice(low, high, 4)))
    plot = LINES_HEIGHT - FOOT
    parts = [_level(tick, plot * (1 - down.place(tick) / 100)) for tick in down.ticks]
    strokes = []
    for line in lines:
        places = [(across.place(step), 100 - down.place(value)) for step, value in thinned(line.points)]
        if line.dots or len(places) == 1:
            parts += [
                f'<circle class="s{line.style % STYLES}" cx="{x:.2f}%" cy="{plot * y / 100:.1f}" r="3.5"/>'
                for x, y in places
            ]
        else:
            points = " ".join(f"{x * INNER / 100:.1f},{y * INNER / 100:.1f}" for x, y in places)
            strokes.append(f'<polyline class="s{line.style % STYLES}" points="{points}"/>')
    stretched = f'viewBox="0 0 {INNER} {INNER}" preserveAspectRatio="none"'
    parts.append(f'<svg x="0" y="0" width="100%" height="{plot}" {stretched}>{"".join(strokes)}</svg>')
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{plot}" y2="{plot}"/>')
    parts.append(f'<text x="0" y="{LINES_HEIGHT - 4}">step {first:,.0f}</text>')
    if last > first:
        parts.append(f'<text x="100%" y="{LINES_HEIGHT - 4}" text-anchor="end">{last:,.0f}</text>')
    return svg("".join(parts), LINES_HEIGHT, label)


def _level(value: float, y: float) -> str:
    """A value of the upright axis: a line, and its number above it at the left."""
    line = f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="0" y="{max(y - 3, 10):.1f}">{value:,.6g}</text>'


def line_key(style: int) -> Markup:
    """How a line of this style looks, for a legend."""
    return svg(f'<line class="s{style % STYLES}" x1="0" x2="100%" y1="7" y2="7"/>', 14, "")


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of equally long stretches, the last one of which ends with the last point."""
    if len(points) <= most:
        return list(points)
    borders = [len(points) * n // most for n in range(most + 1)]
    return [_middle(points[start:stop]) for start, stop in pairwise(borders)]


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def nice(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most so many: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most - 1)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _anchor(place: float) -> str:
    return "start" if place < 5 else "end" if place > 95 else "middle"
