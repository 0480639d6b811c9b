"""GGUF files of the Llama architecture, to be read only: blocks of quantised weights, dequantised while they are read.

Config and tokenizer lie in the file as metadata. All is taken from there and nothing is guessed: an architecture, a
pre-tokenizer or a key that we do not know is refused, since a wrong guess would only show as a slightly worse model.
Keys and names follow llama.cpp's converter (conversion/llama.py, ``LlamaModel``) and docs/gguf.md of ggml.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smolconv import __version__
from smolconv.checkpoint import Checkpoint, LazyTensor, Raw, Slot, Stored, cast, scratch
from smolconv.errors import CorruptFile, MissingFile, NotInstalled, UnsupportedModel
from smolconv.mappings.ops import Operation, Rename, RotaryPairs
from smolconv.mappings.table import Rule, WeightTable
from smolconv.spec import ModelSpec, parameter_shapes

if TYPE_CHECKING:
    from types import ModuleType

#: Elements that are dequantised at a time, a multiple of every block. Smaller, and workers wait for Python's lock;
#: larger, and numpy's temporaries (half a MiB each) leave the cache.
_STEP_ELEMENTS = 1 << 17

_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

_STORED_AS_IT_IS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Keys below ``llama.`` that are read here, and those that may be there if they say that nothing changes.
_READ = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "vocab_size",
})  # fmt: skip
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "attention.causal": True}
#: Tokenizer switches that no SmolLM tokenizer sets; each would change the token ids of a text.
_OFF = ("add_bos_token", "add_eos_token", "add_space_prefix")
#: ggml's token types that a byte-level vocabulary may hold.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True, kw_only=True)
class Dequantised(LazyTensor):
    """A float32 tensor made of quantised blocks; a range costs the blocks that it touches."""

    packed: Stored  #: the blocks' bytes, a vector of uint8
    quantisation: str  #: ggml's name, such as Q4_1
    shape: tuple[int, ...]
    dtype: str = "float32"

    def read(self, start: int, stop: int, out: Raw) -> None:
        import gguf  # noqa: PLC0415

        kind = gguf.GGMLQuantizationType[self.quantisation]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        for at in range(start - start % block, stop, _STEP_ELEMENTS):
            end = min(at + _STEP_ELEMENTS, self.numel)
            first, last = at // block * block_bytes, end // block * block_bytes
            with scratch(last - first, np.dtype(np.uint8)) as packed:
                self.packed.read(first, last, packed)
                values = gguf.quants.dequantize(packed, kind).view(np.uint32)
            low, high = max(at, start), min(end, stop)
            out[low - start : high - start] = values[low - at : high - at]

    def leaves(self) -> Iterator[Stored]:
        return self.packed.leaves()


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

    Raises ``UnsupportedModel`` for what is not a plain Llama with SmolLM's tokenizer, ``CorruptFile`` for a file that
    is cut short or no GGUF, ``MissingFile``, and ``NotInstalled`` without gguf and tokenizers.
    """
    gguf = _installed("gguf")
    _installed("tokenizers")
    metadata, found = _header(path, gguf)
    _refuse(metadata, found, path)
    spec = _spec(metadata, found, path)
    ids = {f"{name}_token_id": _token_id(metadata, name, path) for name in ("bos", "eos", "pad", "unk")}
    stored: dict[str, LazyTensor] = {name: _tensor(entry, path, gguf) for name, entry in found.items()}
    return Checkpoint(
        layout="gguf",
        root=path,
        spec=spec,
        tensors={Slot.PARAMETER: gguf_table(spec).to_canonical(stored, str(path))},
        documents=_documents(metadata, found, spec, ids, path),
        # A key that is null says that the file names no such token; HF would fill in its class's own id.
        origin={"config.json": json.dumps({name: ids[name] for name in ids if name != "unk_token_id"}).encode()},
        files=(path,),
        warnings=tuple(
            f"the chat template {key.removeprefix('tokenizer.chat_template.')!r} was left out; the default one is kept."
            for key in metadata
            if key.startswith("tokenizer.chat_template.")
        ),
    )


def _installed(name: str) -> ModuleType:
    import importlib  # noqa: PLC0415

    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotInstalled(f'reading GGUF needs {name}. Install it: pip install "smolconv[gguf]"') from None


# --- header ----------------------------------------------------------------------------------------------------------


def _header(path: Path, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, Any]]:
    """All metadata by key, and gguf's tensor entries by name."""
    if not path.is_file():
        raise MissingFile(f"{path} is not a file. Name the .gguf file itself.")
    try:
        reader = _reader(gguf)(path)
        if reader.endianess is not gguf.GGUFEndian.LITTLE:
            raise UnsupportedModel(f"{path} is big-endian; only little-endian GGUF is read.")
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        # gguf checks nothing beyond the magic number, so bad bytes end in whatever numpy says about them.
        raise CorruptFile(
            f"{path} is not a whole GGUF file ({error}).\nCopy or download it again, and compare its size."
        ) from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _reader(gguf: ModuleType) -> Any:
    """gguf's reader over a plain view of the mapped file: a memmap costs much more to slice, once for every string.

    SmolLM2-135M with its 98,052 tokens and merges: 1.0 s and 113 MB instead of 3.2 s and 202 MB (gguf 0.19.0).
    """

    class Reader(gguf.GGUFReader):  # type: ignore[misc,name-defined]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    return Reader


def _refuse(metadata: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"{path}: general.architecture is {architecture!r}; only llama (SmolLM2) can be imported.\n"
            "Convert the original Hugging Face folder instead."
        )
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedModel(f"{path} holds no model but general.type {metadata['general.type']!r}.")
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


def _spec(metadata: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> ModelSpec:
    def value(name: str, kind: type, default: Any = None) -> Any:
        known = metadata.get(f"llama.{name}", default)
        if not isinstance(known, kind) or isinstance(known, bool):
            wanted = "a whole number" if kind is int else "a number"
            raise UnsupportedModel(f"{path}: llama.{name} is {known!r}; {wanted} is needed to rebuild the model.")
        return known

    heads, hidden = value("attention.head_count", int), value("embedding_length", int)
    vocabulary = len(_list(metadata, "tokenizer.ggml.tokens", path))
    # ggml's documented defaults: no grouped queries, heads that fill the hidden size, all of a head rotates.
    kv_heads = value("attention.head_count_kv", int, heads)
    head_size = value("attention.key_length", int, hidden // heads if heads else 0)
    implied = {"attention.value_length": head_size, "rope.dimension_count": head_size, "vocab_size": vocabulary}
    for name, expected in implied.items():
        if value(name, int, expected) != expected:
            raise UnsupportedModel(
                f"{path}: llama.{name} is {metadata[f'llama.{name}']}, but its other metadata ask for {expected}.\n"
                "A Hugging Face Llama has no place for the difference."
            )
    return ModelSpec(
        architecture="llama",
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length", int),
        num_layers=(layers := value("block_count", int)),
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


def _tensor(entry: Any, path: Path, gguf: ModuleType) -> LazyTensor:
    kind, shape = entry.tensor_type, tuple(int(size) for size in reversed(entry.shape))
    offset, dtype = int(entry.data_offset), _STORED_AS_IT_IS.get(kind.name)
    if dtype is not None:
        return cast(Stored(path=path, offset=offset, shape=shape, dtype=dtype), "float32")
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros(block_bytes, np.uint8), kind)
    except NotImplementedError:
        raise UnsupportedModel(f"{path}: {entry.name} is {kind.name}, which gguf cannot dequantise.") from None
    assert _STEP_ELEMENTS % block == 0
    packed = Stored(path=path, offset=offset, shape=(int(entry.n_bytes),), dtype="uint8")
    return Dequantised(packed=packed, quantisation=kind.name, shape=shape)


# --- documents -------------------------------------------------------------------------------------------------------


def _documents(
    metadata: Mapping[str, Any], found: Mapping[str, Any], spec: ModelSpec, ids: Mapping[str, int | None], path: Path
) -> dict[str, bytes]:
    tokens = _list(metadata, "tokenizer.ggml.tokens", path)
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
    documents = {"tokenizer.json": _tokenizer(metadata, path)}
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        documents["chat_template.jinja"] = template.encode()
        settings["chat_template"] = template  # for readers that do not know the file yet
    documents["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    documents["README.md"] = _card(metadata, found, spec, path)
    return documents


def _tokenizer(metadata: Mapping[str, Any], path: Path) -> bytes:
    """tokenizer.json of the pre-tokenizer that llama.cpp calls smollm: single digits, then GPT-2's splitting."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    tokens = _list(metadata, "tokenizer.ggml.tokens", path)
    kinds = _list(metadata, "tokenizer.ggml.token_type", path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
        raise CorruptFile(f"{path}: {len(tokens)} tokens with {len(kinds)} types, {len(vocabulary)} of them different.")
    unknown = sorted(set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED})
    if unknown:
        raise UnsupportedModel(f"{path}: tokens of type {unknown[0]} do not belong to a byte-level tokenizer.")
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "tokenizer.ggml.merges", path)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises the base class itself
        raise CorruptFile(f"{path}: the tokenizer's merges do not fit its tokens ({error}).") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    added = {kind: [token for token, own in zip(tokens, kinds) if own == kind] for kind in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added[_CONTROL]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added[_USER_DEFINED]])
    return str(tokenizer.to_str(pretty=True)).encode()


def _token_id(metadata: Mapping[str, Any], name: str, path: Path) -> int | None:
    long_name = {"pad": "padding", "unk": "unknown"}.get(name, name)
    index = metadata.get(f"tokenizer.ggml.{long_name}_token_id")
    tokens = _list(metadata, "tokenizer.ggml.tokens", path)
    if index is not None and not 0 <= index < len(tokens):
        raise CorruptFile(f"{path}: {long_name}_token_id is {index}, but there are {len(tokens)} tokens.")
    return index


def _list(metadata: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise UnsupportedModel(f"{path} has no list {key}, so its tokenizer cannot be rebuilt.")
    return value


def _card(metadata: Mapping[str, Any], found: Mapping[str, Any], spec: ModelSpec, path: Path) -> bytes:
    kinds = Counter(entry.tensor_type.name for entry in found.values())
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
