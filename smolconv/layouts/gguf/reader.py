"""GGUF files of the Llama architecture, read-only: blocks of quantised weights, dequantised while they are read.

Config and tokenizer lie in the file as metadata. All is taken from there and nothing is guessed: an architecture, a
pre-tokenizer or a key that we do not know is refused, since a wrong guess would only show as a slightly worse model.
Keys and names follow llama.cpp's converter (``LlamaModel``) and ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smolconv.checkpoint import Checkpoint, Slot, SourceRecord
from smolconv.errors import NameMismatch, NotInstalled, UnsupportedModel, pip_install
from smolconv.layouts.dtypes import check_dtypes
from smolconv.layouts.gguf.header import Entry, read_header
from smolconv.layouts.gguf.quantisation import stored_tensor
from smolconv.layouts.gguf.tokenizer import listed, token_id, tokenizer_json
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.operations import Operation, Rename, RotaryPairs
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import Rule, WeightTable
from smolconv.tensors.lazy import LazyTensor
from smolconv.version import __version__

if TYPE_CHECKING:
    from types import ModuleType

_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

#: Keys below ``llama.`` that are read, and those that are allowed if their value changes nothing.
_READ = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "vocab_size",
})  # fmt: skip
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "attention.causal": True}
#: Tokenizer switches that no SmolLM tokenizer sets; each would change the token ids of a text.
_OFF = ("add_bos_token", "add_eos_token", "add_space_prefix")


def gguf_table(spec: ModelSpec) -> WeightTable:
    """ggml's names. Query and key rows are interleaved rotary pairs there, as in Meta's own Llama checkpoints."""
    shapes = parameter_shapes(spec)
    return WeightTable(rules=tuple(_rule(name, spec) for name in shapes), shapes=shapes)


def _rule(name: str, spec: ModelSpec) -> Rule:
    module, kind = name.rsplit(".", 1)
    if module in _MODEL:
        return Rule((name,), f"{_MODEL[module]}.{kind}")
    layer, module = module.removeprefix("model.layers.").split(".", 1)
    rotates = module in ("self_attn.q_proj", "self_attn.k_proj")
    op: Operation = RotaryPairs(spec.head_size) if rotates else Rename()
    return Rule((name,), f"blk.{layer}.{_LAYER[module]}.{kind}", op)


def read_gguf(path: Path) -> Checkpoint:
    """Read the header; tensors stay in the file, as float32. The tokenizer and a model card are made from metadata.

    Raises ``UnsupportedModel`` unless it is a plain Llama with SmolLM's tokenizer, ``CorruptFile`` for a file that is
    truncated or not GGUF, ``MissingFile``, and ``NotInstalled`` without gguf and tokenizers.
    """
    gguf = _installed("gguf")
    _installed("tokenizers")
    metadata, found = read_header(path, gguf)
    _refuse(metadata, path)
    spec = _spec(metadata, found, path)
    ids = {f"{name}_token_id": token_id(metadata, name, path) for name in ("bos", "eos", "pad", "unk")}
    stored: dict[str, LazyTensor] = {name: stored_tensor(name, entry, path, gguf) for name, entry in found.items()}
    checkpoint = Checkpoint(
        layout="gguf",
        root=path,
        spec=spec,
        tensors={Slot.PARAMETER: gguf_table(spec).to_canonical(stored, str(path))},
        documents=_documents(metadata, found, spec, ids, path),
        # null means that the file names no such token; transformers would fill in its class's id.
        source=SourceRecord(hf_config={name: ids[name] for name in ids if name != "unk_token_id"}),
        files=(path,),
        warnings=tuple(
            f"the chat template {key.removeprefix('tokenizer.chat_template.')!r} was left out; the default one is kept."
            for key in metadata
            if key.startswith("tokenizer.chat_template.")
        ),
    )
    return check_dtypes(checkpoint)


def _installed(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotInstalled(f"reading GGUF needs {name}. Install it: {pip_install([name])}") from None


def _refuse(metadata: Mapping[str, Any], path: Path) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"{path}: general.architecture is {architecture!r}; only llama (SmolLM2) can be imported.\n"
            "Convert the original Hugging Face folder instead."
        )
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedModel(f"{path} is not a model: general.type is {metadata['general.type']!r}.")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{path} is one of {metadata['split.count']} parts.\n"
            "Join them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if name != key and name not in _READ and (name not in _NEUTRAL or value != _NEUTRAL[name]):
            raise UnsupportedModel(
                f"{path}: {key} is {value!r}, which smolconv does not know how to carry; leaving it out could change "
                "the model."
            )
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise UnsupportedModel(
            f"{path}: the tokenizer is {model!r} with pre-tokenizer {pre!r}; only 'gpt2' with 'smollm' can be rebuilt "
            "exactly.\nConvert the original Hugging Face folder instead."
        )
    for name in _OFF:
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise UnsupportedModel(f"{path}: tokenizer.ggml.{name} is set; SmolLM tokenizers leave it off.")


def _spec(metadata: Mapping[str, Any], found: Mapping[str, Entry], path: Path) -> ModelSpec:
    def value(name: str, kind: type, default: Any = None) -> Any:
        known = metadata.get(f"llama.{name}", default)
        is_number = isinstance(known, kind) and not isinstance(known, bool)
        if not is_number or not 0 < known < math.inf:
            wanted = "a positive whole number" if kind is int else "a positive number"
            raise UnsupportedModel(f"{path}: llama.{name} is {known!r}; {wanted} is needed to rebuild the model.")
        return known

    heads, hidden = value("attention.head_count", int), value("embedding_length", int)
    layers, vocabulary = value("block_count", int), len(listed(metadata, "tokenizer.ggml.tokens", str, path))
    if layers > len(found):
        raise NameMismatch(f"{path}: llama.block_count is {layers}, but there are only {len(found)} tensors.")
    # ggml's documented defaults: no grouped queries, heads that fill the hidden size, all of a head rotates.
    kv_heads = value("attention.head_count_kv", int, heads)
    head_size = value("attention.key_length", int, hidden // heads)
    implied = {"attention.value_length": head_size, "rope.dimension_count": head_size, "vocab_size": vocabulary}
    for name, expected in implied.items():
        if value(name, int, expected) != expected:
            raise UnsupportedModel(
                f"{path}: llama.{name} is {metadata[f'llama.{name}']}, but its other metadata ask for {expected}.\n"
                "A Hugging Face Llama cannot represent the difference."
            )
    return ModelSpec(
        architecture="llama",
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=vocabulary,
        max_positions=value("context_length", int),
        rms_norm_eps=_shortest(value("attention.layer_norm_rms_epsilon", float)),
        rope_theta=_shortest(value("rope.freq_base", float)),
        rope_scaling=None,
        use_rope=(True,) * layers,
        tied="output.weight" not in found,
        attention_bias="blk.0.attn_q.bias" in found,
        mlp_bias="blk.0.ffn_gate.bias" in found,
        activation="silu",  # what llama.cpp's graph of this architecture computes
    )


def _shortest(value: float) -> float:
    """The number whose nearest float32 was stored: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _documents(
    metadata: Mapping[str, Any], found: Mapping[str, Entry], spec: ModelSpec, ids: Mapping[str, int | None], path: Path
) -> dict[str, bytes]:
    tokens = listed(metadata, "tokenizer.ggml.tokens", str, path)
    named = {name.removesuffix("_id"): tokens[index] for name, index in ids.items() if index is not None}
    settings: dict[str, Any] = {
        "add_prefix_space": False,
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_positions,
        # The one class that v4 and v5 of transformers both read tokenizer.json with, unchanged: GPT2Tokenizer would be
        # rebuilt by v5 without the splitting of digits, and v4 does not know v5's TokenizersBackend.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    documents = {"tokenizer.json": tokenizer_json(metadata, path)}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        documents["chat_template.jinja"] = template.encode()
        settings["chat_template"] = template  # for readers that do not know the file yet
    documents["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    documents["README.md"] = _card(metadata, found, spec, path)
    return documents


def _card(metadata: Mapping[str, Any], found: Mapping[str, Entry], spec: ModelSpec, path: Path) -> bytes:
    kinds = Counter(entry.kind.name for entry in found.values())
    held = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    licence, organization, name = (
        " ".join(str(metadata.get(f"general.{key}", "")).split()) for key in ("license", "organization", "name")
    )
    lines = [
        "---", "library_name: transformers", *([f"license: {json.dumps(licence)}"] if licence else []),
        "tags: [smolconv, gguf]", "---", f"# {name or path.stem}", "",
        f"Imported by smolconv {__version__} from `{path.name}` ({path.stat().st_size:,} bytes"
        + (f", by {organization})." if organization else ")."),
        f"The file holds {held} tensors. The weights here are their dequantised values: what quantising lost is not "
        "in them.",
        "Digests of every tensor are in `smolconv_manifest.json`; `smolconv inspect --check .` compares them.", "",
        f"- {spec.num_layers} layers, hidden size {spec.hidden_size}, {spec.num_heads} query and {spec.num_kv_heads} "
        f"key/value heads, vocabulary {spec.vocab_size}, rope theta {spec.rope_theta:g}",
        "- the tokenizer was rebuilt from the file's vocabulary and merges; digits are split one by one",
    ]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()
