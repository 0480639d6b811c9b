"""nanotron's weights: a safetensors file per parameter and rank, joined by the slices in each file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Topology
from smolconv.errors import (
    CorruptFile,
    MissingFile,
    MissingShard,
    MixedCheckpoint,
    NameMismatch,
    ShapeMismatch,
    UnsupportedModel,
)
from smolconv.files import is_folder_there
from smolconv.layouts.nanotron.topology import (
    RankedFile,
    SlicePair,
    check_pairs,
    join_shards,
    parse_shape,
    parse_slices,
    parse_weight_file,
    tensor_parallel,
)
from smolconv.models.spec import ModelSpec
from smolconv.storage.safetensors_file import read_safetensors
from smolconv.tensors.lazy import LazyTensor, Stored

FORMATS = ("1.2", "1.3", "1.4", "1.5")


@dataclass(frozen=True, kw_only=True)
class NativeParameter:
    """One parameter as nanotron stores it: fused, and split over tensor-parallel ranks."""

    name: str
    shards: tuple[LazyTensor, ...]  #: by tensor-parallel rank; one for a parameter that is not split
    pairs: tuple[tuple[SlicePair, ...], ...]  #: each shard's place in the whole; () if not split
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
    if not is_folder_there(model):
        raise MissingFile(f"{model} is not there, so this checkpoint has no weights.")
    depth = len(model.parts)
    for path in paths:
        parts = path.parts
        if len(parts) <= depth or parts[depth - 1] != "model":
            continue
        ranked = parse_weight_file(parts[-1])
        if ranked is None and parts[-1].startswith("."):
            continue  # not a program's, but a system's: macOS leaves ._NAME and .DS_Store, NFS .nfsN
        if ranked is None:
            raise NameMismatch(f"{path} is not a file that nanotron writes. Move it out of the checkpoint.")
        if ranked.expert_size not in (None, 1):
            raise UnsupportedModel(f"{path}: experts are split over ranks; mixtures of experts are not supported.")
        name = ".".join((*parts[depth:-1], ranked.kind))
        ranks = grouped.setdefault(name, {})
        if ranked.tp in ranks:
            raise MixedCheckpoint(
                f"{name}: tensor-parallel rank {ranked.tp} exists twice: {ranks[ranked.tp][0].name}, {path.name}.\n"
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
            f"{step_folder} has files of TP {a[0]} x PP {a[1]} and of TP {b[0]} x PP {b[1]}:\n"
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
            raise MixedCheckpoint(f"{path.parent} has {path.name} and files of single ranks. Keep one kind.")
        _check_format(path, found.get("version"), version)
        if tensor_parallel(name, spec) is not None:
            raise MixedCheckpoint(f"{path}: no rank in the name of a parameter that nanotron splits over ranks.")
        return NativeParameter(
            name=name, shards=(tensor,), pairs=(), pp=None, pp_size=None, format=version, whole=tensor
        )
    first, ranked = next(iter(ranks.values()))
    tp_size = ranked.tp_size or 1
    missing = next((rank for rank in range(tp_size) if rank not in ranks), None)
    if missing is not None:
        raise MissingShard(
            f"{name}: tensor-parallel rank {missing} of {tp_size} is missing, {first} is there.\n"
            "Every rank holds its own rows of the parameter. Copy the file from the training node."
        )
    if len({ranked.pp for _, ranked in ranks.values()}) > 1:
        raise MixedCheckpoint(
            f"{first.parent}: one parameter is on several pipeline ranks. Keep one checkpoint's files."
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
                f"{path} is {tensor.dtype}, but the shard of rank 0 is {shards[0].dtype}.\n"
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


def weights_topology(weights: Mapping[str, NativeParameter], metadata: Mapping[str, Any] | None) -> Topology:
    """TP and PP from the files' names, DP from the metadata."""
    cut = next((p for p in weights.values() if p.pairs), None)
    return Topology(
        tp=len(cut.shards) if cut else 1,
        pp=(cut.pp_size if cut else None) or 1,
        dp=None if metadata is None else metadata.get("dp"),
    )
