"""Universal checkpoints: a folder per parameter, as ds_to_universal makes them from any ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from smolconv.checkpoint import ParameterGroup, Slot
from smolconv.errors import CorruptFile, MissingFile, MissingShard, MixedCheckpoint, NameMismatch, counted, some_of
from smolconv.files import is_there
from smolconv.layouts.deepspeed.documents import (
    WITHOUT,
    ModelDocument,
    UniversalDocument,
    read_universal_document,
    read_universal_step,
    read_universal_tensor,
)
from smolconv.layouts.deepspeed.matching import starts_alike
from smolconv.layouts.deepspeed.reading import DeepSpeedReading, StoredState
from smolconv.layouts.deepspeed.zero3 import require_model_files, whole_groups
from smolconv.layouts.dtypes import check_dtype
from smolconv.models.names import stored_names
from smolconv.tensors.lazy import LazyTensor, reshape


def read_universal(reading: DeepSpeedReading, found: StoredState) -> None:
    """Fill in the whole tensors from the parameters' folders."""
    model, zero = reading.first, reading.tag / "zero"
    common = UniversalDocument(groups=(), members=(), steps=())
    if is_there(zero / "optimizer_state.pt"):
        common = read_universal_document(zero / "optimizer_state.pt")
        reading.loss_scaler = common.loss_scaler
        reading.read_files.append(zero / "optimizer_state.pt")
    elif reading.options.optimizer:
        raise MissingFile(
            f"{zero / 'optimizer_state.pt'} is missing: it holds the parameter groups.\n"
            f"Copy it from the source, or {WITHOUT}."
        )
    if model.groups is not None:
        model = replace(model, groups=whole_groups(model.groups, common.members))
    if model.frozen_fragments and (None, 0) not in reading.files.models:
        reading.ranks = len(reading.files.models)
        require_model_files(reading, model, found, 0)
    there = {entry.name for entry in zero.iterdir() if entry.is_dir()}
    grouped = [name for group in model.groups or () for name in group]
    wanted = grouped or [name for name in reading.shapes if name in there]
    if absent := [name for name in wanted if name not in there]:
        raise MissingShard(
            f"{zero}: {len(absent)} of {len(wanted)} parameters are missing, the first {absent[0]}.\n"
            "Copy its folder from the source."
        )
    for name in wanted:
        _read_parameter(reading, zero / name, name, model, found)
    # Parameters in no group are frozen; for a tied head and its embedding DeepSpeed's tool writes only fp32.pt.
    names = stored_names([*found.dtypes, *there])
    for name in sorted(there.difference(wanted)):
        canonical = names.canonical(name)
        if canonical in reading.shapes:
            path = zero / name / "fp32.pt"
            found.weights.setdefault(name, _read_tensor(reading, path, Slot.MASTER, reading.shapes[canonical]))
        elif name not in model.shared and canonical not in reading.table.aliases:
            raise NameMismatch(
                f"{zero / name} is the folder of a parameter that the config does not have. Check the config."
            )
    if reading.options.optimizer:
        _read_groups(reading, model, common, found, wanted)
    wrong = [
        n for n, t in found.slots[Slot.MASTER].items() if n in found.weights and not starts_alike(found.weights[n], t)
    ]
    if wrong:
        raise MixedCheckpoint(
            f"{zero}: fp32.pt of {counted(len(wrong), 'parameter')} ({some_of(wrong, 5, more=True)}) is not what "
            f"{model.path.name} holds.\n"
            "Files of two checkpoints are mixed, or ds_to_universal made it from a run with round_robin_gradients, "
            "which it scrambles: convert the ZeRO checkpoint itself."
        )


def _read_parameter(
    reading: DeepSpeedReading, folder: Path, name: str, model: ModelDocument, found: StoredState
) -> None:
    shape = next((group[name] for group in model.groups or () if name in group), reading.shapes.get(name))
    files = {Slot.MASTER: "fp32", Slot.EXP_AVG: "exp_avg", Slot.EXP_AVG_SQ: "exp_avg_sq"}
    for slot, stem in files.items():
        if slot is not Slot.MASTER and not reading.options.optimizer:
            continue
        found.slots[slot][name] = _read_tensor(reading, folder / f"{stem}.pt", slot, shape)
    if reading.options.optimizer and is_there(folder / "step.pt"):
        found.steps[name] = read_universal_step(folder / "step.pt")
        reading.read_files.append(folder / "step.pt")


def _read_tensor(reading: DeepSpeedReading, path: Path, slot: Slot, shape: tuple[int, ...] | None) -> LazyTensor:
    if not is_there(path):
        # Made before the first step, a universal folder has no moments.
        without = "" if slot is Slot.MASTER else f", or {WITHOUT}"
        raise MissingShard(f"{path} is missing. Copy it from the source{without}.")
    reading.read_files.append(path)
    tensor = read_universal_tensor(path)
    check_dtype(slot, tensor.dtype, path)
    return reshape(tensor, shape) if shape is not None and tensor.shape == (prod(shape),) else tensor


def _read_groups(
    reading: DeepSpeedReading, model: ModelDocument, common: UniversalDocument, found: StoredState, names: Sequence[str]
) -> None:
    groups: Sequence[Sequence[str]] = [list(group) for group in model.groups or ()]
    if not groups and len(common.groups) == 1:
        groups = [names]
    if len(groups) != len(common.groups):
        raise MixedCheckpoint(
            f"{reading.tag / 'zero' / 'optimizer_state.pt'} has {len(common.groups)} parameter groups, but "
            f"{model.path.name} names {len(groups)}.\nCopy both from one source, or {WITHOUT}."
        )
    for group, step in zip(groups, common.steps):
        for name in group:
            if name not in found.steps and step is None:
                raise CorruptFile(f"{reading.tag}: Adam's step of {name} is nowhere. {WITHOUT.capitalize()}.")
            found.steps.setdefault(name, 0.0 if step is None else step)
        if group and (other := next((n for n in group if found.steps[n] != found.steps[group[0]]), None)):
            raise MixedCheckpoint(
                f"{reading.tag}: Adam has made {found.steps[other]:g} steps with {other}, but "
                f"{found.steps[group[0]]:g} with {group[0]} of the same group.\n"
                f"Files of two checkpoints are mixed: copy all of one, or {WITHOUT}."
            )
    found.groups = tuple(
        ParameterGroup(names=tuple(group), hyperparameters=values) for group, values in zip(groups, common.groups)
    )
