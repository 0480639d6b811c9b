"""Attention within documents, for transformers' models.

A micro-batch is flattened to one row of T tokens, and documents are ranges of it; no mask is built. Every row of a
micro-batch begins a document, so rows never see each other. Shapes use: B rows, S tokens of a row, T = B·S,
N documents, H query heads, K key/value heads, D head size.

Importing this module registers the attention with transformers, under ``ATTENTION``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from smolconv.errors import NotInstalled, UsageError

#: The name of the attention implementation in a config.
ATTENTION = "smolconv_packed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """The documents of one flattened micro-batch, found once per forward pass and used by every layer."""

    cu_seqlens: torch.Tensor  #: int32 [N + 1], the starts of documents, and T
    max_length: int
    order: torch.Tensor | None  #: int64 [T], the token at each place; None: unchanged order
    groups: tuple[tuple[int, int], ...]  #: (length, number of documents), by place
    kernel: Kernel


#: ``kernel(query [1, H, T, D], key [1, K, T, D], value [1, K, T, D], packing, scale) -> [1, T, H, D]``
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packing, float], torch.Tensor]


def pack(
    positions: torch.Tensor, device: torch.device, kernel: Kernel, *, by_length: bool, padding: int = 0
) -> Packing:  # fmt: skip
    """Find the documents of ``positions``, int64 [B, S], which are 0 where a document begins.

    ``by_length`` sorts documents of equal length together, for ``attend_by_document``. ``padding`` tokens after the
    last row form a separate document, and count in T.
    Fastest if ``positions`` are on the CPU: the boundaries are needed there, and reading them from a GPU would wait.
    Raises ``ValueError`` if a row does not begin a document: it would continue the previous row.
    """
    places = positions.detach().cpu().numpy()
    if places[:, 0].any():
        row = int(places[:, 0].nonzero()[0][0])
        raise ValueError(f"row {row} begins at position {places[row, 0]}; every row begins a document, at position 0")
    bounds = np.append(np.flatnonzero(places == 0), places.size)
    if padding:
        bounds = np.append(bounds, places.size + padding)
    lengths = np.diff(bounds)
    order, known = None, np.unique(lengths, return_counts=True)
    if by_length and len(known[0]) > 1:
        # The tokens are reordered once per forward pass, so that no layer gathers them. The rest of the model works on
        # single tokens and the loss is a sum, so the order does not matter there.
        order = move(torch.from_numpy(np.argsort(np.repeat(lengths, lengths), kind="stable")), device)
    return Packing(
        cu_seqlens=move(torch.from_numpy(bounds.astype(np.int32)), device),
        max_length=int(lengths.max()),
        order=order,
        groups=tuple(zip(known[0].tolist(), known[1].tolist())),
        kernel=kernel,
    )


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``tensor`` to ``device``. For a GPU it is pinned first, so that the CPU does not wait for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, packing: Packing | None = None, scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The function that transformers' layers call. ``packing`` is passed as a keyword of the model's forward."""
    if packing is None or attention_mask is not None:
        raise ValueError(f"{ATTENTION} needs packing and no mask: call the model through TrainingForward")
    return packing.kernel(query, key, value, packing, scaling or query.shape[-1] ** -0.5), None


# No mask function: transformers then builds no mask, and does not search the positions for documents on the GPU.
AttentionInterface.register(ATTENTION, packed_attention)


# --- kernels ----------------------------------------------------------------------------------------------------------


def attend_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """torch's own attention, with one call for all documents of the same length; tokens are in ``packing.order``.

    The cost grows with the sum of squares of the documents' lengths.
    """
    given = query.dtype
    query, key, value = (tensor[0].to(multiplied_dtype(tensor)) for tensor in (query, key, value))
    if query.is_cuda and query.dtype == torch.float32:
        # In float32 the only GPU kernel that takes fewer key/value heads stores all scores: 69 GB for 16 heads and a
        # document of 32,768 tokens.
        key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    sizes = [length * count for length, count in packing.groups]
    parts = []
    # split instead of slices: its backward is one copy, while each slice's backward fills a tensor with zeros.
    for (length, count), *group in zip(packing.groups, *(tensor.split(sizes, 1) for tensor in (query, key, value))):
        # [heads, count·length, D] -> [count, heads, length, D]
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in group)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None].to(given)


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float) -> torch.Tensor:
    """flash-attn's kernel (2.x), which supports fewer key/value heads."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    bounds, longest = packing.cu_seqlens, packing.max_length
    out: torch.Tensor = flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )
    return out[None]


def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float) -> torch.Tensor:
    """torch's variable-length kernel, with the arguments of the installed release."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = _parameters(varlen_attn)
    options: dict[str, Any] = {}
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    if "window_size" in accepted:
        options["window_size"] = (-1, 0)  # causal
    else:  # torch 2.10
        options["is_causal"] = True
    if "scale" in accepted:
        options["scale"] = scale
    elif (factor := scale * q.shape[-1] ** 0.5) != 1.0:  # torch 2.10 always divides by sqrt(D)
        q = q * factor
    if "enable_gqa" in accepted:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # torch 2.10 and 2.11 require as many key/value heads as query heads, by their documentation
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    bounds, longest = packing.cu_seqlens, packing.max_length
    out: torch.Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return out[None]


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


KERNELS: dict[str, Kernel] = {"documents": attend_by_document, "flash": flash, "varlen": varlen}


# --- which one --------------------------------------------------------------------------------------------------------


def choose_attention(asked: str, device: str, dtype: torch.dtype) -> str:
    """The name of a kernel in ``KERNELS`` for a recipe's ``model.attention``.

    "auto" is flash-attn, else torch's varlen_attn, else documents; the first two run in bfloat16 on NVIDIA GPUs of
    compute capability 8.0 and above. A kernel chosen by name that cannot run raises ``NotInstalled`` or ``UsageError``.
    """
    if asked == "documents":
        return asked
    unable = _unable(device, dtype)
    missing = {"flash": _no_flash(), "varlen": _no_varlen()}
    if asked == "auto":
        return next((name for name in ("flash", "varlen") if not unable and not missing[name]), "documents")
    if unable:
        raise UsageError(f"model.attention is {asked}, which {unable}.\nSet model.attention to auto or documents.")
    if missing[asked]:
        raise NotInstalled(f"model.attention is {asked}, but {missing[asked]}.\nInstall it, or set it to auto.")
    return asked


def _unable(device: str, dtype: torch.dtype) -> str | None:
    if not device.startswith("cuda"):
        return f"runs on NVIDIA GPUs, and this run is on {device}"
    if dtype != torch.bfloat16:
        return f"computes in bfloat16, and model.dtype is {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0, which this GPU does not have"
    return None


def _no_flash() -> str | None:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:  # also if it was built for another torch
        return "flash-attn is not installed"
    return None


def _no_varlen() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn; torch 2.10 has"
    return None


def multiplied_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype for products of ``tensor``: its own, or float32 on a CPU without bfloat16 instructions.

    There torch emulates bfloat16 one number at a time. Measured on an AVX2 machine, one thread: attention with its
    backward pass over 16 documents of 128 tokens (9 and 3 heads of 64) takes 166 ms in bfloat16, 43 ms in float32; a
    product of 256 x 576 and 576 x 4096 takes 123 ms and 16 ms.
    """
    slow = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not _cpu_multiplies_bfloat16()
    return torch.float32 if slow else tensor.dtype


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
