"""Tensors in one file, or in several with an index: the weights, and each slot of the sidecar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from smolconv.checkpoint import Slot
from smolconv.errors import CorruptFile, MissingShard, NameMismatch, UnsupportedModel
from smolconv.files import is_file_name, is_there
from smolconv.parsing import read_json
from smolconv.storage.planned import PlannedFile, plain_file
from smolconv.storage.safetensors_file import plan_safetensors, read_safetensors
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.storage.torch_archive.values import ArchiveTensor
from smolconv.tensors.lazy import LazyTensor, Stored


def read_indexed(
    folder: Path, index: Path, may_lack: Callable[[str], bool] = lambda name: False
) -> tuple[tuple[Path, ...], dict[str, LazyTensor]]:
    """The shards that an index names, and the tensors in them. Raises ``BadCheckpoint`` if they disagree.

    ``may_lack``: whether the shard of a name in the index may lack it without loss.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CorruptFile(f"{index} has no weight_map from tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_file_name(name) or "\\" in name:
            raise CorruptFile(
                f"{index} names {name!r:.80}, which is not a plain file name in its folder. It was not opened."
            )
        if not is_there(folder / name):
            raise MissingShard(
                f"{folder}: {name} is missing, although {index.name} puts "
                f"{sum(value == name for value in weight_map.values())} tensors there.\nCopy it from the source."
            )
    found: dict[str, LazyTensor] = {}
    for name in names:
        for tensor_name, tensor in tensors_of(folder / name).items():
            if weight_map.get(tensor_name) != name:
                raise NameMismatch(
                    f"{folder}: {tensor_name} is in {name}, but the index has {weight_map.get(tensor_name)}.\n"
                    "Shards of two checkpoints may be mixed: copy all of one."
                )
            found[tensor_name] = tensor
    ghosts = [name for name in weight_map if name not in found and not may_lack(name)]
    if ghosts:
        raise NameMismatch(
            f"{index} lists {ghosts[0]} in {weight_map[ghosts[0]]}, which does not hold it ({len(ghosts)} such)."
        )
    return tuple(folder / name for name in names), found


def tensors_of(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file by name, safetensors or torch archive."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path).tensors)
    document = read_torch_archive(path)
    if not isinstance(document, Mapping):
        raise CorruptFile(f"{path} holds no mapping from names to tensors.")
    found: dict[str, LazyTensor] = {}
    for name, tensor in document.items():
        if not isinstance(tensor, ArchiveTensor):
            raise _not_a_tensor(path, str(name), document)
        if not tensor.is_contiguous:
            raise UnsupportedModel(f"{path}: {name} is stored transposed; save it again with .contiguous().")
        found[str(name)] = Stored(path=path, offset=tensor.offset, shape=tensor.shape, dtype=tensor.dtype)
    return found


def _not_a_tensor(path: Path, name: str, document: Mapping[str, object]) -> CorruptFile | UnsupportedModel:
    nested = next(
        (
            str(key) for key, value in document.items()
            if isinstance(value, Mapping) and value and all(isinstance(each, ArchiveTensor) for each in value.values())
        ),
        None,
    )  # fmt: skip
    if nested is None:
        return CorruptFile(f"{path}: {name} is not a tensor.\nExpected tensors by name.\nCopy the file again.")
    return UnsupportedModel(
        f"{path} is the file of a training program: its weights are one level down, in {nested!r:.60}.\n"
        "Expected tensors by name, as transformers saves them.\n"
        "Save that part alone in a copy of the folder: "
        f"torch.save(torch.load(FILE, map_location='cpu')[{nested!r:.60}], NEW_FILE)"
    )


def plan_sharded(
    tensors: Mapping[str, LazyTensor], stem: str, index_stem: str, max_shard_bytes: int, slot: Slot, folder: str = ""
) -> list[PlannedFile]:
    """One file, or shards and their index; in ``folder``, always with an index."""
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
        files.append(plain_file(f"{folder}{index_stem}.safetensors.index.json", json_bytes(index)))
    return files


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[list[str]]:
    """Pack tensors into files in order, none larger than ``max_shard_bytes`` unless one tensor is.

    It makes as few files as possible, of sizes as even as possible: each has a worker, and all end at the same time.
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


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
