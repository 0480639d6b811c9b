"""What a run will take, before it starts: memory of a rank by part, time, disk, the learning rate, epochs of the data.

Pure arithmetic on a recipe and a model's dimensions. Memory is counted from what DeepSpeed 0.19 allocates, as read in
its source (``engine.py``, ``bf16_optimizer.py``, ``zero/stage_1_and_2.py``, ``zero/stage3.py``) with the settings of
``engine_config``; docs/estimate.md has the formulas and what they leave out.

Letters: N parameters (a tied head counted once), W ranks, b bytes of a weight, S sequence length, E hidden size, F
intermediate size, V vocabulary, Q and K query and key/value rows, H query heads, L layers. GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from smolconv.continual_pretraining.engine.config import accumulation_steps, engine_config
from smolconv.continual_pretraining.engine.optimizer import group_parameters
from smolconv.continual_pretraining.recipe.schedules import Schedule, learning_rate, notes, turning_steps
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError
from smolconv.models.spec import ModelSpec, parameter_shapes

FlopsFormula = Literal["6N", "nanotron"]
#: By which MFU is stated where one number is.
FORMULA: FlopsFormula = "6N"

#: Dense bf16 of an H100 SXM, by NVIDIA's data sheet (with sparsity twice that).
H100_TFLOPS = 989.0
#: What a card sold as 80 GB is asked to hold. It has some 4 GB more, which fragmentation takes.
GPU_MEMORY_BYTES = 80_000_000_000
#: CUDA context, cuBLAS workspaces and NCCL's buffers. Assumed, not measured here.
GPU_RUNTIME_BYTES = 1_500_000_000
#: Elements of gradients that DeepSpeed flattens into one all-reduce: ``MEMORY_OPT_ALLREDUCE_SIZE`` of its engine.py.
ENGINE_REDUCE_ELEMENTS = 500_000_000
#: DeepSpeed's default of ``stage3_max_live_parameters``.
MAX_LIVE_PARAMETERS = 1_000_000_000
#: Logits that exist at once on a GPU: ``MAX_LOGITS`` of ``model.py``, which cannot be imported without torch.
MAX_LOGITS = 2**27
#: Beyond four passes repeated tokens are worth clearly less than new ones (Muennighoff et al., arXiv 2305.16264).
MAX_EPOCHS = 4.0
MIN_SAVE_SECONDS, MAX_SAVE_SECONDS = 5 * 60, 6 * 60 * 60

#: A shorter run, a try, may save as often as it likes.
_LONG_RUN_SECONDS = 60 * 60
_FP32 = 4
_DAY = 86_400
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Memory of one rank for one purpose."""

    name: str
    bytes: int
    where: Literal["gpu", "host"]
    formula: str


@dataclass(frozen=True, kw_only=True)
class SourceUse:
    """What one stage takes of one source, in input tokens."""

    stage: str
    source: str
    tokens: int
    epochs: float | None  #: None: the source's size is not known


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Checkpoints of a run, by its retention policy."""

    checkpoint_bytes: int
    saves: int  #: with the one after the last step
    kept: int
    kept_bytes: int
    peak_bytes: int  #: while the last one is written, before an old one goes
    written_bytes: int  #: over the whole run


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run's needs on ``world_size`` GPUs, at a stated utilisation."""

    name: str
    world_size: int
    parameters: int
    sequence_length: int
    tokens_per_step: int
    accumulation_steps: int
    first_step: int  #: later than 1 where a run, or the source's schedule, goes on
    train_steps: int  #: the last step
    tokens: int  #: from the first step to the last
    flops_per_token: Mapping[str, float]  #: by formula
    mfu: float  #: assumed, by the 6N formula
    mfu_nanotron: float  #: the same speed by nanotron's formula
    peak_tflops: float  #: of one GPU
    tokens_per_second: float  #: of all GPUs
    seconds_per_step: float
    memory: tuple[Part, ...]
    disk: Disk
    save_seconds: float  #: training time between two checkpoints
    learning_rates: tuple[tuple[int, float], ...]  #: (step, rate of that step), where something begins or ends
    learning_rate_curve: tuple[float, ...]  #: evenly spaced from the first step to the last
    sources: tuple[SourceUse, ...]
    warnings: tuple[str, ...]

    @property
    def gpu_bytes(self) -> int:
        return sum(part.bytes for part in self.memory if part.where == "gpu")

    @property
    def host_bytes(self) -> int:
        """Of a rank, for what is offloaded."""
        return sum(part.bytes for part in self.memory if part.where == "host")

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @property
    def steps_per_day(self) -> float:
        return _DAY / self.seconds_per_step

    @property
    def days(self) -> float:
        return self.steps * self.seconds_per_step / _DAY

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        totals = {name: getattr(self, name) for name in ("gpu_bytes", "host_bytes", "steps_per_day", "days")}
        return {"schema": 1, **asdict(self), **totals}


def estimate(
    recipe: Recipe,
    spec: ModelSpec,
    world_size: int,
    *,
    first_step: int = 1,
    tokens_per_source: Mapping[str, int] | None = None,
    mfu: float = 0.3,
) -> Estimate:
    """``mfu`` is by the 6N formula; ``tokens_per_source`` are sizes of token folders by the names of the sources.

    ``first_step`` is the one that training begins with: time, tokens and checkpoints are counted from it.

    Raises ``UsageError`` when the recipe cannot be divided among ``world_size`` ranks.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"an MFU of {mfu} was asked for; it is a share of the GPU's peak, above 0 and at most 1.")
    accumulation = accumulation_steps(recipe, world_size)
    length = recipe.data.sequence_length
    peak = recipe.logging.peak_tflops or H100_TFLOPS
    by_6n, by_nanotron = flops_per_token(spec, length, "6N"), flops_per_token(spec, length, "nanotron")
    tokens_per_second = world_size * peak * 1e12 * mfu / by_6n
    seconds_per_step = recipe.tokens_per_step / tokens_per_second
    memory = memory_parts(recipe, spec, world_size)
    sources = source_uses(recipe, tokens_per_source or {}, first_step)
    steps = max(0, recipe.schedule.train_steps - first_step + 1)
    save_seconds = recipe.checkpoints.every_steps * seconds_per_step
    return Estimate(
        name=recipe.name,
        world_size=world_size,
        parameters=parameter_count(spec),
        sequence_length=length,
        tokens_per_step=recipe.tokens_per_step,
        accumulation_steps=accumulation,
        first_step=first_step,
        train_steps=recipe.schedule.train_steps,
        tokens=steps * recipe.tokens_per_step,
        flops_per_token={"6N": by_6n, "nanotron": by_nanotron},
        mfu=mfu,
        mfu_nanotron=mfu * by_nanotron / by_6n,
        peak_tflops=peak,
        tokens_per_second=tokens_per_second,
        seconds_per_step=seconds_per_step,
        memory=memory,
        disk=disk_use(recipe, spec, first_step),
        save_seconds=save_seconds,
        learning_rates=_learning_rates(recipe),
        learning_rate_curve=_learning_rate_curve(recipe.schedule),
        sources=sources,
        warnings=tuple(_warnings(recipe, memory, sources, steps, save_seconds, tokens_per_source or {})),
    )


# --- model ------------------------------------------------------------------------------------------------------------


def parameter_count(spec: ModelSpec) -> int:
    """A tied head is the embedding, and counted once. SmolLM2-135M: 134,515,008."""
    return sum(_sizes(spec).values())


def flops_per_token(spec: ModelSpec, sequence_length: int, formula: FlopsFormula = FORMULA) -> float:
    """Forward and backward of one input token; recomputed activations do not count.

    - ``6N``: six for every parameter, the embedding (or tied head) among them. Attention's own products do not count.
    - ``nanotron``: three times the forward's matrix products as nanotron's ``get_flops`` counts them: two for every
      element of a layer's matrices and of the head, and 4·Q·S in each layer for attention, over the full row of S
      positions: neither causality nor boundaries of documents make it less. Embedding, norms and biases count nothing.
    """
    if formula == "6N":
        return 6.0 * parameter_count(spec)
    if formula != "nanotron":
        raise ValueError(f"there is no formula {formula!r} for FLOPs; there are 6N and nanotron")
    hidden, query, kv = spec.hidden_size, spec.query_rows, spec.kv_rows
    matrices = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * spec.intermediate_size
    layer = 2 * matrices + 4 * query * sequence_length
    return 3.0 * (spec.num_layers * layer + 2 * hidden * spec.vocab_size)


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in parameter_shapes(spec).items()}


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_parts(recipe: Recipe, spec: ModelSpec, world_size: int) -> tuple[Part, ...]:
    """What a rank holds at its fullest, which is in the backward pass of a step's last micro-batch.

    Padding of flat groups to a multiple of 2W elements is left out, and so is what the allocator cannot use.
    """
    engine = _engine(recipe, spec, world_size)
    parts = [
        *_weight_parts(engine),
        *_gradient_parts(engine),
        *_optimizer_parts(engine),
        _reduction_part(engine),
        *_activation_parts(recipe, spec),
        _gpu("CUDA and NCCL", GPU_RUNTIME_BYTES, "assumed"),
    ]
    return tuple(part for part in parts if part.bytes)


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """What DeepSpeed's allocations depend on."""

    parameters: Mapping[str, int]  #: elements by name
    groups: tuple[int, ...]  #: elements of each optimizer group
    stage: int
    mixed: bool  #: bf16 weights with fp32 masters
    offloads: bool
    offloads_weights: bool
    accumulates: bool
    bucket: int
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
        """Elements of a rank's partition."""
        return math.ceil(self.n / self.world_size) if self.stage else self.n

    @property
    def b(self) -> int:
        return 2 if self.mixed else _FP32

    @property
    def sums_on_parameters(self) -> bool:
        """ZeRO-1 as the stages 1 and 2 share it, which sums fp32 gradients on the parameters. In bf16 without offload
        ZeRO-1 is another class, BF16_Optimizer."""
        return self.stage == 1 and (self.offloads or not self.mixed)


def _engine(recipe: Recipe, spec: ModelSpec, world_size: int) -> _Engine:
    given, sizes = recipe.parallelism, _sizes(spec)
    zero = engine_config(recipe, world_size)["zero_optimization"]
    groups = group_parameters(sizes, recipe.optimizer, tied=spec.tied)
    return _Engine(
        parameters=sizes,
        groups=tuple(sum(sizes[name] for name in group.names) for group in groups),
        stage=given.zero_stage,
        mixed=recipe.model.dtype == "bfloat16",
        offloads=given.offload != "none",
        offloads_weights=given.offload == "all",
        accumulates=accumulation_steps(recipe, world_size) > 1,
        bucket=int(zero["reduce_bucket_size"]),
        prefetched=int(zero.get("stage3_prefetch_bucket_size", 0)),
        world_size=world_size,
    )


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
    own, share = "fp32 gradients of the partition", _FP32 * given.share
    if given.stage == 3:
        yield (_host if given.offloads else _gpu)(own, share, "4·N/W")
        return
    if given.sums_on_parameters:
        yield _gpu("fp32 gradients", _FP32 * given.n, "4·N")
    elif given.stage < 2:
        # The model's own gradients stay allocated: they are zeroed, not freed.
        yield _gpu("gradients", given.b * given.n, f"{given.b}·N")
        if given.mixed:
            yield _gpu("fp32 gradients", _FP32 * given.n, "4·N")
        return
    if given.mixed:
        yield _gpu(own, share, "4·N/W")  # also where the host has its own
    elif not given.offloads:
        # ZeRO-2: the sums so far beside those of a micro-batch.
        yield _gpu(own, given.stage * share, f"{4 * given.stage}·N/W")


def _optimizer_parts(given: _Engine) -> Iterator[Part]:
    share, over = given.share, "N/W" if given.stage else "N"
    part = _host if given.offloads else _gpu
    if given.stage or given.mixed:  # in fp32 ZeRO-0 the weights are the masters
        yield part("fp32 masters", _FP32 * share, f"4·{over}")
    yield part("Adam's moments", 2 * _FP32 * share, f"8·{over}")
    if not given.offloads:
        return
    yield _host("fp32 gradients for Adam", _FP32 * share, "4·N/W")
    if given.stage < 3:
        b = given.b
        yield _host("updated weights on their way back", b * share, f"{b}·N/W")
        yield _gpu("gradient on its way to the host", b * given.largest, f"{b} x largest parameter")
        if given.accumulates:
            yield _host("sums of gradients", b * share, f"{b}·N/W")


def _reduction_part(given: _Engine) -> Part:
    """What gradients are put into for their reduction, flattened into, and cast into fp32."""
    b, bucket = given.b, given.bucket
    cast = _FP32 if given.mixed else 0
    # A parameter larger than the bucket is reduced by itself.
    together = max(min(bucket, given.n), given.largest)
    beside = b * given.largest if given.largest > bucket else 0
    if given.sums_on_parameters:
        size = _FP32 * (bucket + together)
    elif given.world_size == 1 and given.stage < 2:
        size = 0  # the trainer leaves out what would be a copy for nobody
    elif given.stage == 0:
        size = (b + cast) * _flattened_together(given.parameters.values())
    elif given.stage == 1:
        size = _FP32 * _flattened_together(given.groups)
    elif given.stage == 2:
        size = b * bucket + (b + cast) * together + beside
    else:
        size = _FP32 * (bucket + together) + beside
    return _gpu("reduction buffers", size, "bucket, and what is flattened or cast beside it")


def _flattened_together(sizes: Iterable[int]) -> int:
    """Elements of the largest copy that the engine's all-reduce makes; a tensor alone in its bucket is not copied."""
    largest, bucket = 0, list[int]()
    for size in sizes:
        bucket.append(size)
        if len(bucket) > 1:
            largest = max(largest, sum(bucket))
        if sum(bucket) > ENGINE_REDUCE_ELEMENTS:
            bucket = []
    return largest


def _activation_parts(recipe: Recipe, spec: ModelSpec) -> list[Part]:
    """What autograd keeps of a micro-batch of transformers' Llama or SmolLM3, with attention that keeps no scores.

    Of a layer: both norms (input and normalised in fp32 or b, output), rotated q, k and v, attention's output and
    log-sum, and the four rows of the SwiGLU. Liger's kernels keep less: a norm's input and output, and three rows.
    """
    b, fused = _bytes_of(recipe), recipe.model.liger == "on"
    hidden, inner, query = spec.hidden_size, spec.intermediate_size, spec.query_rows
    # In float32, attention on a GPU is given the keys and values of every query head.
    kv = query if b == _FP32 else spec.kv_rows
    positions = recipe.parallelism.micro_batch_sequences * recipe.data.sequence_length
    norm = 2 * b * hidden if fused else (_FP32 + 2 * b) * hidden
    attention = b * (2 * query + 2 * kv) + _FP32 * spec.num_heads
    layer = 2 * norm + attention + (3 if fused else 4) * b * inner
    # Gradients of the widest block, while it is walked back.
    walking = b * (3 * inner + 2 * hidden)
    if recipe.model.activation_checkpointing:
        kept, formula = b * hidden * spec.num_layers + layer, "a layer's input for all layers, and one whole layer"
    else:
        kept, formula = layer * spec.num_layers, "per position: norms, q, k, v, attention, SwiGLU, in all layers"
    # Embedding, last norm, and the gradient of its output, which the loss makes in the forward pass.
    ends = b * hidden + norm + b * hidden
    chunk = min(positions, max(1, MAX_LOGITS // spec.vocab_size))
    # Summed over the chunks in fp32, or one chunk's own in the model's dtype; beside it the product that is added.
    head = (_FP32 + b if chunk < positions else b) * hidden * spec.vocab_size
    return [
        _gpu("activations", positions * (kept + walking + ends), formula),
        _gpu("logits", 2 * _FP32 * chunk * spec.vocab_size, f"8·V for {chunk} positions at once"),
        _gpu("gradient of the head", head, f"{head // (hidden * spec.vocab_size)}·V·E"),
    ]


def _bytes_of(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bfloat16" else _FP32


# --- disk, data, learning rate ----------------------------------------------------------------------------------------


def disk_use(recipe: Recipe, spec: ModelSpec, first_step: int = 1) -> Disk:
    """Sizes of DeepSpeed's checkpoints, whatever the number of ranks: padding and metadata are left out."""
    n, b, policy = parameter_count(spec), _bytes_of(recipe), recipe.checkpoints
    stage, steps = recipe.parallelism.zero_stage, recipe.schedule.train_steps
    masters = _FP32 * n if stage or b < _FP32 else 0  # ZeRO-0 in fp32 trains the weights themselves
    weights = b * n if stage < 3 else 0  # ZeRO-3 saves the masters alone
    size = weights + masters + 2 * _FP32 * n
    regular = steps // policy.every_steps - (first_step - 1) // policy.every_steps
    saves = regular + (steps % policy.every_steps > 0)
    newest = saves if policy.keep is None else min(policy.keep, saves)
    kept = newest
    if policy.keep_every_steps and newest < saves:
        # Older than the newest ones: the regular saves 1..(saves - newest), of which those stay that both steps divide.
        kept += (saves - newest) * policy.every_steps // math.lcm(policy.every_steps, policy.keep_every_steps)
    return Disk(
        checkpoint_bytes=size,
        saves=saves,
        kept=kept,
        kept_bytes=kept * size,
        peak_bytes=min(kept + 1, saves) * size,
        written_bytes=saves * size,
    )


def source_uses(
    recipe: Recipe, tokens_per_source: Mapping[str, int], first_step: int = 1
) -> tuple[SourceUse, ...]:  # fmt: skip
    """By stage and source, from ``first_step`` on. An epoch is the input tokens of a source's whole windows."""
    stages, steps, length = recipe.data.stages, recipe.schedule.train_steps, recipe.data.sequence_length
    ends = [*(stage.start_step for stage in stages[1:]), steps + 1]
    found = []
    for stage, end in zip(stages, ends):
        begin = max(stage.start_step, first_step)
        if begin >= end:
            continue
        for name, weight in zip(stage.names, stage.weights):
            wanted = round((end - begin) * recipe.tokens_per_step * weight)
            epoch = tokens_per_source.get(name, 0) // (length + 1) * length
            found.append(
                SourceUse(stage=stage.name, source=name, tokens=wanted, epochs=wanted / epoch if epoch else None)
            )
    return tuple(found)


def _learning_rates(recipe: Recipe) -> tuple[tuple[int, float], ...]:
    schedule = recipe.schedule
    steps = turning_steps(schedule) | {stage.start_step for stage in recipe.data.stages}
    return tuple((step, learning_rate(schedule, step - 1)) for step in sorted(steps))


def _learning_rate_curve(schedule: Schedule, points: int = 60) -> tuple[float, ...]:
    last = schedule.train_steps - 1
    return tuple(learning_rate(schedule, round(last * i / (points - 1))) for i in range(points))


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warnings(
    recipe: Recipe,
    memory: Sequence[Part],
    sources: Sequence[SourceUse],
    steps: int,
    save_seconds: float,
    tokens_per_source: Mapping[str, int],
) -> Iterable[str]:
    schedule, every = recipe.schedule, recipe.checkpoints.every_steps
    gpu = sum(part.bytes for part in memory if part.where == "gpu")
    if gpu > GPU_MEMORY_BYTES:
        yield (
            f"a rank needs about {_size(gpu)} of GPU memory, more than {_size(GPU_MEMORY_BYTES)}: "
            "a smaller micro-batch, activation_checkpointing, more ranks or a higher zero_stage take less."
        )
    for name in dict.fromkeys(use.source for use in sources):
        epochs = sum(use.epochs or 0 for use in sources if use.source == name)
        if epochs > MAX_EPOCHS:
            yield f"source {name} is read {epochs:.1f} times; beyond {MAX_EPOCHS:g} passes its tokens teach little."
        if 0 < tokens_per_source.get(name, 0) <= recipe.data.sequence_length:
            yield f"source {name} has {tokens_per_source[name]} tokens, less than one window of sequence_length + 1."
    if save_seconds > MAX_SAVE_SECONDS:
        yield f"checkpoints are {save_seconds / 3600:.1f} hours apart; a failure costs half of that on average."
    if save_seconds < MIN_SAVE_SECONDS and steps / every * save_seconds > _LONG_RUN_SECONDS:
        yield f"checkpoints are {save_seconds / 60:.1f} minutes apart; much of the run may go into writing them."
    yield from notes(schedule)


# --- for people -------------------------------------------------------------------------------------------------------


def render(estimate: Estimate) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings with rows of a label and a value, in reading order."""
    given, disk = estimate, estimate.disk
    gpus = f"{given.world_size} GPU{'s' if given.world_size > 1 else ''} of {given.peak_tflops:g} TFLOPS"
    run = [
        ("parameters", f"{given.parameters:,}"),
        ("tokens", f"{given.tokens:,} = {given.steps:,} steps x {given.tokens_per_step:,}"),
        *([("steps", f"{given.first_step:,} to {given.train_steps:,}")] if given.first_step > 1 else []),
        ("a step of a rank", f"{given.accumulation_steps} micro-batches"),
        ("FLOPs per token", ", ".join(f"{flops:.3g} ({name})" for name, flops in given.flops_per_token.items())),
    ]
    speed = [
        ("assumed", f"MFU {given.mfu:.1%} (6N) = {given.mfu_nanotron:.1%} (nanotron's formula) on {gpus}"),
        (
            "tokens per second",
            f"{given.tokens_per_second:,.0f}; {given.tokens_per_second / given.world_size:,.0f} a GPU",
        ),
        ("step", f"{given.seconds_per_step:.3g} s; {given.steps_per_day:,.0f} a day"),
        ("run", f"{given.days:.3g} days"),
    ]
    memory = [
        (f"{part.name}{' (host)' if part.where == 'host' else ''}", f"{_size(part.bytes)}  {part.formula}")
        for part in given.memory
    ]
    memory.append(("together", _size(given.gpu_bytes)))
    if given.host_bytes:
        memory.append(("together (host)", _size(given.host_bytes)))
    checkpoints = [
        ("one checkpoint", _size(disk.checkpoint_bytes)),
        ("every", f"{_duration(given.save_seconds)}; {disk.saves} in all, {_size(disk.written_bytes)} written"),
        ("kept", f"{disk.kept}, {_size(disk.kept_bytes)}; {_size(disk.peak_bytes)} at most"),
    ]
    rates = [(f"step {step:,}", f"{rate:.3g}") for step, rate in given.learning_rates]
    rates.append(("curve", _sparkline(given.learning_rate_curve)))
    data = [(f"{use.stage}: {use.source}", f"{use.tokens:,} tokens, {_epochs(use.epochs)}") for use in given.sources]
    sections = [
        ("Run", run), ("Time", speed), ("Memory of a rank", memory), ("Checkpoints", checkpoints),
        ("Learning rate", rates), ("Data", data),
    ]  # fmt: skip
    if given.warnings:
        sections.append(("Warnings", [("", warning) for warning in given.warnings]))
    return sections


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", _DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def _epochs(epochs: float | None) -> str:
    return "epochs unknown" if epochs is None else f"{epochs:.3g} epochs"


def _sparkline(values: Sequence[float]) -> str:
    top = max(values) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)
