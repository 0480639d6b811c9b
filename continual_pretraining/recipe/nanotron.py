"""Translates nanotron's training YAML to a recipe, and accounts for every field.

A field is carried over, dropped for a stated reason, or unknown. Fields are named by their dotted place in the YAML.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smolconv.continual_pretraining.recipe.files import parse_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.tokens.eos import KNOWN_EOS, eos_of_folder
from smolconv.errors import BadCheckpoint, SmolconvError, UsageError, first_line, some_of
from smolconv.files import read_bytes
from smolconv.hub.address import is_hub_uri
from smolconv.hub.download import open_source
from smolconv.layouts.documents import check_config, is_number
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.models.nanotron import nanotron_interleaved, nanotron_table, spec_from_nanotron
from smolconv.models.spec import ModelSpec
from smolconv.parsing import parse_yaml_mapping

#: Patterns of dropped fields, with the reason. The first match counts.
_DROPPED = {
    "model.model_config.z_loss_*": "z-loss is not computed here (SmolLM3's was switched off)",
    "model.model_config.*": "the model's shape is read from the checkpoint",
    "model.init_method*": "weights come from the checkpoint",
    "model.make_vocab_size_divisible_by": "the vocabulary is the checkpoint's",
    "model.ddp_bucket_cap_mb": "DeepSpeed chooses its own buckets",
    "parallelism.expert_parallel_size": "mixtures of experts are refused",
    "parallelism.moe_layer_recompute": "mixtures of experts are refused",
    "parallelism.[tp]p*": "there is no tensor or pipeline parallelism",
    "optimizer.accumulate_grad_in_fp32": "gradients are always accumulated in float32",
    "optimizer.optimizer_factory.torch_adam_is_fused": "the fastest Adam of the machine is chosen",
    "tokens.limit_*": "evaluation is set by the section evaluation",
    "tokens.val_check_interval": "evaluation is set by the section evaluation",
    "checkpoints.checkpoints_path_is_shared_file_system": "checkpoints lie on one file system that all nodes see",
    "checkpoints.save_initial_state": "the source is the initial state",
    "checkpoints.save_final_state": "the last step is always saved",
    "general.consumed_train_samples": "progress is read from the checkpoint",
    "general.step": "progress is read from the checkpoint",
    "general.benchmark_csv_path": "metrics.jsonl has the same numbers",
    "general.ignore_sanity_checks": "checks are not optional",
    "general.project": "set logging.trackio or logging.wandb to report to a project",
    "logging.log_level*": "log levels are the command line's -q and -v",
    "metrics_logging*": "metrics.jsonl has every step",
    "lighteval*": "use smolconv evaluate on the checkpoints",
    "profiler*": "there is no profiler",
    "s3_upload*": "checkpoints stay on disk; export.push uploads the result",
    "tokenizer*": "the data is already tokenised; its EOS is data.eos_token_id",
    "data_stages.*.data.num_loading_workers": "one thread prefetches",
    "data_stages.*.data.seed": "it permutes files only with shuffle_files",
    "data_stages.*.data.dataset.token*": "read from the .ds.metadata files",
    "data_stages.*.data.dataset.vocab_size": "the vocabulary is the checkpoint's",
    "data_stages.*.data.dataset.return_positions": "data.mask_documents decides",
    "data_stages.*.data.dataset.use_old_brrr_dataloader": "there is one reader",
    "data_stages.*.data.dataset.skip_in_stream": "there is one reader",
    "data_stages.*.data.dataset.pad_samples_to_global_batch_size": "a source restarts at its end",
    "data_stages.*.data.dataset.dataset_max_tokens": "a source is used whole",
}  # fmt: skip


T = TypeVar("T", int, float, bool)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A recipe translated from a YAML, with the fate of each of its fields."""

    recipe: Recipe
    carried: Mapping[str, str]  #: field -> its place in the recipe
    dropped: Mapping[str, str]  #: field -> the reason
    unknown: tuple[str, ...]  #: fields that nanotron's published configs do not have
    notes: tuple[str, ...]  #: what the user should check


def recipe_from_nanotron(path: Path, *, eos: int | None = None, source: str | None = None) -> Translation:
    """Translate the training config at ``path``.

    ``eos`` is the data's end-of-document token; it is required unless the tokenizer's is known. ``source`` is the
    checkpoint to start from; by default the one that the YAML resumes from, else the one that it writes.

    Raises ``UsageError`` if no recipe trains the same.
    """
    try:
        config = parse_yaml_mapping(read_bytes(path), path)
    except BadCheckpoint as error:
        raise UsageError(str(error)) from None
    try:
        return _Translator(config, path).translate(eos, source)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: a field has an unexpected type ({error}); expected nanotron's config.") from None


class _Translator:
    """Takes fields out of a config one by one, and records the use of each."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.config, self.path = config, path
        self.left = dict(_leaves(config))
        self.carried: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []

    def take(self, field: str, to: str, default: Any = None, *, needed: bool = False) -> Any:
        """The field's value, carried over to ``to``; null counts as missing."""
        value = self.left.pop(field, None)
        if field in _all(self.config):
            self.carried[field] = to
        if value is not None:
            return value
        if needed:
            raise UsageError(f"{self.path}: {field} is missing. Expected a training config of nanotron.")
        return default

    def take_a(self, kind: type[T], field: str, to: str, default: T | None = None, *, needed: bool = False) -> T:
        """The same, for a number or a switch. nanotron, too, refuses a config with any other type."""
        value = self.take(field, to, default, needed=needed)
        if isinstance(value, str) and kind is not bool:
            with suppress(ValueError):  # YAML 1.1 reads 2e-4 as text
                value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UsageError(f"{self.path}: {field} is {value!r:.60}; expected {_KINDS[kind]}.")
        return value

    def drop(self, field: str, reason: str) -> Any:
        if field not in self.left:
            return None
        self.dropped[field] = reason
        return self.left.pop(field)

    def translate(self, eos: int | None, source: str | None) -> Translation:
        run = str(self.take("general.run", "name", "from-nanotron"))
        self.sequence_length = self.take_a(int, "tokens.sequence_length", "data.sequence_length", needed=True)
        values = {
            "name": run,
            "description": f"from nanotron's {self.path.name}",
            "output": f"runs/{re.sub(r'[^A-Za-z0-9._-]+', '-', run)}",
            "seed": self.take("general.seed", "seed", 42),
            "model": self._model(source),
            "start": self._start(),
            "data": self._data(eos),
            "schedule": self._schedule(),
            "optimizer": self._optimizer(),
            "parallelism": self._parallelism(),
            "checkpoints": {
                "every_steps": self.take("checkpoints.checkpoint_interval", "checkpoints.every_steps", 1000)
            },
            "logging": {"every_steps": self.take("logging.iteration_step_info_interval", "logging.every_steps", 1)},
        }
        unknown = []
        for field in list(self.left):
            reason = next((why for pattern, why in _DROPPED.items() if fnmatch.fnmatchcase(field, pattern)), None)
            if reason is None:
                unknown.append(field)
            else:
                self.drop(field, reason)
        if unknown:
            self.notes.append(f"unknown fields, not carried: {', '.join(unknown)}.")
        recipe = parse_recipe(json.dumps(values), f"made from {self.path}")
        return Translation(
            recipe=recipe,
            carried=self.carried,
            dropped=self.dropped,
            unknown=tuple(unknown),
            notes=tuple(self.notes),
        )

    def _model(self, source: str | None) -> dict[str, Any]:
        resumed, written = "checkpoints.resume_checkpoint_path", "checkpoints.checkpoints_path"
        if source is not None:
            self.drop(resumed, "--source is given")
            self.drop(written, "--source is given; the run's folder is output")
        elif self.left.get(resumed):
            source = self.take(resumed, "model.source")
            self.drop(written, "the run's folder is output")
        else:
            self.drop(resumed, "it is null: the run itself is the source")
            source = self.take(written, "model.source", needed=True)
        self._note_unreadable("model.source", [str(source)], "copy it to this machine, or give --source")
        dtype = self.take("model.dtype", "model.dtype", "bfloat16")
        if dtype not in ("bfloat16", "float32"):
            raise UsageError(f"{self.path}: model.dtype is {dtype!r}; expected bfloat16 or float32.")
        if self.left.get("model.model_config.z_loss_enabled"):
            self.notes.append("z-loss is enabled in the YAML and is not computed here: the loss differs by it.")
        theta = self.take("model.model_config.rope_theta", "model.rope_theta")
        positions = self.take("model.model_config.max_position_embeddings", "model.max_positions")
        spec = self._spec_of(str(source))
        return {
            "source": str(source),
            "dtype": dtype,
            "rope_theta": self._not_lower("rope_theta", theta, None if spec is None else spec.rope_theta),
            "max_positions": self._not_lower("max_positions", positions, None if spec is None else spec.max_positions),
            "activation_checkpointing": self.take_a(
                bool, "parallelism.recompute_layer", "model.activation_checkpointing", False
            ),
        }

    def _spec_of(self, source: str) -> ModelSpec | None:
        """The source's spec, if it can be read here; from the Hub only its headers."""
        try:
            return read_checkpoint(open_source(source, headers_only=True), ReadOptions(optimizer=False)).spec
        except (SmolconvError, OSError) as error:
            if is_hub_uri(source):
                self.notes.append(f"could not read rope theta and context of {source}: {first_line(error)}")
            return None

    def _not_lower(self, name: str, wanted: float | None, own: float | None) -> float | None:
        """The recipe's rope theta or context; None if it equals the source's or is lower."""
        if wanted is None or own is None or wanted == own:
            return None if own is not None else wanted
        does = "left out, because it would lower it" if wanted < own else "raised, as for a long-context stage"
        self.notes.append(f"model.{name}: the YAML says {wanted:,.12g}, the source {own:,.12g}: {does}.")
        return None if wanted < own else wanted

    def _start(self) -> dict[str, bool]:
        # nanotron takes step and data stages only together with the scheduler (nanotron#253).
        progress = self.take_a(bool, "checkpoints.load_lr_scheduler", "start.learning_rate, start.data", True)
        return {
            "optimizer": self.take_a(bool, "checkpoints.load_optimizer", "start.optimizer", True),
            "learning_rate": progress,
            "data": progress,
        }

    # --- data ---------------------------------------------------------------------------------------------------

    def _data(self, eos: int | None) -> dict[str, Any]:
        stages = self.config.get("data_stages")
        if not isinstance(stages, list) or not stages:
            raise UsageError(f"{self.path}: data_stages is missing. Expected a training config of nanotron.")
        found = [self._stage(f"data_stages.{i}", stage) for i, stage in enumerate(stages)]
        shuffled = {seed for _, seed in found}
        if len(shuffled) > 1:
            raise UsageError(
                f"{self.path}: the stages permute their files by different seeds ({shuffled}), a recipe has one. "
                "Write one config per stage."
            )
        masking = "model.model_config._use_doc_masking"
        return {
            "sequence_length": self.sequence_length,
            "eos_token_id": self._eos(eos),
            # nanotron's Llama never masks documents.
            "mask_documents": self.take_a(bool, masking, "data.mask_documents", False),
            "file_seed": shuffled.pop(),
            # nanotron also sorts its stages.
            "stages": sorted((stage for stage, _ in found), key=lambda stage: int(stage["start_step"])),
        }

    def _stage(self, at: str, stage: Any) -> tuple[dict[str, Any], int | None]:
        to = at.replace("data_stages", "data.stages")
        length = self.take(f"{at}.sequence_length", "data.sequence_length", self.sequence_length)
        if length != self.sequence_length:
            raise UsageError(
                f"{self.path}: {at}.sequence_length is {length}, tokens.sequence_length {self.sequence_length}; a "
                "recipe has one. Make a config of each stage."
            )
        name = str(self.take(f"{at}.name", f"{to}.name", needed=True))
        made = {
            "name": name,
            "start_step": self.take(f"{at}.start_training_step", f"{to}.start_step", needed=True),
            "sources": self._sources(f"{at}.data.dataset", f"{to}.sources", name),
        }
        shuffled = self.take_a(bool, f"{at}.data.dataset.shuffle_files", "data.file_seed", False)
        return made, self.take_a(int, f"{at}.data.seed", "data.file_seed", 42) if shuffled else None

    def _weights_by_folder(self, at: str, to: str) -> dict[str, Any]:
        """Folders with weights as nanotron's Nanoset had them until September 2024: ``dataset_folder`` is a mapping."""
        begin = f"{at}.dataset_folder."
        fields = [field for field in self.left if field.startswith(begin)]
        found = {field.removeprefix(begin): self.take(field, f"{to}.*.weight", needed=True) for field in fields}
        if odd := next((folder for folder, weight in found.items() if not is_number(weight)), None):
            raise UsageError(f"{self.path}: {begin}{odd} is {found[odd]!r:.60}; expected the folder's weight.")
        return found

    def _sources(self, at: str, to: str, stage: str) -> list[dict[str, Any]]:
        by_folder = self._weights_by_folder(at, to)
        # nanotron reads the local copy if one is named.
        folders = _listed(self.take(f"{at}.dataset_read_path", f"{to}.*.path"))
        if folders:
            # The name by which its checkpoints count tokens.
            recorded = _listed(self.take(f"{at}.dataset_folder", f"{to}.*.recorded_as"))
        else:
            folders = list(by_folder) or _listed(self.take(f"{at}.dataset_folder", f"{to}.*.path"))
            recorded = folders
        if not folders:
            placeholder = f"data/{re.sub(r'[^A-Za-z0-9._-]+', '-', stage)}"
            other = self.drop(f"{at}.hf_dataset_or_datasets", "tokenise it first: smolconv tokenize")
            for field in [field for field in self.left if field == at or field.startswith(f"{at}.")]:
                self.drop(field, "it does not describe token files")
            self.notes.append(
                f"stage {stage!r} has no token files ({other or 'random tokens'}): put a folder of tokens at "
                f"{placeholder}."
            )
            return [{"path": placeholder, "weight": 1.0}]
        weights = list(by_folder.values()) or self.take(f"{at}.dataset_weights", f"{to}.*.weight")
        if not weights and len(folders) > 1:
            self.notes.append(
                f"stage {stage!r} gives no weights: its {len(folders)} folders get equal shares, as in nanotron since "
                "April 2025. Its reader Nanoset, before that, gives shares by their numbers of tokens."
            )
        weights = weights or [1.0] * len(folders)
        if len(weights) != len(folders):
            raise UsageError(f"{self.path}: {at} has {len(folders)} folders and {len(weights)} weights.")
        if len(recorded) != len(folders):
            recorded = folders
        sources = []
        for folder, of_record, weight, name in zip(folders, recorded, weights, unique_names(folders)):
            if not weight:
                self.notes.append(f"stage {stage!r}: {folder} has weight 0 and was left out.")
                continue
            plain = str(folder).rstrip("/").rpartition("/")[2] == name
            source = {"path": str(folder), "weight": weight} | ({} if plain else {"name": name})
            sources.append(source | ({} if of_record == folder else {"recorded_as": str(of_record)}))
        read = [source["path"] for source in sources]
        self._note_unreadable(f"{to}.*.path", read, "replace each by a folder of token files on this machine")
        return sources

    def _note_unreadable(self, field: str, paths: list[str], remedy: str) -> None:
        """Note the paths that cannot be read: on S3, or on another machine's disks."""
        local = [path for path in paths if path.startswith("/") and not os.path.lexists(path)]
        remote = [path for path in paths if path.startswith("s3:")]
        for found, why in ((remote, "on S3, which smolconv does not read"), (local, "not on this machine")):
            if found:
                count, verb = (f"{len(found)} folders (", ") are") if len(found) > 1 else ("", " is")
                self.notes.append(f"{field}: {count}{some_of(found, 2)}{verb} {why}: {remedy}.")

    def _eos(self, given: int | None) -> int:
        name = self.left.get("tokenizer.tokenizer_name_or_path")
        configured = self.left.get("model.model_config.eos_token_id")
        eos = given
        if eos is None and isinstance(name, str):
            own = eos_of_folder(Path(name))  # like transformers, which first looks for a folder of that name
            eos = KNOWN_EOS.get(name) if own is None else own
        if eos is None:
            raise UsageError(
                f"{self.path}: the end-of-document token is not known: nanotron asks the tokenizer "
                f"({name}), which is not a local folder, and model_config.eos_token_id ({configured}) may differ. "
                "Pass the token that ends the data's documents with --eos ID."
            )
        if configured is not None and configured != eos:
            self.notes.append(
                f"data.eos_token_id is {eos}, model_config.eos_token_id {configured}: compare with the data "
                "(smolconv data inspect)."
            )
        return eos

    # --- training -----------------------------------------------------------------------------------------------

    def _schedule(self) -> dict[str, Any]:
        at = "optimizer.learning_rate_scheduler."
        steps = self.take_a(int, "tokens.train_steps", "schedule.train_steps", needed=True)
        peak = self.take_a(float, f"{at}learning_rate", "schedule.peak_lr", needed=True)
        warmup = self.take_a(int, f"{at}lr_warmup_steps", "schedule.warmup_steps", 0)
        start = self.take_a(int, f"{at}lr_decay_starting_step", "schedule.decay_start_step", warmup)
        # nanotron's Config fills it in like this, ignoring the decay's start.
        decay_steps = self.take_a(int, f"{at}lr_decay_steps", "schedule.decay_steps", steps - warmup)
        shape = self.take(f"{at}lr_decay_style", "schedule.decay", "linear")
        low = self.take_a(float, f"{at}min_decay_lr", "schedule.min_lr", peak)
        style = self.take(f"{at}lr_warmup_style", "schedule.warmup_steps", "linear")
        if style not in ("linear", "constant"):
            raise UsageError(f"{self.path}: {at}lr_warmup_style is {style!r:.60}; expected linear or constant.")
        if warmup == 0 == decay_steps:
            low = peak  # nanotron's special case: the peak from the first step on
        elif style == "constant":
            if low != peak:
                raise UsageError(
                    f"{self.path}: {at}lr_warmup_style is constant before a decay, which a recipe cannot express. "
                    "Make it linear: the first lr_warmup_steps then train at a lower rate."
                )
            warmup = 0
        elif low == peak:
            warmup = max(warmup, 1)  # nanotron's first step has rate 0 even without a warm-up
        made: dict[str, Any] = {"train_steps": steps, "peak_lr": peak, "warmup_steps": warmup}
        if low == peak:
            return made
        if decay_steps <= 0:
            raise UsageError(f"{self.path}: {at}lr_decay_steps is {decay_steps}; a decay needs at least 1 step.")
        return made | {"decay": shape, "decay_start_step": start, "decay_steps": decay_steps, "min_lr": low}

    def _optimizer(self) -> dict[str, Any]:
        at = "optimizer.optimizer_factory."
        name = self.take(f"{at}name", "optimizer", "adamW")
        if name != "adamW":
            raise UsageError(f"{self.path}: {at}name is {name}; recipes train with AdamW only.")
        patterns = self.take("optimizer.weight_decay_exclude_named_params", "optimizer.no_decay") or []
        return {
            "weight_decay": self.take("optimizer.weight_decay", "optimizer.weight_decay", needed=True),
            "no_decay": self._canonical(patterns),
            "betas": [
                self.take(f"{at}adam_beta1", "optimizer.betas", needed=True),
                self.take(f"{at}adam_beta2", "optimizer.betas", needed=True),
            ],
            "eps": self.take(f"{at}adam_eps", "optimizer.eps", needed=True),
            "max_grad_norm": self._clipping(),
        }

    def _clipping(self) -> float:
        limit = self.take_a(float, "optimizer.clip_grad", "optimizer.max_grad_norm", math.inf)
        if limit <= 0:
            raise UsageError(
                f"{self.path}: optimizer.clip_grad is {limit:g}, with which nanotron makes every gradient zero.\n"
                "Expected a number above 0, or null for no clipping."
            )
        return 0.0 if math.isinf(limit) else limit

    def _canonical(self, patterns: list[str]) -> list[str]:
        """Regexes over canonical names that match the same parameters as ``patterns`` over nanotron's names."""
        if not patterns:
            return []
        config, where = self.config.get("model", {}).get("model_config", {}), f"{self.path}: model.model_config"
        try:
            check_config(config, where)
            spec = spec_from_nanotron(config, where)
            interleaved = nanotron_interleaved(config, where)
            table = nanotron_table(spec, interleaved=interleaved)
            compiled = [re.compile(pattern) for pattern in patterns]
        except BadCheckpoint as error:
            raise UsageError(str(error)) from None
        except re.error as error:
            raise UsageError(
                f"{self.path}: optimizer.weight_decay_exclude_named_params {patterns}: not a regex: {error}."
            ) from None
        named = [(rule.layout, rule.canonical) for rule in table.rules]
        if spec.tied:  # nanotron checks both names of the tensor
            named.append(("model.lm_head.pp_block.weight", ("model.embed_tokens.weight",)))
        idle = [p for p, regex in zip(patterns, compiled) if not any(regex.match(name) for name, _ in named)]
        if idle:
            self.notes.append(f"weight_decay_exclude_named_params matches no parameter: {', '.join(idle)}.")
        matched = [canonical for name, canonical in named if any(regex.match(name) for regex in compiled)]
        names = list(dict.fromkeys(name for canonical in matched for name in canonical))
        return _regexes(names, spec.num_layers)

    def _parallelism(self) -> dict[str, Any]:
        to = "parallelism.global_batch_sequences"
        dp = self.take_a(int, "parallelism.dp", to, needed=True)
        micro = self.take_a(int, "tokens.micro_batch_size", f"{to}, parallelism.micro_batch_sequences", needed=True)
        accumulation = self.take_a(int, "tokens.batch_accumulation_per_replica", to, needed=True)
        context = self.take_a(int, "parallelism.context_parallel_size", "parallelism.sequence_ranks", 1)
        others = {kind: int(self.left.get(f"parallelism.{kind}") or 1) for kind in ("tp", "pp")}
        split = ", ".join(f"{kind} {size}" for kind, size in others.items() if size > 1)
        zero_stage = self.take_a(int, "optimizer.zero_stage", "parallelism.zero_stage", 0)
        if not zero_stage:
            zero_stage = 1
            self.notes.append(
                "parallelism.zero_stage is 1, which sums gradients in float32 as nanotron does; DeepSpeed's 0 does not"
            )
        if split:
            self.notes.append(
                f"{split} is lost: every rank holds whole layers. Raise parallelism.zero_stage or sequence_ranks, or "
                "set model.activation_checkpointing, if they do not fit."
            )
        return {
            "zero_stage": zero_stage,
            "sequence_ranks": context,
            "micro_batch_sequences": micro,
            "global_batch_sequences": dp * micro * accumulation,
        }


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or ())


def _leaves(value: Any, at: str = "") -> Iterable[tuple[str, Any]]:
    """Fields by dotted place. A list of plain values and an empty section each count as one field."""
    below: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        below = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        below = enumerate(value)
    if not below:
        yield at, value
    for key, item in below:
        yield from _leaves(item, f"{at}.{key}" if at else str(key))


def _all(config: dict[str, Any]) -> set[str]:
    return {field for field, _ in _leaves(config)}


def unique_names(folders: list[Any]) -> list[str]:
    """The shortest ends of the paths that are unique: source names in the metrics."""
    parts = [str(folder).rstrip("/").split("/") for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)}#{i}" for i, part in enumerate(parts)]  # the same folder occurs twice


def _regexes(names: list[str], num_layers: int) -> list[str]:
    """One regex for a parameter in all layers, or in some."""
    layers: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(model\.layers\.)(\d+)(\..+)", name)
        shape = f"{re.escape(found[1])}{{}}{re.escape(found[3])}$" if found else f"{re.escape(name)}$"
        layers.setdefault(shape, []).append(found[2] if found else "")
    return [
        shape
        if numbers == [""]
        else shape.replace("{}", r"\d+" if len(numbers) == num_layers else f"({'|'.join(numbers)})")
        for shape, numbers in layers.items()
    ]
