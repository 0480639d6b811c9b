"""Finds NaN and infinity in raw elements, and those that a cast creates."""

from __future__ import annotations

from smolconv.tensors.elements import Raw, raw_dtype, scratch
from smolconv.tensors.lazy import LazyTensor, uncast

#: Bits of positive infinity, by floating-point dtype: a larger magnitude is NaN.
_INFINITY = {"float64": 0x7FF << 52, "float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
#: Bits of the smallest float32 that rounds to infinity, by target dtype.
_ROUNDS_TO_INFINITY = {"bfloat16": 0x7F7F8000, "float16": 0x477FF000}


def has_nonfinite(raw: Raw, dtype: str, rounded_to: str | None = None) -> bool:
    """Whether raw floating-point values hold NaN or infinity; False for other dtypes.

    With ``rounded_to``, also whether float32 values would after rounding to that dtype.

    It takes two maxima without a temporary array: as signed integers, positive values keep their order, with infinity
    and NaN the largest; as unsigned ones, negative values do.
    """
    infinity = _INFINITY.get(dtype)
    if dtype == "float32" and rounded_to is not None:
        infinity = _ROUNDS_TO_INFINITY.get(rounded_to, infinity)
    if infinity is None or not raw.size:
        return False
    bits = raw.dtype.itemsize * 8
    signed = raw.view(f"int{bits}")
    return bool(signed.max() >= infinity) or bool(raw.max() >= infinity + (1 << (bits - 1)))


def finiteness(tensor: LazyTensor) -> tuple[bool, bool]:
    """Whether a tensor held NaN or infinity before its cast, and whether the cast created any from finite values.

    Reads the tensor, only once where its chunks are finite.
    """
    source = uncast(tensor)
    was = became = False
    for start, stop in tensor.chunks():
        with scratch(stop - start, raw_dtype(tensor.dtype)) as after:
            tensor.read(start, stop, after)
            if not has_nonfinite(after, tensor.dtype):
                continue
            with scratch(stop - start, raw_dtype(source.dtype)) as before:
                source.read(start, stop, before)
                finite = _is_finite(before, source.dtype)
                was = was or not bool(finite.all())
                became = became or bool((finite & ~_is_finite(after, tensor.dtype)).any())
        if was and became:
            break
    return was, became


def _is_finite(raw: Raw, dtype: str) -> Raw:
    infinity, sign = _INFINITY[dtype], 1 << (raw.dtype.itemsize * 8 - 1)
    return (raw & raw.dtype.type(sign - 1)) < raw.dtype.type(infinity)  # type: ignore[no-any-return]
