"""Finds where a run continues in its data and schedule: after its own checkpoint, or after its source's step.

The dry run uses it, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from smolconv.checkpoint import Checkpoint
from smolconv.continual_pretraining.data.folders import plain_path, recorded_as
from smolconv.continual_pretraining.data.position import Position, position_from_stages
from smolconv.continual_pretraining.data.token_record import DataPlace, TokenRecord, place_in_data
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import STATE, RunState
from smolconv.continual_pretraining.run.folder import moved_decay_notes

T = TypeVar("T")
_NOT_RECORDED = "has no record of its token files: smolconv cannot tell whether they have changed."


def own_place(recipe: Recipe, own: Path, state: RunState, vocab_size: int) -> DataPlace:
    """The place after a checkpoint of the run. If all steps are done, reads nothing. Raises as ``place_in_data``."""
    if state.step >= recipe.schedule.train_steps:
        return DataPlace(position=state.position, record=state.token_files)
    place = place_in_data(recipe, state.position, state.token_files, vocab_size, f"step {state.step}")
    return place if state.token_files else replace(place, events=(*place.events, f"{own.name} {_NOT_RECORDED}"))


def source_place(recipe: Recipe, source: Checkpoint, step: int, vocab_size: int) -> DataPlace:
    """Where a new run begins, when its source has completed ``step`` steps of the schedule.

    With ``start.data`` it continues at the source's place, and compares the token files if the source recorded them.
    With ``start.learning_rate`` it continues the source's schedule. Raises as ``place_in_data`` and
    ``position_from_stages``.
    """
    position: Position | None = {"step": step, "stages": []} if step else None
    recorded: TokenRecord = {}
    since, events = "", list[str]()
    # Several steps can match a run's folder; only one was read.
    beside = dict.fromkeys(path.parent for path in source.files)
    folder = next((path for path in beside if os.path.lexists(path / STATE)), None)
    state = RunState.read(folder) if folder and (recipe.start.data or recipe.start.learning_rate) else None
    if folder and state and recipe.start.learning_rate:
        events += moved_decay_notes(recipe, state.trained_by, step, folder, "model.source:")
    if recipe.start.data:
        assert source.progress is not None
        stages, last = source.progress.stages, source.progress.last_stage_index
        # nanotron also lists stages that have not begun.
        position = position_from_stages(stages if last is None else stages[: last + 1], recipe.data, step)
        if state is not None:
            recorded, since = _by_path(recipe, state.token_files), f"step {state.step} of the source"
            restarted = _by_path(recipe, state.position.get("restarted", {}))
            position = {**position, "restarted": restarted} if restarted else position
            events += [] if state.token_files else [f"{folder} {_NOT_RECORDED}"]
    place = place_in_data(recipe, position, recorded, vocab_size, since)
    return replace(place, events=(*events, *place.events))


def _by_path(recipe: Recipe, recorded: Mapping[str, T]) -> dict[str, T]:
    """The source's record of token files, by the paths in the recipe."""
    sources = [source for stage in recipe.data.stages for source in stage.sources]
    return {
        plain_path(source.path): recorded[recorded_as(source)] for source in sources if recorded_as(source) in recorded
    }
