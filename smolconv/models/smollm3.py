"""SmolLM3, whose every fourth layer does not rotate (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolconv.models.family import Family, NanotronClass, full_attention
from smolconv.models.spec import VOCABULARY, ModelSpec

QWEN2_CONFIG = NanotronClass(
    title="Qwen2",
    flag="is_qwen2_config",
    fields={
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": None, "initializer_range": 0.02,
        "intermediate_size": None, "is_qwen2_config": True, "max_position_embeddings": None,
        "num_attention_heads": None, "num_hidden_layers": None, "num_key_value_heads": None, "pad_token_id": None,
        "pretraining_tp": 1, "rms_norm_eps": None, "rope_scaling": None, "rope_theta": None, "rope_interleaved": False,
        "rope_seq_len_interpolation_factor": None, "tie_word_embeddings": None, "use_cache": True, "vocab_size": None,
        "_attn_implementation": "flash_attention_2", "flex_attention_mask": None, "attention_bias": False,
        "sliding_window_size": None, "z_loss_enabled": False, "z_loss_coefficient": 0.0001, "no_rope_layer": None,
        "_fused_rotary_emb": True, "_fused_rms_norm": True, "_use_qkv_packed": True, "_use_doc_masking": True,
        "log_attn_probs": True, "ring_attn_heads_k_stride": None, "moe_config": None,
    },
    biases=True,
    norms_first=True,
)  # fmt: skip


def _from_hf(known: Mapping[str, Any]) -> Mapping[str, Any]:
    layers = known["num_hidden_layers"]
    if known["no_rope_layers"] is not None:
        # 1 means that the layer rotates, 0 that it does not; the name suggests the opposite.
        return {"use_rope": tuple(bool(on) for on in known["no_rope_layers"][:layers])}
    return {"use_rope": tuple((i + 1) % known["no_rope_layer_interval"] != 0 for i in range(layers))}


def _to_hf(spec: ModelSpec) -> Mapping[str, Any]:
    return {
        "no_rope_layers": [int(on) for on in spec.use_rope],
        # Written for readers that recompute the list; one more than the number of layers means that all rotate.
        "no_rope_layer_interval": spec.nope_interval or spec.num_layers + 1,
        **full_attention(spec),
    }


FAMILY = Family(
    name="smollm3",
    models="SmolLM3",
    hf_class="SmolLM3ForCausalLM",
    hf_defaults={
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 2000000.0, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "no_rope_layers": None, "no_rope_layer_interval": 4, "use_sliding_window": False,
        "sliding_window": None, "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004,
        "initializer_range": 0.02, "use_cache": True,
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    nanotron=QWEN2_CONFIG,
    weight_decay=0.1,  # its five YAMLs, which exclude token_embedding
    decay_source="as in SmolLM3's recipe",
    undecayed={VOCABULARY[0]: "the embedding"},
)  # fmt: skip
