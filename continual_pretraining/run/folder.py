"""Checks a run's folder before its ranks start: its recipe, and whether the new recipe may continue it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.recipe.files import RECIPE, dump_recipe, load_recipe
from smolconv.continual_pretraining.recipe.schedules import Schedule, moved_decay
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import FOLDER, RunState, earlier_steps, find_resume, latest, step_of
from smolconv.errors import BadCheckpoint, OutputLocked, UsageError, counted
from smolconv.files import open_file
from smolconv.storage.atomic import appearing_whole

LOCK = "run.lock"  #: held by rank 0 for as long as it trains
RESTARTS = "SMOLCONV_RESTARTS"  #: environment variable: how often torchrun's launcher continued after losing a rank
START = "start"  #: files that a start converted for its ranks; useless once the ranks have ended or saved
#: Exceptions in those sections: the name that a source was recorded by before the run, and the reaction to changes.
_UNDECIDING = re.compile(r"data\.(on_change|stages\.\d+\.sources\.\d+\.recorded_as)")
#: Fields and sections that decide which model a step trains on which tokens. With other values, a checkpoint would
#: continue as something that neither recipe describes.
_DECIDING = (
    "model.source", "model.config", "model.step", "model.rope_theta", "model.max_positions", "data",
    "optimizer.betas", "optimizer.eps", "optimizer.no_decay", "loss", "global batch", "micro-batch",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Change:
    """A field in which two recipes differ."""

    field: str
    old: object
    new: object
    decides: bool  #: whether it changes the model or its data

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new}"


def as_it_began(recipe: Recipe, run: Path, resume: str) -> Recipe:
    """The recipe; fields that it leaves to the model's family keep the values of the run that continues."""
    checkpoint = None if resume == "never" else find_resume(run, resume)
    path = None if checkpoint is None else _run_of(checkpoint, run) / RECIPE
    if path is None or not os.path.lexists(path):
        return recipe
    old, given = load_recipe(path).optimizer, recipe.optimizer
    left = {name: getattr(old, name) for name in ("weight_decay", "no_decay") if getattr(given, name) is None}
    return recipe.model_copy(update={"optimizer": given.model_copy(update=left)})


def _run_of(checkpoint: Path, run: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else run


def changes(old: Recipe, new: Recipe) -> list[Change]:
    """The fields in which ``new`` differs from ``old``, in order."""
    before, after = dict(_fields(old)), dict(_fields(new))
    # With a mean over all tokens, the loss does not depend on how a step is split.
    by_tokens = old.loss.normalisation == new.loss.normalisation == "tokens"
    return [
        Change(
            field=field, old=before.get(field), new=after.get(field),
            decides=_decides(field) and not (by_tokens and field == "micro-batch"),
        )
        for field in dict.fromkeys([*before, *after])
        if before.get(field) != after.get(field)
    ]  # fmt: skip


def _decides(field: str) -> bool:
    named = any(field == name or field.startswith(f"{name}.") for name in _DECIDING)
    return named and _UNDECIDING.fullmatch(field) is None


def check_run(recipe: Recipe, run: Path, resume: str) -> list[str]:
    """Notes for the user before the run continues or begins. Writes nothing.

    Stages that have not begun may be added, changed or removed: a decay is often decided late.

    Raises ``UsageError`` if the checkpoint was trained with a recipe that differs in a deciding field, if it is beyond
    the recipe's last step, or if ``--resume never`` finds checkpoints; ``MissingFile`` if ``resume`` names no
    checkpoint.
    """
    if resume == "never" and latest(run) is not None:
        raise UsageError(
            f"{run} holds a run's checkpoints, which --resume never would overwrite.\n"
            "Choose another folder with --output, or drop --resume never to continue."
        )
    checkpoint = find_resume(run, resume)
    if checkpoint is None:
        return []
    of_run = _run_of(checkpoint, run)
    notes, state = [f"continues from {checkpoint}"], _state(checkpoint)
    step = None if state is None else state.step
    old = load_recipe(of_run / RECIPE) if os.path.lexists(of_run / RECIPE) else None
    if state is not None:
        check_steps(recipe, state.step, checkpoint)
        schedule = state.trained_by or (None if old is None else old.schedule)
        notes += moved_decay_notes(recipe, schedule, state.step, checkpoint, "--resume")
    if old is None:
        return notes
    if deciding := [change for change in changes(_begun(old, step), _begun(recipe, step)) if change.decides]:
        raise UsageError(
            "\n".join(
                [f"{checkpoint} was trained by another recipe ({of_run / RECIPE}):", *(f"  {c}" for c in deciding)]
            )
            + "\nExpected the values that the run was trained with: a resume cannot change them.\n"
            "Restore them in the recipe, or start a new run from this checkpoint with another --output,\n"
            f"model.source={checkpoint}, and the start.* fields that say what it carries over.\n"
            f"If only a path has moved, change it in {of_run / RECIPE} too."
        )
    return [*notes, *(f"changed since its last start: {change}" for change in changes(old, recipe))]


def check_steps(recipe: Recipe, step: int, checkpoint: Path) -> None:
    """Raise ``UsageError`` for a checkpoint beyond the recipe's last step: an export would match neither."""
    last = recipe.schedule.train_steps
    if step <= last:
        return
    earlier = _newest_until(checkpoint, last)
    raise UsageError(
        f"{checkpoint.name} has made {counted(step, 'step')}, but schedule.train_steps is {last:,}.\n"
        f"A run continues only from a step within its recipe ({checkpoint}). Nothing was trained or exported.\n"
        f"Set schedule.train_steps to {step} or more"
        + (f", or go back with --resume {earlier}." if earlier else f"; no checkpoint until step {last:,} is left.")
    )


def moved_decay_notes(recipe: Recipe, old: Schedule | None, step: int, checkpoint: Path, option: str) -> list[str]:
    """Say that the rate jumps, and name the newest checkpoint from which it would not."""
    moved = None if old is None else moved_decay(old, recipe.schedule, step)
    if moved is None:
        return []
    last = moved.last_undecayed_step
    found = _newest_until(checkpoint, last)
    if found is None:
        return [f"{moved.says} No checkpoint from before the decay (until step {last:,}) is left."]
    return [f"{moved.says} The newest checkpoint from before the decay: resume from it with {option} {found}."]


def _newest_until(checkpoint: Path, step: int) -> Path | None:
    beside = earlier_steps(checkpoint)
    return next((folder for folder in beside if (step_of(folder) or 0) <= step), None)


def _state(checkpoint: Path) -> RunState | None:
    """None for a state that cannot be read; the ranks will refuse it."""
    try:
        return RunState.read(checkpoint)
    except BadCheckpoint:
        return None


def _begun(recipe: Recipe, step: int | None) -> Recipe:
    """The recipe with only the stages that were read by ``step``; the others may still change."""
    stages = recipe.data.stages
    begun = tuple(stage for stage in stages if step is None or stage.start_step <= step) or stages[:1]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"stages": begun})})


def write_recipe(recipe: Recipe, run: Path) -> None:
    """Write ``recipe.resolved.yaml`` atomically; all nodes of a torchrun run do so at the same time.

    Raises ``OutputLocked`` if another process trains in the folder with another recipe: its ranks read this file.
    """
    run.mkdir(parents=True, exist_ok=True)
    path, text = run / RECIPE, dump_recipe(recipe).encode()
    if path.is_file() and (path.stat().st_size != len(text) or path.read_bytes() != text) and is_trained(run):
        raise trained_elsewhere(run, ", by another recipe")
    with appearing_whole(path) as part:
        part.write_bytes(text)


def held_elsewhere(lock: int) -> bool:
    """Whether another process holds the open lock file. If none does, this process now holds it.

    On a file system without locks, no process ever holds it.
    """
    if not _held(lock, fcntl.LOCK_EX):
        return False
    time.sleep(0.1)  # a process that only checks the lock holds it for a moment
    return _held(lock, fcntl.LOCK_EX)


def _held(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def trained_elsewhere(run: Path, how: str = "") -> OutputLocked:
    """The error for a folder in which another process trains; ``how`` adds details."""
    return OutputLocked(
        f"another process trains in {run} (it holds {run / LOCK}){how}.\n"
        "Wait for it to end, or choose another --output."
    )


def is_restart() -> bool:
    """Whether this start follows one whose node may have died holding the run's lock."""
    return any(os.environ.get(name, "").strip("0").isdigit() for name in ("SLURM_RESTART_COUNT", RESTARTS))


def refuse_trained(run: Path) -> None:
    """Raise ``OutputLocked`` if another process trains in the folder, before a start writes to its logs.

    A start after a lost rank passes: its rank 0 waits for the dead node's lock.
    """
    if not is_restart() and is_trained(run):
        raise trained_elsewhere(run)


def remove_start(run: Path) -> None:
    """Remove what a start converted, once its ranks have ended; do nothing if another start's ranks train."""
    if os.path.lexists(run / START) and not is_trained(run):
        shutil.rmtree(run / START, ignore_errors=True)


def is_trained(run: Path) -> bool:
    """Whether a process holds the run's lock, including other machines if the file system shares locks."""
    if not os.path.lexists(run / LOCK):
        return False
    lock = open_file(run / LOCK, noted=False)
    try:
        return _held(lock, fcntl.LOCK_SH)  # shared: processes that only check do not block each other
    finally:
        os.close(lock)


def _fields(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    document = recipe.model_dump(mode="json")
    parallelism = document["parallelism"]
    # In whichever way the batch was specified.
    parallelism.pop("global_batch_sequences")
    parallelism.pop("global_batch_tokens")
    yield "global batch", f"{recipe.global_batch_sequences} sequences"
    yield "micro-batch", f"{parallelism.pop('micro_batch_sequences')} sequences"
    for name in ("output", "description"):
        document.pop(name)
    yield from _flat(document, "")


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}.{index}")
    else:
        yield name, value
