"""Qwen2 and Qwen2.5: biases on q, k and v always, on o never."""

from __future__ import annotations

from dataclasses import replace

from smolconv.models.family import Family, Shapes, attention_shapes, full_attention, mlp_shapes
from smolconv.models.smollm3 import QWEN2_CONFIG
from smolconv.models.spec import VOCABULARY, ModelSpec


def _layer(spec: ModelSpec) -> Shapes:
    attention = {name: shape for name, shape in attention_shapes(spec).items() if name != "self_attn.o_proj.bias"}
    return {**attention, **mlp_shapes(spec)}


def _contradiction(spec: ModelSpec) -> str | None:
    if not all(spec.use_rope):
        return f"layer {spec.use_rope.index(False)} does not rotate (no_rope_layer), but in Qwen2 all do"
    return None if spec.attention_bias else "attention_bias is not set, but Qwen2 always has it"


FAMILY = Family(
    name="qwen2",
    models="Qwen2, Qwen2.5",
    hf_class="Qwen2ForCausalLM",
    hf_defaults={
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "use_sliding_window": False,
        "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "initializer_range": 0.02, "use_cache": True,
    },
    from_hf=lambda known: {"attention_bias": True},
    to_hf=full_attention,
    layer=_layer,
    nanotron=replace(QWEN2_CONFIG, assumed=False),
    contradiction=_contradiction,
    weight_decay=0.1,
    decay_source="as in SmolLM3's recipe, since none is published for Qwen2",
    undecayed={VOCABULARY[0]: "the embedding"},
)  # fmt: skip
