"""The DeepSpeed configuration of a recipe. Everything else keeps DeepSpeed's default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError

#: Elements per bucket; larger parameters, such as the embedding, are sent alone. DeepSpeed's default is ten times as
#: many, 2 GB in fp32.
_BUCKET_ELEMENTS = 50_000_000
#: Logits that exist at once, in fp32. On a CPU, 128 to 512 rows (V = 49152) took the same time within 3 %. A GPU gets
#: more rows, because every round adds to a gradient of [V, E].
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**27}
#: Tokens per tile of the MLP. SmolLM3-3B's widest tensors and their gradients then take 1.1 GB, and products are as
#: large as for two rows of 4k.
TILE_TOKENS = 8192


def engine_config(recipe: Recipe, world_size: int, backend: str = "gloo") -> dict[str, Any]:
    """The ``config`` of ``deepspeed.initialize``, for ranks that exchange gradients by ``backend``.

    Gradients are accumulated in fp32, whatever dtype the model computes in. Learning rate and weight decay are not
    included: the trainer sets them at every step.

    Raises ``UsageError`` if the recipe cannot run on ``world_size`` ranks.
    """
    given = recipe.parallelism
    accumulation = accumulation_steps(recipe, world_size)
    bf16 = recipe.model.dtype == "bfloat16"
    if bf16 and given.zero_stage == 0 and accumulation > 1:
        raise UsageError(
            f"parallelism.zero_stage 0 with bfloat16 and {accumulation} accumulation steps: DeepSpeed would sum the "
            "gradients in bfloat16.\nChoose zero_stage 1, which sums in float32 and needs less memory."
        )
    if bf16 and given.offload != "none" and given.zero_stage < 3 and accumulation > 1:
        raise UsageError(
            f"parallelism.offload with zero_stage {given.zero_stage}, bfloat16 and {accumulation} accumulation steps: "
            "DeepSpeed would sum the gradients in bfloat16 on the host.\n"
            "Choose zero_stage 3, offload: none, or as many ranks as the step has micro-batches."
        )
    zero: dict[str, Any] = {
        "stage": given.zero_stage,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        "contiguous_gradients": True,
    }
    if given.zero_stage in (1, 2):
        zero.update(_reduction(scattered=backend == "nccl" and world_size > 1))
    if given.zero_stage == 3:
        zero.update(stage3_prefetch_bucket_size=_BUCKET_ELEMENTS, stage3_param_persistence_threshold=100_000)
    if given.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if given.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        # Sequence parallelism is hidden from DeepSpeed, which otherwise would not partition its states over all ranks.
        "train_batch_size": recipe.global_batch_sequences * given.sequence_ranks,
        "train_micro_batch_size_per_gpu": given.micro_batch_sequences,
        "gradient_accumulation_steps": accumulation,
        # ZeRO-0 in fp32 clips without returning the norm, so the trainer clips there.
        "gradient_clipping": 0.0 if given.zero_stage == 0 and not bf16 else recipe.optimizer.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[given.reduce_dtype],
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        # Steps with non-finite gradients are skipped at every stage, also in bf16.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if given.zero_stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _reduction(*, scattered: bool) -> dict[str, bool]:
    """How ZeRO-1 and 2 sum gradients: only on the ranks that keep them, or on all.

    The first sends half as much, but gloo implements it by the second, with more copies.
    """
    if not scattered:
        return {"reduce_scatter": False}
    # By default even DeepSpeed's "scatter" sums whole buckets over all ranks.
    return {"reduce_scatter": True, "use_multi_rank_bucket_allreduce": False, "overlap_comm": True}


def accumulation_steps(recipe: Recipe, world_size: int, heads: int | None = None) -> int:
    """Micro-batches that a rank computes in one step, alone or with its group.

    Raises ``UsageError`` with settings that fit if ranks cannot divide them evenly. ``heads``: the model's query heads,
    if known.
    """
    given, micro_batches = recipe.parallelism, recipe.micro_batches_per_step
    data_ranks, rest = divmod(world_size, given.sequence_ranks)
    if data_ranks < 1 or rest or micro_batches % data_ranks:
        groups = f", in groups of {given.sequence_ranks}," if given.sequence_ranks > 1 else ""
        raise UsageError(
            f"a global batch of {recipe.global_batch_sequences} sequences is {micro_batches} micro-batches of "
            f"{given.micro_batch_sequences}, which {world_size} ranks{groups} cannot divide evenly.\n"
            "Choose one of these, the nearest first, or change the global batch:\n  "
            + "\n  ".join(_fitting(recipe, world_size, heads))
        )
    return micro_batches // data_ranks


def _fitting(recipe: Recipe, world_size: int, heads: int | None) -> Iterator[str]:
    """Settings that divide evenly. Other group sizes come first: they change neither the loss nor the batch."""
    given, batch = recipe.parallelism, recipe.global_batch_sequences
    size, micro, micro_batches = given.sequence_ranks, given.micro_batch_sequences, recipe.micro_batches_per_step
    groups = [n for n in divisors(world_size) if micro_batches % (world_size // n) == 0]
    for n in _nearest(size, [n for n in groups if heads is None or heads % n == 0]):
        yield f"parallelism.sequence_ranks={n}" + ("" if heads or n == 1 else ", if it divides the model's query heads")
    *others, last = map(str, _nearest(world_size, [n * size for n in divisors(micro_batches)]))
    yield f"{', '.join(others)} or {last} ranks" if others else f"{last} ranks"
    if world_size and world_size % size == 0:
        for n in _nearest(micro, [n for n in divisors(batch) if batch // n % (world_size // size) == 0]):
            yield f"parallelism.micro_batch_sequences={n}"


def tokens_of_rank(recipe: Recipe) -> int:
    """A rank's tokens of a micro-batch, which its group shares."""
    given = recipe.parallelism
    return -(-given.micro_batch_sequences * recipe.data.sequence_length // given.sequence_ranks)


def tiles_mlp(recipe: Recipe) -> bool:
    """Whether the MLP is computed in tiles of ``TILE_TOKENS``, and recomputed in tiles in the backward pass.

    Activation checkpointing recomputes it anyway; with it, "auto" uses tiles if a rank has more than two. The
    published 4k recipes have fewer.
    """
    given, tokens = recipe.model, tokens_of_rank(recipe)
    if given.tiled_mlp == "auto":
        return given.activation_checkpointing and tokens > 2 * TILE_TOKENS
    return given.tiled_mlp == "on" and tokens > TILE_TOKENS


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(to: int, numbers: Sequence[int], count: int = 3) -> list[int]:
    """By ratio."""
    others = (n for n in numbers if n != to)
    return sorted(others, key=lambda n: (max(n, to) / max(min(n, to), 1), n))[:count]
