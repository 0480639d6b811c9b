"""AutoTP: parameters are split over tensor-parallel ranks; all other parameters must be equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smolconv.errors import MixedCheckpoint, ShapeMismatch
from smolconv.layouts.deepspeed.reading import StoredState
from smolconv.tensors.lazy import LazyTensor, equal, join, join_columns


def join_tensor_parallel(
    found: Sequence[StoredState], shapes: Mapping[str, tuple[int, ...]], where: str
) -> StoredState:
    """AutoTP: each parameter is split along the one dimension in which a rank's shape is below the model's."""
    if len(found) == 1:
        return found[0]
    first = found[0]
    for rank, other in enumerate(found):
        if other.dtypes != first.dtypes:
            raise MixedCheckpoint(
                f"{where}: the model file of tensor-parallel rank {rank} has different names or dtypes than rank 0's.\n"
                "Expected the same on all ranks.\n"
                "Files of two checkpoints lie in one folder: copy all of one from the training nodes."
            )
        same_steps = (other.steps, other.flat_steps) == (first.steps, first.flat_steps)
        if not same_steps or other.groups != first.groups:
            what = "parameter groups or hyperparameters" if same_steps else "Adam's steps"
            raise MixedCheckpoint(
                f"{where}: the optimizer files of tensor-parallel rank {rank} hold other {what} than those of rank 0.\n"
                "Files of two checkpoints lie in one folder: copy all of one from the training nodes."
            )
    aliases = {"lm_head.weight": shapes.get("model.embed_tokens.weight", ())}

    def joined(by_rank: Sequence[Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
        result: dict[str, LazyTensor] = {}
        for name in dict.fromkeys(name for rank in by_rank for name in rank):
            shards = [rank[name] for rank in by_rank if name in rank]
            if len(shards) != len(by_rank):
                raise MixedCheckpoint(f"{where}: {name} is not on every tensor-parallel rank.")
            shape = shapes.get(name) or aliases.get(name)
            # A name that is not in the config is refused later, with that name.
            result[name] = shards[0] if shape is None else _join_shards(shards, shape, f"{where}: {name}")
        return result

    return StoredState(
        weights=joined([rank.weights for rank in found]),
        dtypes=first.dtypes,
        slots={slot: joined([rank.slots[slot] for rank in found]) for slot in first.slots},
        steps=first.steps,
        groups=first.groups,
    )


def _join_shards(shards: Sequence[LazyTensor], shape: tuple[int, ...], where: str) -> LazyTensor:
    if other := next((rank for rank, shard in enumerate(shards) if shard.dtype != shards[0].dtype), None):
        raise MixedCheckpoint(
            f"{where} is {shards[other].dtype} on tensor-parallel rank {other}, but {shards[0].dtype} on rank 0.\n"
            "Expected one dtype on all ranks.\n"
            "The file is damaged, or of another checkpoint: copy all of one from the training nodes."
        )
    if all(shard.shape == shape for shard in shards):
        # Replicated: norms. A config with too small a dimension makes a shard look whole, too, so they are compared;
        # shards differ in the first chunk, and replicas of these models are a few KB.
        other = next((rank for rank, shard in enumerate(shards) if not equal(shard, shards[0])), None)
        if other is None:
            return shards[0]
        raise ShapeMismatch(
            f"{where} is {list(shape)} by the config and on each of {len(shards)} tensor-parallel ranks, but rank "
            f"{other} holds other values than rank 0.\n"
            "Expected the same on all ranks, or shards that together have the config's shape.\n"
            "Check the config (num_key_value_heads, num_attention_heads, intermediate_size, vocab_size), or copy all "
            "files of one checkpoint."
        )
    if all(len(shard.shape) == len(shape) for shard in shards):
        rows = sum(shard.shape[0] for shard in shards)
        if rows == shape[0] and all(shard.shape[1:] == shape[1:] for shard in shards):
            return join(shards)
        if len(shape) == 2 and all(shard.shape[0] == shape[0] for shard in shards):
            columns = sum(shard.shape[1] for shard in shards)
            if columns == shape[1]:
                return join_columns(shards)
    raise ShapeMismatch(
        f"{where}: {[list(shard.shape) for shard in shards]} on the tensor-parallel ranks do not make {list(shape)}.\n"
        "Check that the config belongs to this checkpoint."
    )
