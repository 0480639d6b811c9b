"""Writes a source's record as documents into a folder, for layouts that cannot hold it, and reads it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Document, EngineRecord, ParameterGroup, SourceRecord
from smolconv.errors import CorruptFile
from smolconv.files import is_folder_there, is_path_below, read_bytes
from smolconv.layouts.documents import check_config, corrupt_if_malformed, is_number, with_tuples
from smolconv.models.names import StoredNames
from smolconv.parsing import read_json

NANOTRON_CONFIG, NANOTRON_TRAINING = "model_config.json", "config.yaml"
NANOTRON_METADATA, ENGINE = "checkpoint_metadata.json", "deepspeed.json"
_NAMES = (NANOTRON_CONFIG, NANOTRON_TRAINING, NANOTRON_METADATA, ENGINE)


def documents_of(record: SourceRecord) -> dict[str, bytes]:
    """The documents by name, except the HF config, which every layout can hold."""
    engine = None if record.engine is None else _engine_to_json(record.engine)
    found = {
        NANOTRON_CONFIG: None if record.nanotron_config is None else json.dumps(record.nanotron_config).encode(),
        NANOTRON_TRAINING: record.nanotron_training,
        NANOTRON_METADATA: None if record.nanotron_metadata is None else record.nanotron_metadata.data,
        ENGINE: None if engine is None else json.dumps(engine).encode(),
    }
    return {**{name: data for name, data in found.items() if data is not None}, **record.others}


def read_documents(folder: Path) -> tuple[SourceRecord, tuple[Path, ...]]:
    """Read the documents of ``documents_of`` from ``folder``, with their files. Raises ``CorruptFile``."""
    entries = sorted(folder.iterdir()) if is_folder_there(folder) else []
    # A folder that an editor left is ignored; a folder in place of a document is an error.
    paths = tuple(path for path in entries if path.name in _NAMES or not path.is_dir())
    record = SourceRecord()
    for path in paths:
        if path.name == NANOTRON_CONFIG:
            record = replace(record, nanotron_config=_checked(path))
        elif path.name == NANOTRON_TRAINING:
            record = replace(record, nanotron_training=read_bytes(path))
        elif path.name == NANOTRON_METADATA:
            record = replace(record, nanotron_metadata=Document(data=read_bytes(path), value=_checked(path)))
        elif path.name == ENGINE:
            record = replace(record, engine=_engine_from_json(read_json(path), path))
        else:
            record = replace(record, others={**record.others, path.name: read_bytes(path)})
    return record, paths


def _checked(path: Path) -> dict[str, Any]:
    value = read_json(path)
    check_config(value, path)
    return value


def _engine_to_json(record: EngineRecord) -> dict[str, Any]:
    return {
        "client_state": record.client_state,
        "skipped_steps": record.skipped_steps,
        "groups": [group_to_json(group) for group in record.groups],
        "weights_only": record.weights_only,
        "lr_scheduler": record.lr_scheduler,
        "names": asdict(record.names),
        "tag": record.tag,
        "loss_scaler": record.loss_scaler,
    }


def _engine_from_json(value: Mapping[str, Any], where: Path) -> EngineRecord:
    with corrupt_if_malformed(where):
        client, skipped = value.get("client_state", {}), value.get("skipped_steps", 0)
        if not isinstance(client, dict) or isinstance(skipped, bool) or not isinstance(skipped, int):
            raise CorruptFile(f"{where}: client_state must be an object, and skipped_steps an integer.")
        names, tag, scaler = value.get("names", {}), value.get("tag"), value.get("loss_scaler")
        if not isinstance(names.get("wrapper", ""), str) or not (tag is None or is_path_below(tag)):
            raise CorruptFile(f"{where}: tag must be the name of a folder, and what wraps the names a text.")
        if scaler is not None and not all(isinstance(value, bool) or is_number(value) for value in scaler.values()):
            raise CorruptFile(f"{where}: loss_scaler must be an object of numbers.")
        return EngineRecord(
            weights_only=value.get("weights_only") is True,
            client_state=client,
            skipped_steps=skipped,
            groups=tuple(group_from_json(group) for group in value.get("groups", ())),
            lr_scheduler=value.get("lr_scheduler"),
            names=StoredNames(wrapper=names.get("wrapper", ""), bare=names.get("bare") is True),
            tag=tag,
            loss_scaler=scaler,
        )


def group_to_json(group: ParameterGroup) -> dict[str, Any]:
    """A parameter group as plain JSON."""
    return {"names": list(group.names), "hyperparameters": dict(group.hyperparameters)}


def group_from_json(value: Mapping[str, Any]) -> ParameterGroup:
    """A parameter group from plain JSON: betas become a tuple again."""
    return ParameterGroup(names=tuple(value["names"]), hyperparameters=with_tuples(value["hyperparameters"]))
