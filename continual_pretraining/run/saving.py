"""Save the engine so that a failed or interrupted save loses nothing, and no rank waits for one that failed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smolconv import __version__
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
    digest_file,
    load_torch_archive,
    save_torch_archive,
)
from smolconv.layouts.deepspeed.patches import saving_by
from smolconv.storage.atomic import sync_folder, write_synced


class _SavingEngine:
    """Stands in the place of DeepSpeed's checkpoint engine while one checkpoint is saved.

    DeepSpeed saves between barriers: an exception on one rank would leave the others waiting. So an error is kept until
    all ranks are through. Every file is put on disk by the rank that wrote it, before the folder gets its name. Its
    digest is taken on the way.
    """

    def __init__(self, engine: Any) -> None:
        self.inner = engine
        self.error: Exception | None = None
        self.files: dict[str, FileDigest] = {}  #: what this rank wrote, by name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def attempt(self, write: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            write()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.error = error

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        def write() -> None:
            self.files[Path(path).name] = self.inner.save(state_dict, path)

        self.attempt(write)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(lambda: self.inner.makedirs(path, exist_ok=exist_ok))


def save_run(
    engine: Any, ranks: Ranks, recipe: Recipe, run: Path, start: StartPoint, state: RunState,
    progress: TrainingProgress, after: int,
) -> tuple[Path, Sequence[str]]:  # fmt: skip
    """Save everything the run needs to go on from ``state.step``, and what to tell the user. All ranks call this.

    ``after`` is the step that this run saved or resumed last; steps beyond it belong to a branch that it has left.
    Raises ``MachineError`` on all ranks when any could not write; what was there before is untouched.
    """
    final = step_folder(run, state.step)
    partial = final.with_name(final.name + ".partial")
    own = {
        "version": __version__,
        "progress": json.loads(json.dumps(asdict(progress))),
        "config": dict(start.config),
        "weights_only": False,
    }
    writer = _SavingEngine(engine.checkpoint_engine)
    if ranks.first and partial.exists():
        # It could not be deleted before. The other ranks write into it only after DeepSpeed's first barrier.
        writer.attempt(lambda: shutil.rmtree(partial))
    with saving_by(engine, writer):
        engine.save_checkpoint(str(final.parent), tag=partial.name, client_state={"smolconv": own}, save_latest=False)
    writer.attempt(lambda: writer.files.update(_write_random(partial, ranks)))
    if ranks.first:
        writer.attempt(lambda: writer.files.update(_write_own_files(partial, start, state)))
    ended = ranks.everyone((None if writer.error is None else first_line(writer.error), writer.files))
    failures = [text for text, _ in ended if text]
    failure, notes = failures[0] if failures else None, list[str]()
    if failure is None:
        files = {name: digest for _, written in ended for name, digest in written.items()}
        failure, notes = ranks.from_first(lambda: _publish_and_clean(recipe, run, partial, state.step, after, files))
    if failure is not None:
        if ranks.first:
            remove_partial(run)
        ranks.barrier()
        raise MachineError(
            f"step {state.step} could not be saved below {final.parent}: {failure}.\n"
            "The checkpoints that were there are untouched. Free some space, then go on with --resume auto."
        )
    return final, notes


def _publish_and_clean(
    recipe: Recipe, run: Path, partial: Path, step: int, after: int, files: Mapping[str, FileDigest]
) -> tuple[str | None, list[str]]:
    """Why the checkpoint could not be published, and what to tell the user. Its errors are all ranks' to know.

    Once it is published the checkpoint is good, so that what fails after it is only told.
    """
    try:
        before = left_behind(run)
        write_manifest(partial, step, recipe.model.source, files)
        publish(run, step)
    except OSError as error:
        return first_line(error), []
    shutil.rmtree(run / START, ignore_errors=True)  # the run goes on from its own checkpoints now
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


def _write_random(partial: Path, ranks: Ranks) -> dict[str, FileDigest]:
    """Nothing in these models draws random numbers while it trains; whoever adds dropout finds them here."""
    import torch

    random = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    name = random_file(ranks.rank)
    path = partial / name
    path.parent.mkdir(exist_ok=True)
    digest = save_torch_archive(random, path)
    for folder in (path.parent, partial):
        sync_folder(folder)
    return {name: digest}


def restore_random(folder: Path, ranks: Ranks) -> None:
    """The random state that this rank saved; nothing where another number of ranks did.

    Raises ``CorruptFile``: nothing draws from it yet, but a checkpoint that lost one file may have lost others.
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
            "Other files of this checkpoint may be damaged, too: go on from an earlier one with --resume PATH."
        ) from None
