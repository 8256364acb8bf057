"""A small line chart as SVG, without a plotting library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 800, 450
LEFT, RIGHT, TOP, BOTTOM = 60, 130, 40, 50
COLOURS = ("#1f6fb4", "#d9622b", "#2c9048", "#7a4fb5", "#8a6d3b", "#444444")


@dataclass(frozen=True)
class Line:
    """Points (x, y) under a name; lines with the same name share a colour."""

    name: str
    points: list[tuple[float, float]]
    dots: bool = False


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]


def draw(lines: list[Line], *, title: str, x: str, y: str) -> str:
    """The chart as the text of an SVG file; the y axis starts at 0."""
    shown = [line for line in lines if line.points]
    if not shown:
        raise ValueError("a chart needs at least one point")
    high_x = max(point[0] for line in shown for point in line.points)
    high_y = max(point[1] for line in shown for point in line.points)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + point[0] / (high_x or 1) * width, TOP + height - point[1] / (high_y or 1) * height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT + width / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="16" y="{TOP + height / 2}" text-anchor="middle" transform="rotate(-90 16 {TOP + height / 2})">'
        f"{escape(y)}</text>",
    ]
    for tick in ticks(0, high_y):
        at = place((0, tick))[1]
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, high_x):
        at = place((tick, 0))[0]
        parts.append(f'<text x="{at:.1f}" y="{TOP + height + 18}" text-anchor="middle">{tick:g}</text>')
    names = list(dict.fromkeys(line.name for line in shown))
    for line in shown:
        parts.append(_series([place(point) for point in line.points], COLOURS[names.index(line.name) % 6], line.dots))
    for index, name in enumerate(names):
        at = TOP + 14 + 20 * index
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{at - 9}" width="12" height="4" fill="{COLOURS[index % 6]}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 30}" y="{at - 3}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _series(points: list[tuple[float, float]], colour: str, dots: bool) -> str:
    if dots:
        return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
