"""ZeRO-3: each parameter is split over the ranks, and the pieces of a sub-group form a flat tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from smolconv.checkpoint import Slot
from smolconv.errors import MissingShard, MixedCheckpoint, ShapeMismatch
from smolconv.layouts.deepspeed.documents import ModelDocument, OptimizerDocument, flat_tensors
from smolconv.layouts.deepspeed.partitions import join_pieces, match_sub_groups, piece_numel
from smolconv.layouts.deepspeed.reading import DeepSpeedReading, StoredState
from smolconv.storage.torch_archive.archive import read_pickle_bytes
from smolconv.tensors.lazy import LazyTensor, flat_slice


def zero3_tensors(
    reading: DeepSpeedReading, model: ModelDocument, documents: Sequence[OptimizerDocument]
) -> Iterator[tuple[Slot, str, LazyTensor, float | None]]:
    """(slot, name, tensor, Adam's step), from the sub-groups."""
    assert model.groups is not None
    first = documents[0]
    for index, (group, indices) in enumerate(zip(model.groups, first.members)):
        where = f"{reading.tag}: group {index}"
        if not group:
            continue
        lengths = [first.masters[i].numel for i in indices]
        places = match_sub_groups([prod(shape) for shape in group.values()], len(documents), lengths, where)
        flats = [flat_tensors(documents, i) for i in indices]
        for sub, i in enumerate(indices):
            for slot, parts in flats[sub][1].items():
                if {part.numel for part in parts} != {lengths[sub]}:
                    raise ShapeMismatch(f"{where}: {slot.value} of sub-group {i} differs in length between ranks.")
        for (name, shape), (sub, offset) in zip(group.items(), places):
            step, flat = flats[sub]
            size = piece_numel(prod(shape), len(documents))
            for slot, parts in flat.items():
                pieces = [flat_slice(part, offset, offset + size) for part in parts]
                yield slot, name, join_pieces(pieces, shape), step if slot is Slot.EXP_AVG else None


def require_model_files(reading: DeepSpeedReading, model: ModelDocument, found: StoredState, tp: int) -> None:
    """ZeRO-3 writes one model file per rank: only rank 0's has more than pieces of frozen parameters."""
    others: list[ModelDocument] = []
    seen: set[bytes] = set()
    for rank in range(reading.ranks):
        path = reading.files.models.get((rank, tp))
        if path is None:
            raise MissingShard(
                f"{reading.tag}: the model file of rank {rank} of {reading.ranks} is missing "
                f"(zero_pp_rank_{rank}_mp_rank_{tp:02d}_model_states.pt).\nCopy it from the training node."
            )
        if not model.frozen_fragments and path != model.path:
            # Parsing 384 of them takes seconds, and all repeat the first.
            pickled = read_pickle_bytes(path)
            if pickled in seen:
                reading.read_files.append(path)
                continue
            seen.add(pickled)
        other = model if path == model.path else reading.read_model(path)
        reading.require_same_step(other)
        _require_same_parameters(model, other)
        others.append(other)
    for name, shape in model.frozen_shapes.items():
        if name not in model.frozen_fragments:
            continue
        fragments = [other.frozen_fragments[name] for other in others if name in other.frozen_fragments]
        size = piece_numel(prod(shape), reading.ranks)
        if len(fragments) < reading.ranks or {f.numel for f in fragments} != {size}:
            raise MixedCheckpoint(
                f"{reading.tag}: the ranks' model files hold {[f.numel for f in fragments]} elements of {name}.\n"
                f"Expected {size:,} in each of {reading.ranks}, since {name} is {list(shape)}.\n"
                "Files of two checkpoints are mixed: copy all of one from the training nodes."
            )
        found.weights[name] = join_pieces(fragments, shape)


def _require_same_parameters(model: ModelDocument, other: ModelDocument) -> None:
    """Names, shapes and order are taken from the first rank's model file, so the others must be the same."""
    mine, found = (
        {
            "param_shapes": [item for group in document.groups or () for item in group.items()],
            "frozen_param_shapes": document.frozen_shapes,
            "module": {name: (tensor.shape, tensor.dtype) for name, tensor in document.module.items()},
            "dp_world_size": document.dp,
            "mp_world_size": document.tp,
            "global_samples": document.samples,
            "skipped_steps": document.skipped_steps,
        }
        for document in (model, other)
    )
    if different := [key for key in mine if mine[key] != found[key]]:
        raise MixedCheckpoint(
            f"{other.path}: {different[0]} is not that of {model.path.name}.\n"
            "Expected the same names, shapes, order and counts in every rank's model file.\n"
            "Files of two checkpoints are mixed: copy all of one from the training nodes."
        )


def whole_groups(
    groups: Sequence[Mapping[str, tuple[int, ...]]], members: Sequence[Sequence[int]]
) -> tuple[Mapping[str, tuple[int, ...]], ...]:
    """ZeRO-3 lists ``param_shapes`` by sub-group; joined to the optimizer's groups, which name their sub-groups."""
    if sorted(i for group in members for i in group) != list(range(len(groups))):
        return tuple(groups)
    return tuple({name: shape for i in group for name, shape in groups[i].items()} for group in members)
