"""Qwen3, the dense models: queries and keys are normalised head by head before they rotate."""

from __future__ import annotations

from smolconv.models.family import Family, Shapes, attention_shapes, full_attention, mlp_shapes
from smolconv.models.spec import VOCABULARY, ModelSpec


def _layer(spec: ModelSpec) -> Shapes:
    norms = {f"self_attn.{part}_norm.weight": (spec.head_size,) for part in "qk"}
    return {**attention_shapes(spec), **norms, **mlp_shapes(spec)}


FAMILY = Family(
    name="qwen3",
    models="Qwen3",
    hf_class="Qwen3ForCausalLM",
    hf_defaults={
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.02, "use_cache": True,
    },
    to_hf=full_attention,
    layer=_layer,
    nanotron="Qwen3 normalises queries and keys (q_norm, k_norm), but no class of nanotron has these",
    weight_decay=0.1,
    decay_source="as in SmolLM3's recipe, since none is published for Qwen3",
    undecayed={VOCABULARY[0]: "the embedding"},
)  # fmt: skip
