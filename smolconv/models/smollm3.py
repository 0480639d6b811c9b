"""SmolLM3: nanotron's ``Qwen2Config`` with NoPE layers. Data only; the rules say everything.

NoPE changes no row order by itself, but an interleaved model stores the rows of its NoPE layers like those of the
others: q and k are reordered in every layer, and together, so that only a comparison of tensors could notice a slip.
"""

from __future__ import annotations

from smolconv.models.llama import INPUT_NORM, OUTPUT, POST_NORM, assemble, attention_rule, mlp_rules
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import WeightTable


def nanotron_table(spec: ModelSpec, *, interleaved: bool) -> WeightTable:
    """nanotron's ``Qwen2Config``, whose optimizer counts both norms of a layer before its attention."""
    attention = [attention_rule(spec, "weight", interleaved=interleaved)]
    absent = {}
    if spec.attention_bias:
        attention.append(attention_rule(spec, "bias", interleaved=interleaved))
        absent = {
            f"model.layers.{i}.self_attn.o_proj.bias": "nanotron's o_proj has no bias" for i in range(spec.num_layers)
        }
    return assemble(spec, (INPUT_NORM, POST_NORM, *attention, OUTPUT, *mlp_rules(spec)), absent)
