"""The DeepSpeed configuration of a recipe. What is not said here is DeepSpeed's default."""

from __future__ import annotations

from typing import Any

from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError

#: Elements of a bucket; larger parameters, such as the embedding, go alone. DeepSpeed's default is ten times as much,
#: 2 GB in fp32.
_BUCKET_ELEMENTS = 50_000_000
#: How many logits exist at once, in fp32. On a CPU 128 to 512 rows (V = 49152) took the same time within 3 %; a GPU is
#: given more rows, since every round adds to a gradient of [V, E].
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**27}


def engine_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given as ``config``.

    Gradients are accumulated and reduced in fp32, whatever dtype the model computes in. Learning rate and weight decay
    are not in it: the trainer sets them at every step.

    Raises ``UsageError`` when the recipe cannot be run on ``world_size`` ranks.
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
        # Its way to "scatter" sums every bucket over all ranks just the same, but first copies it slice by slice.
        zero["reduce_scatter"] = False
    if given.zero_stage == 3:
        zero.update(stage3_prefetch_bucket_size=_BUCKET_ELEMENTS, stage3_param_persistence_threshold=100_000)
    if given.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if given.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_batch_size": recipe.global_batch_sequences,
        "train_micro_batch_size_per_gpu": given.micro_batch_sequences,
        "gradient_accumulation_steps": accumulation,
        # ZeRO-0 in fp32 clips without telling the norm, so the trainer does it there.
        "gradient_clipping": 0.0 if given.zero_stage == 0 and not bf16 else recipe.optimizer.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        # A step whose gradients are not finite is left out at every stage, also in bf16.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if given.zero_stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches that a rank computes in one step. Raises ``UsageError`` when ranks cannot share them evenly."""
    micro_batches = recipe.micro_batches_per_step
    if world_size < 1 or micro_batches % world_size:
        fitting = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        shown = fitting if len(fitting) < 13 else [*fitting[:6], "...", *fitting[-5:]]
        raise UsageError(
            f"a global batch of {recipe.global_batch_sequences} sequences is {micro_batches} micro-batches of "
            f"{recipe.parallelism.micro_batch_sequences}, which {world_size} ranks cannot share evenly.\n"
            f"Run on {', '.join(shown)} ranks, or change parallelism.micro_batch_sequences or the global batch."
        )
    return micro_batches // world_size
