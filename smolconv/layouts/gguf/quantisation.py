"""Blocks of quantised weights, dequantised while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smolconv.errors import UnsupportedModel
from smolconv.layouts.gguf.header import Entry
from smolconv.tensors.elements import Raw, scratch
from smolconv.tensors.lazy import LazyTensor, Stored, cast

if TYPE_CHECKING:
    from types import ModuleType

#: Elements that are dequantised at a time, a multiple of every block. With fewer, workers wait for Python's lock;
#: with more, numpy's temporaries (half a MiB each) leave the cache.
_STEP_ELEMENTS = 1 << 17
_STORED_AS_IT_IS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Dequantised(LazyTensor):
    """A float32 tensor made of quantised blocks; a range reads only the blocks that it touches."""

    packed: Stored  #: the blocks' bytes, a vector of uint8
    quantisation: str  #: ggml's name, such as Q4_1
    shape: tuple[int, ...]
    dtype: str = "float32"

    def read(self, start: int, stop: int, out: Raw) -> None:
        import gguf

        kind = gguf.GGMLQuantizationType[self.quantisation]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        for at in range(start - start % block, stop, _STEP_ELEMENTS):
            end = min(at + _STEP_ELEMENTS, self.numel)
            first, last = at // block * block_bytes, end // block * block_bytes
            with scratch(last - first, np.dtype(np.uint8)) as packed:
                self.packed.read(first, last, packed)
                with np.errstate(all="ignore"):  # values that are not finite are reported by the pass that writes them
                    values = gguf.quants.dequantize(packed, kind).view(np.uint32)
            low, high = max(at, start), min(end, stop)
            out[low - start : high - start] = values[low - at : high - at]

    def leaves(self) -> Iterator[Stored]:
        return self.packed.leaves()


def stored_tensor(name: str, entry: Entry, path: Path, gguf: ModuleType) -> LazyTensor:
    """The tensor of an entry, as float32. Raises ``UnsupportedModel`` for blocks that gguf cannot dequantise."""
    dtype = _STORED_AS_IT_IS.get(entry.kind.name)
    if dtype is not None:
        return cast(Stored(path=path, offset=entry.offset, shape=entry.shape, dtype=dtype), "float32")
    block, block_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
    try:
        gguf.quants.dequantize(np.zeros(block_bytes, np.uint8), entry.kind)
    except NotImplementedError:
        raise UnsupportedModel(f"{path}: {name} is {entry.kind.name}, which gguf cannot dequantise.") from None
    assert _STEP_ELEMENTS % block == 0
    packed = Stored(path=path, offset=entry.offset, shape=(entry.nbytes,), dtype="uint8")
    return Dequantised(packed=packed, quantisation=entry.kind.name, shape=entry.shape)
