"""What `plan` found, as lines for a terminal, as JSON, as a page and as the drawing of how the job scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup, escape

from sftdist.core.table import columns
from sftdist.data.pages import page_template
from sftdist.data.plan import PlanTotals
from sftdist.model import cost, timing
from sftdist.model.hardware import Gpu
from sftdist.training.choices import SUPERVISED, Choice, proposed

HEADINGS = ("zero.stage", "offload", "recomputed")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 640, 320, 76, 24, 34, 46  # of the drawing, pixels
STYLES = (("strong", "the same step, dealt to more GPUs", ""), ("weak", "the step grows with the GPUs", "7 4"))


@dataclass(frozen=True)
class Scale:
    """The job on `gpus` GPUs: the step as configured with the fastest choice that fits there (None: none does), and the
    same choice with a step that has grown along."""

    gpus: int
    step: timing.Step
    best: Choice | None
    grown: timing.Step
    grown_best: Choice | None

    @property
    def rates(self) -> tuple[float, float] | None:
        """Tokens per second of both; None where nothing fits."""
        if self.best is None or self.grown_best is None:
            return None
        return tokens_per_second(self.best.terms, self.step), tokens_per_second(self.grown_best.terms, self.grown)


@dataclass(frozen=True)
class PlanResult:
    """`choices` for the first of `scaling`, `configured` and `best` among them. `proposals`: LoRA or QLoRA where
    nothing fits. `totals`: of the real plan, None where there is none, with the reason."""

    exp: str
    gpu: Gpu
    pack_tokens: int
    parameters: int
    outside_text: int
    trainable: int
    method: str
    precision: str
    choices: tuple[Choice, ...]
    configured: Choice
    best: Choice | None
    scaling: tuple[Scale, ...]
    proposals: tuple[Choice, ...]
    totals: PlanTotals | None
    why_no_totals: str | None

    @property
    def step(self) -> timing.Step:
        return self.scaling[0].step

    @property
    def gpus(self) -> int:
        return self.scaling[0].gpus

    def hours(self, terms: timing.Terms, step: timing.Step) -> float:
        """Of the whole job, or of a million tokens where the job's size is not known."""
        if self.totals is not None:
            return terms.total * self.totals.packs / step.packs / 3600
        return terms.total * 1e6 / (step.packs * step.tokens) / 3600


def tokens_per_second(terms: timing.Terms, step: timing.Step) -> float:
    return step.packs * step.tokens / terms.total


def lines(result: PlanResult) -> Iterator[str]:
    """The plan in words and tables, for a terminal or a log file."""
    trained = "all of them trained" if result.method == "full" else f"{result.trainable:,} trained ({result.method})"
    step, memory = result.step, result.gpu.memory_gib
    frozen = f"; {result.outside_text:,} more, which no text passes through, are frozen" if result.outside_text else ""
    yield f"{result.exp}: {result.parameters:,} parameters, {trained}, {result.precision}{frozen}"
    yield (
        f"on {result.gpus} x {result.gpu.name} of {memory:g} GiB; a step is {step.packs} packs with {step.tokens:,.0f} "
        f"tokens on average, {step.micro(result.gpus)} for each GPU"
        + (" that has one" if step.packs < result.gpus else "")
    )
    yield ""
    unit, _ = _unit(result)
    yield f"Memory per GPU in {unit} and predicted seconds of a step (> as configured, * the fastest that fits):"
    yield from (f"  {line}" for line in columns(_right(_table(result))))
    yield ""
    yield from _verdict(result)
    yield ""
    yield from _job(result)
    if len(result.scaling) > 1:
        yield ""
        yield "Scaling, each with the fastest setting that fits there:"
        yield from (f"  {line}" for line in columns(_right(_scaling_table(result))))
    yield from _idle(result)
    yield ""
    yield (
        "Step times are arithmetic from data sheets, good to about a third; memory is checked before step 1 of every "
        "run. Evaluation, checkpoints and the start are not in the time."
    )


def _table(result: PlanResult) -> list[list[str]]:
    parts = [part for part in result.configured.parts if any(one.parts[part] for one in result.choices)]
    rows = [["", *HEADINGS, *parts, "margin", "total", "fits", "step", "tokens/s"]]
    size = _unit(result)[1]
    for one in result.choices:
        best = result.best is not None and one.is_like(result.best)
        mark = (">" if one.is_like(result.configured) else "") + ("*" if best else "")
        values = (*(one.parts[part] for part in parts), cost.margin(one.parts), one.needed)
        sizes = [f"{value / size:,.1f}" for value in values]
        rows.append(
            [
                *(mark, str(one.cfg.zero.stage), str(one.cfg.zero.offload), f"{one.recomputed} of {one.layers}"),
                *(*sizes, "yes" if one.fits else "no"),
                *(f"{one.terms.total:.3g}", f"{tokens_per_second(one.terms, result.step):,.0f}"),
            ]
        )
    return rows


def _unit(result: PlanResult) -> tuple[str, float]:
    """GiB, or MiB where every part is less than one: its name and its bytes."""
    largest = max(size for one in result.choices for part, size in one.parts.items() if part != "context")
    return ("GiB", cost.GIB) if largest >= cost.GIB else ("MiB", cost.GIB / 1024)


def _verdict(result: PlanResult) -> Iterator[str]:
    configured, best = result.configured, result.best
    fits = "fits" if configured.fits else "does not fit"
    yield f"As configured: {fits}. {_figures(configured, result)}"
    yield f"  {_terms(configured.terms)}"
    if best is not None and not best.is_like(configured):
        yield f"The fastest that fits: {' '.join(best.words())}"
        yield f"  {_figures(best, result)}"
        yield f"  {_terms(best.terms)}"
        yield "  (auto=true lets `sftdist train` choose like this on the machine it runs on)"
    elif best is not None:
        yield "It is the fastest setting that fits."
    else:
        least = min(result.choices, key=lambda one: one.needed)
        yield (
            f"tune.method={result.method} fits with no setting: the least is {least.needed / cost.GIB:.1f} GiB. "
            + ("What would fit instead:" if result.proposals else "More or larger GPUs are needed.")
        )
        yield from (f"  {proposed(one)}" for one in result.proposals)


def _figures(one: Choice, result: PlanResult) -> str:
    rate = tokens_per_second(one.terms, result.step)
    host = f", {one.host / cost.GIB:.1f} GiB of its host's memory for each GPU" if one.host else ""
    return (
        f"{one.needed / cost.GIB:.1f} of {result.gpu.memory_gib:g} GiB{host}, {one.terms.total:.3g} s a step, "
        f"{rate:,.0f} tokens/s ({rate / result.gpus:,.0f} per GPU)"
    )


def _terms(terms: timing.Terms) -> str:
    named = {
        "matrix products": terms.matmul,
        "attention": terms.attention,
        "norms, activations and launches": terms.elementwise,
        "recomputation": terms.recompute,
        "waiting for the costliest rank": terms.waiting,
        "communication not covered by compute": terms.exposed,
        "optimizer": terms.optimizer,
        "optimizer on the host": terms.offload,
    }
    shown = [f"{name} {seconds:.2g} s" for name, seconds in named.items() if seconds >= 0.005 * terms.total]
    covered = f"; {terms.hidden:.2g} s of communication covered" if terms.hidden >= 0.005 * terms.total else ""
    return ", ".join(shown) + covered


def _job(result: PlanResult) -> Iterator[str]:
    one = _taken(result)
    if one is None:
        return
    hours = result.hours(one.terms, result.step)
    if one.cfg.tune.method.value != result.method:
        yield f"With tune.method={one.cfg.tune.method}:"
    if result.totals is not None:
        totals = result.totals
        yield (
            f"The whole job: {totals.steps:,} steps, {totals.tokens:,} tokens of {totals.conversations:,} "
            f"conversations: {_duration(hours)}, {hours * result.gpus:,.3g} GPU-hours"
            + ("" if one is result.configured or one.is_like(result.configured) else " with the fastest setting")
        )
        return
    why, *more = str(result.why_no_totals).splitlines()
    yield f"The whole job: not known, no plan of the steps yet: {why}{f' (and {len(more)} more)' if more else ''}"
    yield (
        f"A million tokens: {_duration(hours)}, {hours * result.gpus:,.3g} GPU-hours, for packs full of conversations "
        f"of data.max_len tokens, {SUPERVISED:.0%} of them supervised"
    )


def _taken(result: PlanResult) -> Choice | None:
    """What the job's time is said for: the fastest that fits, else what would fit instead."""
    return result.best or next(iter(result.proposals), None)


def _scaling_table(result: PlanResult) -> list[list[str]]:
    unit = "job hours" if result.totals is not None else "hours/M tokens"
    rows = [["GPUs", "setting", "packs/GPU", "step", "tokens/s", "efficiency", unit, "GPU-hours", "grown step", "eff."]]
    for one in result.scaling:
        if one.best is None or one.grown_best is None:
            rows.append([str(one.gpus), "none fits", *("-" for _ in rows[0][2:])])
            continue
        hours = result.hours(one.best.terms, one.step)
        zero = one.best.cfg.zero
        setting = f"ZeRO {zero.stage}{'' if zero.offload == 'none' else ' offload'}, {one.best.recomputed} recomputed"
        strong, weak = efficiency(result, one)
        rows.append(
            [
                *(str(one.gpus), setting, str(one.step.micro(one.gpus)), f"{one.best.terms.total:.3g}"),
                *(f"{tokens_per_second(one.best.terms, one.step):,.0f}", f"{strong:.0%}", f"{hours:.3g}"),
                *(f"{hours * one.gpus:.3g}", f"{one.grown.packs} packs", f"{weak:.0%}"),
            ]
        )
    return rows


def efficiency(result: PlanResult, one: Scale) -> tuple[float, float]:
    """Tokens/s per GPU against those of the first number of GPUs that fits: as configured, and with a grown step."""
    gpus, first = next((scale.gpus, scale.rates[0]) for scale in result.scaling if scale.rates is not None)
    strong, weak = one.rates or (0.0, 0.0)
    return strong / one.gpus / (first / gpus), weak / one.gpus / (first / gpus)


def _idle(result: PlanResult) -> Iterator[str]:
    """Where there are more GPUs than packs, most of them wait."""
    for one in result.scaling:
        if one.step.packs < one.gpus:
            yield (
                f"  with {one.gpus} GPUs and {one.step.packs} packs a step {one.gpus - one.step.packs} GPUs have "
                f"nothing to do: train.packs_per_step={one.gpus} or more"
            )


def as_json(result: PlanResult) -> dict[str, Any]:
    """For scripts: bytes and seconds, every choice with its parts and terms."""
    return {
        "parameters": result.parameters,
        "outside_text": result.outside_text,
        "trainable": result.trainable,
        "method": result.method,
        "gpu": asdict(result.gpu),
        "gpus": result.gpus,
        "step": asdict(result.step),
        "choices": [_choice(one, result.step) for one in result.choices],
        "configured": _choice(result.configured, result.step),
        "fastest": None if result.best is None else _choice(result.best, result.step),
        "proposals": [_choice(one, result.step) for one in result.proposals],
        "scaling": [
            {
                "gpus": one.gpus,
                "fastest": None if one.best is None else _choice(one.best, one.step),
                "grown_packs": one.grown.packs,
                "grown": None if one.grown_best is None else _choice(one.grown_best, one.grown),
            }
            for one in result.scaling
        ],
        "job": _job_figures(result),
    }


def _job_figures(result: PlanResult) -> dict[str, Any] | None:
    one = _taken(result)
    if one is None:
        return None
    hours = result.hours(one.terms, result.step)
    figures: dict[str, Any] = {"hours": hours, "gpu_hours": hours * result.gpus, "of": "a million tokens"}
    if result.totals is None:
        return {**figures, "reason": result.why_no_totals}
    return {**figures, "of": "the whole job", "steps": result.totals.steps, "tokens": result.totals.tokens}


def _choice(one: Choice, step: timing.Step) -> dict[str, Any]:
    return {
        "method": one.cfg.tune.method.value,
        "stage": one.cfg.zero.stage,
        "offload": one.cfg.zero.offload.value,
        "recomputed_layers": one.recomputed,
        "loss_chunk": one.cfg.model.loss_chunk,
        "overrides": one.words(),
        "memory": dict(one.parts),
        "needed": one.needed,
        "host": one.host,
        "fits": one.fits,
        "seconds": {**asdict(one.terms), "total": one.terms.total},
        "tokens_per_second": tokens_per_second(one.terms, step),
    }


def page(result: PlanResult) -> str:
    """All of it as one page without outside files; the drawing where there are several numbers of GPUs."""
    words = list(lines(result))
    drawing = scaling_drawing(result) if len(result.scaling) > 1 else None
    return page_template("plan.html").render(result=result, lines=words, drawing=drawing)


def scaling_svg(result: PlanResult) -> str:
    """The drawing as a file of its own."""
    style = "<style>text{font:12px system-ui,sans-serif;fill:#595959}</style>"
    return str(scaling_drawing(result)).replace("<title>", f"{style}<title>", 1)


def scaling_drawing(result: PlanResult) -> Markup:
    """Tokens/s over the number of GPUs, both logarithmic: twice the GPUs are as far apart everywhere, and the dotted
    line is where each GPU does as much as in the first point. Lines are told apart by dashes and marks as well."""
    fitting = [(one.gpus, *one.rates) for one in result.scaling if one.rates is not None]
    points = {
        "strong": [(gpus, strong) for gpus, strong, _ in fitting],
        "weak": [(gpus, weak) for gpus, _, weak in fitting],
    }
    title = f"{result.exp}: predicted tokens/s on {result.gpu.name}"
    parts = [f"<title>{escape(title)}</title>", _text(LEFT, 16, title, "start")]
    if not fitting:
        return _svg([*parts, _text(LEFT, HEIGHT / 2, "none of the settings fits", "start")])
    gpus = [gpus for gpus, _ in points["strong"]]
    ideal = [(gpus[0], points["strong"][0][1]), (gpus[-1], points["strong"][0][1] * gpus[-1] / gpus[0])]
    values = [value for line in (*points.values(), ideal) for _, value in line]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 1.01))

    def place(x: float, y: float) -> tuple[float, float]:
        wide = math.log(x / gpus[0]) / math.log(gpus[-1] / gpus[0]) if gpus[-1] != gpus[0] else 0.5
        tall = math.log(y / low) / math.log(high / low)
        return LEFT + wide * (WIDTH - LEFT - RIGHT), HEIGHT - FOOT - tall * (HEIGHT - TOP - FOOT)

    tick = low
    while tick <= high:
        y = place(gpus[0], tick)[1]
        parts += [
            _line([(LEFT, y), (WIDTH - RIGHT, y)], "#d0d0d0", "", 1),
            _text(LEFT - 8, y + 4, f"{tick:,.0f}", "end"),
        ]
        tick *= 10
    parts += [_text(place(count, low)[0], HEIGHT - FOOT + 16, f"{count:,.0f}", "middle") for count in gpus]
    parts.append(_line([place(*point) for point in ideal], "#b0b0b0", "2 4", 1.5))
    for (kind, label, dash), colour, at in zip(STYLES, ("#0072b2", "#d55e00"), (LEFT, LEFT + 250), strict=True):
        placed = [place(*point) for point in points[kind]]
        parts.append(_line(placed, colour, dash, 2.5))
        parts += [_mark(kind, x, y, colour) for x, y in placed]
        parts += [
            _line([(at, HEIGHT - 10), (at + 28, HEIGHT - 10)], colour, dash, 2.5),
            _mark(kind, at + 14, HEIGHT - 10, colour),
        ]
        parts.append(_text(at + 34, HEIGHT - 6, label, "start"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, "GPUs", "end"))
    return _svg(parts)


def _svg(parts: Sequence[str]) -> Markup:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    title, *rest = parts
    return Markup(f"{head}{title}{ground}{''.join(rest)}</svg>")


def _line(points: Sequence[tuple[float, float]], colour: str, dash: str, width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "strong":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.2g} seconds"


def _right(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Numbers below one another by their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
