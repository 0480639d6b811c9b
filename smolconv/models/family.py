"""``Family``: one record of all differences between model families. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smolconv.models.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class NanotronClass:
    """One of nanotron's model classes, for one family. Their blocks are the same."""

    title: str  #: for messages
    flag: str  #: the field of ``model_config.json`` that names the class
    #: Whether a config of the class means this family by default; otherwise only with ``--architecture``.
    assumed: bool = True
    #: ``model_config.json`` in nanotron's order, with values for fields that a spec does not have.
    fields: Mapping[str, Any]
    biases: bool  #: whether the class builds q, k and v's biases for ``attention_bias``
    norms_first: bool  #: whether its optimizer numbers both norms of a layer before its attention
    casts_logits: bool = False  #: in a separate pipeline block after the head


def attention_shapes(spec: ModelSpec) -> Shapes:
    """A layer's q, k, v and o in transformers' order, by their names within the layer."""
    hidden, query, kv = spec.hidden_size, spec.query_rows, spec.kv_rows
    parts = {"q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query)}
    return _projections("self_attn", parts, spec.attention_bias)


def mlp_shapes(spec: ModelSpec) -> Shapes:
    """A layer's MLP, and both norms, which transformers lists after it."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    parts = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**_projections("mlp", parts, spec.mlp_bias), **norms}


def _projections(block: str, parts: Mapping[str, tuple[int, int]], bias: bool) -> Shapes:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {
        f"{block}.{part}_proj.{kind}": shape if kind == "weight" else shape[:1]
        for part, shape in parts.items()
        for kind in kinds
    }


def full_attention(spec: ModelSpec) -> dict[str, Any]:
    """Config fields of a class with optional sliding windows that switch them off."""
    return {"layer_types": ["full_attention"] * spec.num_layers, "use_sliding_window": False, "sliding_window": None}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family. Canonical names are Hugging Face's, unfused."""

    name: str  #: Hugging Face's model_type, ``ModelSpec.architecture``, and the suffix of Liger's patch
    models: str  #: its published models, for messages
    hf_class: str  #: in transformers; the training model subclasses it
    #: Defaults for fields missing in an HF config: transformers saves only differences from its class's defaults.
    #: Tested against the installed transformers (v4.53+ and v5).
    hf_defaults: Mapping[str, Any]
    #: Spec fields that its config expresses in its own way. Otherwise all layers rotate, and a field of ``hf_defaults``
    #: decides about biases.
    from_hf: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda known: {}
    to_hf: Callable[[ModelSpec], Mapping[str, Any]] = lambda spec: {}  #: config fields besides the common ones
    #: A layer's parameters, by their names within it, in transformers' order.
    layer: Callable[[ModelSpec], Shapes] = lambda spec: {**attention_shapes(spec), **mlp_shapes(spec)}
    nanotron: NanotronClass | str  #: its class, or why nanotron cannot hold it
    #: Why a spec that nanotron's class allows is not of this family.
    contradiction: Callable[[ModelSpec], str | None] = lambda spec: None
    weight_decay: float  #: of its pretraining, used by default
    decay_source: str  #: its source, for messages
    #: Canonical names of the parameters that its pretraining does not decay, and their description in messages.
    undecayed: Mapping[str, str] = field(default_factory=dict)
