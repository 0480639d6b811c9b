"""The tensor tier: compares two checkpoints' parameters bit for bit, and their optimizers slot by slot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from smolconv.checkpoint import Checkpoint, OptimizerState, Slot
from smolconv.tensors.dtypes import FLOAT_DTYPES
from smolconv.tensors.elements import Raw, raw_dtype, scratch
from smolconv.tensors.lazy import Cast, LazyTensor, uncast

#: Hyperparameters that equal optimizers must share.
_HYPERPARAMETERS = ("weight_decay", "lr", "betas", "eps")


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """The result of comparing two sets of tensors."""

    compared: int
    equal: int  #: same values, bit for bit, after an exact widening of the narrower dtype
    max_abs: float
    worst: str | None
    first: str | None  #: the first unequal parameter in forward order
    missing: tuple[str, ...]  #: in A only
    unexpected: tuple[str, ...]  #: in B only
    rounded: int = 0  #: not equal, but one is the other rounded to its dtype
    overflowed: tuple[str, ...] = ()  #: have a finite value on one side that is infinite or NaN on the other

    @property
    def within_rounding(self) -> bool:
        """Whether B may be A in another dtype: each value within half a unit in the last place, and equally finite."""
        return self.equal + self.rounded == self.compared and not self.missing and not self.unexpected

    @property
    def passed(self) -> bool:
        return self.equal == self.compared and not self.missing and not self.unexpected


def compare_tensors(
    a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], *, steps: Mapping[str, tuple[str, ...]] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> TensorReport:  # fmt: skip
    """Compare by name, streaming, with a few chunks in memory. The result is in forward order.

    ``steps``: the dtypes that A was rounded to, by name; without them either side may be the rounded one.
    ``advance`` is called after each tensor.
    """
    compared, same, rounded, max_abs, worst = 0, 0, 0, 0.0, None
    unequal: list[str] = []
    overflowed: list[str] = []
    for name in sorted(set(a) & set(b), key=forward_order):
        compared += 1
        found = _compare(a[name], b[name], None if steps is None else steps[name])
        advance(1)
        if found.max_abs is None:
            same += 1
            continue
        unequal.append(name)
        rounded += found.rounded
        overflowed += [name] if found.overflowed else []
        if worst is None or not found.max_abs <= max_abs:  # NaN counts as largest
            max_abs, worst = found.max_abs, name
    return TensorReport(
        compared=compared,
        equal=same,
        max_abs=max_abs,
        worst=worst,
        first=unequal[0] if unequal else None,
        missing=tuple(sorted(set(a) - set(b), key=forward_order)),
        unexpected=tuple(sorted(set(b) - set(a), key=forward_order)),
        rounded=rounded,
        overflowed=tuple(overflowed),
    )


def compare_casts(
    planned: Mapping[Slot, Mapping[str, LazyTensor]], written: Mapping[Slot, Mapping[str, LazyTensor]]
) -> TensorReport | None:
    """Compare cast values with the original ones; None if nothing was cast. Names are canonical."""
    before: dict[str, LazyTensor] = {}
    after: dict[str, LazyTensor] = {}
    steps: dict[str, tuple[str, ...]] = {}
    for slot, tensors in planned.items():
        for name, tensor in tensors.items():
            if isinstance(tensor, Cast) and name in written.get(slot, {}):
                key = name if slot is Slot.PARAMETER else f"{name} ({slot.value})"
                before[key], after[key], steps[key] = uncast(tensor), written[slot][name], _cast_steps(tensor)
    return compare_tensors(before, after, steps=steps) if before else None


def _cast_steps(tensor: LazyTensor) -> tuple[str, ...]:
    """The dtypes that a tensor was rounded to, in order."""
    found: list[str] = []
    while isinstance(tensor, Cast):
        found.insert(0, tensor.dtype)
        tensor = tensor.base
    return ("float32", *found) if tensor.dtype == "float64" and found[0] != "float32" else tuple(found)


def compare_optimizers(
    a: Checkpoint, b: Checkpoint, advance: Callable[[int], None] = lambda _: None
) -> tuple[dict[str, TensorReport], list[str]]:
    """Compare masters and moments by slot, and steps and hyperparameters as readable lines."""
    reports = {
        slot.value: compare_tensors(a.tensors.get(slot, {}), b.tensors.get(slot, {}), advance=advance)
        for slot in Slot
        if slot is not Slot.PARAMETER and (a.tensors.get(slot) or b.tensors.get(slot))
    }
    return reports, _state_differences(a.optimizer, b.optimizer)


def _state_differences(a: OptimizerState | None, b: OptimizerState | None) -> list[str]:
    if a is None or b is None:
        return [] if a is b else [f"only {'A' if b is None else 'B'} has an optimizer"]
    found = []
    names = sorted(set(a.steps) & set(b.steps), key=forward_order)
    if set(a.steps) != set(b.steps):
        found.append(f"{len(set(a.steps) ^ set(b.steps))} parameters have a step on one side only")
    for name in names:
        if a.steps[name] != b.steps[name]:
            found.append(f"{name}: Adam step {a.steps[name]:g} in A, {b.steps[name]:g} in B")
        left, right = a.hyperparameters(name), b.hyperparameters(name)
        for key in _HYPERPARAMETERS:
            x, y = left.get(key), right.get(key)
            if _plain(x) != _plain(y):
                found.append(f"{name}: {key} {x} in A, {y} in B")
    return found


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The result of comparing two tensors."""

    max_abs: float | None  #: the largest absolute difference; None when all values are bitwise equal
    rounded: bool = False
    overflowed: bool = False


#: Precision in bits, including the implicit one, and exponent of the smallest normal number: IEEE 754, and bfloat16.
_PRECISION = {"float64": (53, -1022), "float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}


def _compare(a: LazyTensor, b: LazyTensor, steps: tuple[str, ...] | None) -> _Found:
    """Compare values after an exact widening. Tensors of different shapes have an infinite difference."""
    floats = a.dtype in FLOAT_DTYPES and b.dtype in FLOAT_DTYPES
    if a.shape != b.shape or (a.dtype != b.dtype and not floats):
        return _Found(max_abs=float("inf"))
    largest: float | None = None
    # Whether B is A rounded to B's dtype, or A is B rounded to A's.
    of_a = a.dtype != b.dtype or steps is not None
    of_b = of_a and steps is None
    overflowed = False
    for start, stop in a.chunks():
        with (
            scratch(stop - start, raw_dtype(a.dtype)) as left,
            scratch(stop - start, raw_dtype(b.dtype)) as right,
            np.errstate(invalid="ignore"),
        ):
            a.read(start, stop, left)
            b.read(start, stop, right)
            if a.dtype == b.dtype and np.array_equal(left, right):
                continue
            x, y = _values(left, a.dtype), _values(right, b.dtype)
            if a.dtype != b.dtype and np.array_equal(x.view(np.uint64), y.view(np.uint64)):
                continue
            if floats:
                overflowed = overflowed or bool((np.isfinite(x) != np.isfinite(y)).any())
                of_a = of_a and _is_rounded(x, y, steps or (b.dtype,))
                of_b = of_b and _is_rounded(y, x, (a.dtype,))
            here = float(np.abs(x - y, where=x != y, out=np.zeros_like(x)).max())  # equal infinities are equal
            largest = here if largest is None or not here <= largest else largest
    return _Found(max_abs=largest, rounded=largest is not None and (of_a or of_b), overflowed=overflowed)


def _values(raw: Raw, dtype: str) -> Raw:
    """Raw elements as float64, exactly, except for the last digits of 64-bit integers."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (raw.view(np.dtype(dtype)) if dtype in FLOAT_DTYPES else raw).astype(np.float64)


def _is_rounded(exact: Raw, rounded: Raw, steps: tuple[str, ...]) -> bool:
    """Whether every value is within half a unit in the last place of the exact one, for each dtype in ``steps``.

    Computed by arithmetic instead of the cast that is being checked. Non-finite values must be the same.
    Zero stays zero, and rounding never goes below the power of two beneath a value.
    """
    finite = np.isfinite(exact)
    if not np.array_equal(finite, np.isfinite(rounded)):
        return False
    if not np.array_equal(exact[~finite], rounded[~finite], equal_nan=True):
        return False
    x, y = exact[finite], rounded[finite]
    exponent = np.frexp(x)[1] - 1  # |x| is in [1, 2) * 2**exponent
    allowed = sum(np.ldexp(1.0, np.maximum(exponent, _PRECISION[d][1]) - _PRECISION[d][0]) for d in steps)
    normal = exponent >= max(_PRECISION[dtype][1] for dtype in steps)
    kept = (np.abs(y) >= np.ldexp(1.0, exponent)) | ~normal
    return bool(((np.abs(x - y) <= allowed) & kept)[x != 0].all() and not y[x == 0].any())


_LAYER = re.compile(r"model\.layers\.(\d+)\.(input_layernorm|self_attn|post_attention_layernorm|mlp)\b")
_STAGES = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def forward_order(name: str) -> tuple[int, int, int, str]:
    """A sort key: embedding, layers by index and module by module, final norm, head."""
    match = _LAYER.match(name)
    if match is not None:
        return (1, int(match[1]), _STAGES.index(match[2]), name)
    return ({"model.embed_tokens": 0, "model.norm": 2}.get(name.rsplit(".", 1)[0], 3), 0, 0, name)


def module_of(name: str) -> str:
    """The HF module path that reports name: ``model.layers.3.self_attn`` for any of its projections."""
    match = _LAYER.match(name)
    return match[0] if match is not None else name.rsplit(".", 1)[0]
