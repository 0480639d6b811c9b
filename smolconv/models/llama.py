"""SmolLM2, and any Llama that nanotron's ``LlamaConfig`` holds. Data only; the rules say everything."""

from __future__ import annotations

from smolconv.models.operations import JoinRows, Rename, RotaryPairs
from smolconv.models.spec import ModelSpec, parameter_shapes
from smolconv.models.weights import Rule, WeightTable

_CANONICAL = "model.layers.{i}."
_NANOTRON = "model.decoder.{i}.pp_block."


def attention_rule(spec: ModelSpec, kind: str, *, interleaved: bool) -> Rule:
    """Fused q, k, v: weights [(H + 2K)*D, E] or biases [(H + 2K)*D]. k has K heads, not H."""
    rotary = RotaryPairs(spec.head_size) if interleaved else Rename()
    return Rule(
        tuple(f"{_CANONICAL}self_attn.{part}_proj.{kind}" for part in "qkv"),
        f"{_NANOTRON}attn.qkv_proj.{kind}",
        JoinRows((spec.query_rows, spec.kv_rows, spec.kv_rows), (rotary, rotary, Rename())),
    )


def mlp_rules(spec: ModelSpec) -> tuple[Rule, ...]:
    return (
        Rule(
            (f"{_CANONICAL}mlp.gate_proj.weight", f"{_CANONICAL}mlp.up_proj.weight"),
            f"{_NANOTRON}mlp.gate_up_proj.weight",
            JoinRows((spec.intermediate_size, spec.intermediate_size)),
        ),
        Rule((f"{_CANONICAL}mlp.down_proj.weight",), f"{_NANOTRON}mlp.down_proj.weight"),
    )


INPUT_NORM = Rule((f"{_CANONICAL}input_layernorm.weight",), f"{_NANOTRON}input_layernorm.weight")
POST_NORM = Rule((f"{_CANONICAL}post_attention_layernorm.weight",), f"{_NANOTRON}post_attention_layernorm.weight")
OUTPUT = Rule((f"{_CANONICAL}self_attn.o_proj.weight",), f"{_NANOTRON}attn.o_proj.weight")
EMBEDDING = Rule(("model.embed_tokens.weight",), "model.token_position_embeddings.pp_block.token_embedding.weight")
FINAL_NORM = Rule(("model.norm.weight",), "model.final_layer_norm.pp_block.weight")
HEAD = Rule(("lm_head.weight",), "model.lm_head.pp_block.weight")


def assemble(spec: ModelSpec, layer: tuple[Rule, ...], absent: dict[str, str]) -> WeightTable:
    """Embedding, the layer's rules for each layer, final norm, and the head unless it is tied."""
    rules = [EMBEDDING, *(rule.for_layer(i) for i in range(spec.num_layers) for rule in layer), FINAL_NORM]
    return WeightTable(
        rules=(*rules, *(() if spec.tied else (HEAD,))),
        shapes=parameter_shapes(spec),
        absent=absent,
    )


def nanotron_table(spec: ModelSpec, *, interleaved: bool) -> WeightTable:
    """nanotron's ``LlamaConfig``, in the order in which its optimizer counts parameters."""
    attention = attention_rule(spec, "weight", interleaved=interleaved)
    return assemble(spec, (INPUT_NORM, attention, OUTPUT, POST_NORM, *mlp_rules(spec)), absent={})
