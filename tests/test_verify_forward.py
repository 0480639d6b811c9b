"""The forwards that verify leads side by side, each against code that is not ours: nanotron's logits, transformers' own
whole forward, float64 formulas."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert, topology_id
from hf_models import llama, rope, saved
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_round_trips import MODELS, as_interleaved
from transformers import AutoModelForCausalLM

from smolconv.errors import CorruptFile, MissingFile, SmolconvError, UsageError
from smolconv.layouts.nanotron.reader import read_native_model
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification import hf
from smolconv.verification.forward import ForwardPass, Side
from smolconv.verification.hf import CanonicalWeights, FolderWeights, TransformersSide
from smolconv.verification.inputs import Rows, choose_rows, shipped_text
from smolconv.verification.metrics import Distances, Walk
from smolconv.verification.native import NanotronSide

NANOTRON = FIXTURES / "nanotron"
SMOLLM2, SMOLLM3 = NANOTRON / "smollm2-tiny/tp2-pp2-dp1-zero0", NANOTRON / "smollm3-tiny/tp2-pp1-dp2-zero1"
#: fp32 on CPUs, logits that spread by about 2; 1.4e-6 was measured between nanotron and transformers.
MAX_LOGITS_DIFFERENCE = 5e-6
ATTENTION = ["sdpa", "eager"]


def native(folder: Path, dtype: torch.dtype = torch.float32) -> Side:
    return NanotronSide(read_native_model(folder), dtype)


def on_folder(folder: Path) -> Side:
    return TransformersSide(FolderWeights(folder), torch.float32)


def on_tensors(folder: Path) -> Side:
    return TransformersSide(CanonicalWeights(read_checkpoint(folder)), torch.float32)


def logits(side: Side, tokens: torch.Tensor, positions: torch.Tensor | None = None, attention: str = "sdpa"):
    """[B, T, V] of a side, block by block."""
    plain = torch.arange(tokens.shape[1]).expand_as(tokens)
    run = ForwardPass(tokens=tokens, positions=plain if positions is None else positions, attention=attention)
    with torch.inference_mode():
        side.begin([run])
        for layer in range(side.num_layers):
            side.advance(layer, [run])
        side.finish([run])
        half = side.vocab_size // 2
        rows = [side.head_rows(start, stop) for start, stop in ((0, half), (half, side.vocab_size))]
        return (run.hidden @ torch.cat(rows).T).float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# --- against nanotron's own logits -----------------------------------------------------------------------------------


@lru_cache
def known(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "reference.safetensors")


def assert_nanotrons_logits(side: Side, model: Path, attention: str) -> None:
    reference = known(model)
    found = logits(side, reference["input_ids"], reference["position_ids"], attention)
    assert apart(found, reference["logits"]) <= MAX_LOGITS_DIFFERENCE
    if "packed_logits" in reference:
        found = logits(side, reference["packed_input_ids"], reference["packed_position_ids"], attention)
        assert apart(found, reference["packed_logits"]) <= MAX_LOGITS_DIFFERENCE


@pytest.mark.parametrize("attention", ATTENTION)
def test_our_forward_gives_nanotrons_logits_of_every_topology(nanotron_folder, attention):
    assert_nanotrons_logits(native(nanotron_folder), nanotron_folder.parent, attention)


@pytest.mark.parametrize("attention", ATTENTION)
def test_transformers_gives_nanotrons_logits_on_canonical_tensors(nanotron_folder, attention):
    assert_nanotrons_logits(on_tensors(nanotron_folder), nanotron_folder.parent, attention)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model", ["smollm2-tiny", "smollm3-tiny", "smollm3-tiny-bf16"])
def test_transformers_gives_nanotrons_logits_on_the_folder(model, attention):
    assert_nanotrons_logits(on_folder(NANOTRON / model / "expected_hf"), NANOTRON / model, attention)


@pytest.mark.parametrize("run", [SMOLLM2, SMOLLM3], ids=topology_id)
def test_interleaved_rows_give_the_same_logits(run, tmp_path):
    pairs = as_interleaved(run, tmp_path / "run")
    for attention in ATTENTION:
        assert_nanotrons_logits(native(pairs), run.parent, attention)
    assert_nanotrons_logits(on_tensors(pairs), run.parent, "sdpa")


def test_interleaved_queries_are_shown_in_the_order_of_hugging_face(tmp_path):
    seen: list[dict[str, torch.Tensor]] = []
    for folder in (SMOLLM2, as_interleaved(SMOLLM2, tmp_path / "run")):
        side = native(folder)
        found: dict[str, torch.Tensor] = {}
        tokens = known(SMOLLM2.parent)["input_ids"]
        run = ForwardPass(
            tokens=tokens, positions=torch.arange(32).expand_as(tokens), attention="sdpa", observe=found.__setitem__
        )
        side.begin([run])
        side.advance(0, [run])
        seen.append(found)
    assert seen[0].keys() == seen[1].keys()
    assert max(apart(seen[0][name], seen[1][name]) for name in seen[0]) < 1e-6


def test_eager_attention_in_pieces_is_attention(monkeypatch):
    monkeypatch.setattr("smolconv.verification.native._EAGER_ROWS", 5)  # 32 positions: 7 pieces, the last of 2
    assert_nanotrons_logits(native(SMOLLM3), SMOLLM3.parent, "eager")


# --- against transformers' own whole forward -------------------------------------------------------------------------

TOKENS = torch.arange(48).view(2, 24) * 7 % 64
PACKED = torch.cat([torch.arange(size) for size in (5, 1, 9, 3, 6)])[None].expand(2, 24)


def whole_forward(folder: Path, attention: str, positions: torch.Tensor | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).float().eval()
    with torch.inference_mode():
        return model(input_ids=TOKENS, position_ids=positions, use_cache=False).logits


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Path:
    return saved(MODELS[request.param](), tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize("positions", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_block_by_block_is_transformers_own_forward(model, attention, positions):
    expected = whole_forward(model, attention, positions)
    assert apart(logits(on_folder(model), TOKENS, positions, attention), expected) < 1e-6
    assert apart(logits(on_tensors(model), TOKENS, positions, attention), expected) < 1e-6


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama3 rope"])  # which nanotron does not know
def test_our_forward_on_what_was_converted_gives_transformers_logits(name, tmp_path):
    source = saved(MODELS[name](), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2, pp=2)
    for attention in ATTENTION:
        found = logits(native(tmp_path / "run"), TOKENS, attention=attention)
        assert apart(found, whole_forward(source, attention, None)) < 2e-5  # logits spread by 20 here


def test_weights_in_shards_are_the_same(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(logits(on_folder(tmp_path / "shards"), TOKENS), whole_forward(tmp_path / "shards", "sdpa", None))


def test_of_a_single_file_and_an_index_beside_it_the_file_is_read_as_transformers_does(tmp_path):
    source = saved(llama(), tmp_path / "hf")
    expected = whole_forward(source, "sdpa", None)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert torch.equal(whole_forward(source, "sdpa", None), expected)
    assert torch.equal(logits(on_folder(source), TOKENS), expected)


def test_a_padding_id_beyond_the_vocabulary_stops_no_forward(tmp_path):
    source = saved(llama(), tmp_path / "hf")
    expected = whole_forward(source, "sdpa", None)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": config["vocab_size"]}))
    assert torch.equal(logits(on_folder(source), TOKENS), expected)
    assert torch.equal(logits(on_tensors(source), TOKENS), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh", "silu"])
def test_our_forward_knows_the_activations_of_transformers(activation, tmp_path):
    source = saved(llama(hidden_act=activation), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron")
    assert apart(logits(native(tmp_path / "run"), TOKENS), whole_forward(source, "sdpa", None)) < 2e-5


@pytest.mark.parametrize("archives", [1, 2], ids=["one archive", "two archives"])
def test_weights_in_archives_of_torch_are_the_same(archives, tmp_path):
    model = llama(tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)  # transformers 5 no longer writes the weights so
    weights = model.state_dict()
    files = {name: f"pytorch_model-{i % archives + 1:05}-of-{archives:05}.bin" for i, name in enumerate(weights)}
    if archives == 1:
        files = dict.fromkeys(weights, "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, tmp_path / file)
    expected = whole_forward(tmp_path, "sdpa", None)
    assert torch.equal(logits(on_tensors(tmp_path), TOKENS), expected)
    assert torch.equal(logits(on_folder(tmp_path), TOKENS), expected)


def given_to_sdpa(monkeypatch: pytest.MonkeyPatch, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    """What ``work`` gives, and of every call of torch's attention: heads, whether torch shares them, mask, causal."""
    calls, original = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask=None, enable_gqa=False, **options: Any):
        calls.append(([x.shape[1] for x in (q, k, v)], enable_gqa, attn_mask is None, options["is_causal"]))
        return original(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        return work(), calls


@pytest.mark.parametrize("positions", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("model", ["smollm2-tiny", "smollm3-tiny"])
def test_on_a_gpu_transformers_is_given_whole_heads_so_that_scores_are_never_written(monkeypatch, model, positions):
    """torch's kernels for GPUs that write no scores share heads in 16 bits only. The same function, here on the CPU."""
    folder, chosen = NANOTRON / model / "expected_hf", hf._attention
    with monkeypatch.context() as patch:
        patch.setattr(hf, "_attention", lambda run, device: chosen(run, "cuda:0"))
        found, calls = given_to_sdpa(monkeypatch, lambda: logits(on_folder(folder), TOKENS, positions))
    side: Any = on_folder(folder)
    config = side._model("sdpa").config
    assert config.num_key_value_heads < config.num_attention_heads
    whole = ([config.num_attention_heads] * 3, False)
    assert calls == [(*whole, positions is None, positions is None)] * config.num_hidden_layers
    assert apart(found, whole_forward(folder, "sdpa", positions)) <= MAX_LOGITS_DIFFERENCE


@pytest.mark.parametrize("positions", [torch.arange(24).expand(2, 24), PACKED], ids=["one document", "packed"])
def test_on_a_cpu_transformers_is_left_as_it_is_and_eager_attention_everywhere(positions):
    """Its results stay bitwise its own."""
    runs = [ForwardPass(tokens=TOKENS, positions=positions, attention=attention) for attention in ATTENTION]
    assert [hf._attention(run, "cpu") for run in runs] == ATTENTION
    assert hf._attention(runs[1], "cuda") == "eager"


def test_rope_scaling_is_heeded_by_transformers_side_and_not_by_nanotrons(tmp_path):
    scaled = saved(llama(**rope(1e4, {"rope_type": "linear", "factor": 4.0})), tmp_path / "scaled")
    plain = saved(llama(**rope(1e4, {"rope_type": "default"})), tmp_path / "plain")
    convert(scaled, tmp_path / "run", "nanotron")
    expected, ignored = (whole_forward(folder, "sdpa", None) for folder in (scaled, plain))
    assert apart(expected, ignored) > 0.1
    assert apart(logits(on_folder(scaled), TOKENS), expected) < 1e-6
    assert apart(logits(native(tmp_path / "run"), TOKENS), ignored) < 2e-5


def test_a_side_can_be_led_through_several_runs_at_once_and_again():
    side, reference = native(SMOLLM3), known(SMOLLM3.parent)
    rows = [reference["input_ids"][:, :7], reference["input_ids"]]
    runs = [
        ForwardPass(tokens=row, positions=torch.arange(row.shape[1]).expand_as(row), attention=attention)
        for row, attention in zip(rows, ATTENTION)
    ]
    side.begin(runs)
    for layer in range(side.num_layers):
        side.advance(layer, runs)
    side.finish(runs)
    found = [run.hidden @ side.head_rows(0, side.vocab_size).T for run in runs]
    assert apart(found[0], reference["logits"][:, :7]) <= MAX_LOGITS_DIFFERENCE
    assert apart(found[1], reference["logits"]) <= MAX_LOGITS_DIFFERENCE
    assert_nanotrons_logits(side, SMOLLM3.parent, "sdpa")


# --- documents in a row ----------------------------------------------------------------------------------------------

SIDES: dict[str, tuple[Callable[[Path], Side], Path]] = {
    "nanotron": (native, SMOLLM3),
    "smollm3 in transformers": (on_folder, SMOLLM3.parent / "expected_hf"),
    "llama in transformers": (on_folder, SMOLLM2.parent / "expected_hf"),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("make", "folder"), SIDES.values(), ids=SIDES)
def test_a_document_in_a_row_is_what_it_is_alone(make, folder, attention):
    side, tokens = make(folder), known(SMOLLM3.parent)["packed_input_ids"][:1]
    ends = (5, 6, 23, 32)
    positions = torch.cat([torch.arange(stop - start) for start, stop in zip((0, *ends), ends)])[None]
    packed = logits(side, tokens, positions, attention)
    for start, stop in zip((0, *ends), ends):
        alone = logits(side, tokens[:, start:stop], attention=attention)
        assert apart(packed[:, start:stop], alone) <= MAX_LOGITS_DIFFERENCE


def test_nanotrons_llama_attends_over_the_whole_row():
    # models/llama.py passes no document mask on: positions that restart change nothing.
    tokens = known(SMOLLM2.parent)["input_ids"]
    positions = (torch.arange(32) % 8).expand_as(tokens)
    assert torch.equal(logits(native(SMOLLM2), tokens, positions), logits(native(SMOLLM2), tokens))


# --- distances -------------------------------------------------------------------------------------------------------


def walked(a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor, chunk: int) -> Distances:
    walk = Walk(targets)
    for start in range(0, a.shape[1], chunk):
        walk.add(a[:, start : start + chunk], b[:, start : start + chunk])
    return walk.finish()


def pair(difference: float, spread: float = 6.4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(40, 997, generator=generator) * spread
    return a, (a + torch.randn(40, 997, generator=generator) * difference).float()


DIFFERENCES = [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1.0, 10.0, 50.0]
CHUNKS = [1, 2, 100, 996, 997, 2048]  #: of 997; a second of operations at 1


@pytest.mark.parametrize(
    ("difference", "chunk"),
    [(each, chunk) for each in DIFFERENCES for chunk in CHUNKS if chunk > 2 or each in (0.0, 1e-3, 50.0)],
)
def test_distances_are_those_of_plain_float64_formulas(difference, chunk):
    a, b = pair(difference)
    targets = (torch.arange(40) * 31) % 997
    targets[::7] = -1
    found, (x, y) = walked(a, b, targets, chunk), (a.double(), b.double())
    log_p, log_q = x.log_softmax(1), y.log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    two = x.topk(2, dim=1).values
    nll = [
        torch.where(targets < 0, torch.nan, -log.gather(1, targets.clamp(0)[:, None])[:, 0]) for log in (log_p, log_q)
    ]
    expected = {
        "max_abs": (x - y).abs().amax(1), "mean_abs": (x - y).abs().mean(1), "gap": two[:, 0] - two[:, 1],
        "nll_a": nll[0], "nll_b": nll[1],
    }  # fmt: skip
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-6, atol=1e-6, equal_nan=True)
    # The plain formula itself is good to about 1e-15 only.
    torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-14)
    assert torch.equal(found.same_first, x.argmax(1) == y.argmax(1))
    assert found.std == pytest.approx(x.std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("difference", [1e-5, 1e-4, 1e-2, 1.0])
def test_small_divergences_are_told_apart_where_plain_float64_cancels(difference):
    a, b = pair(difference)
    from decimal import Decimal, getcontext

    getcontext().prec = 50

    def exact(x: list[float], y: list[float]) -> float:
        p, q = ([Decimal(value).exp() for value in row] for row in (x, y))
        total_p, total_q = sum(p), sum(q)
        terms = (i / total_p * ((i / total_p).ln() - (j / total_q).ln()) for i, j in zip(p, q))
        return float(sum(terms))

    found = walked(a[:2, :200], b[:2, :200], torch.tensor([-1, -1]), 64).kl.tolist()
    expected = [exact(a[i, :200].tolist(), b[i, :200].tolist()) for i in range(2)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_equal_logits_are_at_no_distance_at_all():
    a, _ = pair(0.0)
    found = walked(a, a.clone(), torch.full((40,), 3), 64)
    assert found.kl.max() == found.max_abs.max() == found.mean_abs.max() == 0
    assert found.same_first.all()
    assert torch.equal(found.nll_a, found.nll_b)


def test_logits_far_from_zero_change_no_distance():
    a, b = pair(1e-2)
    near, far = (walked(a + far, b + far, torch.full((40,), 3), 64) for far in (0.0, 512.0))
    torch.testing.assert_close(near.kl, far.kl, rtol=2e-2, atol=0)
    torch.testing.assert_close(near.nll_a, far.nll_a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("poisoned", ["a", "b"])
@pytest.mark.parametrize("column", [0, 50, 99])
def test_nan_in_either_is_never_a_small_distance(poisoned, column):
    a, b = (side[:3, :100].clone() for side in pair(1e-6))
    (a if poisoned == "a" else b)[1, column] = torch.nan
    found = walked(a, b, torch.tensor([1, 2, 3]), 32)
    for values in (found.max_abs, found.kl):
        assert not values[1] <= 1e9
        assert values[[0, 2]].max() <= 1e-5


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(1, 5))
def test_equal_logits_are_the_same_choice_and_the_gap_between_them_is_none(values, chunk):
    a = torch.tensor([values], dtype=torch.float32)
    found = walked(a, a, torch.tensor([-1]), chunk)
    ordered = sorted(values, reverse=True)
    assert found.gap.item() == ordered[0] - ordered[1]
    assert bool(found.same_first.all()) and bool(found.nll_a.isnan().all())


# --- rows of tokens --------------------------------------------------------------------------------------------------


def choose(**options) -> Rows:
    return choose_rows(**{"vocab_size": 300, "max_positions": 64, "tokenizer": None, **options})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Bytes as tokens 0 to 255."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def decoded(rows: Rows, tokenizer: Path) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer)).decode(rows.tokens[0].tolist())


def test_without_a_tokenizer_tokens_are_random_always_the_same_and_cover_the_vocabulary():
    first, again = choose(max_positions=5000, length=5000), choose(max_positions=5000, length=5000)
    assert np.array_equal(first.tokens, again.tokens)
    assert set(first.tokens.flatten().tolist()) == set(range(300))
    assert "random" in first.where


def test_the_shipped_text_comes_through_the_tokenizer(tokenizer):
    rows = choose(tokenizer=tokenizer)
    assert rows.tokens.shape == (1, 64)
    assert shipped_text().startswith(decoded(rows, tokenizer))


def test_the_shipped_text_says_nothing_twice_and_is_of_many_scripts():
    from unicodedata import name

    text = shipped_text()
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == len(set(lines))
    assert 10_000 < len(text.encode()) < 12_000  # 4,200 tokens of SmolLM2's, when it was written
    scripts = {name(letter).split()[0] for letter in text if letter.isalpha()}
    assert scripts >= {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL"}


def test_where_the_tokenizer_is_of_another_vocabulary_the_shipped_text_gives_way_to_random_tokens(tokenizer):
    rows = choose(tokenizer=tokenizer, vocab_size=20)
    assert np.array_equal(rows.tokens, choose(vocab_size=20).tokens)
    assert "random tokens" in rows.where and "20 entries" in rows.where


def test_a_text_of_ones_own_is_read_once(tokenizer, tmp_path):
    (tmp_path / "text").write_text("Grüße!", encoding="utf-8")
    rows = choose(tokenizer=tokenizer, text=tmp_path / "text")
    assert decoded(rows, tokenizer) == "Grüße!"
    assert (rows.tokens.shape, rows.where) == ((1, 8), str(tmp_path / "text"))


def test_the_shipped_text_begins_anew_where_it_is_too_short(tokenizer, monkeypatch):
    monkeypatch.setattr("smolconv.verification.inputs.shipped_text", lambda: "abc")
    assert decoded(choose(tokenizer=tokenizer, length=8), tokenizer) == "abcabcab"


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["int16", "int64", "uint8"])
def test_ids_of_ones_own_are_taken_in_order(shape, dtype, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(12, dtype=dtype).reshape(shape))
    rows = choose(tokens=tmp_path / "ids.npy", length=10)
    assert (rows.tokens.dtype, rows.tokens.tolist()) == (np.dtype(np.int64), [list(range(10))])


@pytest.mark.parametrize(
    ("length", "documents", "spans"),
    [
        (10, 1, ((0, 10),)),
        (10, 4, ((0, 1), (1, 3), (3, 6), (6, 10))),
        (12, 3, ((0, 2), (2, 6), (6, 12))),
        (4, 4, ((0, 1), (1, 2), (2, 3), (3, 4))),
    ],
)
def test_documents_grow_along_the_row(length, documents, spans):
    rows = choose(length=length, documents=documents)
    assert (rows.spans, rows.documents) == (spans, documents)


@given(st.integers(2, 300).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))))
def test_documents_fill_the_row_and_none_is_empty(case):
    length, documents = case
    rows = choose(max_positions=300, length=length, documents=documents)
    starts, stops = zip(*rows.spans)
    assert len(rows.spans) == documents
    assert (starts, stops[-1]) == ((0, *stops[:-1]), length)
    assert all(start < stop for start, stop in rows.spans)


def test_positions_begin_again_with_each_document_and_targets_do_not_cross_them(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([5, 6, 7, 8, 9, 10]))
    rows = choose(tokens=tmp_path / "ids.npy", documents=3)
    assert rows.spans == ((0, 1), (1, 3), (3, 6))
    assert rows.positions.tolist() == [[0, 0, 1, 0, 1, 2]]
    assert rows.targets.tolist() == [[-1, 7, -1, 9, 10, -1]]


def saved_ids(ids: list[int] | list[float]) -> Callable[[Path], dict[str, Path]]:
    def make(folder: Path) -> dict[str, Path]:
        np.save(folder / "ids.npy", np.array(ids))
        return {"tokens": folder / "ids.npy"}

    return make


def saved_text(data: bytes, option: str = "text") -> Callable[[Path], dict[str, Path]]:
    def make(folder: Path) -> dict[str, Path]:
        (folder / "file").write_bytes(data)
        return {option: folder / "file"}

    return make


def npy(header: str) -> bytes:
    """A file of numpy's with a header of one's own, and eight ids."""
    padded = f"{header}{' ' * 100}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(64)


def promising(shape: str, descr: str = "<i8") -> Callable[[Path], dict[str, Path]]:
    return saved_text(npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape},), }}"), "tokens")


def pipe(option: str) -> Callable[[Path], dict[str, Path]]:
    def make(folder: Path) -> dict[str, Path]:
        os.mkfifo(folder / "pipe")
        return {option: folder / "pipe"}

    return make


def archive(folder: Path) -> dict[str, Path]:
    np.savez(folder / "ids.npz", ids=np.arange(100))
    return {"tokens": folder / "ids.npz"}


WRONG: dict[str, tuple[Callable[[Path], Mapping[str, object]], type[SmolconvError], str]] = {
    "beyond the vocabulary": (saved_ids([1, 300]), UsageError, "gives token 300,"),
    "negative": (saved_ids([1, -1]), UsageError, "gives token -1,"),
    "floats": (saved_ids([1.0, 2.0]), UsageError, "float64"),
    "one token": (saved_ids([1]), UsageError, "at least 2"),
    "no tokens": (saved_ids([]), UsageError, "float64"),
    "no file": (lambda folder: {"tokens": folder / "none.npy"}, MissingFile, r"none\.npy"),
    "no array": (saved_text(b"not numpy", "tokens"), CorruptFile, "file"),
    "empty file": (saved_text(b"", "tokens"), CorruptFile, "file"),
    "a petabyte promised": (promising("1000000000000000"), CorruptFile, "file is not a .npy file"),
    "more than numbers hold promised": (promising("9" * 40), CorruptFile, "file is not a .npy file"),
    "a negative length": (promising("-5"), CorruptFile, "file is not a .npy file"),
    "objects": (promising("1", "|O"), CorruptFile, "file is not a .npy file"),
    "brackets": (saved_text(npy("(" * 3000), "tokens"), CorruptFile, "file is not a .npy file"),
    "an archive": (archive, CorruptFile, r"ids\.npz is an \.npz archive"),
    "a pipe": (pipe("tokens"), CorruptFile, "is a named pipe"),
    "a folder": (lambda folder: {"tokens": folder}, CorruptFile, "is a folder"),
    "more documents than tokens": (lambda folder: {"length": 5, "documents": 6}, UsageError, "documents"),
    "no documents": (lambda folder: {"documents": 0}, UsageError, "documents"),
}


def test_a_header_of_ones_own_that_is_right_is_read(tmp_path):
    """The control of those that promise too much."""
    assert choose(**promising("8")(tmp_path)).tokens.tolist() == [[0] * 8]


@pytest.mark.parametrize(("make", "error", "says"), WRONG.values(), ids=WRONG)
def test_rows_that_cannot_be_are_refused_by_name(make, error, says, tmp_path):
    with pytest.raises(error, match=says):
        choose(**make(tmp_path))


WRONG_TEXTS: dict[str, tuple[Callable[[Path], Mapping[str, object]], type[SmolconvError], str]] = {
    "no file": (lambda folder: {"text": folder / "none.txt"}, MissingFile, r"none\.txt"),
    "not UTF-8": (saved_text(b"\xff\xfe\xff"), UsageError, "UTF-8"),
    "empty": (saved_text(b""), UsageError, "0 tokens"),
    "a pipe": (pipe("text"), CorruptFile, "is a named pipe"),
    "a device": (lambda folder: {"text": Path("/dev/zero")}, CorruptFile, "is a device"),
    "another vocabulary": (lambda folder: {**saved_text(b"ab")(folder), "vocab_size": 20}, UsageError, "20 entries"),
}


@pytest.mark.parametrize(("make", "error", "says"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_texts_that_cannot_be_are_refused_by_name(make, error, says, tokenizer, tmp_path):
    with pytest.raises(error, match=says):
        choose(tokenizer=tokenizer, **make(tmp_path))


def test_a_text_without_a_tokenizer_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        choose(text=tmp_path / "text")


@pytest.mark.parametrize("data", [b"", b"{}", b"not JSON"], ids=["empty", "no tokenizer", "no JSON"])
def test_a_tokenizer_that_cannot_be_read_is_a_corrupt_file(data, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "text").write_text("abc")
    with pytest.raises(SmolconvError):
        choose(tokenizer=tmp_path / "tokenizer.json", text=tmp_path / "text")
    # Two models are the same with and without it.
    rows = choose(tokenizer=tmp_path / "tokenizer.json")
    assert "random" in rows.where and str(tmp_path) in rows.where
    assert rows.tokens.tolist() == choose().tokens.tolist()
