"""Save the engine so that a failed or interrupted save loses nothing, and no rank waits for one that failed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from continual_pretraining.ranks import Ranks
from continual_pretraining.recipe import Recipe
from continual_pretraining.run_checkpoints import RunState, prune, publish, step_folder
from continual_pretraining.start import FOLDER as START
from continual_pretraining.start import StartPoint
from smolconv import __version__
from smolconv.checkpoint import TrainingProgress
from smolconv.errors import MachineError
from smolconv.storage.atomic import sync_folder


class _Writer:
    """Stands in the place of DeepSpeed's checkpoint engine while one checkpoint is saved.

    DeepSpeed saves between barriers: an exception on one rank would leave the others waiting. So an error is kept until
    all ranks are through. Every file is put on disk before the folder gets its name.
    """

    def __init__(self, engine: Any) -> None:
        self.inner = engine
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        if self.error is not None:
            return
        try:
            self.inner.save(state_dict, path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.error = error


def save_run(
    engine: Any,
    ranks: Ranks,
    recipe: Recipe,
    run: Path,
    start: StartPoint,
    state: RunState,
    progress: TrainingProgress,
) -> Path:
    """Save everything the run needs to go on from ``state.step``. All ranks call this.

    Raises ``MachineError`` on all ranks when any could not write; what was there before is untouched.
    """
    import torch  # noqa: PLC0415

    final = step_folder(run, state.step)
    partial = final.with_name(final.name + ".partial")
    own = {
        "version": __version__,
        "progress": json.loads(json.dumps(asdict(progress))),
        "config": dict(start.config),
        "weights_only": False,
    }
    writer = _Writer(engine.checkpoint_engine)
    engine.checkpoint_engine = writer
    try:
        engine.save_checkpoint(str(final.parent), tag=partial.name, client_state={"smolconv": own}, save_latest=False)
    finally:
        engine.checkpoint_engine = writer.inner
    try:
        # Nothing in these models draws random numbers while it trains; whoever adds dropout finds them here.
        random = {"cpu": torch.get_rng_state()}
        if ranks.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        folder = partial / "random"
        folder.mkdir(exist_ok=True)
        torch.save(random, folder / f"rank-{ranks.rank:05d}.pt")
        if ranks.first:
            _write_documents(partial, start, state)
    except (OSError, RuntimeError) as error:
        writer.error = writer.error or error
    failures = [text for text in ranks.everyone(None if writer.error is None else str(writer.error)) if text]
    if failures:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        ranks.barrier()
        raise MachineError(
            f"step {state.step} could not be saved below {final.parent}: {failures[0].strip().splitlines()[0]}.\n"
            "The checkpoints that were there are untouched. Free some space, then go on with --resume auto."
        )

    def publish_and_clean() -> list[int]:
        for place in (partial / "random", partial):
            sync_folder(place)
        publish(run, state.step)
        shutil.rmtree(run / START, ignore_errors=True)  # the run goes on from its own checkpoints now
        return list(prune(run, recipe.checkpoints))

    ranks.from_first(publish_and_clean)
    return final


def _write_documents(folder: Path, start: StartPoint, state: RunState) -> None:
    state.write(folder)
    (folder / "config.json").write_text(json.dumps(dict(start.config), indent=2) + "\n")
    for name, path in start.assets.items():
        if name != "config.json" and Path(path).is_file():
            shutil.copyfile(path, folder / name)


def restore_random(folder: Path, ranks: Ranks) -> None:
    """The random state that this rank saved; nothing where another number of ranks did."""
    import torch  # noqa: PLC0415

    path = folder / "random" / f"rank-{ranks.rank:05d}.pt"
    if not path.is_file():
        return
    random = torch.load(path, weights_only=True)
    torch.set_rng_state(random["cpu"])
    if ranks.device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
