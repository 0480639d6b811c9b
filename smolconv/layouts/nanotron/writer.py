"""Write a nanotron checkpoint for any TP x PP x DP: the files, names, slices, dtypes and split that nanotron writes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, Slot, TrainingProgress
from smolconv.errors import CorruptFile, UnsupportedModel, UsageError, counted
from smolconv.files import read_bytes
from smolconv.layouts.assets import tokenizer_warnings
from smolconv.layouts.documents import check_config, corrupt_if_malformed
from smolconv.layouts.layout import ArchiveContent, PlannedOutput, archive_file, copied_assets, copied_file, model_card
from smolconv.layouts.nanotron.documents import IMPORT
from smolconv.layouts.nanotron.listing import ASSETS, LATEST, MODEL_CONFIG
from smolconv.layouts.nanotron.schedule import scheduled_lr
from smolconv.layouts.nanotron.stages import data_stages
from smolconv.layouts.nanotron.topology import (
    block_of,
    cut_shard,
    format_slices,
    padded_vocabulary,
    parameters_of_rank,
    pipeline_ranks,
    require_tp,
    slice_pairs,
    splits_heads,
    state_file,
    tensor_parallel,
    weight_path,
    zero1_slices,
)
from smolconv.models.nanotron import nanotron_table, refuse_for_nanotron, spec_from_nanotron, spec_to_nanotron
from smolconv.models.operations import PadVocabulary
from smolconv.models.spec import VOCABULARY, ModelSpec
from smolconv.models.weights import WeightTable
from smolconv.parsing import parse_yaml_mapping
from smolconv.storage.planned import PlannedFile, plain_file
from smolconv.storage.safetensors_file import plan_safetensors
from smolconv.storage.torch_archive.values import Storage, TensorRef
from smolconv.tensors.lazy import LazyTensor, Literal, flat_slice, is_zero

FORMAT = "1.5"
#: Fields of a group that torch.optim.AdamW stores as nanotron builds it.
_ADAMW: Mapping[str, Any] = {
    "lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False,
    "foreach": None, "capturable": False, "differentiable": False, "fused": True, "decoupled_weight_decay": True,
}  # fmt: skip


#: Implementation switches of another trainer's Adam.
_EXECUTION = ("foreach", "capturable", "differentiable", "fused", "bias_correction")


@dataclass(frozen=True, kw_only=True)
class NanotronOptions:
    """The topology to write, and the training config to use if the source has none."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 0  #: 0 or 1, of the optimizer's files
    nanotron_config: Path | None = None  #: a training YAML of nanotron

    def __post_init__(self) -> None:
        for name, value in (("--tp", self.tp), ("--pp", self.pp), ("--dp", self.dp)):
            if value < 1:
                raise UsageError(f"{name} {value}: expected a positive number.")
        if self.zero_stage not in (0, 1):
            raise UsageError(f"--zero-stage {self.zero_stage}: nanotron has 0 and 1.")


def plan_nanotron(checkpoint: Checkpoint, options: NanotronOptions) -> PlannedOutput:
    """Plan every file. Raises ``UsageError`` for a topology that does not fit the model."""
    return _NanotronWriter(checkpoint, options).plan()


class _NanotronWriter:
    """Data that all parts of one plan share; lives for one call."""

    def __init__(self, checkpoint: Checkpoint, options: NanotronOptions) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.warnings: list[str] = []
        refuse_for_nanotron(checkpoint.spec)
        require_tp(checkpoint.spec, options.tp)
        if splits_heads(checkpoint.spec, options.tp):
            self.warnings.append(
                f"TP {options.tp} cuts through the model's {checkpoint.spec.num_heads} query and "
                f"{checkpoint.spec.num_kv_heads} key/value heads: nanotron reads these files, but only at a TP that "
                "divides both."
            )
        self.spec = self._padded_spec()
        self.model_config = self._model_config()
        self.table: WeightTable = nanotron_table(self.spec, interleaved=bool(self.model_config["rope_interleaved"]))
        self.canonical = {rule.layout: rule.canonical for rule in self.table.rules}
        self.names = list(self.canonical)
        self.ranks = pipeline_ranks(self.spec, options.pp)
        self.progress = checkpoint.progress or TrainingProgress(step=0)
        self.step = str(self.progress.step)
        self.config = self._training_config()
        self.layout = {slot: self._layout_tensors(slot) for slot in Slot if checkpoint.tensors.get(slot)}

    def plan(self) -> PlannedOutput:
        with_optimizer, scheduler = self.checkpoint.has_optimizer, self._scheduler()
        files = [
            *self._weights(),
            *(self._optimizer() if with_optimizer else []),
            *scheduler,
            *self._random(),
            *self._documents(),
        ]
        if not with_optimizer or not scheduler:
            switches = (("load_optimizer", not with_optimizer), ("load_lr_scheduler", not scheduler))
            off = " and ".join(f"checkpoints.{name}" for name, missing in switches if missing)
            begins = "" if scheduler else " (it then begins at step 1 of its schedule and its data)"
            self.warnings.append(f"resume in nanotron with {off} false{begins}.")
        if self.config is None:
            self.warnings.append(
                "there is no training config to write as config.yaml, which nanotron's run_generate.py reads: "
                "--nanotron-config YAML gives one."
            )
        return PlannedOutput(files=tuple(files), warnings=tuple(self.warnings))

    # --- model ---

    def _padded_spec(self) -> ModelSpec:
        spec = self.checkpoint.spec
        rows = padded_vocabulary(spec.vocab_size, self.options.tp)
        if rows != spec.vocab_size:
            self.warnings.append(
                f"the vocabulary was padded from {spec.vocab_size} to {rows} rows, as nanotron does for "
                f"TP {self.options.tp}. Converting back removes the padding; once nanotron has trained the "
                f"model, pass --vocab-size {spec.vocab_size}."
            )
        return replace(spec, vocab_size=rows)

    def _model_config(self) -> dict[str, Any]:
        spec, source = self.spec, self.checkpoint.source
        if source.nanotron_config is not None:
            config = {**source.nanotron_config, "vocab_size": spec.vocab_size}
            # The source's document, if it still describes this model: it has switches that are not in the spec.
            if _speaks_of(config, spec):
                return config
        carried = source.hf_config or {}
        config = spec_to_nanotron(spec, carried)
        for name in ("bos_token_id", "eos_token_id"):
            if name in carried and carried[name] is None:
                self.warnings.append(
                    f"{name} is null in the source's config; nanotron needs a number, and {config[name]} was written."
                )
        if spec.rope_scaling is not None:
            self.warnings.append(
                "rope_scaling is written to model_config.json, but nanotron's forward ignores it: training there "
                "changes the model. Converting it back untrained restores the scaling."
            )
        return config

    def _layout_tensors(self, slot: Slot) -> dict[str, LazyTensor]:
        found = dict(self.checkpoint.tensors[slot])
        pad = PadVocabulary(self.checkpoint.spec.vocab_size, self.spec.vocab_size)
        for name in VOCABULARY:
            if name in found:
                found[name] = pad.to_layout([found[name]])
        return self.table.to_layout(found, f"the source ({slot.value})", is_zero)

    def _shards(self, slot: Slot, name: str) -> list[tuple[int | None, LazyTensor, dict[str, str]]]:
        """(rank, shard, metadata) for each tensor-parallel rank; rank None for a parameter that is not split."""
        tensor, cut, tp = self.layout[slot][name], tensor_parallel(name, self.spec), self.options.tp
        if cut is None:
            return [(None, tensor, {})]
        result: list[tuple[int | None, LazyTensor, dict[str, str]]] = []
        for rank in range(tp):
            pairs = slice_pairs(cut, tensor.shape[cut.dim], tp, rank)
            metadata = {
                "version": FORMAT,
                "unsharded_shape": str(tensor.shape),
                "local_global_slices_pairs": format_slices(pairs, cut, len(tensor.shape)),
            }
            result.append((rank, cut_shard(tensor, pairs), metadata))
        return result

    def _weights(self) -> list[PlannedFile]:
        files = []
        for name in self.names:
            pp = self.ranks[block_of(name)]
            for tp, shard, metadata in self._shards(Slot.PARAMETER, name):
                ranks = None if tp is None else (pp, self.options.pp, tp, self.options.tp)
                path = f"{self.step}/{weight_path(name, ranks)}"
                file = plan_safetensors(path, {"data": shard}, metadata, Slot.PARAMETER.value)
                files.append(replace(file, tensors=tuple(replace(tensor, name=name) for tensor in file.tensors)))
        return files

    # --- optimizer ---

    def _optimizer(self) -> list[PlannedFile]:
        options, has_master = self.options, Slot.MASTER in self.layout
        zero1 = options.zero_stage == 1
        if zero1 and has_master:
            self.warnings.append(
                "fp32 masters with ZeRO-1 are written as nanotron of 2024 wrote them (flat slices); later versions "
                "refuse this combination."
            )
        # Split once: the tensors are lazy, and every file picks from them.
        shards: dict[tuple[Slot, str], list[LazyTensor]] = {
            (slot, name): [shard for _, shard, _ in self._shards(slot, name)]
            for slot in self.layout
            for name in self.names
            if slot is not Slot.PARAMETER
        }
        for name in self.names:
            self._require_one_state(name)
        files = [self._optimizer_config(shards)]
        for pp in range(options.pp):
            for dp in range(options.dp) if zero1 else (None,):
                for tp in range(options.tp):
                    files.append(self._optimizer_file(shards, pp, dp, tp))
        return files

    def _optimizer_config(self, shards: Mapping[tuple[Slot, str], list[LazyTensor]]) -> PlannedFile:
        options, configs = self.options, {}
        if options.zero_stage == 1:
            # nanotron's world rank 0 writes this file, so it lists the parameters of pipeline rank 0 only.
            first = {
                name: shards[Slot.EXP_AVG, name][0]
                for name in parameters_of_rank(self.names, self.ranks, 0, tied=self.spec.tied)
            }
            configs = {
                "param_name_to_dp_rank_offsets": {
                    name: {
                        str(rank): [str(start), str(stop)]
                        for rank, (start, stop) in enumerate(zero1_slices(tensor.numel, options.dp))
                        if stop > start
                    }
                    for name, tensor in first.items()
                },
                "orig_param_shapes": {name: [str(n) for n in tensor.shape] for name, tensor in first.items()},
            }
        kind = "OptimizerFromGradientAccumulator" if Slot.MASTER in self.layout else "NamedOptimizer"
        document = {
            "type": "ZeroDistributedOptimizer" if options.zero_stage == 1 else kind,
            "parallelism": {
                "tp_size": str(options.tp), "dp_size": str(options.dp), "pp_size": str(options.pp),
                "expert_parallel_size": "1",
            },
            "configs": configs,
        }  # fmt: skip
        return plain_file(f"{self.step}/optimizer/optimizer_config.json", json.dumps(document).encode())

    def _optimizer_file(
        self, shards: Mapping[tuple[Slot, str], list[LazyTensor]], pp: int, dp: int | None, tp: int
    ) -> PlannedFile:
        options, optimizer = self.options, self.checkpoint.optimizer
        assert optimizer is not None
        names = parameters_of_rank(self.names, self.ranks, pp, tied=self.spec.tied)
        state: dict[int, dict[str, TensorRef]] = {}
        groups: list[dict[str, Any]] = []
        kept: dict[int, str] = {}
        masters: dict[str, LazyTensor] = {}
        contents: dict[Storage, list[ArchiveContent]] = {}

        def mine(slot: Slot, name: str) -> LazyTensor:
            ranks = shards[slot, name]
            tensor = ranks[tp if len(ranks) > 1 else 0]
            return tensor if dp is None else flat_slice(tensor, *zero1_slices(tensor.numel, options.dp)[dp])

        for name in names:
            canonical = self.canonical[name][0]
            values = self._own_values(optimizer.hyperparameters(canonical))
            group = {**({} if "fused" in values else _ADAMW), **values, "params": []}
            groups.append(group)
            moments = {"exp_avg": mine(Slot.EXP_AVG, name), "exp_avg_sq": mine(Slot.EXP_AVG_SQ, name)}
            if moments["exp_avg"].numel == 0:
                continue  # this rank's slice is empty: the group stays, the parameter goes
            index = len(kept)
            kept[index] = name
            group["params"] = [index]
            step = Literal(data=struct.pack("<f", optimizer.steps[canonical]), shape=(), dtype="float32")
            state[index] = {
                key: _own_storage(tensor, contents, name, key) for key, tensor in {"step": step, **moments}.items()
            }
            if Slot.MASTER in self.layout:
                masters[name] = mine(Slot.MASTER, name)
        document: dict[str, Any] = {"state": state, "param_groups": groups, "names": kept}
        if masters:
            document["gradient_accumulator"] = _views_of_one_buffer(masters, contents)
        dp_pair = None if dp is None else (dp, options.dp)
        path = f"{self.step}/" + state_file("optimizer", (pp, options.pp), (tp, options.tp), dp_pair)
        return archive_file(path, document, contents)

    def _own_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters in nanotron's form, without DeepSpeed's implementation switches of Adam."""
        if self.checkpoint.source.engine is None:
            return dict(values)
        factory = ((self.config or {}).get("optimizer") or {}).get("optimizer_factory") or {}
        fused = factory.get("torch_adam_is_fused", True) if isinstance(factory, dict) else True
        known = {key: value for key, value in values.items() if key not in _EXECUTION}
        return {**_ADAMW, **known, "fused": fused}

    def _require_one_state(self, name: str) -> None:
        """A fused parameter has one step and one group; parts with different ones cannot be fused again."""
        optimizer, parts = self.checkpoint.optimizer, self.canonical[name]
        assert optimizer is not None
        if not optimizer.steps.keys() >= set(parts):
            raise CorruptFile(f"the source's Adam state has no steps of {', '.join(parts)}. Pass --no-optimizer.")
        first = (optimizer.steps[parts[0]], dict(optimizer.hyperparameters(parts[0])))
        if any((optimizer.steps[part], dict(optimizer.hyperparameters(part))) != first for part in parts[1:]):
            raise UnsupportedModel(
                f"{', '.join(parts)} have different Adam steps or hyperparameters, but nanotron holds them as one "
                f"parameter ({name}). Pass --no-optimizer to convert the weights only."
            )

    # --- documents ---

    def _scheduler(self) -> list[PlannedFile]:
        state = self._scheduler_state()
        if state is None:
            return []
        files = []
        for pp in range(self.options.pp):
            mine = parameters_of_rank(self.names, self.ranks, pp, tied=self.spec.tied)
            names = [self.canonical[name][0] for name in mine]
            with corrupt_if_malformed("the source's learning-rate schedule"):
                document = {
                    "base_lrs": [state["base_lrs"][name] for name in names],
                    **{key: value for key, value in state.items() if key not in ("base_lrs", "_last_lr")},
                    "_last_lr": [state["_last_lr"][name] for name in names],
                    "lr_lambdas": [{} for _ in names],
                }
            for tp in range(self.options.tp):
                path = f"{self.step}/" + state_file("lr_scheduler", (pp, self.options.pp), (tp, self.options.tp))
                files.append(archive_file(path, document, {}))
        return files

    def _scheduler_state(self) -> Mapping[str, Any] | None:
        if self.config is None:
            return None
        if self.progress.scheduler is not None and self.options.nanotron_config is None:
            return self.progress.scheduler
        if self.options.nanotron_config is None:
            return None
        with corrupt_if_malformed(self.options.nanotron_config):
            base, last = scheduled_lr(self.config, self.progress.step, str(self.options.nanotron_config))
        every = [parts[0] for parts in self.canonical.values()]
        return {
            "base_lrs": dict.fromkeys(every, base), "last_epoch": self.progress.step,
            "_step_count": self.progress.step + 1, "_is_initial": False, "_get_lr_called_within_step": False,
            "_last_lr": dict.fromkeys(every, last),
        }  # fmt: skip

    def _training_config(self) -> dict[str, Any] | None:
        given = self.options.nanotron_config
        original = read_bytes(given) if given is not None else self.checkpoint.source.nanotron_training
        if original is None:
            return None
        where = str(given or "the source's config.yaml")
        config = parse_yaml_mapping(original, where)
        for name in ("parallelism", "optimizer", "general", "model"):
            if not isinstance(config.get(name) or {}, dict):
                raise CorruptFile(f"{where}: {name} is {config[name]!r:.60}; expected a mapping.")
        options = self.options
        parallelism = dict(config.get("parallelism") or {})
        before = parallelism.get("dp", 1)
        parallelism.update(tp=options.tp, pp=options.pp, dp=options.dp, expert_parallel_size=1)
        if "context_parallel_size" in parallelism:
            parallelism["context_parallel_size"] = 1
        config["parallelism"] = parallelism
        config["optimizer"] = {**(config.get("optimizer") or {}), "zero_stage": options.zero_stage}
        if self.checkpoint.has_optimizer:
            config["optimizer"]["accumulate_grad_in_fp32"] = bool(self.checkpoint.tensors.get(Slot.MASTER))
        config["general"] = {
            **(config.get("general") or {}),
            "step": self.progress.step,
            "consumed_train_samples": self.progress.consumed_samples,
        }
        dtype = self.checkpoint.parameters["model.embed_tokens.weight"].dtype
        config["model"] = {**(config.get("model") or {}), "dtype": dtype, "model_config": self.model_config}
        if before != options.dp:
            self.warnings.append(
                f"config.yaml now says dp {options.dp} (was {before}): adjust tokens.batch_accumulation_per_replica "
                "to keep the global batch."
            )
        return config

    def _random(self) -> list[PlannedFile]:
        states = [path for path in self.checkpoint.files if path.parent.name == "random"]
        if not states or self.checkpoint.layout != "nanotron":
            return []
        topology, options = self.checkpoint.topology, self.options
        if (topology.tp, topology.pp, topology.dp) != (options.tp, options.pp, options.dp):
            self.warnings.append(f"random states of {counted(len(states), 'rank')} were dropped: the topology changes.")
            return []
        return [copied_file(f"{self.step}/random/{path.name}", path) for path in states]

    def _documents(self) -> list[PlannedFile]:
        step, assets = self.step, self.checkpoint.assets
        made = {name: data for name, data in self.checkpoint.documents.items() if name not in assets}
        documents = {
            f"{step}/{MODEL_CONFIG}": json.dumps(self.model_config),
            f"{step}/checkpoint_metadata.json": json.dumps(self._metadata(), indent=2, sort_keys=True),
            LATEST: step,
        }
        if self.config is not None:
            import yaml

            documents[f"{step}/config.yaml"] = yaml.safe_dump(self.config, sort_keys=True)
        has_tokenizer, said = tokenizer_warnings(self.checkpoint, needed=False)
        self.warnings += said
        card = model_card(self.checkpoint, "A nanotron checkpoint", has_tokenizer)
        return [
            *(plain_file(path, text.encode()) for path, text in documents.items()),
            plain_file("README.md", card),
            *copied_assets(assets, f"{ASSETS}/"),
            *(plain_file(f"{ASSETS}/{name}", data) for name, data in made.items()),
            # An HF config has fields that are not in the spec; it is restored with the tokenizer.
            *(plain_file(f"{ASSETS}/config.json", data) for data in [self._hf_config()] if data is not None),
        ]

    def _hf_config(self) -> bytes | None:
        config = None if "config.json" in self.checkpoint.assets else self.checkpoint.source.hf_config
        return None if config is None else json.dumps(config).encode()

    def _metadata(self) -> dict[str, Any]:
        """Counts with correct sums: nanotron refuses to load a checkpoint with wrong ones."""
        progress, given = self.progress, self.options.nanotron_config
        chosen = None if given is None else str(given)
        stages, current = data_stages(progress, self.config, chosen=chosen, warnings=self.warnings)
        samples = sum(stage["consumed_train_samples"] for stage in stages)
        tokens = sum(sum(stage["consumed_tokens_per_dataset_folder"].values()) for stage in stages)
        if samples != progress.consumed_samples:
            self.warnings.append(
                f"consumed_train_samples {progress.consumed_samples} became {samples}, the stages' sum."
            )
        if progress.consumed_tokens not in (None, tokens):
            self.warnings.append(f"consumed_tokens_total {progress.consumed_tokens} became {tokens}, the folders' sum.")
        return {
            "version": FORMAT, "tp": self.options.tp, "dp": self.options.dp, "cp": 1,
            "custom_metas": self._custom_metas(),
            "metas": {
                "consumed_train_samples": samples, "consumed_tokens_total": tokens, "last_train_step": progress.step,
                "last_stage_idx": current,
                "data_stages": stages,
            },
        }  # fmt: skip

    def _custom_metas(self) -> dict[str, Any] | None:
        """The source's own, and an import's additions that a later reader needs."""
        original = self.checkpoint.source.nanotron_metadata
        found = None if original is None else original.value.get("custom_metas")
        if isinstance(found, dict):
            found = {name: value for name, value in found.items() if name != IMPORT} or None
        rows, scaled = self.checkpoint.spec.vocab_size, self.spec.rope_scaling is not None
        if rows == self.spec.vocab_size and not scaled:
            return found
        mine = {"step": self.progress.step, "vocab_size": rows, "rope_scaling": scaled}
        return {**(found if isinstance(found, dict) else {}), IMPORT: mine}


def _speaks_of(config: Mapping[str, Any], spec: ModelSpec) -> bool:
    try:
        check_config(config, "model_config.json")
        as_configured = spec.rope_scaling is not None
        known = spec_from_nanotron(config, rope_as_configured=as_configured, architecture=spec.architecture)
    except UnsupportedModel:
        return False
    return known == spec and "rope_interleaved" in config


def _own_storage(tensor: LazyTensor, contents: dict[Storage, list[ArchiveContent]], name: str, key: str) -> TensorRef:
    storage = Storage(dtype=tensor.dtype, numel=tensor.numel)
    contents[storage] = [ArchiveContent(name=name, slot=key, source=tensor)]
    return TensorRef(storage=storage, shape=tensor.shape)


def _views_of_one_buffer(
    tensors: Mapping[str, LazyTensor], contents: dict[Storage, list[ArchiveContent]]
) -> dict[str, TensorRef]:
    """nanotron's masters are views of one flat buffer, and torch.save stores it once."""
    dtype = next(iter(tensors.values())).dtype
    storage = Storage(dtype=dtype, numel=sum(tensor.numel for tensor in tensors.values()))
    contents[storage] = [
        ArchiveContent(name=name, slot=Slot.MASTER.value, source=tensor) for name, tensor in tensors.items()
    ]
    views, at = {}, 0
    for name, tensor in tensors.items():
        views[name] = TensorRef(storage=storage, shape=tensor.shape, offset=at)
        at += tensor.numel
    return views
