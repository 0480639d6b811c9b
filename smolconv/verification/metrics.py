"""Distances between logits, computed in chunks of the vocabulary, so that 128,256 logits per token are never held.

All sums are kept per position, in float64. Shapes: N positions, C a chunk of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: From here on, exp(-d) and 1 - d differ enough in float64 without a series.
_SMALL = 1e-3
#: The series is used up to this excess of B's mass over A's; beyond it, plain sums.
_NEAR = 0.1


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Two sets of logits over the same positions; every tensor is [N]."""

    max_abs: torch.Tensor
    mean_abs: torch.Tensor
    kl: torch.Tensor  #: KL(A || B)
    same_first: torch.Tensor  #: bool: the first choice is the same
    gap: torch.Tensor  #: between A's first two choices
    nll_a: torch.Tensor  #: of the next token; NaN where there is none
    nll_b: torch.Tensor
    std: float  #: of all of A's logits
    finite_a: bool  #: all logits
    finite_b: bool


class Walk:
    """Accumulates ``Distances`` over chunks of the vocabulary, in order."""

    def __init__(self, targets: torch.Tensor) -> None:
        """``targets`` [N]: the next tokens, -1 if there is none."""
        import torch

        self.targets = targets
        self.seen = 0
        count = len(targets)

        def filled(value: float) -> torch.Tensor:
            return torch.full((count,), value, dtype=torch.float64)

        self.max_abs, self.sum_abs = filled(0), filled(0)
        self.top = filled(-torch.inf)  # A's maximum so far; sums of exponentials are relative to it
        self.second, self.top_b = filled(-torch.inf), filled(-torch.inf)
        self.first_a, self.first_b = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        self.mass, self.excess, self.shift = filled(0), filled(0), filled(0)
        self.mass_b, self.moved = filled(0), filled(0)
        self.target_a, self.target_b = filled(torch.nan), filled(torch.nan)
        self.total, self.squares, self.total_b = 0.0, 0.0, 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add the next chunk of both, [N, C] in float32."""
        import torch

        difference = a - b
        size = difference.abs()
        self.max_abs = torch.maximum(self.max_abs, size.amax(1).double())
        self.sum_abs += size.sum(1, dtype=torch.float64)
        self.total += float(a.sum(dtype=torch.float64))
        # In float32, squares of logits from 2e19 on would overflow.
        self.squares += float(torch.linalg.vector_norm(a, dtype=torch.float64)) ** 2
        self.total_b += float(b.sum(dtype=torch.float64))
        two, (top_b, index_b) = a.topk(min(2, a.shape[1]), dim=1).values, b.max(1)
        index = a.argmax(1)  # the first of equal logits, as for b; topk may return any
        best, runner = two[:, 0].double(), two[:, -1].double() if two.shape[1] > 1 else self.second.new_full(
            (len(a),), -torch.inf
        )  # fmt: skip
        self.first_b = torch.where(top_b.double() > self.top_b, index_b + self.seen, self.first_b)
        top_of_b = torch.maximum(self.top_b, top_b.double())
        self.mass_b = self.mass_b * (self.top_b - top_of_b).exp() + (b - top_of_b[:, None].float()).exp().sum(
            1, dtype=torch.float64
        )
        self.top_b = top_of_b
        self.first_a = torch.where(best > self.top, index + self.seen, self.first_a)
        # The second largest of the four candidates.
        self.second = torch.maximum(torch.minimum(self.top, best), torch.maximum(self.second, runner))
        top = torch.maximum(self.top, best)
        rescale = (self.top - top).exp()
        # KL = sum p (d + expm1(-d)) + log1p(s) - s with s = sum p expm1(-d): no large numbers cancel, as they would in
        # sum p (log p - log q), where two float32 forwards differ by 1e-11.
        weight = (a - top[:, None].float()).exp()
        small = torch.where(
            size < _SMALL,
            difference * difference * (0.5 - difference * (1 / 6 - difference / 24)),
            (difference.double() + torch.expm1(-difference.double())).float(),
        )
        self.moved = self.moved * rescale + (weight * difference).sum(1, dtype=torch.float64)
        self.mass = self.mass * rescale + weight.sum(1, dtype=torch.float64)
        self.excess = self.excess * rescale + (weight * small).sum(1, dtype=torch.float64)
        self.shift = self.shift * rescale + (weight * torch.expm1(-difference)).sum(1, dtype=torch.float64)
        self.top = top
        inside = (self.targets >= self.seen) & (self.targets < self.seen + a.shape[1])
        column = (self.targets - self.seen).clamp(0, a.shape[1] - 1)[:, None]
        self.target_a = torch.where(inside, a.gather(1, column)[:, 0].double(), self.target_a)
        self.target_b = torch.where(inside, b.gather(1, column)[:, 0].double(), self.target_b)
        self.seen += a.shape[1]

    def finish(self) -> Distances:
        import torch

        shift = self.shift / self.mass
        log_total_a = self.top + self.mass.log()
        # The series is for small differences: for large ones its exponentials overflow, and plain sums do not cancel.
        plain_b = self.top_b + self.mass_b.log()
        near = shift.abs() < _NEAR
        log_total_b = torch.where(near, log_total_a + shift.log1p(), plain_b)
        plain = self.moved / self.mass + plain_b - log_total_a
        kl = torch.where(near, self.excess / self.mass + shift.log1p() - shift, plain)
        count = self.seen * len(self.targets)
        mean = self.total / count
        return Distances(
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.seen,
            kl=kl.clamp(min=0),
            same_first=self.first_a == self.first_b,
            gap=self.top - self.second,
            nll_a=log_total_a - self.target_a,
            nll_b=log_total_b - self.target_b,
            std=max(self.squares / count - mean * mean, 0.0) ** 0.5,
            finite_a=math.isfinite(self.total),
            finite_b=math.isfinite(self.total_b),
        )
