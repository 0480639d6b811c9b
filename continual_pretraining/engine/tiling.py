"""Computes the MLP of long rows in tiles of tokens, so that its widest tensors exist for one tile at a time.

Like TiledMLP in DeepSpeed's ALST (arXiv 2506.13996). A tile is computed without a graph, and again in the backward
pass, which finishes each tile before the next one. Shapes use: T tokens of a rank, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: [..., T, E] -> [..., T, E], independently for each token
Compute = Callable[[torch.Tensor], torch.Tensor]


def tile_mlp(model: Any, tokens: int, *, compiled: bool = False) -> list[torch.nn.Module]:
    """Make every MLP of a training model use tiles if it gets more than ``tokens``; returns all MLPs.

    Must be called before the engine is created, which under ZeRO-3 has to gather the weights of each MLP as a whole.
    With ``compiled`` layers a tile is compiled, too.
    """
    found = [layer.mlp for layer in model.model.layers]
    for mlp in found:
        tile = torch.compile(mlp.forward, dynamic=False) if compiled else mlp.forward
        tiled = functools.partial(_by_tiles, mlp, tile, tokens)
        # Outside the layer's graph, which would otherwise hold all tiles.
        mlp.forward = functools.partial(
            _chosen, mlp.forward, torch.compiler.disable(tiled) if compiled else tiled, tokens
        )
    return found


def _chosen(whole: Compute, tiled: Compute, tokens: int, inputs: torch.Tensor) -> torch.Tensor:
    return (tiled if inputs.shape[-2] > tokens else whole)(inputs)


def _by_tiles(mlp: torch.nn.Module, compute: Compute, tokens: int, inputs: torch.Tensor) -> torch.Tensor:
    length = inputs.shape[-2]
    size = -(-length // -(-length // tokens))  # equal sizes, so that they need at most two graphs
    if not torch.is_grad_enabled():
        return _computed(compute, size, inputs)
    held = _Held.apply(inputs if inputs.requires_grad else inputs.detach().requires_grad_())
    weights = [weight for weight in mlp.parameters() if weight.requires_grad]
    output: torch.Tensor = _Tiled.apply(held, held.grad_fn, compute, size, *weights)
    return output


def _computed(compute: Compute, size: int, inputs: torch.Tensor) -> torch.Tensor:
    output = torch.empty_like(inputs)
    for rows, place in zip(inputs.detach().split(size, -2), output.split(size, -2)):
        place.copy_(compute(rows))
    return output


class _Held(torch.autograd.Function):  # type: ignore[misc]
    """Saves the input of a tiled MLP in a separate node, before the MLP is computed.

    Activation checkpointing recomputes a layer up to the last saved tensor, and the MLP is a layer's last part. So the
    MLP is computed twice, as without tiles, instead of three times.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _Tiled(torch.autograd.Function):  # type: ignore[misc]
    """Sums the weights' gradients over tiles in fp32 and returns them once: DeepSpeed expects each gradient once."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, held: Any, compute: Compute, size: int, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.held, ctx.compute, ctx.size, ctx.weights = held, compute, size, weights
        return _computed(compute, size, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inputs,) = ctx.held.saved_tensors
        of_inputs = torch.empty_like(inputs)
        sums: list[torch.Tensor] = []
        for given, of_output, place in zip(*(each.split(ctx.size, -2) for each in (inputs, gradient, of_inputs))):
            with torch.enable_grad():
                rows = given.detach().requires_grad_()
                output = ctx.compute(rows)
            of_rows, *found = torch.autograd.grad(output, (rows, *ctx.weights), of_output)
            place.copy_(of_rows)
            sums = [total.add_(part) for total, part in zip(sums, found)] or [part.float() for part in found]
        of_weights = (total.to(weight.dtype) for total, weight in zip(sums, ctx.weights))
        return of_inputs, None, None, None, *of_weights
