"""Write a DeepSpeed checkpoint that ``engine.load_checkpoint`` continues from: ZeRO 0 to 3 on any ranks, or universal.

Keys, names and order follow what DeepSpeed 0.19.8 writes, so that its own tools (zero_to_fp32, ds_to_universal) read
the result too.
"""

from __future__ import annotations

import json
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from smolconv.checkpoint import (
    MOMENTS,
    Checkpoint,
    EngineRecord,
    OptimizerState,
    ParameterGroup,
    Slot,
    TrainingProgress,
)
from smolconv.errors import UnsupportedModel, UsageError
from smolconv.files import is_file_name
from smolconv.layouts.assets import tokenizer_warnings
from smolconv.layouts.deepspeed.documents import (
    CLIENT_KEY,
    DEEPSPEED_VERSION,
    MODEL_KEYS,
    SCALER_DEFAULTS,
    STAND_INS,
    fragment_address,
    loss_scaler,
    zero_stage_enum,
)
from smolconv.layouts.deepspeed.files import model_file, optimizer_file
from smolconv.layouts.deepspeed.groups import common_values, master, one_step
from smolconv.layouts.deepspeed.listing import LATEST, LATEST_UNIVERSAL, SOURCE_DOCUMENTS
from smolconv.layouts.deepspeed.partitions import (
    SUB_GROUP_SIZE,
    cut_group,
    cut_piece,
    group_padding,
    partition_numel,
    piece_numel,
    sub_groups,
)
from smolconv.layouts.deepspeed.programs import check_tag, program_documents, program_tag
from smolconv.layouts.layout import ArchiveContent, PlannedOutput, archive_file, copied_assets, hf_config, model_card
from smolconv.layouts.record import documents_of
from smolconv.storage.planned import PlannedFile, plain_file
from smolconv.storage.torch_archive.archive import plan_torch_archive
from smolconv.storage.torch_archive.values import Storage, TensorRef, TorchSize
from smolconv.tensors.lazy import LazyTensor, Literal, Zeros, join, reshape
from smolconv.version import __version__

#: The newest version that ``ds_to_universal`` supports.
_UNIVERSAL_VERSION = 0.4
#: The loss scale fields that ZeRO-0's optimizer stores.
_UNFUSED_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """The format to write: universal unless a stage is given."""

    zero_stage: int | None = None
    world_size: int | None = None
    universal: bool = False
    groups: Path | None = None  #: a JSON file of the parameter groups to write
    sub_group_size: int | None = None  #: elements, of the ZeRO-3 run that continues; DeepSpeed's own by default
    tag: str | None = None  #: the folder's name; by default the source's, or global_stepN
    program: str | None = None  #: that will load it, a key of ``PROGRAMS``

    def __post_init__(self) -> None:
        if self.universal and (self.zero_stage is not None or self.world_size is not None):
            raise UsageError("--universal loads at any stage and world size: leave out --zero-stage, --world-size.")
        if self.zero_stage is None and self.world_size is not None:
            raise UsageError(f"--world-size {self.world_size} needs --zero-stage 1, 2 or 3.")
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise UsageError(f"--zero-stage {self.zero_stage}: DeepSpeed has 0 to 3.")
        if self.zero_stage == 0 and self.world_size not in (None, 1):
            raise UsageError(f"--zero-stage 0 is one file for all ranks: leave out --world-size {self.world_size}.")
        if self.zero_stage and self.world_size is None:
            raise UsageError(f"--zero-stage {self.zero_stage} needs --world-size: the number of data-parallel ranks.")
        if self.world_size is not None and self.world_size < 1:
            raise UsageError(f"--world-size {self.world_size}: expected a positive number.")
        if self.sub_group_size is not None and self.zero_stage != 3:
            raise UsageError(f"--sub-group-size {self.sub_group_size}: only ZeRO-3 has sub-groups (--zero-stage 3).")
        if self.sub_group_size is not None and self.sub_group_size < 1:
            raise UsageError(f"--sub-group-size {self.sub_group_size}: expected a positive number.")
        check_tag(self.tag, self.program)

    @property
    def writes_universal(self) -> bool:
        return self.zero_stage is None

    @property
    def ranks(self) -> int:
        return self.world_size or 1


def plan_deepspeed(checkpoint: Checkpoint, options: DeepSpeedOptions) -> PlannedOutput:
    """Plan every file of a checkpoint that ``with_adam`` completed."""
    return _DeepSpeedWriter(checkpoint, options).plan()


class _DeepSpeedWriter:
    """Data that all parts of one plan share; lives for one call."""

    def __init__(self, checkpoint: Checkpoint, options: DeepSpeedOptions) -> None:
        assert checkpoint.optimizer is not None
        self.checkpoint, self.options = checkpoint, options
        self.optimizer: OptimizerState = checkpoint.optimizer
        self.groups: tuple[ParameterGroup, ...] = self.optimizer.groups
        self.ranks = options.ranks
        self.warnings: list[str] = []
        self.progress = checkpoint.progress or TrainingProgress(step=0)
        self.dtype = checkpoint.parameters["model.embed_tokens.weight"].dtype
        self.known = checkpoint.source.engine or EngineRecord()
        self.tag = self._tag()
        self.stored = self.known.names.stored
        self.scaler = self._loss_scaler()
        self.config = hf_config(checkpoint, self.dtype)
        self._empty_model: bytes | None = None  #: for every ZeRO-3 rank but the first, if nothing is frozen

    def plan(self) -> PlannedOutput:
        if self.options.writes_universal:
            files = self._universal()
        elif self.options.zero_stage == 0:
            files = [self._zero0()]
        elif self.options.zero_stage == 3:
            files = [file for rank in range(self.ranks) for file in self._zero3(rank)]
        else:
            files = [self._model_file(None), *(self._zero12(rank) for rank in range(self.ranks))]
        documents = [
            *self._documents(),
            *program_documents(self.checkpoint, self.options.program, self.options.world_size, self.warnings),
        ]
        if any(file.path.parts[0] == self.tag.split("/")[0] for file in documents):
            raise UsageError(f"--tag {self.tag}: a file next to the tag has that name. Choose another.")
        return PlannedOutput(files=(*files, *documents), warnings=tuple(self.warnings))

    def _tag(self) -> str:
        """The option's, the program's or the source's tag; smolconv's own if the source's states another step."""
        own = f"global_step{self.progress.step}" + ("_universal" if self.options.writes_universal else "")
        if chosen := self.options.tag or program_tag(self.options.program):
            return chosen
        kept = (self.known.tag or "").removesuffix("_universal")
        still = self.checkpoint.progress is not None or not kept[-1:].isdigit()
        numbered = re.fullmatch(r"global_step\d+", kept) is not None
        return kept if kept and still and not numbered and self.options.program is None else own

    def _loss_scaler(self) -> Mapping[str, Any] | None:
        """The source's, if the engine uses fp16; None: a static scale of 1."""
        if self.dtype != "float16":
            return None
        known = self.known.loss_scaler
        if known is None:
            self.warnings.append("a static loss scale of 1 is stored: set the run's own after loading.")
        elif known.get("dynamic") and "delayed_shift" not in known and self.options.zero_stage != 0:
            self.warnings.append("ZeRO-0 stores no hysteresis of the loss scale: DeepSpeed's default, 2, is written.")
        return known

    def _tensor(self, slot: Slot, name: str) -> LazyTensor:
        return master(self.checkpoint, name) if slot is Slot.MASTER else self.checkpoint.tensors[slot][name]

    @property
    def _is_dynamic(self) -> bool:
        return self.scaler is not None and self.scaler.get("dynamic") is True

    # --- model files ---

    def _model_file(self, rank: int | None, optimizer: _Archive | None = None, *, weights: bool = True) -> PlannedFile:
        """``rank`` is None for ZeRO 0 to 2. Without ``weights`` the module holds empty tensors of its dtype."""
        if rank and self._empty_model is not None:
            return plain_file(f"{self.tag}/{model_file(rank)}", self._empty_model)
        archive = optimizer or _Archive()
        spec, stage = self.checkpoint.spec, self.options.zero_stage
        frozen, weights_of = self.checkpoint.frozen, self.checkpoint.parameters
        module: OrderedDict[str, TensorRef] = OrderedDict()
        for name, tensor in weights_of.items():
            # A universal load ignores the module, so only data without another place is stored there.
            stored = weights or (self.options.writes_universal and name in frozen and rank is None)
            own = archive.own(tensor, name, Slot.PARAMETER.value) if stored else archive.empty(tensor.dtype)
            module[self.stored(name)] = own
        head, embedding = self.stored("lm_head.weight"), self.stored("model.embed_tokens.weight")
        tied = spec.tied and not self.known.names.bare  # a model without its head has no second name for the embedding
        if tied:
            module[head] = module[embedding]
        fragments: OrderedDict[str, TensorRef] | None = None
        if stage == 2:
            fragments = OrderedDict((self.stored(name), module[self.stored(name)]) for name in frozen)
        elif rank is not None:
            fragments = OrderedDict(
                (self.stored(name), archive.own(cut_piece(weights_of[name], self.ranks, rank), name, "parameter"))
                for name in frozen
            )
        shapes = [OrderedDict(map(self._shape, names)) for names in self._flat_groups(rank)]
        scheduler, step = self._scheduler(), self.progress.step
        document: dict[str, Any] = {
            "module": module,
            "buffer_names": [],
            "optimizer": None if optimizer is None else optimizer.document,
            "param_shapes": shapes,
            "frozen_param_shapes": None if fragments is None else OrderedDict(map(self._shape, frozen)),
            "shared_params": {head: embedding} if tied and not rank else {},
            "frozen_param_fragments": fragments,
            "lr_scheduler": scheduler,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": self.known.skipped_steps,
            "global_steps": step,
            "global_samples": self.progress.consumed_samples,
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": {"zero_optimization": {"stage": stage or 0}, "bf16": {"enabled": self.dtype == "bfloat16"}},
            "ds_version": DEEPSPEED_VERSION,
            "universal_checkpoint_info": {"universal_checkpoint_version": _UNIVERSAL_VERSION},
            **{key: value for key, value in self.known.client_state.items() if key not in MODEL_KEYS},
            CLIENT_KEY: {
                "version": __version__,
                "progress": json.loads(json.dumps(asdict(self.progress))),
                "config": self.config,
                "weights_only": self.known.weights_only,
            },
        }
        if rank and not any(archive.contents.values()):
            # Made once for all ranks: a file of names only takes longer to make than to write.
            self._empty_model = plan_torch_archive("archive", document).without_data()
            return plain_file(f"{self.tag}/{model_file(rank)}", self._empty_model)
        return archive.file(f"{self.tag}/{model_file(rank)}", document)

    def _shape(self, name: str) -> tuple[str, TorchSize]:
        return self.stored(name), TorchSize(self.checkpoint.parameters[name].shape)

    def _flat_groups(self, rank: int | None) -> list[Sequence[str]]:
        """Names by flat tensor: ZeRO-3 lists its sub-groups."""
        if rank is None or self.options.zero_stage != 3:
            return [group.names for group in self.groups]
        return [names for _, names in self._sub_groups]

    def _scheduler(self) -> dict[str, Any]:
        """For DeepSpeed's schedulers ``last_batch_iteration``, for torch's the rest; step 0 without Adam's state."""
        known, stepped = self.known.lr_scheduler, any(self.optimizer.steps.values())
        if isinstance(known, dict) and stepped:
            return known
        step = self.progress.step if stepped else 0
        return {
            "last_batch_iteration": step - 1, "last_epoch": step, "_step_count": step + 1,
            "lr_lambdas": [None] * len(self.groups),
            "_last_lr": [group.hyperparameters.get("lr", 0.0) for group in self.groups],
        }  # fmt: skip

    # --- optimizer files ---

    def _zero12(self, rank: int) -> PlannedFile:
        archive, ranks, stage = _Archive(), self.ranks, self.options.zero_stage
        assert stage is not None
        numels = [sum(self._shape_numel(name) for name in group.names) for group in self.groups]
        paddings = [group_padding(numel, ranks, rank) for numel in numels]
        state, masters = {}, []
        for g, group in enumerate(self.groups):
            state[g] = {
                "step": archive.scalar(one_step(self.optimizer, group.names), f"group {g}"),
                **{slot.value: archive.own(self._slices[slot, g][rank], f"group {g}", slot.value) for slot in MOMENTS},
            }
        for g in range(len(self.groups)):
            masters.append(archive.own(self._slices[Slot.MASTER, g][rank], f"group {g}", Slot.MASTER.value))
        document = {
            "optimizer_state_dict": {
                "loss_scaler": loss_scaler(self.scaler),
                "dynamic_loss_scale": self._is_dynamic,
                "overflow": False,
                # clip_grad is left out: DeepSpeed would replace the run's own with a stored one.
                "base_optimizer_state": {"state": state, "param_groups": self._param_groups([[g] for g in state])},
                "single_partition_of_fp32_groups": masters,
                "zero_stage": zero_stage_enum(stage),
                "group_paddings": paddings,
                "param_alignment_paddings": [[0] * len(group.names) for group in self.groups],
                "partition_count": [ranks] * len(self.groups),
                "ds_version": DEEPSPEED_VERSION,
                "param_slice_mappings": [self._slice_mapping(group.names, rank) for group in self.groups],
            },
            "ds_config": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": self.dtype == "bfloat16"}},
            "ds_version": DEEPSPEED_VERSION,
        }
        path = f"{self.tag}/{optimizer_file(rank, bf16=self.dtype == 'bfloat16')}"
        return archive.file(path, document)

    @cached_property
    def _slices(self) -> dict[tuple[Slot, int], list[LazyTensor]]:
        """Each group's flat tensor, split over the ranks: moments keep the padding at its end, masters do not."""
        return {
            (slot, g): cut_group(
                [self._tensor(slot, name) for name in group.names], self.ranks, padded=slot is not Slot.MASTER
            )
            for slot in (Slot.MASTER, *MOMENTS)
            for g, group in enumerate(self.groups)
        }

    def _shape_numel(self, name: str) -> int:
        return self.checkpoint.parameters[name].numel

    def _slice_mapping(self, names: Sequence[str], rank: int) -> OrderedDict[str, object]:
        """The position of each parameter in the rank's slice; ds_to_universal reads it."""
        size = partition_numel(sum(map(self._shape_numel, names)), self.ranks)
        first, found, at = rank * size, OrderedDict[str, object](), 0
        for name in names:
            start, stop = max(at, first), min(at + self._shape_numel(name), first + size)
            if start < stop:
                found[self.stored(name)] = fragment_address(stop - start, start - first)
            at += self._shape_numel(name)
        return found

    @cached_property
    def _sub_groups(self) -> list[tuple[int, list[str]]]:
        """(group, names) of every ZeRO-3 sub-group, in order."""
        return [
            (g, [group.names[i] for i in members])
            for g, group in enumerate(self.groups)
            if group.names
            for members in sub_groups(
                [self._shape_numel(name) for name in group.names],
                self.ranks,
                self.options.sub_group_size or SUB_GROUP_SIZE,
            )
        ]

    def _zero3(self, rank: int) -> list[PlannedFile]:
        archive = _Archive()

        def flat(slot: Slot, names: Sequence[str], index: int) -> TensorRef:
            size = sum(piece_numel(self._shape_numel(name), self.ranks) for name in names)
            tensors = [self._tensor(slot, name) for name in names]
            if all(isinstance(tensor, Zeros) for tensor in tensors):
                return archive.own(Zeros(shape=(size,), dtype=tensors[0].dtype), f"sub-group {index}", slot.value)
            tensor = join([cut_piece(tensor, self.ranks, rank) for tensor in tensors], (size,))
            return archive.own(tensor, f"sub-group {index}", slot.value)

        state = {
            index: {
                "step": archive.scalar(one_step(self.optimizer, self.groups[g].names), f"sub-group {index}"),
                **{slot.value: flat(slot, names, index) for slot in MOMENTS},
            }
            for index, (g, names) in enumerate(self._sub_groups)
        }
        members = [[i for i, (owner, _) in enumerate(self._sub_groups) if owner == g] for g in range(len(self.groups))]
        document = {
            "optimizer_state_dict": {
                "zero_stage": zero_stage_enum(3),
                "loss_scaler": loss_scaler(self.scaler),
                "dynamic_loss_scale": self._is_dynamic,
                "overflow": False,
                "partition_count": self.ranks,
                "optimizer_state_dict": {"state": state, "param_groups": self._param_groups(members)},
                "fp32_flat_groups": [
                    flat(Slot.MASTER, names, index) for index, (_, names) in enumerate(self._sub_groups)
                ],
            },
            "ds_config": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": self.dtype == "bfloat16"}},
            "ds_version": DEEPSPEED_VERSION,
        }
        path = f"{self.tag}/{optimizer_file(rank, bf16=self.dtype == 'bfloat16')}"
        return [self._model_file(rank, weights=False), archive.file(path, document)]

    def _zero0(self) -> PlannedFile:
        """Adam's state in the model file: by parameter, as torch numbers them; bf16 as ``FP16_UnfusedOptimizer``."""
        archive = _Archive()
        names = [name for group in self.groups for name in group.names]
        indices = {name: index for index, name in enumerate(names)}
        state = {
            indices[name]: {
                "step": archive.scalar(self.optimizer.steps[name], name),
                **{slot.value: archive.own(self._tensor(slot, name), name, slot.value) for slot in MOMENTS},
            }
            for name in names
        }
        adam: dict[str, Any] = {
            "state": state,
            "param_groups": self._param_groups([[indices[name] for name in group.names] for group in self.groups]),
        }
        if self.dtype != "float32":
            known = {**(SCALER_DEFAULTS if self._is_dynamic else {}), **(self.scaler or {})}
            adam = {
                "dynamic_loss_scale": self._is_dynamic,
                "cur_scale": 1.0,
                "cur_iter": self.progress.step,
                **{key: known[key] for key in _UNFUSED_SCALE if key in known},
                "optimizer_state_dict": adam,
                "fp32_groups": [
                    [archive.own(self._tensor(Slot.MASTER, name), name, Slot.MASTER.value) for name in group.names]
                    for group in self.groups
                ],
            }
        archive.document = adam
        return self._model_file(None, archive)

    def _param_groups(self, members: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        return [{**group.hyperparameters, "params": list(params)} for group, params in zip(self.groups, members)]

    # --- universal ---

    def _universal(self) -> list[PlannedFile]:
        files = []
        zero = f"{self.tag}/zero"
        stems = {Slot.MASTER: "fp32", Slot.EXP_AVG: "exp_avg", Slot.EXP_AVG_SQ: "exp_avg_sq"}
        names = [name for group in self.groups for name in group.names]
        for name in names:
            folder = self.stored(name)
            if not is_file_name(folder):
                raise UnsupportedModel(
                    f"{folder!r:.120} cannot be a folder's name; a universal checkpoint has a folder per parameter.\n"
                    "Expected a name of at most 255 bytes without a slash.\n"
                    "Write it with --zero-stage N --world-size N."
                )
            for slot, stem in stems.items():
                archive = _Archive()
                tensor = reshape(self._tensor(slot, name), self.checkpoint.parameters[name].shape)
                document: object = {"cat_dim": 0, "param": archive.own(tensor, name, slot.value)}
                files.append(archive.file(f"{zero}/{folder}/{stem}.pt", document))
            archive = _Archive()
            step = archive.scalar(self.optimizer.steps[name], name)
            files.append(archive.file(f"{zero}/{folder}/step.pt", step))
        for group in self.groups:
            one_step(self.optimizer, group.names)
        steps = {self.optimizer.steps[name] for name in names}
        if len(steps) > 1:
            self.warnings.append("groups have different Adam steps: a universal load into ZeRO-3 uses only the first.")
        if len(self.groups) > 1:
            self.warnings.append(
                f"loaded into ZeRO-3, DeepSpeed counts one Adam step for all {len(self.groups)} groups, which drifts: "
                "write --zero-stage 3 --world-size N for it, or see docs/deepspeed.md."
            )
        archive = _Archive()
        params = [[g] for g in range(len(self.groups))]
        document = {
            "loss_scaler": loss_scaler(self.scaler),
            "dynamic_loss_scale": self._is_dynamic,
            "overflow": False,
            "ds_version": DEEPSPEED_VERSION,
            "param_groups": self._param_groups(params),  # a load into ZeRO 1 and 2 takes these,
            "optimizer_state_dict": {  # and one into ZeRO-3 these, the first for all
                "state": {0: {"step": archive.scalar(one_step(self.optimizer, self.groups[0].names), "step")}},
                "param_groups": [{**common_values(self.groups), "params": group} for group in params],
            },
        }
        files.append(archive.file(f"{zero}/optimizer_state.pt", document))
        # One for an engine of ZeRO 1 or 2, one for ZeRO-3.
        return [*files, self._model_file(None, weights=False), self._model_file(0, weights=False)]

    # --- documents ---

    def _documents(self) -> list[PlannedFile]:
        checkpoint = self.checkpoint
        assets = {name: path for name, path in checkpoint.assets.items() if name != "config.json"}
        made = {name: data for name, data in checkpoint.documents.items() if name not in assets}
        given = {*assets, *made}
        has_tokenizer, said = tokenizer_warnings(checkpoint, needed=False)
        self.warnings += said
        latest = LATEST_UNIVERSAL if self.options.writes_universal else LATEST
        files = [
            plain_file(latest, self.tag.encode()),
            plain_file("config.json", (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()),
            *copied_assets(assets),
            *(plain_file(name, data) for name, data in made.items()),
            *(
                plain_file(f"{SOURCE_DOCUMENTS}/{name}", data)
                for name, data in documents_of(replace(checkpoint.source, engine=None)).items()
            ),
        ]
        if "README.md" not in given:
            what = "A universal DeepSpeed checkpoint" if self.options.writes_universal else (
                f"A DeepSpeed ZeRO-{self.options.zero_stage} checkpoint of {self.ranks} ranks"
            )  # fmt: skip
            files.append(plain_file("README.md", model_card(checkpoint, what, has_tokenizer)))
        return files


class _Archive:
    """The storages of one file while its document is built."""

    def __init__(self) -> None:
        self.contents: dict[Storage, list[ArchiveContent]] = {}
        self.document: object = None

    def file(self, path: str, document: object) -> PlannedFile:
        return archive_file(path, document, self.contents, allow=STAND_INS)

    def own(self, tensor: LazyTensor, name: str, slot: str) -> TensorRef:
        """A reference to the tensor, in its own storage."""
        storage = Storage(dtype=tensor.dtype, numel=tensor.numel)
        self.contents[storage] = [ArchiveContent(name=name, slot=slot, source=tensor)]
        return TensorRef(storage=storage, shape=tensor.shape)

    def empty(self, dtype: str) -> TensorRef:
        storage = Storage(dtype=dtype, numel=0)
        self.contents[storage] = []
        return TensorRef(storage=storage, shape=(0,))

    def scalar(self, value: float, name: str) -> TensorRef:
        return self.own(Literal(data=struct.pack("<f", value), shape=(), dtype="float32"), name, "step")
