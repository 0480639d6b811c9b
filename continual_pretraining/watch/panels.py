"""Plots of runs over their steps, as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from smolconv.continual_pretraining.watch.history import Point, RunHistory
from smolconv.drawing import multiples, round_step

#: Marks of one kind in a picture, and columns that say their values when pointed at.
MOST_MARKS, _MOST_COLUMNS = 200, 200
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


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Of one direction: linear, or logarithmic over positive values. ``at`` gives 0 to 1."""

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
    """Loss first, then what else the runs tell, in reading order."""
    first = min(run.first.step for run in runs)
    steps = (first, max(first + 1, *(run.last.step for run in runs)))
    many = len(runs) > 1
    made = [_panel("Loss", "nats per token", WIDE, steps, _loss_lines(runs), runs, log=True)]
    for title, note, name, log, zero in (
        ("Learning rate", "", "lr", False, True),
        ("Gradient norm", "before clipping", "grad_norm", True, True),
        ("Throughput", "tokens/s", "tokens_per_second", False, True),
        ("MFU", "share of the peak", "mfu", False, True),
    ):
        drawn = [(run, colour) for run, colour in zip(runs, itertools.cycle(_COLOURS)) if run.curves[name]]
        lines = []
        for run, colour in drawn:
            smoothed = run.curves[name].smoothed() if name != "lr" else []
            lines += [_Line(run.name if many else title, colour, run.curves[name].points(), "raw" if smoothed else "")]
            lines += [_Line("", colour, smoothed)] if smoothed else []
        if lines:
            made.append(_panel(title, note, (WIDE - 20) // 2, steps, lines, runs, log=log, zero=zero, legend=many))
    return made


def _loss_lines(runs: Sequence[RunHistory]) -> list[_Line]:
    many, lines = len(runs) > 1, []
    for run, colour in zip(runs, itertools.cycle(_COLOURS)):
        smoothed, raw = run.curves["loss"].smoothed(), run.curves["loss"].points()
        named = run.name if many else "loss"
        lines.append(_Line("" if smoothed else named, colour, raw, "raw" if smoothed else ""))
        lines.append(_Line(named if many else "smoothed", colour, smoothed))
        for i, (source, curve) in enumerate(run.evaluations.items()):
            said = f"{f'{run.name}, ' * many}evaluation: {source}"
            lines.append(_Line(said, colour if many else _COLOURS[1 + i % (len(_COLOURS) - 1)], curve.points(), "dots"))
    return [line for line in lines if line.points]


def _panel(
    title: str, note: str, width: int, steps: tuple[int, int], lines: Sequence[_Line], runs: Sequence[RunHistory],
    *, log: bool = False, zero: bool = False, legend: bool = True,
) -> Panel:  # fmt: skip
    """A plot over steps with its title, axes and, for one run, its marks."""
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
        said.append(_marks(runs[0], x, tall, named=width == WIDE))
    for line in lines:
        said.append(_drawn(line, x, y))
    said.append(_columns(lines, x, tall))
    if legend:
        said.append(_key(lines))
    return Panel(title, width, "".join(said))


def _drawn(line: _Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    at = [f"{x(point.step):.1f} {y(point.value):.1f}" for point in line.points]
    # A line of no length shows as a dot, by its round ends: also a curve of one step.
    dots = "".join(f"M{each}h0" for each in at) if line.css == "dots" or len(at) == 1 else ""
    path = "" if len(at) == 1 else "M" + "L".join(at)
    thin = f'<path class="line thin" stroke="{line.colour}" d="{path}"/>' if line.css == "dots" and path else ""
    shape = dots or path
    return f'{thin}<path class="line {"dots" if dots else line.css}" stroke="{line.colour}" d="{shape}"/>'


def _marks(run: RunHistory, x: Callable[[float], float], tall: int, *, named: bool) -> str:
    said, right = [], 0.0
    for i, (step, stage) in enumerate(run.stages[:MOST_MARKS]):
        if i:
            said.append(f'<path class="stage" d="M{x(step):.1f} {_TOP}v{tall}"><title>{escape(stage)}</title></path>')
        if named and len(run.stages) > 1 and x(step) >= right:
            said.append(f'<text class="stage" x="{x(step) + 4:.1f}" y="{_TOP + 12}">{escape(stage)}</text>')
            right = x(step) + 8 + 7 * len(stage)
    for step, text in run.marks["resume"][:MOST_MARKS]:
        title = f"<title>step {step:,}: {escape(text)}</title>"
        said.append(f'<path class="resume" d="M{x(step):.1f} {_TOP}v{tall}">{title}</path>')
    for step, text in run.marks["spike"][:MOST_MARKS]:
        title = f"<title>step {step:,}: {escape(text)}</title>"
        said.append(f'<path class="spike" d="M{x(step):.1f} {_TOP}l-4 -7h8z">{title}</path>')
    if named:
        shown = (("resume", "resumed", "M0 -4h16"), ("spike", "spike", "M8 0l-4 -7h8z"))
        keys = [(css, name, shape) for css, name, shape in shown if run.marks[css]]
        for i, (css, name, shape) in enumerate(keys):
            place = f"translate({WIDE - 90 * (len(keys) - i)} 16)"
            said.append(f'<g transform="{place}"><path class="{css}" d="{shape}"/><text x="22">{name}</text></g>')
    return "".join(said)


def _key(lines: Sequence[_Line]) -> str:
    said, at = [], 0.0
    for line in lines:
        if line.title:
            css, shape = ("dots", "M8 0h0") if line.css == "dots" else ("", "M0 0h16")
            said.append(
                f'<g transform="translate({at:.0f} 36)"><path class="line {css}" stroke="{line.colour}" d="{shape}"/>'
                f'<text x="22" y="4">{escape(line.title)}</text></g>'
            )
            at += 40 + 6.8 * len(line.title)
    return "".join(said)


def _columns(lines: Sequence[_Line], x: Callable[[float], float], tall: int) -> str:
    """Invisible columns of the first line that say its values when pointed at."""
    points = lines[0].points if lines else []
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


#: Without variables, which cairosvg does not know; the dark colours come as a second layer.
DRAWING = """
text{fill:#5c667a;font-size:12px}.title{fill:#1b2230;font-size:15px;font-weight:600}.note{fill:#5c667a;font-size:12px;font-weight:400}.head{fill:#1b2230;font-size:22px;
font-weight:600}.page{fill:#fff}.grid{stroke:#dfe3ea;fill:none}.line{fill:none;stroke-width:1.8;stroke-linejoin:round;
stroke-linecap:round}.raw{opacity:.3;stroke-width:1}.thin{stroke-width:1;opacity:.6}.dots{stroke-width:6}
.stage{stroke:#8a93a6;stroke-dasharray:5 4;fill:none}text.stage{stroke:none;fill:#5c667a;font-weight:600}
.resume{stroke:#187a43;stroke-width:1.4;stroke-dasharray:2 3;fill:none}.spike{fill:#c0262d}.hit{fill:#888;opacity:0}
.hit:hover{opacity:.3}
"""
DARK = """
@media(prefers-color-scheme:dark){text,text.stage,.note{fill:#9aa4b6}.title,.head{fill:#e7eaf0}.page{fill:#1b2029}
.grid{stroke:#323a48}.line{filter:brightness(1.45)}.spike{fill:#ff7d7d}.resume{stroke:#56c98a}}
"""
