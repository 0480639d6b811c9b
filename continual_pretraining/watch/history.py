"""Reads a run's metrics.jsonl and events.jsonl in bounded memory.

Files are read as streams. A curve of any length is kept as at most 1,000 bins, each a power of two steps wide and with
its lowest and highest point, so outliers stay visible.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from smolconv.continual_pretraining.estimate.hardware import ASSUMED_MFU
from smolconv.continual_pretraining.recipe.files import RECIPE, load_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.watch.lines import (
    CURVES,
    EVENTS,
    METRICS,
    MOST_LINE_BYTES,
    EventLine,
    MetricsLine,
    event_line,
    metrics_line,
    visible,
)
from smolconv.errors import CorruptFile, MissingFile, SmolconvError
from smolconv.files import open_file, reading
from smolconv.layouts.documents import is_number

T = TypeVar("T")
_MOST_BINS = 1000
#: The first 16 sources have their own curve; all others share one. Tasks after the first 16 are not drawn.
_MOST_SOURCES, OTHERS = 16, "others"
#: Events kept per kind, the newest ones. An event of any other kind counts as a note.
MOST_EVENTS = 200
KINDS = ("started", "resumed", "spike", "note", "evaluation", "saved", "save_failed", "stopped", "finished")


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
    """Values over steps, in at most 1,000 bins, which widen as the curve grows."""

    def __init__(self) -> None:
        self._width = 1  #: steps of a bin
        self._bins: dict[int, _Bin] = {}
        self._gaps: set[int] = set()  #: bins of steps without a value

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
        self._widen()

    def skip(self, step: int) -> None:
        """Record a step without a value: the curve has a gap there unless other steps of the bin have values."""
        self._gaps.add(step // self._width)
        self._widen()

    def gaps(self) -> list[int]:
        """The first step of each gap's bin, in order."""
        return [index * self._width for index in sorted(self._gaps - self._bins.keys())]

    def _widen(self) -> None:
        while len(self._bins) > _MOST_BINS or len(self._gaps) > _MOST_BINS:
            self._width *= 2
            self._gaps = {index // 2 for index in self._gaps}
            bins, self._bins = self._bins, {}
            for index, each in bins.items():
                self._put(index // 2, each)

    def _put(self, index: int, new: _Bin) -> None:
        if index in self._bins:
            self._bins[index].join(new)
        else:
            self._bins[index] = new

    def points(self) -> list[Point]:
        """The lowest and the highest point of every bin, in order: at most 2,000."""
        return [point for _, each in sorted(self._bins.items()) for point in sorted({each.low, each.high})]

    def means(self) -> list[Point]:
        """The mean of each bin, at its middle step."""
        half = self._width // 2
        return [Point(i * self._width + half, each.total / each.count) for i, each in sorted(self._bins.items())]

    def smoothed(self) -> list[Point]:
        """Means over 1/50 of the curve on either side; empty for a curve of fewer than 20 bins."""
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


@dataclass
class RunHistory:
    """What a plot shows of a run."""

    name: str
    first: MetricsLine
    last: MetricsLine
    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in CURVES})
    #: The estimates made before a run starts, by the names of ``curves``.
    expected: dict[str, Curve] = field(default_factory=lambda: {"tokens_per_second": Curve(), "mfu": Curve()})
    mixture: dict[str, Curve] = field(default_factory=dict)  #: by source, its share of a step's tokens
    evaluations: dict[str, Curve] = field(default_factory=dict)  #: by source
    tasks: dict[str, Curve] = field(default_factory=dict)  #: by task and metric
    stages: list[tuple[int, str]] = field(default_factory=list)  #: first step and name
    events: dict[str, deque[EventLine]] = field(
        default_factory=lambda: {kind: deque(maxlen=MOST_EVENTS) for kind in KINDS}
    )
    event_count: int = 0
    recipe: Recipe | None = None  #: None: no readable recipe
    seconds: float = 0.0  #: of all steps


def read_run(folder: Path, name: str | None = None) -> RunHistory:
    """Read a run, which may still be training. Raises ``MissingFile`` and ``CorruptFile``."""
    if not os.path.lexists(folder / METRICS):
        found = "holds no metrics.jsonl" if os.path.isdir(folder) else "is not there"
        raise MissingFile(
            f"{folder!s:.200} {found}. Name the folder that `smolconv continue-train` wrote (its recipe's output)."
        )
    lines = _read_lines(folder / METRICS, metrics_line)
    first = next(lines, None)
    if first is None:
        raise MissingFile(f"{folder / METRICS} holds no step yet. Wait until the first one is done.")
    run = RunHistory(name=visible(name or os.path.basename(os.path.realpath(folder))), first=first, last=first)
    for line in itertools.chain((first,), lines):
        _add_step(run, line)
    if os.path.lexists(folder / EVENTS):
        for event in _read_lines(folder / EVENTS, event_line):
            _add_event(run, event)
    with suppress(SmolconvError):  # missing, or from an older version: the curves do not need it
        run.recipe = load_recipe(folder / RECIPE)
    return run


def _read_lines(path: Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    with reading(path), open(open_file(path, noted=False), "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MOST_LINE_BYTES)
            if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                return  # still being written, or cut by a kill
            try:
                if not line.endswith(b"\n"):
                    raise ValueError(f"it is longer than {MOST_LINE_BYTES:,} bytes")
                found = parse(line)
            except ValueError as error:
                raise CorruptFile(
                    f"{path}, line {number}: {error}.\nExpected a JSON object with a step, found {line[:60]!r}.\n"
                    "Remove the line, or restore the file from a copy."
                ) from None
            yield found


def _add_step(run: RunHistory, line: MetricsLine) -> None:
    for name, curve in run.curves.items():
        if name in line.values:
            curve.add(line.step, line.values[name])
        else:
            curve.skip(line.step)
    if not run.stages or run.stages[-1][1] != line.stage:
        run.stages.append((line.step, line.stage))
    run.seconds += line.seconds or 0.0
    speed, mfu = line.values.get("tokens_per_second"), line.values.get("mfu")
    # speed / mfu is the peak FLOPs/s divided by the FLOPs per token, by the estimate's formula, 6N.
    if speed and mfu and is_number(expected := ASSUMED_MFU * speed / mfu):
        run.expected["tokens_per_second"].add(line.step, expected)
        run.expected["mfu"].add(line.step, ASSUMED_MFU)
    _add_shares(run, line)
    run.last = line


def _add_shares(run: RunHistory, line: MetricsLine) -> None:
    """Add each source's share of the step's tokens: the difference of two lines' counts, or the first step's counts."""
    before = {} if line is run.first and line.step == 1 else run.last.sources
    taken = {name: count - before.get(name, 0) for name, count in line.sources.items()}
    total = sum(taken.values())
    if total <= 0 or min(taken.values()) < 0:
        return
    shares: dict[str, int] = {}
    for name, count in taken.items():
        known = name if name in run.mixture or len(run.mixture) + len(shares) < _MOST_SOURCES else OTHERS
        shares[known] = shares.get(known, 0) + count
    for name, count in shares.items():
        run.mixture.setdefault(name, Curve()).add(line.step, count / total)


def _add_event(run: RunHistory, line: EventLine) -> None:
    kind = "resumed" if line.kind == "resume" else line.kind  # early versions wrote "resume"
    run.events[kind if kind in run.events else "note"].append(line)
    run.event_count += 1
    for source, loss in line.losses.items():
        known = source if source in run.evaluations or len(run.evaluations) < _MOST_SOURCES else OTHERS
        run.evaluations.setdefault(known, Curve()).add(line.step, loss)
    for name, value in line.tasks.items():
        if name in run.tasks or len(run.tasks) < _MOST_SOURCES:
            run.tasks.setdefault(name, Curve()).add(line.step, value)
