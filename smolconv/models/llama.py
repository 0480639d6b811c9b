"""SmolLM1, SmolLM2, and any other Llama."""

from __future__ import annotations

from smolconv.models.family import Family, NanotronClass

FAMILY = Family(
    name="llama",
    models="SmolLM2, Llama-3.2",
    hf_class="LlamaForCausalLM",
    hf_defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "head_dim": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
    },
    nanotron=NanotronClass(
        title="Llama",
        flag="is_llama_config",
        fields={
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": None, "initializer_range": 0.02,
            "intermediate_size": None, "is_llama_config": True, "max_position_embeddings": None,
            "num_attention_heads": None, "num_hidden_layers": None, "attention_bias": False,
            "num_key_value_heads": None, "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": None,
            "rope_scaling": None, "rope_theta": None, "rope_interleaved": False, "tie_word_embeddings": None,
            "use_cache": True, "vocab_size": None, "_attn_implementation": "flash_attention_2",
            "z_loss_enabled": False, "z_loss_coefficient": 0.0001,
        },
        biases=False,  # though it has the field
        norms_first=False,
        casts_logits=True,
    ),
    weight_decay=0.01,  # of everything: all sixteen YAMLs of the three
    decay_source="as in the recipes of SmolLM1, SmolLM2 and FineMath",
)  # fmt: skip
