"""Saves the engine so that a failed or interrupted save loses nothing, and no rank waits for one that failed.

With ``checkpoints.asynchronous``, training stops only while its state is copied. A thread on each rank does the rest
and never communicates: the ranks exchange their progress at the end of a step.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smolconv.checkpoint import TrainingProgress
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoint_files import CONFIG, random_file, write_manifest
from smolconv.continual_pretraining.run.checkpoints import (
    STATE,
    RunState,
    left_behind,
    prune,
    publish,
    remove_partial,
    set_aside,
    step_folder,
)
from smolconv.continual_pretraining.run.folder import START
from smolconv.continual_pretraining.run.ranks import Ranks
from smolconv.continual_pretraining.run.start import StartPoint
from smolconv.errors import BadCheckpoint, CorruptFile, MachineError, first_line
from smolconv.layouts.deepspeed.checkpoint_engine import (
    FileDigest,
    HostMemory,
    digest_file,
    load_torch_archive,
    save_torch_archive,
)
from smolconv.layouts.deepspeed.patches import saving_by
from smolconv.storage.atomic import sync_folder, write_synced
from smolconv.storage.manifest import MANIFEST
from smolconv.version import __version__

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint, and messages for the user."""

    folder: Path
    nbytes: int
    seconds: float  #: since the save began
    notes: Sequence[str]


#: The reason why a checkpoint could not be published, or the checkpoint.
_Published = tuple[str | None, Saved | None]


class Background:
    """A rank's resources for saving while it trains: one thread, and memory for the copy."""

    def __init__(self) -> None:
        self.memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, "save")

    def start(self, work: Callable[[], T]) -> Future[T]:
        return self._thread.submit(work)

    def close(self) -> None:
        """Release the memory; no save is running any more."""
        self._thread.shutdown()
        self.memory.close()


def _done(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


class _SavingEngine:
    """Replaces DeepSpeed's checkpoint engine while one checkpoint is saved.

    DeepSpeed saves between barriers, so an exception on one rank would leave the others waiting. An error is kept until
    all ranks have finished. The rank that wrote a file syncs it to disk before the folder gets its name, and computes
    its digest while writing. With ``memory``, files are copied there, and ``write_copies`` writes them.
    """

    def __init__(self, engine: Any, memory: HostMemory | None) -> None:
        self.inner, self.memory = engine, memory
        self.error: Exception | None = None
        self.files: dict[str, FileDigest] = {}  #: files that this rank wrote, by name
        self.notes: list[str] = []
        self._copies: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def attempt(self, write: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            write()
        except (OSError, RuntimeError, MemoryError) as error:  # torch reports a full disk as RuntimeError
            self.error = error

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        if self.memory is not None:
            try:
                self._copies.append((self.memory.snapshot(state_dict), path))
                return
            except (OSError, RuntimeError, MemoryError) as error:
                why = f"training waited until {Path(path).name} was written: no memory for a copy ({first_line(error)})"
                self.notes.append(why)
        self._write(state_dict, path)

    def write_copies(self) -> None:
        for content, path in self._copies:
            self._write(content, path)
        self._copies.clear()

    def _write(self, content: Any, path: str) -> None:
        def write() -> None:
            self.files[Path(path).name] = self.inner.save(content, path)

        self.attempt(write)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(lambda: self.inner.makedirs(path, exist_ok=exist_ok))


class Save:
    """A running save: first each rank writes its files, then rank 0 publishes and cleans up.

    Both run in ``background``, or at once without one. No rank begins the second before all have finished the first.
    All ranks make the same calls, except for ``part_ended``.
    """

    def __init__(
        self, ranks: Ranks, recipe: Recipe, run: Path, step: int, after: int, write: Callable[[], _SavingEngine],
        background: Background | None, began: float,
    ) -> None:  # fmt: skip
        self.step, self._began = step, began
        self._ranks, self._recipe, self._run, self._after = ranks, recipe, run, after
        self._start: Callable[[Callable[[], Any]], Future[Any]] = _done if background is None else background.start
        self._writing: Future[_SavingEngine] = self._start(write)
        self._publishing: Future[_Published] | None = None  # on rank 0
        self._notes: list[str] = []
        self._is_written = False
        self.stall_seconds = time.perf_counter() - began  #: how long training has waited so far

    def part_ended(self) -> bool:
        """Whether this rank has finished its part of the current phase."""
        part = self._part()
        return part is None or part.done()

    def _part(self) -> Future[Any] | None:
        return self._publishing if self._is_written else self._writing

    def finish(self) -> Saved:
        """Wait for the end. Raises as ``advance``."""
        while True:
            if (part := self._part()) is not None:
                wait([part])
            self._ranks.barrier()  # has a longer timeout than the calls below: a rank may write for long
            if (saved := self.advance()) is not None:
                return saved

    def advance(self) -> Saved | None:
        """Continue once all ranks have finished their parts; None until the checkpoint is published.

        Raises ``MachineError`` on all ranks if any could not write; earlier checkpoints are untouched.
        """
        ranks = self._ranks
        if not self._is_written:
            own = self._writing.result()
            failed = None if own.error is None else first_line(own.error)
            ended = ranks.everyone((failed, own.files, own.notes))
            self._is_written = True
            self._notes += [note for _, _, notes in ended for note in notes]
            self._refuse(next((text for text, _, _ in ended if text), None))
            files = {name: digest for _, written, _ in ended for name, digest in written.items()}
            if ranks.first:
                self._publishing = self._start(lambda: self._publish(files))
            return None
        publishing = self._publishing
        failure, saved = ranks.from_first(lambda: publishing.result() if publishing else (None, None))
        self._refuse(failure)
        return saved

    def _publish(self, files: Mapping[str, FileDigest]) -> _Published:
        failure, notes = _publish_and_clean(self._recipe, self._run, self.step, self._after, files)
        if failure is not None:
            return failure, None
        folder = step_folder(self._run, self.step)
        size = sum(file.nbytes for file in files.values()) + (folder / MANIFEST).stat().st_size
        seconds = time.perf_counter() - self._began
        return None, Saved(folder=folder, nbytes=size, seconds=seconds, notes=(*self._notes, *notes))

    def _refuse(self, failure: str | None) -> None:
        if failure is None:
            return
        if self._ranks.first:
            remove_partial(self._run)
        self._ranks.barrier()
        raise MachineError(
            f"step {self.step} could not be saved below {step_folder(self._run, self.step).parent}: {failure}.\n"
            "Earlier checkpoints are untouched. Free some space, then resume with --resume auto."
        )


def save_run(
    engine: Any, ranks: Ranks, recipe: Recipe, run: Path, start: StartPoint, state: RunState,
    progress: TrainingProgress, after: int, background: Background | None = None,
) -> Save:  # fmt: skip
    """Start saving everything that resuming from ``state.step`` needs. All ranks call this, while no save is running.

    ``after`` is the step that this run saved or resumed last; later steps belong to a branch that it has abandoned.
    With ``background`` the returned save may still be writing; training may change the engine meanwhile.
    """
    began = time.perf_counter()
    final = step_folder(run, state.step)
    partial = final.with_name(final.name + ".partial")
    own = {
        "version": __version__,
        "progress": json.loads(json.dumps(asdict(progress))),
        "config": dict(start.config),
        "weights_only": False,
    }
    if background is not None:
        background.memory.reuse()
    writer = _SavingEngine(engine.checkpoint_engine, None if background is None else background.memory)
    if ranks.first and partial.exists():
        # It could not be deleted before. Other ranks write into it only after DeepSpeed's first barrier.
        writer.attempt(lambda: shutil.rmtree(partial))
    with saving_by(engine, writer):
        engine.save_checkpoint(str(final.parent), tag=partial.name, client_state={"smolconv": own}, save_latest=False)
    random = _random_state(ranks)

    def write() -> _SavingEngine:
        writer.write_copies()
        writer.attempt(lambda: writer.files.update(_write_random(partial, ranks, random)))
        if ranks.first:
            writer.attempt(lambda: writer.files.update(_write_own_files(partial, start, state)))
        return writer

    return Save(ranks, recipe, run, state.step, after, write, background, began)


def _publish_and_clean(
    recipe: Recipe, run: Path, step: int, after: int, files: Mapping[str, FileDigest]
) -> tuple[str | None, list[str]]:
    """Publish on rank 0: the reason of a failure, and messages. All ranks must learn of an error.

    Once published the checkpoint is good, so later failures are only reported.
    """
    final = step_folder(run, step)
    try:
        before = left_behind(run)
        write_manifest(final.with_name(final.name + ".partial"), step, recipe.model.source, files)
        publish(run, step)
    except OSError as error:
        return first_line(error), []
    shutil.rmtree(run / START, ignore_errors=True)  # the run continues from its own checkpoints now
    try:
        set_aside(run, after=after, saved=step)
        notes = prune(run, recipe.checkpoints)
        if left := [name for name in left_behind(run) if name not in before]:
            said = f"set aside, as the run went back to step {after}: {', '.join(left)}. Delete what is not needed."
            notes.insert(0, said)
        return None, notes
    except OSError as error:
        return None, [f"cleaning up after step {step} failed: {error}. The next save tries again."]


def _write_own_files(folder: Path, start: StartPoint, state: RunState) -> dict[str, FileDigest]:
    state.write(folder)
    write_synced(folder / CONFIG, (json.dumps(dict(start.config), indent=2) + "\n").encode())
    for name, content in start.assets.items():
        write_synced(folder / name, content)
    sync_folder(folder)
    return {name: digest_file(folder / name) for name in (STATE, CONFIG, *start.assets)}


def _random_state(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The random states of this process. These models draw no random numbers in training; dropout would."""
    import torch

    random = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return random


def _write_random(partial: Path, ranks: Ranks, random: Mapping[str, torch.Tensor]) -> dict[str, FileDigest]:
    name = random_file(ranks.rank)
    path = partial / name
    path.parent.mkdir(exist_ok=True)
    digest = save_torch_archive(random, path)
    for folder in (path.parent, partial):
        sync_folder(folder)
    return {name: digest}


def restore_random(folder: Path, ranks: Ranks) -> None:
    """Load the random state that this rank saved; does nothing if another number of ranks saved it.

    Raises ``CorruptFile``: nothing uses the state yet, but a checkpoint that lost one file may have lost others.
    """
    import torch

    path = folder / random_file(ranks.rank)
    if not os.path.lexists(path):
        return
    try:
        random = load_torch_archive(path)
        torch.set_rng_state(random["cpu"])
        if ranks.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
    except (BadCheckpoint, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{path}, the random state of rank {ranks.rank}, cannot be read ({first_line(error)}).\n"
            "Other files of this checkpoint may be damaged, too: resume from an earlier one with --resume PATH."
        ) from None
