"""Finds the settings of a recipe that fit a number of GPUs, the fastest first.

They never change a step's sequences, or the average of its loss. Pure arithmetic, without torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smolconv.continual_pretraining.engine.config import engine_config
from smolconv.continual_pretraining.estimate.estimate import DAY
from smolconv.continual_pretraining.estimate.hardware import GPUS_OF_A_NODE, Gpu
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.estimate.speed import require_bfloat16, step_time
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError
from smolconv.models.spec import ModelSpec

MOST_GPUS = 65_536
#: Micro-batch sizes to try: larger ones do not make matrix products faster.
_MOST_MICRO_BATCH = 128
#: zero_stage and offload, and checkpointing and activation_offload, the simplest first.
_ZERO = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"),
         (3, "all"))  # fmt: skip
_CHECKPOINTING = ((False, False), (True, False), (True, True))


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting with its costs."""

    zero_stage: int
    offload: str
    sequence_ranks: int
    micro_batch_sequences: int
    accumulation_steps: int
    activation_checkpointing: bool
    activation_offload: bool
    gpu_bytes: int
    host_bytes: int  #: of a rank
    seconds_by_part: Mapping[str, float]  #: per step
    seconds_per_step: float
    tokens_per_second: float  #: per GPU
    days: float
    limit: str  #: the part that takes most of a step
    words: tuple[str, ...]  #: options of continue-train for this setting

    @property
    def checkpointing(self) -> str:
        """In a table."""
        return ("to the host" if self.activation_offload else "on") if self.activation_checkpointing else "off"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings for a number of GPUs."""

    gpus: int
    options: tuple[Option, ...]  #: those that fit, the fastest first
    nearest: Option | None  #: if none fits, the one that lacks the least memory
    reason: str | None  #: why there is neither

    def smaller_and_smaller(self) -> Iterator[Option]:
        """The fastest option, then each that needs less memory than all faster ones."""
        least: int | None = None
        for option in self.options:
            if least is None or option.gpu_bytes < least:
                least = option.gpu_bytes
                yield option

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "gpus": self.gpus, "options": [option.to_json() for option in self.options],
            "nearest": self.nearest and self.nearest.to_json(), "reason": self.reason,
        }  # fmt: skip


def check_gpus(counts: Sequence[int]) -> None:
    """Raise ``UsageError`` for invalid numbers of GPUs."""
    for count in counts:
        if not 1 <= count <= MOST_GPUS:
            raise UsageError(f"--gpus has {count}; expected numbers from 1 to {MOST_GPUS:,}, such as --gpus 8,96,384.")
    twice = next((count for count in counts if counts.count(count) > 1), None)
    if twice is not None:
        raise UsageError(f"--gpus has {twice} twice. Give each number once.")


def divisions_that_fit(
    recipe: Recipe, spec: ModelSpec, gpus: int, gpu: Gpu, *, network: float, memory_bytes: int | None = None,
    first_step: int = 1,
) -> Plan:  # fmt: skip
    """Plan for ``gpus`` GPUs of ``memory_bytes`` each, by default the data sheet's; ``network``: bytes/s per GPU.

    Raises ``UsageError`` for a recipe that is not in bfloat16.
    """
    require_bfloat16(recipe)
    limit = memory_bytes or gpu.memory_bytes
    steps = max(0, recipe.schedule.train_steps - first_step + 1)
    fitting: list[Option] = []
    nearest: Option | None = None
    reason = None
    for shape in _divisions(recipe, spec, gpus):
        for (stage, offload), (checkpointing, to_host) in itertools.product(_ZERO, _CHECKPOINTING):
            best: Option | None = None
            for micro in shape.micro_batches:
                given = _changed(
                    recipe, zero_stage=stage, offload=offload, sequence_ranks=shape.sequence_ranks,
                    micro_batch_sequences=micro, activation_checkpointing=checkpointing, activation_offload=to_host,
                )  # fmt: skip
                try:
                    found = _option(recipe, given, spec, gpus, gpu, network, steps)
                except UsageError as error:
                    reason = str(error)
                    continue
                if found.gpu_bytes > limit:
                    nearest = min(nearest or found, found, key=lambda option: option.gpu_bytes)
                    break  # larger ones need more
                best = min(best or found, found, key=_order)
            if best is not None:
                fitting.append(best)
    if fitting:
        return Plan(gpus=gpus, options=tuple(sorted(fitting, key=_order)), nearest=None, reason=None)
    reason = None if nearest else reason or _no_division(recipe, spec, gpus)
    return Plan(gpus=gpus, options=(), nearest=nearest, reason=reason)


def _order(option: Option) -> tuple[float, ...]:
    """Sort by speed, in steps of half a percent; among equals the simplest first, then that with most free memory."""
    return (
        round(_log_steps(option.seconds_per_step)), option.offload != "none", option.activation_offload,
        option.activation_checkpointing, option.sequence_ranks, option.zero_stage, option.gpu_bytes,
    )  # fmt: skip


def _log_steps(seconds: float) -> float:
    return math.log(seconds) / math.log(1.005)


# --- divisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Division:
    """How a step's sequences are divided among ranks."""

    sequence_ranks: int
    micro_batches: tuple[int, ...]  #: sequences of one, ascending


def _divisions(recipe: Recipe, spec: ModelSpec, gpus: int) -> Iterator[_Division]:
    batch, own = recipe.global_batch_sequences, recipe.parallelism.micro_batch_sequences
    # A mean of micro-batch means changes with their size.
    sizes = range(1, _MOST_MICRO_BATCH + 1) if recipe.loss.normalisation == "tokens" else (own,)
    for ranks in range(1, min(spec.num_heads, gpus) + 1):
        if spec.num_heads % ranks or gpus % ranks:
            continue
        groups = gpus // ranks
        fitting = tuple(size for size in sizes if batch % (size * groups) == 0)
        if fitting:
            yield _Division(sequence_ranks=ranks, micro_batches=fitting)


def _no_division(recipe: Recipe, spec: ModelSpec, gpus: int) -> str:
    batch, own = recipe.global_batch_sequences, recipe.parallelism.micro_batch_sequences
    by_tokens = recipe.loss.normalisation == "tokens"
    groups_of = [ranks for ranks in range(1, spec.num_heads + 1) if spec.num_heads % ranks == 0]

    def shared(number: int, size: int) -> bool:
        return any(number % ranks == 0 and batch % (size * (number // ranks)) == 0 for ranks in groups_of)

    # If any micro-batch size divides the batch, one sequence does.
    smallest = 1 if by_tokens else own
    around = range(gpus - 1, 0, -1), range(gpus + 1, min(2 * gpus, MOST_GPUS) + 1)
    near = [next((n for n in numbers if shared(n, smallest)), None) for numbers in around]
    counts = " or ".join(str(n) for n in near if n is not None)
    advice = [f"take {counts} GPUs"] if counts else []
    if not by_tokens and shared(gpus, 1):
        advice.append("let the size of micro-batches vary (--set loss.normalisation=tokens)")
    sizes = "" if by_tokens else f" in micro-batches of {own:,}"
    return (
        f"a global batch of {batch:,} sequences{sizes} cannot be divided evenly among {gpus:,} GPUs: "
        f"{', or '.join([*advice, 'change the global batch'])}."
    )


_SECTIONS = {"activation_checkpointing": "model", "activation_offload": "model"}


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    """Not validated here: ``engine_config`` refuses what DeepSpeed cannot do."""
    model = {name: value for name, value in changes.items() if _SECTIONS.get(name) == "model"}
    parallelism = {name: value for name, value in changes.items() if name not in model}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "parallelism": recipe.parallelism.model_copy(update=parallelism),
        }
    )


def _option(
    recipe: Recipe, given: Recipe, spec: ModelSpec, gpus: int, gpu: Gpu, network: float, steps: int
) -> Option:  # fmt: skip
    accumulation = engine_config(given, gpus, "nccl")["gradient_accumulation_steps"]
    memory, time = memory_parts(given, spec, gpus), step_time(given, spec, gpus, gpu, network)
    parallelism, model = given.parallelism, given.model
    return Option(
        zero_stage=parallelism.zero_stage, offload=parallelism.offload, sequence_ranks=parallelism.sequence_ranks,
        micro_batch_sequences=parallelism.micro_batch_sequences, accumulation_steps=accumulation,
        activation_checkpointing=model.activation_checkpointing, activation_offload=model.activation_offload,
        gpu_bytes=sum(part.bytes for part in memory if part.where == "gpu"),
        host_bytes=sum(part.bytes for part in memory if part.where == "host"),
        seconds_by_part=time.seconds_by_part, seconds_per_step=time.seconds,
        tokens_per_second=recipe.tokens_per_step / time.seconds / gpus, days=steps * time.seconds / DAY,
        limit=time.limit, words=_words(recipe, given, gpus),
    )  # fmt: skip


def _words(recipe: Recipe, given: Recipe, gpus: int) -> tuple[str, ...]:
    """Options for the differences from the recipe, and for the placement of ranks."""
    on_a_node = max(n for n in range(1, min(gpus, GPUS_OF_A_NODE) + 1) if gpus % n == 0)
    nodes = gpus // on_a_node
    # A recipe for one machine may name a launcher that cannot use several nodes.
    launcher = ["--launcher", "slurm"] if nodes > 1 and recipe.launch.nodes == 1 else []
    changes = [
        f"{section}.{name}={str(after[name]).lower()}"
        for section in ("model", "parallelism")
        for before, after in [(vars(getattr(recipe, section)), vars(getattr(given, section)))]
        for name in after
        if before[name] != after[name]
    ]
    sets = itertools.chain.from_iterable(("--set", change) for change in changes)
    return (*sets, *launcher, "--nnodes", str(nodes), "--nproc-per-node", str(on_a_node))
