"""ZeRO 1 to 3: masters and moments are in flat tensors that are split over the ranks."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

from smolconv.checkpoint import MOMENTS, ParameterGroup, Slot
from smolconv.errors import CorruptFile, MissingShard, MixedCheckpoint
from smolconv.layouts.deepspeed.documents import (
    AnotherOptimizer,
    ModelDocument,
    OptimizerDocument,
    flat_tensors,
    read_optimizer_document,
)
from smolconv.layouts.deepspeed.files import optimizer_file
from smolconv.layouts.deepspeed.matching import alike
from smolconv.layouts.deepspeed.partitions import before_round_robin, check_paddings, join_group
from smolconv.layouts.deepspeed.reading import DeepSpeedReading, StoredState
from smolconv.layouts.deepspeed.zero3 import require_model_files, whole_groups, zero3_tensors
from smolconv.tensors.lazy import LazyTensor

#: Elements compared at each position to check whether a weight is its rounded master.
_COMPARED = 64


def read_zero(reading: DeepSpeedReading, model: ModelDocument, found: StoredState, tp: int) -> None:
    """Fill in what the optimizer files of one tensor-parallel rank hold."""
    try:
        documents = _optimizer_documents(reading, model, tp)
    except MissingShard as error:
        if reading.options.optimizer or not found.weights:
            raise
        reading.warnings.append(f"{str(error).splitlines()[0]} Parameters are the module's, as it was stored.")
        return
    if model.groups is None:
        raise CorruptFile(
            f"{model.path} has no param_shapes.\n"
            "Expected the names and shapes of the parameters, in the order in which the optimizer files join them.\n"
            "Copy the model file again from the training node."
        )
    first = documents[0]
    reading.stage, reading.ranks = first.zero_stage, first.ranks
    reading.loss_scaler = first.loss_scaler
    model = replace(model, groups=whole_groups(model.groups, first.members))
    assert model.groups is not None
    groups = first.groups or ({},) * len(model.groups)
    if len(groups) != len(model.groups):
        raise MixedCheckpoint(
            f"{first.path} has {len(groups)} parameter groups, but {model.path.name} names {len(model.groups)}.\n"
            "They may be of different runs."
        )
    if first.zero_stage == 3:
        require_model_files(reading, model, found, tp)
        reading.warnings += _another_step(model, first)
        placed = list(zero3_tensors(reading, model, documents))
    else:
        placed = list(_zero12_tensors(reading, model, documents))
    if not any(groups) and first.states:
        reading.warnings.append("elastic_checkpoint keeps no hyperparameters: weight decay and the rest are unknown.")
    for slot, name, tensor, step in placed:
        found.slots[slot][name] = tensor
        if step is not None:
            found.steps[name] = step
    found.flat_steps = first.steps
    round_robin = first.zero_stage != 3 and not first.bf16_optimizer and _is_round_robin(model, documents)
    if round_robin and tp == 0:
        reading.warnings.append(
            "the run had round_robin_gradients: its groups are carried in the order in which they were given to "
            "the optimizer, so the output loads into a run without it."
        )
    found.groups = tuple(
        ParameterGroup(
            names=before_round_robin(tuple(names), reading.ranks) if round_robin else tuple(names),
            hyperparameters=values,
        )
        for names, values in zip(model.groups, groups)
    )
    _compare_with_module(reading, model, documents, found)


def _is_round_robin(model: ModelDocument, documents: Sequence[OptimizerDocument]) -> bool:
    """By the run's config or, without one, since the ranks' mappings list a group's names in another order."""
    if model.round_robin is not None:
        return model.round_robin
    for index, group in enumerate(model.groups or ()):
        own = dict.fromkeys(name for each in documents for names in each.mapped[index : index + 1] for name in names)
        if set(own) == set(group) and list(own) != list(group):
            return True
    return False


def _another_step(model: ModelDocument, first: OptimizerDocument) -> list[str]:
    """Warnings if Adam's step count differs from the model files'."""
    steps, made = set(first.steps.values()), model.step - model.skipped_steps
    if not steps or made in steps:
        return []
    # Until 0.12 ``initialize_optimizer_states`` of ZeRO-3 calls Adam (read in 0.12.6; no longer in 0.13.5).
    if steps == {made + 1} and re.match(r"0\.(\d|1[012])\.", str(model.ds_version)):
        return [
            f"Adam counts {made + 1} steps after {made}: DeepSpeed {str(model.ds_version).strip():.20} begins ZeRO-3 "
            "with one of zero gradients. The count is carried unchanged."
        ]
    return [
        f"the model files are of step {model.step}, but Adam has made {_steps(first.steps)} steps: it started over in "
        "between, or files of two checkpoints are mixed."
    ]


def _optimizer_documents(reading: DeepSpeedReading, model: ModelDocument, tp: int) -> list[OptimizerDocument]:
    paths = {dp: path for (dp, rank), path in reading.files.optimizers.items() if rank == tp}
    some = read_optimizer_document(next(iter(paths.values())), with_adam=False)
    bf16 = some.path.name.startswith("bf16_")
    # Counted without a list of all ranks: a damaged number of them would fill the memory.
    if missing := some.ranks - sum(rank < some.ranks for rank in paths):
        first_missing = next(rank for rank in range(some.ranks) if rank not in paths)
        name = optimizer_file(first_missing, bf16=bf16, tp=tp)
        raise MissingShard(
            f"{reading.tag}: {missing} of {some.ranks} ranks' optimizer files are missing, the first {name}.\n"
            "Masters and moments are split over all ranks, so none can be rebuilt without it. Copy it from the "
            "training node."
        )
    if extra := [path.name for rank, path in sorted(paths.items()) if rank >= some.ranks]:
        raise MixedCheckpoint(
            f"{reading.tag}: {extra[0]} is of no rank: {some.path.name} counts {some.ranks} ranks.\n"
            "Files of two checkpoints lie in one folder: keep those of one."
        )
    if model.dp not in (None, some.ranks):
        raise MixedCheckpoint(
            f"{model.path} is of {model.dp} data-parallel ranks, but {some.path.name} of {some.ranks}.\n"
            "They are of different checkpoints: copy all files of one."
        )
    wanted = [paths[rank] for rank in range(some.ranks)]
    try:
        documents = [read_optimizer_document(path, with_adam=reading.options.optimizer) for path in wanted]
    except AnotherOptimizer as error:  # Muon, SGD: the masters are still there
        reading.leave_out(error)
        documents = [read_optimizer_document(path, with_adam=False) for path in wanted]
    reading.read_files += [document.path for document in documents]
    first = documents[0]
    for document in documents[1:]:
        _require_same_run(first, document)
    return documents


def _require_same_run(first: OptimizerDocument, other: OptimizerDocument) -> None:
    of = (first.zero_stage, first.ranks, len(first.masters), first.groups, first.alignment_paddings)
    found = (other.zero_stage, other.ranks, len(other.masters), other.groups, other.alignment_paddings)
    if of == found and first.steps == other.steps:
        return
    if first.steps != other.steps:
        what = f"after {_steps(other.steps)} of Adam's steps, but {first.path.name} after {_steps(first.steps)}"
    elif of[:2] != found[:2]:
        what = f"of ZeRO-{found[0]} on {found[1]} ranks, but {first.path.name} of ZeRO-{of[0]} on {of[1]}"
    else:
        what = f"of other parameter groups or hyperparameters than {first.path.name}"
    raise MixedCheckpoint(
        f"{other.path} is {what}.\nFiles of two checkpoints lie in one folder: copy all of one from the training nodes."
    )


def _zero12_tensors(
    reading: DeepSpeedReading, model: ModelDocument, documents: Sequence[OptimizerDocument]
) -> Iterator[tuple[Slot, str, LazyTensor, float | None]]:
    """ZeRO 1 and 2: (slot, name, tensor, Adam's step)."""
    assert model.groups is not None
    first = documents[0]
    if len(first.masters) != len(model.groups):
        raise MixedCheckpoint(
            f"{first.path} holds {len(first.masters)} flat groups, but {model.path.name} names {len(model.groups)}."
        )
    for index, group in enumerate(model.groups):
        where = f"{reading.tag}: group {index}"
        aligned = first.alignment_paddings
        paddings = aligned[index] if aligned is not None else (0,) * len(group)
        if len(paddings) != len(group):
            raise MixedCheckpoint(f"{where}: paddings of {len(paddings)} parameters, names of {len(group)}.")
        check_paddings([prod(shape) for shape in group.values()], paddings, f"{first.path}: group {index}")
        step, flat = flat_tensors(documents, index)
        _check_group_paddings(documents, index, flat)
        for slot, slices in flat.items():
            names = zip(group, join_group(slices, list(group.values()), paddings, f"{where} ({slot.value})"))
            for name, tensor in names:
                yield slot, name, tensor, step if slot is Slot.EXP_AVG else None


def _compare_with_module(
    reading: DeepSpeedReading, model: ModelDocument, documents: Sequence[OptimizerDocument], found: StoredState
) -> None:
    """Detect files of another step or rank: the module's weights are then not the rounded masters.

    It compares a few elements at the start of each parameter and of each rank's slice, to detect shifted and swapped
    slices too.
    """
    masters = found.slots[Slot.MASTER]
    for group, flat in zip(model.groups or (), documents[0].masters):
        names = [name for name in group if name in found.weights]
        ends = list(accumulate(masters[name].numel for name in names))
        if reading.stage == 3 or not names:
            continue
        places = [(name, 0) for name in names]
        for rank in range(reading.ranks if len(names) == len(group) else 0):
            begin = min(rank * flat.numel, ends[-1] - 1)
            index = bisect_right(ends, begin)
            places.append((names[index], begin - (ends[index] - masters[names[index]].numel)))
        for name, at in places:
            weight, master = found.weights[name], masters[name]
            if weight.shape != master.shape or not alike(weight, master, at, _COMPARED):
                raise MixedCheckpoint(
                    f"{model.path} is of step {model.step}, Adam has made {_steps(documents[0].steps)} "
                    f"steps in {documents[0].path.name}, and {name} is not its rounded master.\n"
                    "Files of two checkpoints are mixed, or ranks' files swapped: copy all of one from the "
                    "training nodes.\nFor the model file alone, move the others away and pass --no-optimizer."
                )


def _check_group_paddings(
    documents: Sequence[OptimizerDocument], index: int, flat: Mapping[Slot, Sequence[LazyTensor]]
) -> None:
    """Raise ``CorruptFile`` if a rank's ``group_paddings`` contradict the lengths of its slices of a group.

    The masters are stored without the padding, the moments with it; ``BF16_Optimizer`` and elastic checkpoints store
    both the same way.
    """
    sizes = {part.numel for slot in MOMENTS for part in flat.get(slot, ())}
    if len(sizes) != 1:
        return  # moments were not requested, or an elastic checkpoint has no padding
    (size,) = sizes
    for document, master in zip(documents, flat[Slot.MASTER]):
        padding = None if document.group_paddings is None else document.group_paddings[index]
        stripped = size - master.numel
        if padding is not None and (padding > size or stripped not in (0, padding)):
            raise CorruptFile(
                f"{document.path}: group_paddings of group {index} is {padding:,}; its slice has {size:,} elements.\n"
                f"Expected {stripped:,}: the master of that slice has {master.numel:,} elements.\n"
                "The file is damaged, or of another checkpoint: copy all of one from the training nodes."
            )


def _steps(steps: Mapping[int, float]) -> str:
    return " and ".join(f"{step:g}" for step in sorted(set(steps.values()))) or "no"
