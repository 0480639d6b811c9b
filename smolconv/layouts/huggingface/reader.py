"""Hugging Face: config.json, safetensors (one file or sharded) or legacy pytorch_model.bin, and a tokenizer.

HF's layout cannot hold Adam's state, so smolconv keeps it in the sidecar folder ``smolconv_state/`` (docs/sidecar.md)
and restores it bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, Slot, SourceRecord
from smolconv.errors import MissingFile, NameMismatch
from smolconv.files import is_folder_there, is_there
from smolconv.layouts.documents import check_config, refuse_adapter
from smolconv.layouts.dtypes import check_named_dtypes
from smolconv.layouts.huggingface.listing import WEIGHTS
from smolconv.layouts.huggingface.shards import read_indexed, tensors_of
from smolconv.layouts.huggingface.sidecar import SIDECAR, read_sidecar
from smolconv.layouts.layout import ReadOptions, without_aliases
from smolconv.layouts.listing import assets_in
from smolconv.models.huggingface import config_dtype, spec_from_hf, weight_table
from smolconv.models.names import HEAD, stored_names, with_tied_embedding
from smolconv.models.spec import VOCABULARY
from smolconv.parsing import read_json
from smolconv.tensors.lazy import LazyTensor


def read_huggingface(folder: Path, options: ReadOptions = ReadOptions()) -> Checkpoint:  # noqa: B008
    """Read config, headers and, if requested, the sidecar; tensors stay in their files.

    Raises ``BadCheckpoint`` and its kind for anything missing, contradictory or unsupported.
    """
    config_path = options.config or folder / "config.json"
    config = read_json(config_path)
    check_config(config, config_path)
    spec = spec_from_hf(config, str(config_path))
    table = weight_table(spec)
    files, found = _weights(folder, lambda name: name.endswith(tuple(table.aliases)))
    refuse_adapter(found, folder)
    _refuse_empty(found, folder, files)
    # Before the names: a quantised model has additional tensors, and the dtype explains the problem.
    check_named_dtypes(Slot.PARAMETER, found)
    names = stored_names(found)
    found = names.by_canonical(found)
    if spec.tied:
        found = without_aliases(with_tied_embedding(found), table.aliases, folder)
    else:
        _require_head(found, folder, config_path, config)
    parameters = table.to_canonical(found, str(folder))
    tensors: dict[Slot, Mapping[str, LazyTensor]] = {Slot.PARAMETER: parameters}
    optimizer, progress = None, None
    source = SourceRecord()
    warnings = (*names.warnings, *_dtype_warnings(parameters, config))
    if is_folder_there(folder / SIDECAR) and (options.optimizer or is_there(folder / SIDECAR / "state.json")):
        sidecar = read_sidecar(folder, table, parameters, options)
        tensors.update(sidecar.slots)
        optimizer, progress, warnings = sidecar.optimizer, sidecar.progress, (*warnings, *sidecar.warnings)
        source = sidecar.source
        files = (*files, *sidecar.files)
    ignored = next((f"{name}.index.json" for name in WEIGHTS if folder / name in files), None)
    if ignored is not None and (folder / ignored).is_file():
        warnings = (*warnings, f"{ignored} was ignored, because transformers prefers a single file of weights.")
    assets = assets_in(folder)
    return Checkpoint(
        layout="huggingface",
        root=folder,
        spec=spec,
        tensors=tensors,
        optimizer=optimizer,
        progress=progress,
        assets=assets,
        source=replace(source, hf_config=config),
        files=(*([own] if (own := folder / "config.json").is_file() else []), *files, *assets.values()),
        warnings=warnings,
        frozen=() if optimizer is None else tuple(name for name in parameters if name not in optimizer.steps),
    )


def _refuse_empty(found: Mapping[str, LazyTensor], folder: Path, files: tuple[Path, ...]) -> None:
    # Before the names: transformers takes all empty tensors for one that is shared, and saves one name of them.
    empty = [name for name, tensor in found.items() if tensor.nbytes == 0]
    if not empty:
        return
    indexes = (f"{name}.index.json" for name in WEIGHTS)
    index = next((name for name in indexes if folder / name not in files and (folder / name).is_file()), None)
    advice = (
        "Convert the DeepSpeed folder with the files of all ranks (global_stepN), or save the model again with "
        "stage3_gather_16bit_weights_on_model_save."
        if index is None
        else f"{index} lists other files of weights: remove {files[0].name} from a copy of the folder to read those."
    )
    raise NameMismatch(
        f"{folder}: {empty[0]} has no elements ({len(empty)} of {len(found)} tensors).\n"
        "Expected the weights. DeepSpeed's ZeRO-3 leaves such files when a model is saved without gathering them.\n"
        f"{advice}"
    )


def _dtype_warnings(parameters: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Iterator[str]:
    """Warn if transformers would load other values than are stored: it casts all to the dtype of the config."""
    counts = Counter(tensor.dtype for tensor in parameters.values())
    said, stored = config_dtype(config), " and ".join(f"{count} in {dtype}" for dtype, count in sorted(counts.items()))
    if len(counts) > 1:
        loaded = f"config.json's {said}" if said else "one dtype"
        yield f"parameters are {stored} and are kept; transformers loads all in {loaded}. --dtype makes it one."
    elif said is not None and said not in counts:
        yield (
            f"config.json has {said}, but all parameters are {next(iter(counts))} and keep it; transformers casts "
            f"them when it loads the source, as --dtype {said} does."
        )


def _require_head(found: Mapping[str, LazyTensor], folder: Path, config_path: Path, config: Mapping[str, Any]) -> None:
    if HEAD in found or VOCABULARY[0] not in found:
        return
    said = "says" if "tie_word_embeddings" in config else "leaves out what its class takes for"
    raise NameMismatch(
        f"{folder}: {HEAD} is missing, and {config_path.name} {said} tie_word_embeddings: false.\n"
        "Expected a separate head; transformers would fill it with random numbers.\n"
        "Set tie_word_embeddings to true if the model was trained that way. If not, save it again with its head "
        "(AutoModelForCausalLM), or copy the file that holds it."
    )


def _weights(folder: Path, may_lack: Callable[[str], bool]) -> tuple[tuple[Path, ...], dict[str, LazyTensor]]:
    """The weight files, and their tensors by name."""
    for stem in WEIGHTS:
        index, single = folder / f"{stem}.index.json", folder / stem
        if is_there(single):  # like transformers, which uses an index only without a single file
            return (single,), tensors_of(single)
        if is_there(index):
            return read_indexed(folder, index, may_lack)
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    there = f"{shards[0]} and {len(shards) - 1} more are there, but no index" if shards else "no weights are there"
    raise MissingFile(
        f"{folder}: {there}; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin.\n"
        "Copy the missing file from where the checkpoint came from."
    )
