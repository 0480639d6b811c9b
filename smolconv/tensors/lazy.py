"""Lazy tensors: where their bytes are in files, and the operations on them.

A ``LazyTensor`` has a shape, a dtype and an expression over bytes in files; nothing is read until a range is
requested. Everything that a layout does to a tensor (fuse, split over ranks, reorder rotary rows, flatten) is an
expression over ``Stored`` leaves. Expressions are simplified on creation, so that contiguous tensors are recognised.

All ranges count elements of the flattened, row-major tensor. Shapes use R rows and W elements per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from smolconv.errors import ShapeMismatch, UnsupportedModel
from smolconv.tensors.dtypes import DTYPE_BYTES, FLOAT_DTYPES
from smolconv.tensors.reading import as_bytes, pread, read_observed

if TYPE_CHECKING:  # importing numpy takes half of the start-up time, and inspecting a checkpoint needs no elements
    from smolconv.tensors.elements import Raw

#: Bytes per read. Scratch space of an expression stays within it, so memory does not grow with shapes. 1 MiB stays in
#: a core's L2 cache between read, digest and write: with 4 MiB the same copy took up to three times the system time
#: on ext4 (benchmarks/README.md).
CHUNK_BYTES = 1 << 20
#: From this length on, reading column slices separately is faster than reading whole rows (2 us per call, 10 GB/s).
_DIRECT_RUN_BYTES = 32 << 10


class LazyTensor(ABC):
    """Shape, dtype, and where the bytes are. Immutable; reading from several threads at once is safe."""

    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def width(self) -> int:
        """Elements per row: the product of all dimensions except the first; 1 for vectors and scalars."""
        return prod(self.shape[1:])

    @abstractmethod
    def read(self, start: int, stop: int, out: Raw) -> None:
        """Fill ``out``, contiguous ``[stop - start]`` of ``raw_dtype``, with that range of elements.

        Raises ``CorruptFile`` if a file ends early and ``MissingFile`` if it no longer exists.
        """

    @abstractmethod
    def leaves(self) -> Iterator[Stored]:
        """The stored ranges that this tensor is made of, in no particular order."""

    def extents(self) -> tuple[Stored, ...] | None:
        """The file ranges whose concatenated bytes are the tensor; None if it must be computed."""
        return None

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
        """Element ranges of about ``chunk_bytes``, at row borders if rows are shorter."""
        step = max(1, chunk_bytes // DTYPE_BYTES[self.dtype])
        if self.width <= step:
            step -= step % max(1, self.width)
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def raw_chunks(self) -> Iterator[Raw]:
        """Yield all elements in order, one chunk at a time, in a buffer that the next chunk overwrites."""
        from smolconv.tensors.elements import raw_dtype, scratch

        for start, stop in self.chunks():
            with scratch(stop - start, raw_dtype(self.dtype)) as values:
                self.read(start, stop, values)
                yield values

    def numpy(self) -> Raw:
        """Read the whole tensor into memory, as raw unsigned integers of its shape. For small tensors and tests."""
        import numpy as np

        from smolconv.tensors.elements import raw_dtype

        out = np.empty(self.numel, raw_dtype(self.dtype))
        for start, stop in self.chunks():
            self.read(start, stop, out[start:stop])
        return out.reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Stored(LazyTensor):
    """A contiguous range of one file."""

    path: Path
    offset: int  #: bytes from the start of the file
    shape: tuple[int, ...]
    dtype: str

    def read(self, start: int, stop: int, out: Raw) -> None:
        read_observed(self.path, self.offset + start * DTYPE_BYTES[self.dtype], as_bytes(out))

    def leaves(self) -> Iterator[Stored]:
        yield self

    def extents(self) -> tuple[Stored, ...]:
        return (self,)

    def raw_bytes(self) -> bytes:
        """Read all bytes. For scalars and other small tensors."""
        data = bytearray(self.nbytes)
        pread(self.path, self.offset, memoryview(data))
        return bytes(data)


@dataclass(frozen=True, kw_only=True)
class Literal(LazyTensor):
    """A small tensor held in memory: scalars such as Adam's step."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        assert len(self.data) == self.nbytes

    def read(self, start: int, stop: int, out: Raw) -> None:
        import numpy as np

        out[:] = np.frombuffer(self.data, out.dtype)[start:stop]

    def leaves(self) -> Iterator[Stored]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Zeros(LazyTensor):
    """Zeros in any dtype: padding rows, biases that a layout does not have, moments before the first step."""

    shape: tuple[int, ...]
    dtype: str

    def read(self, start: int, stop: int, out: Raw) -> None:
        out[:] = 0

    def leaves(self) -> Iterator[Stored]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Joined(LazyTensor):
    """The concatenation of the flattened parts in another shape. Build it with ``join``."""

    parts: tuple[LazyTensor, ...]
    shape: tuple[int, ...]
    dtype: str
    ends: tuple[int, ...] = field(init=False, repr=False, compare=False)  #: of each part, in elements

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(accumulate(part.numel for part in self.parts)))

    def read(self, start: int, stop: int, out: Raw) -> None:
        at, index = start, bisect_right(self.ends, start)
        while at < stop:
            part_start = self.ends[index] - self.parts[index].numel
            end = min(stop, self.ends[index])
            self.parts[index].read(at - part_start, end - part_start, out[at - start : end - start])
            at, index = end, index + 1

    def leaves(self) -> Iterator[Stored]:
        for part in self.parts:
            yield from part.leaves()

    def extents(self) -> tuple[Stored, ...] | None:
        found: list[Stored] = []
        for part in self.parts:
            extents = part.extents()
            if extents is None:
                return None
            found.extend(extents)
        return tuple(found)


class _Rearranged(LazyTensor):
    """Unchanged elements of one base."""

    base: LazyTensor

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def leaves(self) -> Iterator[Stored]:
        return self.base.leaves()


@dataclass(frozen=True, kw_only=True)
class FlatSlice(_Rearranged):
    """Elements ``start`` to ``start + numel`` of a base that is not contiguous. Build it with ``flat_slice``."""

    base: LazyTensor
    start: int
    shape: tuple[int, ...]

    def read(self, start: int, stop: int, out: Raw) -> None:
        self.base.read(self.start + start, self.start + stop, out)


class _Blocks(LazyTensor):
    """A tensor that is computed in whole blocks of ``block`` elements (a row, a head); ranges may cut blocks."""

    block: int

    @abstractmethod
    def produce(self, first: int, last: int, out: Raw) -> None:
        """Fill ``out`` with the blocks ``[first, last)``."""

    def read(self, start: int, stop: int, out: Raw) -> None:
        from smolconv.tensors.elements import scratch

        block, item = self.block, DTYPE_BYTES[self.dtype]
        most = max(1, CHUNK_BYTES // (block * item))
        at = start
        while at < stop:
            first, inside = divmod(at, block)
            whole = min((stop - at) // block, most)
            if inside == 0 and whole:
                end = at + whole * block
                self.produce(first, first + whole, out[at - start : end - start])
            else:
                end = min(stop, (first + 1) * block)
                with scratch(block, out.dtype) as one:
                    self.produce(first, first + 1, one)
                    out[at - start : end - start] = one[inside : inside + end - at]
            at = end


@dataclass(frozen=True, kw_only=True)
class Columns(_Rearranged, _Blocks):
    """Columns ``start`` to ``stop`` of ``base`` [R, W]. Build it with ``column_slice``."""

    base: LazyTensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.base.shape[0], self.stop - self.start)

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.stop - self.start

    def produce(self, first: int, last: int, out: Raw) -> None:
        from smolconv.tensors.elements import scratch

        width, item = self.base.width, DTYPE_BYTES[self.dtype]
        rows = out.reshape(last - first, self.block)
        if self.block * item >= _DIRECT_RUN_BYTES:
            for row in range(first, last):
                self.base.read(row * width + self.start, row * width + self.stop, rows[row - first])
            return
        step = max(1, CHUNK_BYTES // (width * item))
        for row in range(first, last, step):
            end = min(row + step, last)
            with scratch((end - row) * width, out.dtype) as whole:
                self.base.read(row * width, end * width, whole)
                rows[row - first : end - first] = whole.reshape(-1, width)[:, self.start : self.stop]


@dataclass(frozen=True, kw_only=True)
class SideBySide(_Blocks):
    """Parts [R, Wi] joined along their columns. Build it with ``join_columns``."""

    parts: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.shape[1]

    def produce(self, first: int, last: int, out: Raw) -> None:
        from smolconv.tensors.elements import scratch

        rows, column = out.reshape(last - first, self.block), 0
        for part in self.parts:
            width = part.shape[1]
            with scratch((last - first) * width, out.dtype) as piece:
                part.read(first * width, last * width, piece)
                rows[:, column : column + width] = piece.reshape(-1, width)
            column += width

    def leaves(self) -> Iterator[Stored]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True, kw_only=True)
class RotaryRows(_Rearranged, _Blocks):
    """Rows of ``base`` [heads * D, W] reordered within each head, between the two rotary conventions.

    ``to_interleaved`` converts half-split order (x0 .. xD/2-1, y0 .. yD/2-1; Hugging Face) to interleaved pairs
    (x0, y0, x1, y1, ..; GPT-J); otherwise the reverse. Works for weights [heads * D, W] and biases [heads * D].
    """

    base: LazyTensor
    head_size: int
    to_interleaved: bool

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.head_size * self.width

    def produce(self, first: int, last: int, out: Raw) -> None:
        from smolconv.tensors.elements import scratch

        inner = (2, self.head_size // 2) if self.to_interleaved else (self.head_size // 2, 2)
        with scratch(out.size, out.dtype) as stored:
            self.base.read(first * self.block, last * self.block, stored)
            swapped = stored.reshape(last - first, *inner, self.width).swapaxes(1, 2)
            out.reshape(swapped.shape)[:] = swapped


@dataclass(frozen=True, kw_only=True)
class Cast(LazyTensor):
    """``base`` in another floating-point dtype, rounded to nearest even. Build it with ``cast``."""

    base: LazyTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    def read(self, start: int, stop: int, out: Raw) -> None:
        from smolconv.tensors.elements import cast_raw, raw_dtype, scratch

        step = CHUNK_BYTES // 8
        for at in range(start, stop, step):
            end = min(at + step, stop)
            with scratch(end - at, raw_dtype(self.base.dtype)) as stored:
                self.base.read(at, end, stored)
                out[at - start : end - start] = cast_raw(stored, self.base.dtype, self.dtype)

    def leaves(self) -> Iterator[Stored]:
        return self.base.leaves()


def join(parts: Sequence[LazyTensor], shape: tuple[int, ...] | None = None) -> LazyTensor:
    """Concatenate the parts: along rows if ``shape`` is None, else reshaped to ``shape``.

    Raises ``ShapeMismatch`` if dtypes, row widths or the number of elements differ.
    """
    flat: list[LazyTensor] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Joined) else (part,))
    if shape is None:
        if len({part.shape[1:] for part in parts}) != 1:
            raise ShapeMismatch(f"rows of different widths cannot be joined: {[part.shape for part in parts]}")
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if len({part.dtype for part in flat}) != 1:
        raise ShapeMismatch(f"parts of one tensor have different dtypes: {sorted({part.dtype for part in flat})}")
    if sum(part.numel for part in flat) != prod(shape):
        raise ShapeMismatch(f"parts with {[part.numel for part in flat]} elements cannot make a tensor {list(shape)}")
    merged: list[LazyTensor] = []
    for part in flat:
        last = merged[-1] if merged else None
        if (
            isinstance(part, Stored)
            and isinstance(last, Stored)
            and part.path == last.path
            and last.offset + last.nbytes == part.offset
        ):
            merged[-1] = Stored(path=last.path, offset=last.offset, shape=(last.numel + part.numel,), dtype=last.dtype)
        elif isinstance(part, Zeros) and isinstance(last, Zeros):
            merged[-1] = Zeros(shape=(last.numel + part.numel,), dtype=last.dtype)
        elif part.numel or not merged:
            merged.append(part)
    if len(merged) == 1:
        return reshape(merged[0], shape)
    return Joined(parts=tuple(merged), shape=shape, dtype=flat[0].dtype)


def reshape(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The same elements in another shape."""
    return tensor if tensor.shape == shape else flat_slice(tensor, 0, tensor.numel, shape)


def flat_slice(tensor: LazyTensor, start: int, stop: int, shape: tuple[int, ...] | None = None) -> LazyTensor:
    """Elements ``[start, stop)`` of the flattened tensor in ``shape`` (default: a vector)."""
    shape = (stop - start,) if shape is None else shape
    if not 0 <= start <= stop <= tensor.numel or prod(shape) != stop - start:
        raise ShapeMismatch(f"elements {start}:{stop} as {list(shape)} do not fit a tensor {list(tensor.shape)}")
    if start == 0 and stop == tensor.numel and shape == tensor.shape:
        return tensor
    match tensor:
        case Stored():
            offset = tensor.offset + start * DTYPE_BYTES[tensor.dtype]
            return Stored(path=tensor.path, offset=offset, shape=shape, dtype=tensor.dtype)
        case Zeros():
            return Zeros(shape=shape, dtype=tensor.dtype)
        case FlatSlice():
            return FlatSlice(base=tensor.base, start=tensor.start + start, shape=shape)
        case Cast():
            return Cast(base=flat_slice(tensor.base, start, stop, shape), dtype=tensor.dtype)
        case Joined():
            parts, at, index = [], start, bisect_right(tensor.ends, start)
            while at < stop:
                part, end = tensor.parts[index], tensor.ends[index]
                begin = end - part.numel
                parts.append(flat_slice(part, at - begin, min(stop, end) - begin))
                at, index = end, index + 1
            return join(parts, shape) if parts else Zeros(shape=shape, dtype=tensor.dtype)
    return FlatSlice(base=tensor, start=start, shape=shape)


def row_slice(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows ``start`` to ``stop``."""
    width = tensor.width
    if isinstance(tensor, SideBySide):
        return join_columns([row_slice(part, start, stop) for part in tensor.parts])
    if isinstance(tensor, Columns):
        return column_slice(row_slice(tensor.base, start, stop), tensor.start, tensor.stop)
    return flat_slice(tensor, start * width, stop * width, (stop - start, *tensor.shape[1:]))


def column_slice(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Columns ``start`` to ``stop`` of a matrix."""
    if not 0 <= start <= stop <= tensor.shape[1]:
        raise ShapeMismatch(f"columns {start}:{stop} do not fit a tensor {list(tensor.shape)}")
    if (start, stop) == (0, tensor.shape[1]):
        return tensor
    match tensor:
        case Zeros():
            return Zeros(shape=(tensor.shape[0], stop - start), dtype=tensor.dtype)
        case Columns():
            return Columns(base=tensor.base, start=tensor.start + start, stop=tensor.start + stop)
        case SideBySide():
            parts, at = [], 0
            for part in tensor.parts:
                first, last = max(start, at), min(stop, at + part.shape[1])
                if first < last:
                    parts.append(column_slice(part, first - at, last - at))
                at += part.shape[1]
            return join_columns(parts)
    return Columns(base=tensor, start=start, stop=stop)


def join_columns(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Join matrices [R, Wi] along columns: [R, sum Wi]. Raises ``ShapeMismatch`` if rows or dtypes differ."""
    if len({(part.shape[0], part.dtype) for part in parts}) != 1:
        raise ShapeMismatch(f"cannot be joined along columns: {[(part.shape, part.dtype) for part in parts]}")
    flat: list[LazyTensor] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, SideBySide) else (part,))
    merged: list[LazyTensor] = []
    for part in flat:
        last = merged[-1] if merged else None
        if (
            isinstance(part, Columns)
            and isinstance(last, Columns)
            and part.base is last.base
            and last.stop == part.start
        ):
            merged[-1] = column_slice(part.base, last.start, part.stop)
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else SideBySide(parts=tuple(merged))


def rotary_rows(tensor: LazyTensor, head_size: int, *, to_interleaved: bool) -> LazyTensor:
    """Reorder rows within heads; the two directions cancel. See ``RotaryRows``."""
    if tensor.shape[0] % head_size or head_size % 2:
        raise ShapeMismatch(f"a tensor {list(tensor.shape)} cannot be divided into heads of {head_size} rows")
    if isinstance(tensor, RotaryRows) and tensor.head_size == head_size and tensor.to_interleaved != to_interleaved:
        return tensor.base
    return RotaryRows(base=tensor, head_size=head_size, to_interleaved=to_interleaved)


def cast(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The tensor in another floating-point dtype; the tensor itself if it already has it."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype not in FLOAT_DTYPES or dtype not in FLOAT_DTYPES:
        raise UnsupportedModel(f"{tensor.dtype} cannot be cast to {dtype}: only {', '.join(FLOAT_DTYPES)} can.")
    if isinstance(tensor, Zeros):
        return Zeros(shape=tensor.shape, dtype=dtype)
    return Cast(base=tensor, dtype=dtype)


def uncast(tensor: LazyTensor) -> LazyTensor:
    """The tensor before the first of its casts."""
    while isinstance(tensor, Cast):
        tensor = tensor.base
    return tensor


def is_zero(tensor: LazyTensor) -> bool:
    """Whether all elements are zero; reads the tensor unless that is known."""
    return isinstance(tensor, Zeros) or not any(values.any() for values in tensor.raw_chunks())


def equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes. Reads both, a chunk at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all((left == right).all() for left, right in zip(a.raw_chunks(), b.raw_chunks(), strict=True))
