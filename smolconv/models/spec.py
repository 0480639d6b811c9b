"""``ModelSpec``: everything that a model's forward pass needs.

Config fields that do not change the forward pass (token ids, initialisation, training switches) are not part of the
spec; layouts carry them separately. A field that the spec cannot represent is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from smolconv.errors import UnsupportedModel

#: Canonical names of the parameters with a row for each token.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The dimensions and choices that fix a model's forward pass, given its weights."""

    architecture: str  #: the family: a name in ``registry.FAMILIES``, and Hugging Face's model_type
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
                raise UnsupportedModel(f"the config gives {name} = {value!r}; expected a positive whole number.")
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
                f"the config lists {len(self.use_rope)} layers with or without rotation, but has {self.num_layers}."
            )

    @property
    def query_rows(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_rows(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def nope_interval(self) -> int | None:
        """N such that exactly the layers i with (i + 1) % N == 0 do not rotate; None when all rotate or no N fits."""
        if all(self.use_rope):
            return None
        interval = self.use_rope.index(False) + 1
        return interval if all(on == ((i + 1) % interval != 0) for i, on in enumerate(self.use_rope)) else None


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """The fields as plain JSON types."""
    return {**asdict(spec), "use_rope": [int(on) for on in spec.use_rope]}


#: Optional fields of a scaled rotary embedding whose absence means null or this: transformers' modeling_rope_utils.py.
_ROPE_DEFAULTS: Mapping[str, Any] = {
    "factor": None, "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None,
}  # fmt: skip


def _effective(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scaling without fields that say what their absence means."""
    if scaling is None:
        return None
    return {name: value for name, value in scaling.items()
            if name not in _ROPE_DEFAULTS or value not in (None, _ROPE_DEFAULTS[name])}  # fmt: skip


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
        if item.name == "rope_scaling" and _effective(left) == _effective(right):
            continue
        if left != right:
            found.append(f"{item.name}: {left!r} in A, {right!r} in B")
    return found
