"""Ticks of the axes in plots and reports."""

from __future__ import annotations

import math


def round_step(span: float, parts: int) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that covers ``span`` with ``parts`` steps."""
    rough = span / parts
    unit = 10.0 ** math.floor(math.log10(rough))
    return unit * next(times for times in (1, 2, 5, 10) if unit * times >= rough)


def multiples(step: float, low: float, high: float) -> list[float]:
    """The multiples of ``step`` from ``low`` to ``high``."""
    first = math.ceil(low / step)
    return [step * (first + i) for i in range(math.floor(high / step) - first + 1)]
