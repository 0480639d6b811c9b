"""Elements in memory: numpy arrays, scratch buffers, casts. Commands that only read headers never import this."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolconv.tensors.dtypes import DTYPE_BYTES

#: Tensors are moved as unsigned integers of their width, because only casts need their values.
Raw = NDArray[Any]


@cache
def raw_dtype(dtype: str) -> np.dtype[Any]:
    """The unsigned integer dtype of the same width."""
    return np.dtype(f"uint{8 * DTYPE_BYTES[dtype]}")


class _Scratch(threading.local):
    """One thread's idle buffers."""

    def __init__(self) -> None:
        self.buffers: list[NDArray[np.uint8]] = []


_thread = _Scratch()


@contextmanager
def scratch(size: int, dtype: np.dtype[Any]) -> Iterator[Raw]:
    """A buffer of ``size`` elements, reused by this thread, because new pages cost more than the copy into them."""
    needed = size * dtype.itemsize
    held = _thread.buffers.pop() if _thread.buffers else np.empty(0, np.uint8)
    if held.nbytes < needed:
        held = np.empty(max(needed, 1 << 16), np.uint8)
    try:
        yield held[:needed].view(dtype)
    finally:
        _thread.buffers.append(held)


def cast_raw(raw: Raw, source: str, target: str) -> Raw:
    """Floating-point values in another dtype, rounded to nearest even, both as raw integers."""
    if source == "bfloat16":
        values: Any = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(np.dtype(source))
    if target != "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.dtype(target)).view(raw_dtype(target))  # type: ignore[no-any-return]
    with np.errstate(over="ignore", invalid="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding may turn a NaN into infinity: keep its sign and make it a quiet NaN.
    rounded = np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
    narrow: Raw = rounded.astype(np.uint16)
    return narrow
