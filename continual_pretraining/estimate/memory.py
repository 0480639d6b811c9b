"""Estimates a rank's memory by part, from DeepSpeed 0.19's allocations.

According to its source (``engine.py``, ``bf16_optimizer.py``, ``zero/stage_1_and_2.py``, ``zero/stage3.py``) with the
settings of ``engine_config``; docs/estimate.md has the formulas and what they ignore.

Letters: N parameters (a tied head counted once), W ranks, b bytes of a weight, S sequence length, E hidden size, F
intermediate size, V vocabulary, Q and K query and key/value rows, H query heads, L layers. GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from smolconv.continual_pretraining.engine.config import (
    MAX_LOGITS,
    TILE_TOKENS,
    accumulation_steps,
    engine_config,
    tiles_mlp,
    tokens_of_rank,
)
from smolconv.continual_pretraining.engine.optimizer import group_parameters
from smolconv.continual_pretraining.estimate.flops import parameter_sizes
from smolconv.continual_pretraining.estimate.hardware import GPU_RUNTIME_BYTES
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.layouts.deepspeed.patches import CAST_ELEMENTS
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.registry import family_of
from smolconv.models.spec import ModelSpec

#: Elements of gradients that DeepSpeed flattens into one all-reduce: ``MEMORY_OPT_ALLREDUCE_SIZE`` of its engine.py.
ENGINE_REDUCE_ELEMENTS = 500_000_000
#: DeepSpeed's default of ``stage3_max_live_parameters``.
MAX_LIVE_PARAMETERS = 1_000_000_000
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """Memory of one rank for one purpose."""

    name: str
    bytes: int
    where: Literal["gpu", "host"]
    formula: str


def memory_parts(
    recipe: Recipe, spec: ModelSpec, world_size: int, device: Literal["cuda", "cpu"] = "cuda"
) -> tuple[Part, ...]:  # fmt: skip
    """A rank's peak memory, reached in a step's last micro-batch. On a CPU, all of it is host memory.

    It ignores the padding of flat groups to a multiple of 2W elements, and fragmentation.
    """
    engine = _engine(recipe, spec, world_size)
    parts = [
        *_weight_parts(engine),
        *_gradient_parts(engine),
        *_optimizer_parts(engine),
        _reduction_part(engine),
        *_activation_parts(recipe, spec, MAX_LOGITS[device]),
        *_save_parts(recipe, engine),
    ]
    if device == "cpu":
        parts = [replace(part, where="host") for part in parts]
    else:
        parts.append(_gpu("CUDA and NCCL", GPU_RUNTIME_BYTES, "assumed"))
    return tuple(part for part in parts if part.bytes)


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """The inputs of DeepSpeed's allocations."""

    parameters: Mapping[str, int]  #: elements by name
    groups: tuple[int, ...]  #: elements of each optimizer group
    stage: int
    mixed: bool  #: bf16 weights with fp32 masters
    offloads: bool
    offloads_weights: bool
    accumulates: bool
    reduced: int  #: bytes per gradient element sent between ranks
    bucket: int
    buckets: int  #: with two, one is filled while the other is reduced
    prefetched: int
    world_size: int

    @property
    def n(self) -> int:
        return sum(self.parameters.values())

    @property
    def largest(self) -> int:
        return max(self.parameters.values())

    @property
    def share(self) -> int:
        """The number of elements in a rank's partition."""
        return math.ceil(self.n / self.world_size) if self.stage else self.n

    @property
    def b(self) -> int:
        return 2 if self.mixed else FP32

    @property
    def sums_on_parameters(self) -> bool:
        """Whether ZeRO-1 is the class shared by stages 1 and 2, which sums fp32 gradients on the parameters. In bf16
        without offload ZeRO-1 is another class, BF16_Optimizer."""
        return self.stage == 1 and (self.offloads or not self.mixed)


def _engine(recipe: Recipe, spec: ModelSpec, world_size: int) -> _Engine:
    given, sizes = recipe.parallelism, parameter_sizes(spec)
    zero = engine_config(recipe, world_size, "nccl")["zero_optimization"]
    groups = group_parameters(sizes, recipe.optimizer, tied=spec.tied, family=family_of(spec))
    return _Engine(
        parameters=sizes, groups=tuple(sum(sizes[name] for name in group.names) for group in groups),
        stage=given.zero_stage, mixed=recipe.model.dtype == "bfloat16", offloads=given.offload != "none",
        offloads_weights=given.offload == "all", accumulates=accumulation_steps(recipe, world_size) > 1,
        reduced={"float32": FP32, "bfloat16": 2}[given.reduce_dtype],
        bucket=int(zero["reduce_bucket_size"]), buckets=1 + zero.get("overlap_comm", False),
        prefetched=int(zero.get("stage3_prefetch_bucket_size", 0)),
        world_size=world_size,
    )  # fmt: skip


def _gpu(name: str, size: int, formula: str) -> Part:
    return Part(name=name, bytes=size, where="gpu", formula=formula)


def _host(name: str, size: int, formula: str) -> Part:
    return Part(name=name, bytes=size, where="host", formula=formula)


def _weight_parts(given: _Engine) -> Iterator[Part]:
    b = given.b
    if given.stage < 3:
        yield _gpu("weights", b * given.n, f"{b}·N")
        return
    yield (_host if given.offloads_weights else _gpu)("weights", b * given.share, f"{b}·N/W")
    live = min(given.n, MAX_LIVE_PARAMETERS) + min(given.n, given.prefetched)
    yield _gpu("gathered weights", b * live, f"{b} x (live + prefetched parameters)")


def _gradient_parts(given: _Engine) -> Iterator[Part]:
    own, share = "fp32 gradients of the partition", FP32 * given.share
    if given.stage == 3:
        yield (_host if given.offloads else _gpu)(own, share, "4·N/W")
        return
    if given.sums_on_parameters:
        yield _gpu("fp32 gradients", FP32 * given.n, "4·N")
    elif given.stage < 2:
        # The model's own gradients are zeroed, not freed.
        yield _gpu("gradients", given.b * given.n, f"{given.b}·N")
        if given.mixed:
            yield _gpu("fp32 gradients", FP32 * given.n, "4·N")
        return
    if given.mixed:
        yield _gpu(own, share, "4·N/W")  # also if the host has a copy
    elif not given.offloads:
        # ZeRO-2: the sums so far and those of a micro-batch.
        yield _gpu(own, given.stage * share, f"{4 * given.stage}·N/W")


def _optimizer_parts(given: _Engine) -> Iterator[Part]:
    share, over = given.share, "N/W" if given.stage else "N"
    part = _host if given.offloads else _gpu
    if given.stage or given.mixed:  # in fp32 ZeRO-0 the weights are the masters
        yield part("fp32 masters", FP32 * share, f"4·{over}")
    yield part("Adam's moments", 2 * FP32 * share, f"8·{over}")
    if not given.offloads:
        return
    yield _host("fp32 gradients for Adam", FP32 * share, "4·N/W")
    if given.stage < 3:
        b = given.b
        yield _host("updated weights on their way back", b * share, f"{b}·N/W")
        yield _gpu("gradient on its way to the host", b * given.largest, f"{b} x largest parameter")
        if given.accumulates:
            yield _host("sums of gradients", b * share, f"{b}·N/W")


def _reduction_part(given: _Engine) -> Part:
    """Buffers for reducing gradients: the bucket, its flat copy and its fp32 cast."""
    b, bucket, reduced = given.b, given.bucket, given.reduced
    cast = reduced if reduced != b else 0
    # A parameter larger than the bucket is reduced alone.
    together = max(min(bucket, given.n), given.largest)
    beside = b * given.largest if given.largest > bucket else 0
    if given.sums_on_parameters:
        size = FP32 * (given.buckets * bucket + together) + (reduced * together if reduced < FP32 else 0)
    elif given.world_size == 1 and given.stage < 2:
        size = 0  # the trainer avoids the unused copy
    elif given.stage == 0:
        size = (b + cast) * _flattened_together(given.parameters.values())
    elif given.stage == 1:
        # In place, or in parts: a send and a receive buffer.
        part = min(CAST_ELEMENTS, max(given.groups))
        size = 0 if reduced == FP32 else reduced * (part + math.ceil(part / given.world_size))
    elif given.stage == 2:
        size = b * given.buckets * bucket + (b + cast) * together + beside
    else:
        size = reduced * (bucket + together) + beside
    return _gpu("reduction buffers", size, "bucket, and what is flattened or cast beside it")


def _flattened_together(sizes: Iterable[int]) -> int:
    """Elements of the largest copy in the engine's all-reduce; a tensor alone in its bucket is not copied."""
    largest, bucket = 0, list[int]()
    for size in sizes:
        bucket.append(size)
        if len(bucket) > 1:
            largest = max(largest, sum(bucket))
        if sum(bucket) > ENGINE_REDUCE_ELEMENTS:
            bucket = []
    return largest


def _activation_parts(recipe: Recipe, spec: ModelSpec, most_logits: int) -> list[Part]:
    """The activations of a micro-batch at their peak.

    The peak is at the loss, at the end of the forward pass, or in the first layer of the backward pass.
    """
    given, head_elements = layer_bytes(recipe, spec), spec.hidden_size * spec.vocab_size
    b, positions = given.b, given.positions
    inputs = b * spec.hidden_size * spec.num_layers
    if recipe.model.activation_checkpointing:
        kept, formula, computed_again = inputs, "a layer's input for all layers", True
    else:
        kept, formula, computed_again = given.kept * spec.num_layers, "per position, all that a layer keeps", False
    moved = kept if recipe.model.activation_offload else 0
    if moved:
        kept, formula = b * spec.hidden_size, "a layer's input"
    chunk = min(positions, max(1, most_logits // spec.vocab_size))
    logits, head = _loss_bytes(b, chunk * spec.vocab_size, head_elements, several=chunk < positions)
    loss = [
        _gpu("last norm", positions * (given.norm + b * spec.hidden_size), "its own, and its output's gradient"),
        _gpu("logits", logits, f"{logits // (chunk * spec.vocab_size)}·V for {chunk} positions at once"),
        _gpu("gradient of the head", head, f"{head // head_elements}·V·E"),
    ]
    back = [
        *given.walked_back(computed_again=computed_again),
        # The gradient of a tied head is kept for the embedding's, which comes last.
        _gpu("gradient of the head", b * head_elements if spec.tied else 0, f"{b}·V·E"),
    ]
    return [
        _gpu("activations", positions * kept, formula),
        _host("activations", positions * moved, "a layer's input for all layers"),
        *max(loss, back, key=lambda parts: sum(part.bytes for part in parts)),
    ]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The memory of one layer of transformers' model, in bytes per position of a rank, except for the tiles."""

    b: int
    positions: int
    hidden: int
    norm: int  #: kept for one norm
    attention: int  #: kept
    attention_back: int  #: gradients in attention's backward pass
    mlp: int  #: kept
    mlp_back: int
    made: int  #: kept, or temporary if the MLP is tiled
    tile: int  #: bytes for all positions of a tile
    tile_sums: int  #: bytes

    @property
    def kept(self) -> int:
        """Kept between the passes, without checkpointing."""
        return 2 * self.norm + self.attention + self.mlp

    def walked_back(self, *, computed_again: bool) -> list[Part]:
        """Memory of its backward pass, in addition to what is kept between the passes.

        The MLP comes first, and then frees its memory and its norm's for attention.
        """
        again = self.kept if computed_again else 0
        mlp = self.positions * (self.mlp_back + self.hidden) + self.tile + self.tile_sums
        attention = self.positions * (self.attention_back + self.hidden - self.norm - self.mlp)
        formula = "computed again, with gradients" if computed_again else "gradients"
        if attention > mlp:
            return [_gpu("a layer walked back", self.positions * again + attention, f"{formula} of attention")]
        whole = self.positions * (again + self.mlp_back + self.hidden)
        return [
            _gpu("a layer walked back", whole, f"{formula} of the MLP"),
            _gpu("a tile of the MLP", self.tile, f"SwiGLU and its gradients for {TILE_TOKENS} positions"),
            _gpu("gradients of a tiled MLP", self.tile_sums, "of its weights, summed in fp32"),
        ]


def layer_bytes(recipe: Recipe, spec: ModelSpec) -> Layer:
    """The tensors that autograd keeps, for attention that keeps no scores.

    For both norms: input and normalised input in fp32 or b, and the output. For attention: rotated q, k and v, output
    and log-sum. For the SwiGLU: four rows. Liger's kernels keep less: a norm's input and output, and three rows.
    Attention's backward pass has the gradients of its output, of q, k and v, and those within flash kernels: q's in
    fp32, and k's and v's for every query head.
    """
    b, fused = weight_bytes(recipe), recipe.model.liger == "on"
    hidden, inner, query = spec.hidden_size, spec.intermediate_size, spec.query_rows
    # In float32, attention on a GPU gets the keys and values of every query head.
    kv = query if b == FP32 else spec.kv_rows
    # Neighbours share the tokens, and each gets the keys and values of its query heads.
    ranks, positions = recipe.parallelism.sequence_ranks, tokens_of_rank(recipe)
    kv *= ranks // math.gcd(ranks, spec.num_kv_heads) if kv < query else 1
    attention = b * (2 * query + 2 * kv) + FP32 * spec.num_heads
    if "model.layers.0.self_attn.q_norm.weight" in parameter_shapes(spec):  # one norm for each query and key head
        attention += (b if fused else FP32 + b) * (query + spec.kv_rows) + FP32 * (spec.num_heads + spec.num_kv_heads)
    attention_back = b * (2 * query + 2 * kv) + FP32 * query + (2 * b * query if kv < query else 0)
    norm = 2 * b * hidden if fused else (FP32 + 2 * b) * hidden
    mlp, mlp_back, tiled = (3 if fused else 4) * b * inner, 2 * b * inner, tiles_mlp(recipe)
    return Layer(
        b=b, positions=positions, hidden=b * hidden, norm=norm, attention=attention, attention_back=attention_back,
        made=2 * norm + attention + mlp,
        mlp=0 if tiled else mlp, mlp_back=2 * b * hidden if tiled else mlp_back,
        tile=min(positions, TILE_TOKENS) * (mlp + mlp_back) if tiled else 0,
        tile_sums=(FP32 + b) * 3 * hidden * inner if tiled else 0,
    )  # fmt: skip


def _loss_bytes(b: int, logits: int, head: int, *, several: bool) -> tuple[int, int]:
    """Bytes of a chunk's logits and of the head's gradient, when their sum is largest.

    In bf16 the logits are cast to fp32 before their softmax, 2 + 4 + 4 bytes; then 4, and 2 for their gradients, while
    a product is added to the sum of ``several`` chunks in fp32.
    """
    if b == FP32:
        return 2 * FP32 * logits, FP32 * head
    early = (2 * FP32 + b) * logits, FP32 * head if several else 0
    late = (FP32 + b) * logits, (FP32 + b if several else b) * head
    return max(early, late, key=sum)


def _save_parts(recipe: Recipe, given: _Engine) -> Iterator[Part]:
    """Rank 0's copy of its checkpoint files before writing. Other ranks' files hold no weights."""
    if recipe.checkpoints.asynchronous:
        b, over = given.b, "N/W" if given.stage else "N"
        weights = b * given.n if given.stage < 3 else 0
        state = (3 if given.stage or given.mixed else 2) * FP32  # in fp32 ZeRO-0 the weights are the masters
        formula = f"{b}·N + {state}·{over}" if weights else f"{state}·{over}"
        yield _host("copy for the save under way", weights + state * given.share, formula)


def weight_bytes(recipe: Recipe) -> int:
    """b"""
    return 2 if recipe.model.dtype == "bfloat16" else FP32
