"""Matches masters to weights by their values, if DeepSpeed stored no names, or files may be mixed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from smolconv.tensors.lazy import LazyTensor, Stored, cast, equal, flat_slice

#: Comparisons after which the search for an order stops: the rest are many equal shapes that nothing distinguishes.
_MOST_COMPARISONS = 300_000


@dataclass(frozen=True, kw_only=True)
class Unnamed:
    """A parameter of which only the shape, and in bf16 the master, is known."""

    shape: tuple[int, ...] | None  #: None for a frozen one that was given to the optimizer
    master: Stored | None


def name_by_order(
    weights: Mapping[str, LazyTensor],
    module: Mapping[str, Stored],
    groups: Sequence[Sequence[int]],
    entries: Mapping[int, Unnamed],
) -> dict[int, str] | None:
    """Names of numbered parameters, or None if no assignment fits, or several do.

    DeepSpeed writes no ``param_shapes`` for ZeRO-0. Known facts: each group follows the module's order, shapes agree,
    and if there are masters, the module's weights are their rounded values. Names without an entry are frozen.
    If the groups in sequence are in the module's own order, that order is used, even if others fit too.
    """

    @cache
    def fits(name: str, group: int, place: int) -> bool:
        entry = entries[groups[group][place]]
        if entry.shape not in (None, weights[name].shape):
            return False
        return entry.master is None or starts_alike(weights[name], entry.master)

    names = _own_names(module)
    places = _places_by_order(dict.fromkeys(names, 1), list(map(len, groups)), fits)
    return None if places is None else {groups[g][place]: name for name, (g, place) in places.items()}


def place_by_order(
    weights: Mapping[str, LazyTensor], module: Mapping[str, Stored], flats: Sequence[LazyTensor]
) -> dict[str, tuple[int, int]] | None:
    """(group, offset) of each parameter in the groups' flat masters, in the module's order; None as above."""

    @cache
    def fits(name: str, group: int, place: int) -> bool:
        weight = weights[name]
        return starts_alike(weight, flat_slice(flats[group], place, place + weight.numel, weight.shape))

    sizes = {name: weights[name].numel for name in _own_names(module)}
    return _places_by_order(sizes, [flat.numel for flat in flats], fits)


def _own_names(module: Mapping[str, Stored]) -> list[str]:
    """Without empty tensors and a tied head, which is the embedding's second name."""
    first = {tensor.offset: name for name, tensor in reversed([*module.items()]) if tensor.numel}
    return [name for name, tensor in module.items() if first.get(tensor.offset) == name]


def _places_by_order(
    sizes: Mapping[str, int], ends: Sequence[int], fits: Callable[[str, int, int], bool]
) -> dict[str, tuple[int, int]] | None:
    """(group, position) of each name, if names in order, each with its size, fill the groups completely."""
    total = list(accumulate(sizes.values()))
    spare, comparisons = (total[-1] if total else 0) - sum(ends), 0
    if not spare:  # perhaps the groups in sequence are in order
        stops = list(accumulate(ends))
        places = {}
        for name, stop in zip(sizes, total):
            group = bisect_left(stops, stop)
            places[name] = (group, stop - sizes[name] - (stops[group] - ends[group]))
        if all(place >= 0 and fits(name, group, place) for name, (group, place) in places.items()):
            return places
    # After each name: possible positions in each group, the number of ways (2: several), and the last step of each.
    start = (0,) * len(ends)
    levels: list[dict[tuple[int, ...], tuple[int, tuple[int, ...], int | None]]] = [{start: (1, start, None)}]
    for stop, (name, size) in zip(total, sizes.items()):
        comparisons += len(levels[-1]) * len(ends)
        if comparisons > _MOST_COMPARISONS:
            return None
        reached: dict[tuple[int, ...], tuple[int, tuple[int, ...], int | None]] = {}
        for before, (ways, _, _) in levels[-1].items():
            steps: list[tuple[tuple[int, ...], int | None]] = [(before, None)] if stop - sum(before) <= spare else []
            for g, place in enumerate(before):
                if place + size <= ends[g] and fits(name, g, place):
                    steps.append(((*before[:g], place + size, *before[g + 1 :]), g))
            for after, chosen in steps:
                known = reached.get(after, (0, before, chosen))[0]
                reached[after] = (min(2, known + ways), before, chosen)
        levels.append(reached)
    position = tuple(ends)
    if levels[-1].get(position, (0,))[0] != 1:
        return None
    found: dict[str, tuple[int, int]] = {}
    for name, level in zip(reversed([*sizes]), reversed(levels)):
        _, before, last = level[position]
        if last is not None:
            found[name] = (last, before[last])
        position = before
    return dict(reversed(found.items()))


def starts_alike(weight: LazyTensor, master: LazyTensor) -> bool:
    """Whether the first elements of a weight are the master's, rounded to the weight's dtype."""
    return weight.shape == master.shape and alike(weight, master, 0)


def alike(weight: LazyTensor, master: LazyTensor, start: int, count: int = 1024) -> bool:
    """Whether ``count`` elements from ``start`` on are the master's, rounded to the weight's dtype."""
    stop = min(start + count, weight.numel)
    stored, rounded = flat_slice(weight, start, stop), cast(flat_slice(master, start, stop), weight.dtype)
    if equal(stored, rounded):
        return True
    import numpy as np

    # The bits of a rounded NaN are not specified.
    left, right = (cast(tensor, "float32").numpy().view(np.float32) for tensor in (stored, rounded))
    return bool(np.array_equal(left, right, equal_nan=True))
