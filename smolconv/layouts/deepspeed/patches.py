"""All changes to DeepSpeed (0.19) in our processes, each with its reason. No other module assigns to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from smolconv.layouts.deepspeed.checkpoint_engine import CheckpointEngine

#: How many gradients are cast at once, if they are summed in another dtype.
CAST_ELEMENTS = 250_000_000


def without_shared_memory_operations() -> None:
    """Call it before ``init_distributed``, which compiles them for a minute; gloo does not need them."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def replace_checkpoint_engine(engine: Any) -> None:
    """Make a DeepSpeed engine load and save with ``CheckpointEngine``, and find files by name only.

    DeepSpeed's own engine unpickles without limits, and looks for model files with a pattern that includes the whole
    path. It would load a file that sorts before the right one, and with ``run[1]`` in the path the files of ``run1``.
    """
    engine.checkpoint_engine = CheckpointEngine(engine.checkpoint_engine)
    engine._get_all_ckpt_names = lambda folder, tag: [engine._get_ckpt_name(folder, tag)]


def stay_fused(optimizer: Any) -> None:
    """Keep Adam fused: loading takes over the checkpoint's setting, and unfused Adam is ten times slower on a CPU.

    Call it before loading: Adam's step then goes to the device that the fused kernel needs.
    """

    def unchanged(_: Any, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.update(fused=True, foreach=None, capturable=False)

    optimizer.register_load_state_dict_pre_hook(unchanged)


def reduce_nothing(engine: Any) -> None:
    """For a single rank: avoid DeepSpeed's copy of all gradients of ZeRO-0 and 1 into one tensor and back."""
    engine.buffered_allreduce_fallback = lambda **_: None


def gather_whole(modules: Iterable[Any]) -> None:
    """Make ZeRO-3 gather the weights of each module once per call, and not for every part of it.

    Call it before ``initialize``.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


def scatter_gradients(engine: Any) -> None:
    """If ZeRO-1 and 2 scatter gradients, make them send nothing else, and sum only in ``reduce_dtype``.

    Call it before the first step. ZeRO-1 in bf16 (``BF16_Optimizer``) ignores ``reduce_scatter``: it sums all gradients
    on all ranks. ZeRO-2 divides by the number of ranks in bf16, before it sums in fp32.
    """
    from deepspeed import comm

    optimizer = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2) or not engine.zero_reduce_scatter():
        return
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        engine.buffered_allreduce_fallback = lambda **_: _sum_shares(engine)
        optimizer.get_grads_for_norm = lambda for_clipping=False: _own_gradients(optimizer, whole=for_clipping)
    elif optimizer.dtype != optimizer.gradient_accumulation_dtype:
        optimizer.gradient_average = False
        mean = 1 / comm.get_world_size(optimizer.dp_process_group)

        def add(output: Any | None, total: Any) -> None:
            if output is not None:
                output.add_(total.to(output.dtype), alpha=mean)

        optimizer._add_to_grad_partition_buffer = add


def _sum_shares(engine: Any) -> None:
    """Each rank's share of every group's gradients, averaged over all ranks; the other gradients are unchanged."""
    from deepspeed import comm

    group, dtype = engine.optimizer.dp_process_group, engine.communication_data_type
    rank, size = comm.get_rank(group), comm.get_world_size(group)
    for gradients in engine.optimizer.fp32_groups_gradients_flat:
        shares = gradients.view(size, -1)
        parts = [shares] if dtype == gradients.dtype else shares.split(max(1, CAST_ELEMENTS // size), 1)
        for part in parts:
            own, sent = part[rank], part.to(dtype).contiguous()
            total = own if sent is part else sent.new_empty(own.shape)  # in place if nothing is cast
            comm.reduce_scatter_fn(total, sent.view(-1), group=group)
            own.copy_(total).mul_(1 / size)


def _own_gradients(optimizer: Any, *, whole: bool) -> Any:
    """The tensors that clipping scales, or one with the norm of all ranks' shares."""
    import torch
    from deepspeed import comm

    shares = optimizer.fp32_groups_gradient_flat_partition
    if whole:
        return shares
    squares = torch.stack([share.norm() for share in shares]).square().sum()
    comm.all_reduce(squares, group=optimizer.dp_process_group)
    return [squares.sqrt()], {}


def set_progress(engine: Any, step: int, global_batch_sequences: int) -> None:
    """After loading: a source's own count would move DeepSpeed's accumulation boundary and file names."""
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * global_batch_sequences


def keep_own_clipping(engine: Any) -> None:
    """After loading: ZeRO 1 and 2 take over the checkpoint's."""
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


@contextmanager
def saving_by(engine: Any, checkpoint_engine: Any) -> Iterator[None]:
    """Save with another checkpoint engine, and write nothing but the checkpoint."""
    before, engine.checkpoint_engine = engine.checkpoint_engine, checkpoint_engine
    # Rank 0 would copy DeepSpeed's scripts into the folder, and if that failed the other ranks would wait for it.
    engine._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before


@contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """Count a skipped step of ZeRO-0 in fp32, whose optimizer is torch's and never skips, without changing weights."""
    update, engine.optimizer.step = engine.optimizer.step, lambda *_, **__: None
    try:
        yield
    finally:
        engine.optimizer.step = update
