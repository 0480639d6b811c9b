"""The tensor tier: two checkpoints' parameters, bit for bit; and their optimizers', slot by slot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from smolconv.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    LazyTensor,
    OptimizerState,
    Raw,
    Slot,
    cast,
    raw_dtype,
    scratch,
)

#: Hyperparameters in which two optimizers have to agree to be the same.
_HYPERPARAMETERS = ("weight_decay", "lr", "betas", "eps")


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What comparing two sets of tensors found."""

    compared: int
    equal: int  #: same values, bit for bit after an exact widening of the narrower dtype
    max_abs: float
    worst: str | None
    first: str | None  #: the first unequal parameter in forward order
    missing: tuple[str, ...]  #: in A only
    unexpected: tuple[str, ...]  #: in B only

    @property
    def passed(self) -> bool:
        return self.equal == self.compared and not self.missing and not self.unexpected


def compare_tensors(a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor]) -> TensorReport:
    """Compare by name, streaming: a few chunks are in memory. Order of the result is forward order."""
    compared, same, max_abs, worst = 0, 0, 0.0, None
    unequal: list[str] = []
    for name in sorted(set(a) & set(b), key=forward_order):
        compared += 1
        difference = _max_abs(a[name], b[name])
        if difference is None:
            same += 1
            continue
        unequal.append(name)
        if worst is None or not difference <= max_abs:  # NaN counts as largest
            max_abs, worst = difference, name
    return TensorReport(
        compared=compared,
        equal=same,
        max_abs=max_abs,
        worst=worst,
        first=unequal[0] if unequal else None,
        missing=tuple(sorted(set(a) - set(b), key=forward_order)),
        unexpected=tuple(sorted(set(b) - set(a), key=forward_order)),
    )


def compare_optimizers(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, TensorReport], list[str]]:
    """Masters and moments by slot, and differences of steps and hyperparameters as readable lines."""
    reports = {
        slot.value: compare_tensors(a.tensors.get(slot, {}), b.tensors.get(slot, {}))
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


def _max_abs(a: LazyTensor, b: LazyTensor) -> float | None:
    """Largest absolute difference, or None when all values are bitwise equal. Infinite for different shapes."""
    if a.shape != b.shape:
        return float("inf")
    if a.dtype != b.dtype:
        if a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
            return float("inf")
        wide = "float64" if "float64" in (a.dtype, b.dtype) else "float32"
        a, b = cast(a, wide), cast(b, wide)
    largest: float | None = None
    raw = raw_dtype(a.dtype)
    for start, stop in a.chunks():
        with scratch(stop - start, raw) as left, scratch(stop - start, raw) as right:
            a.read(start, stop, left)
            b.read(start, stop, right)
            if np.array_equal(left, right):
                continue
            here = _difference(left, right, a.dtype)
            largest = here if largest is None or not here <= largest else largest
    return largest


def _difference(left: Raw, right: Raw, dtype: str) -> float:
    if dtype not in FLOAT_DTYPES:
        return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())
    if dtype == "bfloat16":
        x, y = ((side.astype(np.uint32) << 16).view(np.float32) for side in (left, right))
    else:
        x, y = left.view(np.dtype(dtype)), right.view(np.dtype(dtype))
    with np.errstate(invalid="ignore"):
        return float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max())


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
