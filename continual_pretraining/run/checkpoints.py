"""A run's checkpoints, ``checkpoints/step-N``: DeepSpeed's files and the run's own state.

A step's folder is written as ``step-N.partial``, synced to disk, renamed, and only then named in ``latest``. After a
kill at any moment, ``--resume auto`` finds the newest complete checkpoint.

A run that goes back to an earlier step abandons the steps saved after it. The first save of the new branch renames
them to ``step-N.left-1``, and they no longer count as the run's steps. Only the user deletes them: they may be the
newest work there is.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from smolconv.continual_pretraining.data.position import Position, check_position
from smolconv.continual_pretraining.data.token_record import TokenRecord, check_record
from smolconv.continual_pretraining.recipe.schedules import Schedule
from smolconv.continual_pretraining.recipe.schema import Checkpoints
from smolconv.continual_pretraining.watch.spikes import check_spikes
from smolconv.errors import CorruptFile, MissingFile
from smolconv.layouts.documents import corrupt_if_malformed, is_count, is_world
from smolconv.layouts.listing import pointer_text
from smolconv.parsing import read_json
from smolconv.storage.atomic import appearing_whole, sync_folder, write_synced

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "trainer.json"
#: Below the run's folder: the checkpoint that --resume named, until the first save after it.
RESUME_FROM = "resume-from"
#: Limit for ``trainer.json``, which names every token file: enough for half a million of them.
_MOST_STATE_BYTES = 1 << 27
_STEP = re.compile(r"step-(\d{1,18})")
_ASKED = re.compile(r"step-(\d{1,18})\.asked")
_LEFT = re.compile(r"step-(\d{1,18})\.left-(\d+)")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run needs to resume besides the engine's tensors, as plain JSON types."""

    step: int  #: completed
    position: Position
    zero_stage: int
    world_size: int
    dtype: str
    micro_batch_sequences: int
    global_batch_sequences: int
    spikes: Mapping[str, Any]  #: of the ``SpikeDetector``
    skipped_steps: int = 0
    token_files: TokenRecord = field(default_factory=dict)  #: early versions recorded none
    schedule: Mapping[str, Any] | None = None  #: the schedule that trained the step; None in early versions
    manifest: bool = True  #: whether a manifest lists the files and their digests; early versions wrote none

    def __post_init__(self) -> None:
        names = ("step", "world_size", "micro_batch_sequences", "global_batch_sequences", "skipped_steps")
        counts = {name: getattr(self, name) for name in names}
        if wrong := [name for name, value in counts.items() if not is_count(value) or value > 1 << 40]:
            raise ValueError(f"{wrong[0]} is {counts[wrong[0]]!r:.60}, expected a count")
        if self.zero_stage not in (0, 1, 2, 3) or not is_world(self.world_size):
            raise ValueError(f"ZeRO stage {self.zero_stage!r:.60} with {self.world_size} ranks is not valid")
        if self.dtype not in ("bfloat16", "float32") or not isinstance(self.manifest, bool):
            raise ValueError(f"dtype {self.dtype!r:.60} or manifest {self.manifest!r:.60} is not valid")
        check_position(self.position)
        check_spikes(self.spikes)
        check_record(self.token_files)
        self.trained_by  # noqa: B018 - reading it checks it

    @property
    def trained_by(self) -> Schedule | None:
        """The schedule that trained the step."""
        try:
            return None if self.schedule is None else Schedule.model_validate(self.schedule)
        except ValidationError:
            raise ValueError(f"schedule is {self.schedule!r:.60}, expected a recipe's") from None

    def write(self, folder: Path) -> None:
        write_text(folder / STATE, json.dumps({"schema": 1, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> RunState:
        """Read a checkpoint's state. Raises ``MissingFile`` if no run saved it, ``CorruptFile`` if it is damaged."""
        path = folder / STATE
        if not os.path.lexists(path):
            raise MissingFile(
                f"{folder} has no {STATE}: it was not saved by smolconv continue-train.\n"
                "To start from it, set model.source to it; start.optimizer takes its optimizer, too."
            )
        document = {"manifest": False, **read_json(path, _MOST_STATE_BYTES)}
        document.pop("schema", None)
        with corrupt_if_malformed(path):
            return RunState(**document)


def step_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step}"


def saved_steps(run: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return sorted(int(match[1]) for match in _folders(run, _STEP))


def _folders(run: Path, name: re.Pattern[str]) -> list[re.Match[str]]:
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = (name.fullmatch(entry.name) for entry in os.scandir(folder) if os.path.isdir(entry))
    return [match for match in found if match]


def latest(run: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None before the first save. Raises ``MissingFile`` if it is missing."""
    pointer = run / FOLDER / LATEST
    if not os.path.lexists(pointer):
        return None
    name = pointer_text(pointer)
    if not _STEP.fullmatch(name):
        raise CorruptFile(
            f"{pointer} holds {name!r:.60}; expected the name of a folder next to it, such as step-1000.\n"
            f"Complete checkpoints: {_named(saved_steps(run))}. Write one of these into it."
        )
    folder = pointer.parent / name
    if not folder.is_dir():
        raise MissingFile(
            f"{pointer} names {folder.name}, which is missing; complete checkpoints: {_named(saved_steps(run))}.\n"
            f"Write one of these into {pointer}, or start a new run with --resume never and another --output."
        )
    return folder


def _named(steps: Sequence[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps) or "none"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder, also of one that was set aside; None for other names."""
    match = _STEP.fullmatch(folder.name) or _LEFT.fullmatch(folder.name)
    return None if match is None else int(match[1])


def earlier_steps(checkpoint: Path) -> list[Path]:
    """Complete checkpoints in the same folder that were saved before this one, the newest first."""
    step = step_of(checkpoint)
    beside = [] if step is None else saved_steps(checkpoint.parent.parent)
    return [checkpoint.with_name(f"step-{other}") for other in reversed(beside) if step is not None and other < step]


def find_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: --resume auto, never or a path (a step's folder, or a run's).

    ``auto`` is the path that an earlier start was given, if nothing was saved since; otherwise what ``latest`` names.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return chosen(run) or latest(run)
    path = Path(resume)
    found = latest(path) if os.path.isdir(path / FOLDER) and not os.path.lexists(path / STATE) else path
    if found is None or not os.path.isdir(found):
        raise MissingFile(f"--resume {resume:.200}: no checkpoint is there. Give a step-N folder or a run's folder.")
    return found


def choose(run: Path, checkpoint: Path) -> None:
    """Record the checkpoint given by --resume: the start after one that dies before it saves must use it again."""
    run.mkdir(parents=True, exist_ok=True)
    folder, root = checkpoint.resolve(), run.resolve()
    # Relative, so that the run's own steps are found after its folder has moved.
    write_text(run / RESUME_FROM, str(folder.relative_to(root) if root in folder.parents else folder) + "\n")
    sync_folder(run)


def chosen(run: Path) -> Path | None:
    """The checkpoint that ``choose`` recorded; None after the next save. Raises ``MissingFile`` if it is missing."""
    record = run / RESUME_FROM
    if not os.path.lexists(record):
        return None
    folder = run / pointer_text(record)
    if not os.path.isdir(folder):
        shown = f"{folder}" if f"{folder}".isprintable() else repr(f"{folder}")
        raise MissingFile(
            f"an earlier start was to resume from {shown:.200}, which is missing; nothing was saved since.\n"
            f"Put it back, give another with --resume PATH, or delete {record} to resume from the run's latest."
        )
    return folder


def forget(run: Path) -> None:
    """Delete the record of ``choose``."""
    (run / RESUME_FROM).unlink(missing_ok=True)


def remove_partial(run: Path) -> list[str]:
    """Delete the remains of interrupted saves. Returns what could not be deleted, and why."""
    folder = run / FOLDER
    partial = [entry.path for entry in os.scandir(folder) if entry.name.endswith(".partial")] if folder.is_dir() else []
    return [note for path in sorted(partial) for note in _delete(Path(path))]


def publish(run: Path, step: int) -> Path:
    """Rename a partial folder, whose files are on disk, to its final name, and point ``latest`` at it.

    An older folder of that name is set aside first, never deleted while ``latest`` names it.
    """
    final = step_folder(run, step)
    pointer, partial = final.parent / LATEST, _partial(final)
    sync_folder(partial)
    # Written first: after this there are only renames, which work on a full disk.
    write_synced(_partial(pointer), final.name.encode())
    if final.exists():  # the step is saved again after a resume from an earlier one
        _set_aside(final)
    partial.rename(final)
    _partial(pointer).rename(pointer)
    sync_folder(final.parent)
    forget(run)
    sync_folder(run)
    return final


def set_aside(run: Path, *, after: int, saved: int) -> None:
    """Rename the steps after ``after``, except ``saved``: they belong to the branch that the run has abandoned.

    ``after`` is the step that ``saved`` continues from.
    """
    for step in saved_steps(run):
        if step > after and step != saved:
            _set_aside(step_folder(run, step))


def _set_aside(folder: Path) -> None:
    names = (folder.with_name(f"{folder.name}.left-{number}") for number in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))


def left_behind(run: Path) -> list[str]:
    """Names of the checkpoints that were set aside, by step."""
    return [match[0] for match in sorted(_folders(run, _LEFT), key=lambda match: (int(match[1]), int(match[2])))]


def prune(run: Path, policy: Checkpoints) -> list[str]:
    """Delete what the policy does not keep, never what ``latest`` names or an evaluation reads.

    Returns what could not be deleted, and why.
    """
    newest = latest(run)
    steps = saved_steps(run)
    kept = set(steps if policy.keep is None else steps[-policy.keep :])
    if policy.keep_every_steps:
        kept |= {step for step in steps if step % policy.keep_every_steps == 0}
    kept |= steps_in_evaluation(run)
    gone = [step for step in steps if step not in kept and (newest is None or newest.name != f"step-{step}")]
    return [note for step in gone for note in _delete(step_folder(run, step))]


def evaluation_file(run: Path, step: int, kind: Literal["json", "asked", "failed"]) -> Path:
    """Paths for the tasks on one checkpoint: results, marker of a pending request, marker of a failure."""
    return run / "evaluations" / f"step-{step}.{kind}"


def steps_in_evaluation(run: Path) -> set[int]:
    """Steps whose checkpoints a process or a job still has to read."""
    try:
        names = os.listdir(run / "evaluations")
    except OSError:
        return set()
    return {int(match[1]) for name in names if (match := _ASKED.fullmatch(name))}


def _delete(path: Path) -> list[str]:
    """Delete a folder or a file. Returns a note if that fails, as on NFS while another process reads it."""
    try:
        if path.is_dir() and not path.is_symlink():
            # Renamed first: a kill during the deletion must not leave something that looks complete.
            doomed = path if path.name.endswith(".partial") else path.rename(_partial(path))
            shutil.rmtree(doomed)
        else:
            path.unlink()
    except OSError as error:
        return [f"{path} could not be deleted ({error}). The next start tries again."]
    return []


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically; it is synced to disk before it gets its name."""
    with appearing_whole(path, synced=True) as part:
        part.write_text(text, encoding="utf-8")
