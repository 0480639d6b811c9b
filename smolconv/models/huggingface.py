"""Hugging Face's names are the canonical ones: the table only says what is tied and what old files hold in addition."""

from __future__ import annotations

from smolconv.models.spec import ModelSpec, parameter_shapes
from smolconv.models.weights import Rule, WeightTable


def weight_table(spec: ModelSpec) -> WeightTable:
    """Identity over the model's parameters."""
    shapes = parameter_shapes(spec)
    return WeightTable(
        rules=tuple(Rule((name,), name) for name in shapes),
        shapes=shapes,
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {},
        dropped={r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "a buffer that follows from rope_theta"},
    )
