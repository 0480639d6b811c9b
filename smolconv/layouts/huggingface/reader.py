"""Hugging Face: config.json, safetensors (one file or sharded) or legacy pytorch_model.bin, tokenizer beside them.

HF has no place for Adam's state, so it goes to the sidecar folder ``smolconv_state/`` (docs/sidecar.md), from where it
comes back without losing a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint, Slot, SourceRecord
from smolconv.errors import MissingFile
from smolconv.files import is_there
from smolconv.layouts.documents import check_config
from smolconv.layouts.dtypes import check_named_dtypes
from smolconv.layouts.huggingface.listing import WEIGHTS
from smolconv.layouts.huggingface.shards import read_indexed, tensors_of
from smolconv.layouts.huggingface.sidecar import SIDECAR, read_sidecar
from smolconv.layouts.layout import ReadOptions, without_aliases
from smolconv.layouts.listing import ASSET_NAMES
from smolconv.models.huggingface import spec_from_hf, weight_table
from smolconv.parsing import read_json
from smolconv.tensors.lazy import LazyTensor


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
    source = SourceRecord()
    warnings: tuple[str, ...] = ()
    if (folder / SIDECAR).is_dir() and (options.optimizer or is_there(folder / SIDECAR / "state.json")):
        sidecar = read_sidecar(folder, table, parameters, options)
        tensors.update(sidecar.slots)
        optimizer, progress, warnings = sidecar.optimizer, sidecar.progress, sidecar.warnings
        source = sidecar.source
        files = (*files, *sidecar.files)
    ignored = next((f"{name}.index.json" for name in WEIGHTS if folder / name in files), None)
    if ignored is not None and (folder / ignored).is_file():
        warnings = (*warnings, f"{ignored} was ignored, as transformers does beside a single file of weights.")
    assets = {name: folder / name for name in ASSET_NAMES if (folder / name).is_file()}
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


def _weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, LazyTensor]]:
    """The weight files, and what they hold by name."""
    for stem in WEIGHTS:
        index, single = folder / f"{stem}.index.json", folder / stem
        if is_there(single):  # transformers, too, looks for an index only where there is no single file
            return (single,), tensors_of(single)
        if is_there(index):
            return read_indexed(folder, index)
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    there = f"{shards[0]} and {len(shards) - 1} more are there, but no index" if shards else "no weights are there"
    raise MissingFile(
        f"{folder}: {there}; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin.\n"
        "Copy the missing file from where the checkpoint came from."
    )
