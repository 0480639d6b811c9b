"""Adam's state and the learning-rate scheduler's: a torch archive per rank, joined as the weights are."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from smolconv.checkpoint import MOMENTS, OptimizerState, ParameterGroup, Slot, Topology
from smolconv.errors import (
    CorruptFile,
    MissingFile,
    MissingShard,
    MixedCheckpoint,
    NameMismatch,
    ShapeMismatch,
    UnsupportedModel,
)
from smolconv.files import is_folder_there
from smolconv.layouts.documents import adam_step, check_plain, corrupt_if_malformed
from smolconv.layouts.dtypes import check_dtype
from smolconv.layouts.nanotron.topology import (
    EMBEDDING,
    HEAD,
    block_of,
    join_shards,
    parameters_of_rank,
    parse_state_file,
    zero1_slices,
)
from smolconv.layouts.nanotron.weights import NativeParameter
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import WeightTable
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.storage.torch_archive.values import ArchiveTensor
from smolconv.tensors.lazy import LazyTensor, Stored, equal, flat_slice, join, reshape

#: How much is compared of two large tensors that must be equal.
_STRETCHES, _STRETCH_ELEMENTS = 64, 4096
_SLOT_KEYS = {"exp_avg": Slot.EXP_AVG, "exp_avg_sq": Slot.EXP_AVG_SQ}


@dataclass(frozen=True, kw_only=True)
class NativeState:
    """The complete content of the optimizer files, by nanotron's names."""

    slots: Mapping[Slot, Mapping[str, LazyTensor]]
    steps: Mapping[str, float]
    hyperparameters: Mapping[str, Mapping[str, Any]]
    topology: Topology


def _optimizer_files(folder: Path, weights_topology: Topology) -> dict[tuple[int, int, int], Path]:
    """(pp, dp, tp) -> file; dp is 0 for ZeRO-0."""
    files: dict[tuple[int, int, int], Path] = {}
    sizes: set[tuple[int | None, int | None, int | None]] = set()
    for path in sorted(folder.glob("optimizer_*.pt")):
        ranked = parse_state_file(path.name)
        if ranked is None or ranked.pp is None or ranked.tp is None:
            raise NameMismatch(f"{path} is not a file that nanotron writes. Move it out of the checkpoint.")
        if ranked.expert_size not in (None, 1):
            raise UnsupportedModel(f"{path}: experts are split over ranks; mixtures of experts are not supported.")
        sizes.add((ranked.pp_size, ranked.dp_size, ranked.tp_size))
        files[ranked.pp, ranked.dp or 0, ranked.tp] = path
    if not files:
        raise MissingFile(f"{folder} holds no optimizer_*.pt file. Pass --no-optimizer to convert the weights only.")
    if len(sizes) > 1:
        raise MixedCheckpoint(f"{folder} has optimizer files of several topologies. Keep those of one.")
    pp_size, dp_size, tp_size = sizes.pop()
    if (tp_size, pp_size) != (weights_topology.tp, weights_topology.pp):
        raise MixedCheckpoint(
            f"{folder}: the optimizer has TP {tp_size} x PP {pp_size}, the weights TP {weights_topology.tp} x "
            f"PP {weights_topology.pp}. Pass --no-optimizer to convert the weights only."
        )
    for pp in range(pp_size or 1):
        for dp in range(dp_size or 1):
            for tp in range(tp_size or 1):
                if (pp, dp, tp) not in files:
                    raise MissingShard(
                        f"{folder}: the file of pp rank {pp}, dp rank {dp}, tp rank {tp} is missing "
                        f"(of {pp_size} x {dp_size or 1} x {tp_size}).\n"
                        "Adam's moments are split over the ranks, so they cannot be rebuilt without it.\n"
                        "Copy the file from the training node, or pass --no-optimizer to convert the weights only."
                    )
    return files


def optimizer_topology(folder: Path, topology: Topology) -> Topology:
    """The weights' topology, with DP and the ZeRO stage from the names of the optimizer's files."""
    ranked = [parse_state_file(path.name) for path in folder.glob("optimizer_*.pt")]
    zero1 = [r.dp_size for r in ranked if r is not None and r.dp_size is not None]
    return Topology(tp=topology.tp, pp=topology.pp, dp=zero1[0] if zero1 else topology.dp, zero_stage=int(bool(zero1)))


def read_optimizer(
    folder: Path, spec: ModelSpec, table: WeightTable, weights: Mapping[str, NativeParameter], topology: Topology
) -> NativeState:
    """Adam's state of every rank, joined. Raises ``BadCheckpoint`` and its kind."""
    files = _optimizer_files(folder, topology)
    topology = optimizer_topology(folder, topology)
    dp_size, tp_size = (topology.dp or 1) if topology.zero_stage else 1, topology.tp or 1
    names = {rule.layout for rule in table.rules}
    # (slot, name) -> (dp, tp) -> tensor. A tied head's copy on the last pipeline rank must equal the first rank's.
    pieces: dict[tuple[Slot, str], dict[tuple[int, int], LazyTensor]] = {}
    copies: dict[tuple[Slot, str], dict[tuple[int, int], LazyTensor]] = {}
    steps: dict[str, float] = {}
    hyperparameters: dict[str, Mapping[str, Any]] = {}
    for (pp, dp, tp), path in sorted(files.items()):
        with corrupt_if_malformed(path):
            document = _state_document(path)
            groups = {index: group for group in document["param_groups"] for index in group["params"]}
            for index, name in document["names"].items():
                if name not in names:
                    raise NameMismatch(f"{path}: the optimizer holds {name!r}, which the model does not have.")
                is_copy = weights[name].pp not in (None, pp)
                if is_copy and not (spec.tied and name == EMBEDDING):
                    raise MixedCheckpoint(f"{path}: {name} belongs to pipeline rank {weights[name].pp}.")
                found = dict(document["state"][index])
                step = found.pop("step", None)
                if set(found) != set(_SLOT_KEYS):
                    raise UnsupportedModel(
                        f"{path}: the optimizer holds {sorted(found)} for {name}; only Adam's exp_avg and exp_avg_sq "
                        "are read."
                    )
                for key, slot in _SLOT_KEYS.items():
                    own = (copies if is_copy else pieces).setdefault((slot, name), {})
                    own[dp, tp] = _stored(found[key], slot, path, name)
                if index not in groups:
                    raise CorruptFile(f"{path}: parameter {index} ({name}) belongs to no group.")
                values = {key: value for key, value in groups[index].items() if key != "params"}
                check_plain(values, f"{path}: the group of {name}")
                count = _scalar(step, path, name)
                if (steps.setdefault(name, count), hyperparameters.setdefault(name, values)) != (count, values):
                    raise MixedCheckpoint(
                        f"{path}: {name} has made {count:g} steps; on an earlier rank {steps[name]:g}, or its group "
                        "differs.\n"
                        "Expected the same steps and hyperparameters on every rank that holds a part of it.\n"
                        "Files of two checkpoints are mixed: copy all of one from the training nodes."
                    )
            for name, tensor in document.get("gradient_accumulator", {}).items():
                if name in names:
                    own = (pieces if weights[name].pp in (None, pp) else copies).setdefault((Slot.MASTER, name), {})
                    own[dp, tp] = _stored(tensor, Slot.MASTER, path, name)
    slots: dict[Slot, dict[str, LazyTensor]] = {slot: {} for slot in (Slot.MASTER, *MOMENTS)}
    for (slot, name), found in pieces.items():
        where = f"{folder} ({slot.value} of {name})"
        slots[slot][name] = _whole_state(weights[name], found, dp_size, tp_size, where)
    for (slot, name), found in copies.items():
        where = f"{folder} ({slot.value} of {name}, the last pipeline rank's)"
        copy = _whole_state(weights[name], found, dp_size, tp_size, where)
        # A parameter without state here is also missing there; that is reported later with its name.
        if name in slots[slot] and not _looks_equal(copy, slots[slot][name]):
            raise _differs(where, "that of the embedding's own pipeline rank")
    return NativeState(slots=slots, steps=steps, hyperparameters=hyperparameters, topology=topology)


def _state_document(path: Path) -> dict[str, Any]:
    document = read_torch_archive(path)
    if not isinstance(document, dict) or not {"state", "names", "param_groups"} <= set(document):
        raise CorruptFile(f"{path} is not an optimizer file of nanotron: it has no state, names and param_groups.")
    if set(document["state"]) != set(document["names"]):
        raise CorruptFile(f"{path}: the indices of its state and of its names differ.")
    return document


def _stored(tensor: object, slot: Slot | None, path: Path, name: str) -> Stored:
    if not isinstance(tensor, ArchiveTensor) or not tensor.is_contiguous:
        raise CorruptFile(f"{path}: the state of {name} is not a contiguous tensor.")
    if slot is not None:
        check_dtype(slot, tensor.dtype, f"{path}: {name}")
    return Stored(path=tensor.path, offset=tensor.offset, shape=tensor.shape, dtype=tensor.dtype)


def _scalar(step: object, path: Path, name: str) -> float:
    if isinstance(step, (int, float)):
        value: int | float = step
    else:
        tensor = _stored(step, None, path, name)
        if tensor.numel != 1 or tensor.dtype not in ("float32", "float64", "int64"):
            raise CorruptFile(
                f"{path}: the step of {name} is {list(tensor.shape)} of {tensor.dtype}, expected one number."
            )
        (value,) = struct.unpack({"float32": "<f", "float64": "<d", "int64": "<q"}[tensor.dtype], tensor.raw_bytes())
    return adam_step(value, f"{path}: {name}")


def _whole_state(
    weight: NativeParameter, found: Mapping[tuple[int, int], LazyTensor], dp_size: int, tp_size: int, where: str
) -> LazyTensor:
    shards: list[LazyTensor] = []
    for tp in range(tp_size):
        # Norms are whole on every tensor-parallel rank, in the optimizer too.
        shape = weight.shards[tp if weight.pairs else 0].shape
        parts = [found[dp, tp] for dp in range(dp_size) if (dp, tp) in found]
        expected = [stop - start for start, stop in zero1_slices(prod(shape), dp_size) if stop > start]
        if [part.numel for part in parts] != expected:
            raise ShapeMismatch(
                f"{where}: tensor-parallel rank {tp} has pieces of {[part.numel for part in parts]} elements, "
                f"expected {expected}."
            )
        if len({part.dtype for part in (*parts, *shards[:1])}) > 1:
            raise _differs(f"{where}: the dtype on tensor-parallel rank {tp}", "that of the other ranks")
        shards.append(join(parts, shape) if len(parts) > 1 else reshape(parts[0], shape))
    if not weight.pairs:
        # A few KB: only norms are not split.
        if other := next((rank for rank, shard in enumerate(shards) if not equal(shard, shards[0])), None):
            raise _differs(f"{where}: tensor-parallel rank {other}'s", "rank 0's")
        return shards[0]
    return join_shards(list(zip(shards, weight.pairs)), weight.whole.shape, where)


def _looks_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are equal: small ones whole, large ones in ranges. An embedding's moments are gigabytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = max(_STRETCH_ELEMENTS, a.numel // _STRETCHES)
    starts = [*range(0, a.numel, step), max(0, a.numel - _STRETCH_ELEMENTS)]
    return all(
        equal(*(flat_slice(side, start, min(start + _STRETCH_ELEMENTS, a.numel)) for side in (a, b)))
        for start in starts
    )


def _differs(what: str, other: str) -> MixedCheckpoint:
    return MixedCheckpoint(
        f"{what} is not {other}.\n"
        "Expected the same: nanotron keeps replicas equal on all ranks.\n"
        "A file is damaged, or of another checkpoint: copy all of one, or pass --no-optimizer for the weights only."
    )


def stands_for(name: str) -> str:
    """The parameter whose group and step a zero o_proj bias (absent in nanotron) gets: its layer's query bias."""
    return name.replace("o_proj", "q_proj")


def canonical_optimizer(state: NativeState, table: WeightTable) -> OptimizerState:
    """Groups in order of first appearance, as nanotron counts parameters; names within a group in the model's order."""
    values: dict[str, Mapping[str, Any]] = {}
    steps: dict[str, float] = {}
    for rule in table.rules:
        if rule.layout not in state.hyperparameters:
            raise NameMismatch(f"the optimizer holds nothing for {rule.layout}.")
        values.update(dict.fromkeys(rule.canonical, state.hyperparameters[rule.layout]))
        steps.update(dict.fromkeys(rule.canonical, state.steps[rule.layout]))
    for name in table.absent:
        values[name], steps[name] = values[stands_for(name)], steps[stands_for(name)]
    groups: list[Mapping[str, Any]] = []
    for value in values.values():
        if value not in groups:
            groups.append(value)
    return OptimizerState(
        steps={name: steps[name] for name in table.shapes},
        groups=tuple(
            ParameterGroup(names=tuple(n for n in table.shapes if values[n] == group), hyperparameters=group)
            for group in groups
        ),
    )


def read_scheduler(
    folder: Path,
    table: WeightTable,
    spec: ModelSpec,
    weights: Mapping[str, NativeParameter],
    warnings: list[str],
) -> Mapping[str, Any] | None:
    """LambdaLR's state with its lists keyed by canonical name; None, with a warning, if it cannot be kept."""
    if not is_folder_there(folder):
        return None
    ranks = _block_ranks(weights)
    names = [rule.layout for rule in table.rules]
    canonical = {rule.layout: rule.canonical for rule in table.rules}
    result: dict[str, Any] = {}
    lists: dict[str, dict[str, float]] = {"base_lrs": {}, "_last_lr": {}}
    for path in sorted(folder.glob("lr_scheduler*.pt")):
        ranked = parse_state_file(path.name)
        document = read_torch_archive(path)
        if not isinstance(document, dict):
            raise CorruptFile(f"{path} is not an LR scheduler file of nanotron.")
        # Until 2024-11-26 one rank wrote a single file, with its own parameters' entries only.
        mine = names if ranked is None else parameters_of_rank(names, ranks, ranked.pp or 0, tied=spec.tied)
        with corrupt_if_malformed(path):
            for key, found in lists.items():
                values = list(document.get(key, ()))
                if values and len(values) != len(mine):
                    if len(set(values)) > 1:
                        warnings.append(
                            f"{path.name} has {len(values)} learning rates for {len(mine)} parameters; left out."
                        )
                        return None
                    values = values[:1] * len(mine)
                for name, value in zip(mine, values):
                    found.update(dict.fromkeys(canonical[name], value))
        result.update({key: value for key, value in document.items() if key not in (*lists, "lr_lambdas")})
    without = [name for name in names for found in lists.values() if canonical[name][0] not in found]
    if result and without:
        raise MissingShard(
            f"{folder}: no file holds the learning rate of {without[0]}.\n"
            "Copy the missing file from the training node, or pass --no-optimizer to convert the weights only."
        )
    check_plain({**result, **lists}, folder)
    return {**result, **lists} if result else None


def _block_ranks(weights: Mapping[str, NativeParameter]) -> dict[str, int]:
    """Pipeline ranks from the files' names; norms, whose names have none, follow their block."""
    ranks: dict[str, int] = {}
    for parameter in weights.values():
        if parameter.pp is not None:
            ranks[block_of(parameter.name)] = parameter.pp
    last = max(ranks.values(), default=0)
    # The final norm and the head come last. A tied head leaves no file; the split always gives it to the last rank.
    return {"norm": ranks.get(block_of(HEAD), last), "head": last, **ranks}
