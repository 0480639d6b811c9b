"""The interface of every launcher: place a run's ranks, build the command that starts them, and start them."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolconv.continual_pretraining.recipe.schema import Launch, Recipe
from smolconv.processes import safe_environment, usable_cores

WORKER = "smolconv.continual_pretraining.run.worker"
SUPERVISOR = "smolconv.continual_pretraining.launchers.supervisor"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many ranks run on how many machines."""

    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        return ranks if self.nodes == 1 else f"{ranks} ({self.nodes} nodes x {self.ranks_per_node})"


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run: the input of a launcher."""

    recipe: Recipe
    run: Path
    placed: Placement
    resume: str = "auto"
    worker: str = WORKER  #: the module that each rank runs

    @property
    def supervisor_words(self) -> list[str]:
        """The command of a rank's supervisor, for launchers that start one for each rank."""
        own = [] if self.worker == WORKER else ["--worker", self.worker]
        return [SUPERVISOR, str(self.run), "--resume", self.resume, *own]


class Launcher(ABC):
    """A way to start ranks, without state."""

    programs: Sequence[str] = ()  #: programs it runs that are not Python packages
    starts_each_rank = False  #: ``words`` is the command of one rank, which it starts for every rank

    def place(self, given: Launch) -> tuple[int, int | None]:
        """Nodes, and ranks per node (None: one per local GPU). Raises ``UsageError`` if it cannot place them."""
        return given.nodes, given.ranks_per_node

    def asks_for_gpus(self, given: Launch) -> bool | None:
        """Whether it requests GPUs; None: it uses what the node has."""
        return None

    def started_by(self, given: Launch) -> Sequence[str]:
        """Programs, other than Python packages, that this machine needs to start such a run."""
        return ()

    @abstractmethod
    def words(self, start: Start) -> list[str]:
        """The command that it runs on this machine."""

    def batch_script(self, start: Start) -> str | None:
        """The batch script that it submits instead of starting ranks here; None if it starts them."""
        return None

    @abstractmethod
    def launch(self, start: Start) -> int:
        """Start the ranks, wait for them and return the run's exit code; or submit the run and return 0."""


def rank_environment(recipe: Recipe, local_world_size: int) -> dict[str, str]:
    """This process's environment, with the recipe's variables and threads.

    Only the recipe decides the threads: sums on CPU depend on them, and a resumed run must give the same bits.
    """
    threads = recipe.parallelism.threads or max(1, usable_cores() // local_world_size)
    given = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **recipe.launch.environment}
    return safe_environment(given)


def count_gpus() -> int:
    """The number of GPUs that torch sees on this machine."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0  # saves the seconds that importing torch takes
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
