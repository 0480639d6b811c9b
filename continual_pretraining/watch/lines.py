"""Lines of metrics.jsonl and events.jsonl as they are read back: the file may be damaged, or somebody else's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smolconv.layouts.documents import is_count, is_number
from smolconv.parsing import parse_json

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
#: Of a line. That of a step names every source of the run.
MOST_LINE_BYTES = 1 << 20
CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")
#: Steps beyond this are no longer told apart where they are drawn.
_MOST_STEPS = 1 << 53
#: Characters that neither XML nor a terminal takes.
_UNSEEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class MetricsLine:
    """One step, as far as it is read back."""

    step: int
    stage: str
    values: Mapping[str, float]  #: by the names of ``CURVES``; none where it was not finite or not known
    seconds: float | None
    tokens: int | None  #: of the run so far


@dataclass(frozen=True, kw_only=True)
class EventLine:
    """Something that happened, as far as it is read back."""

    step: int
    kind: str
    text: str
    losses: Mapping[str, float]  #: of an evaluation, by source; none where it was not finite


def step_of(data: bytes) -> int:
    """The step of a line of either file. Raises ``ValueError``."""
    return int(_take(_object(data), "step", "a step", _is_step, needed=True))


def metrics_line(data: bytes) -> MetricsLine:
    """Raises ``ValueError`` that says what was found and expected."""
    found = _object(data)
    values = {name: _take(found, name, "a number", is_number) for name in CURVES}
    return MetricsLine(
        step=_take(found, "step", "a step", _is_step, needed=True),
        stage=visible(_take(found, "stage", "text", _is_text) or ""),
        values={name: value for name, value in values.items() if value is not None},
        seconds=_take(found, "seconds", "a number from 0 on", lambda value: is_number(value) and value >= 0),
        tokens=_take(found, "tokens", "a count", is_count),
    )


def event_line(data: bytes) -> EventLine:
    """As ``metrics_line``."""
    found = _object(data)
    losses = _take(found, "losses", "an object", lambda value: isinstance(value, dict)) or {}
    named = {visible(source): _take(losses, source, "a number", is_number) for source in losses}
    return EventLine(
        step=_take(found, "step", "a step", _is_step, needed=True),
        kind=_take(found, "kind", "text", _is_text) or "",
        text=visible(_take(found, "text", "text", _is_text) or ""),
        losses={source: loss for source, loss in named.items() if loss is not None},
    )


def visible(text: str) -> str:
    """Text that can be drawn and written: a folder's name may be of any bytes, a JSON text of any characters."""
    return _UNSEEN.sub("\ufffd", text)


def _object(data: bytes) -> dict[str, Any]:
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
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


def _is_text(value: object) -> bool:
    return isinstance(value, str)
