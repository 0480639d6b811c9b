"""The processes of a run, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from smolconv.errors import NotInstalled, SmolconvError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: How long ranks wait for one that prepares or exports: a terabyte takes its time, and the launcher ends a run whose
#: ranks have died.
_PATIENCE = timedelta(hours=12)


class Elsewhere(SmolconvError):
    """Another rank failed, and has said why."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which process this is, and where it computes."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        import torch.distributed  # noqa: PLC0415

        torch.distributed.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank. An error of rank 0's is raised on all, so that none waits for ever."""
        import torch.distributed  # noqa: PLC0415

        result: list[Any] = [None]
        error: BaseException | None = None
        if self.first:
            try:
                result = [(make(), None)]
            except Exception as caught:
                error = caught
                result = [(None, (getattr(caught, "exit_code", 70), f"{type(caught).__name__}: {caught}"))]
        torch.distributed.broadcast_object_list(result, src=0, device=self.device)
        value, failed = result[0]
        if error is not None:
            raise error
        if failed is not None:
            raise Elsewhere(*failed)
        return value  # type: ignore[no-any-return]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        import torch  # noqa: PLC0415

        vector = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(vector)
        return [float(value) for value in vector.tolist()]

    def everyone(self, value: T) -> list[T]:
        """A value of every rank, in their order."""
        import torch.distributed  # noqa: PLC0415

        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found


def join_ranks(threads: int | None) -> Ranks:
    """Meet the other processes that the launcher started, as RANK, WORLD_SIZE and MASTER_ADDR say.

    Raises ``NotInstalled`` without torch and deepspeed.
    """
    from importlib.util import find_spec  # noqa: PLC0415

    missing = [name for name in ("torch", "transformers", "deepspeed") if find_spec(name) is None]
    if missing:
        raise NotInstalled(f"training needs {' and '.join(missing)}: pip install 'smolconv[train]'.")
    import torch  # noqa: PLC0415

    local_rank, local_size = (int(os.environ.get(name, "0") or 0) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // max(1, local_size)))
    import deepspeed  # noqa: PLC0415
    import deepspeed.ops  # noqa: PLC0415

    if not cuda:
        # Compiled at init_distributed otherwise, for a minute, for ranks that share memory; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=_PATIENCE, verbose=False)
    return Ranks(
        rank=torch.distributed.get_rank(),
        local_rank=local_rank,
        world_size=torch.distributed.get_world_size(),
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
    )
