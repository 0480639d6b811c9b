"""One rank of a run. Launchers start this module with RUN [--resume R]."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from smolconv.continual_pretraining.launchers.registry import find_launcher
from smolconv.continual_pretraining.recipe.files import RECIPE, load_recipe
from smolconv.continual_pretraining.recipe.schema import Export, Recipe
from smolconv.continual_pretraining.run.control import Control, controlled, record_end
from smolconv.continual_pretraining.run.folder import LOCK, held_elsewhere, is_restart, trained_elsewhere
from smolconv.continual_pretraining.run.heartbeat import lost_connection
from smolconv.continual_pretraining.run.ranks import ATTEMPT, FailedOnAnotherRank, Ranks, join_ranks
from smolconv.errors import SmolconvError, StoppedByRequest, StoppedBySignal

if TYPE_CHECKING:
    from smolconv.continual_pretraining.run.trainer import Trainer

#: A file server keeps the lock of a dead node for a while: 90 seconds by NFSv4's default.
_LOCK_PATIENCE_SECONDS = 180.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ENDING = threading.Lock()


def run_rank(run: Path, resume: str) -> None:
    """Join the others, prepare, train, export."""
    recipe = load_recipe(run / RECIPE)
    asked = find_launcher(recipe.launch.launcher).asks_for_gpus(recipe.launch)
    ranks = join_ranks(
        recipe.parallelism.threads, gpus=asked, silence_seconds=recipe.launch.silence_seconds,
        lost=lambda error: _end(run, error),
    )  # fmt: skip
    from smolconv.continual_pretraining.engine.config import engine_config

    engine_config(recipe, ranks.world_size)  # refuses an impossible configuration before anything is converted
    ranks.from_first(lambda: lock_run(run))  # held until this process ends
    with controlled(run, recipe, ranks.world_size, first=ranks.first) as control:
        _train_and_export(recipe, run, resume, ranks, control)


def _train_and_export(recipe: Recipe, run: Path, resume: str, ranks: Ranks, control: Control | None) -> None:
    from smolconv.continual_pretraining.run.resuming import find_origin
    from smolconv.continual_pretraining.run.start import prepare_start

    origin = find_origin(recipe, run, resume, ranks)
    start = ranks.from_first(
        lambda: prepare_start(
            recipe, run, ranks.world_size, resume, str(ranks.device), origin=origin, say=lambda text: _say(ranks, text)
        )
    )
    _say(ranks, *start.notes)
    done = start.step >= recipe.schedule.train_steps
    if done:
        _say(ranks, *start.events, f"all {recipe.schedule.train_steps} steps are done")
    from smolconv.continual_pretraining.run.trainer import Trainer, newest_checkpoint

    trainer = Trainer(recipe, run, start, ranks, control)
    if not done:
        trainer.train()
    if recipe.export is not None:
        ranks.now_in("the export")
        own = Path(start.resumed) if done and start.resumed else newest_checkpoint(run)
        _export(recipe.export, run, trainer, own)
    ranks.barrier()
    if ranks.heartbeat is not None:
        ranks.heartbeat.stop()


def _export(export: Export, run: Path, trainer: Trainer, checkpoint: Path) -> None:
    """Export on rank 0, while the others wait.

    A signal raises ``StoppedBySignal`` on rank 0 and ``FailedOnAnotherRank`` on the others: everything is saved, and
    the next start exports.
    """
    from smolconv.continual_pretraining.run.export import export_run

    weights = trainer.weights() if export.verify else None

    def make() -> list[str]:
        try:
            with _ended_by_signals(trainer.control):
                if trainer.stop_asked:  # asked after the last step's check
                    raise KeyboardInterrupt
                return export_run(export, run, checkpoint, weights)
        except KeyboardInterrupt:
            requested = trainer.control is not None and trainer.control.stop_asked
            error, by = (StoppedByRequest, "smolconv stop") if requested else (StoppedBySignal, "a signal")
            raise error(f"stopped by {by} in the export; all steps are saved. The next start exports again.") from None

    if not trainer.ranks.first:
        _ignore_signals()
    _say(trainer.ranks, *trainer.ranks.from_first(make))


@contextmanager
def _ended_by_signals(control: Control | None) -> Iterator[None]:
    """Make SIGTERM and SIGUSR1 act like Ctrl-C once. Later ones are ignored, because the process is already closing."""

    def end(signum: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise KeyboardInterrupt

    def listen() -> None:
        for number in _SIGNALS:
            signal.signal(number, end)

    if control is None:
        listen()
    else:
        control.enter("exporting", listen)
    try:
        yield
    finally:
        _ignore_signals()


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def lock_run(run: Path) -> int:
    """Lock the run's folder against a second start while this process lives; returns the open descriptor.

    A start after a lost rank, by Slurm or torchrun, waits up to three minutes: the previous one may have died with its
    node. Raises ``OutputLocked``. Does nothing on a file system without locks.
    """
    patience = _LOCK_PATIENCE_SECONDS if is_restart() else 0.0
    deadline, told = time.monotonic() + patience, False
    descriptor = os.open(run / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    while held_elsewhere(descriptor):
        if time.monotonic() >= deadline:
            os.close(descriptor)
            raise trained_elsewhere(run)
        if not told:
            print(f"waits up to {patience:.0f} s for {run / LOCK}", file=sys.stderr, flush=True)
            told = True
        time.sleep(1.0)
    return descriptor


def _say(ranks: Ranks, *lines: str) -> None:
    if ranks.first:
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run one rank and exit with its code; a failure is written to ``logs/failure-rank-N.json`` for the launcher."""
    parser = argparse.ArgumentParser(description="One rank of smolconv continue-train.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    given = parser.parse_args()
    # torch and DeepSpeed print deprecation warnings on every rank, between the lines about the run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        run_rank(given.run, given.resume)
    except BaseException as error:
        _end(given.run, error)
    _end(given.run)


def _end(run: Path, error: BaseException | None = None) -> NoReturn:
    """End this process, from any of its threads: gloo's and NCCL's threads may outlive a normal exit."""
    _ENDING.acquire()  # never released: the first reason counts
    error = error and (lost_connection(error) or error)
    code = 0 if error is None else exit_code_of(error)
    record_end(run, code, "" if error is None else f"{type(error).__name__}: {error}")
    if error is not None and not isinstance(error, FailedOnAnotherRank):
        if code == 70 or os.environ.get("SMOLCONV_DEBUG"):
            print("".join(traceback.format_exception(error)[:-1]), end="", file=sys.stderr)
        # The launcher reports it once, when all ranks have ended, and adds it to the log.
        if not (_record(run, int(os.environ.get("RANK", "0")), error, code) and os.environ.get(ATTEMPT)):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code_of(error: BaseException) -> int:
    """The exit code by docs/cli.md."""
    if isinstance(error, SmolconvError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return 4 if out_of_memory or isinstance(error, OSError) else 70


def _record(run: Path, rank: int, error: BaseException, code: int) -> bool:
    """Write the failure for the launcher; False if that fails, perhaps because of the disk."""
    try:
        logs = run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        document = {"rank": rank, "exit_code": code, "error": type(error).__name__, "message": str(error)}
        document["attempt"] = os.environ.get(ATTEMPT, "")
        (logs / f"failure-rank-{rank:05d}.json").write_text(json.dumps(document) + "\n")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
