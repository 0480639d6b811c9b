"""Starting a run's ranks by the launcher that its recipe names.

Every rank is the module ``run.worker``. Locally its parent is the launcher. With torchrun, DeepSpeed and Slurm it is
``beside``, once for each rank, because those launchers turn every failure into exit code 1.

All of them are started through ``smolconv/bootstrap``: nothing is imported from the folder that the user is in.

An attempt is one start of a run. A second start that meets the first one's lock fails, in the same folder and at the
same time, and neither may take the other's end for its own.
"""

from __future__ import annotations

from pathlib import Path

from smolconv.continual_pretraining.engine.config import accumulation_steps
from smolconv.continual_pretraining.launchers.launcher import WORKER, Launcher, Placement, Start, count_gpus
from smolconv.continual_pretraining.launchers.registry import find_launcher
from smolconv.continual_pretraining.recipe.schema import Recipe


def placement(recipe: Recipe, heads: int | None = None) -> Placement:
    """Where the recipe's ranks go; ``heads`` are the model's query heads, where they are known.

    Raises ``UsageError`` when the launcher cannot place them so, or the step's micro-batches cannot be shared equally.
    """
    nodes, ranks = _launcher(recipe).place(recipe.launch)
    placed = Placement(nodes=nodes, ranks_per_node=ranks or count_gpus() or 1)
    accumulation_steps(recipe, placed.world_size, heads)
    return placed


def launch_command(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> list[str]:
    """What the launcher starts on this machine, as words of a shell; for Slurm, what starts one node's ranks."""
    return _launcher(recipe).words(_start(recipe, run, resume, worker))


def batch_script(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> str | None:
    """The script that a batch system is handed; None for launchers that start the ranks themselves."""
    return _launcher(recipe).batch_script(_start(recipe, run, resume, worker))


def launch(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> int:
    """Train ``run``, whose ``recipe.resolved.yaml`` is written, to its end; with Slurm, hand it over.

    Returns the exit code: 0, 75 when all ranks stopped after a save, else that of the rank that failed first. What
    happened is on stderr by then. SIGTERM, SIGUSR1, SIGHUP and SIGINT are passed on to the ranks, which save and stop;
    a second SIGINT kills them.
    """
    start = _start(recipe, run, resume, worker)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    return _launcher(recipe).launch(start)


def _launcher(recipe: Recipe) -> Launcher:
    return find_launcher(recipe.launch.launcher)


def _start(recipe: Recipe, run: Path, resume: str, worker: str) -> Start:
    return Start(recipe=recipe, run=run, placed=placement(recipe), resume=resume, worker=worker)
