"""What every launcher offers: where a run's ranks go, the words that start them, and the start itself."""

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
BESIDE = "smolconv.continual_pretraining.launchers.beside"


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
    """One start of a run, as a launcher is given it."""

    recipe: Recipe
    run: Path
    placed: Placement
    resume: str = "auto"
    worker: str = WORKER  #: the module that is a rank

    @property
    def beside_words(self) -> list[str]:
        """The module beside a rank, with its words, for launchers that start one for each."""
        own = [] if self.worker == WORKER else ["--worker", self.worker]
        return [BESIDE, str(self.run), "--resume", self.resume, *own]


class Launcher(ABC):
    """One way to start ranks. It has no state."""

    programs: Sequence[str] = ()  #: what it runs besides Python's own packages
    starts_each_rank = False  #: its words are those of one rank, which it starts as often as there are ranks

    def place(self, given: Launch) -> tuple[int, int | None]:
        """Nodes, and ranks on each; None: one a GPU of this machine. Raises ``UsageError`` for what it cannot place."""
        return given.nodes, given.ranks_per_node

    def asks_for_gpus(self, given: Launch) -> bool | None:
        """Whether it asks for GPUs; None: it takes what the node has."""
        return None

    def started_by(self, given: Launch) -> Sequence[str]:
        """Programs, besides Python's own packages, that this machine must have to start such a run."""
        return ()

    @abstractmethod
    def words(self, start: Start) -> list[str]:
        """What it starts on this machine, as words of a shell."""

    def batch_script(self, start: Start) -> str | None:
        """What it hands over instead of starting it here."""
        return None

    @abstractmethod
    def launch(self, start: Start) -> int:
        """Start the ranks, wait for them, and return the run's exit code; or hand the run over, and return 0."""


def rank_environment(recipe: Recipe, local_world_size: int) -> dict[str, str]:
    """Ours, with the recipe's variables and threads.

    The recipe alone decides the threads: sums on CPU depend on them, and a resumed run shall give the same bits.
    """
    threads = recipe.parallelism.threads or max(1, usable_cores() // local_world_size)
    given = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **recipe.launch.environment}
    return safe_environment(given)


def count_gpus() -> int:
    """GPUs that torch sees on this machine."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0  # without the seconds that torch takes to import
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
