"""No ZeRO: Adam's state is in the model file, without names, perhaps in one of DeepSpeed's wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolconv.checkpoint import ParameterGroup, Slot
from smolconv.errors import CorruptFile
from smolconv.layouts.deepspeed.documents import (
    AdamState,
    AnotherOptimizer,
    ModelDocument,
    adam_states,
    hyperparameters,
    numbered,
    scaler_state,
    stored,
)
from smolconv.layouts.deepspeed.matching import Unnamed, name_by_order, place_by_order
from smolconv.layouts.deepspeed.reading import DeepSpeedReading, StoredState
from smolconv.layouts.documents import corrupt_if_malformed
from smolconv.layouts.dtypes import check_dtype
from smolconv.storage.integrity import archive_seals, refuse_seals
from smolconv.tensors.lazy import Stored, flat_slice


def read_zero0(reading: DeepSpeedReading, model: ModelDocument, found: StoredState) -> None:
    """Adam's state in the model file: by parameter, numbered across groups, without names."""
    state = model.optimizer
    assert state is not None
    path = model.path
    reading.loss_scaler = scaler_state({**state, "dynamic": state.get("dynamic_loss_scale")}, path)
    if "fp32_groups_flat" in state:
        _read_fused(reading, model, found)
        return
    with corrupt_if_malformed(f"{path} (optimizer)"):
        masters: list[Stored] = []
        inner = state
        if "fp32_groups" in state:  # FP16_UnfusedOptimizer, which serves bf16 too
            inner = state["optimizer_state_dict"]
            masters = [stored(t, f"{path}: a master") for group in state["fp32_groups"] for t in group]
        groups = inner["param_groups"]
        states = _adam_states(reading, inner, path)
        if not states and not masters:
            return
        for tensor in masters:
            check_dtype(Slot.MASTER, tensor.dtype, f"{path}: a master")
        indices = numbered(groups, path)
        numbers = [index for group in indices for index in group]
        values = tuple(hyperparameters(group, f"{path}: group {i}") for i, group in enumerate(groups))
    if masters and len(masters) != len(numbers):
        raise CorruptFile(f"{path}: {len(masters)} masters of {len(numbers)} parameters.")
    entries = {
        index: Unnamed(
            shape=(
                masters[position].shape
                if masters
                else states[index].moments[Slot.EXP_AVG].shape
                if index in states
                else None
            ),
            master=masters[position] if masters else None,
        )
        for position, index in enumerate(numbers)
    }
    names = _names(reading, model, found, indices, entries)
    if names is None:
        return
    for index, name in names.items():
        if masters and (master := entries[index].master) is not None:
            found.slots[Slot.MASTER][name] = master
        if index in states:
            found.steps[name] = states[index].step
            for slot, tensor in states[index].moments.items():
                found.slots[slot][name] = tensor
    found.groups = tuple(
        # Parameters without state after a step are frozen, although they were given to the optimizer.
        ParameterGroup(names=tuple(names[i] for i in group if i in states or not states), hyperparameters=hyper)
        for group, hyper in zip(indices, values)
    )


def _names(
    reading: DeepSpeedReading,
    model: ModelDocument,
    found: StoredState,
    indices: Sequence[Sequence[int]],
    entries: Mapping[int, Unnamed],
) -> Mapping[int, str] | None:
    """The name of each entry; None, with a warning, if it is ambiguous."""
    if model.groups is not None:
        if [len(group) for group in model.groups] != [len(group) for group in indices]:
            raise CorruptFile(f"{model.path}: param_shapes names other groups than the optimizer's {len(indices)}.")
        return {i: name for group, own in zip(indices, model.groups) for i, name in zip(group, own)}
    names = name_by_order(found.weights, model.module, indices, entries)
    if names is None:
        _require_undamaged(model.path)
        reading.warnings.append(
            f"ZeRO-0 stores Adam's state without names, and its {len(entries)} entries fit the parameters in "
            "more than one way (some are frozen, or the groups' order is not the model's): it was left out."
        )
        return None
    taken = set(names.values())
    if (
        all(entry.master is None for entry in entries.values())
        and len(indices) > 1
        and [names[i] for group in indices for i in group] == [name for name in model.module if name in taken]
    ):
        reading.warnings.append(
            f"ZeRO-0 stores Adam's state without names: its {len(indices)} groups were taken to follow each "
            "other in the model's order, as their shapes do."
        )
    return names


def _adam_states(reading: DeepSpeedReading, adam: Mapping[str, Any], path: Path) -> dict[int, AdamState]:
    try:
        return adam_states(adam["state"], adam["param_groups"], path) if reading.options.optimizer else {}
    except AnotherOptimizer as error:
        reading.leave_out(error)
        return {}


def _read_fused(reading: DeepSpeedReading, model: ModelDocument, found: StoredState) -> None:
    """``FP16_Optimizer``, around one of DeepSpeed's fused Adams: each group flat and unpadded, without names."""
    path = model.path
    with corrupt_if_malformed(f"{path} (optimizer)"):
        state: Mapping[str, Any] = model.optimizer or {}
        flats = [stored(tensor, f"{path}: flat group {i}") for i, tensor in enumerate(state["fp32_groups_flat"])]
        groups = state["optimizer_state_dict"]["param_groups"]
        states = _adam_states(reading, state["optimizer_state_dict"], path)
        values = [hyperparameters(group, f"{path}: group {i}") for i, group in enumerate(groups)]
        for i, flat in enumerate(flats):
            check_dtype(Slot.MASTER, flat.dtype, f"{path}: flat group {i}")
        adam = [states.get(index) for group in numbered(groups, path) for index in group]
    if not len(adam) == len(groups) == len(flats):
        raise CorruptFile(f"{path}: {len(groups)} groups have {len(adam)} states and {len(flats)} flat masters.")
    if any(t.numel != flat.numel for own, flat in zip(adam, flats) if own for t in own.moments.values()):
        raise CorruptFile(f"{path}: Adam's flat moments and their masters differ in length.")
    places = place_by_order(found.weights, model.module, flats)
    if places is None:
        _require_undamaged(path)
        reading.warnings.append(
            "ZeRO-0 stores Adam's state without names, and its flat masters fit the parameters in no way or in "
            "more than one: it was left out."
        )
        return
    for name, (g, start) in places.items():
        weight, own = found.weights[name], adam[g]
        tensors = {Slot.MASTER: flats[g], **(own.moments if own else {})}
        for slot, flat in tensors.items():
            found.slots[slot][name] = flat_slice(flat, start, start + weight.numel, weight.shape)
        if own:
            found.steps[name] = own.step
    found.groups = tuple(
        ParameterGroup(names=tuple(name for name, (g, _) in places.items() if g == index), hyperparameters=hyper)
        for index, hyper in enumerate(values)
    )


def _require_undamaged(path: Path) -> None:
    """Check digests before values that fit nothing are left out: they may be damaged. Raises ``DigestMismatch``."""
    refuse_seals(path, archive_seals([path]), 1)
