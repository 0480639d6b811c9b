"""A recipe: one training run, as YAML and as a validated ``Recipe``.

Steps are counted from 1: step k makes the k-th optimizer update of the run, at the learning rate of k - 1 completed
steps. A sequence is a row of ``data.sequence_length`` input tokens; sizes of batches are whole sequences.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from smolconv.continual_pretraining.launchers.registry import LauncherName
from smolconv.continual_pretraining.recipe.schedules import Schedule
from smolconv.continual_pretraining.recipe.section import (
    NO_SWITCH,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from smolconv.errors import UsageError
from smolconv.hub.address import require_known


def _local(path: str) -> str:
    try:
        require_known(path)
    except UsageError as error:
        raise ValueError(str(error).replace("\n", " ").removesuffix(".")) from None
    return path


HubRepository = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
LocalPath = Annotated[str, AfterValidator(_local)]
Beta = Annotated[float, Field(ge=0, lt=1), NO_SWITCH]
Threads = Annotated[int, Field(gt=0, le=1024), NO_SWITCH]
Silence = Annotated[int, Field(ge=10), NO_SWITCH]


class Model(Section):
    """The model to train, and how to compute its forward pass. The architecture is read from the source."""

    source: str  #: a checkpoint of any layout, or hf://owner/name
    config: str | None = None  #: for a source without one, like convert's --config
    architecture: str | None = None  #: of a nanotron source, like convert's --architecture
    step: NotNegative | None = None  #: which one of a run folder with several
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  #: of weights and activations; masters are always float32
    rope_theta: PositiveFloat | None = None  #: to change the source's, for long context
    max_positions: Positive | None = None  #: the same for its context
    allow_lowering: bool = False  #: allow values below the source's, which raise the initial loss
    attention: Literal["auto", "flash", "varlen", "documents"] = "auto"
    activation_checkpointing: bool = False
    activation_offload: bool = False  #: keep checkpointed layer inputs in host memory
    tiled_mlp: Literal["auto", "on", "off"] = "auto"  #: auto: with checkpointing and over 16,384 tokens per rank
    liger: Literal["auto", "on", "off"] = "auto"  #: auto: when installed and on a GPU
    compile: bool = False


class Start(Section):
    """What to take from the source besides its weights; each field is independent."""

    optimizer: bool = False  #: Adam's masters, moments and step
    learning_rate: bool = False  #: continue at the source's step of the schedule; off: at step 1
    data: bool = False  #: continue at the source's position in the data; off: at its beginning
    gate: bool = True  #: compare the first loss with the source model's, and refuse to train if they differ
    gate_tolerance: PositiveFloat | None = None  #: None: 1e-4 in float32, 0.02 in bfloat16


class Source(Section):
    """A folder of datatrove token files, and its share of a stage."""

    path: str
    weight: PositiveFloat = 1.0  #: shares are normalised to a sum of 1 within their stage
    name: str | None = None  #: in metrics; None: the folder's name
    recorded_as: str | None = None  #: the source checkpoint's name for it, such as s3://...; None: this path


def _names(sources: Sequence[Source]) -> tuple[str, ...]:
    return tuple(source.name or source.path.rstrip("/").rpartition("/")[2] for source in sources)


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two sources are named {twice[0]!r}: give one of them another name")


class Stage(Section):
    """The sources to blend from a step on; each stage starts a new blend."""

    name: str
    start_step: Positive = 1
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @property
    def weights(self) -> tuple[float, ...]:
        """The normalised weights, in the order of the sources."""
        total = sum(source.weight for source in self.sources)
        return tuple(source.weight / total for source in self.sources)

    @property
    def names(self) -> tuple[str, ...]:
        return _names(self.sources)

    @model_validator(mode="after")
    def _told_apart(self) -> Stage:
        _check_names(self.names)
        if not all(weight > 0 for weight in self.weights):
            raise ValueError("sources: the weights are so large or so different that one share is 0")
        return self


class Data(Section):
    """The tokens to train on, and their order. Token files are read in windows of sequence_length + 1 tokens."""

    sequence_length: Positive
    eos_token_id: NotNegative  #: ends a document; compared with the files' boundaries
    boundaries: Literal["eos", "index"] = "eos"  #: where documents begin: after an EOS, or by the .ds.index
    mask_documents: bool = True  #: attention stays within a document, and its first token is not predicted
    file_seed: NotNegative | None = None  #: permutes a folder's files; None: sorted
    loss_masks: bool = True  #: exclude tokens from the loss that a .ds.loss file marks with 0
    on_change: Literal["refuse", "restart-source"] = "refuse"  #: if a source's files changed since the checkpoint
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> Data:
        steps = [stage.start_step for stage in self.stages]
        if steps[0] != 1 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"stages start at steps {steps}: the first must be 1, and each later than the previous")
        if len({stage.name for stage in self.stages}) < len(steps):
            raise ValueError("two stages have the same name")
        return self


class Optimizer(Section):
    """AdamW with decoupled weight decay on fp32 masters."""

    weight_decay: NotNegativeFloat | None = None  #: None: as the family was pretrained, 0.01 for Llama, else 0.1
    no_decay: tuple[str, ...] | None = None  #: regexes from a name's start; None: by family, Llama [], else embedding
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: NotNegativeFloat = 1.0  #: 0: no clipping

    @field_validator("no_decay")
    @classmethod
    def _are_regexes(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class Parallelism(Section):
    """How a step is divided: ranks, ZeRO, micro-batches."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"  #: "all" (ZeRO-3): parameters too
    sequence_ranks: Positive = 1  #: neighbouring ranks that share each micro-batch's tokens; divides the query heads
    micro_batch_sequences: Positive = 1
    global_batch_sequences: Positive | None = None  #: give this or global_batch_tokens
    global_batch_tokens: Positive | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  #: of gradients between ranks; bfloat16 rounds their sums
    threads: Threads | None = None  #: of a rank on CPU; None: the machine's cores divided by its ranks


class Loss(Section):
    """The loss: cross entropy in float32."""

    normalisation: Literal["micro-batches", "tokens"] = "micro-batches"  #: mean of micro-batch means, or of all tokens


class Checkpoints(Section):
    """When to save checkpoints, and which to keep."""

    every_steps: Positive = 1000
    keep: Positive | None = None  #: how many of the newest to keep; None: all
    keep_every_steps: Positive | None = None  #: always keep these, whatever ``keep`` says
    asynchronous: bool = True  #: continue training while a copy in host memory is written
    on_full_disk: Literal["stop", "continue"] = "stop"
    on_damage: Literal["stop", "previous"] = "stop"  #: if the latest is damaged: refuse, or resume from an earlier one


class Logging(Section):
    """Where to report the run, besides its metrics.jsonl."""

    every_steps: Positive = 1  #: lines on the terminal; metrics.jsonl has every step
    tensorboard: bool = False
    trackio: str | None = None  #: the project's name
    wandb: str | None = None  #: the project's name
    peak_tflops: PositiveFloat | None = None  #: of one GPU, dense bf16, for MFU; None: by the device's name


class Spikes(Section):
    """Losses far above the recent ones. A skipped step is counted and logged, but changes no weights."""

    action: Literal["log", "skip"] = "log"
    sigmas: PositiveFloat = 6.0
    window_steps: Annotated[int, Field(ge=8), NO_SWITCH] = 128


TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][^\s,]*$")]


class Evaluation(Section):
    """Loss on held-out token files, before the first step and then regularly; tasks on saved checkpoints."""

    every_steps: Positive | None = None  #: needed with sources
    sequences: Positive = 64  #: of each source, from its beginning
    sources: tuple[Source, ...] = ()
    tasks: tuple[TaskName, ...] = ()  #: names for `smolconv evaluate`; they run during training
    tasks_every_steps: Positive | None = None  #: of saved steps and the last one; None: every saved step
    tasks_as: Literal["process", "slurm"] = "process"  #: on rank 0's node, or as a separate job
    tasks_device: Literal["cpu", "cuda"] = "cpu"  #: cuda in a process takes memory of rank 0's first GPU
    include_path: str | None = None  #: a folder with your own lm-eval tasks

    @model_validator(mode="after")
    def _told_apart(self) -> Evaluation:
        _check_names(_names(self.sources))
        if not self.sources and not self.tasks:
            raise ValueError("evaluation: give sources with every_steps, or tasks")
        if bool(self.sources) != (self.every_steps is not None):
            raise ValueError("evaluation: sources and every_steps need each other")
        if not self.tasks and (self.tasks_every_steps or self.include_path):
            raise ValueError("evaluation: tasks_every_steps and include_path need tasks")
        return self


class Export(Section):
    """What to write to ``export/`` after the last step, from the last checkpoint."""

    formats: Annotated[tuple[Literal["hf", "nanotron"], ...], Field(min_length=1)] = ("hf",)
    verify: bool = True
    push: HubRepository | None = None  #: owner/name on the Hub, for hf
    optimizer: bool = False  #: include Adam's state and the progress

    @model_validator(mode="after")
    def _pushes_what_is_written(self) -> Export:
        if self.push is not None and "hf" not in self.formats:
            raise ValueError(f"export.push uploads the hf format, which is not among export.formats {self.formats}")
        return self


class Slurm(Section):
    """Lines of the batch script."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    gpus_per_node: NotNegative | None = None  #: None: ranks per node, unless options ask for GPUs; 0: train on CPUs
    cpus_per_task: Positive | None = None
    signal_seconds: Positive = 300  #: SIGUSR1 this long before the walltime: the run saves and is requeued
    requeue: bool = True
    setup: tuple[str, ...] = ()  #: shell lines before the run, such as loading modules or activating an environment
    options: tuple[str, ...] = ()  #: further #SBATCH options, such as "--exclusive"


class Launch(Section):
    """Where the ranks run. Command-line options override these."""

    launcher: LauncherName = "local"
    nodes: Positive = 1
    ranks_per_node: Positive | None = None  #: None: one per GPU, or 1 on CPU
    hostfile: str | None = None
    rendezvous: str | None = None  #: host:port, for torchrun over several nodes
    least_nodes: Positive | None = None  #: continue with at least this many if others are lost; None: only with all
    silence_seconds: Silence = 60  #: a rank without a sign of life for this long ends the run
    environment: dict[Variable, str] = Field(default_factory=dict)
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _least(self) -> Launch:
        if self.least_nodes is not None and self.least_nodes > self.nodes:
            raise ValueError(f"launch.least_nodes {self.least_nodes} is more than launch.nodes {self.nodes}")
        return self


class Recipe(Section):
    """Everything that decides what a run computes, and where it runs."""

    name: str
    description: str = ""
    output: LocalPath = "run"  #: the run's folder
    seed: NotNegative = 0  #: of torch; training draws no random numbers
    model: Model
    start: Start = Start()
    data: Data
    schedule: Schedule
    optimizer: Optimizer = Optimizer()
    parallelism: Parallelism = Parallelism()
    loss: Loss = Loss()
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()
    spikes: Spikes = Spikes()
    evaluation: Evaluation | None = None  #: None: no evaluation
    export: Export | None = None  #: None: nothing is exported; {} for the defaults below
    launch: Launch = Launch()

    @property
    def global_batch_sequences(self) -> int:
        given = self.parallelism
        if given.global_batch_sequences is not None:
            return given.global_batch_sequences
        return (given.global_batch_tokens or 0) // self.data.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_sequences * self.data.sequence_length

    @property
    def micro_batches_per_step(self) -> int:
        """Data-parallel ranks times accumulation steps, which does not depend on the number of ranks."""
        return self.global_batch_sequences // self.parallelism.micro_batch_sequences

    @model_validator(mode="after")
    def _batch(self) -> Recipe:
        given = self.parallelism
        if (given.global_batch_sequences is None) == (given.global_batch_tokens is None):
            raise ValueError("parallelism: give one of global_batch_sequences and global_batch_tokens")
        if given.global_batch_tokens and given.global_batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"parallelism.global_batch_tokens {given.global_batch_tokens} is not a multiple of "
                f"data.sequence_length {self.data.sequence_length}"
            )
        if self.global_batch_sequences % given.micro_batch_sequences:
            raise ValueError(
                f"parallelism: a global batch of {self.global_batch_sequences} sequences cannot be divided into "
                f"micro-batches of {given.micro_batch_sequences}"
            )
        if self.model.activation_offload and not self.model.activation_checkpointing:
            raise ValueError(
                "model.activation_offload needs model.activation_checkpointing: it offloads the inputs kept"
            )
        if given.offload == "all" and given.zero_stage != 3:
            raise ValueError("parallelism.offload: all needs zero_stage 3")
        if given.offload != "none" and given.zero_stage == 0:
            raise ValueError("parallelism.offload needs zero_stage 1, 2 or 3")
        evaluated = None if self.evaluation is None else self.evaluation.tasks_every_steps
        if evaluated and evaluated % self.checkpoints.every_steps:
            raise ValueError(
                f"evaluation.tasks_every_steps {evaluated} is not a multiple of checkpoints.every_steps "
                f"{self.checkpoints.every_steps}: tasks run on saved checkpoints"
            )
        for stage in self.data.stages[1:]:
            if stage.start_step > self.schedule.train_steps:
                raise ValueError(f"data: stage {stage.name} starts at step {stage.start_step}, after the last step")
        return self
