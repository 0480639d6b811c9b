"""What a model family is: one record of all in which families differ. Nothing in it imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smolconv.models.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class NanotronClass:
    """One of nanotron's model classes, as it holds a family. The blocks are the same in all."""

    title: str  #: for messages
    flag: str  #: the field of ``model_config.json`` that names the class
    #: A config of the class is taken for this family; if not, only when ``--architecture`` says so.
    assumed: bool = True
    #: ``model_config.json`` in nanotron's order, with what it says where a spec says nothing.
    fields: Mapping[str, Any]
    biases: bool  #: whether the class builds q, k and v's biases for ``attention_bias``
    norms_first: bool  #: whether its optimizer counts both norms of a layer before its attention
    casts_logits: bool = False  #: by a pipeline block of its own, after the head


def attention_shapes(spec: ModelSpec) -> Shapes:
    """A layer's q, k, v and o in transformers' order, by their names within the layer."""
    hidden, query, kv = spec.hidden_size, spec.query_rows, spec.kv_rows
    parts = {"q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query)}
    return _projections("self_attn", parts, spec.attention_bias)


def mlp_shapes(spec: ModelSpec) -> Shapes:
    """A layer's MLP and what transformers lists after it: both norms."""
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
    """How the config of a class that could slide a window says that it does not."""
    return {"layer_types": ["full_attention"] * spec.num_layers, "use_sliding_window": False, "sliding_window": None}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family. Canonical names are Hugging Face's, unfused."""

    name: str  #: Hugging Face's model_type, ``ModelSpec.architecture``, and the end of Liger's patch for it
    models: str  #: what is published of it, for messages
    hf_class: str  #: in transformers; the training model is a subclass of it
    #: What an HF config leaves out has the value of its class, since transformers saves only differences from it.
    #: Tested against the installed transformers (v4.53+ and v5).
    hf_defaults: Mapping[str, Any]
    #: Spec fields that its config says in its own way. Else all layers rotate, and biases are there when a field of
    #: ``hf_defaults`` says so.
    from_hf: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda known: {}
    to_hf: Callable[[ModelSpec], Mapping[str, Any]] = lambda spec: {}  #: config fields beside the common ones
    #: A layer's parameters, by their names within it, in transformers' order.
    layer: Callable[[ModelSpec], Shapes] = lambda spec: {**attention_shapes(spec), **mlp_shapes(spec)}
    nanotron: NanotronClass | str  #: or why nanotron has no place for it
    #: Why a spec that nanotron's class could mean is none of this family.
    contradiction: Callable[[ModelSpec], str | None] = lambda spec: None
    weight_decay: float  #: of its pretraining, where nothing else says one
    decay_source: str  #: whose it is, for messages
    #: Canonical names of the parameters that its pretraining does not decay, and how messages call them.
    undecayed: Mapping[str, str] = field(default_factory=dict)
