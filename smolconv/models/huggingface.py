"""Converts Hugging Face's config to and from a spec, and lists its parameters, whose names are canonical."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolconv.errors import UnsupportedModel, some_of
from smolconv.models.family import Family
from smolconv.models.registry import family_of, family_of_hf_config
from smolconv.models.spec import VOCABULARY, ModelSpec
from smolconv.models.weights import Rule, WeightTable
from smolconv.tensors.dtypes import FLOAT_DTYPES

#: Fields of a config that do not change the forward pass but are carried.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "use_cache")
_BIASES = ("attention_bias", "mlp_bias")
#: Saved by early transformers and some programs; transformers computes them itself, ignoring the file.
_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)"
_PARTIAL = "{where}: partial_rotary_factor is set; only full rotary heads can be represented."
_TWO_READERS = "transformers v4 reads the first and v5 the second: make them agree."
_ORIGINAL = "original_max_position_embeddings"
#: transformers' types of scaled rotary embedding (``ROPE_INIT_FUNCTIONS``) with their required numbers, including those
#: that only v5 would fill in.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "proportional": (),
}
#: Types with the original context length.
_STRETCHED = ("yarn", "longrope", "llama3")
#: Lists with one number per pair of a head's elements.
_ROPE_LISTS: Mapping[str, tuple[str, ...]] = {"longrope": ("short_factor", "long_factor")}
#: Optional numbers of a type.
_ROPE_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical parameter names and shapes, in the order of ``named_parameters()`` of the transformers model.

    Canonical names are Hugging Face's, unfused. A tied head is an alias and is not listed.
    """
    embedding, head = VOCABULARY
    layer = family_of(spec).layer(spec)
    shapes: dict[str, tuple[int, ...]] = {embedding: (spec.vocab_size, spec.hidden_size)}
    for i in range(spec.num_layers):
        shapes.update((f"model.layers.{i}.{name}", shape) for name, shape in layer.items())
    shapes["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tied:
        shapes[head] = (spec.vocab_size, spec.hidden_size)
    return shapes


def weight_table(spec: ModelSpec) -> WeightTable:
    """The identity table over the model's parameters, with tied names and additional tensors of old files."""
    shapes = parameter_shapes(spec)
    return WeightTable(
        rules=tuple(Rule((name,), name) for name in shapes),
        shapes=shapes,
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {},
        dropped={_BUFFERS: "a buffer that is computed from the config's rotary embedding"},
    )


def spec_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Read an HF ``config.json`` in either spelling (transformers v4 ``rope_theta``, v5 ``rope_parameters``).

    Raises ``UnsupportedModel`` for other architectures, contradicting rope fields, sliding windows, quantisation.
    """
    family = family_of_hf_config(config, where)
    known = {**family.hf_defaults, **config}
    _refuse_hf(known, family, where)
    theta, scaling = _rope_from_hf(config, family, where)
    layers = known["num_hidden_layers"]
    spec = ModelSpec(
        architecture=family.name,
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
        tied=bool(known["tie_word_embeddings"]),
        activation=known["hidden_act"],
        **{
            "use_rope": (True,) * layers,
            # transformers ignores fields that its class does not have.
            **{name: name in family.hf_defaults and bool(known[name]) for name in _BIASES},
            **family.from_hf(known),
        },
    )
    check_rope_scaling(spec, where)
    return spec


def _refuse_hf(known: Mapping[str, Any], family: Family, where: str) -> None:
    if quantised := known.get("quantization_config") or known.get("quantization"):  # the second is MLX's
        fields = quantised if isinstance(quantised, dict) else {}
        how = fields.get("quant_method", f"{fields.get('bits')} bits")
        raise UnsupportedModel(
            f"{where}: the model is quantised ({how!s:.40}).\n"
            "Expected weights of float32, bfloat16 or float16.\n"
            "Use the model that it was quantised from; its model card names it."
        )
    if _slides(known, family):
        raise UnsupportedModel(f"{where}: sliding-window attention is set; only full attention can be represented.")
    if "no_rope_layers" in known and "no_rope_layers" not in family.hf_defaults:
        raise UnsupportedModel(f"{where}: a {family.name} config with no_rope_layers has no meaning in transformers.")
    if known.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedModel(_PARTIAL.format(where=where))


def _slides(known: Mapping[str, Any], family: Family) -> bool:
    """Whether a layer's attention has a window, as transformers decides it: by the list, or from a first layer on."""
    if layer_types := known.get("layer_types"):
        return any(kind != "full_attention" for kind in layer_types)
    first = known["max_window_layers"] if "max_window_layers" in family.hf_defaults else 0
    allowed = known.get("use_sliding_window") and known.get("sliding_window") is not None
    return bool(allowed) and known["num_hidden_layers"] > (first or 0)


def _rope_from_hf(config: Mapping[str, Any], family: Family, where: str) -> tuple[float, Mapping[str, Any] | None]:
    # v5 takes rope_scaling for another name of rope_parameters, and reads rope_theta there as well.
    objects = {name: dict(config.get(name) or {}) for name in ("rope_parameters", "rope_scaling")}
    thetas = {"rope_theta": config.get("rope_theta")}
    for name, fields in objects.items():
        if nested := [key for key, value in fields.items() if isinstance(value, Mapping)]:
            raise UnsupportedModel(
                f"{where}: {name} holds an object for {nested[0]}, as if layers rotated differently.\n"
                "Expected one rotary embedding for all layers: rope_type, rope_theta and their fields.\n"
                f"If all layers are the same, move that object's fields into {name} itself."
            )
        if fields.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise UnsupportedModel(_PARTIAL.format(where=f"{where}: {name}"))
        thetas[f"{name}.rope_theta"] = fields.pop("rope_theta", None)
    known = [(name, float(value)) for name, value in thetas.items() if value is not None]
    if objects["rope_parameters"] and not known:
        default = family.hf_defaults["rope_theta"]
        raise UnsupportedModel(
            f"{where}: rope_parameters has no rope_theta.\n"
            f"Expected the base that the model was trained with; transformers would use {default:g} for any "
            f"{family.name}.\nAdd it there."
        )
    if other := next(((name, value) for name, value in known if value != known[0][1]), None):
        raise UnsupportedModel(
            f"{where}: {known[0][0]} is {known[0][1]:g}, but {other[0]} is {other[1]:g}.\n{_TWO_READERS}"
        )
    scalings = [rope_scaling(objects[name]) for name in ("rope_scaling", "rope_parameters")]
    if "rope_parameters" in config and "rope_scaling" in config and scalings[0] != scalings[1]:
        raise UnsupportedModel(
            f"{where}: rope_scaling is {scalings[0]}, but rope_parameters is {scalings[1]}.\n{_TWO_READERS}"
        )
    theta = known[0][1] if known else family.hf_defaults["rope_theta"]
    return theta, _with_trained_length(scalings[0] or scalings[1], config, where)


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype in a config's field of v5 or v4; None if there is none, or an unknown one."""
    said = config.get("dtype") or config.get("torch_dtype")
    name = said.removeprefix("torch.") if isinstance(said, str) else None
    return name if name in FLOAT_DTYPES else None


def _with_trained_length(
    scaling: dict[str, Any] | None, config: Mapping[str, Any], where: str
) -> Mapping[str, Any] | None:
    """Add the original length from outside the rotary embedding: v5 uses it for all types, v4 for longrope."""
    trained = config.get(_ORIGINAL)
    if scaling is None or trained is None or scaling.get("rope_type") not in _STRETCHED:
        return scaling
    if scaling.get(_ORIGINAL, trained) != trained:
        raise UnsupportedModel(
            f"{where}: {_ORIGINAL} is {trained}, but the rotary embedding's is {scaling[_ORIGINAL]}.\n"
            "transformers v4 and v5 read different ones: make them agree."
        )
    return {**scaling, _ORIGINAL: trained}


def rope_scaling(raw: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scaling in the spec's form; None for plain rotary embedding in any spelling."""
    if not raw:
        return None
    scaling = {key: value for key, value in raw.items() if key not in ("rope_theta", "type")}
    if "rope_type" not in raw and "type" in raw:
        scaling["rope_type"] = raw["type"]
    return None if not scaling or scaling.get("rope_type") == "default" else scaling


def check_rope_scaling(spec: ModelSpec, where: str) -> None:
    """Raise ``UnsupportedModel`` for a scaled rotary embedding that is unknown to transformers, or incomplete."""
    scaling = spec.rope_scaling
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        found = f"rope_type is {kind!r:.60}" if "rope_type" in scaling else f"{some_of(list(scaling))} has no rope_type"
        raise UnsupportedModel(
            f"{where}: {found}.\n"
            f"Expected one that transformers knows: default, {', '.join(ROPE_TYPES)}.\n"
            "Set the type that the model was trained with."
        )
    needed = list(ROPE_TYPES[kind])
    if kind == "longrope" and scaling.get("factor") is None:
        needed.append(_ORIGINAL)  # the factor is max_position_embeddings divided by it
    needed += [name for name in ("factor", _ORIGINAL) if scaling.get(name) is not None]
    for name in needed:
        if not _is_positive(scaling.get(name)):
            raise _unscaled(where, kind, name, scaling, "a positive number")
    for name in _ROPE_NUMBERS:
        value = scaling.get(name)
        if value is not None and value != 0 and not _is_positive(value):
            raise _unscaled(where, kind, name, scaling, "a number that is 0 or more")
    for name in _ROPE_LISTS.get(kind, ()):
        values = scaling.get(name)
        size = spec.head_size // 2
        if not isinstance(values, list) or len(values) != size or not all(map(_is_positive, values)):
            raise _unscaled(where, kind, name, scaling, f"a list of {size} positive numbers")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300


def _unscaled(where: str, kind: str, name: str, scaling: Mapping[str, Any], expected: str) -> UnsupportedModel:
    found = f"{name} is {scaling[name]!r:.60}" if name in scaling else f"{name} is missing"
    return UnsupportedModel(
        f"{where}: the rotary embedding is scaled by {kind}, but {found}.\n"
        f"Expected {expected}.\nTake it from the config that the model was trained with."
    )


def spec_to_hf(spec: ModelSpec, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """An HF config in both rope spellings, for transformers v4.53+ and v5. ``dtype``: of the weights."""
    family = family_of(spec)
    base = family.hf_defaults
    rope = {"rope_theta": spec.rope_theta, **(spec.rope_scaling or {"rope_type": "default"})}
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
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
        **{name: getattr(spec, name) for name in _BIASES if name in base},
        "attention_dropout": carried.get("attention_dropout", 0.0),
        **family.to_hf(spec),
    }
    # A null that is carried would stop SmolLM3's class, which takes it for the size.
    if "head_dim" in base or "head_dim" in carried or spec.head_size * spec.num_heads != spec.hidden_size:
        config["head_dim"] = spec.head_size
    # null is written: otherwise transformers uses the class's pad id, which may be outside this vocabulary.
    config.update({name: carried.get(name, base.get(name)) for name in CARRIED if name in carried or name in base})
    if isinstance(config["pad_token_id"], int) and config["pad_token_id"] >= spec.vocab_size:
        config["pad_token_id"] = None
    config["dtype"] = config["torch_dtype"] = dtype
    return config
