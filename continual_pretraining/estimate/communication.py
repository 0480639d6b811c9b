"""The bytes that ranks send each other in a step. benchmarks/communication.py checks that no more is sent.

Bytes are a rank's average in rings of W ranks: (W-1)/W of a tensor for a reduce-scatter or an all-gather, and twice
that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ZeroTraffic:
    """Bytes per rank and step."""

    gradients: float
    weights: float

    @property
    def bytes(self) -> float:
        return self.gradients + self.weights


def zero_traffic(
    stage: int, parameters: int, ranks: int, accumulation: int, *, weight_bytes: int, gradient_bytes: int,
    gathers_for_each_pass: bool = False,
) -> ZeroTraffic:  # fmt: skip
    """Traffic of gradients and weights, whose elements have ``gradient_bytes`` and ``weight_bytes``.

    ZeRO-0 sums gradients on all ranks. ZeRO-1 sums them on the ranks that keep them, ZeRO-2 does so for every
    micro-batch, and both gather the weights once. ZeRO-3 is like 2, but a model with more parameters than DeepSpeed
    keeps gathered is gathered for every forward and every backward pass.
    """
    gradients = {0: 2, 1: 1}.get(stage, accumulation) * gradient_bytes
    gathered = {0: 0, 3: 2 * accumulation if gathers_for_each_pass else 1}.get(stage, 1) * weight_bytes
    share = parameters * (ranks - 1) / ranks
    return ZeroTraffic(gradients=gradients * share, weights=gathered * share)


def sequence_traffic(hidden_bytes: int, ranks: int, *, passes: int) -> float:
    """Bytes a rank sends per position and layer: q, k, v and attention's output, ``hidden_bytes``, by all-to-all in the
    forward pass, and their gradients in the backward pass."""
    return passes * hidden_bytes * (ranks - 1) / ranks
