"""Reversible operations between canonical tensors and a layout's.

Each operation has both directions, which cancel. They only move elements, so they apply to weights, fp32 masters and
Adam's moments alike. Shapes use E hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from smolconv.errors import ShapeMismatch
from smolconv.tensors.lazy import LazyTensor, Zeros, join, rotary_rows, row_slice


class Operation(Protocol):
    """Canonical tensors to one layout tensor, and back."""

    def to_layout(self, parts: Sequence[LazyTensor]) -> LazyTensor: ...

    def to_canonical(self, tensor: LazyTensor) -> tuple[LazyTensor, ...]: ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    def to_layout(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        (part,) = parts
        return part

    def to_canonical(self, tensor: LazyTensor) -> tuple[LazyTensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class RotaryPairs:
    """Half-split rotary rows (canonical) to interleaved pairs (layout): [heads * D, E] or [heads * D]."""

    head_size: int

    def to_layout(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        (part,) = parts
        return rotary_rows(part, self.head_size, to_interleaved=True)

    def to_canonical(self, tensor: LazyTensor) -> tuple[LazyTensor, ...]:
        return (rotary_rows(tensor, self.head_size, to_interleaved=False),)


@dataclass(frozen=True)
class JoinRows:
    """Several tensors stacked along their rows, each through its own operation first.

    ``rows`` are the parts' row counts: fused q, k, v has ``(H*D, K*D, K*D)``, fused gate and up ``(F, F)``.
    """

    rows: tuple[int, ...]
    inner: tuple[Operation, ...] = ()

    def _operations(self) -> tuple[Operation, ...]:
        return self.inner or (Rename(),) * len(self.rows)

    def to_layout(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        found = tuple(part.shape[0] for part in parts)
        if found != self.rows:
            raise ShapeMismatch(f"tensors to join have {list(found)} rows, expected {list(self.rows)}.")
        return join([op.to_layout([part]) for op, part in zip(self._operations(), parts)])

    def to_canonical(self, tensor: LazyTensor) -> tuple[LazyTensor, ...]:
        if tensor.shape[0] != sum(self.rows):
            raise ShapeMismatch(
                f"a fused tensor has {tensor.shape[0]} rows, expected {' + '.join(map(str, self.rows))}."
            )
        parts: list[LazyTensor] = []
        start = 0
        for op, rows in zip(self._operations(), self.rows):
            parts.extend(op.to_canonical(row_slice(tensor, start, start + rows)))
            start += rows
        return tuple(parts)


@dataclass(frozen=True)
class PadVocabulary:
    """Zero rows after the vocabulary: canonical [V, E], layout [padded, E]."""

    rows: int
    padded_rows: int

    def to_layout(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        (part,) = parts
        if part.shape[0] != self.rows or self.padded_rows < self.rows:
            raise ShapeMismatch(f"{part.shape[0]} vocabulary rows cannot become {self.padded_rows} from {self.rows}.")
        padding = Zeros(shape=(self.padded_rows - self.rows, *part.shape[1:]), dtype=part.dtype)
        return join([part, padding]) if padding.numel else part

    def to_canonical(self, tensor: LazyTensor) -> tuple[LazyTensor, ...]:
        if tensor.shape[0] != self.padded_rows:
            raise ShapeMismatch(f"the vocabulary has {tensor.shape[0]} rows, expected {self.padded_rows}.")
        return (row_slice(tensor, 0, self.rows),)
