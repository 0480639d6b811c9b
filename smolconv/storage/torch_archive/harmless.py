"""What schedules leave in a pickle: rates that numpy computed, and ``MultiStepLR``'s Counter.

For ``read_torch_archive(allow=...)``. Nothing is imported; numpy's arrays and everything else of it stay unlisted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smolconv.storage.torch_archive.values import Opaque

#: numpy's names of the dtypes, without byte order -> struct's.
_FORMS = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q",
          "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip


@dataclass(frozen=True)
class NumpyNumber:
    """A numpy scalar. It is a type of its own: a user's program that stored one does not expect Python's number."""

    value: float  #: or an int, or a bool


def native(value: Any) -> Any:
    """The value with Python's numbers for numpy's, also within lists, tuples and dicts."""
    if isinstance(value, NumpyNumber):
        return value.value
    if isinstance(value, dict):
        return {key: native(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(native, value))
    return value


class NumpyDtype:
    """A ``numpy.dtype``, whose byte order is in the state."""

    def __init__(self, *args: object) -> None:
        self.form = _FORMS.get(args[0]) if args and isinstance(args[0], str) else None
        self.order = "="

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        self.order = order if isinstance(order, str) and order in ("<", ">", "|", "=") else ""


def _encoded(text: object = None, encoding: object = None) -> object:
    """How protocol 2 writes bytes; only a number's, since every call makes a copy of what may be 64 MiB."""
    if isinstance(text, str) and len(text) <= 8 and encoding == "latin1":
        return text.encode("latin1")
    return Opaque(asked="_codecs.encode")


def _number(dtype: object = None, data: object = None) -> object:
    if isinstance(dtype, NumpyDtype) and dtype.form and dtype.order and isinstance(data, bytes):
        form = dtype.order.replace("|", "=") + dtype.form
        if struct.calcsize(form) == len(data):
            return NumpyNumber(struct.unpack(form, data)[0])
    return Opaque(asked="numpy._core.multiarray.scalar")


def _counter(items: object = None) -> object:
    return items if type(items) is dict else Opaque(asked="collections.Counter")


HARMLESS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("numpy", "dtype"): NumpyDtype,
    ("numpy.core.multiarray", "scalar"): _number,  # until numpy 2
    ("numpy._core.multiarray", "scalar"): _number,
    ("_codecs", "encode"): _encoded,
    ("collections", "Counter"): _counter,
}
