"""Representations of torch's objects in a saved object, for reading and writing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolconv.tensors.dtypes import DTYPE_BYTES

STORAGE_DTYPES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
STORAGE_CLASSES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}


class DtypeRef(str):
    """A torch dtype that was saved as a value: ``DtypeRef("float32")`` for ``torch.float32``."""

    __slots__ = ()


class TorchSize(tuple[int, ...]):
    """A ``torch.Size``."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class GlobalRef:
    """An allowed class or function that a pickle names as a value, without calling it."""

    module: str
    name: str


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Opaque:
    """Stands for an object that a pickle may not ask for. Nothing of it was built, and nothing of it is kept."""

    asked: str  #: ``argparse.Namespace``, as the file has it: of any length


@dataclass(frozen=True, kw_only=True)
class ArchiveStorage:
    """One ``data/<key>`` record as a pickle refers to it."""

    key: str
    dtype: str | None  #: ``None`` for an UntypedStorage: the tensors that view it bring their own
    offset: int  #: absolute, of its first byte in the file
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ArchiveTensor:
    """The position of a saved tensor's elements. A ``Parameter`` is read as its tensor."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  #: in elements
    offset: int  #: absolute, of element 0 in the file, in bytes
    storage: str  #: the record's key (``"17"``); equal for tensors that view one storage

    @property
    def nbytes(self) -> int:
        """Bytes of the elements once they are laid out contiguously; a strided or expanded view spans another range."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are the ``nbytes`` bytes from ``offset`` on, in row-major order."""
        steps = zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        return 0 in self.shape or all(size == 1 or stride == expected for size, stride, expected in steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """One ``data/<key>`` record to be written. Tensors with the same object share it."""

    dtype: str
    numel: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES or self.numel < 0:
            raise ValueError(f"no storage can hold {self.numel} elements of {self.dtype}")

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Stands for a contiguous tensor in an object to be saved."""

    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0  #: of element 0 in the storage, in elements

    def __post_init__(self) -> None:
        end = self.offset + math.prod(self.shape)
        if min(self.shape, default=0) < 0 or self.offset < 0 or end > self.storage.numel:
            raise ValueError(f"{self} is not within its storage")


@dataclass(frozen=True, kw_only=True)
class PickledObject:
    """Stands for an object of a class that is not imported: its name called with ``args``, then given ``state``.

    With ``state`` the reader's ``__setstate__`` or ``__dict__`` is filled. torch.load with ``weights_only`` wants the
    class in ``torch.serialization.safe_globals``.
    """

    module: str
    name: str
    args: tuple[object, ...] = ()
    state: Mapping[str, object] | None = None


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As torch counts it: a dimension of no elements steps like one of a single element."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
