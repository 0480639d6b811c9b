"""Read a nanotron checkpoint: any TP x PP x DP, ZeRO-0 and ZeRO-1, with or without fp32 masters, formats 1.2 to 1.5."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from smolconv.checkpoint import (
    MOMENTS,
    Checkpoint,
    DataStage,
    OptimizerState,
    ParameterGroup,
    Slot,
    Topology,
    TrainingProgress,
)
from smolconv.errors import (
    CorruptFile,
    MissingFile,
    MissingShard,
    MixedCheckpoint,
    NameMismatch,
    ShapeMismatch,
    UnsupportedModel,
)
from smolconv.files import read_bytes
from smolconv.layouts.documents import adam_step, check_config, check_plain, check_progress, is_count, understood
from smolconv.layouts.dtypes import check_dtype, check_named_dtypes
from smolconv.layouts.layout import ReadOptions, read_json
from smolconv.layouts.nanotron.listing import ASSETS, DOCUMENTS, find_step_folder, is_number
from smolconv.layouts.nanotron.topology import (
    EMBEDDING,
    HEAD,
    RankedFile,
    SlicePair,
    block_of,
    check_pairs,
    join_shards,
    parameters_of_rank,
    parse_shape,
    parse_slices,
    parse_state_file,
    parse_weight_file,
    tensor_parallel,
    zero1_slices,
)
from smolconv.models import llama as smollm2
from smolconv.models import smollm3
from smolconv.models.spec import ModelSpec, nanotron_interleaved, spec_from_nanotron
from smolconv.models.weights import WeightTable
from smolconv.storage.safetensors_file import read_safetensors
from smolconv.storage.torch_archive.archive import ArchiveTensor, read_torch_archive
from smolconv.tensors.lazy import LazyTensor, Stored, equal, flat_slice, join, reshape

FORMATS = ("1.2", "1.3", "1.4", "1.5")

#: How much of two large tensors is compared that must be equal.
_STRETCHES, _STRETCH_ELEMENTS = 64, 4096


def read_nanotron(folder: Path, options: ReadOptions = ReadOptions()) -> Checkpoint:  # noqa: B008
    """Read headers and small documents only; tensors stay in their files.

    Raises ``BadCheckpoint`` and its kind for anything missing, contradictory or unsupported.
    """
    step_folder = find_step_folder(folder, options.step)
    config, where = _model_config(step_folder, options.config)
    check_config(config, where)
    spec = spec_from_nanotron(config, where, rope_as_configured=options.rope_as_configured)
    table = weight_table(spec, nanotron_interleaved(config, where))
    metadata_path = step_folder / "checkpoint_metadata.json"
    metadata = read_json(metadata_path) if metadata_path.exists() else None
    if metadata is not None and not is_count(metadata.get("dp", 1)):
        raise CorruptFile(f"{metadata_path}: dp is {metadata['dp']!r:.60}; a whole number was expected.")

    paths = list(_walk(step_folder))
    weights = read_native(step_folder, paths, spec, metadata)
    tensors: dict[Slot, Mapping[str, LazyTensor]] = {
        Slot.PARAMETER: table.to_canonical({name: p.whole for name, p in weights.items()}, str(step_folder))
    }
    topology = _topology(weights, metadata)
    optimizer, scheduler, warnings = None, None, _warnings(config, weights, spec)
    has_state = (step_folder / "optimizer").is_dir()
    if options.optimizer and has_state:
        state = _read_optimizer(step_folder / "optimizer", spec, table, weights, topology)
        for slot, found in state.slots.items():
            if found:
                tensors[slot] = table.to_canonical(found, f"{step_folder}/optimizer ({slot.value})")
        if state.hyperparameters:
            optimizer = _canonical_optimizer(state, table)
        else:
            warnings.append(
                "the optimizer's files hold no Adam state, as nanotron saves it before the first step "
                "(checkpoints.save_initial_state): there is none to carry."
            )
        scheduler = _read_scheduler(step_folder / "lr_scheduler", table, spec, weights, warnings)
        topology = state.topology
    elif has_state:
        topology = _optimizer_topology(step_folder / "optimizer", topology)
    return Checkpoint(
        layout="nanotron",
        root=folder,
        spec=spec,
        tensors=tensors,
        topology=topology,
        optimizer=optimizer,
        progress=_progress(metadata, metadata_path, scheduler),
        assets=_assets(step_folder.parent),
        origin={name: read_bytes(step_folder / name) for name in DOCUMENTS if (step_folder / name).is_file()}
        | ({"model_config.json": json.dumps(config).encode()}),
        files=tuple(paths),
        warnings=tuple(warnings),
    )


def weight_table(spec: ModelSpec, interleaved: bool) -> WeightTable:
    """The table between canonical names and nanotron's, in the order of nanotron's optimizer."""
    if spec.architecture == "llama":
        return smollm2.nanotron_table(spec, interleaved=interleaved)
    return smollm3.nanotron_table(spec, interleaved=interleaved)


def _model_config(step_folder: Path, override: Path | None) -> tuple[dict[str, Any], str]:
    if override is not None:
        return read_json(override), str(override)
    path = step_folder / "model_config.json"
    if path.exists():
        return read_json(path), str(path)
    document = step_folder / "config.yaml"
    if not document.exists():
        raise MissingFile(f"{step_folder} holds neither model_config.json nor config.yaml. Pass one with --config.")
    model = read_yaml(read_bytes(document), document).get("model")
    config = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(config, dict):
        raise CorruptFile(f"{document} has no model.model_config. Pass a model_config.json with --config.")
    return config, str(document)


def read_yaml(data: bytes, where: object) -> dict[str, Any]:
    """A YAML mapping of plain types. Raises ``CorruptFile``."""
    import yaml

    try:
        value = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-99-99
        raise CorruptFile(f"{where} is not valid YAML: {(str(error) or repr(error)).splitlines()[0]}.") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{where} holds no mapping.")
    return value


def _warnings(config: Mapping[str, Any], weights: Mapping[str, NativeParameter], spec: ModelSpec) -> list[str]:
    found = []
    if config.get("rope_scaling") and spec.rope_scaling is None:
        found.append(
            "model_config.json sets rope_scaling, which nanotron's forward ignores: the model was trained without it. "
            "It is left out of the spec (as-trained); --rope-scaling as-configured puts it in."
        )
    if any(p.format in ("1.2", "1.3") for p in weights.values()):
        found.append(
            "format 1.2/1.3 is read by its source code's rules; no checkpoint of that time was at hand to test."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class NativeModel:
    """A nanotron model as it is stored: its own config, its own fused parameters, joined over the ranks."""

    config: Mapping[str, Any]
    parameters: Mapping[str, LazyTensor]  #: by nanotron's names


def read_native_model(folder: Path, options: ReadOptions = ReadOptions()) -> NativeModel:  # noqa: B008
    """Headers only. Raises as ``read_nanotron`` does."""
    step_folder = find_step_folder(folder, options.step)
    config, where = _model_config(step_folder, options.config)
    check_config(config, where)
    spec = spec_from_nanotron(config, where)
    nanotron_interleaved(config, where)  # refuses a config that does not say
    metadata_path = step_folder / "checkpoint_metadata.json"
    metadata = read_json(metadata_path) if metadata_path.exists() else None
    weights = read_native(step_folder, list(_walk(step_folder)), spec, metadata)
    parameters = {name: p.whole for name, p in weights.items()}
    check_named_dtypes(Slot.PARAMETER, parameters)
    return NativeModel(config=config, parameters=parameters)


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NativeParameter:
    """One parameter as nanotron stores it: fused, and cut over tensor-parallel ranks."""

    name: str
    shards: tuple[LazyTensor, ...]  #: by tensor-parallel rank; one for a parameter that is not cut
    pairs: tuple[tuple[SlicePair, ...], ...]  #: each shard's place in the whole; () when not cut
    pp: int | None
    pp_size: int | None
    format: str | None
    whole: LazyTensor


def read_native(
    step_folder: Path, paths: Sequence[Path], spec: ModelSpec, metadata: Mapping[str, Any] | None
) -> dict[str, NativeParameter]:
    """nanotron's own parameters by nanotron's names, from ``paths``, the step folder's files."""
    grouped: dict[str, dict[int | None, tuple[Path, RankedFile]]] = {}
    model = step_folder / "model"
    if not model.is_dir():
        raise MissingFile(f"{model} is not there, so this checkpoint has no weights.")
    depth = len(model.parts)
    for path in paths:
        parts = path.parts
        if len(parts) <= depth or parts[depth - 1] != "model":
            continue
        ranked = parse_weight_file(parts[-1])
        if ranked is None:
            raise NameMismatch(f"{path} is not a file that nanotron writes. Move it out of the checkpoint.")
        if ranked.expert_size not in (None, 1):
            raise UnsupportedModel(f"{path}: experts are split over ranks; mixtures of experts are not supported.")
        name = ".".join((*parts[depth:-1], ranked.kind))
        ranks = grouped.setdefault(name, {})
        if ranked.tp in ranks:
            raise MixedCheckpoint(
                f"{name}: tensor-parallel rank {ranked.tp} is there twice: {ranks[ranked.tp][0].name}, {path.name}.\n"
                "Files of two checkpoints lie in one folder: keep those of one."
            )
        ranks[ranked.tp] = (path, ranked)
    _check_sizes(grouped, metadata, step_folder)
    version = None if metadata is None else str(metadata.get("version"))
    if version is not None and version not in FORMATS:
        raise MixedCheckpoint(f"{step_folder}: checkpoint format {version}; smolconv reads {', '.join(FORMATS)}.")
    found = {name: _native(name, ranks, spec, version) for name, ranks in grouped.items()}
    by_format = {parameter.format: name for name, parameter in found.items() if parameter.pairs}
    if len(by_format) > 1:
        raise MixedCheckpoint(
            f"{step_folder}: "
            + " and ".join(f"{name} is of format {version}" for version, name in by_format.items())
            + ".\nFiles of two checkpoints are mixed: copy the checkpoint again."
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort(key=lambda name: (not is_number(name), int(name) if is_number(name) else 0, name))
        for name in sorted(files):
            yield Path(parent) / name


def _check_sizes(
    grouped: Mapping[str, Mapping[int | None, tuple[Path, RankedFile]]],
    metadata: Mapping[str, Any] | None,
    step_folder: Path,
) -> None:
    sizes = {
        (ranked.tp_size, ranked.pp_size): path
        for ranks in grouped.values()
        for path, ranked in ranks.values()
        if ranked.tp is not None
    }
    if len(sizes) > 1:
        (a, b), paths = list(sizes)[:2], list(sizes.values())
        raise MixedCheckpoint(
            f"{step_folder}: files of TP {a[0]} x PP {a[1]} and of TP {b[0]} x PP {b[1]} lie together:\n"
            f"  {paths[0]}\n  {paths[1]}\nKeep those of one topology."
        )
    if sizes and metadata is not None and "tp" in metadata and next(iter(sizes))[0] != metadata["tp"]:
        raise MixedCheckpoint(
            f"{step_folder}: the weights are of TP {next(iter(sizes))[0]}, but checkpoint_metadata.json says "
            f"{metadata['tp']}."
        )


def _native(
    name: str, ranks: Mapping[int | None, tuple[Path, RankedFile]], spec: ModelSpec, version: str | None
) -> NativeParameter:
    if None in ranks:
        path, _ = ranks[None]
        tensor, found = _data(path)
        if len(ranks) > 1:
            raise MixedCheckpoint(f"{path.parent}: {path.name} lies beside files of single ranks. Keep one kind.")
        _check_format(path, found.get("version"), version)
        if tensor_parallel(name, spec) is not None:
            raise MixedCheckpoint(f"{path}: no rank in the name of a parameter that nanotron cuts over ranks.")
        return NativeParameter(
            name=name, shards=(tensor,), pairs=(), pp=None, pp_size=None, format=version, whole=tensor
        )
    first, ranked = next(iter(ranks.values()))
    tp_size = ranked.tp_size or 1
    missing = next((rank for rank in range(tp_size) if rank not in ranks), None)
    if missing is not None:
        raise MissingShard(
            f"{name}: tensor-parallel rank {missing} of {tp_size} is missing beside {first}.\n"
            "Every rank holds its own rows of the parameter. Copy the file from the training node."
        )
    if len({ranked.pp for _, ranked in ranks.values()}) > 1:
        raise MixedCheckpoint(
            f"{first.parent}: one parameter lies on several pipeline ranks. Keep one checkpoint's files."
        )
    shards: list[LazyTensor] = []
    pairs, shapes, formats = [], set(), set()
    cut = tensor_parallel(name, spec)
    for rank in range(tp_size):
        path, _ = ranks[rank]
        tensor, found = _data(path)
        if "local_global_slices_pairs" not in found or "unsharded_shape" not in found:
            raise CorruptFile(f"{path} has no slice metadata, so its place in the whole parameter is unknown.")
        _check_format(path, found.get("version"), version)
        formats.add(found.get("version"))
        shape = parse_shape(found["unsharded_shape"], str(path))
        if len(shape) != len(tensor.shape):
            raise ShapeMismatch(f"{path}: the shard is {list(tensor.shape)}, the whole parameter {list(shape)}.")
        if shards and tensor.dtype != shards[0].dtype:
            raise MixedCheckpoint(
                f"{path} is {tensor.dtype}, but the shard of rank 0 beside it is {shards[0].dtype}.\n"
                "Expected one dtype on all ranks.\n"
                "The file is damaged, or of another checkpoint: copy it again."
            )
        shapes.add(shape)
        shards.append(tensor)
        pairs.append(parse_slices(found["local_global_slices_pairs"], tensor.shape, shape, str(path)))
        if cut is not None and cut.dim < len(shape):
            check_pairs(pairs[-1], tensor.shape, shape, cut, tp_size, rank, str(path))
    if len(shapes) > 1 or len(formats) > 1:
        raise MixedCheckpoint(f"{first.parent}: the ranks' files disagree about shape {shapes} or format {formats}.")
    whole = join_shards(list(zip(shards, pairs)), shapes.pop(), str(first.parent))
    return NativeParameter(
        name=name, shards=tuple(shards), pairs=tuple(pairs), pp=ranked.pp, pp_size=ranked.pp_size,
        format=formats.pop(), whole=whole,
    )  # fmt: skip


def _check_format(path: Path, found: str | None, expected: str | None) -> None:
    if found is not None and found not in FORMATS:
        raise MixedCheckpoint(f"{path}: checkpoint format {found}; smolconv reads {', '.join(FORMATS)}.")
    if found is not None and expected is not None and found != expected:
        raise MixedCheckpoint(
            f"{path} is of format {found}, but checkpoint_metadata.json says {expected}.\n"
            "Files of two checkpoints are mixed: copy the checkpoint again."
        )


def _data(path: Path) -> tuple[Stored, Mapping[str, str]]:
    file = read_safetensors(path)
    if set(file.tensors) != {"data"}:
        raise NameMismatch(f'{path} holds {sorted(file.tensors)[:3]}; nanotron stores one tensor named "data".')
    return file.tensors["data"], file.metadata


def _topology(weights: Mapping[str, NativeParameter], metadata: Mapping[str, Any] | None) -> Topology:
    cut = next((p for p in weights.values() if p.pairs), None)
    return Topology(
        tp=len(cut.shards) if cut else 1,
        pp=(cut.pp_size if cut else None) or 1,
        dp=None if metadata is None else metadata.get("dp"),
    )


# --- optimizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the optimizer files hold, by nanotron's names, whole."""

    slots: Mapping[Slot, Mapping[str, LazyTensor]]
    steps: Mapping[str, float]
    hyperparameters: Mapping[str, Mapping[str, Any]]
    topology: Topology


_SLOT_KEYS = {"exp_avg": Slot.EXP_AVG, "exp_avg_sq": Slot.EXP_AVG_SQ}


def _optimizer_files(folder: Path, weights_topology: Topology) -> dict[tuple[int, int, int], Path]:
    """(pp, dp, tp) -> file; dp is 0 for ZeRO-0."""
    files: dict[tuple[int, int, int], Path] = {}
    sizes: set[tuple[int | None, int | None, int | None]] = set()
    for path in sorted(folder.glob("optimizer_*.pt")):
        ranked = parse_state_file(path.name)
        if ranked is None or ranked.pp is None or ranked.tp is None:
            raise NameMismatch(f"{path} is not a file that nanotron writes. Move it out of the checkpoint.")
        if ranked.expert_size not in (None, 1):
            raise UnsupportedModel(f"{path}: experts are split over ranks; mixtures of experts are not supported.")
        sizes.add((ranked.pp_size, ranked.dp_size, ranked.tp_size))
        files[ranked.pp, ranked.dp or 0, ranked.tp] = path
    if not files:
        raise MissingFile(f"{folder} holds no optimizer_*.pt file. Pass --no-optimizer to convert the weights only.")
    if len(sizes) > 1:
        raise MixedCheckpoint(f"{folder}: optimizer files of several topologies lie together. Keep those of one.")
    pp_size, dp_size, tp_size = sizes.pop()
    if (tp_size, pp_size) != (weights_topology.tp, weights_topology.pp):
        raise MixedCheckpoint(
            f"{folder}: the optimizer is of TP {tp_size} x PP {pp_size}, the weights of TP {weights_topology.tp} x "
            f"PP {weights_topology.pp}. Pass --no-optimizer to convert the weights only."
        )
    for pp in range(pp_size or 1):
        for dp in range(dp_size or 1):
            for tp in range(tp_size or 1):
                if (pp, dp, tp) not in files:
                    raise MissingShard(
                        f"{folder}: the file of pp rank {pp}, dp rank {dp}, tp rank {tp} is missing "
                        f"(of {pp_size} x {dp_size or 1} x {tp_size}).\n"
                        "Adam's moments are split over the ranks, so they cannot be rebuilt without it.\n"
                        "Copy the file from the training node, or pass --no-optimizer to convert the weights only."
                    )
    return files


def _optimizer_topology(folder: Path, topology: Topology) -> Topology:
    ranked = [parse_state_file(path.name) for path in folder.glob("optimizer_*.pt")]
    zero1 = [r.dp_size for r in ranked if r is not None and r.dp_size is not None]
    return Topology(tp=topology.tp, pp=topology.pp, dp=zero1[0] if zero1 else topology.dp, zero_stage=int(bool(zero1)))


def _read_optimizer(
    folder: Path, spec: ModelSpec, table: WeightTable, weights: Mapping[str, NativeParameter], topology: Topology
) -> _State:
    files = _optimizer_files(folder, topology)
    topology = _optimizer_topology(folder, topology)
    dp_size = (topology.dp or 1) if topology.zero_stage else 1
    names = {rule.layout for rule in table.rules}
    # (slot, name) -> (dp, tp) -> tensor. A tied head's copy on the last pipeline rank must equal the first rank's.
    pieces: dict[tuple[Slot, str], dict[tuple[int, int], LazyTensor]] = {}
    copies: dict[tuple[Slot, str], dict[tuple[int, int], LazyTensor]] = {}
    steps: dict[str, float] = {}
    hyperparameters: dict[str, Mapping[str, Any]] = {}
    for (pp, dp, tp), path in sorted(files.items()):
        with understood(path):
            document = _state_document(path)
            groups = {index: group for group in document["param_groups"] for index in group["params"]}
            for index, name in document["names"].items():
                if name not in names:
                    raise NameMismatch(f"{path}: the optimizer holds {name!r}, which the model has not.")
                is_copy = weights[name].pp not in (None, pp)
                if is_copy and not (spec.tied and name == EMBEDDING):
                    raise MixedCheckpoint(f"{path}: {name} belongs to pipeline rank {weights[name].pp}.")
                found = dict(document["state"][index])
                step = found.pop("step", None)
                if set(found) != set(_SLOT_KEYS):
                    raise UnsupportedModel(
                        f"{path}: the optimizer holds {sorted(found)} for {name}; only Adam's exp_avg and exp_avg_sq "
                        "are read."
                    )
                for key, slot in _SLOT_KEYS.items():
                    own = (copies if is_copy else pieces).setdefault((slot, name), {})
                    own[dp, tp] = _stored(found[key], slot, path, name)
                if index not in groups:
                    raise CorruptFile(f"{path}: parameter {index} ({name}) belongs to no group.")
                values = {key: value for key, value in groups[index].items() if key != "params"}
                check_plain(values, f"{path}: the group of {name}")
                count = _scalar(step, path, name)
                if (steps.setdefault(name, count), hyperparameters.setdefault(name, values)) != (count, values):
                    raise MixedCheckpoint(
                        f"{path}: {name} has made {count:g} steps; on an earlier rank {steps[name]:g}, or its group "
                        "differs.\n"
                        "Expected the same steps and hyperparameters on every rank that holds a part of it.\n"
                        "Files of two checkpoints are mixed: copy all of one from the training nodes."
                    )
            for name, tensor in document.get("gradient_accumulator", {}).items():
                if name in names:
                    own = (pieces if weights[name].pp in (None, pp) else copies).setdefault((Slot.MASTER, name), {})
                    own[dp, tp] = _stored(tensor, Slot.MASTER, path, name)
    slots: dict[Slot, dict[str, LazyTensor]] = {slot: {} for slot in (Slot.MASTER, *MOMENTS)}
    tp_size = topology.tp or 1
    for (slot, name), found in pieces.items():
        where = f"{folder} ({slot.value} of {name})"
        slots[slot][name] = _whole_state(weights[name], found, dp_size, tp_size, where)
    for (slot, name), found in copies.items():
        where = f"{folder} ({slot.value} of {name}, the last pipeline rank's)"
        copy = _whole_state(weights[name], found, dp_size, tp_size, where)
        # A parameter without state here is missing there too, which is said later, by its name.
        if name in slots[slot] and not _looks_equal(copy, slots[slot][name]):
            raise _differs(where, "that of the embedding's own pipeline rank")
    return _State(slots=slots, steps=steps, hyperparameters=hyperparameters, topology=topology)


def _state_document(path: Path) -> dict[str, Any]:
    document = read_torch_archive(path)
    if not isinstance(document, dict) or not {"state", "names", "param_groups"} <= set(document):
        raise CorruptFile(f"{path} is not an optimizer file of nanotron: it has no state, names and param_groups.")
    if set(document["state"]) != set(document["names"]):
        raise CorruptFile(f"{path}: the indices of its state and of its names differ.")
    return document


def _stored(tensor: object, slot: Slot | None, path: Path, name: str) -> Stored:
    if not isinstance(tensor, ArchiveTensor) or not tensor.is_contiguous:
        raise CorruptFile(f"{path}: the state of {name} is not a contiguous tensor.")
    if slot is not None:
        check_dtype(slot, tensor.dtype, f"{path}: {name}")
    return Stored(path=tensor.path, offset=tensor.offset, shape=tensor.shape, dtype=tensor.dtype)


def _scalar(step: object, path: Path, name: str) -> float:
    if isinstance(step, (int, float)):
        value: int | float = step
    else:
        tensor = _stored(step, None, path, name)
        if tensor.numel != 1 or tensor.dtype not in ("float32", "float64", "int64"):
            raise CorruptFile(
                f"{path}: the step of {name} is {list(tensor.shape)} of {tensor.dtype}, expected one number."
            )
        (value,) = struct.unpack({"float32": "<f", "float64": "<d", "int64": "<q"}[tensor.dtype], tensor.raw_bytes())
    return adam_step(value, f"{path}: {name}")


def _whole_state(
    weight: NativeParameter, found: Mapping[tuple[int, int], LazyTensor], dp_size: int, tp_size: int, where: str
) -> LazyTensor:
    shards: list[LazyTensor] = []
    for tp in range(tp_size):
        # Norms are whole on every tensor-parallel rank, in the optimizer too.
        shape = weight.shards[tp if weight.pairs else 0].shape
        parts = [found[dp, tp] for dp in range(dp_size) if (dp, tp) in found]
        expected = [stop - start for start, stop in zero1_slices(prod(shape), dp_size) if stop > start]
        if [part.numel for part in parts] != expected:
            raise ShapeMismatch(
                f"{where}: tensor-parallel rank {tp} has pieces of {[part.numel for part in parts]} elements, "
                f"expected {expected}."
            )
        if len({part.dtype for part in (*parts, *shards[:1])}) > 1:
            raise _differs(f"{where}: the dtype on tensor-parallel rank {tp}", "that of the other ranks")
        shards.append(join(parts, shape) if len(parts) > 1 else reshape(parts[0], shape))
    if not weight.pairs:
        # A few KB: norms are all that is not cut.
        if other := next((rank for rank, shard in enumerate(shards) if not equal(shard, shards[0])), None):
            raise _differs(f"{where}: tensor-parallel rank {other}'s", "rank 0's")
        return shards[0]
    return join_shards(list(zip(shards, weight.pairs)), weight.whole.shape, where)


def _looks_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether stretches all over two tensors are equal; all of small ones. An embedding's moments are gigabytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = max(_STRETCH_ELEMENTS, a.numel // _STRETCHES)
    starts = [*range(0, a.numel, step), max(0, a.numel - _STRETCH_ELEMENTS)]
    return all(
        equal(*(flat_slice(side, start, min(start + _STRETCH_ELEMENTS, a.numel)) for side in (a, b)))
        for start in starts
    )


def _differs(what: str, other: str) -> MixedCheckpoint:
    return MixedCheckpoint(
        f"{what} is not {other}.\n"
        "Expected the same: nanotron keeps replicas alike on all ranks.\n"
        "A file is damaged, or of another checkpoint: copy all of one, or pass --no-optimizer for the weights only."
    )


def _canonical_optimizer(state: _State, table: WeightTable) -> OptimizerState:
    """Groups in order of first appearance, as nanotron counts parameters; names within a group in the model's order."""
    values: dict[str, Mapping[str, Any]] = {}
    steps: dict[str, float] = {}
    for rule in table.rules:
        if rule.layout not in state.hyperparameters:
            raise NameMismatch(f"the optimizer holds nothing for {rule.layout}.")
        values.update(dict.fromkeys(rule.canonical, state.hyperparameters[rule.layout]))
        steps.update(dict.fromkeys(rule.canonical, state.steps[rule.layout]))
    for name in table.absent:
        # A zero bias of o_proj that nanotron has not goes with its layer's query bias.
        near = name.replace("o_proj", "q_proj")
        values[name], steps[name] = values[near], steps[near]
    groups: list[Mapping[str, Any]] = []
    for value in values.values():
        if value not in groups:
            groups.append(value)
    return OptimizerState(
        steps={name: steps[name] for name in table.shapes},
        groups=tuple(
            ParameterGroup(names=tuple(n for n in table.shapes if values[n] == group), hyperparameters=group)
            for group in groups
        ),
    )


# --- progress --------------------------------------------------------------------------------------------------------


def _read_scheduler(
    folder: Path,
    table: WeightTable,
    spec: ModelSpec,
    weights: Mapping[str, NativeParameter],
    warnings: list[str],
) -> Mapping[str, Any] | None:
    """LambdaLR's state with its lists keyed by canonical name; None, with a warning, where it cannot be kept."""
    if not folder.is_dir():
        return None
    ranks = _block_ranks(weights)
    names = [rule.layout for rule in table.rules]
    canonical = {rule.layout: rule.canonical for rule in table.rules}
    result: dict[str, Any] = {}
    lists: dict[str, dict[str, float]] = {"base_lrs": {}, "_last_lr": {}}
    for path in sorted(folder.glob("lr_scheduler*.pt")):
        ranked = parse_state_file(path.name)
        document = read_torch_archive(path)
        if not isinstance(document, dict):
            raise CorruptFile(f"{path} is not an LR scheduler file of nanotron.")
        # Until 2024-11-26 one rank wrote a single file, with its own parameters' entries only.
        mine = names if ranked is None else parameters_of_rank(names, ranks, ranked.pp or 0, tied=spec.tied)
        with understood(path):
            for key, found in lists.items():
                values = list(document.get(key, ()))
                if values and len(values) != len(mine):
                    if len(set(values)) > 1:
                        warnings.append(
                            f"{path.name} has {len(values)} learning rates for {len(mine)} parameters; left out."
                        )
                        return None
                    values = values[:1] * len(mine)
                for name, value in zip(mine, values):
                    found.update(dict.fromkeys(canonical[name], value))
        result.update({key: value for key, value in document.items() if key not in (*lists, "lr_lambdas")})
    without = [name for name in names for found in lists.values() if canonical[name][0] not in found]
    if result and without:
        raise MissingShard(
            f"{folder}: no file holds the learning rate of {without[0]}.\n"
            "Copy the missing file from the training node, or pass --no-optimizer to convert the weights only."
        )
    check_plain({**result, **lists}, folder)
    return {**result, **lists} if result else None


def _block_ranks(weights: Mapping[str, NativeParameter]) -> dict[str, int]:
    """Pipeline ranks by the files' names; norms, which state none, follow the block that they belong to."""
    ranks: dict[str, int] = {}
    for parameter in weights.values():
        if parameter.pp is not None:
            ranks[block_of(parameter.name)] = parameter.pp
    last = max(ranks.values(), default=0)
    # The final norm and the head come last. A tied head leaves no file; the split always gives it to the last rank.
    return {"norm": ranks.get(block_of(HEAD), last), "head": last, **ranks}


def _progress(
    metadata: Mapping[str, Any] | None, path: Path, scheduler: Mapping[str, Any] | None
) -> TrainingProgress | None:
    if metadata is None:
        return None
    metas = metadata.get("metas") or {}
    with understood(f"{path} (metas)"):
        stages = tuple(
            DataStage(
                name=stage["name"],
                start_training_step=stage["start_training_step"],
                consumed_train_samples=stage["consumed_train_samples"],
                sequence_length=stage.get("sequence_length"),
                consumed_tokens_per_dataset_folder=stage.get("consumed_tokens_per_dataset_folder"),
            )
            for stage in metas.get("data_stages") or []
        )
        progress = TrainingProgress(
            step=metas["last_train_step"],
            consumed_samples=metas.get("consumed_train_samples", 0),
            consumed_tokens=metas.get("consumed_tokens_total"),
            stages=stages,
            last_stage_index=metas.get("last_stage_idx"),
            scheduler=scheduler,
        )
    return check_progress(progress, path)


def _assets(folder: Path) -> dict[str, Path]:
    """Tokenizer and other documents that our writer put beside the step folder."""
    assets = folder / ASSETS
    return {path.name: path for path in sorted(assets.iterdir()) if path.is_file()} if assets.is_dir() else {}
