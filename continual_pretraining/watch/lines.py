"""Parses lines of metrics.jsonl and events.jsonl. The file may be damaged or come from somebody else."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from smolconv.errors import counted
from smolconv.layouts.documents import is_count, is_number
from smolconv.parsing import parse_json

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
#: Limit for one line. A step's line names every source of the run.
MOST_LINE_BYTES = 1 << 20
CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")
_BLOCK_BYTES = 1 << 20
#: Plots compute in floats, which are not exact beyond this.
_MOST_STEPS = 1 << 53
#: Characters that XML or a terminal does not accept.
_UNSEEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class MetricsLine:
    """The fields of a step's line that are read back."""

    step: int
    stage: str
    values: Mapping[str, float]  #: by the names of ``CURVES``; absent where not finite or not known
    seconds: float | None
    tokens: int | None  #: of the run so far
    sources: Mapping[str, int]  #: the same by source
    time: float | None  #: when the step ended, in seconds since the epoch; early versions wrote none


@dataclass(frozen=True, kw_only=True)
class EventLine:
    """The fields of an event's line that are read back."""

    step: int
    kind: str
    time: str | None  #: a ``timestamp()``; early versions wrote none
    text: str
    by: str  #: for a start: who started it, such as "8 ranks on node-a by slurm"
    losses: Mapping[str, float]  #: for an evaluation, by source; absent where not finite
    tasks: Mapping[str, float]  #: for an evaluation by tasks, by "task metric"


def timestamp() -> str:
    """The current time in the format of lines and records: ISO 8601 in UTC with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_of(text: str) -> float:
    """Convert a ``timestamp()`` to seconds since the epoch. Raises ``ValueError``."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()


def step_of(data: bytes) -> int:
    """The step of a line from either file. Raises ``ValueError``."""
    return int(_take(_object(data), "step", "a step", _is_step, needed=True))


def metrics_line(data: bytes) -> MetricsLine:
    """Parse a line of metrics.jsonl. Raises ``ValueError`` with what was found and expected."""
    found = _object(data)
    values = {name: _take(found, name, "a number", is_number) for name in CURVES}
    sources = _take(found, "sources", "an object", _is_object) or {}
    return MetricsLine(
        step=_take(found, "step", "a step", _is_step, needed=True),
        stage=visible(_take(found, "stage", "text", _is_text) or ""),
        values={name: value for name, value in values.items() if value is not None},
        seconds=_take(found, "seconds", "a number that is 0 or more", lambda value: is_number(value) and value >= 0),
        tokens=_take(found, "tokens", "a count", is_count),
        sources={visible(name): _take(sources, name, "a count", is_count, needed=True) for name in sources},
        time=None if (time := _take(found, "time", "a time", is_timestamp)) is None else seconds_of(time),
    )


def event_line(data: bytes) -> EventLine:
    """Parse a line of events.jsonl. Raises ``ValueError`` with what was found and expected."""
    found = _object(data)
    losses = _take(found, "losses", "an object", _is_object) or {}
    ranks = _take(found, "ranks", "a count", is_count)
    said = {word: _take(found, name, "text", _is_text) for word, name in (("on", "host"), ("by", "launcher"))}
    by = [] if ranks is None else [counted(ranks, "rank"), *(f"{word} {name}" for word, name in said.items() if name)]
    named = {visible(source): _take(losses, source, "a number", is_number) for source in losses}
    return EventLine(
        step=_take(found, "step", "a step", _is_step, needed=True),
        kind=visible(_take(found, "kind", "text", _is_text) or ""),
        time=_take(found, "time", "a time", is_timestamp),
        text=visible(_take(found, "text", "text", _is_text) or ""),
        by=visible(" ".join(by)),
        losses={source: loss for source, loss in named.items() if loss is not None},
        tasks=_task_values(found),
    )


def _task_values(found: Mapping[str, Any]) -> dict[str, float]:
    tasks = _take(found, "tasks", "an object", _is_object) or {}
    by_task = {task: _take(tasks, task, "an object", _is_object) or {} for task in tasks}
    values = {
        visible(f"{task} {metric}"): _take(metrics, metric, "a number", is_number)
        for task, metrics in by_task.items()
        for metric in metrics
    }
    return {name: value for name, value in values.items() if value is not None}


def lines_backwards(file: int, *, most_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield each complete line with its end offset, from the last to the first. A line that is too long is cut.

    ``most_bytes``: how far back from the end of the file to read.
    """
    start = os.fstat(file).st_size
    least = 0 if most_bytes is None else max(0, start - most_bytes)
    tail, end = b"", None  # rest of the current line; its end offset, once its line feed was seen
    while start > least:
        size = min(_BLOCK_BYTES, start - least)
        start -= size
        block = os.pread(file, size, start)
        stop = size
        while (cut := block.rfind(b"\n", 0, stop)) >= 0:
            if end is not None:
                yield end, block[cut + 1 : stop] + tail
            end, stop, tail = start + cut + 1, cut, b"\n"
        tail = (block[:stop] + tail)[:MOST_LINE_BYTES]
    if end is not None and start == 0:
        yield end, tail


def visible(text: str) -> str:
    """``text`` without characters that cannot be shown. Folder names may hold any bytes, JSON any characters."""
    return _UNSEEN.sub("\ufffd", text)


def _object(data: bytes) -> dict[str, Any]:
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _take(
    found: Mapping[str, Any], name: str, expected: str, holds: Callable[[Any], bool], *, needed: bool = False
) -> Any:
    value = found.get(name)
    if (needed or value is not None) and not holds(value):
        raise ValueError(f"its {name:.60} is {value!r:.60}; expected {expected}")
    return value


def _is_step(value: object) -> bool:
    return is_count(value) and value <= _MOST_STEPS  # type: ignore[operator]


def is_timestamp(value: object) -> bool:
    try:
        return isinstance(value, str) and seconds_of(value) >= 0
    except (ValueError, OverflowError):
        return False


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
