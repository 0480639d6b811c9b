"""The folder ``smolconv_state/`` (docs/sidecar.md): Adam's state and progress, for which Hugging Face has no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import (
    MOMENTS,
    Checkpoint,
    DataStage,
    OptimizerState,
    Slot,
    SourceRecord,
    TrainingProgress,
)
from smolconv.errors import CorruptFile, DigestMismatch, MissingShard
from smolconv.files import is_there
from smolconv.layouts.documents import adam_step, check_progress, corrupt_if_malformed
from smolconv.layouts.huggingface.shards import plan_sharded, read_indexed
from smolconv.layouts.layout import ReadOptions, Written
from smolconv.layouts.record import documents_of, group_from_json, group_to_json, read_documents
from smolconv.models.weights import WeightTable
from smolconv.parsing import read_json
from smolconv.storage.integrity import digest_tensor
from smolconv.storage.planned import PlannedFile, plain_file
from smolconv.tensors.lazy import LazyTensor

SIDECAR = "smolconv_state"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The content of the folder, by canonical names."""

    slots: Mapping[Slot, Mapping[str, LazyTensor]]
    optimizer: OptimizerState | None
    progress: TrainingProgress | None
    source: SourceRecord
    files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def read_sidecar(
    folder: Path, table: WeightTable, parameters: Mapping[str, LazyTensor], options: ReadOptions
) -> Sidecar:
    """Headers and documents. Raises ``BadCheckpoint`` and its kind, for example if the state has other weights."""
    home = folder / SIDECAR
    state = read_json(home / "state.json")
    progress = _progress_from_json(state.get("progress"), home / "state.json")
    source, documents = read_documents(home / "source")
    if not options.optimizer or state.get("optimizer") is None:
        return Sidecar(
            slots={}, optimizer=None, progress=progress, source=source, files=(home / "state.json", *documents)
        )
    slots: dict[Slot, Mapping[str, LazyTensor]] = {}
    files = [home / "state.json", *documents]
    for slot in (Slot.MASTER, Slot.EXP_AVG, Slot.EXP_AVG_SQ):
        index = home / f"{slot.value}.safetensors.index.json"
        if is_there(index):
            shards, found = read_indexed(home, index)
            slots[slot] = table.to_canonical(found, f"{home} ({slot.value})", all_needed=False)
            files += [index, *shards]
        elif slot in MOMENTS:
            raise MissingShard(
                f"{index} is missing, although {home / 'state.json'} lists Adam's state.\n"
                "Copy it from the source, or pass --no-optimizer to convert the weights only."
            )
    if options.check_sidecar:
        _check_belongs(folder, state, parameters)
    where = f"{home / 'state.json'} (optimizer)"
    with corrupt_if_malformed(where):
        optimizer = OptimizerState(
            steps={name: adam_step(step, f"{where}: {name}") for name, step in state["optimizer"]["steps"].items()},
            groups=tuple(group_from_json(group) for group in state["optimizer"]["groups"]),
        )
        grouped = [name for group in optimizer.groups for name in group.names]
        same = len(grouped) == len(optimizer.steps) and set(grouped) == optimizer.steps.keys()
    if not same or not optimizer.steps.keys() <= slots[Slot.EXP_AVG].keys():
        raise CorruptFile(f"{where}: its steps, its groups and the stored moments do not have the same parameters.")
    return Sidecar(slots=slots, optimizer=optimizer, progress=progress, source=source, files=tuple(files))


def _check_belongs(folder: Path, state: Mapping[str, Any], parameters: Mapping[str, LazyTensor]) -> None:
    """Check that the weights are those that the sidecar was written with: for others its moments are wrong."""
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
    with corrupt_if_malformed(f"{where} (progress)"):
        stages = tuple(DataStage(**stage) for stage in value.get("stages", ()))
        progress = TrainingProgress(**{**value, "stages": stages})
    return check_progress(progress, where)


def sidecar_files(checkpoint: Checkpoint, max_shard_bytes: int) -> list[PlannedFile]:
    """Its files except state.json, which needs the weights' digests."""
    folder = f"{SIDECAR}/"
    files = [plain_file(f"{folder}source/{name}", data) for name, data in documents_of(checkpoint.source).items()]
    if checkpoint.has_optimizer:
        for slot in (Slot.MASTER, Slot.EXP_AVG, Slot.EXP_AVG_SQ):
            tensors = checkpoint.tensors.get(slot)
            if tensors:
                files += plan_sharded(tensors, slot.value, slot.value, max_shard_bytes, slot, folder)
    return files


def sidecar_state(checkpoint: Checkpoint, files: Sequence[PlannedFile], written: Written) -> dict[str, Any]:
    """The content of state.json, once ``files`` are written."""
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
                group_to_json(group) for group in optimizer.groups
            ],
        },
        "progress": None if progress is None else asdict(progress),
    }  # fmt: skip
