"""Counts a model's parameters, and its FLOPs per token.

Letters: S sequence length, Q query rows.
"""

from __future__ import annotations

import math
from typing import Literal

from smolconv.models.huggingface import parameter_shapes
from smolconv.models.spec import ModelSpec

FlopsFormula = Literal["6N", "nanotron"]
#: The formula for MFU when a single number is given.
FORMULA: FlopsFormula = "6N"


def parameter_count(spec: ModelSpec) -> int:
    """All parameters; a tied head is counted once. SmolLM2-135M: 134,515,008."""
    return sum(parameter_sizes(spec).values())


def flops_per_token(spec: ModelSpec, sequence_length: int, formula: FlopsFormula = FORMULA) -> float:
    """FLOPs of forward and backward per input token, without recomputed activations.

    - ``6N``: six per parameter, including the embedding (or tied head), without attention's own products.
    - ``nanotron``: three times the matrix products of the forward pass, counted like nanotron's ``get_flops``: two per
      element of a layer's matrices and of the head, and 4·Q·S per layer for attention, over the full row of S
      positions, regardless of causality and documents. Embedding, norms and biases are not counted.
    """
    if formula == "6N":
        return 6.0 * parameter_count(spec)
    if formula != "nanotron":
        raise ValueError(f"there is no formula {formula!r} for FLOPs; there are 6N and nanotron")
    hidden, query, kv = spec.hidden_size, spec.query_rows, spec.kv_rows
    matrices = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * spec.intermediate_size
    layer = 2 * matrices + 4 * query * sequence_length
    return 3.0 * (spec.num_layers * layer + 2 * hidden * spec.vocab_size)


def parameter_sizes(spec: ModelSpec) -> dict[str, int]:
    """Elements by name."""
    return {name: math.prod(shape) for name, shape in parameter_shapes(spec).items()}
