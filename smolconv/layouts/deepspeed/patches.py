"""All that is changed about DeepSpeed (0.19) in our processes, each with the reason. Nothing else assigns to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smolconv.layouts.deepspeed.checkpoint_engine import CheckpointEngine


def without_shared_memory_operations() -> None:
    """To be called before ``init_distributed``, which compiles them for a minute; gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def replace_checkpoint_engine(engine: Any) -> None:
    """Have a DeepSpeed engine load and save by ``CheckpointEngine``, and by the names of files alone.

    Its own would unpickle freely, and looks for model files by a pattern of which the whole path is part. One that
    sorts before the right one would be loaded in its place, and with ``run[1]`` in the path those of a folder ``run1``.
    """
    engine.checkpoint_engine = CheckpointEngine(engine.checkpoint_engine)
    engine._get_all_ckpt_names = lambda folder, tag: [engine._get_ckpt_name(folder, tag)]


def stay_fused(optimizer: Any) -> None:
    """Loading takes over how a checkpoint's optimizer was executed, which is ten times slower on a CPU when not fused.

    Before it is loaded: Adam's step then goes to the device where the fused kernel wants it.
    """

    def unchanged(_: Any, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.update(fused=True, foreach=None, capturable=False)

    optimizer.register_load_state_dict_pre_hook(unchanged)


def reduce_nothing(engine: Any) -> None:
    """For a rank alone: DeepSpeed would copy all gradients of ZeRO-0 and 1 into one tensor, and back."""
    engine.buffered_allreduce_fallback = lambda **_: None


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
    """Save by another checkpoint engine, and nothing beside the checkpoint."""
    before, engine.checkpoint_engine = engine.checkpoint_engine, checkpoint_engine
    # Rank 0 alone would copy DeepSpeed's scripts into the folder, and leave the others waiting when it could not.
    engine._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before


@contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """Count a step of ZeRO-0 in fp32, whose optimizer is torch's own and skips none, and leave the weights alone."""
    update, engine.optimizer.step = engine.optimizer.step, lambda *_, **__: None
    try:
        yield
    finally:
        engine.optimizer.step = update
