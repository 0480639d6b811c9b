"""``ModelSpec``: everything the mathematics needs, read from a nanotron or a Hugging Face config and written to either.

What a config says that does not change the forward pass (token ids, initialisation, training switches) is not part of
the spec; layouts carry it beside. A field that we cannot represent is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from smolconv.errors import UnsupportedModel

#: What an HF config leaves out has the value of its class, since transformers saves only differences from it.
#: Tested against the installed transformers (v4.53+ and v5).
HF_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "head_dim": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
    },
    "smollm3": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 2000000.0, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "no_rope_layers": None, "no_rope_layer_interval": 4, "use_sliding_window": False,
        "sliding_window": None, "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004,
        "initializer_range": 0.02, "use_cache": True,
    },
}  # fmt: skip
HF_CLASSES: Mapping[str, str] = {"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM"}

#: Canonical names of the parameters with a row for each token.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")

#: Fields of a config that do not change the forward pass but travel with it.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "use_cache")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The dimensions and choices that fix a model's forward pass, given its weights."""

    architecture: str  #: "llama" (SmolLM2 and others) or "smollm3"
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int  #: rows of the embedding, padding included
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None  #: with ``rope_type``; None for plain rotary embedding
    use_rope: tuple[bool, ...]  #: per layer; False is NoPE
    tied: bool  #: lm_head is the embedding
    attention_bias: bool
    mlp_bias: bool
    activation: str

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
                     "vocab_size", "max_positions"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise UnsupportedModel(f"the config gives {name} = {value!r}; a positive whole number was expected.")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"the config gives {self.num_heads} query heads and {self.num_kv_heads} key/value heads; "
                "the first must be a multiple of the second."
            )
        if self.head_size % 2:
            raise UnsupportedModel(
                f"the config gives heads of size {self.head_size}; rotary embedding needs an even one."
            )
        if len(self.use_rope) != self.num_layers:
            raise UnsupportedModel(
                f"the config says for {len(self.use_rope)} layers whether they rotate, but has {self.num_layers}."
            )

    @property
    def query_rows(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_rows(self) -> int:
        return self.num_kv_heads * self.head_size


def spec_differences(a: ModelSpec, b: ModelSpec) -> list[str]:
    """Fields in which two specs differ, as readable lines; [] when the same weights compute the same function."""
    found = []
    for item in fields(ModelSpec):
        left, right = getattr(a, item.name), getattr(b, item.name)
        if item.name == "use_rope":
            left, right = ["RoPE" if on else "NoPE" for on in left], ["RoPE" if on else "NoPE" for on in right]
            differing = [i for i, (x, y) in enumerate(zip(left, right)) if x != y]
            if differing and len(left) == len(right):
                found.append(f"use_rope: layer {differing[0]} is {left[differing[0]]} in A, {right[differing[0]]} in B"
                             f" ({len(differing)} layers differ)")  # fmt: skip
                continue
        if left != right:
            found.append(f"{item.name}: {left!r} in A, {right!r} in B")
    return found


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical parameter names and shapes, in the order of ``named_parameters()`` of the transformers model.

    Canonical names are Hugging Face's, unfused. A tied head is an alias and is not listed.
    """
    hidden, inner, query, kv = spec.hidden_size, spec.intermediate_size, spec.query_rows, spec.kv_rows
    attention = {"q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for i in range(spec.num_layers):
        for block, parts, bias in (("self_attn", attention, spec.attention_bias), ("mlp", mlp, spec.mlp_bias)):
            for part, shape in parts.items():
                shapes[f"model.layers.{i}.{block}.{part}_proj.weight"] = shape
                if bias:
                    shapes[f"model.layers.{i}.{block}.{part}_proj.bias"] = shape[:1]
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def spec_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Read an HF ``config.json`` in either spelling (transformers v4 ``rope_theta``, v5 ``rope_parameters``).

    Raises ``UnsupportedModel`` for other architectures, contradicting rope fields, sliding windows, quantisation.
    """
    architecture = str(config.get("model_type"))
    if architecture not in HF_DEFAULTS:
        raise UnsupportedModel(
            f"{where}: model_type is {architecture!r}; smolconv reads llama (SmolLM2, Llama-3.2) and smollm3.\n"
            "Check that this folder holds a SmolLM2 or SmolLM3 checkpoint."
        )
    known = {**HF_DEFAULTS[architecture], **config}
    _refuse_hf(known, architecture, where)
    theta, scaling = _rope_from_hf(config, architecture, where)
    layers = known["num_hidden_layers"]
    if architecture == "llama":
        use_rope = (True,) * layers
    elif known["no_rope_layers"] is not None:
        # 1 means that the layer rotates, 0 that it does not; the name suggests the opposite.
        use_rope = tuple(bool(on) for on in known["no_rope_layers"][:layers])
    else:
        use_rope = tuple((i + 1) % known["no_rope_layer_interval"] != 0 for i in range(layers))
    return ModelSpec(
        architecture=architecture,
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        num_layers=layers,
        num_heads=known["num_attention_heads"],
        num_kv_heads=known["num_key_value_heads"] or known["num_attention_heads"],
        head_size=known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"],
        vocab_size=known["vocab_size"],
        max_positions=known["max_position_embeddings"],
        rms_norm_eps=float(known["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        use_rope=use_rope,
        tied=bool(known["tie_word_embeddings"]),
        attention_bias=bool(known["attention_bias"]),
        mlp_bias=bool(known["mlp_bias"]),
        activation=known["hidden_act"],
    )


def _refuse_hf(known: Mapping[str, Any], architecture: str, where: str) -> None:
    if known.get("quantization_config"):
        raise UnsupportedModel(f"{where}: the model is quantised; smolconv needs its unquantised weights.")
    layer_types = known.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types) or (
        known.get("use_sliding_window") and known.get("sliding_window") is not None
    ):
        raise UnsupportedModel(f"{where}: sliding-window attention is set; only full attention can be represented.")
    if architecture == "llama" and "no_rope_layers" in known:
        raise UnsupportedModel(f"{where}: a llama config with no_rope_layers has no meaning in transformers.")
    if known.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedModel(f"{where}: partial_rotary_factor is set; only full rotary heads can be represented.")


def _rope_from_hf(config: Mapping[str, Any], architecture: str, where: str) -> tuple[float, Mapping[str, Any] | None]:
    parameters = dict(config.get("rope_parameters") or {})
    thetas = [float(v) for v in (config.get("rope_theta"), parameters.pop("rope_theta", None)) if v is not None]
    if len(set(thetas)) > 1:
        raise UnsupportedModel(
            f"{where}: rope_theta is {thetas[0]:g}, but rope_parameters.rope_theta is {thetas[1]:g}.\n"
            "transformers v4 reads the first and v5 the second: make them agree."
        )
    scalings = [_scaling(config.get("rope_scaling")), _scaling(parameters)]
    if "rope_parameters" in config and "rope_scaling" in config and scalings[0] != scalings[1]:
        raise UnsupportedModel(
            f"{where}: rope_scaling is {scalings[0]}, but rope_parameters say {scalings[1]}.\n"
            "transformers v4 reads the first and v5 the second: make them agree."
        )
    return (thetas or [HF_DEFAULTS[architecture]["rope_theta"]])[0], scalings[0] or scalings[1]


def _scaling(raw: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not raw:
        return None
    scaling = {("rope_type" if key == "type" else key): value for key, value in raw.items() if key != "rope_theta"}
    return None if scaling.get("rope_type", "default") == "default" else scaling


def spec_to_hf(spec: ModelSpec, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """An HF config in both rope spellings, for transformers v4.53+ and v5. ``dtype`` is the weights'."""
    base = HF_DEFAULTS[spec.architecture]
    rope = {"rope_theta": spec.rope_theta, **(spec.rope_scaling or {"rope_type": "default"})}
    config: dict[str, Any] = {
        "architectures": [HF_CLASSES[spec.architecture]],
        "model_type": spec.architecture,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "hidden_act": spec.activation,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else dict(spec.rope_scaling),
        "rope_parameters": rope,
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "attention_dropout": carried.get("attention_dropout", 0.0),
    }
    if spec.architecture == "smollm3":
        config["no_rope_layers"] = [int(on) for on in spec.use_rope]
        # Given beside the list for readers that recompute it; one more than the layers means that all rotate.
        config["no_rope_layer_interval"] = _nope_interval(spec.use_rope) or spec.num_layers + 1
        config["layer_types"] = ["full_attention"] * spec.num_layers
        config["use_sliding_window"] = False
        config["sliding_window"] = None
    if spec.architecture == "llama" or spec.head_size * spec.num_heads != spec.hidden_size:
        config["head_dim"] = spec.head_size
    # Null is written out: transformers would fill in the class's own pad id, which may lie beyond this vocabulary.
    config.update({name: carried.get(name, base.get(name)) for name in CARRIED if name in carried or name in base})
    if isinstance(config["pad_token_id"], int) and config["pad_token_id"] >= spec.vocab_size:
        config["pad_token_id"] = None
    config["dtype"] = config["torch_dtype"] = dtype
    return config


# --- nanotron -------------------------------------------------------------------------------------------------------


def spec_from_nanotron(
    config: Mapping[str, Any], where: str = "model_config.json", *, rope_as_configured: bool = False
) -> ModelSpec:
    """Read nanotron's ``model_config.json``: ``LlamaConfig`` or ``Qwen2Config`` (which becomes SmolLM3).

    nanotron's forward ignores its own ``rope_scaling``, so the spec holds it only when ``rope_as_configured``.

    Raises ``UnsupportedModel`` for other classes, mixtures of experts, sliding windows, interpolated positions, and
    when a field that the mathematics needs is not there.
    """
    architecture = nanotron_architecture(config, where)
    refused = {"moe_config": None, "sliding_window_size": None, "rope_seq_len_interpolation_factor": None}
    for name, neutral in refused.items():
        if config.get(name) != neutral:
            raise UnsupportedModel(
                f"{where}: {name} is {config[name]!r}; Hugging Face's {HF_CLASSES[architecture]} has no equal."
            )
    layers, interval = _needed(config, "num_hidden_layers", where), config.get("no_rope_layer")
    if architecture == "smollm3" and interval is not None and interval <= 0:
        raise UnsupportedModel(f"{where}: no_rope_layer is {interval}; a positive number or null was expected.")
    heads, hidden = _needed(config, "num_attention_heads", where), _needed(config, "hidden_size", where)
    if hidden % heads:
        raise UnsupportedModel(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    return ModelSpec(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=_needed(config, "intermediate_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=hidden // heads,
        vocab_size=_needed(config, "vocab_size", where),
        max_positions=_needed(config, "max_position_embeddings", where),
        rms_norm_eps=float(_needed(config, "rms_norm_eps", where)),
        rope_theta=float(_needed(config, "rope_theta", where)),
        rope_scaling=_scaling(config.get("rope_scaling")) if rope_as_configured else None,
        use_rope=tuple(architecture == "llama" or interval is None or (i + 1) % interval != 0 for i in range(layers)),
        tied=bool(_needed(config, "tie_word_embeddings", where)),
        # nanotron's Llama has the field but never builds the bias.
        attention_bias=architecture == "smollm3" and bool(config.get("attention_bias", False)),
        mlp_bias=False,
        activation=_needed(config, "hidden_act", where),
    )


def is_nanotron_config(config: Mapping[str, Any]) -> bool:
    """Whether a model config is nanotron's rather than Hugging Face's, which names a model_type."""
    return "model_type" not in config and ("is_llama_config" in config or "is_qwen2_config" in config)


def nanotron_architecture(config: Mapping[str, Any], where: str = "model_config.json") -> str:
    """ "llama" for ``LlamaConfig``, "smollm3" for ``Qwen2Config``; raises ``UnsupportedModel`` for anything else."""
    if config.get("is_llama_config"):
        return "llama"
    if config.get("is_qwen2_config"):
        return "smollm3"
    kinds = [key for key in config if key.startswith("is_") and key.endswith("_config")]
    raise UnsupportedModel(
        f"{where}: neither is_llama_config nor is_qwen2_config is set (found {kinds or 'no such field'}).\n"
        "smolconv reads nanotron's Llama (SmolLM2) and Qwen2 (SmolLM3) models."
    )


def nanotron_interleaved(config: Mapping[str, Any], where: str = "model_config.json") -> bool:
    """Whether q and k rows are stored as interleaved rotary pairs."""
    return bool(_needed(config, "rope_interleaved", where))


def _needed(config: Mapping[str, Any], name: str, where: str) -> Any:
    if config.get(name) is None:
        raise UnsupportedModel(
            f"{where} does not say {name}, and a guess could silently change the model.\n"
            f"Copy the file, add the value that the model was trained with, and pass it with --config."
        )
    return config[name]


def spec_to_nanotron(spec: ModelSpec, carried: Mapping[str, Any]) -> dict[str, Any]:
    """A ``model_config.json`` with nanotron's own fields and order (branch smollm3, format 1.5), rotary half-split.

    ``carried`` overrides fields that are not mathematics (token ids, initialisation, switches).
    Raises ``UnsupportedModel`` when nanotron's config cannot hold the spec.
    """
    refuse_for_nanotron(spec)
    common: dict[str, Any] = {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": spec.activation, "hidden_size": spec.hidden_size,
        "initializer_range": 0.02, "intermediate_size": spec.intermediate_size,
    }  # fmt: skip
    sizes: dict[str, Any] = {
        "max_position_embeddings": spec.max_positions, "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
    }  # fmt: skip
    rope: dict[str, Any] = {
        "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": None if spec.rope_scaling is None else dict(spec.rope_scaling), "rope_theta": spec.rope_theta,
        "rope_interleaved": False,
    }  # fmt: skip
    head: dict[str, Any] = {
        "tie_word_embeddings": spec.tied, "use_cache": True, "vocab_size": spec.vocab_size,
        "_attn_implementation": "flash_attention_2",
    }  # fmt: skip
    z_loss = {"z_loss_enabled": False, "z_loss_coefficient": 0.0001}
    if spec.architecture == "llama":
        config = {
            **common, "is_llama_config": True, **sizes, "attention_bias": False,
            "num_key_value_heads": spec.num_kv_heads, **rope, **head, **z_loss,
        }  # fmt: skip
    else:
        config = {
            **common, "is_qwen2_config": True, **sizes, "num_key_value_heads": spec.num_kv_heads, **rope,
            "rope_seq_len_interpolation_factor": None, **head, "flex_attention_mask": None,
            "attention_bias": spec.attention_bias, "sliding_window_size": None, **z_loss,
            "no_rope_layer": _nope_interval(spec.use_rope), "_fused_rotary_emb": True, "_fused_rms_norm": True,
            "_use_qkv_packed": True, "_use_doc_masking": True, "log_attn_probs": True,
            "ring_attn_heads_k_stride": None, "moe_config": None,
        }  # fmt: skip
    for name in CARRIED:
        if name in carried and name in config:
            # nanotron's dataclass holds one end-of-text id; HF's list begins with the one that ends a document.
            value = carried[name]
            config[name] = value[0] if isinstance(value, list) and value else value
    # nanotron types these as plain integers.
    for name in ("bos_token_id", "eos_token_id"):
        config[name] = {"bos_token_id": 1, "eos_token_id": 2}[name] if config[name] is None else config[name]
    return config


def refuse_for_nanotron(spec: ModelSpec) -> None:
    """Raise ``UnsupportedModel`` when nanotron cannot hold the model, naming the field."""
    problem = None
    if spec.head_size * spec.num_heads != spec.hidden_size:
        problem = f"head_dim {spec.head_size} x {spec.num_heads} heads is not hidden_size {spec.hidden_size}"
    elif spec.mlp_bias:
        problem = "mlp_bias is set, but nanotron's MLP has none"
    elif spec.architecture == "llama" and spec.attention_bias:
        problem = "attention_bias is set, but nanotron's Llama builds none"
    elif spec.architecture == "smollm3" and not all(spec.use_rope):
        interval = _nope_interval(spec.use_rope)
        if interval is None or spec.num_layers % interval:
            nope = [i for i, on in enumerate(spec.use_rope) if not on]
            problem = f"layers without RoPE are {nope}, which no integer no_rope_layer can express"
    if problem:
        raise UnsupportedModel(f"nanotron cannot hold this model: {problem}.")


def _nope_interval(use_rope: tuple[bool, ...]) -> int | None:
    """N such that exactly the layers i with (i + 1) % N == 0 do not rotate; None when all rotate or no N fits."""
    if all(use_rope):
        return None
    interval = use_rope.index(False) + 1
    return interval if all(on == ((i + 1) % interval != 0) for i, on in enumerate(use_rope)) else None
