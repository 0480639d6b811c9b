"""How many parameters a model has, and what a token costs.

Letters: S sequence length, Q query rows.
"""

from __future__ import annotations

import math
from typing import Literal

from smolconv.models.huggingface import parameter_shapes
from smolconv.models.spec import ModelSpec

FlopsFormula = Literal["6N", "nanotron"]
#: By which MFU is stated where one number is.
FORMULA: FlopsFormula = "6N"


def parameter_count(spec: ModelSpec) -> int:
    """A tied head is the embedding, and counted once. SmolLM2-135M: 134,515,008."""
    return sum(parameter_sizes(spec).values())


def flops_per_token(spec: ModelSpec, sequence_length: int, formula: FlopsFormula = FORMULA) -> float:
    """Forward and backward of one input token; recomputed activations do not count.

    - ``6N``: six for every parameter, the embedding (or tied head) among them. Attention's own products do not count.
    - ``nanotron``: three times the forward's matrix products as nanotron's ``get_flops`` counts them: two for every
      element of a layer's matrices and of the head, and 4·Q·S in each layer for attention, over the full row of S
      positions: neither causality nor boundaries of documents make it less. Embedding, norms and biases count nothing.
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
