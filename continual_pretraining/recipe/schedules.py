"""The learning rate as a function of completed steps, and the table of decays.

W is ``warmup_steps``, S the completed steps before the decay, D its length. Step k of the run trains at the rate for
k - 1 completed steps. With a warm-up, step 1 trains at 0, step W + 1 is the first at the peak, and step S + 1 the last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from smolconv.continual_pretraining.recipe.section import (
    NO_SWITCH,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from smolconv.layouts.nanotron import schedule as nanotron


@dataclass(frozen=True, kw_only=True)
class Decay:
    """A decay from the peak to ``min_lr``, and the fields that it needs."""

    share: Callable[[Schedule, int, int], float]  #: share of peak_lr - min_lr left after k of D steps, 0 <= k < D
    formula: str  #: the share as text for docs/recipes.md, with p = k / D
    needs: tuple[str, ...] = ()  #: fields of ``Schedule`` that only this decay uses
    #: The error if those fields do not fit a decay of D steps.
    mistake: Callable[[Schedule, int], str | None] = lambda schedule, steps: None
    turns: Callable[[Schedule, int], tuple[int, ...]] = lambda schedule, steps: ()  #: every k at which a part begins


def _nanotrons(shape: str, formula: str) -> Decay:
    return Decay(share=lambda schedule, k, steps: nanotron.SHAPES[shape](k, steps), formula=formula)


def _restarted(schedule: Schedule, k: int, steps: int) -> float:
    # In integers: with rounding, a step that begins a cycle could fall at the end of the previous one.
    return (1 + math.cos(math.pi * ((schedule.cycles or 1) * k % steps / steps))) / 2


def _too_many(schedule: Schedule, steps: int) -> str | None:
    cycles = schedule.cycles or 1
    return f"cycles {cycles} is more than the {steps} steps of the decay" if cycles > steps else None


def _restarts(schedule: Schedule, steps: int) -> tuple[int, ...]:
    cycles = schedule.cycles or 1
    return tuple(-(-steps * cycle // cycles) for cycle in range(1, cycles))


#: Every decay by its name in recipes. All differences between decays are in this table.
DECAYS: Mapping[str, Decay] = {
    "linear": _nanotrons("linear", "1 - p"),
    "cosine": _nanotrons("cosine", "(1 + cos(pi p)) / 2"),
    "1-sqrt": _nanotrons("1-sqrt", "1 - sqrt(p)"),
    "cosine-restarts": Decay(
        share=_restarted, formula="(1 + cos(pi (`cycles` p mod 1))) / 2", needs=("cycles",), mistake=_too_many,
        turns=_restarts,
    ),
}  # fmt: skip

_NAMES = ("none", *DECAYS)
if TYPE_CHECKING:
    DecayName = str
else:
    DecayName = Literal[_NAMES]


Cycles = Annotated[int, Field(gt=0, le=10_000), NO_SWITCH]


class Schedule(Section):
    """The learning rate: linear warm-up, constant, then decay to min_lr (WSD), as nanotron computes it."""

    train_steps: Positive  #: the last step of the run
    peak_lr: PositiveFloat
    min_lr: NotNegativeFloat = 0.0
    warmup_steps: NotNegative = 0
    decay: DecayName = "none"
    decay_start_step: NotNegative | None = None  #: completed steps before the decay; None: train_steps - decay_steps
    decay_steps: Positive | None = None  #: None: all that remain after decay_start_step, or after the warm-up
    cycles: Cycles | None = None  #: how often a decay with restarts falls from the peak

    @model_validator(mode="after")
    def _has_what_its_decay_needs(self) -> Schedule:
        decay, steps = DECAYS.get(self.decay), resolved(self).decay_steps
        if decay is None:
            return self
        for field in decay.needs:
            if getattr(self, field) is None:
                raise ValueError(f"decay {self.decay} needs schedule.{field}")
        if steps and (mistake := decay.mistake(self, steps)) is not None:
            raise ValueError(mistake)
        return self


@dataclass(frozen=True, kw_only=True)
class Phases:
    """A schedule with all defaults resolved, in completed steps."""

    warmup_steps: int
    decay: str  #: of ``DECAYS``, or "none"
    decay_start_step: int  #: S; without a decay the end of the run
    decay_steps: int  #: D; 0 without a decay

    @property
    def decay_end_step(self) -> int:
        return self.decay_start_step + self.decay_steps


def resolved(schedule: Schedule) -> Phases:
    """The phases of ``schedule``. A decay without steps counts as none."""
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
    decay = DECAYS.get(phases.decay)
    return nanotron.learning_rate(
        completed_steps, peak=schedule.peak_lr, low=schedule.peak_lr if decay is None else schedule.min_lr,
        warmup=phases.warmup_steps, start=phases.decay_start_step, decay=phases.decay_steps,
        shape=None if decay is None else functools.partial(decay.share, schedule),
    )  # fmt: skip


def turning_steps(schedule: Schedule) -> set[int]:
    """The steps of the run, counted from 1, with which a phase begins or the run ends."""
    phases = resolved(schedule)
    decay = DECAYS.get(phases.decay)
    within = () if decay is None else decay.turns(schedule, phases.decay_steps)
    completed = {
        0, phases.warmup_steps, phases.decay_start_step, *(phases.decay_start_step + k for k in within),
        phases.decay_end_step,
    }  # fmt: skip
    return {step + 1 for step in completed if step < schedule.train_steps} | {schedule.train_steps}


def notes(schedule: Schedule) -> list[str]:
    """Warnings about what is allowed but perhaps not intended."""
    found = []
    phases = resolved(schedule)
    if schedule.warmup_steps >= schedule.train_steps:
        found.append(
            f"schedule: the warm-up of {schedule.warmup_steps} steps does not end before the last step, "
            f"{schedule.train_steps}: the run never trains at peak_lr."
        )
    used = DECAYS[schedule.decay].needs if schedule.decay in DECAYS else ()
    of_decays = ["min_lr", "decay_start_step", "decay_steps"] if schedule.decay == "none" else []
    for field in dict.fromkeys([*of_decays, *(field for decay in DECAYS.values() for field in decay.needs)]):
        if field not in used and getattr(schedule, field) != Schedule.model_fields[field].default:
            found.append(f"schedule.{field} has no effect: schedule.decay is {schedule.decay}.")
    if schedule.decay == "none":
        return found
    if schedule.min_lr > schedule.peak_lr:
        found.append(f"schedule.min_lr {schedule.min_lr:g} is above peak_lr {schedule.peak_lr:g}: the rate rises.")
    if phases.decay == "none" or phases.decay_start_step >= schedule.train_steps:
        found.append(f"schedule: the run ends at step {schedule.train_steps}, before its {schedule.decay} decay.")
        return found
    return found + _decay_notes(schedule, phases)


@dataclass(frozen=True, kw_only=True)
class MovedDecay:
    """A decay that has begun, and that another schedule moves."""

    last_undecayed_step: int  #: a run resumed from this step or an earlier one follows the new schedule throughout
    says: str


def moved_decay(old: Schedule, new: Schedule, completed_steps: int) -> MovedDecay | None:
    """Whether a run of ``completed_steps`` by ``old`` continues from within a decay that ``new`` moves.

    Also if a decay of ``new`` would have begun before steps that were trained without it.
    """
    was, now = resolved(old), resolved(new)
    begun = [p.decay_start_step for p in (was, now) if p.decay != "none" and p.decay_start_step < completed_steps]
    trained, meant = (learning_rate(schedule, completed_steps - 1) for schedule in (old, new))
    moved = replace(was, warmup_steps=0) != replace(now, warmup_steps=0) or old.cycles != new.cycles
    if not begun or not moved or math.isclose(trained, meant, rel_tol=1e-9):
        return None
    return MovedDecay(
        last_undecayed_step=min(begun),
        says=(
            f"schedule: the decay has moved within the steps already trained. It was {_decay_text(was)} and is now "
            f"{_decay_text(now)}. Step {completed_steps} trained at {trained:.3g}; step {completed_steps + 1} will at "
            f"{learning_rate(new, completed_steps):.3g}."
        ),
    )


def _decay_text(phases: Phases) -> str:
    if phases.decay == "none":
        return "none"
    return f"{phases.decay} from step {phases.decay_start_step + 1} to {phases.decay_end_step}"


def _decay_notes(schedule: Schedule, phases: Phases) -> list[str]:
    found = []
    if schedule.train_steps == 1:
        found.append("schedule: the only step trains at rate 0, so the run changes no weights.")
    elif phases.warmup_steps == 0:
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
