"""ZeRO's partitions of SmolLM3-3B on as many ranks as its published runs had, against the functions that DeepSpeed cuts with.

No tensor has data: ours are ranges of one file that is not there, DeepSpeed's are torch's meta tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_estimate import N_SMOLLM3, SMOLLM3

from smolconv.layouts.deepspeed import partitions
from smolconv.layouts.deepspeed.partitions import (
    cut_group,
    cut_piece,
    group_padding,
    partition_numel,
    piece_numel,
    sub_groups,
)
from smolconv.models.huggingface import parameter_shapes
from smolconv.tensors.lazy import Joined, LazyTensor, Stored, Zeros

#: 8 as a node's GPUs, 7 as a number that divides little.
RANKS = (7, 8, 96, 384)
FP32 = 4
#: SmolLM3's groups: the embedding is not decayed.
SHAPES = parameter_shapes(SMOLLM3)
GROUPS = [
    {name: shape for name, shape in SHAPES.items() if ("embed_tokens" in name) == embedding}
    for embedding in (False, True)
]  # fmt: skip


def laid_out(group: dict[str, tuple[int, ...]]) -> list[LazyTensor]:
    """The parameters one after the other, from byte 0 of a file that is not there."""
    ends = accumulate(map(prod, group.values()))
    return [
        Stored(path=Path("nowhere"), offset=FP32 * (end - prod(shape)), shape=shape, dtype="float32")
        for shape, end in zip(group.values(), ends)
    ]


def ranges(tensor: LazyTensor) -> Iterator[tuple[int, int]]:
    """(first element, how many) that ``tensor`` takes of the file, in order; (-1, how many) are zeros."""
    for part in tensor.parts if isinstance(tensor, Joined) else [tensor]:
        if isinstance(part, Zeros):
            yield -1, part.numel
        else:
            extents = part.extents()
            assert extents is not None
            yield from ((extent.offset // FP32, extent.numel) for extent in extents)


def deepspeeds_slices(monkeypatch: pytest.MonkeyPatch, group: dict[str, tuple[int, ...]], ranks: int) -> list[Any]:
    """Of ZeRO-1 and 2, by rank: views of the flat group, as its constructor makes them."""
    stage = zero_module("stage_1_and_2")
    monkeypatch.setattr(stage.dist, "get_world_size", lambda group=None: ranks)
    own, of = SimpleNamespace(flatten=torch._C._nn.flatten_dense_tensors, real_dp_process_group=[None]), stage.DeepSpeedZeroOptimizer  # fmt: skip
    tensors = [torch.empty(shape, device="meta") for shape in group.values()]
    flat = of.flatten_dense_tensors_aligned(own, tensors, 2 * ranks)
    found: list[Any] = of.get_data_parallel_partitions(own, flat, 0)
    return found


def zero_module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"deepspeed.runtime.zero.{name}")


def differing(ours: Sequence[LazyTensor], theirs: Sequence[Any], numel: int) -> list[int]:
    """Ranks whose slice has another length than DeepSpeed's, or does not hold the elements from its offset on."""
    found = []
    for rank, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        first = its.storage_offset()
        places = [place for place in ranges(mine) if place[0] >= 0]
        zeros = sum(count for start, count in ranges(mine) if start < 0)
        together = [first + sum(count for _, count in places[:i]) for i in range(len(places))]
        filled = min(first + its.numel(), numel) - first
        if (
            mine.numel != its.numel()
            or [start for start, _ in places] != together
            or sum(count for _, count in places) != filled
            or zeros != its.numel() - filled
        ):
            found.append(rank)
    return found


@pytest.mark.parametrize("ranks", RANKS)
def test_slices_of_zero_1_and_2_are_deepspeeds_and_hold_each_element_once(monkeypatch, ranks):
    counted = 0
    for group in GROUPS:
        numel = sum(map(prod, group.values()))
        theirs = deepspeeds_slices(monkeypatch, group, ranks)
        ours = cut_group(laid_out(group), ranks, padded=True)
        assert differing(ours, theirs, numel) == []
        # Without padding, one after the other, they are the group.
        bare = [place for part in cut_group(laid_out(group), ranks, padded=False) for place in ranges(part)]
        assert [start for start, _ in bare] == list(accumulate((count for _, count in bare[:-1]), initial=0))
        counted += sum(count for _, count in bare)
        padding = sum(part.numel() for part in theirs) - numel
        assert [group_padding(numel, ranks, rank) for rank in range(ranks)] == [0] * (ranks - 1) + [padding]
        assert partition_numel(numel, ranks) == theirs[0].numel()
    assert counted == N_SMOLLM3


def test_another_alignment_would_be_noticed(monkeypatch):
    theirs = deepspeeds_slices(monkeypatch, GROUPS[0], 384)
    monkeypatch.setattr(partitions, "ALIGNMENT", 4)
    ours = cut_group(laid_out(GROUPS[0]), 384, padded=True)
    assert len(differing(ours, theirs, sum(map(prod, GROUPS[0].values())))) == 384


class Cut:
    """A parameter of ZeRO-3, as DeepSpeed's functions look at it."""

    def __init__(self, numel: int, ranks: int) -> None:
        self.ds_numel, self.ranks = numel, ranks

    def partition_numel(self) -> int:
        init = zero_module("partition_parameters").Init
        own = SimpleNamespace(_partition_world_size=lambda _: self.ranks)
        own._padding_size = lambda parameter: init._padding_size(own, parameter)
        size, rest = divmod(init._aligned_size(own, self), self.ranks)
        assert not rest
        return size


@pytest.mark.parametrize("ranks", RANKS)
def test_pieces_and_sub_groups_of_zero_3_are_deepspeeds_and_hold_each_element_once(ranks):
    create = zero_module("stage3").DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups
    for group in GROUPS:
        numels = [prod(shape) for shape in group.values()]
        cut = [Cut(numel, ranks) for numel in numels]
        assert [piece_numel(numel, ranks) for numel in numels] == [each.partition_numel() for each in cut]
        for size in (10**9, 5_000_000, 1):
            theirs = create(SimpleNamespace(sub_group_size=size), cut)
            assert [[cut[i] for i in each] for each in sub_groups(numels, ranks, size)] == theirs
    # A norm, k_proj and the MLP; the embedding.
    layer = dict.fromkeys(shape for name, shape in SHAPES.items() if ".layers.0." in name or "embed" in name)
    for shape in layer:
        numel = prod(shape)
        parameter = Stored(path=Path("nowhere"), offset=0, shape=shape, dtype="float32")
        pieces = [cut_piece(parameter, ranks, rank) for rank in range(ranks)]
        assert {piece.numel for piece in pieces} == {Cut(numel, ranks).partition_numel()}
        places = [place for piece in pieces for place in ranges(piece)]
        held = [place for place in places if place[0] >= 0]
        assert [start for start, _ in held] == list(accumulate((count for _, count in held[:-1]), initial=0))
        assert sum(count for _, count in held) == numel
        assert places[: len(held)] == held  # padding is at the end
