"""The logits tier: two forward passes in parallel, one block in memory at a time, on the same tokens.

A runs twice, with sdpa and with eager attention: their distance is the noise floor, against which B's difference is
judged. The result names the first module at which B differs from A by more than noise. For long rows the eager run uses
the first half: attention is causal, so the floor of those positions is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smolconv.errors import NotInstalled, UsageError, pip_install
from smolconv.progress import Bar, no_bar
from smolconv.verification.forward import ForwardPass, Side, return_freed_memory
from smolconv.verification.inputs import Rows
from smolconv.verification.metrics import Distances, Walk

if TYPE_CHECKING:
    import torch

#: Rows of the output matrix in memory at a time.
_VOCABULARY_ROWS = 2048
#: For rows up to this length the noise floor is measured at every position, for longer ones over the first half.
_FLOOR_POSITIONS = 512
#: Modules that ``first_divergence`` may name; ``layers`` lists finer ones.
_MODULES = ("embed_tokens", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "norm")
#: By dtype, the gates that every comparison has; ``documents`` where rows are packed, ``nll`` where there are targets.
GATES = {"float32": ("max_abs", "kl", "top1"), "bfloat16": ("kl", "top1", "flips")}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A limit that can fail."""

    limit: float
    value: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """The distance of two models' logits, and the noise floor of A: sdpa against eager attention."""

    positions: int
    tokens_from: str
    documents: int
    compute: str
    forwards: tuple[str, str]  #: whose code ran on which tensors, for A and B
    max_abs: float
    mean_abs: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nll_a: float
    nll_b: float
    noise_floor: Mapping[str, float]
    gates: Mapping[str, Gate]
    layers: tuple[Mapping[str, Any], ...]  #: module, max_abs, floor, scale, limit, diverged; in forward order
    #: max_abs, floor (NaN if not measured), kl, nll_a, nll_b of every position
    by_position: Mapping[str, tuple[float, ...]]
    first_divergence: str | None
    #: False if neither side's logits are finite, and no module that is finite in A showed a difference
    comparable: bool

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates.values())


def require_torch() -> None:
    """Raise ``NotInstalled`` if the logits tier cannot run."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise NotInstalled(
            f"comparing logits needs {' and '.join(missing)}: {pip_install(missing)}.\n"
            "Without them, smolconv verify --tensors-only compares specs and tensors."
        )


def require_device(device: str) -> None:
    """Raise ``UsageError`` if torch cannot compute on the device."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # the device meta has tensors, but no values
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def compare_logits(
    a: Side,
    b: Side,
    rows: Rows,
    *,
    compute: str = "float32",
    gates: Mapping[str, float | None] | None = None,
    engines: Mapping[str, NDArray[np.float32]] | None = None,
    bar: Bar = no_bar,
) -> LogitsReport:
    """Run A and B on the same tokens. Gates set by the user replace the calibrated ones.

    ``engines``: logits [T, V] of a real engine for side "a" or "b", which must equal that side's.
    """
    import torch

    layers = _Layers(compute)
    plain = {"tokens": torch.from_numpy(rows.tokens), "positions": torch.from_numpy(rows.positions)}
    length = rows.tokens.shape[1]
    first = {name: tensor[:, : max(_FLOOR_POSITIONS, length // 2)] for name, tensor in plain.items()}
    runs = [
        ForwardPass(**plain, attention="sdpa", observe=layers.remember),
        ForwardPass(**first, attention="eager", observe=layers.floor_of),
    ]
    # Packed rows are compared with each document alone, which shows whether documents see each other.
    alone = [
        ForwardPass(
            tokens=plain["tokens"][:, start:stop], positions=plain["positions"][:, start:stop], attention="sdpa"
        )
        for start, stop in rows.spans
    ] if rows.documents > 1 else []  # fmt: skip
    run_b = ForwardPass(**plain, attention="sdpa", observe=layers.distance_of)
    # Besides the layers: the embedding and the output matrix.
    with torch.inference_mode(), bar("comparing layers", a.num_layers + 2) as advance:
        a.begin([*runs, *alone])
        b.begin([run_b])
        layers.next()
        advance(1)
        for layer in range(a.num_layers):
            a.advance(layer, [*runs, *alone])
            b.advance(layer, [run_b])
            layers.next()
            advance(1)
        a.finish([*runs, *alone])
        b.finish([run_b])
        layers.next()
        walks = _walk_vocabulary(a, b, runs, run_b, alone, rows, engines or {})
        advance(1)
    return _judged(a, b, rows, layers, walks, compute, gates or {})


class _Layers:
    """The largest differences by module. A's activations are kept for one block only."""

    def __init__(self, compute: str) -> None:
        self.compute = compute
        self.kept: dict[str, torch.Tensor] = {}
        self.found: dict[str, dict[str, float]] = {}

    def remember(self, name: str, tensor: torch.Tensor) -> None:
        self.kept[name] = tensor
        self.found[name] = {"max_abs": float("inf"), "floor": 0.0, "scale": float(tensor.float().std())}

    def floor_of(self, name: str, tensor: torch.Tensor) -> None:
        self.found[name]["floor"] = _largest(self.kept[name][:, : tensor.shape[1]], tensor)

    def distance_of(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.found:
            self.found[name]["max_abs"] = _largest(self.kept[name], tensor)

    def next(self) -> None:
        self.kept.clear()
        return_freed_memory()

    def listed(self) -> list[dict[str, Any]]:
        """Modules in forward order, each with whether it differs by more than noise."""
        times, share = (8, 2e-5) if self.compute == "float32" else (4, 2e-2)
        result = []
        for name, values in self.found.items():
            limit = max(times * values["floor"], share * values["scale"])
            result.append({"module": name, **values, "limit": limit, "diverged": not values["max_abs"] <= limit})
        return result


def _walk_vocabulary(
    a: Side,
    b: Side,
    runs: Sequence[ForwardPass],
    run_b: ForwardPass,
    alone: Sequence[ForwardPass],
    rows: Rows,
    engines: Mapping[str, NDArray[np.float32]],
) -> dict[str, Distances]:
    """Distances over the vocabulary: "floor", "found" (B), "apart" (A's documents alone), "engine a", "engine b"."""
    import torch

    targets = torch.from_numpy(rows.targets).flatten()
    names = ["found", *(["apart"] if alone else []), *(f"engine {label}" for label in engines)]
    first = runs[1].tokens.shape[1]  # one row: the positions with a measured noise floor
    walks = {"floor": Walk(targets[:first]), **{name: Walk(targets) for name in names}}
    hidden = [run.hidden.flatten(0, 1) for run in (*runs, run_b)]
    documents = torch.cat([run.hidden.flatten(0, 1) for run in alone]) if alone else None
    vocabulary = min(a.vocab_size, b.vocab_size)
    for start in range(0, vocabulary, _VOCABULARY_ROWS):
        stop = min(start + _VOCABULARY_ROWS, vocabulary)
        weight = a.head_rows(start, stop).T
        sdpa, eager = ((rows_of @ weight).float().cpu() for rows_of in hidden[:2])
        other = (hidden[2] @ b.head_rows(start, stop).T).float().cpu()
        walks["floor"].add(sdpa[:first], eager)
        walks["found"].add(sdpa, other)
        if documents is not None:
            walks["apart"].add(sdpa, (documents @ weight).float().cpu())
        for label, logits in engines.items():
            theirs = torch.from_numpy(np.array(logits[:, start:stop]))
            walks[f"engine {label}"].add(sdpa if label == "a" else other, theirs)
    return {name: walk.finish() for name, walk in walks.items()}


def _judged(
    a: Side,
    b: Side,
    rows: Rows,
    layers: _Layers,
    walks: Mapping[str, Distances],
    compute: str,
    given: Mapping[str, float | None],
) -> LogitsReport:
    floor, found, apart = walks["floor"], walks["found"], walks.get("apart")
    noise, values = _summary(floor), _summary(found)
    limits = _limits(noise, found.std, compute)
    limits.update({name: limit for name, limit in given.items() if limit is not None})
    decided = found.gap > (4 * noise["max_abs"] if compute == "float32" else 0.5)
    measured = {
        "max_abs": values["max_abs"],
        "kl": values["kl_mean"],
        "top1": _share(found.same_first, decided if compute == "float32" else None),
        "nll": abs(values["nll_b"] - values["nll_a"]) if (rows.targets >= 0).any() else None,
        "flips": 1.0 - _share(found.same_first, decided),
        "documents": float(apart.max_abs.max()) if apart is not None else None,
        "documents_kl": float(apart.kl.mean()) if apart is not None else None,
    }
    gates = {
        name: Gate(limit=limit, value=value, passed=value >= limit if name == "top1" else value <= limit)
        for name, limit in limits.items()
        if (value := measured[name]) is not None
    }
    # A bf16 engine is another kernel in another dtype: allow what two correct bf16 kernels may differ by.
    for name in (name for name in walks if name.startswith("engine")):
        kl = float(walks[name].kl.mean())
        gates[name] = Gate(limit=5e-3, value=kl, passed=kl <= 5e-3)
    listed = layers.listed()
    diverged = [each["module"] for each in listed if each["diverged"] and each["module"].rsplit(".", 1)[-1] in _MODULES]
    parted = any(each["diverged"] and math.isfinite(each["scale"] + each["floor"]) for each in listed)
    passed = all(gate.passed for gate in gates.values())
    return LogitsReport(
        positions=int(rows.tokens.size),
        tokens_from=rows.where,
        documents=rows.documents,
        compute=compute,
        forwards=(a.title, b.title),
        **{name: values[name] for name in
           ("max_abs", "mean_abs", "kl_mean", "kl_p99", "top1_agreement", "nll_a", "nll_b")},
        noise_floor={name: noise[name] for name in ("max_abs", "mean_abs", "kl_mean", "kl_p99", "top1_agreement")},
        gates=gates,
        layers=tuple(listed),
        by_position={
            "max_abs": tuple(found.max_abs.tolist()),
            "floor": (*floor.max_abs.tolist(), *[math.nan] * (len(found.max_abs) - len(floor.max_abs))),
            "kl": tuple(found.kl.tolist()), "nll_a": tuple(found.nll_a.tolist()), "nll_b": tuple(found.nll_b.tolist()),
        },
        first_divergence=None if passed else (diverged[0] if diverged else "lm_head"),
        comparable=found.finite_a or found.finite_b or parted,
    )  # fmt: skip


def _limits(noise: Mapping[str, float], spread: float, compute: str) -> dict[str, float]:
    """Calibrated on SmolLM2-135M, logits spread by 6.4: correct fp32 forward passes differ by less than 1e-3."""
    # Near the largest float, attention or logits may overflow. What is not finite measures and excuses nothing.
    noise = {name: value if math.isfinite(value) else 0.0 for name, value in noise.items()}
    spread = spread if math.isfinite(spread) else 0.0
    documents = max(1e-3 * spread / 6.4, 8 * noise["max_abs"])
    if compute == "float32":
        return {"max_abs": documents, "kl": max(1e-9, 8 * noise["kl_mean"]), "top1": 1.0, "documents": documents}
    # In bf16 two correct kernels differ by 2.0 at some positions, so the largest difference is no criterion.
    return {
        "kl": max(5e-3, 2.5 * noise["kl_mean"]),
        "top1": min(0.95, noise["top1_agreement"] - 0.02),
        "nll": max(0.01, 2.5 * abs(noise["nll_b"] - noise["nll_a"])),
        "flips": 0.0,
        "documents_kl": max(5e-3, 2.5 * noise["kl_mean"]),
    }


def _summary(distances: Distances) -> dict[str, float]:
    return {
        "max_abs": float(distances.max_abs.max()),
        "mean_abs": float(distances.mean_abs.mean()),
        "kl_mean": float(distances.kl.mean()),
        "kl_p99": float(distances.kl.quantile(0.99)),
        "top1_agreement": _share(distances.same_first, None),
        "nll_a": float(distances.nll_a.nanmean()),
        "nll_b": float(distances.nll_b.nanmean()),
    }


def _share(same: torch.Tensor, among: torch.Tensor | None) -> float:
    chosen = same if among is None else same[among]
    return float(chosen.double().mean()) if len(chosen) else 1.0


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    import torch

    if a.shape != b.shape:
        return float("inf")
    # Row by row of the batch, so that the difference of two MLP activations is never held completely.
    parts = [(x - y).abs().max() for x, y in zip(a.flatten(0, -2).split(512), b.flatten(0, -2).split(512))]
    return float(torch.stack(parts).max())  # NaN wherever it is, which Python's max would lose
