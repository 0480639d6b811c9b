"""A picture of one run or several, from metrics.jsonl and events.jsonl: a page, an SVG, or a PNG.

Files are read as streams, and a curve of any length is kept as at most 1,000 bins of a power of two steps, each with
its lowest and highest point: what stands out stays. A page has no scripts and refers to nothing outside.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from smolconv import __version__
from smolconv.continual_pretraining.watch.metrics import EVENTS, METRICS
from smolconv.drawing import multiples, round_step
from smolconv.errors import CorruptFile, MissingFile, NotInstalled, UsageError

SUFFIXES = (".html", ".svg", ".png")
_MOST_BINS = 1000
#: Marks of one kind in a picture, and columns that say their values when pointed at.
_MOST_MARKS, _MOST_COLUMNS = 200, 200
_COLOURS = ("#2463d6", "#c77700", "#187a43", "#a02fb0", "#c0262d", "#0d8a96", "#6b5bd2", "#7a6a00")


# --- reading ---------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    step: int
    value: float


@dataclass
class _Bin:
    low: Point
    high: Point
    total: float
    count: int

    def join(self, other: _Bin) -> None:
        self.low = min(self.low, other.low, key=lambda point: point.value)
        self.high = max(self.high, other.high, key=lambda point: point.value)
        self.total += other.total
        self.count += other.count


class Curve:
    """Values over steps, in bounded memory: at most 1,000 bins, which grow wider as they come."""

    def __init__(self) -> None:
        self._width = 1  #: steps of a bin
        self._bins: dict[int, _Bin] = {}

    def __bool__(self) -> bool:
        return bool(self._bins)

    def add(self, step: int, value: float) -> None:
        if (each := self._bins.get(step // self._width)) is not None:
            each.total += value
            each.count += 1
            if value < each.low.value:
                each.low = Point(step, value)
            elif value > each.high.value:
                each.high = Point(step, value)
            return
        self._bins[step // self._width] = _Bin(Point(step, value), Point(step, value), value, 1)
        while len(self._bins) > _MOST_BINS:
            self._width *= 2
            bins, self._bins = self._bins, {}
            for index, each in bins.items():
                self._put(index // 2, each)

    def _put(self, index: int, new: _Bin) -> None:
        if index in self._bins:
            self._bins[index].join(new)
        else:
            self._bins[index] = new

    def points(self) -> list[Point]:
        """In order; the lowest and the highest of every bin, at most 2,000."""
        return [point for _, each in sorted(self._bins.items()) for point in sorted({each.low, each.high})]

    def means(self) -> list[Point]:
        """One for each bin, at its middle step."""
        half = self._width // 2
        return [Point(i * self._width + half, each.total / each.count) for i, each in sorted(self._bins.items())]

    def smoothed(self) -> list[Point]:
        """Means over a fiftieth of the curve to either side; none for a curve of fewer than 20 bins."""
        means, bins = self.means(), [each for _, each in sorted(self._bins.items())]
        if len(bins) < 20:
            return []
        reach = max(2, len(bins) // 50)
        totals = [0.0, *itertools.accumulate(each.total for each in bins)]
        counts = [0, *itertools.accumulate(each.count for each in bins)]
        spans = [(max(0, i - reach), min(len(bins), i + reach + 1)) for i in range(len(bins))]
        return [
            Point(mean.step, (totals[b] - totals[a]) / (counts[b] - counts[a])) for mean, (a, b) in zip(means, spans)
        ]


_CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")


@dataclass
class Run:
    """What a picture shows of a run's folder."""

    name: str
    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in _CURVES})
    evaluations: dict[str, Curve] = field(default_factory=dict)  #: by source
    stages: list[tuple[int, str]] = field(default_factory=list)  #: first step and name
    marks: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: {"spike": [], "resume": []})
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  #: of all steps


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run, also one that is still training. Raises ``MissingFile`` and ``CorruptFile``."""
    if not (folder / METRICS).is_file():
        found = "holds no metrics.jsonl" if folder.is_dir() else "is not there"
        raise MissingFile(
            f"{folder} {found}. Name the folder that `smolconv continue-train` wrote (its recipe's output)."
        )
    run = Run(name=name or folder.resolve().name)
    for line in _read_lines(folder / METRICS):
        _add_step(run, line)
    if not run.last:
        raise MissingFile(f"{folder / METRICS} holds no step yet. Wait until the first one is done.")
    if (folder / EVENTS).is_file():
        for line in _read_lines(folder / EVENTS):
            _add_event(run, line)
    return run


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # it is being written, or a kill came in the middle of it
            try:
                found = json.loads(line)
                if not isinstance(found["step"], int) or isinstance(found["step"], bool):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise CorruptFile(
                    f"{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}. "
                    "Remove the line, or take the file from a copy."
                ) from None
            yield found


def _add_step(run: Run, line: Mapping[str, Any]) -> None:
    step = line["step"]
    for name, curve in run.curves.items():
        if _is_number(value := line.get(name)):
            curve.add(step, value)
    stage = str(line.get("stage", ""))
    if not run.stages or run.stages[-1][1] != stage:
        run.stages.append((step, stage))
    if _is_number(seconds := line.get("seconds")):
        run.seconds += seconds
    run.first = run.first or line
    run.last = line


def _add_event(run: Run, line: Mapping[str, Any]) -> None:
    if line.get("kind") in run.marks:
        run.marks[line["kind"]].append((line["step"], str(line.get("text", ""))))
    losses = line.get("losses")
    for source, loss in losses.items() if isinstance(losses, dict) else ():
        if _is_number(loss):
            run.evaluations.setdefault(source, Curve()).add(line["step"], loss)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_plot(folders: Sequence[Path], out: Path) -> None:
    """Draw the runs into ``out``, by its suffix. It appears whole, or not at all."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: a picture is written as {', '.join(SUFFIXES)}, by the suffix of its name.")
    to_png = _png_writer() if out.suffix == ".png" else None
    names = [folder.resolve().name for folder in folders]
    alone = len(set(names)) == len(names)
    runs = [read_run(folder, name if alone else str(folder)) for folder, name in zip(folders, names)]
    drawn = render_html(runs) if out.suffix == ".html" else render_svg(runs, dark=to_png is None)
    data = drawn.encode() if to_png is None else to_png(drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _png_writer() -> Callable[[str], bytes]:
    try:
        cairosvg = importlib.import_module("cairosvg")
    except (ImportError, OSError) as error:  # OSError: the package is there, the cairo library is not
        raise NotInstalled(
            f"a .png is drawn by cairosvg, which cannot be used here: {str(error).partition(chr(10))[0]}\n"
            "Write .html or .svg, which need nothing, or: pip install cairosvg"
        ) from None

    def write(svg: str) -> bytes:
        found: bytes = cairosvg.svg2png(bytestring=svg.encode(), scale=2)
        return found

    return write


def render_html(runs: Sequence[Run]) -> str:
    """One page that needs nothing else."""
    title = escape(", ".join(run.name for run in runs))
    figures = "\n".join(
        f'<div class="scroll{" wide" if panel.wide else ""}"><svg role=img aria-label="{escape(panel.title)}" '
        f'viewBox="0 0 {panel.width} {_HEIGHT}">{panel.drawn}</svg></div>'
        for panel in _panels(runs)
    )
    facts = "".join(f"<li><b>{escape(run.name)}</b> {escape(_facts(run))}</li>" for run in runs)
    notes = "".join(f"<li>{escape(note)}</li>" for run in runs for note in _notes(run, many=len(runs) > 1))
    said = f"<section><h2>Events</h2><ul>{notes}</ul></section>" if notes else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>{title} · smolconv plot</title>\n'
        f"<style>{_PAGE}{_DRAWING}{_DARK}</style></head>\n"
        f"<body><main><h1>{title}</h1><ul class=facts>{facts}</ul>\n<div class=panels>{figures}</div>{said}"
        f"<p><small>smolconv {__version__}. {_LEGEND}</small></p></main></body></html>\n"
    )


def render_svg(runs: Sequence[Run], *, dark: bool = True) -> str:
    """The panels below each other; ``dark`` follows the viewer's colours."""
    panels, placed, x, y = _panels(runs), [], 0, 60
    for panel in panels:
        if panel.wide and x:
            x, y = 0, y + _HEIGHT + 20
        placed.append(f'<g transform="translate({20 + x} {y})">{panel.drawn}</g>')
        x += panel.width + 20
        if x >= _WIDE:
            x, y = 0, y + _HEIGHT + 20
    height = y + (_HEIGHT + 20 if x else 0) + 20 * len(runs)
    facts = "".join(
        f'<text x="20" y="{height - 20 * (len(runs) - i) + 4}">{escape(run.name)}: {escape(_facts(run))}</text>'
        for i, run in enumerate(runs)
    )
    width = _WIDE + 40
    title = escape(", ".join(run.name for run in runs))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif"><style>{_DRAWING}{_DARK if dark else ""}</style>'
        f'<rect class="page" width="{width}" height="{height}"/><text class="head" x="20" y="38">{title}</text>'
        f"{''.join(placed)}{facts}</svg>\n"
    )


def _facts(run: Run) -> str:
    first, last = run.first["step"], run.last["step"]
    said = [f"steps {first:,} to {last:,}" if first < last else f"step {last:,}"]
    if means := run.curves["loss"].means():
        said.append(f"loss {means[0].value:.4f} to {means[-1].value:.4f}")
    if _is_number(tokens := run.last.get("tokens")):
        said.append(f"{tokens:,} tokens")
    for name, curve in run.evaluations.items():
        said.append(f"{name} {curve.means()[-1].value:.4f}")
    return ", ".join([*said, f"{timedelta(seconds=round(run.seconds))} of training"])


def _notes(run: Run, *, many: bool) -> list[str]:
    marks = sorted(mark for each in run.marks.values() for mark in each)
    said = [f"{f'{run.name}, ' * many}step {step:,}: {text}" for step, text in marks[:_MOST_MARKS]]
    return said + [f"and {len(marks) - _MOST_MARKS:,} more in events.jsonl"] * (len(marks) > _MOST_MARKS)


# --- drawing ---------------------------------------------------------------------------------------------------------

_WIDE, _HEIGHT = 1140, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 54, 34  # around a plot, inside its panel
_LEGEND = (
    "Every point is drawn up to 1,000 steps; beyond, the lowest and the highest of each bin. "
    "Bold: the mean of a fiftieth of the run to either side."
)


class Panel(NamedTuple):
    title: str
    width: int
    drawn: str

    @property
    def wide(self) -> bool:
        return self.width == _WIDE


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


def _panels(runs: Sequence[Run]) -> list[Panel]:
    first = min(run.first["step"] for run in runs)
    steps = (first, max(first + 1, *(run.last["step"] for run in runs)))
    many = len(runs) > 1
    panels = [_panel("Loss", "nats per token", _WIDE, steps, _loss_lines(runs), runs, log=True)]
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
            panels.append(_panel(title, note, (_WIDE - 20) // 2, steps, lines, runs, log=log, zero=zero, legend=many))
    return panels


def _loss_lines(runs: Sequence[Run]) -> list[_Line]:
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
    title: str, note: str, width: int, steps: tuple[int, int], lines: Sequence[_Line], runs: Sequence[Run],
    *, log: bool = False, zero: bool = False, legend: bool = True,
) -> Panel:  # fmt: skip
    """A plot over steps with its title, axes and, for one run, its marks."""
    inner, tall = width - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
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
                f'<text x="{x(mark):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">{mark:,.0f}</text>'
            )
    said.append(f'<text x="{_LEFT + inner / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    if len(runs) == 1:
        said.append(_marks(runs[0], x, tall, named=width == _WIDE))
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


def _marks(run: Run, x: Callable[[float], float], tall: int, *, named: bool) -> str:
    said, right = [], 0.0
    for i, (step, stage) in enumerate(run.stages[:_MOST_MARKS]):
        if i:
            said.append(f'<path class="stage" d="M{x(step):.1f} {_TOP}v{tall}"><title>{escape(stage)}</title></path>')
        if named and len(run.stages) > 1 and x(step) >= right:
            said.append(f'<text class="stage" x="{x(step) + 4:.1f}" y="{_TOP + 12}">{escape(stage)}</text>')
            right = x(step) + 8 + 7 * len(stage)
    for step, text in run.marks["resume"][:_MOST_MARKS]:
        title = f"<title>step {step:,}: {escape(text)}</title>"
        said.append(f'<path class="resume" d="M{x(step):.1f} {_TOP}v{tall}">{title}</path>')
    for step, text in run.marks["spike"][:_MOST_MARKS]:
        title = f"<title>step {step:,}: {escape(text)}</title>"
        said.append(f'<path class="spike" d="M{x(step):.1f} {_TOP}l-4 -7h8z">{title}</path>')
    if named:
        shown = (("resume", "resumed", "M0 -4h16"), ("spike", "spike", "M8 0l-4 -7h8z"))
        keys = [(css, name, shape) for css, name, shape in shown if run.marks[css]]
        for i, (css, name, shape) in enumerate(keys):
            place = f"translate({_WIDE - 90 * (len(keys) - i)} 16)"
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
_DRAWING = """
text{fill:#5c667a;font-size:12px}.title{fill:#1b2230;font-size:15px;font-weight:600}.note{fill:#5c667a;font-size:12px;font-weight:400}.head{fill:#1b2230;font-size:22px;
font-weight:600}.page{fill:#fff}.grid{stroke:#dfe3ea;fill:none}.line{fill:none;stroke-width:1.8;stroke-linejoin:round;
stroke-linecap:round}.raw{opacity:.3;stroke-width:1}.thin{stroke-width:1;opacity:.6}.dots{stroke-width:6}
.stage{stroke:#8a93a6;stroke-dasharray:5 4;fill:none}text.stage{stroke:none;fill:#5c667a;font-weight:600}
.resume{stroke:#187a43;stroke-width:1.4;stroke-dasharray:2 3;fill:none}.spike{fill:#c0262d}.hit{fill:#888;opacity:0}
.hit:hover{opacity:.3}
"""
_DARK = """
@media(prefers-color-scheme:dark){text,text.stage,.note{fill:#9aa4b6}.title,.head{fill:#e7eaf0}.page{fill:#1b2029}
.grid{stroke:#323a48}.line{filter:brightness(1.45)}.spike{fill:#ff7d7d}.resume{stroke:#56c98a}}
"""
_PAGE = """
*{box-sizing:border-box}body{margin:0;background:#f6f7f9;color:#1b2230;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1220px;margin:0 auto;padding:18px 16px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 6px}small,.facts{color:#5c667a}
.facts{list-style:none;padding:0;margin:2px 0 12px;overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.scroll,section{background:#fff;border:1px solid #dfe3ea;border-radius:10px;padding:14px;overflow-x:auto;min-width:0}
.wide{grid-column:1/-1}.panels svg{display:block;width:100%;min-width:440px}.wide svg{min-width:820px}
section{margin-top:14px}ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
@media(max-width:900px){.panels{grid-template-columns:1fr}.panels>*{grid-column:1}}
@media(prefers-color-scheme:dark){body{background:#12151b;color:#e7eaf0}.scroll,section{background:#1b2029;
border-color:#323a48}small,.facts{color:#9aa4b6}}
@media print{.scroll,section{break-inside:avoid}}
"""
