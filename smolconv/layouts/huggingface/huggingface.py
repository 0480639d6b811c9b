"""Hugging Face: config.json, safetensors (one file or sharded) or legacy pytorch_model.bin, tokenizer beside them.

HF has no place for Adam's state, so it goes to the sidecar folder ``smolconv_state/`` (docs/sidecar.md), from where it
comes back without losing a bit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from smolconv.checkpoint import MOMENTS, Checkpoint, DataStage, OptimizerState, ParameterGroup, Slot, TrainingProgress
from smolconv.errors import CorruptFile, DigestMismatch, MissingFile, MissingShard, NameMismatch, UnsupportedModel
from smolconv.files import read_bytes
from smolconv.layouts.documents import adam_step, check_config, check_progress, understood, with_tuples
from smolconv.layouts.dtypes import check_named_dtypes
from smolconv.layouts.huggingface.listing import OTHER_RUN, SIDECAR, WEIGHTS, index_of
from smolconv.layouts.layout import (
    ASSET_NAMES,
    PlannedOutput,
    ReadOptions,
    Written,
    copied_file,
    hf_config,
    model_card,
    read_json,
    without_aliases,
)
from smolconv.models.huggingface import weight_table
from smolconv.models.spec import spec_from_hf
from smolconv.models.weights import WeightTable
from smolconv.storage.output import PlannedFile, digest_tensor, plain_file
from smolconv.storage.safetensors_file import plan_safetensors, read_safetensors
from smolconv.storage.torch_archive.archive import ArchiveTensor, read_torch_archive
from smolconv.tensors.lazy import LazyTensor, Stored


def read_huggingface(folder: Path, options: ReadOptions = ReadOptions()) -> Checkpoint:  # noqa: B008
    """Read config, headers and, when asked for, the sidecar; tensors stay in their files.

    Raises ``BadCheckpoint`` and its kind for anything missing, contradictory or unsupported.
    """
    config_path = options.config or folder / "config.json"
    config = read_json(config_path)
    check_config(config, config_path)
    spec = spec_from_hf(config, str(config_path))
    files, found = _weights(folder)
    # Before the names: a quantised model has others beside its weights, and the dtype says what is the matter.
    check_named_dtypes(Slot.PARAMETER, found)
    table = weight_table(spec)
    parameters = table.to_canonical(without_aliases(found, table.aliases, folder), str(folder))
    tensors: dict[Slot, Mapping[str, LazyTensor]] = {Slot.PARAMETER: parameters}
    optimizer, progress = None, None
    origin = {"config.json": json.dumps(config).encode()}
    warnings: tuple[str, ...] = ()
    if (folder / SIDECAR / "state.json").is_file():
        sidecar = _read_sidecar(folder, table, parameters, options)
        tensors.update(sidecar.slots)
        optimizer, progress, warnings = sidecar.optimizer, sidecar.progress, sidecar.warnings
        origin.update(sidecar.origin)
        files = (*files, *sidecar.files)
    ignored = next((index_of(name) for name in WEIGHTS if folder / name in files), None)
    if ignored is not None and (folder / ignored).is_file():
        warnings = (*warnings, f"{ignored} was ignored, as transformers does beside a single file of weights.")
    if (folder / OTHER_RUN).is_file():
        warnings = (
            *warnings,
            "a DeepSpeed checkpoint lies beside the weights: name its tag folder to read Adam's state.",
        )
    assets = {name: folder / name for name in ASSET_NAMES if (folder / name).is_file()}
    return Checkpoint(
        layout="huggingface",
        root=folder,
        spec=spec,
        tensors=tensors,
        optimizer=optimizer,
        progress=progress,
        assets=assets,
        origin=origin,
        files=(folder / "config.json", *files, *assets.values()),
        warnings=warnings,
        frozen=() if optimizer is None else tuple(name for name in parameters if name not in optimizer.steps),
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, LazyTensor]]:
    """The weight files, and what they hold by name."""
    for name in WEIGHTS:
        index, single = folder / index_of(name), folder / name
        if single.is_file():  # transformers, too, looks for an index only where there is no single file
            return (single,), _tensors_of(single)
        if index.is_file():
            return _indexed(folder, index)
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    there = f"{shards[0]} and {len(shards) - 1} more are there, but no index" if shards else "no weights are there"
    raise MissingFile(
        f"{folder}: {there}; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin.\n"
        "Copy the missing file from where the checkpoint came from."
    )


def _indexed(folder: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, LazyTensor]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CorruptFile(f"{index} has no weight_map from tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CorruptFile(f"{index} names {name!r}, which is not a plain file name beside it. It was not opened.")
        if not (folder / name).is_file():
            raise MissingShard(
                f"{folder}: {name} is missing, although {index.name} puts "
                f"{sum(value == name for value in weight_map.values())} tensors there.\nCopy it from the source."
            )
    found: dict[str, LazyTensor] = {}
    for name in names:
        for tensor_name, tensor in _tensors_of(folder / name).items():
            if weight_map.get(tensor_name) != name:
                raise NameMismatch(
                    f"{folder}: {tensor_name} lies in {name}, but the index says {weight_map.get(tensor_name)}.\n"
                    "Shards of two checkpoints may be mixed: copy all of one."
                )
            found[tensor_name] = tensor
    ghosts = [name for name in weight_map if name not in found]
    if ghosts:
        raise NameMismatch(
            f"{index} promises {ghosts[0]} in {weight_map[ghosts[0]]}, which does not hold it ({len(ghosts)} such)."
        )
    return tuple(folder / name for name in names), found


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path).tensors)
    document = read_torch_archive(path)
    if not isinstance(document, Mapping):
        raise CorruptFile(f"{path} holds no mapping from names to tensors.")
    found: dict[str, LazyTensor] = {}
    for name, tensor in document.items():
        if not isinstance(tensor, ArchiveTensor):
            raise CorruptFile(f"{path}: {name} is not a tensor.")
        if not tensor.is_contiguous:
            raise UnsupportedModel(f"{path}: {name} is stored transposed; save it again with .contiguous().")
        found[str(name)] = Stored(path=path, offset=tensor.offset, shape=tensor.shape, dtype=tensor.dtype)
    return found


# --- sidecar ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sidecar:
    slots: Mapping[Slot, Mapping[str, LazyTensor]]
    optimizer: OptimizerState | None
    progress: TrainingProgress | None
    origin: Mapping[str, bytes]
    files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def _read_sidecar(
    folder: Path, table: WeightTable, parameters: Mapping[str, LazyTensor], options: ReadOptions
) -> _Sidecar:
    home = folder / SIDECAR
    state = read_json(home / "state.json")
    progress = _progress_from_json(state.get("progress"), home / "state.json")
    source = home / "source"
    documents = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else []
    origin = {path.name: read_bytes(path) for path in documents}
    for name in ("model_config.json", "checkpoint_metadata.json"):
        if name in origin:
            check_config(read_json(source / name), source / name)
    if not options.optimizer or state.get("optimizer") is None:
        return _Sidecar(
            slots={}, optimizer=None, progress=progress, origin=origin, files=(home / "state.json", *documents)
        )
    slots: dict[Slot, Mapping[str, LazyTensor]] = {}
    files = [home / "state.json", *documents]
    for slot in (Slot.MASTER, Slot.EXP_AVG, Slot.EXP_AVG_SQ):
        index = home / f"{slot.value}.safetensors.index.json"
        if index.is_file():
            shards, found = _indexed(home, index)
            slots[slot] = table.to_canonical(found, f"{home} ({slot.value})", all_needed=False)
            files += [index, *shards]
        elif slot in MOMENTS:
            raise MissingShard(
                f"{index} is missing, although {home / 'state.json'} says that Adam's state is there.\n"
                "Copy it from the source, or pass --no-optimizer to convert the weights only."
            )
    if options.check_sidecar:
        _check_belongs(folder, state, parameters)
    where = f"{home / 'state.json'} (optimizer)"
    with understood(where):
        optimizer = OptimizerState(
            steps={name: adam_step(step, f"{where}: {name}") for name, step in state["optimizer"]["steps"].items()},
            groups=tuple(
                ParameterGroup(names=tuple(group["names"]), hyperparameters=with_tuples(group["hyperparameters"]))
                for group in state["optimizer"]["groups"]
            ),
        )
        grouped = [name for group in optimizer.groups for name in group.names]
        same = len(grouped) == len(optimizer.steps) and set(grouped) == optimizer.steps.keys()
    if not same or not optimizer.steps.keys() <= slots[Slot.EXP_AVG].keys():
        raise CorruptFile(f"{where}: its steps, its groups and the moments beside it are not of the same parameters.")
    return _Sidecar(slots=slots, optimizer=optimizer, progress=progress, origin=origin, files=tuple(files))


def _check_belongs(folder: Path, state: Mapping[str, Any], parameters: Mapping[str, LazyTensor]) -> None:
    """The sidecar's state belongs to the very weights it was written with: moments of others would be wrong."""
    digests = state.get("weights")
    digests = digests if isinstance(digests, dict) else {}
    for name, tensor in parameters.items():
        known = digests.get(name)
        if known is None or digest_tensor(tensor) != known:
            raise DigestMismatch(
                f"{folder}: {name} is not the weight that {SIDECAR}/ was written with, so its Adam state does not "
                "belong to this model.\nConvert again from the source. If the weights were trained on, pass "
                "--no-optimizer for the weights only, and delete smolconv_manifest.json, which lists the old ones."
            )


def _progress_from_json(value: Any, where: Path) -> TrainingProgress | None:
    if value is None:
        return None
    with understood(f"{where} (progress)"):
        stages = tuple(DataStage(**stage) for stage in value.get("stages", ()))
        progress = TrainingProgress(**{**value, "stages": stages})
    return check_progress(progress, where)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions:
    """How to write an HF folder."""

    max_shard_bytes: int = 5 * 10**9


def plan_huggingface(checkpoint: Checkpoint, options: HuggingFaceOptions) -> PlannedOutput:
    """Plan every file: shards, index, config in both rope spellings, assets, card, and a sidecar for state."""
    spec, warnings = checkpoint.spec, []
    layout = weight_table(spec).to_layout(checkpoint.parameters, "the source", lambda _: True)
    files = list(_sharded(layout, "model", "model", options.max_shard_bytes, Slot.PARAMETER))
    dtypes = {tensor.dtype for tensor in checkpoint.parameters.values()}
    dtype = layout["model.embed_tokens.weight"].dtype if len(dtypes) > 1 else next(iter(dtypes))
    config = hf_config(checkpoint, dtype)
    files.append(plain_file("config.json", _json(config)))
    assets = dict(checkpoint.assets)
    assets.pop("config.json", None)
    documents = {name: data for name, data in checkpoint.documents.items() if name not in assets}
    given = {*assets, *documents}
    has_tokenizer = any("tokenizer" in name for name in given)
    if not has_tokenizer:
        warnings.append("the source has no tokenizer; give one with --tokenizer, or copy it beside config.json later.")
    if "generation_config.json" not in given:
        files.append(plain_file("generation_config.json", _json(_generation_config(config))))
    if "README.md" not in given:
        card = model_card(checkpoint, "A Hugging Face checkpoint", str(checkpoint.root), has_tokenizer)
        files.append(plain_file("README.md", card))
    files += [copied_file(name, path) for name, path in assets.items()]
    files += [plain_file(name, data) for name, data in documents.items()]
    late = {}
    if checkpoint.has_optimizer or checkpoint.progress is not None:
        files += _sidecar_files(checkpoint, options)
        late[f"{SIDECAR}/state.json"] = lambda written: _json(_sidecar_state(checkpoint, files, written))
    return PlannedOutput(files=tuple(files), late=late, warnings=tuple(warnings))


def _sharded(
    tensors: Mapping[str, LazyTensor], stem: str, index_stem: str, max_shard_bytes: int, slot: Slot, folder: str = ""
) -> list[PlannedFile]:
    shards = plan_shards(tensors, max_shard_bytes)
    metadata = {"format": "pt"}
    single = len(shards) == 1 and not folder
    names = [
        f"{folder}{stem}.safetensors" if single else f"{folder}{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    files = [
        plan_safetensors(name, {key: tensors[key] for key in shard}, metadata, slot.value)
        for name, shard in zip(names, shards)
    ]
    if not single:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: PurePosixPath(name).name for name, shard in zip(names, shards) for key in shard},
        }
        files.append(plain_file(f"{folder}{index_stem}.safetensors.index.json", _json(index)))
    return files


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[list[str]]:
    """Pack tensors into files in order, none larger than ``max_shard_bytes`` unless one tensor is.

    As few files as that allows, and those as even as they can be: a worker writes each, and they end together.
    """
    count = len(_packed(tensors, max_shard_bytes))
    low, high = 1, max_shard_bytes
    while low < high:  # for the smallest limit that needs no more files
        middle = (low + high) // 2
        if len(_packed(tensors, middle)) > count:
            low = middle + 1
        else:
            high = middle
    return _packed(tensors, high)


def _packed(tensors: Mapping[str, LazyTensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None
    }
    return {"_from_model_config": True, **ids}


def _sidecar_files(checkpoint: Checkpoint, options: HuggingFaceOptions) -> list[PlannedFile]:
    folder = f"{SIDECAR}/"
    files = [
        plain_file(f"{folder}source/{name}", data) for name, data in checkpoint.origin.items() if name != "config.json"
    ]
    if checkpoint.has_optimizer:
        for slot in (Slot.MASTER, Slot.EXP_AVG, Slot.EXP_AVG_SQ):
            tensors = checkpoint.tensors.get(slot)
            if tensors:
                files += _sharded(tensors, slot.value, slot.value, options.max_shard_bytes, slot, folder)
    return files


def _sidecar_state(checkpoint: Checkpoint, files: Sequence[PlannedFile], written: Written) -> dict[str, Any]:
    digests = {}
    for file in files:
        for tensor, found in zip(file.tensors, written[str(file.path)]):
            if tensor.slot == Slot.PARAMETER.value:
                known = found.digest if (found.digest or "").startswith("xxh3") else None
                digests[tensor.name] = known or digest_tensor(tensor.source)
    progress = checkpoint.progress
    optimizer = checkpoint.optimizer if checkpoint.has_optimizer else None
    return {
        "schema": 1,
        "tool": "smolconv",
        "step": None if progress is None else progress.step,
        "weights": digests,
        "optimizer": None if optimizer is None else {
            "steps": dict(optimizer.steps),
            "groups": [
                {"names": list(group.names), "hyperparameters": dict(group.hyperparameters)}
                for group in optimizer.groups
            ],
        },
        "progress": None if progress is None else asdict(progress),
    }  # fmt: skip


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500MB" (powers of 1000), "2GiB" (of 1024) or a plain number. Raises ``ValueError``."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    number, unit, binary = match.groups()
    value = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
    if not math.isfinite(value) or value < 1:
        raise ValueError(text)
    return int(value)
