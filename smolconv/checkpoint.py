"""``Checkpoint``: lazy tensors by canonical name, with the model's spec, Adam's state and progress."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from smolconv.files import FileState
from smolconv.models.names import StoredNames
from smolconv.models.spec import VOCABULARY, ModelSpec
from smolconv.tensors.lazy import LazyTensor, row_slice


class Slot(str, Enum):
    """The four tensors that a checkpoint may hold for each parameter."""

    PARAMETER = "parameter"
    MASTER = "master"  #: the fp32 weights that the optimizer updates
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"


MOMENTS = (Slot.EXP_AVG, Slot.EXP_AVG_SQ)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share the optimizer's hyperparameters."""

    names: tuple[str, ...]  #: canonical, in the optimizer's order
    hyperparameters: Mapping[
        str, Any
    ]  #: lr, initial_lr, weight_decay, betas, eps, and others that the optimizer stored


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Adam's state besides its moments."""

    steps: Mapping[str, float]  #: canonical name -> Adam's own step count
    groups: tuple[ParameterGroup, ...]
    _by_name: Mapping[str, Mapping[str, Any]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {name: group.hyperparameters for group in self.groups for name in group.names}
        object.__setattr__(self, "_by_name", by_name)

    def hyperparameters(self, name: str) -> Mapping[str, Any]:
        """The hyperparameters of the group of ``name``. Raises ``KeyError`` if it is in no group."""
        return self._by_name[name]


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """One stage of the data mixture, with its consumption."""

    name: str
    start_training_step: int
    consumed_train_samples: int
    sequence_length: int | None = None
    consumed_tokens_per_dataset_folder: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a run has come, counted from its first step."""

    step: int
    consumed_samples: int = 0
    consumed_tokens: int | None = None
    stages: tuple[DataStage, ...] = ()
    last_stage_index: int | None = None
    scheduler: Mapping[str, Any] | None = None  #: LambdaLR's state; its lists are keyed by canonical parameter name

    def __post_init__(self) -> None:
        if self.step < 0 or self.consumed_samples < 0 or (self.consumed_tokens or 0) < 0:
            raise ValueError(
                f"progress cannot be negative: step {self.step}, {self.consumed_samples} samples, "
                f"{self.consumed_tokens} tokens"
            )


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How a checkpoint is split over ranks; ``None`` for dimensions that the layout does not have."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    zero_stage: int | None = None
    world_size: int | None = None
    universal: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document that is carried byte for byte."""

    data: bytes
    value: Mapping[str, Any]  #: its parsed content


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """State that a DeepSpeed engine stored besides the optimizer, for the engine that continues."""

    weights_only: bool = False  #: converted from weights without a step since: only the weights are worth carrying
    client_state: Mapping[str, Any] = field(default_factory=dict)  #: plain values only
    skipped_steps: int = 0
    groups: tuple[ParameterGroup, ...] = ()  #: of the run, even if Adam's state was left out
    lr_scheduler: Any = None  #: its state as plain values
    names: StoredNames = field(default_factory=StoredNames)  #: of its module, perhaps in a wrapper
    tag: str | None = None  #: the folder's name in the run, which some programs require
    loss_scaler: Mapping[str, Any] | None = None  #: of fp16: the attributes of DeepSpeed's scaler, plain values
    left_out: tuple[str, ...] = ()  #: stored objects that cannot be carried, each in a few words


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """Content of the source's documents that no other field holds. A writer of the same layout writes it back."""

    hf_config: Mapping[str, Any] | None = None  #: config.json
    nanotron_config: Mapping[str, Any] | None = None  #: model_config.json
    nanotron_training: bytes | None = None  #: config.yaml
    nanotron_metadata: Document | None = None  #: checkpoint_metadata.json
    engine: EngineRecord | None = None
    others: Mapping[str, bytes] = field(default_factory=dict)  #: carried without being parsed, by name

    @property
    def model_config(self) -> Mapping[str, Any]:
        """Model settings beyond the spec, such as token ids, from either config; empty without one."""
        return self.hf_config or self.nanotron_config or {}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of any layout: lazy, canonical, immutable."""

    layout: str
    root: Path
    spec: ModelSpec
    tensors: Mapping[Slot, Mapping[str, LazyTensor]]
    topology: Topology = Topology()
    optimizer: OptimizerState | None = None
    progress: TrainingProgress | None = None
    assets: Mapping[str, Path] = field(default_factory=dict)  #: tokenizer, generation config, chat template, by name
    documents: Mapping[str, bytes] = field(default_factory=dict)  #: assets that a reader created (GGUF)
    source: SourceRecord = SourceRecord()
    files: tuple[Path, ...] = ()  #: every file that was recognised
    opened: Mapping[Path, FileState] = field(default_factory=dict)  #: opened files, with their state at that moment
    warnings: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  #: parameters that the optimizer does not train
    unpadded_vocab_size: int | None = None  #: the vocabulary's rows before smolconv's writer padded them
    program_files: Mapping[str, Path] = field(
        default_factory=dict
    )  #: of the Trainer around a DeepSpeed engine, by name

    @property
    def parameters(self) -> Mapping[str, LazyTensor]:
        return self.tensors[Slot.PARAMETER]

    @property
    def has_optimizer(self) -> bool:
        return self.optimizer is not None and all(self.tensors.get(slot) for slot in MOMENTS)

    @property
    def revision(self) -> str | None:
        """The Hub commit of which the folder is a snapshot, if its path shows one."""
        parts = Path(os.path.realpath(self.root)).parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def for_another_engine(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint for an engine with the bare model, even if the run that wrote it wrapped its module."""
    engine = checkpoint.source.engine
    if engine is None:
        return checkpoint
    return replace(checkpoint, source=replace(checkpoint.source, engine=replace(engine, names=StoredNames(), tag=None)))


def without_padding(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """The checkpoint with only the first ``rows`` of its vocabulary, in every slot."""
    tensors = {
        slot: {name: row_slice(tensor, 0, rows) if name in VOCABULARY else tensor for name, tensor in found.items()}
        for slot, found in checkpoint.tensors.items()
    }
    spec = replace(checkpoint.spec, vocab_size=rows)
    return replace(checkpoint, tensors=tensors, spec=spec, unpadded_vocab_size=None)
