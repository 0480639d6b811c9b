"""Supervises one rank started by torchrun, DeepSpeed or Slurm, because those turn every failure into exit code 1.

It keeps the rank's log, passes signals on, and writes ``logs/ends/ATTEMPT/rank-N.json``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from smolconv.continual_pretraining.launchers.ends import (
    SAVED,
    RankEnd,
    ends_folder,
    has_failed,
    is_lost,
    leave_end,
    report_left,
    tell_last_lines,
)
from smolconv.continual_pretraining.launchers.front_end import ATTEMPT_FILE, LAUNCHER_PID
from smolconv.continual_pretraining.launchers.launcher import SUPERVISOR, WORKER, rank_environment
from smolconv.continual_pretraining.launchers.output import tell
from smolconv.continual_pretraining.launchers.signals import STOPS, die_with
from smolconv.continual_pretraining.launchers.watching import run_ranks
from smolconv.continual_pretraining.recipe.files import RECIPE, load_recipe
from smolconv.continual_pretraining.run.ranks import ATTEMPT
from smolconv.errors import Interrupted, OutputLocked, SmolconvError
from smolconv.processes import module_words


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {SUPERVISOR}", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--worker", default=WORKER, help=argparse.SUPPRESS)
    parser.add_argument("--attempt", help="name of this start, which separates its files from another's")
    parser.add_argument("--outcome", type=int, metavar="STATUS", help="report how ranks ended")
    parser.add_argument("--world-size", type=int, default=1, help="for --outcome")
    given = parser.parse_args()
    # The rendezvous address: all ranks of a start share it, and no other start has it at the same time.
    attempt = given.attempt or f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
    if given.outcome is not None:
        return report_left(given.run, attempt, given.world_size, given.outcome, told=True)
    return _run_rank(given.run, given.resume, given.worker, attempt)


def _run_rank(run: Path, resume: str, worker: str, attempt: str) -> int:
    """Run the one rank that torchrun, DeepSpeed or Slurm names in the environment."""
    rank = int(os.environ["RANK"])
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"]  # the latter is DeepSpeed's
    launcher = int(os.environ.get(LAUNCHER_PID, "0"))
    die_with(os.getppid())
    if ATTEMPT_FILE in os.environ:
        Path(os.environ[ATTEMPT_FILE]).write_text(attempt)
    recipe = load_recipe(run / RECIPE)
    folder, leads = ends_folder(run, attempt), os.environ["LOCAL_RANK"] == "0"

    def abandoned(stopping: bool) -> bool:
        if launcher and not _lives(launcher):
            return True
        # Only one rank per node checks, and torchrun ends the node's other ranks when that one ends. After a request to
        # stop, torchrun waits for each rank, so each checks for itself. os.path.exists: an error counts as "no".
        return (leads or stopping) and has_failed(folder)

    own = {"LOCAL_WORLD_SIZE": local_world_size, ATTEMPT: attempt}
    environment = {**rank_environment(recipe, int(local_world_size)), **own}
    words = module_words(worker, str(run), "--resume", resume)
    told_elsewhere = rank != 0 or bool(launcher)
    try:
        ends = run_ranks(words, {rank: environment}, run, abandoned=abandoned, told_elsewhere=told_elsewhere)
    except OutputLocked as error:
        message = f"{type(error).__name__}: {error}"
        ends = [RankEnd(rank=rank, exit_code=error.exit_code, seconds=time.time(), message=message)]
    if not ends:  # we killed it, because another rank failed
        return SmolconvError.exit_code
    # Once this rank's failure is on disk, torchrun may stop us before we have reported it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    first = leave_end(folder, ends[0])
    if ends[0].exit_code == SAVED:
        return 0  # otherwise torchrun and DeepSpeed would end the ranks that are still closing
    if first and ends[0].exit_code == Interrupted.exit_code:
        if not launcher:  # a cancelled job's script no longer reports anything
            tell(ends[0].message)
    elif first and ends[0].exit_code and not is_lost(ends[0]):
        tell_last_lines(ends[0], run)  # the process that started the launcher reports the rest, once
    return ends[0].exit_code


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended


def _run_and_exit() -> None:
    try:
        sys.exit(main())
    except SmolconvError as error:
        tell(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _run_and_exit()
