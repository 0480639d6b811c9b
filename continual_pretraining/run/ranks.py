"""The ranks of a run and their communication."""

from __future__ import annotations

import ctypes
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smolconv.continual_pretraining.run.heartbeat import Heartbeat, LostRank, announce
from smolconv.errors import MachineError, NotInstalled, SmolconvError, first_line, pip_install
from smolconv.layouts.deepspeed.patches import without_shared_memory_operations
from smolconv.layouts.deepspeed.version import check_deepspeed
from smolconv.processes import usable_cores

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: Environment variable with the name of the rank's start. Its failure file repeats the name, so that a failure is
#: never attributed to another start.
ATTEMPT = "SMOLCONV_ATTEMPT"
#: Timeout while a rank prepares or exports, which takes long for a terabyte. If a rank is lost, the heartbeat ends the
#: run.
_PATIENCE = timedelta(hours=12)
#: Timeout for everything else: a rank that hangs must not hold the others' GPUs for longer. DeepSpeed's own groups have
#: torch's default: 10 minutes for NCCL, 30 for gloo.
_TRAINING_PATIENCE = timedelta(minutes=30)
NVIDIA = Path("/dev/nvidiactl")  #: exists if NVIDIA's driver is loaded, whether or not it works


class FailedOnAnotherRank(SmolconvError):
    """Another rank failed; its own error has the reason."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank and device, and its communication with the other ranks."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    patient: torch.distributed.ProcessGroup  #: all ranks, by gloo, with a timeout of hours
    heartbeat: Heartbeat | None = None  #: None for a single rank

    @property
    def first(self) -> bool:
        return self.rank == 0

    def now_in(self, doing: str) -> None:
        """Set the current phase, for the message about a lost rank."""
        if self.heartbeat is not None:
            self.heartbeat.doing = doing

    def barrier(self) -> None:
        import torch.distributed

        torch.distributed.barrier(group=self.patient)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return rank 0's result on every rank. An error on rank 0 is raised on all, so that none waits for ever."""
        import torch.distributed

        result: list[Any] = [None]
        error: BaseException | None = None
        if self.first:
            try:
                result = [(make(), None)]
            except Exception as caught:
                error = caught
                result = [(None, (getattr(caught, "exit_code", 70), f"{type(caught).__name__}: {caught}"))]
        torch.distributed.broadcast_object_list(result, src=0, group=self.patient)
        value, failed = result[0]
        if error is not None:
            raise error
        if failed is not None:
            raise FailedOnAnotherRank(*failed)
        return value  # type: ignore[no-any-return]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        import torch

        vector = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(vector)
        return [float(value) for value in vector.tolist()]

    def everyone(self, value: T) -> list[T]:
        """The values of all ranks, in order."""
        import torch.distributed

        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found


def join_ranks(
    threads: int | None,
    *,
    gpus: bool | None = None,
    silence_seconds: float = 60,
    lost: Callable[[LostRank], object] | None = None,
) -> Ranks:
    """Join the other processes that the launcher started, by RANK, WORLD_SIZE and MASTER_ADDR.

    ``gpus``: whether the launch requested them; None if it cannot, so that the node itself decides. ``lost`` ends this
    process: another thread calls it when a rank has shown no sign of life for ``silence_seconds``. Without it there is
    no heartbeat.

    Raises ``NotInstalled`` without torch, transformers and a tested DeepSpeed; ``MachineError`` if a GPU is missing, if
    ranks see different devices, or if the rendezvous fails.
    """
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "deepspeed") if find_spec(name) is None]
    if missing:
        raise NotInstalled(f"training needs {' and '.join(missing)}: {pip_install(missing)}.")
    check_deepspeed("training")
    import torch

    local_rank, local_size = (int(os.environ.get(name, "0") or 0) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cuda = torch.cuda.is_available()
    _check_gpu(gpus, local_rank, local_size)
    store, heartbeat = _meet(cuda, silence_seconds, lost)
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(threads or max(1, usable_cores() // max(1, local_size)))
        _keep_freed_memory()
    import deepspeed

    if not cuda:
        without_shared_memory_operations()
    else:
        torch.cuda.set_device(local_rank)
    # DeepSpeed uses the same store, and keeps a process group that already exists.
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=_TRAINING_PATIENCE, verbose=False)
    try:
        patient = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise MachineError(
            f"the ranks cannot reach each other by gloo: {first_line(error)}\n"
            "If a node's name resolves to the wrong network, set GLOO_SOCKET_IFNAME in launch.environment."
        ) from error
    del store  # not earlier: it may run the server
    return Ranks(
        rank=torch.distributed.get_rank(),
        local_rank=local_rank,
        world_size=torch.distributed.get_world_size(),
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        patient=patient,
        heartbeat=heartbeat,
    )


def _keep_freed_memory() -> None:
    """Make malloc reuse freed memory, as torch does on GPUs, instead of returning it to the kernel.

    By default every large tensor is mapped again and the kernel zeroes its pages: measured, a quarter of the time of a
    ZeRO-2 step of 512 tokens. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_MAX
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def _check_gpu(expected: bool | None, local_rank: int, local_size: int) -> None:
    """Raise ``MachineError`` if this rank should have a GPU but has none: training on CPUs would go unnoticed."""
    import torch

    node = socket.gethostname()
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise MachineError(
                f"{node}: {local_size} ranks run on it, but it has {count} GPU{'s' * (count > 1)} for them, and each "
                "needs its own.\nRequest more, or give --nproc-per-node at most that."
            )
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # on purpose
    if expected or (expected is None and NVIDIA.exists() and not hidden):
        why = "the job asks for GPUs" if expected else f"{NVIDIA} exists"
        build = "" if torch.version.cuda or torch.version.hip else ", which was built for CPUs only"
        raise MachineError(
            f"{node}: {why}, but torch {torch.__version__}{build} sees none.\n"
            "Check `nvidia-smi` and the installed torch there. To train on CPUs: for Slurm, "
            "launch.slurm.gpus_per_node=0; else set CUDA_VISIBLE_DEVICES to nothing."
        )


def _meet(
    cuda: bool, silence_seconds: float, lost: Callable[[LostRank], object] | None
) -> tuple[torch.distributed.Store, Heartbeat | None]:
    """Join the others and agree on the device before choosing a backend: gloo and NCCL would wait for each other.

    Returns the rendezvous store and the running heartbeat. Raises ``MachineError`` on all ranks if only some have
    GPUs.
    """
    import torch.distributed

    try:
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=_TRAINING_PATIENCE))
        announce(store, rank)
        store.set(f"smolconv/device/{rank}", f"{'with a GPU' if cuda else 'without'} on {socket.gethostname()}")
        if rank == 0:
            seen = Counter(store.get(f"smolconv/device/{other}").decode() for other in range(world_size))
            kinds = {text.partition(" on ")[0] for text in seen}
            told = ", ".join(f"{count} {text}" for text, count in seen.items())
            store.set("smolconv/devices", told if len(kinds) > 1 else "alike")
        found = store.get("smolconv/devices").decode()
        own = store.clone()  # its own connection, which no other call blocks
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise MachineError(
            f"the ranks could not meet at {where}: {first_line(error)}\n"
            "Check that every node reaches this address, and that no other program uses it."
        ) from error
    if found != "alike":
        message = f"the ranks see different devices: {found}.\nCheck `nvidia-smi` there, or leave these nodes out."
        raise MachineError(message) if rank == 0 else FailedOnAnotherRank(MachineError.exit_code, message)
    if world_size == 1 or lost is None:
        return store, None
    return store, Heartbeat(own, rank, world_size, silence_seconds=silence_seconds, end=lost).start()
