"""One rank of a run, as launchers start it: ``python -m continual_pretraining.worker RUN [--resume R]``."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

from continual_pretraining.ranks import Elsewhere, Ranks, join_ranks
from continual_pretraining.recipe_file import load_recipe
from smolconv.errors import OutputLocked, SmolconvError

RECIPE = "recipe.resolved.yaml"


def run_rank(run: Path, resume: str) -> None:
    """Join the others, prepare, train, export."""
    recipe = load_recipe(run / RECIPE)
    ranks = join_ranks(recipe.parallelism.threads)
    from continual_pretraining.engine_config import engine_config  # noqa: PLC0415
    from continual_pretraining.start import prepare  # noqa: PLC0415

    engine_config(recipe, ranks.world_size)  # what cannot be run is refused before anything is converted
    lock = ranks.from_first(lambda: lock_run(run))
    start = ranks.from_first(lambda: prepare(recipe, run, ranks.world_size, resume, str(ranks.device)))
    _say(ranks, *start.notes)
    if start.step >= recipe.schedule.train_steps:
        _say(ranks, f"all {recipe.schedule.train_steps} steps are done")
    from continual_pretraining.trainer import Trainer, newest_checkpoint  # noqa: PLC0415

    trainer = Trainer(recipe, run, start, ranks)
    if start.step < recipe.schedule.train_steps:
        trainer.train()
    if recipe.export is not None:
        from continual_pretraining.export import export_run  # noqa: PLC0415

        export = recipe.export
        weights = trainer.weights() if export.verify else None
        _say(ranks, *ranks.from_first(lambda: export_run(export, run, newest_checkpoint(run), weights)))
    ranks.barrier()
    if ranks.first:
        os.close(lock)


def lock_run(run: Path) -> int:
    """Keep a second start out of the run's folder for as long as this process lives; an open descriptor.

    Raises ``OutputLocked``. A file system without locks gives none.
    """
    descriptor = os.open(run / "run.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise OutputLocked(
                f"another process trains in {run} (it holds {run / 'run.lock'}).\n"
                "Wait for it to end, or choose another --output."
            ) from None
    return descriptor


def _say(ranks: Ranks, *lines: str) -> None:
    if ranks.first:
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run one rank and end with its exit code; what failed lies in ``logs/failure-rank-N.json`` for the launcher."""
    parser = argparse.ArgumentParser(description="One rank of smolconv continue-train.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    given = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    code = 0
    # torch and DeepSpeed announce each other's changes; on every rank, between the lines about the run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        run_rank(given.run, given.resume)
    except Elsewhere as error:
        code = error.exit_code
    except BaseException as error:
        code = exit_code_of(error)
        _record(given.run, rank, error, code)
        if code == 70 or os.environ.get("SMOLCONV_DEBUG"):
            traceback.print_exc()
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's and NCCL's threads may outlive an orderly end


def exit_code_of(error: BaseException) -> int:
    """As docs/cli.md has them."""
    if isinstance(error, SmolconvError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return 4 if out_of_memory or isinstance(error, OSError) else 70


def _record(run: Path, rank: int, error: BaseException, code: int) -> None:
    try:
        logs = run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        document = {"rank": rank, "exit_code": code, "error": type(error).__name__, "message": str(error)}
        (logs / f"failure-rank-{rank:05d}.json").write_text(json.dumps(document) + "\n")
    except OSError:
        pass  # the disk may be what failed; the message is printed all the same


if __name__ == "__main__":
    main()
