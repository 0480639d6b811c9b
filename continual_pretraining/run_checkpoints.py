"""A run's own checkpoints: ``checkpoints/step-N``, what DeepSpeed saved and beside it what the run needs to go on.

A step's folder is written as ``step-N.partial``, put on disk, renamed, and only then named by ``latest``. A kill at any
moment leaves the newest whole checkpoint where ``latest`` finds it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from continual_pretraining.recipe import Checkpoints
from smolconv.errors import MissingFile
from smolconv.layouts.base import read_json
from smolconv.layouts.documents import understood
from smolconv.storage.atomic import sync_folder

FOLDER = "checkpoints"
LATEST = "latest"
STATE = "trainer.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run must know to go on, beside the engine's tensors. Plain JSON types."""

    step: int  #: completed
    position: Mapping[str, Any]  #: of the data
    zero_stage: int
    world_size: int
    dtype: str
    micro_batch_sequences: int
    global_batch_sequences: int
    spikes: Mapping[str, Any]
    skipped_steps: int = 0

    def write(self, folder: Path) -> None:
        write_text(folder / STATE, json.dumps({"schema": 1, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> RunState:
        """Raises ``MissingFile`` where no run of ours saved, ``CorruptFile`` for a state that is not whole."""
        path = folder / STATE
        if not path.is_file():
            raise MissingFile(
                f"{folder} has no {STATE}: it was not saved by smolconv continue-train.\n"
                "To start from it, name it as model.source; its optimizer is taken with start.optimizer."
            )
        document = read_json(path)
        document.pop("schema", None)
        with understood(path):
            return RunState(**document)


def step_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step}"


def saved_steps(run: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in os.scandir(folder) if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def latest(run: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None before the first. Raises ``MissingFile`` when it is not there."""
    pointer = run / FOLDER / LATEST
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if not folder.is_dir():
        whole = ", ".join(f"step-{step}" for step in saved_steps(run)) or "none"
        raise MissingFile(
            f"{pointer} names {folder.name}, which is not there; whole checkpoints: {whole}.\n"
            f"Write one of these into {pointer}, or start anew with --resume never and another --output."
        )
    return folder


def find_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: --resume auto, never or a path (a step's folder, or another run's)."""
    if resume == "never":
        return None
    if resume == "auto":
        return latest(run)
    path = Path(resume)
    found = latest(path) if (path / FOLDER).is_dir() else path
    if found is None or not found.is_dir():
        raise MissingFile(f"--resume {resume}: no checkpoint is there. Name a step-N folder, or a run's folder.")
    return found


def remove_partial(run: Path) -> None:
    """Delete what interrupted saves left."""
    folder = run / FOLDER
    for entry in list(os.scandir(folder)) if folder.is_dir() else ():
        if entry.name.endswith(".partial"):
            shutil.rmtree(entry.path)


def publish(run: Path, step: int) -> Path:
    """Give a partial folder, whose files are on disk, its final name, and point ``latest`` at it."""
    final = step_folder(run, step)
    partial = final.with_name(final.name + ".partial")
    sync_folder(partial)
    if final.exists():  # a step that is saved once more, after a resume from an earlier one
        shutil.rmtree(final)
    partial.rename(final)
    write_text(final.parent / LATEST, final.name)
    sync_folder(final.parent)
    return final


def prune(run: Path, policy: Checkpoints) -> Sequence[int]:
    """Delete what the policy does not keep, never what ``latest`` names. Returns the steps that went."""
    newest = latest(run)
    steps = saved_steps(run)
    kept = set(steps if policy.keep is None else steps[-policy.keep :])
    if policy.keep_every_steps:
        kept |= {step for step in steps if step % policy.keep_every_steps == 0}
    gone = [step for step in steps if step not in kept and (newest is None or newest.name != f"step-{step}")]
    for step in gone:
        folder = step_folder(run, step)
        # Renamed first: a kill in the middle of deleting must not leave something that looks whole.
        doomed = folder.with_name(folder.name + ".partial")
        folder.rename(doomed)
        shutil.rmtree(doomed)
    return gone


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole, on disk before it gets its name."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
