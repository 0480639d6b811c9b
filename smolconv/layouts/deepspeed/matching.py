"""Which weight a master belongs to, told by its values: where DeepSpeed wrote no name, or files may be mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smolconv.checkpoint import LazyTensor, Stored, cast, equal, flat_slice


@dataclass(frozen=True, kw_only=True)
class Unnamed:
    """A parameter of which only the shape is known, and in bf16 the master."""

    shape: tuple[int, ...] | None  #: None for one that is frozen but was given to the optimizer
    master: Stored | None


def name_by_order(
    weights: Mapping[str, LazyTensor],
    module: Mapping[str, Stored],
    groups: Sequence[Sequence[int]],
    entries: Mapping[int, Unnamed],
) -> dict[int, str] | None:
    """Names of numbered parameters, or None when they fit in no way or in more than one.

    DeepSpeed writes no ``param_shapes`` for ZeRO-0. What is known: each group follows the module's order, shapes agree,
    and where there are masters, the module's weights are their rounded values. Names that no entry takes are frozen.
    """
    names: list[str] = []
    places: set[int] = set()
    for name, tensor in module.items():
        if tensor.numel and tensor.offset not in places:  # a tied head is the embedding's second name
            places.add(tensor.offset)
            names.append(name)

    def fits(name: str, entry: Unnamed) -> bool:
        if entry.shape not in (None, weights[name].shape):
            return False
        return entry.master is None or starts_alike(weights[name], entry.master)

    # After each name: how far each group may have come, in how many ways (2 stands for more), and by which last step.
    start = (0,) * len(groups)
    may_skip = sum(map(len, groups)) < len(names)
    levels: list[dict[tuple[int, ...], tuple[int, tuple[int, ...], int | None]]] = [{start: (1, start, None)}]
    for name in names:
        reached: dict[tuple[int, ...], tuple[int, tuple[int, ...], int | None]] = {}
        for before, (ways, _, _) in levels[-1].items():
            steps: list[tuple[tuple[int, ...], int | None]] = [(before, None)] if may_skip else []
            for g, group in enumerate(groups):
                if before[g] < len(group) and fits(name, entries[group[before[g]]]):
                    steps.append(((*before[:g], before[g] + 1, *before[g + 1 :]), g))
            for after, chosen in steps:
                known = reached.get(after, (0, before, chosen))[0]
                reached[after] = (min(2, known + ways), before, chosen)
        levels.append(reached)
    position = tuple(map(len, groups))
    if levels[-1].get(position, (0,))[0] != 1:
        return None
    found: dict[int, str] = {}
    for name, level in zip(reversed(names), reversed(levels)):
        _, before, last = level[position]
        if last is not None:
            found[groups[last][before[last]]] = name
        position = before
    return found


def starts_alike(weight: LazyTensor, master: LazyTensor) -> bool:
    """Whether the first elements of a weight are those of the master, rounded to its dtype."""
    return weight.shape == master.shape and alike(weight, master, 0)


def alike(weight: LazyTensor, master: LazyTensor, start: int) -> bool:
    stop = min(start + 1024, weight.numel)
    stored, rounded = flat_slice(weight, start, stop), cast(flat_slice(master, start, stop), weight.dtype)
    if equal(stored, rounded):
        return True
    import numpy as np  # noqa: PLC0415

    # Which NaN a rounded NaN becomes is everybody's own choice.
    left, right = (cast(tensor, "float32").numpy().view(np.float32) for tensor in (stored, rounded))
    return bool(np.array_equal(left, right, equal_nan=True))
