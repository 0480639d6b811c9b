"""Estimates the disk space of a run's checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smolconv.continual_pretraining.estimate.flops import parameter_count
from smolconv.continual_pretraining.estimate.memory import FP32, weight_bytes
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Checkpoints of a run, by its retention policy."""

    checkpoint_bytes: int
    saves: int  #: with the one after the last step
    kept: int
    kept_bytes: int
    peak_bytes: int  #: while the last one is written, before an old one is deleted
    written_bytes: int  #: over the whole run


def disk_use(recipe: Recipe, spec: ModelSpec, first_step: int = 1) -> Disk:
    """Sizes of DeepSpeed's checkpoints for any number of ranks, without padding and metadata."""
    n, b, policy = parameter_count(spec), weight_bytes(recipe), recipe.checkpoints
    stage, steps = recipe.parallelism.zero_stage, recipe.schedule.train_steps
    masters = FP32 * n if stage or b < FP32 else 0  # ZeRO-0 in fp32 trains the weights themselves
    weights = b * n if stage < 3 else 0  # ZeRO-3 saves only the masters
    size = weights + masters + 2 * FP32 * n
    regular = steps // policy.every_steps - (first_step - 1) // policy.every_steps
    saves = regular + (steps % policy.every_steps > 0) if first_step <= steps else 0
    newest = saves if policy.keep is None else min(policy.keep, saves)
    kept = newest
    if policy.keep_every_steps and newest < saves:
        # Of the older regular saves, 1..(saves - newest), those stay that both step counts divide.
        kept += (saves - newest) * policy.every_steps // math.lcm(policy.every_steps, policy.keep_every_steps)
    return Disk(
        checkpoint_bytes=size, saves=saves, kept=kept, kept_bytes=kept * size, peak_bytes=min(kept + 1, saves) * size,
        written_bytes=saves * size,
    )  # fmt: skip
