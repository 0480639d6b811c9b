"""Read a nanotron checkpoint: any TP x PP x DP, ZeRO-0 and ZeRO-1, with or without fp32 masters, formats 1.2 to 1.5."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, Document, Slot, SourceRecord
from smolconv.errors import CorruptFile, MissingFile
from smolconv.files import is_folder_there, is_there, read_bytes
from smolconv.layouts.documents import check_config, is_count
from smolconv.layouts.dtypes import check_named_dtypes
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.listing import assets_in
from smolconv.layouts.nanotron.documents import Import, read_import, read_model_config, read_progress
from smolconv.layouts.nanotron.listing import ASSETS, find_step_folder, is_number
from smolconv.layouts.nanotron.optimizer import canonical_optimizer, optimizer_topology, read_optimizer, read_scheduler
from smolconv.layouts.nanotron.weights import NativeParameter, read_native, weights_topology
from smolconv.models.nanotron import nanotron_interleaved, nanotron_table, spec_from_nanotron
from smolconv.models.spec import ModelSpec
from smolconv.parsing import read_json
from smolconv.tensors.lazy import LazyTensor


def read_nanotron(folder: Path, options: ReadOptions = ReadOptions()) -> Checkpoint:  # noqa: B008
    """Read headers and small documents only; tensors stay in their files.

    Raises ``BadCheckpoint`` and its kind for anything missing, contradictory or unsupported.
    """
    step_folder = find_step_folder(folder, options.step)
    config, where = read_model_config(step_folder, options.config)
    check_config(config, where)
    metadata_path = step_folder / "checkpoint_metadata.json"
    metadata = _metadata(metadata_path)
    imported = read_import(metadata, metadata_path)
    as_configured = imported.rope_scaling if options.rope_as_configured is None else options.rope_as_configured
    spec = spec_from_nanotron(config, where, rope_as_configured=as_configured, architecture=options.architecture)
    table = nanotron_table(spec, interleaved=nanotron_interleaved(config, where))
    paths = list(_walk(step_folder))
    weights = read_native(step_folder, paths, spec, metadata)
    tensors: dict[Slot, Mapping[str, LazyTensor]] = {
        Slot.PARAMETER: table.to_canonical({name: p.whole for name, p in weights.items()}, str(step_folder))
    }
    topology = weights_topology(weights, metadata)
    optimizer, scheduler, warnings = None, None, _warnings(config, weights, spec, imported)
    has_state = is_folder_there(step_folder / "optimizer")
    if options.optimizer and has_state:
        state = read_optimizer(step_folder / "optimizer", spec, table, weights, topology)
        for slot, found in state.slots.items():
            if found:
                tensors[slot] = table.to_canonical(found, f"{step_folder}/optimizer ({slot.value})")
        if state.hyperparameters:
            if metadata is None:
                raise MissingFile(
                    f"{metadata_path} is not there, but Adam's state is.\n"
                    "Expected it in the same folder, as nanotron saves it: only it has the step and the samples.\n"
                    "Copy it from the run, or pass --no-optimizer to convert the weights only."
                )
            optimizer = canonical_optimizer(state, table)
        else:
            warnings.append(
                "the optimizer's files hold no Adam state, as nanotron saves it before the first step "
                "(checkpoints.save_initial_state): there is none to carry."
            )
        scheduler = read_scheduler(step_folder / "lr_scheduler", table, spec, weights, warnings)
        topology = state.topology
    elif has_state:
        topology = optimizer_topology(step_folder / "optimizer", topology)
    return Checkpoint(
        layout="nanotron",
        root=folder,
        spec=spec,
        tensors=tensors,
        topology=topology,
        optimizer=optimizer,
        progress=read_progress(metadata, metadata_path, scheduler),
        assets=_assets(step_folder.parent),
        source=_source(step_folder, config, metadata),
        files=tuple(paths),
        warnings=tuple(warnings),
        unpadded_vocab_size=imported.vocab_size,
    )


def _source(step_folder: Path, config: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> SourceRecord:
    training, path = step_folder / "config.yaml", step_folder / "checkpoint_metadata.json"
    return SourceRecord(
        nanotron_config=config,
        nanotron_training=read_bytes(training) if is_there(training) else None,
        nanotron_metadata=None if metadata is None else Document(data=read_bytes(path), value=metadata),
    )


def _metadata(path: Path) -> Mapping[str, Any] | None:
    metadata = read_json(path) if is_there(path) else None
    if metadata is not None and not is_count(metadata.get("dp", 1)):
        raise CorruptFile(f"{path}: dp is {metadata['dp']!r:.60}; expected a whole number.")
    return metadata


def _warnings(
    config: Mapping[str, Any], weights: Mapping[str, NativeParameter], spec: ModelSpec, imported: Import
) -> list[str]:
    found = []
    if config.get("rope_scaling") and spec.rope_scaling is None:
        why = (
            "though the model was imported with it" if imported.rope_scaling else "so the model was trained without it"
        )
        found.append(
            f"model_config.json sets rope_scaling, which nanotron's forward ignores, {why}. "
            "It is left out of the spec (as-trained); --rope-scaling as-configured puts it in."
        )
    elif spec.rope_scaling is not None and imported.rope_scaling:
        found.append(
            "rope_scaling is kept: the model was imported with it, and nanotron, which ignores it, has not trained it "
            "since. --rope-scaling as-trained leaves it out."
        )
    if any(p.format in ("1.2", "1.3") for p in weights.values()):
        found.append(
            "format 1.2/1.3 is read according to nanotron's source code; no checkpoint of it was available for tests."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class NativeModel:
    """A stored nanotron model: its own config and its fused parameters, joined over the ranks."""

    config: Mapping[str, Any]
    parameters: Mapping[str, LazyTensor]  #: by nanotron's names


def read_native_model(folder: Path, options: ReadOptions = ReadOptions()) -> NativeModel:  # noqa: B008
    """Headers only. Raises as ``read_nanotron`` does."""
    step_folder = find_step_folder(folder, options.step)
    config, where = read_model_config(step_folder, options.config)
    check_config(config, where)
    spec = spec_from_nanotron(config, where, architecture=options.architecture)
    nanotron_interleaved(config, where)  # refuses a config without the field
    metadata_path = step_folder / "checkpoint_metadata.json"
    metadata = read_json(metadata_path) if is_there(metadata_path) else None
    weights = read_native(step_folder, list(_walk(step_folder)), spec, metadata)
    parameters = {name: p.whole for name, p in weights.items()}
    check_named_dtypes(Slot.PARAMETER, parameters)
    return NativeModel(config=config, parameters=parameters)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below, also behind linked folders. Hidden files are other programs': .DS_Store, .nfs..., ._NAME."""
    # A link may lead back up, within the checkpoint or to the root of the disk.
    entered = {_identity(parent) for parent in folder.resolve().parents}
    for parent, folders, files in os.walk(folder, followlinks=True):
        found = _identity(Path(parent))
        if found is None or found in entered:
            folders.clear()
            continue
        entered.add(found)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (not is_number(name), int(name) if is_number(name) else 0, name))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent) / name


def _identity(folder: Path) -> tuple[int, int] | None:
    """The same for all paths to a folder; None if it is gone or may not be read."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _assets(folder: Path) -> dict[str, Path]:
    """Tokenizer and other documents that smolconv's writer put next to the step folder."""
    assets = folder / ASSETS
    config = assets / "config.json"
    return {**assets_in(assets), **({"config.json": config} if is_there(config) else {})}
