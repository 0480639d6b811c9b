"""``WeightTable``: rules from canonical names to a layout's names, used in both directions, with strict accounting.

Every name on either side is mapped, tied to another, absent from the layout for a stated reason, or dropped for one.
Any other name is an error, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from smolconv.errors import NameMismatch, ShapeMismatch, UnsupportedModel, some_of
from smolconv.models.operations import Operation, Rename
from smolconv.tensors.lazy import LazyTensor, Zeros


@dataclass(frozen=True)
class Rule:
    """One row: canonical names, the layout's name, and the reversible operation between them."""

    canonical: tuple[str, ...]
    layout: str
    op: Operation = field(default_factory=Rename)

    def for_layer(self, i: int) -> Rule:
        return Rule(tuple(name.format(i=i) for name in self.canonical), self.layout.format(i=i), self.op)


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """All rows for one model in one layout, expanded over its layers, in the layout's own parameter order."""

    rules: tuple[Rule, ...]
    shapes: Mapping[str, tuple[int, ...]]  #: canonical name -> shape, all that the model has
    aliases: Mapping[str, str] = field(default_factory=dict)  #: layout name -> the canonical name that it repeats
    absent: Mapping[str, str] = field(default_factory=dict)  #: canonical name that the layout cannot hold -> why
    dropped: Mapping[str, str] = field(default_factory=dict)  #: pattern of layout names -> why they are not needed

    def __post_init__(self) -> None:
        named = [name for rule in self.rules for name in rule.canonical] + list(self.absent)
        assert sorted(named) == sorted(self.shapes), "the table and the spec disagree about the model's parameters"
        assert len({rule.layout for rule in self.rules}) == len(self.rules), "the table uses a layout name twice"

    def to_canonical(
        self, found: Mapping[str, LazyTensor], where: str, *, all_needed: bool = True
    ) -> dict[str, LazyTensor]:
        """Layout tensors to canonical ones, in the order of ``shapes``.

        Raises ``NameMismatch`` for names missing (unless not ``all_needed``) or unexpected, ``ShapeMismatch`` for
        shapes that contradict the spec. Parameters that the layout cannot hold become zeros.
        """
        claimed = {rule.layout for rule in self.rules}
        missing = [rule.layout for rule in self.rules if rule.layout not in found]
        unexpected = [n for n in found if n not in claimed and not any(re.fullmatch(p, n) for p in self.dropped)]
        _check_names(where, missing if all_needed else [], unexpected)
        result: dict[str, LazyTensor] = {}
        for rule in self.rules:
            if rule.layout in found:
                try:
                    result.update(zip(rule.canonical, rule.op.to_canonical(found[rule.layout])))
                except ShapeMismatch as error:
                    raise ShapeMismatch(f"{where}: {rule.layout}: {error}\n{_BELONGS}") from None
        dtypes = {tensor.dtype for tensor in result.values()}
        if len(dtypes) == 1:
            result.update((name, Zeros(shape=self.shapes[name], dtype=next(iter(dtypes)))) for name in self.absent)
        self._check_shapes(result, where)
        return {name: result[name] for name in self.shapes if name in result}

    def to_layout(
        self, tensors: Mapping[str, LazyTensor], where: str, is_zero: Callable[[LazyTensor], bool]
    ) -> dict[str, LazyTensor]:
        """Canonical tensors to the layout's, in its own order. Raises the same errors.

        Raises ``UnsupportedModel`` if tensors of several dtypes would become one.
        """
        _check_names(
            where,
            [name for rule in self.rules for name in rule.canonical if name not in tensors],
            [name for name in tensors if name not in self.shapes],
        )
        self._check_shapes(tensors, where)
        for name, why in self.absent.items():
            if name in tensors and not is_zero(tensors[name]):
                raise NameMismatch(f"{where}: {name} is not zero, but {why}. This layout cannot hold the model.")
        for rule in self.rules:
            dtypes = {tensors[name].dtype: name for name in rule.canonical}
            if len(dtypes) > 1:
                (one, first), (other, second) = sorted(dtypes.items())[:2]
                raise UnsupportedModel(
                    f"{where}: {first} is {one} and {second} is {other}; the target holds both in one tensor "
                    f"({rule.layout}).\nExpected one dtype for tensors that become one.\n"
                    "Choose it with --dtype; float32 holds every value of the others."
                )
        return {rule.layout: rule.op.to_layout([tensors[name] for name in rule.canonical]) for rule in self.rules}

    def _check_shapes(self, tensors: Mapping[str, LazyTensor], where: str) -> None:
        for name, tensor in tensors.items():
            if tensor.shape != self.shapes[name]:
                raise ShapeMismatch(
                    f"{where}: {name} is {list(tensor.shape)} in the file but {list(self.shapes[name])} by the "
                    f"config.\n{_BELONGS}"
                )


_BELONGS = "Check that the config belongs to this checkpoint."


def _check_names(where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    missing, unexpected = list(missing), list(unexpected)
    if missing or unexpected:
        parts = [f"{len(names)} {what} ({some_of(names)})" for names, what in
                 ((missing, "missing"), (unexpected, "unexpected")) if names]  # fmt: skip
        raise NameMismatch(f"{where}: the tensors are not those of the config: {', '.join(parts)}.\n{_BELONGS}")
