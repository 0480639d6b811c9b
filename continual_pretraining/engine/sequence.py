"""Sequence parallelism: neighbouring ranks divide the tokens of a micro-batch and, in attention, its heads.

The micro-batch is cut after packing, so a rank holds T/P tokens of the flattened row, wherever documents and rows end.
An all-to-all before attention gives each rank all tokens of its H/P query heads, and another one after it all heads of
its own tokens: DeepSpeed Ulysses (arXiv 2309.14509). Attention itself is unchanged.

Shapes use: P ranks of a group, T tokens, t = T/P, H query heads, K key/value heads, D head size, n = H/P, m key/value
heads of a rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from smolconv.continual_pretraining.engine.attention import Kernel, Packing


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRanks:
    """The group of ranks that share every micro-batch, and this rank's place in it."""

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None  #: None: a single rank

    def own(self, row: torch.Tensor) -> torch.Tensor:
        """This rank's part [1, t] of ``row`` [1, T]."""
        return row.tensor_split(self.size, 1)[self.rank]

    def totals(self, *values: torch.Tensor) -> list[float]:
        """Each value summed over the group, in float64 and in the order of its ranks: equal values give equal bits."""
        own = torch.stack([value.double() for value in values])
        if self.group is None:
            return own.tolist()  # type: ignore[no-any-return]
        every = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(every, own, group=self.group)
        return torch.stack(every).sum(0).tolist()  # type: ignore[no-any-return]

    def attention(self, kernel: Kernel) -> Kernel:
        """``kernel`` for tokens that are divided among the group."""
        return kernel if self.group is None else functools.partial(_attend, self, kernel)


ALONE = SequenceRanks()


def join_sequence_ranks(rank: int, world_size: int, size: int) -> SequenceRanks:
    """This rank's group of ``size`` neighbours. All ranks must call this, because each helps create every group."""
    if size == 1:
        return ALONE
    groups = [list(range(first, first + size)) for first in range(0, world_size, size)]
    own, _ = torch.distributed.new_subgroups_by_enumeration(groups)
    return SequenceRanks(rank=rank % size, size=size, group=own)


def _attend(
    ranks: SequenceRanks, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    packing: Packing, scale: float,
) -> torch.Tensor:  # fmt: skip
    """[1, t, H, D] of ``query`` [1, H, t, D], ``key`` and ``value`` [1, K, t, D]: a ``Kernel`` for t of T tokens."""
    size, (heads, tokens) = ranks.size, query.shape[1:3]
    # If P does not divide K, key/value heads are repeated so that each rank has those of its query heads. Since P
    # divides H, every rank has equally many, and each serves equally many query heads.
    copies = size // math.gcd(size, key.shape[1])
    key, value = (part.repeat_interleave(copies, 1) if copies > 1 else part for part in (key, value))
    # [1, heads, t, D] -> [P, heads / P, t, D], the heads of each rank; all three in one exchange
    sent = torch.cat([part[0].unflatten(0, (size, -1)) for part in (query, key, value)], 1)
    # [P, n + 2m, t, D], the tokens of each rank -> [1, n + 2m, T, D]
    whole = _exchange(sent, ranks.group).transpose(0, 1).flatten(1, 2)[None]
    per_rank = heads // size
    query, key, value = whole.split([per_rank, *[(whole.shape[1] - per_rank) // 2] * 2], 1)
    attended = kernel(query, key, value, packing, scale)
    # [1, T, n, D] -> [P, t, n, D], the tokens of each rank; back: the heads of each rank -> [1, t, H, D]
    found = _exchange(attended[0].unflatten(0, (size, tokens)), ranks.group)
    return found.transpose(0, 1).flatten(1, 2)[None]


def _exchange(parts: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    exchanged: torch.Tensor = _Exchange.apply(parts, group)
    return exchanged


class _Exchange(torch.autograd.Function):  # type: ignore[misc]
    """All-to-all: part r of [P, ...] goes to rank r, and is replaced by rank r's part for this rank."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        found = torch.empty_like(parts, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(found, parts.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.group), None  # the exchange is its own inverse
