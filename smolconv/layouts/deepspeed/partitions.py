"""How ZeRO splits parameters over ranks, in both directions; only arithmetic over lazy tensors.

ZeRO 1 and 2: the parameters of a group, joined end to end, are one flat vector, zero-padded to a multiple of twice the
ranks, and rank r holds the r-th of N equal slices. ZeRO-3: each parameter is split separately into N pieces of
ceil(numel / N), and a rank's pieces are joined end to end, in sub-groups that never split a parameter.
Sources: ``flatten_dense_tensors_aligned`` in zero/stage_1_and_2.py, ``_create_fp16_sub_groups`` in zero/stage3.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

from smolconv.errors import CorruptFile, ShapeMismatch, some_of
from smolconv.tensors.lazy import LazyTensor, Zeros, flat_slice, join

#: Elements of a partition are a multiple of this (``nccl_start_alignment_factor``).
ALIGNMENT = 2
#: DeepSpeed's ``sub_group_size`` if its config sets none.
SUB_GROUP_SIZE = 10**9


def partition_numel(numel: int, ranks: int) -> int:
    """Elements of each rank's slice of a flat group of ``numel`` elements, including padding."""
    return -(-numel // (ALIGNMENT * ranks)) * ALIGNMENT


def group_padding(numel: int, ranks: int, rank: int) -> int:
    """Elements of padding in that rank's slice; the whole slice on the last ranks of a small group."""
    return partition_numel(numel, ranks) - _filled(numel, partition_numel(numel, ranks), rank)


def _filled(numel: int, size: int, rank: int) -> int:
    return min(max(numel - rank * size, 0), size)


def cut_group(parameters: Sequence[LazyTensor], ranks: int, *, padded: bool) -> list[LazyTensor]:
    """Each rank's slice of the flat group, with or without the padding at its end."""
    flat = join(parameters, (sum(parameter.numel for parameter in parameters),))
    size = partition_numel(flat.numel, ranks)
    slices = []
    for rank in range(ranks):
        filled = _filled(flat.numel, size, rank)
        start = min(rank * size, flat.numel)
        part = flat_slice(flat, start, start + filled)
        slices.append(_zero_padded(part, size) if padded else part)
    return slices


def _zero_padded(tensor: LazyTensor, numel: int) -> LazyTensor:
    if tensor.numel == numel:
        return tensor
    padding = Zeros(shape=(numel - tensor.numel,), dtype=tensor.dtype)
    return padding if tensor.numel == 0 else join([tensor, padding])


def join_group(
    slices: Sequence[LazyTensor], shapes: Sequence[tuple[int, ...]], paddings: Sequence[int], where: str
) -> list[LazyTensor]:
    """The parameters of a flat group from the ranks' slices, whose padding may have been stripped or not.

    ``paddings`` are the elements of padding after each parameter (``param_alignment_paddings``). Raises
    ``ShapeMismatch`` if the slices do not hold the elements of the shapes.
    """
    sizes = [prod(shape) for shape in shapes]
    ends = list(accumulate(size + padding for size, padding in zip(sizes, paddings)))
    numel, ranks = ends[-1] if ends else 0, len(slices)
    size = max(part.numel for part in slices)
    filled = [_filled(numel, size, rank) for rank in range(ranks)]
    found = [part.numel for part in slices]
    if sum(filled) != numel or (found != filled and set(found) != {size}):
        raise ShapeMismatch(
            f"{where}: the ranks hold {_counts(found)} elements, but the parameters of the group have {numel:,}.\n"
            "The model file and the optimizer files may be of different checkpoints."
        )
    kept = [flat_slice(part, 0, count) for part, count in zip(slices, filled) if count]
    flat = join(kept, (numel,))
    starts = [end - size - padding for end, size, padding in zip(ends, sizes, paddings)]
    return [flat_slice(flat, start, start + size, shape) for start, size, shape in zip(starts, sizes, shapes)]


def check_paddings(numels: Sequence[int], paddings: Sequence[int], where: str) -> None:
    """Raise ``CorruptFile`` unless ``parameter_alignment`` makes ``paddings`` after parameters of ``numels``.

    Each parameter but the last is padded until the next begins on 16 bytes (``round_robin_bit16_padding`` in
    zero/stage_1_and_2.py, 0.19.8), so the sizes determine the paddings.
    """
    for alignment in (1, *(16 // width for width in (8, 4, 2, 1))):
        at, expected = 0, []
        for numel in numels:
            expected.append(-(at + numel) % alignment)
            at += numel + expected[-1]
        if list(paddings) == [*expected[:-1], 0][: len(numels)]:
            return
    raise CorruptFile(
        f"{where}: the parameters are followed by paddings of {_counts(paddings)} elements.\n"
        f"Expected none, or those that align parameters of {_counts(numels)} elements to 16 bytes.\n"
        "The file is damaged, or of another checkpoint: copy all files of one."
    )


def before_round_robin(names: Sequence[str], ranks: int) -> tuple[str, ...]:
    """A group in the order that the optimizer was given, from the flat order of ``round_robin_gradients``.

    That switch assigns parameters to ranks in turn, and joins each rank's parameters end to end.
    """
    places = [place for rank in range(ranks) for place in range(rank, len(names), ranks)]
    return tuple(name for _, name in sorted(zip(places, names)))


def piece_numel(numel: int, ranks: int) -> int:
    """Elements of each rank's piece of one ZeRO-3 parameter, including padding."""
    return -(-numel // ranks)


def cut_piece(parameter: LazyTensor, ranks: int, rank: int) -> LazyTensor:
    """That rank's piece of one ZeRO-3 parameter, zero-padded."""
    size = piece_numel(parameter.numel, ranks)
    start = min(rank * size, parameter.numel)
    return _zero_padded(flat_slice(parameter, start, start + _filled(parameter.numel, size, rank)), size)


def join_pieces(pieces: Sequence[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    """One parameter from the ranks' padded pieces. DeepSpeed leaves the padding uninitialised."""
    numel, size = prod(shape), piece_numel(prod(shape), len(pieces))
    counts = [_filled(numel, size, rank) for rank in range(len(pieces))]
    return join([flat_slice(piece, 0, count) for piece, count in zip(pieces, counts) if count], shape)


def sub_groups(numels: Sequence[int], ranks: int, sub_group_size: int) -> list[range]:
    """The parameters of each sub-group in a ZeRO-3 group, divided as DeepSpeed does."""
    pieces = [piece_numel(numel, ranks) for numel in numels]
    if sub_group_size >= sum(pieces):
        return [range(len(numels))]
    found, first, running = [], 0, 0
    for index, piece in enumerate(pieces):
        running += piece
        if running >= sub_group_size or index == len(pieces) - 1:
            found.append(range(first, index + 1))
            first, running = index + 1, 0
    return found


def match_sub_groups(numels: Sequence[int], ranks: int, lengths: Sequence[int], where: str) -> list[tuple[int, int]]:
    """(sub-group, offset in it) of each parameter of a group, from the lengths of the rank's flat tensors."""
    found: list[tuple[int, int]] = []
    group = offset = 0
    for numel in numels:
        if group < len(lengths) and offset == lengths[group] and lengths[group]:
            group, offset = group + 1, 0
        if group >= len(lengths):
            break
        found.append((group, offset))
        offset += piece_numel(numel, ranks)
    if len(found) != len(numels) or group != len(lengths) - 1 or offset != lengths[-1]:
        raise ShapeMismatch(
            f"{where}: flat tensors of {_counts(lengths)} elements do not hold the group's {len(numels)} parameters, "
            f"which take {sum(piece_numel(numel, ranks) for numel in numels):,} on each of {ranks} ranks.\n"
            "The model file and the optimizer files may be of different checkpoints."
        )
    return found


def _counts(numbers: Sequence[int]) -> str:
    return some_of([f"{number:,}" for number in numbers], 4)
