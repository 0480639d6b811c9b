"""Converts nanotron's ``model_config.json`` to and from a spec, and builds the table of its parameters.

Raises ``UnsupportedModel`` for anything that the spec or nanotron cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolconv.errors import UnsupportedModel
from smolconv.models.huggingface import CARRIED, check_rope_scaling, parameter_shapes, rope_scaling
from smolconv.models.operations import JoinRows, Rename, RotaryPairs
from smolconv.models.registry import family_of_nanotron_config, nanotron_class
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import Rule, WeightTable

_CANONICAL = "model.layers.{i}."
_NANOTRON = "model.decoder.{i}.pp_block."
#: What nanotron did before it had a field (its #173 and #214), for the error about a config without the field.
_OLDER = {
    "rope_theta": "A nanotron of before 20 May 2024 does not write it, and always used 10000.\n",
    "rope_interleaved": "A nanotron of before 5 September 2024 does not write it, and always interleaved (true).\n",
}


def spec_from_nanotron(
    config: Mapping[str, Any],
    where: str = "model_config.json",
    *,
    rope_as_configured: bool = False,
    architecture: str | None = None,
) -> ModelSpec:
    """Read nanotron's ``LlamaConfig`` or ``Qwen2Config``, which means SmolLM3 unless ``architecture`` overrides it.

    nanotron's forward pass ignores ``rope_scaling``, so the spec has it only with ``rope_as_configured``.
    Raises ``UnsupportedModel`` for other classes, mixtures of experts, sliding windows, interpolated positions, a
    missing field that the forward pass needs, and an ``architecture`` that contradicts the config.
    """
    family, form = family_of_nanotron_config(config, where, architecture)
    refused = {"moe_config": None, "sliding_window_size": None, "rope_seq_len_interpolation_factor": None}
    for name, neutral in refused.items():
        if config.get(name) != neutral:
            raise UnsupportedModel(
                f"{where}: {name} is {config[name]!r}; Hugging Face's {family.hf_class} has no equivalent."
            )
    layers, interval = _needed(config, "num_hidden_layers", where), None
    if "no_rope_layer" in form.fields:
        interval = config.get("no_rope_layer")
        if interval is not None and interval <= 0:
            raise UnsupportedModel(f"{where}: no_rope_layer is {interval}; expected a positive number or null.")
    heads, hidden = _needed(config, "num_attention_heads", where), _needed(config, "hidden_size", where)
    if hidden % heads:
        raise UnsupportedModel(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    spec = ModelSpec(
        architecture=family.name,
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
        rope_scaling=rope_scaling(config.get("rope_scaling")) if rope_as_configured else None,
        use_rope=tuple(interval is None or (i + 1) % interval != 0 for i in range(layers)),
        tied=bool(_needed(config, "tie_word_embeddings", where)),
        attention_bias=form.biases and bool(config.get("attention_bias", False)),
        mlp_bias=False,
        activation=_needed(config, "hidden_act", where),
    )
    check_rope_scaling(spec, where)
    if problem := family.contradiction(spec):
        raise UnsupportedModel(f"{where} is not {family.name}: {problem}.\nOmit --architecture.")
    return spec


def nanotron_interleaved(config: Mapping[str, Any], where: str = "model_config.json") -> bool:
    """Whether q and k rows are stored as interleaved rotary pairs."""
    return bool(_needed(config, "rope_interleaved", where))


def _needed(config: Mapping[str, Any], name: str, where: str) -> Any:
    if config.get(name) is None:
        raise UnsupportedModel(
            f"{where} lacks {name}, and a guess could silently change the model.\n"
            f"{_OLDER.get(name, '')}"
            "Copy the file, add the value that the model was trained with, and pass it with --config."
        )
    return config[name]


def spec_to_nanotron(spec: ModelSpec, carried: Mapping[str, Any]) -> dict[str, Any]:
    """A ``model_config.json`` with nanotron's own fields and order (branch smollm3, format 1.5), rotary half-split.

    ``carried`` overrides fields that are not mathematics (token ids, initialisation, switches).
    Raises ``UnsupportedModel`` when nanotron's config cannot hold the spec.
    """
    refuse_for_nanotron(spec)
    known: dict[str, Any] = {
        "hidden_act": spec.activation, "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_positions, "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers, "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else dict(spec.rope_scaling),
        "tie_word_embeddings": spec.tied, "vocab_size": spec.vocab_size, "attention_bias": spec.attention_bias,
        "no_rope_layer": spec.nope_interval,
    }  # fmt: skip
    fields = nanotron_class(spec).fields
    config = {name: known.get(name, otherwise) for name, otherwise in fields.items()}
    for name in CARRIED:
        if name in carried and name in config:
            # nanotron's dataclass holds one end-of-text id; the first of HF's list ends a document.
            value = carried[name]
            config[name] = value[0] if isinstance(value, list) and value else value
    # nanotron requires plain integers here.
    for name in ("bos_token_id", "eos_token_id"):
        config[name] = fields[name] if config[name] is None else config[name]
    return config


def refuse_for_nanotron(spec: ModelSpec) -> None:
    """Raise ``UnsupportedModel`` when nanotron cannot hold the model, naming the field."""
    form, problem = nanotron_class(spec), None
    if spec.head_size * spec.num_heads != spec.hidden_size:
        problem = f"head_dim {spec.head_size} x {spec.num_heads} heads is not hidden_size {spec.hidden_size}"
    elif spec.mlp_bias:
        problem = "mlp_bias is set, but nanotron's MLP has none"
    elif spec.attention_bias and not form.biases:
        problem = f"attention_bias is set, but nanotron's {form.title} builds none"
    elif not all(spec.use_rope) and (spec.nope_interval is None or spec.num_layers % spec.nope_interval):
        nope = [i for i, on in enumerate(spec.use_rope) if not on]
        problem = f"layers without RoPE are {nope}, which no integer no_rope_layer can express"
    if problem:
        raise UnsupportedModel(f"nanotron cannot hold this model: {problem}.")


# --- parameters: the rules say everything -----------------------------------------------------------------------------


def without_place(spec: ModelSpec) -> tuple[str, ...]:
    """Canonical names of parameters that nanotron's classes do not have; they must be zero."""
    return tuple(name for name in parameter_shapes(spec) if name.endswith("o_proj.bias"))


def nanotron_table(spec: ModelSpec, *, interleaved: bool) -> WeightTable:
    """The table between canonical names and nanotron's, in the order of nanotron's optimizer.

    NoPE itself does not change the row order, but an interleaved model also interleaves its NoPE layers. There q and k
    are reordered together, which does not change the logits, so only a comparison of tensors could notice a mistake.
    """
    norms = [
        Rule((f"{_CANONICAL}{name}_layernorm.weight",), f"{_NANOTRON}{name}_layernorm.weight")
        for name in ("input", "post_attention")
    ]
    early = 2 if nanotron_class(spec).norms_first else 1
    attention = [attention_rule(spec, kind, interleaved=interleaved) for kind in ("weight", "bias")]
    output = Rule((f"{_CANONICAL}self_attn.o_proj.weight",), f"{_NANOTRON}attn.o_proj.weight")
    layer = (
        *norms[:early], *attention[: 1 + spec.attention_bias], output, *norms[early:], *mlp_rules(spec),
    )  # fmt: skip
    embedding = Rule(("model.embed_tokens.weight",), "model.token_position_embeddings.pp_block.token_embedding.weight")
    final = Rule(("model.norm.weight",), "model.final_layer_norm.pp_block.weight")
    head = Rule(("lm_head.weight",), "model.lm_head.pp_block.weight")
    rules = [embedding, *(rule.for_layer(i) for i in range(spec.num_layers) for rule in layer), final]
    return WeightTable(
        rules=(*rules, *(() if spec.tied else (head,))),
        shapes=parameter_shapes(spec),
        absent=dict.fromkeys(without_place(spec), "nanotron's o_proj has no bias"),
    )


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
