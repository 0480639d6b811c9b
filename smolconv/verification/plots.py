"""Plots of a verify report as inline SVG: differences by module and by position.

They scale without a script: horizontal coordinates are percents of the width, vertical ones pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from smolconv.drawing import multiples, round_step

#: Most columns of a plot over positions; each shows the largest value of its bin.
_MOST_COLUMNS = 600
HEIGHT = 190.0  # of a plot, in pixels
_ROW = 20.0  # height of a plot's rows for 0 and for non-finite values


def number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


@dataclass(frozen=True, kw_only=True)
class _Series:
    """One line of a plot. None is a gap or, on an axis with a row for it, a non-finite value."""

    title: str
    css: str
    values: Sequence[float | None]
    gaps: bool = False  #: whether None means not measured instead of non-finite


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The vertical axis: linear, or decades with a row for 0 below and one for non-finite values above."""

    low: float  #: log10 of the value if ``log``
    high: float
    log: bool = True
    zero: bool = False
    broken: bool = False

    @classmethod
    def over(cls, values: Iterable[float | None], *, log: bool = True, broken: bool = False) -> _Axis:
        known = list(values)
        finite = [value for value in known if value is not None]
        if not log:
            low, high = min(finite, default=0.0), max(finite, default=1.0)
            return cls(low=min(low, 0.0), high=high if high > min(low, 0.0) else 1.0, log=False)
        positive = [math.log10(value) for value in finite if value > 0] or [-8.0, -7.0]
        low, high = math.floor(min(positive)), math.ceil(max(positive))
        zero = any(value <= 0 for value in finite)
        return cls(low=low, high=max(high, low + 1), zero=zero, broken=broken and None in known)

    def y(self, value: float | None) -> float:
        """Pixels from the top."""
        if value is None:
            return 0.0
        if self.log and value <= 0:
            return HEIGHT
        return self._at(math.log10(value) if self.log else value)

    def _at(self, position: float) -> float:
        top, bottom = _ROW * self.broken, HEIGHT - _ROW * self.zero
        return bottom - (bottom - top) * (position - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Labels with their pixels from the top."""
        span = self.high - self.low
        marks = multiples(float(math.ceil(span / 6)) if self.log else round_step(span, 5), self.low, self.high)
        shown = [(self._at(m), f"10{str(round(m)).translate(_RAISED)}" if self.log else f"{m:g}") for m in marks]
        return shown + [(HEIGHT, "0")] * self.zero + [(0.0, "∞, NaN")] * self.broken


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _plot(
    title: str, note: str, axis: _Axis, series: Sequence[_Series], ticks: Iterable[tuple[float, str]], across: str,
    *, over: str = "", under: str = "", legend: str = "",
) -> str:  # fmt: skip
    """A figure. ``ticks``: percents and labels on the x axis; ``under`` and ``over``: SVG below and above the lines."""
    grid = "".join(
        f'<line class=grid x1=0 x2="100%" y1={y:.1f} y2={y:.1f} />'
        f"<text x=-8 y={y + 4:.1f} text-anchor=end>{label}</text>"
        for y, label in axis.ticks()
    )
    grid += "".join(f'<text x="{x:.2f}%" y={HEIGHT + 18} text-anchor=middle>{label}</text>' for x, label in ticks)
    lines = "".join(f'<path class="{each.css}" d="{_path(each, axis)}"/>' for each in series)
    keys = "".join(f'<span><i class="{each.css}"></i>{each.title}</span>' for each in series) + legend
    return (
        f"<figure><figcaption><b>{title}</b> <small>{note}</small><div class=legend>{keys}</div></figcaption>\n"
        f'<svg role=img aria-label="{title}" width="100%" height={HEIGHT:.0f}>{under}{grid}<svg width="100%" '
        f'height={HEIGHT:.0f} viewBox="0 0 1000 {HEIGHT:.0f}" preserveAspectRatio=none>{lines}</svg>{over}'
        f"</svg><div class=across>{across}</div></figure>"
    )


def _path(series: _Series, axis: _Axis) -> str:
    """Straight lines between the middles of columns. A lone point is a line of length 0 with round ends."""
    said, pen = [], "M"
    for i, value in enumerate(series.values):
        if value is None and (series.gaps or not axis.broken):
            pen = "M"
            continue
        said.append(f"{pen}{1000 * (i + 0.5) / len(series.values):.1f} {axis.y(value):.1f}{'h0' if pen == 'M' else ''}")
        pen = "L"
    return "".join(said)


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_plot(document: Mapping[str, Any]) -> str:
    layers = document["layers"]
    if not layers:
        return ""
    count = len(layers)
    limits = [each["limit"] for each in layers if "limit" in each]
    series = [_Series(title="noise floor (sdpa against eager)", css="floor", values=[each["floor"] for each in layers])]
    if len(limits) == count:
        series.append(_Series(title="limit of divergence", css="limit", values=limits))
    found = [each["max_abs"] for each in layers]
    axis = _Axis.over([value for each in series for value in each.values] + found, broken=True)
    points = "".join(
        f'<circle class={"bad" if each["diverged"] else "good"} cx="{100 * (i + 0.5) / count:.2f}%" '
        f"cy={axis.y(each['max_abs']):.1f} r=3.2><title>{escape(each['module'])}: {number(each['max_abs'])}, "
        f"noise floor {number(each['floor'])}</title></circle>"
        for i, each in enumerate(layers)
    )
    starts: dict[int, list[int]] = {}
    for i, each in enumerate(layers):
        if match := _LAYER.match(each["module"]):
            starts.setdefault(int(match[1]), []).append(i)
    bands = "".join(
        f'<rect class=band x="{100 * spread[0] / count:.2f}%" width="{100 * len(spread) / count:.2f}%" height="100%"/>'
        for layer, spread in starts.items() if layer % 2 == 0
    )  # fmt: skip
    every = max(1, math.ceil(len(starts) / 10))
    ticks = [(100 * (s[0] + len(s) / 2) / count, str(layer)) for layer, s in starts.items() if layer % every == 0]
    dots = "<span><i class=dot></i>B against A</span>"
    if any(each["diverged"] for each in layers):
        dots += "<span><i class='dot bad'></i>beyond the limit</span>"
    under, over = _marker(document["first_divergence"], [each["module"] for each in layers])
    figure = _plot(
        "Difference by module", "largest |A &minus; B| of what each module computes, in forward order, log scale",
        axis, series, ticks, "layer; embedding before, final norm after", under=bands + under, over=points + over,
        legend=dots,
    )  # fmt: skip
    return f"<section><h2>By layer</h2>{figure}</section>"


def _marker(module: str | None, modules: Sequence[str]) -> tuple[str, str]:
    """Mark the first divergence: a band over the module and its parts, and its name above the plot."""
    parts = [i for i, name in enumerate(modules) if f"{name}.".startswith(f"{module}.")]
    if module is None or (not parts and module != "lm_head"):
        return "", ""
    left, right = (100 * parts[0] / len(modules), 100 * (parts[-1] + 1) / len(modules)) if parts else (99.7, 100.0)
    x = (left + right) / 2
    anchor = "start" if x < 30 else "end" if x > 70 else "middle"
    name = escape(module.removeprefix("model."))
    return (
        f'<rect class=first x="{left:.2f}%" width="{right - left:.2f}%" height="100%"/>',
        f'<text class=first x="{x:.2f}%" y=-8 text-anchor={anchor}>first divergence: {name}</text>',
    )


def position_plots(found: Mapping[str, Sequence[float | None]]) -> str:
    count = len(found["max_abs"])
    if not count:
        return ""
    size = math.ceil(count / _MOST_COLUMNS)
    apart = [None if x is None or y is None else abs(y - x) for x, y in zip(found["nll_a"], found["nll_b"])]
    over_a, over_b = (_binned(found[name], size) for name in ("nll_a", "nll_b"))
    plots = [
        ("Logits", "largest |A &minus; B| at each position, log scale", True, [
            _Series(title="noise floor", css="floor", values=_binned(found["floor"], size), gaps=True),
            _Series(title="B against A", css="b", values=_binned(found["max_abs"], size, strict=True))]),
        ("KL(A ‖ B)", "nats, log scale", True, [
            _Series(title="KL", css="b", values=_binned(found["kl"], size, strict=True))]),
        ("NLL of the next token", "nats", False, [
            _Series(title="A", css="a", values=over_a), _Series(title="B", css="b thin", values=over_b)]),
        ("|NLL of B &minus; NLL of A|", "nats, log scale", False, [
            _Series(title="difference", css="b", values=_binned(apart, size))]),
    ]  # fmt: skip
    marks = range(0, count, max(1, round(round_step(count, 5))))
    columns = len(over_a)
    ticks = [(100 * (mark / size + 0.5) / columns, f"{mark:,}") for mark in marks]
    figures, notes = [], [f"Each point is the largest value among {size} positions."] * (size > 1)
    for title, note, broken, series in plots:
        values = [value for each in series for value in each.values if value is not None or not each.gaps]
        if any((value is None and broken) or value for value in values):
            axis = _Axis.over(values, log="log" in note, broken=broken)
            figures.append(_plot(title, note, axis, series, ticks, "position", over=_columns(series, size, count)))
        else:
            found_none = all(value is None for value in values)
            notes.append(f"{title} is {'not finite, or has no target,' if found_none else '0'} at every position.")
    said = f"<p><small>{' '.join(notes)}</small></p>" if notes else ""
    return f"<section><h2>By position</h2>{said}<div class=plots>{''.join(figures)}</div></section>"


def _binned(values: Sequence[float | None], size: int, *, strict: bool = False) -> list[float | None]:
    """The largest of each ``size`` values. With ``strict``, None counts as the largest; otherwise it is ignored."""
    bins = [values[i : i + size] for i in range(0, len(values), size)]
    return [
        None if strict and None in each else max((value for value in each if value is not None), default=None)
        for each in bins
    ]


def _columns(series: Sequence[_Series], size: int, count: int) -> str:
    """Invisible columns that show their values on hover."""
    columns = len(series[0].values)
    said = []
    for i in range(columns):
        last = min(count, (i + 1) * size) - 1
        where = f"position {i * size}" + (f" to {last}" if last > i * size else "")
        values = ", ".join(f"{each.title} {number(each.values[i])}" for each in series)
        box = f'x="{100 * i / columns:.2f}%" width="{100 / columns:.2f}%" height="100%"'
        said.append(f"<rect class=hit {box}><title>{where}: {values}</title></rect>")
    return "".join(said)
