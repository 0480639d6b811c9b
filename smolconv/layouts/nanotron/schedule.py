"""nanotron's learning rate as a pure function of the step (its ``helpers.py: lr_scheduler_builder``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from smolconv.errors import BadCheckpoint

#: Share of the difference between peak and lowest rate that is left after k of D decay steps.
Shape = Callable[[int, int], float]
#: By lr_decay_style.
SHAPES: Mapping[str, Shape] = {
    "linear": lambda k, steps: 1 - k / steps,
    "cosine": lambda k, steps: (1 + math.cos(math.pi * (k / steps))) / 2,
    "1-sqrt": lambda k, steps: 1 - math.sqrt(k / steps),
}


def scheduled_lr(config: Mapping[str, Any], step: int, where: str) -> tuple[float, float]:
    """(peak, LR after ``step`` completed steps) according to a nanotron training config.

    Raises ``BadCheckpoint`` if the config has no complete schedule.
    """
    try:
        schedule = config["optimizer"]["learning_rate_scheduler"]
        peak = float(schedule["learning_rate"])
        total = int(config["tokens"]["train_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"{where}: optimizer.learning_rate_scheduler or tokens.train_steps is missing ({error!r})."
        ) from None
    warmup = int(schedule.get("lr_warmup_steps") or 0)
    start = schedule.get("lr_decay_starting_step")
    start = warmup if start is None else int(start)
    decay = schedule.get("lr_decay_steps")
    # nanotron's Config sets it this way and ignores the decay's start.
    decay = total - warmup if decay is None else int(decay)
    low = schedule.get("min_decay_lr")
    low = peak if low is None else float(low)
    style = schedule.get("lr_decay_style") or "linear"  # nanotron's LRSchedulerArgs replaces null

    def shape(k: int, steps: int) -> float:
        if style not in SHAPES:
            raise BadCheckpoint(f"{where}: lr_decay_style: {style!r} is unknown; expected {', '.join(SHAPES)}.")
        return SHAPES[style](k, steps)

    return peak, learning_rate(
        step, peak=peak, low=low, warmup=warmup, start=start, decay=decay, shape=shape,
        warmup_shape=schedule.get("lr_warmup_style"),
    )  # fmt: skip


def learning_rate(
    step: int, *, peak: float, low: float, warmup: int, start: int, decay: int, shape: Shape | None,
    warmup_shape: str | None = "linear",
) -> float:  # fmt: skip
    """The LR after ``step`` completed steps: warm-up, ``peak``, decay over [start, start + decay), ``low``.

    Without ``shape`` it drops to ``low`` at ``start``.
    """
    if warmup == 0 and decay == 0:
        return peak
    if warmup_shape is not None and step <= warmup:
        return peak if warmup_shape == "constant" else peak * step / max(warmup, 1)
    if step < start:
        return peak
    if shape is None or step >= start + decay:
        return low
    return low + (peak - low) * shape(step - start, decay)
