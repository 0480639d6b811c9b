"""nanotron's JSON and YAML: the model's config, the training config, the progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import DataStage, TrainingProgress
from smolconv.errors import CorruptFile, MissingFile
from smolconv.files import is_there, read_bytes
from smolconv.layouts.documents import check_progress, corrupt_if_malformed, is_count
from smolconv.parsing import parse_yaml_mapping, read_json

#: In ``custom_metas``, which nanotron reads but does not save, so it shows that nothing was trained since.
IMPORT = "smolconv"


@dataclass(frozen=True, kw_only=True)
class Import:
    """The note of smolconv's writer on an imported model that nanotron has not trained since."""

    vocab_size: int | None = None  #: rows before the padding
    rope_scaling: bool = False  #: the weights belong to the config's scaling, though nanotron ignores it


def read_import(metadata: Mapping[str, Any] | None, path: Path) -> Import:
    """From checkpoint_metadata.json. Raises ``CorruptFile`` for a note that smolconv cannot have written."""
    metas, custom = ((metadata or {}).get(name) for name in ("metas", "custom_metas"))
    note = custom.get(IMPORT) if isinstance(custom, dict) else None
    if not isinstance(note, dict) or not isinstance(metas, dict) or note.get("step") != metas.get("last_train_step"):
        return Import()
    rows = note.get("vocab_size")
    if not is_count(rows) or rows == 0:
        raise CorruptFile(
            f"{path}: custom_metas.{IMPORT}.vocab_size is {rows!r:.60}; expected a number of rows.\n"
            f"Remove custom_metas.{IMPORT} from the file, and give the rows with --vocab-size."
        )
    return Import(vocab_size=rows, rope_scaling=note.get("rope_scaling") is True)


def read_model_config(step_folder: Path, override: Path | None) -> tuple[dict[str, Any], str]:
    """The model's config and where it was found: ``override``, model_config.json, or within config.yaml."""
    if override is not None:
        return read_json(override), str(override)
    path = step_folder / "model_config.json"
    if is_there(path):
        return read_json(path), str(path)
    document = step_folder / "config.yaml"
    if not is_there(document):
        raise MissingFile(f"{step_folder} holds neither model_config.json nor config.yaml. Pass one with --config.")
    model = parse_yaml_mapping(read_bytes(document), document).get("model")
    config = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(config, dict):
        raise CorruptFile(f"{document} has no model.model_config. Pass a model_config.json with --config.")
    return config, str(document)


def read_progress(
    metadata: Mapping[str, Any] | None, path: Path, scheduler: Mapping[str, Any] | None
) -> TrainingProgress | None:
    """The progress from checkpoint_metadata.json, with the scheduler's state. Raises ``CorruptFile``."""
    if metadata is None:
        return None
    metas = metadata.get("metas") or {}
    with corrupt_if_malformed(f"{path} (metas)"):
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
