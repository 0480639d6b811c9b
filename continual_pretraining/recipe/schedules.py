"""The learning rate of a recipe: nanotron's formula as a pure function of the completed steps.

W is ``warmup_steps``, S the completed steps before the decay, D its length. Step k of the run trains at the rate of
k - 1 completed steps: with a warm-up step 1 at 0, step W + 1 as the first at the peak, step S + 1 still at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smolconv.continual_pretraining.recipe.schema import Schedule
from smolconv.layouts.nanotron import schedule as nanotron


@dataclass(frozen=True, kw_only=True)
class Phases:
    """A schedule with nothing left open, in completed steps."""

    warmup_steps: int
    decay: Literal["none", "linear", "cosine", "1-sqrt"]
    decay_start_step: int  #: S; without a decay the end of the run
    decay_steps: int  #: D; 0 without a decay

    @property
    def decay_end_step(self) -> int:
        return self.decay_start_step + self.decay_steps


def resolved(schedule: Schedule) -> Phases:
    """Where the phases of ``schedule`` lie. A decay without any step left to it is none."""
    start = schedule.decay_start_step
    if start is None:
        start = schedule.warmup_steps
        if schedule.decay_steps is not None:
            start = max(schedule.train_steps - schedule.decay_steps, 0)
    steps = schedule.train_steps - start if schedule.decay_steps is None else schedule.decay_steps
    if schedule.decay == "none" or steps <= 0:
        return Phases(
            warmup_steps=schedule.warmup_steps, decay="none", decay_start_step=schedule.train_steps, decay_steps=0
        )
    return Phases(warmup_steps=schedule.warmup_steps, decay=schedule.decay, decay_start_step=start, decay_steps=steps)


def learning_rate(schedule: Schedule, completed_steps: int) -> float:
    """The rate of the step that follows ``completed_steps``."""
    phases = resolved(schedule)
    none = phases.decay == "none"
    return nanotron.learning_rate(
        completed_steps,
        peak=schedule.peak_lr,
        low=schedule.peak_lr if none else schedule.min_lr,
        warmup=phases.warmup_steps,
        start=phases.decay_start_step,
        decay=phases.decay_steps,
        shape=None if none else phases.decay,
    )


def notes(schedule: Schedule) -> list[str]:
    """What is allowed, but perhaps not meant."""
    found = []
    phases = resolved(schedule)
    if schedule.warmup_steps >= schedule.train_steps:
        found.append(
            f"schedule: the warm-up of {schedule.warmup_steps} steps does not end before the last step, "
            f"{schedule.train_steps}: the run never trains at peak_lr."
        )
    if schedule.decay == "none":
        for name in ("decay_start_step", "decay_steps"):
            if getattr(schedule, name) is not None:
                found.append(f"schedule.{name} has no effect: schedule.decay is none.")
        return found
    if schedule.min_lr > schedule.peak_lr:
        found.append(f"schedule.min_lr {schedule.min_lr:g} is above peak_lr {schedule.peak_lr:g}: the rate rises.")
    if phases.decay == "none" or phases.decay_start_step >= schedule.train_steps:
        found.append(f"schedule: the run ends at step {schedule.train_steps}, before its {schedule.decay} decay.")
        return found
    if phases.warmup_steps == 0:
        found.append("schedule: step 1 trains at rate 0, as nanotron's formula has it; warmup_steps: 1 says the same.")
    if phases.decay_start_step < phases.warmup_steps:
        found.append(
            f"schedule: the decay starts after {phases.decay_start_step} steps, within the warm-up of "
            f"{phases.warmup_steps}: the rate jumps from the peak into the decay where the warm-up ends."
        )
    end = phases.decay_end_step
    if end > schedule.train_steps:
        found.append(
            f"schedule: the decay ends after {end} steps, {end - schedule.train_steps} beyond the last one: the run "
            f"stops at {learning_rate(schedule, schedule.train_steps):.3g}, not at min_lr {schedule.min_lr:g}."
        )
    elif end < schedule.train_steps:
        found.append(
            f"schedule: the decay ends after {end} steps; the other {schedule.train_steps - end} train at min_lr "
            f"{schedule.min_lr:g}."
        )
    return found
