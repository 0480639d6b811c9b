"""Small tensors for tests: torch on one side, ``LazyTensor`` on the other, compared bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from smolconv.tensors.dtypes import DTYPE_BYTES
from smolconv.tensors.lazy import LazyTensor, Literal, Stored


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes that torch would store, in row-major order."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def literal(tensor: torch.Tensor) -> Literal:
    """The tensor held in memory."""
    return Literal(data=raw_bytes(tensor), shape=tuple(tensor.shape), dtype=dtype_name(tensor))


def stored(path: Path, tensors: Sequence[torch.Tensor], gap: int = 0) -> list[Stored]:
    """The tensors one after the other in a new file, ``gap`` bytes apart."""
    found, content = [], b""
    for tensor in tensors:
        content += b"\xee" * gap
        found.append(Stored(path=path, offset=len(content), shape=tuple(tensor.shape), dtype=dtype_name(tensor)))
        content += raw_bytes(tensor)
    path.write_bytes(content)
    return found


def to_torch(tensor: LazyTensor) -> torch.Tensor:
    """The whole lazy tensor, in its own dtype."""
    integers = torch.from_numpy(tensor.numpy().view(f"i{DTYPE_BYTES[tensor.dtype]}").copy())
    return integers.view(getattr(torch, tensor.dtype)).reshape(tensor.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit are equal: NaNs and signed zeros included."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and raw_bytes(a) == raw_bytes(b)


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=dtype).element_size()
    count = int(torch.Size(shape).numel()) * width
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(tuple(shape))
