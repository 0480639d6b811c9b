"""The interface of the logits tier: a forward pass that runs one block at a time, over several runs at once.

A side loads one block's weights, advances every active run through it, and drops them again, so it needs only the
memory of its largest block. Shapes: B rows, T positions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from smolconv.tensors.elements import raw_dtype
from smolconv.tensors.lazy import LazyTensor, row_slice
from smolconv.tensors.reading import as_bytes

if TYPE_CHECKING:
    import torch

#: A block's activations, by Hugging Face module path: "model.layers.3.self_attn.q_proj".
Observe = Callable[[str, "torch.Tensor"], None]


@dataclass(kw_only=True)
class ForwardPass:
    """The state of one pass of one side over one batch of tokens."""

    tokens: torch.Tensor  #: int64 [B, T]
    positions: torch.Tensor  #: int64 [B, T]; every 0 begins a document
    attention: str  #: "sdpa" or "eager"
    observe: Observe = field(default=lambda name, tensor: None)
    hidden: Any = None  #: [B, T, E], the residual stream
    context: Any = None  #: private to the side: masks, rotary tables

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one document."""
        return bool((self.positions[:, 1:] == 0).any())


class Side(Protocol):
    """One checkpoint's forward pass."""

    title: str  #: for messages: whose code runs on which tensors
    num_layers: int
    vocab_size: int
    max_positions: int

    def begin(self, runs: Sequence[ForwardPass]) -> None:
        """Look the tokens up in the embedding."""

    def advance(self, layer: int, runs: Sequence[ForwardPass]) -> None:
        """Advance every run through one block, whose weights are loaded once."""

    def finish(self, runs: Sequence[ForwardPass]) -> None:
        """The final norm."""

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, E], in the side's compute dtype."""


def to_torch(tensor: LazyTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor in torch, in its own dtype or another, without a second copy of the stored bytes."""
    import torch

    stored = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    if tensor.numel:
        raw: Any = np.frombuffer(memoryview(_bytes_of(stored)), raw_dtype(tensor.dtype))
        for start, stop in tensor.chunks():
            tensor.read(start, stop, raw[start:stop])
    return stored if dtype is None else stored.to(dtype)


def _bytes_of(tensor: torch.Tensor) -> Any:
    import torch

    return as_bytes(tensor.flatten().view(torch.uint8).numpy())


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps the activations of a block, 1 GB at 2048 positions."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def embedding_rows(embedding: LazyTensor, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The embedding rows of the tokens, [B, T, E]; a text needs few of 128,256 rows."""
    import torch

    wanted, inverse = torch.unique(tokens, return_inverse=True)
    rows = torch.stack([to_torch(row_slice(embedding, int(i), int(i) + 1))[0] for i in wanted])
    return rows.to(dtype)[inverse]
