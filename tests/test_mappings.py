"""Canonical tensors to nanotron's and back, against plain torch, for any sizes, any TP and PP.

Shapes use E hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy import literal, to_torch
from specs import nanotron_specs, tiny

from smolconv.errors import NameMismatch, ShapeMismatch, UsageError
from smolconv.layouts.nanotron.topology import (
    EMBEDDING,
    block_of,
    cut_shard,
    format_slices,
    join_shards,
    parameters_of_rank,
    parse_slices,
    pipeline_ranks,
    slice_pairs,
    tensor_parallel,
)
from smolconv.models import huggingface, nanotron
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.operations import JoinRows, PadVocabulary, Rename, RotaryPairs
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import Rule, WeightTable
from smolconv.tensors.lazy import LazyTensor

PAIRS = st.booleans()  # whether rotary rows are stored as interleaved pairs


def nanotron_table(spec: ModelSpec, interleaved: bool = False) -> WeightTable:
    return nanotron.nanotron_table(spec, interleaved=interleaved)


def is_zero(tensor: LazyTensor) -> bool:
    return not to_torch(tensor).any()


def weights_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Every element different, and o_proj's bias zero, as nanotron needs it."""
    found, at = {}, 1.0
    for name, shape in parameter_shapes(spec).items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(at, at + count, dtype=torch.float64).reshape(shape)
        at += count
        if name.endswith("o_proj.bias"):
            found[name] = torch.zeros(shape, dtype=torch.float64)
    return found


def interleave(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """(x0 .. xD/2-1, y0 .. yD/2-1) to (x0, y0, x1, y1, ..) within each head."""
    heads = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(rows.shape)


def nanotron_weights(
    weights: Mapping[str, torch.Tensor], spec: ModelSpec, interleaved: bool
) -> dict[str, torch.Tensor]:
    """nanotron's parameters by its documentation (shared oracle's README): [q; k; v] and [gate; up]."""

    def rotary(rows: torch.Tensor) -> torch.Tensor:
        return interleave(rows, spec.head_size) if interleaved else rows

    found = {
        "model.token_position_embeddings.pp_block.token_embedding.weight": weights["model.embed_tokens.weight"],
        "model.final_layer_norm.pp_block.weight": weights["model.norm.weight"],
    }
    for i in range(spec.num_layers):
        hf, native = f"model.layers.{i}.", f"model.decoder.{i}.pp_block."
        for kind in ("weight", "bias") if spec.attention_bias else ("weight",):
            q, k, v = (weights[f"{hf}self_attn.{part}_proj.{kind}"] for part in "qkv")
            found[f"{native}attn.qkv_proj.{kind}"] = torch.cat([rotary(q), rotary(k), v])
        found[f"{native}attn.o_proj.weight"] = weights[f"{hf}self_attn.o_proj.weight"]
        gate, up = weights[f"{hf}mlp.gate_proj.weight"], weights[f"{hf}mlp.up_proj.weight"]
        found[f"{native}mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        found[f"{native}mlp.down_proj.weight"] = weights[f"{hf}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{native}{norm}.weight"] = weights[f"{hf}{norm}.weight"]
    if not spec.tied:
        found["model.lm_head.pp_block.weight"] = weights["lm_head.weight"]
    return found


def nanotron_shard(name: str, whole: torch.Tensor, spec: ModelSpec, tp: int, rank: int) -> torch.Tensor:
    """One rank's part: its q, its k and its v; its gate and its up; columns of o and down; rows of the vocabulary."""
    if "norm" in name:
        return whole
    if "o_proj" in name or "down_proj" in name:
        return whole.chunk(tp, dim=1)[rank]
    sizes = [len(whole)]
    if "qkv_proj" in name:
        sizes = [spec.query_rows, spec.kv_rows, spec.kv_rows]
    elif "gate_up_proj" in name:
        sizes = [spec.intermediate_size] * 2
    return torch.cat([part.chunk(tp)[rank] for part in whole.split(sizes)])


def same(found: Mapping[str, LazyTensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(to_torch(found[name]), expected[name]) for name in expected)


def literals(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: literal(tensor) for name, tensor in tensors.items()}


# --- tables ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(nanotron_specs(max_layers=4), PAIRS)
def test_the_table_makes_nanotrons_tensors(spec, interleaved):
    weights = weights_of(spec)
    layout = nanotron_table(spec, interleaved).to_layout(literals(weights), "here", is_zero)
    assert same(layout, nanotron_weights(weights, spec, interleaved))


@settings(max_examples=60, deadline=None)
@given(nanotron_specs(max_layers=4), PAIRS)
def test_the_table_takes_nanotrons_tensors_back_in_canonical_order(spec, interleaved):
    weights = weights_of(spec)
    found = nanotron_table(spec, interleaved).to_canonical(
        literals(nanotron_weights(weights, spec, interleaved)), "here"
    )
    assert same(found, weights)
    assert list(found) == list(weights)


@pytest.mark.parametrize("tp", [1, 2, 4])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), interleaved=PAIRS)
def test_cut_over_ranks_and_joined_again_every_tensor_is_itself(tp, data, interleaved):
    spec = data.draw(nanotron_specs(max_layers=3, tp=tp))
    spec = replace(spec, vocab_size=spec.vocab_size * tp)
    weights, table = weights_of(spec), nanotron_table(spec, interleaved)
    joined = {}
    for name, whole in table.to_layout(literals(weights), "here", is_zero).items():
        cut = tensor_parallel(name, spec)
        if cut is None:
            joined[name] = whole
            continue
        shards = []
        for rank in range(tp):
            pairs = slice_pairs(cut, whole.shape[cut.dim], tp, rank)
            shard = cut_shard(whole, pairs)
            assert torch.equal(to_torch(shard), nanotron_shard(name, to_torch(whole), spec, tp, rank))
            text = format_slices(pairs, cut, len(whole.shape))
            shards.append((literal(to_torch(shard)), parse_slices(text, shard.shape, whole.shape, name)))
        joined[name] = join_shards(shards, whole.shape, name)
    assert same(table.to_canonical(joined, "here"), weights)


@settings(max_examples=200, deadline=None)
@given(nanotron_specs(max_layers=30), st.integers(1, 4))
def test_every_parameter_has_one_pipeline_rank_and_a_tied_head_a_second_copy_last(spec, pp):
    names = [rule.layout for rule in nanotron_table(spec).rules]
    try:
        ranks = pipeline_ranks(spec, pp)
    except UsageError:
        return  # a rank would be empty
    by_rank = [parameters_of_rank(names, ranks, rank, tied=spec.tied) for rank in range(pp)]
    copies = [name for mine in by_rank[1:] for name in mine if name == EMBEDDING]
    assert [name for mine in by_rank for name in mine if mine is by_rank[0] or name != EMBEDDING] == sorted(
        names, key=lambda name: (ranks[block_of(name)], names.index(name))
    )
    assert len(copies) == (spec.tied and ranks["head"] > 0)
    assert not copies or by_rank[ranks["head"]][-1] == EMBEDDING


@settings(max_examples=30, deadline=None)
@given(nanotron_specs(max_layers=3))
def test_hugging_face_names_are_canonical(spec):
    weights = literals(weights_of(spec))
    table = huggingface.weight_table(spec)
    assert table.to_layout(weights, "here", is_zero) == weights == table.to_canonical(weights, "here")


def test_old_rotary_buffers_are_dropped_for_a_stated_reason():
    table = huggingface.weight_table(tiny())
    weights = literals(weights_of(tiny()))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": literal(torch.ones(2)) for i in range(4)}
    assert table.to_canonical({**weights, **buffers}, "here") == weights
    assert all(table.dropped.values())


def test_key_rows_are_reordered_over_their_own_heads_not_the_queries():
    # H = 6, K = 2, D = 4: rows of k are two heads of four; as six heads they would not even divide.
    spec = tiny(num_layers=1)
    weights = weights_of(spec)
    k = weights["model.layers.0.self_attn.k_proj.weight"]
    layout = nanotron_table(spec, interleaved=True).to_layout(literals(weights), "here", is_zero)
    fused = to_torch(layout["model.decoder.0.pp_block.attn.qkv_proj.weight"])
    assert torch.equal(fused[24:32], k[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_layers_without_rope_are_reordered_like_the_others():
    spec = tiny("smollm3")
    weights = weights_of(spec)
    layout = nanotron_table(spec, interleaved=True).to_layout(literals(weights), "here", is_zero)
    fused = to_torch(layout["model.decoder.3.pp_block.attn.qkv_proj.weight"])
    assert torch.equal(fused[:24], interleave(weights["model.layers.3.self_attn.q_proj.weight"], 4))


# --- operations ------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 5)


@given(SIZES, SIZES)
def test_renaming_changes_nothing(rows, columns):
    tensor = literal(torch.rand(rows, columns))
    assert Rename().to_canonical(Rename().to_layout([tensor])) == (tensor,)


@given(SIZES, st.sampled_from([2, 4, 6]), st.sampled_from([(), (3,)]))
def test_rotary_pairs_there_and_back_is_the_identity(heads, head_size, columns):
    value = torch.rand(heads * head_size, *columns)
    op = RotaryPairs(head_size)
    layout = literal(to_torch(op.to_layout([literal(value)])))
    assert torch.equal(to_torch(layout), interleave(value, head_size))
    (back,) = op.to_canonical(layout)
    assert torch.equal(to_torch(back), value)


@given(SIZES, SIZES, PAIRS)
def test_joined_rows_part_again_each_through_its_own_operation(heads, kv_heads, interleaved):
    rotary = RotaryPairs(4) if interleaved else Rename()
    parts = [torch.rand(rows, 3) for rows in (heads * 4, kv_heads * 4, kv_heads * 4)]
    op = JoinRows(tuple(len(part) for part in parts), (rotary, rotary, Rename()))
    fused = literal(to_torch(op.to_layout([literal(part) for part in parts])))
    assert all(torch.equal(to_torch(back), part) for back, part in zip(op.to_canonical(fused), parts, strict=True))


@given(SIZES, st.integers(0, 4), SIZES)
def test_padding_is_zero_and_comes_off_again(rows, padding, columns):
    value = torch.rand(rows, columns)
    op = PadVocabulary(rows, rows + padding)
    padded = to_torch(op.to_layout([literal(value)]))
    assert torch.equal(padded, torch.cat([value, torch.zeros(padding, columns)]))
    (back,) = op.to_canonical(literal(padded))
    assert torch.equal(to_torch(back), value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: JoinRows((2, 3)).to_layout([literal(torch.zeros(3, 1)), literal(torch.zeros(2, 1))]),
        lambda: JoinRows((2, 3)).to_canonical(literal(torch.zeros(6, 1))),
        lambda: PadVocabulary(3, 4).to_layout([literal(torch.zeros(4, 1))]),
        lambda: PadVocabulary(3, 4).to_canonical(literal(torch.zeros(3, 1))),
        lambda: PadVocabulary(4, 3).to_layout([literal(torch.zeros(4, 1))]),
    ],
)
def test_other_row_counts_are_refused(wrong):
    with pytest.raises(ShapeMismatch):
        wrong()


# --- accounting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to_canonical", "to_layout"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_name_that_is_missing_is_named(direction, data):
    spec = data.draw(nanotron_specs(max_layers=2))
    found, convert = account(direction, spec)
    required = [name for name in found if not name.endswith("o_proj.bias")]
    lost = data.draw(st.sampled_from(sorted(required)))
    del found[lost]
    with pytest.raises(NameMismatch, match="1 missing") as error:
        convert(found)
    assert lost in str(error.value)


@pytest.mark.parametrize("direction", ["to_canonical", "to_layout"])
def test_a_name_that_nobody_claims_is_named(direction):
    found, convert = account(direction, tiny())
    with pytest.raises(NameMismatch, match=r"1 unexpected \(model.extra.weight\)"):
        convert({**found, "model.extra.weight": literal(torch.zeros(1))})


@pytest.mark.parametrize("direction", ["to_canonical", "to_layout"])
def test_a_tied_model_with_a_head_of_its_own_is_refused(direction):
    found, convert = account(direction, tiny())
    head = {"to_canonical": "model.lm_head.pp_block.weight", "to_layout": "lm_head.weight"}[direction]
    with pytest.raises(NameMismatch, match="lm_head"):
        convert({**found, head: literal(torch.zeros(32, 24))})


@pytest.mark.parametrize("direction", ["to_canonical", "to_layout"])
def test_a_shape_that_contradicts_the_config_is_named(direction):
    found, convert = account(direction, tiny())
    name = next(iter(found))
    with pytest.raises(ShapeMismatch, match=r"\[31, 24\] in the file but \[32, 24\] by the config"):
        convert({**found, name: literal(torch.zeros(31, 24))})


def account(direction: str, spec: ModelSpec):
    """All tensors of one side, and the conversion to the other."""
    table, weights = nanotron_table(spec), weights_of(spec)
    if direction == "to_layout":
        return literals(weights), lambda found: table.to_layout(found, "here", is_zero)
    native = nanotron_weights(weights, spec, interleaved=False)
    return literals(native), lambda found: table.to_canonical(found, "here")


def test_a_table_that_names_a_parameter_twice_or_not_at_all_cannot_be_made():
    shapes = {"a": (1,), "b": (1,)}
    for rules in ([Rule(("a",), "x"), Rule(("a",), "y"), Rule(("b",), "z")], [Rule(("a",), "x")]):
        with pytest.raises(AssertionError):
            WeightTable(rules=tuple(rules), shapes=shapes)


def test_a_table_that_uses_a_layout_name_twice_cannot_be_made():
    with pytest.raises(AssertionError):
        WeightTable(rules=(Rule(("a",), "x"), Rule(("b",), "x")), shapes={"a": (1,), "b": (1,)})


def test_an_output_bias_that_is_not_zero_cannot_be_held():
    spec = tiny("smollm3", attention_bias=True)
    weights = weights_of(spec)
    weights["model.layers.1.self_attn.o_proj.bias"][3] = 1e-30
    with pytest.raises(NameMismatch, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        nanotron_table(spec).to_layout(literals(weights), "here", is_zero)


def test_an_output_bias_comes_back_as_zeros():
    spec = tiny("smollm3", attention_bias=True)
    native = nanotron_weights(weights_of(spec), spec, interleaved=False)
    found = nanotron_table(spec).to_canonical(literals(native), "here")
    assert is_zero(found["model.layers.2.self_attn.o_proj.bias"])


# --- slices ----------------------------------------------------------------------------------------------------------


def test_shards_that_leave_a_gap_or_overlap_are_refused():
    cut = tensor_parallel("model.decoder.0.pp_block.attn.qkv_proj.weight", tiny())
    first, second = (slice_pairs(cut, 40, 2, rank) for rank in (0, 1))
    shard = literal(torch.zeros(20, 24))
    for pair in ((first, first), (second, second)):
        with pytest.raises(ShapeMismatch, match="do not cover"):
            join_shards([(shard, pair[0]), (shard, pair[1])], (40, 24), "here")
    with pytest.raises(ShapeMismatch):
        join_shards([(shard, first)], (40, 24), "here")
