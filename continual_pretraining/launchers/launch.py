"""Starts a run's ranks with the recipe's launcher.

Every rank runs the module ``run.worker``. Locally, the launcher is its parent process. With torchrun, DeepSpeed and
Slurm, each rank's parent is a ``supervisor``, because those launchers turn every failure into exit code 1.

All processes start through ``smolconv/bootstrap``, so nothing is imported from the working folder.

An attempt is one start of a run. Two starts can overlap in one folder, where the second fails on the first one's lock;
attempts keep their files apart.
"""

from __future__ import annotations

from pathlib import Path

from smolconv.continual_pretraining.engine.config import accumulation_steps
from smolconv.continual_pretraining.launchers.launcher import WORKER, Launcher, Placement, Start, count_gpus
from smolconv.continual_pretraining.launchers.registry import find_launcher
from smolconv.continual_pretraining.recipe.schema import Recipe


def placement(recipe: Recipe, heads: int | None = None) -> Placement:
    """Where the recipe's ranks run. ``heads``: the model's query heads, if known.

    Raises ``UsageError`` if the launcher cannot place them, or if micro-batches do not divide equally among them.
    """
    nodes, ranks = _launcher(recipe).place(recipe.launch)
    placed = Placement(nodes=nodes, ranks_per_node=ranks or count_gpus() or 1)
    accumulation_steps(recipe, placed.world_size, heads)
    return placed


def launch_command(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> list[str]:
    """The command that the launcher runs on this machine; for Slurm, the one that starts a node's ranks."""
    return _launcher(recipe).words(_start(recipe, run, resume, worker))


def batch_script(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> str | None:
    """The script to submit to a batch system; None for launchers that start the ranks themselves."""
    return _launcher(recipe).batch_script(_start(recipe, run, resume, worker))


def launch(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> int:
    """Train ``run`` until it ends; with Slurm, submit it. Its ``recipe.resolved.yaml`` must exist.

    Returns the exit code: 0; 75 when all ranks stopped after a save; otherwise that of the rank that failed first, with
    the reason on stderr. SIGTERM, SIGUSR1, SIGHUP and SIGINT are passed on to the ranks, which save and stop; a second
    SIGINT kills them.
    """
    start = _start(recipe, run, resume, worker)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    return _launcher(recipe).launch(start)


def _launcher(recipe: Recipe) -> Launcher:
    return find_launcher(recipe.launch.launcher)


def _start(recipe: Recipe, run: Path, resume: str, worker: str) -> Start:
    return Start(recipe=recipe, run=run, placed=placement(recipe), resume=resume, worker=worker)
