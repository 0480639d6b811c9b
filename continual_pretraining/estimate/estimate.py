"""Estimates a run before it starts: memory of a rank by part, time, disk, the learning rate, epochs of the data.

Pure arithmetic on a recipe and a model's dimensions. GB is 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smolconv.continual_pretraining.engine.config import accumulation_steps
from smolconv.continual_pretraining.estimate.disk import Disk, disk_use
from smolconv.continual_pretraining.estimate.flops import flops_per_token, parameter_count
from smolconv.continual_pretraining.estimate.hardware import ASSUMED_MFU, GPU_MEMORY_BYTES, H100_TFLOPS
from smolconv.continual_pretraining.estimate.memory import Part, memory_parts
from smolconv.continual_pretraining.recipe.schedules import Schedule, learning_rate, notes, turning_steps
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import UsageError
from smolconv.models.spec import ModelSpec

#: After four epochs repeated tokens are clearly worth less than new ones (Muennighoff et al., arXiv 2305.16264).
MAX_EPOCHS = 4.0
MIN_SAVE_SECONDS, MAX_SAVE_SECONDS = 5 * 60, 6 * 60 * 60
DAY = 86_400

#: No warning about frequent saves for a shorter run, which is a trial.
_LONG_RUN_SECONDS = 60 * 60


@dataclass(frozen=True, kw_only=True)
class SourceUse:
    """Input tokens that one stage reads from one source."""

    stage: str
    source: str
    tokens: int
    epochs: float | None  #: None: the source's size is not known


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run's needs on ``world_size`` GPUs, at a stated utilisation; on CPUs, without time."""

    name: str
    world_size: int
    parameters: int
    sequence_length: int
    tokens_per_step: int
    accumulation_steps: int
    sequence_ranks: int  #: ranks that share each micro-batch
    first_step: int  #: later than 1 if a run, or the source's schedule, continues
    train_steps: int  #: the last step
    tokens: int  #: from the first step to the last
    flops_per_token: Mapping[str, float]  #: by formula
    mfu: float | None  #: assumed, by the 6N formula
    mfu_nanotron: float | None  #: the same speed by nanotron's formula
    peak_tflops: float | None  #: of one GPU
    tokens_per_second: float | None  #: of all GPUs
    seconds_per_step: float | None
    memory: tuple[Part, ...]
    disk: Disk
    save_seconds: float | None  #: training time between two checkpoints
    learning_rates: tuple[tuple[int, float], ...]  #: (step, its rate), at the steps where a phase begins or ends
    learning_rate_curve: tuple[float, ...]  #: evenly spaced from the first step to the last
    sources: tuple[SourceUse, ...]
    warnings: tuple[str, ...]

    @property
    def gpu_bytes(self) -> int:
        return sum(part.bytes for part in self.memory if part.where == "gpu")

    @property
    def host_bytes(self) -> int:
        """Host memory of a rank: the offloaded parts; on CPUs, all."""
        return sum(part.bytes for part in self.memory if part.where == "host")

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @property
    def steps_per_day(self) -> float | None:
        return None if self.seconds_per_step is None else DAY / self.seconds_per_step

    @property
    def days(self) -> float | None:
        return None if self.seconds_per_step is None else self.steps * self.seconds_per_step / DAY

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON types."""
        totals = {name: getattr(self, name) for name in ("gpu_bytes", "host_bytes", "steps_per_day", "days")}
        return {"schema": 1, **asdict(self), **totals}


def estimate(
    recipe: Recipe, spec: ModelSpec, world_size: int, *, first_step: int = 1,
    tokens_per_source: Mapping[str, int] | None = None, mfu: float = ASSUMED_MFU, on_gpus: bool = True,
) -> Estimate:  # fmt: skip
    """``mfu`` is by the 6N formula; ``tokens_per_source``: sizes of token folders by source name.

    Without ``on_gpus`` the ranks run on CPUs: memory is that of a process, and time is not estimated.
    ``first_step`` is the first to train: time, tokens and checkpoints are counted from it.

    Raises ``UsageError`` if the recipe cannot be divided among ``world_size`` ranks.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"MFU {mfu} is not possible; expected a share of the GPU's peak, above 0 and at most 1.")
    accumulation = accumulation_steps(recipe, world_size)
    length = recipe.data.sequence_length
    by_6n, by_nanotron = flops_per_token(spec, length, "6N"), flops_per_token(spec, length, "nanotron")
    memory = memory_parts(recipe, spec, world_size, "cuda" if on_gpus else "cpu")
    sources = source_uses(recipe, tokens_per_source or {}, first_step)
    steps = max(0, recipe.schedule.train_steps - first_step + 1)
    time: dict[str, float | None] = dict.fromkeys(
        ("mfu", "mfu_nanotron", "peak_tflops", "tokens_per_second", "seconds_per_step", "save_seconds")
    )
    if on_gpus:
        peak = recipe.logging.peak_tflops or H100_TFLOPS
        tokens_per_second = world_size * peak * 1e12 * mfu / by_6n
        seconds_per_step = recipe.tokens_per_step / tokens_per_second
        time = {
            "mfu": mfu, "mfu_nanotron": mfu * by_nanotron / by_6n, "peak_tflops": peak,
            "tokens_per_second": tokens_per_second, "seconds_per_step": seconds_per_step,
            "save_seconds": recipe.checkpoints.every_steps * seconds_per_step,
        }  # fmt: skip
    return Estimate(
        name=recipe.name, world_size=world_size, parameters=parameter_count(spec), sequence_length=length,
        tokens_per_step=recipe.tokens_per_step, accumulation_steps=accumulation,
        sequence_ranks=recipe.parallelism.sequence_ranks, first_step=first_step,
        train_steps=recipe.schedule.train_steps, tokens=steps * recipe.tokens_per_step,
        flops_per_token={"6N": by_6n, "nanotron": by_nanotron}, **time, memory=memory,
        disk=disk_use(recipe, spec, first_step), learning_rates=_learning_rates(recipe),
        learning_rate_curve=_learning_rate_curve(recipe.schedule), sources=sources,
        warnings=tuple(_warnings(recipe, memory, sources, steps, time["save_seconds"], tokens_per_source or {})),
    )  # fmt: skip


# --- data, learning rate ----------------------------------------------------------------------------------------------


def source_uses(
    recipe: Recipe, tokens_per_source: Mapping[str, int], first_step: int = 1
) -> tuple[SourceUse, ...]:  # fmt: skip
    """Use by stage and source, from ``first_step`` on. An epoch is the input tokens of a source's complete windows."""
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
    recipe: Recipe, memory: Sequence[Part], sources: Sequence[SourceUse], steps: int, save_seconds: float | None,
    tokens_per_source: Mapping[str, int],
) -> Iterable[str]:  # fmt: skip
    schedule, every = recipe.schedule, recipe.checkpoints.every_steps
    gpu = sum(part.bytes for part in memory if part.where == "gpu")
    if gpu > GPU_MEMORY_BYTES:
        yield (
            f"a rank needs about {size_text(gpu)} of GPU memory, more than {size_text(GPU_MEMORY_BYTES)}: "
            "a smaller micro-batch, activation_checkpointing, more ranks, sequence_ranks or a higher zero_stage "
            "take less."
        )
    for name in dict.fromkeys(use.source for use in sources):
        epochs = sum(use.epochs or 0 for use in sources if use.source == name)
        if epochs > MAX_EPOCHS:
            yield f"source {name} is read {epochs:.1f} times; epochs beyond {MAX_EPOCHS:g} improve a model little."
        if 0 < tokens_per_source.get(name, 0) <= recipe.data.sequence_length:
            yield f"source {name} has {tokens_per_source[name]} tokens, less than one window of sequence_length + 1."
    if save_seconds is not None and save_seconds > MAX_SAVE_SECONDS:
        yield f"checkpoints are {save_seconds / 3600:.1f} hours apart; a failure costs half of that on average."
    if (
        save_seconds is not None
        and save_seconds < MIN_SAVE_SECONDS
        and steps / every * save_seconds > _LONG_RUN_SECONDS
    ):
        yield f"checkpoints are {save_seconds / 60:.1f} minutes apart; much of the run may go into writing them."
    yield from notes(schedule)


def size_text(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"
