"""Chooses the checkpoint that a run continues from: the requested one, if it is undamaged. All ranks read all of it.

Training would continue from a damaged checkpoint: a flipped bit in Adam's state changes the losses, or makes them
infinite some steps later, and nothing shows the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoint_files import (
    compare_states,
    examine,
    problem_in,
    refuse_foreign,
    share_of,
    unreadable,
)
from smolconv.continual_pretraining.run.checkpoints import FOLDER, chosen, earlier_steps, find_resume
from smolconv.errors import BadCheckpoint, SmolconvError

T = TypeVar("T")


class Together(Protocol):
    """The methods of ``Ranks`` for decisions that all ranks make together."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def from_first(self, make: Callable[[], T]) -> T: ...

    def everyone(self, value: T) -> list[T]: ...

    def barrier(self) -> None: ...


class _Alone:
    """The same for a single process."""

    rank, world_size = 0, 1

    def from_first(self, make: Callable[[], T]) -> T:
        return make()

    def everyone(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None:
        pass


ALONE: Together = _Alone()


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a run continues from."""

    checkpoint: Path | None  #: None: from its source
    went_back: str | None = None  #: if it is not the requested one: which that was, and why
    notes: tuple[str, ...] = ()


def find_origin(recipe: Recipe, run: Path, resume: str, ranks: Together = ALONE) -> Origin:
    """Find the checkpoint, read all of it, and return what the run continues from. All ranks call this.

    With ``checkpoints.on_damage: previous`` and ``--resume auto``, a damaged checkpoint of the run is skipped for the
    newest undamaged one before it. Otherwise raises ``BadCheckpoint`` or a subclass, on all ranks, naming that
    one. A folder with foreign files is never skipped.
    """
    asked = ranks.from_first(lambda: find_resume(run, resume))
    if asked is None:
        return Origin(checkpoint=None)
    ranks.from_first(lambda: refuse_foreign(asked))
    problem, notes = _look(asked, ranks)
    if problem is None:
        return Origin(checkpoint=asked, notes=notes)
    if not isinstance(problem, BadCheckpoint):
        ranks.from_first(lambda: _raise(problem))
    earlier = None
    for folder in ranks.from_first(lambda: earlier_steps(asked)):
        wrong, notes = _look(folder, ranks)
        if wrong is None:
            earlier = folder
            break
    own = resume == "auto" and os.path.realpath(asked.parent) == os.path.realpath(run / FOLDER)
    if earlier is not None and own and recipe.checkpoints.on_damage == "previous":
        first = _short(problem, asked)[0].rstrip(".")
        back = f"went back to {earlier.name}: {first} (checkpoints.on_damage: previous)"
        return Origin(checkpoint=earlier, went_back=back, notes=notes)
    ranks.from_first(lambda: _raise(_refusal(problem, asked, run, earlier, own)))
    raise AssertionError("from_first raises on every rank")


def _look(folder: Path, ranks: Together) -> tuple[SmolconvError | None, tuple[str, ...]]:
    """The problem with a checkpoint, the same on all ranks, or a note on one that is complete."""
    contents, problem = ranks.from_first(lambda: _tried(lambda: examine(folder), folder))
    if contents is None:
        return problem, ()
    mine = problem_in(contents, share_of(contents, ranks.rank, ranks.world_size))
    ranks.barrier()  # has a longer timeout than the calls below: a rank may read for long
    problem = next((found for found in ranks.everyone(mine) if found is not None), None)
    if problem is None:
        _, problem = ranks.from_first(lambda: _tried(lambda: compare_states(contents), folder))
    if problem is not None:
        return problem, ()
    if contents.digests:
        return None, ()
    note = f"{folder.name} was saved without digests: only the checksums inside its archives were checked"
    return None, (note,)


def _tried(make: Callable[[], T], folder: Path) -> tuple[T | None, SmolconvError | None]:
    try:
        return make(), None
    except SmolconvError as error:
        return None, error
    except OSError as error:
        return None, unreadable(folder, error)


def _short(problem: SmolconvError, folder: Path) -> list[str]:
    """The lines of an error; the first stands alone, without the folder's path before names."""
    first, *rest = str(problem).splitlines()
    shorter = first.replace(str(folder), folder.name)
    return [first, *rest] if shorter == first else [shorter, f"The folder is {folder}.", *rest]


def _refusal(problem: SmolconvError, asked: Path, run: Path, earlier: Path | None, own: bool) -> SmolconvError:
    """The problem and what to do about it."""
    if earlier is None:
        advice = "No earlier checkpoint is undamaged. Copy it again from where it was saved, or use another --output."
    else:
        advice = f"The newest undamaged checkpoint before it is {earlier.name}. Resume with --resume {earlier}"
        advice += ", or set checkpoints.on_damage: previous." if own else "."
    if own and chosen(run) is not None:
        advice += f"\nAn earlier start was to resume from it; nothing was saved since ({run})."
    return type(problem)("\n".join([*_short(problem, asked), advice]))


def _raise(error: SmolconvError) -> NoReturn:
    raise error
