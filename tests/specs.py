"""Random model specs for tests: those that transformers can hold, and those that nanotron can hold too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from smolconv.models.spec import ModelSpec

_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_SCALINGS = st.sampled_from([None, _LLAMA3, {"rope_type": "linear", "factor": 2.0}])


def tiny(architecture: str = "llama", **fields: Any) -> ModelSpec:
    """A small spec with grouped-query attention; ``fields`` replace its own."""
    layers = fields.get("num_layers", 4)
    base = ModelSpec(
        architecture=architecture, hidden_size=24, intermediate_size=20, num_layers=layers, num_heads=6, num_kv_heads=2,
        head_size=4, vocab_size=32, max_positions=64, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        use_rope=tuple(architecture == "llama" or (i + 1) % 4 != 0 for i in range(layers)), tied=True,
        attention_bias=False, mlp_bias=False, activation="silu",
    )  # fmt: skip
    return replace(base, **fields)


@st.composite
def nanotron_specs(draw, architecture: str | None = None, max_layers: int = 8, tp: int = 1) -> ModelSpec:
    """Specs that nanotron can hold, and that divide among ``tp`` ranks."""
    architecture = architecture or draw(st.sampled_from(["llama", "smollm3"]))
    kv = tp * draw(st.integers(1, 2))
    heads = kv * draw(st.integers(1, 3))
    head_size = draw(st.sampled_from([2, 4, 6, 8]))
    layers = draw(st.integers(1, max_layers))
    interval = draw(st.sampled_from([None, *(n for n in range(1, layers + 1) if layers % n == 0)]))
    return ModelSpec(
        architecture=architecture,
        hidden_size=heads * head_size,
        intermediate_size=tp * draw(st.integers(1, 9)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_size=head_size,
        vocab_size=draw(st.integers(2, 40)),
        max_positions=draw(st.integers(128, 4096)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([1e4, 5e4, 2e6])),
        rope_scaling=draw(_SCALINGS),
        use_rope=tuple(architecture == "llama" or interval is None or (i + 1) % interval != 0 for i in range(layers)),
        tied=draw(st.booleans()),
        attention_bias=architecture == "smollm3" and draw(st.booleans()),
        mlp_bias=False,
        activation="silu",
    )


@st.composite
def hf_specs(draw) -> ModelSpec:
    """Specs that transformers can hold: in addition any NoPE pattern, any even head size, any bias."""
    spec = draw(nanotron_specs())
    spec = replace(spec, attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    if spec.architecture == "smollm3":
        return replace(spec, use_rope=tuple(draw(st.booleans()) for _ in range(spec.num_layers)))
    return replace(spec, head_size=draw(st.sampled_from([2, 4, 16])))
