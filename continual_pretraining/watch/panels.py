"""Plots of runs over steps, as SVG."""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from smolconv.continual_pretraining.estimate.hardware import ASSUMED_MFU
from smolconv.continual_pretraining.recipe.schedules import Schedule, learning_rate, turning_steps
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.watch.history import Curve, Point, RunHistory
from smolconv.drawing import multiples, round_step

#: Limits of a plot: stages, and columns that show their values on hover.
MOST_MARKS, _MOST_COLUMNS = 200, 200
#: For each kind of event: its name, its mark at the step, and its mark in the legend.
_MARKS = (
    ("resumed", "resumed", "M{x} {top}v{tall}", "M0 -4h16"),
    ("spike", "spike", "M{x} {top}l-4 -7h8z", "M8 0l-4 -7h8z"),
    ("saved", "saved", "M{x} {bottom}v-8", "M8 2v-10"),
    ("save_failed", "not saved", "M{x} {bottom}l-4 7h8z", "M8 -7l-4 7h8z"),
)
_EXPECTED = "#8a93a6"
_COLOURS = ("#2463d6", "#c77700", "#187a43", "#a02fb0", "#c0262d", "#0d8a96", "#6b5bd2", "#7a6a00")

WIDE, HEIGHT = 1140, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 54, 34  # around a plot, inside its panel


class Panel(NamedTuple):
    title: str
    width: int
    drawn: str

    @property
    def wide(self) -> bool:
        return self.width == WIDE


class _Line(NamedTuple):
    title: str
    colour: str
    points: Sequence[Point]
    css: str = ""
    gaps: Sequence[int] = ()  #: steps where the line is interrupted


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """The scale of an axis: linear, or logarithmic over positive values. ``at`` returns 0 to 1."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool, zero: bool) -> _Scale:
        low, high = min(values), max(values)
        if log and low > 0 and high / low > 10:
            return cls(low=low / 1.05, high=high * 1.05, log=True)
        if zero:
            low, high = min(0.0, low), max(high, 0.0)
        margin = 0.04 * (high - low) or abs(high) * 0.04 or 1.0
        return cls(low=low - margin * (not zero or low < 0), high=high + margin)

    def at(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            times = (1, 2, 5) if len(decades) <= 4 else (1,)
            marks = [each * 10.0**decade for decade in decades for each in times]
            inside = [mark for mark in marks if self.low <= mark <= self.high]
            return inside[:: math.ceil(len(inside) / (2 * count)) or 1]
        return multiples(round_step(self.high - self.low, count), self.low, self.high)


def panels(runs: Sequence[RunHistory]) -> list[Panel]:
    """Loss first, then what else the runs recorded, in reading order."""
    steps, many, half = _steps(runs), len(runs) > 1, (WIDE - 20) // 2
    made = []
    for title, note, name, width, log, zero in (
        ("Loss", "nats per token", "loss", WIDE, True, False),
        ("Learning rate", "", "lr", half, False, True),
        ("Gradient norm", "before clipping", "grad_norm", half, True, True),
        ("Throughput", "tokens/s", "tokens_per_second", half, False, True),
        ("MFU", "share of the peak", "mfu", half, False, True),
    ):
        lines = [line for run, colour in _coloured(runs) for line in _lines(run, name, colour, steps, many=many)]
        if lines or name == "loss":
            made.append(_panel(title, note, width, steps, lines, runs, log=log, zero=zero))
    if held_out := _dotted(runs, lambda run: run.evaluations):
        made.append(_panel("Evaluation", "nats per token, held out", half, steps, held_out, runs, log=True))
    if shares := _dotted(runs, _shares_of_tasks):
        made.append(_panel("Tasks", "accuracy", half, steps, shares, runs))
    if not many and (mixture := _mixture(runs[0], steps)):
        made.append(_panel("Mixture", "share of a step's tokens", half, steps, mixture, runs, zero=True))
    return made


def _dotted(runs: Sequence[RunHistory], curves: Callable[[RunHistory], Mapping[str, Curve]]) -> list[_Line]:
    """A line with dots for each curve: of several runs in the run's colour, else each in its own."""
    many = len(runs) > 1
    return [
        _Line(f"{run.name}, {name}" if many else name, colour if many else other, curve.points(), "dots")
        for run, colour in _coloured(runs)
        for (name, curve), other in zip(curves(run).items(), itertools.cycle(_COLOURS))
    ]


def _shares_of_tasks(run: RunHistory) -> dict[str, Curve]:
    """Accuracies and other metrics from 0 to 1. Perplexities would need another axis; events.jsonl has them."""
    return {name: curve for name, curve in run.tasks.items() if all(0 <= point.value <= 1 for point in curve.points())}


def _steps(runs: Sequence[RunHistory]) -> tuple[int, int]:
    """The range of steps, beginning one before the first: a run's first evaluation is there."""
    ends = [
        point.step
        for run in runs
        for curve in (*run.curves.values(), *run.evaluations.values(), *run.tasks.values())
        for point in curve.points()
    ]
    first = min([*ends, *(max(0, run.first.step - 1) for run in runs)])
    return first, max([first + 1, *ends, *(run.last.step for run in runs)])


def _coloured(runs: Sequence[RunHistory]) -> Iterator[tuple[RunHistory, str]]:
    return zip(runs, itertools.cycle(_COLOURS))


def _lines(run: RunHistory, name: str, colour: str, steps: tuple[int, int], *, many: bool) -> list[_Line]:
    raw, smoothed = run.curves[name].points(), run.curves[name].smoothed() if name != "lr" else []
    gaps = run.curves[name].gaps()
    if name == "lr":
        said, expected = "recipe", [] if run.recipe is None else _rates(run.recipe.schedule, steps)
    else:
        said, expected = (
            f"estimate, MFU of {ASSUMED_MFU:.0%}",
            run.expected[name].means() if name in run.expected else [],
        )
    lines = [
        _Line(said, _EXPECTED, [] if many else expected, "expected"),
        _Line(run.name if many and not smoothed else "", colour, raw, "raw" if smoothed else "", gaps),
        _Line(run.name if many else "smoothed", colour, smoothed, "", gaps),
    ]
    return [line for line in lines if line.points] if raw else []


def _rates(schedule: Schedule, steps: tuple[int, int]) -> list[Point]:
    first, last = max(1, steps[0]), min(steps[1], schedule.train_steps)
    even = range(first, last + 1, max(1, (last - first) // 200))
    turns = [step for step in sorted(turning_steps(schedule))[:MOST_MARKS] if first <= step <= last]
    return [Point(step, learning_rate(schedule, step - 1)) for step in sorted({*even, *turns})]


def _mixture(run: RunHistory, steps: tuple[int, int]) -> list[_Line]:
    """Each source's share of the tokens, over its weight in the recipe."""
    lines = []
    for (name, curve), colour in zip(run.mixture.items(), itertools.cycle(_COLOURS)):
        planned = _weights(run.recipe, name, steps) if run.recipe is not None else []
        smoothed = curve.smoothed()
        lines += [
            _Line("", colour, planned, "expected"),
            _Line("" if smoothed else name, colour, curve.points(), "raw" if smoothed else ""),
            _Line(name, colour, smoothed),
        ]
    lines = [line for line in lines if line.points]
    key = [_Line("recipe", _EXPECTED, [], "expected")]
    return lines + key if any(line.css == "expected" for line in lines) else lines


def _weights(recipe: Recipe, name: str, steps: tuple[int, int]) -> list[Point]:
    stages, points = recipe.data.stages[:MOST_MARKS], []
    for stage, end in zip(stages, [*(each.start_step - 1 for each in stages[1:]), recipe.schedule.train_steps]):
        first, last = max(stage.start_step, steps[0]), min(end, steps[1])
        share = dict(zip(stage.names, stage.weights)).get(name, 0.0)
        points += [Point(first, share), Point(last, share)] if first <= last else []
    return points


def _panel(
    title: str, note: str, width: int, steps: tuple[int, int], lines: Sequence[_Line], runs: Sequence[RunHistory],
    *, log: bool = False, zero: bool = False,
) -> Panel:  # fmt: skip
    """A plot over steps with title and axes and, for a single run, marks of its events."""
    inner, tall = width - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    across = _Scale(low=steps[0], high=steps[1])
    values = [point.value for line in lines for point in line.points] or [0.0]
    upright = _Scale.over(values, log=log, zero=zero)

    def x(step: float) -> float:
        return _LEFT + inner * across.at(step)

    def y(value: float) -> float:
        return _TOP + tall * (1 - upright.at(value))

    beside = ", ".join(filter(None, (note, "log scale" * upright.log)))
    said = [f'<text class="title" y="16">{title}<tspan class="note" dx="8">{beside}</tspan></text>']
    for mark in upright.ticks(5):
        said.append(f'<path class="grid" d="M{_LEFT} {y(mark):.1f}h{inner}"/>')
        said.append(f'<text x="{_LEFT - 7}" y="{y(mark) + 4:.1f}" text-anchor="end">{_short(mark)}</text>')
    for mark in across.ticks(max(3, inner // 110)):
        if mark == round(mark):
            anchor = "end" if x(mark) > width - 30 else "middle"
            said.append(
                f'<text x="{x(mark):.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{mark:,.0f}</text>'
            )
    said.append(f'<text x="{_LEFT + inner / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    if len(runs) == 1:
        said.append(_marks(runs[0], steps, x, tall, named=width == WIDE))
    said += [_drawn(line, x, y) for line in lines if line.points]
    said += [_columns(next((line.points for line in lines if line.css != "expected"), []), x, tall), _key(lines)]
    return Panel(title, width, "".join(said))


def _drawn(line: _Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    # A line of length 0 is drawn as a dot, by its round ends; so is a point between two gaps.
    path, dots, passed = [], [], -1
    for point in line.points:
        at = f"{x(point.step):.1f} {y(point.value):.1f}"
        now = bisect(line.gaps, point.step)
        path.append(f"L{at}" if now == passed else f"M{at}h0")
        dots.append(f"M{at}h0")
        passed = now
    lines = [("thin", path), ("dots", dots)] if line.css == "dots" else [(line.css, path)]
    return "".join(f'<path class="line {css}" stroke="{line.colour}" d="{"".join(at)}"/>' for css, at in lines)


def _marks(
    run: RunHistory, steps: tuple[int, int], x: Callable[[float], float], tall: int, *, named: bool
) -> str:  # fmt: skip
    said, right = [], 0.0
    for i, (step, stage) in enumerate(run.stages[:MOST_MARKS]):
        if i:
            said.append(f'<path class="stage" d="M{x(step):.1f} {_TOP}v{tall}"><title>{escape(stage)}</title></path>')
        if named and len(run.stages) > 1 and x(step) >= right:
            said.append(f'<text class="stage" x="{x(step) + 4:.1f}" y="{_TOP + 12}">{escape(stage)}</text>')
            right = x(step) + 8 + 7 * len(stage)
    keys = [mark for mark in _MARKS if run.events[mark[0]]]
    for i, (kind, name, shape, key) in enumerate(keys):
        for event in run.events[kind]:
            if steps[0] <= event.step <= steps[1]:
                title = f"<title>step {event.step:,}: {escape(event.text)}</title>"
                place = shape.format(x=f"{x(event.step):.1f}", top=_TOP, tall=tall, bottom=_TOP + tall)
                said.append(f'<path class="{kind}" d="{place}">{title}</path>')
        if named:
            said.append(
                f'<g transform="translate({WIDE - 100 * (len(keys) - i)} 16)"><path class="{kind}" d="{key}"/>'
                f'<text x="22">{name}</text></g>'
            )
    return "".join(said)


def _key(lines: Sequence[_Line]) -> str:
    said, at = [], 0.0
    for line in lines:
        if line.title:
            css, shape = line.css.replace("raw", ""), "M8 0h0" if line.css == "dots" else "M0 0h16"
            said.append(
                f'<g transform="translate({at:.0f} 36)"><path class="line {css}" stroke="{line.colour}" d="{shape}"/>'
                f'<text x="22" y="4">{escape(line.title)}</text></g>'
            )
            at += 40 + 6.8 * len(line.title)
    return "".join(said)


def _columns(points: Sequence[Point], x: Callable[[float], float], tall: int) -> str:
    """Invisible columns that show the values of their points on hover."""
    size = math.ceil(len(points) / _MOST_COLUMNS) or 1
    said = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        left, right = x(part[0].step), x(points[min(i + size, len(points) - 1)].step)
        low, high = min(point.value for point in part), max(point.value for point in part)
        where = f"step {part[0].step:,}" + (f" to {part[-1].step:,}" if part[-1].step > part[0].step else "")
        value = f"{low:.5g}" if low == high else f"{low:.5g} to {high:.5g}"
        box = f'x="{left:.1f}" y="{_TOP}" width="{max(right - left, 1):.1f}" height="{tall}"'
        said.append(f'<rect class="hit" {box}><title>{where}: {value}</title></rect>')
    return "".join(said)


def _short(value: float) -> str:
    """1.2M, 35k, 0.0003, 3e-05."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{float(f'{value:.6g}'):g}"


#: Without CSS variables, which cairosvg does not support; the dark colours are a second layer.
DRAWING = """
text{fill:#5c667a;font-size:12px}.title{fill:#1b2230;font-size:15px;font-weight:600}.note{fill:#5c667a;font-size:12px;font-weight:400}.head{fill:#1b2230;font-size:22px;
font-weight:600}.page{fill:#fff}.grid{stroke:#dfe3ea;fill:none}.line{fill:none;stroke-width:1.8;stroke-linejoin:round;
stroke-linecap:round}.raw{opacity:.3;stroke-width:1}.thin{stroke-width:1;opacity:.6}.dots{stroke-width:6}
.stage{stroke:#8a93a6;stroke-dasharray:5 4;fill:none}text.stage{stroke:none;fill:#5c667a;font-weight:600}
.expected{stroke-width:1.4;stroke-dasharray:6 4;opacity:.8}
.resumed{stroke:#187a43;stroke-width:1.4;stroke-dasharray:2 3;fill:none}
.spike,.save_failed{fill:#c0262d}.saved{stroke:#2463d6;stroke-width:1.6}.hit{fill:#888;opacity:0}
.hit:hover{opacity:.3}
"""
DARK = """
@media(prefers-color-scheme:dark){text,text.stage,.note{fill:#9aa4b6}.title,.head{fill:#e7eaf0}.page{fill:#1b2029}
.grid{stroke:#323a48}.line{filter:brightness(1.45)}.spike,.save_failed{fill:#ff7d7d}.saved{stroke:#7da7ff}.resumed{stroke:#56c98a}}
"""
