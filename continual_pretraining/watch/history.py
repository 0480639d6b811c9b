"""What metrics.jsonl and events.jsonl of a run hold, in bounded memory.

Files are read as streams, and a curve of any length is kept as at most 1,000 bins of a power of two steps, each with
its lowest and highest point: what stands out stays.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from smolconv.continual_pretraining.watch.metrics import EVENTS, METRICS
from smolconv.errors import CorruptFile, MissingFile

_MOST_BINS = 1000


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
class RunHistory:
    """What a picture shows of a run's folder."""

    name: str
    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in _CURVES})
    evaluations: dict[str, Curve] = field(default_factory=dict)  #: by source
    stages: list[tuple[int, str]] = field(default_factory=list)  #: first step and name
    marks: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: {"spike": [], "resume": []})
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  #: of all steps


def read_run(folder: Path, name: str | None = None) -> RunHistory:
    """Read a run, also one that is still training. Raises ``MissingFile`` and ``CorruptFile``."""
    if not (folder / METRICS).is_file():
        found = "holds no metrics.jsonl" if folder.is_dir() else "is not there"
        raise MissingFile(
            f"{folder} {found}. Name the folder that `smolconv continue-train` wrote (its recipe's output)."
        )
    run = RunHistory(name=name or folder.resolve().name)
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


def _add_step(run: RunHistory, line: Mapping[str, Any]) -> None:
    step = line["step"]
    for name, curve in run.curves.items():
        if is_number(value := line.get(name)):
            curve.add(step, value)
    stage = str(line.get("stage", ""))
    if not run.stages or run.stages[-1][1] != stage:
        run.stages.append((step, stage))
    if is_number(seconds := line.get("seconds")):
        run.seconds += seconds
    run.first = run.first or line
    run.last = line


def _add_event(run: RunHistory, line: Mapping[str, Any]) -> None:
    if line.get("kind") in run.marks:
        run.marks[line["kind"]].append((line["step"], str(line.get("text", ""))))
    losses = line.get("losses")
    for source, loss in losses.items() if isinstance(losses, dict) else ():
        if is_number(loss):
            run.evaluations.setdefault(source, Curve()).add(line["step"], loss)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
