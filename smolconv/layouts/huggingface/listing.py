"""Names of a Hugging Face folder: how it is recognised, and which of its files are needed."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from smolconv.errors import CorruptFile, MissingFile, MissingShard, some_of
from smolconv.layouts.listing import AnyPath, P, companions, content, files_below, there
from smolconv.parsing import parse_json

CONFIG = "config.json"
#: Transformers' names for weights, in order of preference. ``index_of`` gives the index of each one's shards.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: Where our writer puts Adam's state and the documents of the layout that the checkpoint came from.
SIDECAR = "smolconv_state"
#: A file in a folder with a PEFT adapter, which changes the weights and is not read.
ADAPTER = "adapter_config.json"
#: Names by which a checkpoint is recognised.
MARKS: tuple[str, ...] = (CONFIG,)

#: Suffixes of weights for any program.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".onnx", ".onnx_data", ".gguf", ".msgpack", ".h5", ".ckpt", ".tflite",
)  # fmt: skip


def index_of(weights: str) -> str:
    return f"{weights}.index.json"


def detect(folder: AnyPath) -> bool:
    """Whether ``folder`` holds an HF config and weights."""
    return there(folder / CONFIG) and has_weights(folder)


def has_weights(folder: AnyPath) -> bool:
    """Whether it holds weights with Transformers' names, with any config."""
    names = (name for single in WEIGHTS for name in (single, index_of(single)))
    return any(_is_file(folder / name) for name in names) or any(
        fnmatchcase(path.name, "model-*-of-*.safetensors") for path in folder.iterdir()
    )


def _is_file(path: AnyPath) -> bool:
    # DeepSpeed's zero_to_fp32 writes a folder, often called pytorch_model.bin, next to the checkpoint that it reads.
    return not (isinstance(path, Path) and os.path.isdir(path)) and there(path)


def holds_training(folder: AnyPath) -> bool:
    """``Listing.holds_training``: Adam's tensors can only be in the sidecar, which may hold only documents."""
    sidecar = folder / SIDECAR
    return sidecar.is_dir() and any(path.name.endswith(".safetensors") for path in sidecar.iterdir())


def needed_files(folder: P, *, step: int | None, optimizer: bool) -> list[P]:
    """``Listing.needed_files``. A folder is one step, so ``step`` chooses nothing."""
    adam = (".safetensors", index_of(".safetensors"))
    sidecar = [path for path in files_below(folder / SIDECAR) if optimizer or not path.name.endswith(adam)]
    adapter = folder / ADAPTER  # to warn about it
    return [*companions(folder), *_weights(folder), *sidecar, *([adapter] if adapter.is_file() else [])]


def _weights(folder: P) -> list[P]:
    for single in WEIGHTS:
        index = folder / index_of(single)
        if there(folder / single):  # transformers and smolconv's reader choose the same way
            return [folder / single]
        if there(index):
            shards = _shards(index)
            # Names in the index are looked up among the folder's entries, so they cannot lead outside it.
            missing = sorted(shards.difference(path.name for path in folder.iterdir() if path.is_file()))
            if missing:
                raise MissingShard(
                    f"{folder} lacks {len(missing)} of the {len(shards)} shards in {index.name}: "
                    f"{some_of(missing, 8, more=True)}.\n"
                    "Expected every shard that the index names.\n"
                    "Choose another revision, or ask the repository's owner to upload them."
                )
            return [index, *(folder / name for name in sorted(shards))]
    raise _no_weights(folder)


def _shards(index: AnyPath) -> set[str]:
    try:
        names = set(parse_json(content(index))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names or not all(isinstance(name, str) for name in names):
        raise CorruptFile(
            f"{index} is not an index of shards.\n"
            'Expected JSON with a "weight_map" from tensor names to file names.\n'
            "Choose another revision, or ask the repository's owner to fix it."
        )
    return names


def lacking(folder: AnyPath) -> MissingFile | None:
    """The error for a config without weights."""
    return _no_weights(folder) if (folder / CONFIG).is_file() else None


def _no_weights(folder: AnyPath) -> MissingFile:
    if made := next((path for name in WEIGHTS if (path := folder / name).is_dir()), None):
        return MissingFile(
            f"{made} is a folder.\n"
            "Expected a file of weights. DeepSpeed's zero_to_fp32 writes its files into a folder of the given name.\n"
            f"Name that folder as the source, with --config {folder / CONFIG}"
        )
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name.endswith(_WEIGHT_SUFFIXES))
    return MissingFile(
        f"{folder} has a {CONFIG} but no weights that can be read (found: {some_of(found, 8, more=True) or 'none'}).\n"
        f"Expected {', '.join(name for single in WEIGHTS for name in (index_of(single), single))}.\n"
        "Check the subfolder and the revision. A file of torch.save that holds tensors by name can be read if it is "
        "called pytorch_model.bin; convert others to safetensors first."
    )
