"""Estimates the time of a step on GPUs, from what they must compute, move and send.

Calibrated on published runs of H100s in bf16 with dense models of 1 to 8 billion parameters; benchmarks/plan.py
compares them with this estimate. We measured nothing here on a GPU; other GPUs are estimated by their data sheets.

Letters: E hidden size, F intermediate size, V vocabulary, Q and K query and key/value rows, S sequence length, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smolconv.continual_pretraining.engine.config import MAX_LOGITS, accumulation_steps
from smolconv.continual_pretraining.estimate.communication import ZeroTraffic, sequence_traffic, zero_traffic
from smolconv.continual_pretraining.estimate.flops import parameter_count
from smolconv.continual_pretraining.estimate.hardware import GPUS_OF_A_NODE, Gpu
from smolconv.continual_pretraining.estimate.memory import FP32, MAX_LIVE_PARAMETERS, layer_bytes, weight_bytes
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError
from smolconv.models.spec import ModelSpec

#: Shares of the peak: in matrix products, whose memory traffic is counted separately, and in causal attention, where
#: only the computed half of the FLOPs counts and the backward pass recomputes the scores. Both were fitted to
#: llm-foundry's MPT-3B at 4,096 tokens; attention's alone explains the extra time of rows of 8,192 to 65,536 tokens.
PRODUCTS_SHARE, ATTENTION_SHARE = 0.72, 0.15
#: Share of the data sheets' bytes/s. Assumed.
MEMORY_SHARE, LINK_SHARE = 0.8, 0.8
#: How often a layer's activations cross the memory bus besides the products: written, read, read again in the
#: backward pass, and as a gradient. Assumed: kernels are not fused.
PASSES = 4
#: Bytes per logit: in bf16 from the product, to fp32, softmax, gradient, its cast, and two products that read it.
LOGIT_BYTES = 26
#: Kernels of a layer's forward and backward pass, and Python's time to launch one. Assumed.
KERNELS_OF_A_LAYER, KERNEL_SECONDS = 150, 5e-6
#: Bytes/s between a GPU and its host (PCIe 5 x16), and of host memory for each of 8 GPUs. Assumed.
HOST_LINK, HOST_MEMORY = 50e9, 50e9
#: Shares of the work in the forward and the backward pass.
_BACKWARD = 2 / 3
#: The same for attention: 2 products in the forward pass and 5 in the backward pass.
_ATTENTION_FORWARD = 2 / 7
#: Bytes of masters, moments and a gradient that an update reads and writes, and of the weight that it writes.
_UPDATE_BYTES = 28


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by part. The parts are sequential; overlapped work is not included."""

    seconds_by_part: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_part.values())

    @property
    def limit(self) -> str:
        """The largest part."""
        return max(self.seconds_by_part, key=self.seconds_by_part.__getitem__)


def step_time(recipe: Recipe, spec: ModelSpec, world_size: int, gpu: Gpu, network: float) -> StepTime:
    """The time of a step on ``world_size`` GPUs; ``network``: bytes/s that each sends to other nodes.

    Assumes documents as long as rows; attention takes less for shorter ones. Raises ``UsageError`` for a recipe that
    cannot be divided this way, or is not in bfloat16.
    """
    require_bfloat16(recipe)
    accumulation = accumulation_steps(recipe, world_size)
    parts = _micro_batch(recipe, spec, gpu)
    busy = sum(parts.values())
    waiting = spec.num_layers * KERNELS_OF_A_LAYER * KERNEL_SECONDS
    if recipe.model.activation_checkpointing:
        waiting *= 4 / 3
    parts["kernel starts"] = max(0.0, waiting - busy)
    within = world_size <= GPUS_OF_A_NODE
    parts["sequence ranks"] = _between_sequence_ranks(recipe, spec) / (LINK_SHARE * _bandwidth(
        recipe.parallelism.sequence_ranks <= GPUS_OF_A_NODE, gpu, network
    ))  # fmt: skip
    traffic = _zero_traffic(recipe, spec, world_size, accumulation)
    computing = max(busy, waiting) * accumulation
    exposed = _exposed(recipe, traffic, LINK_SHARE * _bandwidth(within, gpu, network), computing)
    host = _host_seconds(recipe, spec, world_size, accumulation)
    update = _update_bytes(recipe, spec, world_size, accumulation) / (MEMORY_SHARE * gpu.memory_bandwidth)
    return StepTime(
        seconds_by_part={
            **{name: seconds * accumulation for name, seconds in parts.items()},
            "gradients and weights": exposed, "optimizer": update, "host": host,
        }
    )  # fmt: skip


def require_bfloat16(recipe: Recipe) -> None:
    """Raise ``UsageError`` for a recipe whose time cannot be estimated."""
    if recipe.model.dtype != "bfloat16":
        raise UsageError(
            f"model.dtype is {recipe.model.dtype}: the time of a step can be estimated for bfloat16 only.\n"
            "Add --set model.dtype=bfloat16, or see continue-train --dry-run for the memory."
        )


def _micro_batch(recipe: Recipe, spec: ModelSpec, gpu: Gpu) -> dict[str, float]:
    """Seconds of a rank's forward and backward passes."""
    given, b = layer_bytes(recipe, spec), weight_bytes(recipe)
    positions, layers = given.positions, spec.num_layers
    hidden, inner, query, kv = spec.hidden_size, spec.intermediate_size, spec.query_rows, spec.kv_rows
    products = ((hidden, query), (hidden, kv), (hidden, kv), (query, hidden), *2 * ((hidden, inner),), (inner, hidden))
    # Three products per matrix: one forward, two backward.
    flops = 6.0 * positions * layers * sum(rows * columns for rows, columns in products)
    moved = 3.0 * b * layers * sum(positions * (rows + columns) + rows * columns for rows, columns in products)
    attention = 7.0 * query * recipe.data.sequence_length * positions * layers
    kept = float(PASSES) * positions * given.made * layers
    if recipe.model.activation_checkpointing:  # recomputes the layers' forward pass
        flops, moved, kept = flops * 4 / 3, moved * 4 / 3, kept * 4 / 3
        attention *= 1 + _ATTENTION_FORWARD
    head = hidden * spec.vocab_size
    chunks = -(-positions // max(1, MAX_LOGITS["cuda"] // spec.vocab_size))
    flops += 6 * positions * head
    moved += LOGIT_BYTES * positions * spec.vocab_size + chunks * head * (2 * FP32 + 3 * b)
    peak = (recipe.logging.peak_tflops or gpu.tflops) * 1e12
    bandwidth = MEMORY_SHARE * gpu.memory_bandwidth
    return {
        "matrix products": flops / (PRODUCTS_SHARE * peak) + moved / bandwidth,
        "attention": attention / (ATTENTION_SHARE * peak),
        "norms and activations": kept / bandwidth,
    }


# --- between ranks ----------------------------------------------------------------------------------------------------


def _bandwidth(within_a_node: bool, gpu: Gpu, network: float) -> float:
    return gpu.link_bandwidth if within_a_node else min(network, gpu.link_bandwidth)


def _between_sequence_ranks(recipe: Recipe, spec: ModelSpec) -> float:
    """Bytes per micro-batch, for which attention waits."""
    given, ranks = layer_bytes(recipe, spec), recipe.parallelism.sequence_ranks
    passes = 3 if recipe.model.activation_checkpointing else 2
    rows = given.attention - FP32 * spec.num_heads  # q, k, v and the output
    return given.positions * spec.num_layers * sequence_traffic(rows, ranks, passes=passes)


def _zero_traffic(recipe: Recipe, spec: ModelSpec, world_size: int, accumulation: int) -> ZeroTraffic:
    parameters, given = parameter_count(spec), recipe.parallelism
    regathered = parameters > MAX_LIVE_PARAMETERS or given.offload == "all"
    if given.zero_stage == 3 and regathered and spec.tied:
        parameters += spec.hidden_size * spec.vocab_size  # gathered again for the head
    return zero_traffic(
        given.zero_stage, parameters, world_size, accumulation, weight_bytes=weight_bytes(recipe),
        gradient_bytes=2 if given.reduce_dtype == "bfloat16" else FP32, gathers_for_each_pass=regathered,
    )  # fmt: skip


def _exposed(recipe: Recipe, traffic: ZeroTraffic, bandwidth: float, computing: float) -> float:
    """Seconds per step in which ranks wait for communication.

    ZeRO-0, and ZeRO-1 in bf16, send after the last backward pass. ZeRO-2 reduces during each backward pass, and ZeRO-3
    communicates during both passes.
    """
    gradients, weights = traffic.gradients / bandwidth, traffic.weights / bandwidth
    if recipe.parallelism.zero_stage < 2:
        return gradients + weights
    if recipe.parallelism.zero_stage == 2:
        return max(0.0, gradients - _BACKWARD * computing) + weights
    return max(0.0, gradients + weights - computing)


# --- optimizer and host -----------------------------------------------------------------------------------------------


def _share(recipe: Recipe, spec: ModelSpec, world_size: int) -> float:
    return parameter_count(spec) / (world_size if recipe.parallelism.zero_stage else 1)


def _update_bytes(recipe: Recipe, spec: ModelSpec, world_size: int, accumulation: int) -> float:
    """Seconds of memory traffic per step: adding gradients in fp32 after each micro-batch, and the update."""
    b, offloads = weight_bytes(recipe), recipe.parallelism.offload != "none"
    added = accumulation * (2 * FP32 + 2 * b) * parameter_count(spec)
    return added + (0 if offloads else (_UPDATE_BYTES + b) * _share(recipe, spec, world_size))


def _host_seconds(recipe: Recipe, spec: ModelSpec, world_size: int, accumulation: int) -> float:
    """Seconds of offloading, none of which is overlapped."""
    b, share, found = weight_bytes(recipe), _share(recipe, spec, world_size), 0.0
    if recipe.parallelism.offload != "none":
        found += (FP32 + b) * share / HOST_LINK + (_UPDATE_BYTES + b) * share / HOST_MEMORY
    if recipe.parallelism.offload == "all":
        found += 2 * accumulation * b * share / HOST_LINK
    if recipe.model.activation_offload:
        given = layer_bytes(recipe, spec)
        found += 2 * accumulation * given.positions * given.hidden * spec.num_layers / HOST_LINK
    return found
