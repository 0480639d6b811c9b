"""GGUF files of the Llama architecture, to be read only: blocks of quantised weights, dequantised while they are read.

Config and tokenizer lie in the file as metadata. All is taken from there and nothing is guessed: an architecture, a
pre-tokenizer or a key that we do not know is refused, since a wrong guess would only show as a slightly worse model.
Keys and names follow llama.cpp's converter (``LlamaModel``) and ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from smolconv import __version__
from smolconv.checkpoint import Checkpoint, Slot
from smolconv.errors import CorruptFile, MissingFile, NameMismatch, NotInstalled, UnsupportedModel
from smolconv.layouts.dtypes import check_dtypes
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.operations import Operation, Rename, RotaryPairs
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import Rule, WeightTable
from smolconv.tensors.lazy import LazyTensor, Raw, Stored, cast, scratch

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

#: Types of metadata values: struct's codes for numbers, a string, an array of either.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Elements of an array, and 8-byte words of a string; real vocabularies stay below 2^20, a damaged length does not.
_MOST = 1 << 24
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
        import gguf

        kind = gguf.GGMLQuantizationType[self.quantisation]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        for at in range(start - start % block, stop, _STEP_ELEMENTS):
            end = min(at + _STEP_ELEMENTS, self.numel)
            first, last = at // block * block_bytes, end // block * block_bytes
            with scratch(last - first, np.dtype(np.uint8)) as packed:
                self.packed.read(first, last, packed)
                with np.errstate(all="ignore"):  # values that are not finite are reported by the pass that writes them
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
    metadata, found = _read_header(path, gguf)
    _refuse(metadata, path)
    spec = _spec(metadata, found, path)
    ids = {f"{name}_token_id": _token_id(metadata, name, path) for name in ("bos", "eos", "pad", "unk")}
    stored: dict[str, LazyTensor] = {name: _tensor(name, entry, path, gguf) for name, entry in found.items()}
    checkpoint = Checkpoint(
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
    return check_dtypes(checkpoint)


def _installed(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotInstalled(f'reading GGUF needs {name}. Install it: pip install "smolconv[gguf]"') from None


# --- header ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the header."""

    shape: tuple[int, ...]
    kind: Any  #: gguf.GGMLQuantizationType
    offset: int  #: bytes from the start of the file
    nbytes: int


class _Header:
    """The open file from its start; no length is believed before it is checked.

    gguf's own GGUFReader reads the same (the tests compare them), but it checks nothing: one damaged length keeps it
    busy until memory ends. It also takes 3.2 s and 202 MB for the 98,000 strings of SmolLM2-135M; this takes 0.1 s.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file

    def corrupt(self, why: str) -> CorruptFile:
        return CorruptFile(f"{self.path} is not a whole GGUF file: {why}.\nCopy or download it again.")

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= _MOST * 8 else b""
        if len(data) != count:
            raise self.corrupt(f"{count} bytes were promised at byte {self.file.tell() - len(data)}")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a string is not UTF-8 ({error})") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.corrupt(f"a value has type {kind}, which does not exist")
        inner, count = self.number("I"), self.number("Q")
        if count > _MOST or inner not in (_STRING, *_NUMBERS):
            raise self.corrupt(f"an array has {count} elements of type {inner}")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        data = self.take(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", data))


def _read_header(path: Path, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """All metadata by key, and where the tensors are by name."""
    if not path.is_file():
        raise MissingFile(f"{path} is not a file. Name the .gguf file itself.")
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.take(4) != b"GGUF":
            raise header.corrupt("it does not begin with GGUF")
        version = header.number("I")
        if version not in (2, 3):
            raise UnsupportedModel(f"{path} is GGUF version {version}; little-endian versions 2 and 3 are read.")
        tensor_count, key_count = header.number("Q"), header.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.string()
            if key in metadata:
                raise header.corrupt(f"the key {key} is there twice")
            metadata[key] = header.value(header.number("I"))
        entries: dict[str, _Entry] = {}
        for _ in range(tensor_count):
            name = header.string()
            if name in entries:
                raise header.corrupt(f"the tensor {name} is there twice")
            entries[name] = _read_entry(header, name, gguf)
        end_of_header = file.tell()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise header.corrupt(f"general.alignment is {alignment!r}")
    start, size = -(-end_of_header // alignment) * alignment, path.stat().st_size
    at = 0
    for name, entry in entries.items():
        # As llama.cpp demands: tensors lie one after the other, so none can stand in another's place.
        if entry.offset != at:
            raise header.corrupt(f"{name} begins at byte {entry.offset} of the data, where {at} was expected")
        at += -(-entry.nbytes // alignment) * alignment
        if start + entry.offset + entry.nbytes > size:
            raise header.corrupt(
                f"{name} would end at byte {start + entry.offset + entry.nbytes}, the file ends at {size}"
            )
    return metadata, {name: replace(entry, offset=start + entry.offset) for name, entry in entries.items()}


def _read_entry(header: _Header, name: str, gguf: ModuleType) -> _Entry:
    dimensions = header.number("I")
    if not 1 <= dimensions <= 4:
        raise header.corrupt(f"{name} has {dimensions} dimensions")
    shape = tuple(reversed([header.number("Q") for _ in range(dimensions)]))
    number, offset = header.number("I"), header.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedModel(
            f"{header.path}: {name} has type {number}, which this version of gguf does not know.\n"
            "Install a newer one: pip install --upgrade gguf"
        ) from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise header.corrupt(f"{name} has rows of {shape[-1]} elements in blocks of {block}")
    return _Entry(shape=shape, kind=kind, offset=offset, nbytes=math.prod(shape) // block * block_bytes)


def _refuse(metadata: Mapping[str, Any], path: Path) -> None:
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


def _spec(metadata: Mapping[str, Any], found: Mapping[str, _Entry], path: Path) -> ModelSpec:
    def value(name: str, kind: type, default: Any = None) -> Any:
        known = metadata.get(f"llama.{name}", default)
        is_number = isinstance(known, kind) and not isinstance(known, bool)
        if not is_number or not 0 < known < math.inf:
            wanted = "a positive whole number" if kind is int else "a positive number"
            raise UnsupportedModel(f"{path}: llama.{name} is {known!r}; {wanted} is needed to rebuild the model.")
        return known

    heads, hidden = value("attention.head_count", int), value("embedding_length", int)
    layers, vocabulary = value("block_count", int), len(_list(metadata, "tokenizer.ggml.tokens", str, path))
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
                "A Hugging Face Llama has no place for the difference."
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


def _tensor(name: str, entry: _Entry, path: Path, gguf: ModuleType) -> LazyTensor:
    dtype = _STORED_AS_IT_IS.get(entry.kind.name)
    if dtype is not None:
        return cast(Stored(path=path, offset=entry.offset, shape=entry.shape, dtype=dtype), "float32")
    block, block_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
    try:
        gguf.quants.dequantize(np.zeros(block_bytes, np.uint8), entry.kind)
    except NotImplementedError:
        raise UnsupportedModel(f"{path}: {name} is {entry.kind.name}, which gguf cannot dequantise.") from None
    assert _STEP_ELEMENTS % block == 0
    packed = Stored(path=path, offset=entry.offset, shape=(entry.nbytes,), dtype="uint8")
    return Dequantised(packed=packed, quantisation=entry.kind.name, shape=entry.shape)


# --- documents -------------------------------------------------------------------------------------------------------


def _documents(
    metadata: Mapping[str, Any], found: Mapping[str, _Entry], spec: ModelSpec, ids: Mapping[str, int | None], path: Path
) -> dict[str, bytes]:
    tokens = _list(metadata, "tokenizer.ggml.tokens", str, path)
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
    if isinstance(template, str):
        documents["chat_template.jinja"] = template.encode()
        settings["chat_template"] = template  # for readers that do not know the file yet
    documents["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    documents["README.md"] = _card(metadata, found, spec, path)
    return documents


def _tokenizer(metadata: Mapping[str, Any], path: Path) -> bytes:
    """tokenizer.json of the pre-tokenizer that llama.cpp calls smollm: single digits, then GPT-2's splitting."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _list(metadata, "tokenizer.ggml.tokens", str, path)
    kinds = _list(metadata, "tokenizer.ggml.token_type", int, path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
        raise CorruptFile(f"{path}: {len(tokens)} tokens with {len(kinds)} types, {len(vocabulary)} of them different.")
    unknown = sorted(set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED})
    if unknown:
        raise UnsupportedModel(f"{path}: tokens of type {unknown[0]} do not belong to a byte-level tokenizer.")
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "tokenizer.ggml.merges", str, path)]
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
    tokens = _list(metadata, "tokenizer.ggml.tokens", str, path)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CorruptFile(f"{path}: {long_name}_token_id is {index!r}, but there are {len(tokens)} tokens.")
    return index


def _list(metadata: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UnsupportedModel(f"{path} has no list {key}, so its tokenizer cannot be rebuilt.")
    return value


def _card(metadata: Mapping[str, Any], found: Mapping[str, _Entry], spec: ModelSpec, path: Path) -> bytes:
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
