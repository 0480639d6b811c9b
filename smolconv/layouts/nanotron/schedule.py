"""nanotron's learning rate as a pure function of the step (its ``helpers.py: lr_scheduler_builder``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smolconv.errors import BadCheckpoint


def scheduled_lr(config: Mapping[str, Any], step: int, where: str) -> tuple[float, float]:
    """(peak, LR after ``step`` completed steps) by a nanotron training config.

    Raises ``BadCheckpoint`` when the config has no complete schedule.
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
    # nanotron's Config sets it so, leaving the decay's start out of account.
    decay = total - warmup if decay is None else int(decay)
    low = schedule.get("min_decay_lr")
    low = peak if low is None else float(low)
    try:
        return peak, learning_rate(
            step, peak=peak, low=low, warmup=warmup, start=start, decay=decay, shape=schedule.get("lr_decay_style"),
            warmup_shape=schedule.get("lr_warmup_style"),
        )  # fmt: skip
    except ValueError as error:
        raise BadCheckpoint(f"{where}: lr_decay_style: {error}.") from None


def learning_rate(
    step: int,
    *,
    peak: float,
    low: float,
    warmup: int,
    start: int,
    decay: int,
    shape: str | None,
    warmup_shape: str | None = "linear",
) -> float:
    """The LR after ``step`` completed steps: warm-up, ``peak``, decay over [start, start + decay), ``low``.

    Without ``shape`` it drops to ``low`` at ``start``. Raises ``ValueError`` at an unknown one.
    """
    if warmup == 0 and decay == 0:
        return peak
    if warmup_shape is not None and step <= warmup:
        return peak if warmup_shape == "constant" else peak * step / max(warmup, 1)
    if step < start:
        return peak
    if shape is None or step >= start + decay:
        return low
    done = (step - start) / decay
    shapes = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "1-sqrt": 1 - math.sqrt(done)}
    if shape not in shapes:
        raise ValueError(f"{shape!r} is unknown; expected {', '.join(shapes)}")
    return low + (peak - low) * shapes[shape]
