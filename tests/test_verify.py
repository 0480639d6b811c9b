"""What verify promises: true pairs pass, and each planted error is noticed, in the tier and the module where it lies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from hf_models import edited, llama, rope, saved, smollm3
from hypothesis import given
from hypothesis import strategies as st
from lazy import literal
from nanotron_folders import run_differences, step_folder
from test_round_trips import as_interleaved

import smolconv
from smolconv.conversion import ConversionPlan
from smolconv.errors import ParityFailed, SourceChanged, UnsupportedModel, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.models import nanotron as nanotron_models
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.operations import JoinRows, Rename
from smolconv.models.spec import ModelSpec
from smolconv.models.weights import Rule
from smolconv.tensors.lazy import LazyTensor, join, row_slice
from smolconv.verification.compare import AsStored, VerifyOptions, VerifyReport, verify_checkpoints, verify_conversion
from smolconv.verification.logits import _largest, _limits
from smolconv.verification.tensors import compare_tensors, forward_order, module_of

NANOTRON = FIXTURES / "nanotron"
SMOLLM2, SMOLLM3, BF16 = (NANOTRON / name for name in ("smollm2-tiny", "smollm3-tiny", "smollm3-tiny-bf16"))
NATIVE, HF = SMOLLM3 / "tp2-pp1-dp2-zero1", SMOLLM3 / "expected_hf"
LAYER = "model.layers.{}.{}.weight"


def verify(a: Path, b: Path, **options: Any) -> VerifyReport:
    """As the command does: each side's own forward runs on the folder."""
    read = ReadOptions(optimizer=options.get("optimizer", False))
    left, right = (read_checkpoint(folder, read) for folder in (a, b))
    stored = (AsStored(folder=a, options=read), AsStored(folder=b, options=read))
    return verify_checkpoints(left, right, VerifyOptions(**{"length": 64, **options}), stored=stored)


def tiers(report: VerifyReport) -> dict[str, bool]:
    """Which tiers passed."""
    found = {"spec": not report.spec_differences, "tensors": report.tensors.passed}
    return found | ({} if report.logits is None else {"logits": report.logits.passed})


# --- true pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (SMOLLM2 / "tp2-pp2-dp1-zero0", SMOLLM2 / "expected_hf"),
        (SMOLLM2 / "expected_hf", SMOLLM2 / "tp1-pp1-dp1-zero0"),
        (NATIVE, HF),
        (NATIVE, SMOLLM3 / "tp1-pp2-dp1-zero0"),
        (BF16 / "tp2-pp1-dp1-zero0", BF16 / "expected_hf"),
    ],
    ids=["smollm2 to hf", "hf to smollm2", "smollm3 to hf", "topologies", "bf16"],
)
def test_the_same_model_passes_in_every_tier(a, b):
    report = verify(a, b)
    assert report.passed and report.first_divergence is None
    assert tiers(report) == {"spec": True, "tensors": True, "logits": True}
    assert report.logits.max_abs < 1e-6


def test_the_same_optimizer_passes_across_topologies():
    report = verify(NATIVE, SMOLLM3 / "tp1-pp2-dp1-zero0", optimizer=True, logits=False)
    assert report.passed
    assert {slot: r.equal for slot, r in report.optimizer.items()} == {"exp_avg": 74, "exp_avg_sq": 74}


def test_a_report_is_plain_json():
    document = verify(NATIVE, HF).to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["schema"], document["passed"], document["first_divergence"]) == (1, True, None)
    assert set(document["gates"]) == {"max_abs", "kl", "top1"}


@pytest.mark.parametrize("a", [NATIVE, HF], ids=["nanotron", "hf"])
def test_layers_are_listed_in_forward_order_and_finer_than_modules(a):
    layers = verify(a, HF).to_json()["layers"]
    block = [
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.attention",
        "self_attn", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp",
    ]  # fmt: skip
    blocks = [f"model.layers.{i}.{part}" for i in range(8) for part in block]
    assert [layer["module"] for layer in layers] == ["model.embed_tokens", *blocks, "model.norm"]
    assert not any(layer["diverged"] for layer in layers)
    assert max(layer["max_abs"] for layer in layers) < 1e-5


def test_the_report_says_whose_forwards_ran():
    ours, theirs = "smolconv's own forward on nanotron's tensors", "transformers on the folder"
    assert verify(NATIVE, HF).logits.forwards == (ours, theirs)
    assert verify(NATIVE, HF, engine="transformers").logits.forwards == (
        "transformers on the nanotron checkpoint's canonical tensors", theirs,
    )  # fmt: skip


# --- planted errors --------------------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]
HEAD_SIZE = 8


def exchange(weights: Weights, one: str, other: str) -> None:
    weights[one], weights[other] = weights[other], weights[one]


def swap_gate_and_up(weights: Weights) -> None:
    exchange(weights, LAYER.format(1, "mlp.gate_proj"), LAYER.format(1, "mlp.up_proj"))


def swap_norms_of_two_layers(weights: Weights) -> None:
    exchange(weights, LAYER.format(0, "input_layernorm"), LAYER.format(2, "input_layernorm"))


def swap_two_layers(weights: Weights) -> None:
    for name in [name for name in weights if name.startswith("model.layers.4.")]:
        exchange(weights, name, name.replace(".4.", ".5."))


def flip_heads(*parts: str, layers: tuple[int, ...]) -> Callable[[Weights], None]:
    """Turn the rows of every head around, in these projections."""

    def edit(weights: Weights) -> None:
        for name in (LAYER.format(i, f"self_attn.{part}_proj") for i in layers for part in parts):
            rows = weights[name]
            weights[name] = rows.view(-1, HEAD_SIZE, rows.shape[1]).flip(1).reshape(rows.shape)

    return edit


def interleave_queries(weights: Weights) -> None:
    name = LAYER.format(2, "self_attn.q_proj")
    pairs = weights[name].view(-1, 2, HEAD_SIZE // 2, weights[name].shape[1])
    weights[name] = pairs.transpose(1, 2).reshape(weights[name].shape)


def rotate_query_rows(weights: Weights) -> None:
    name = LAYER.format(0, "self_attn.q_proj")
    weights[name] = weights[name].roll(1, dims=0)


def swap_two_kv_heads(weights: Weights) -> None:
    for part in "kv":
        heads = weights[LAYER.format(1, f"self_attn.{part}_proj")].unflatten(0, (-1, HEAD_SIZE))
        heads[[0, 1]] = heads[[1, 0]]


def exchange_value_heads(weights: Weights) -> None:
    name = LAYER.format(5, "self_attn.v_proj")
    weights[name] = weights[name].roll(HEAD_SIZE, dims=0)


def transpose_output(weights: Weights) -> None:
    name = LAYER.format(6, "self_attn.o_proj")
    weights[name] = weights[name].T.contiguous()


def shift_tokens(weights: Weights) -> None:
    name = "model.embed_tokens.weight"
    weights[name] = weights[name].roll(1, dims=0)


def swap_two_unused_tokens(weights: Weights) -> None:
    # Of a tied embedding: the rows of the head are wrong too.
    rows = weights["model.embed_tokens.weight"]
    rows[[250, 251]] = rows[[251, 250]]


def round_to_bfloat16(weights: Weights) -> None:
    weights.update({name: tensor.bfloat16().float() for name, tensor in weights.items()})


PLANTED: dict[str, tuple[Callable[[Weights], None], str]] = {
    "gate and up swapped": (swap_gate_and_up, "model.layers.1.mlp"),
    "norms of two layers swapped": (swap_norms_of_two_layers, "model.layers.0.input_layernorm"),
    "two layers swapped": (swap_two_layers, "model.layers.4.input_layernorm"),
    "q rows rotated": (rotate_query_rows, "model.layers.0.self_attn"),
    "q interleaved, k not": (interleave_queries, "model.layers.2.self_attn"),
    "q and k turned together": (flip_heads("q", "k", layers=(0, 1, 2)), "model.layers.0.self_attn"),
    "kv heads swapped": (swap_two_kv_heads, "model.layers.1.self_attn"),
    "v heads exchanged": (exchange_value_heads, "model.layers.5.self_attn"),
    "o_proj transposed": (transpose_output, "model.layers.6.self_attn"),
    "tokens shifted": (shift_tokens, "model.embed_tokens"),
    "bf16 passed off as fp32": (round_to_bfloat16, "model.embed_tokens"),
}


@pytest.mark.parametrize(("edit", "module"), PLANTED.values(), ids=PLANTED)
def test_a_misplaced_weight_is_caught_by_tensors_and_by_logits_in_its_module(edit, module, tmp_path):
    report = verify(NATIVE, edited(HF, tmp_path / "planted", edit))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == report.logits.first_divergence == module
    assert module_of(report.tensors.first) == module


PARTS = [
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


@pytest.mark.parametrize("layer", [3, 7])
@pytest.mark.parametrize("part", PARTS)
def test_any_parameter_of_a_layer_that_is_in_another_order_is_named_by_logits_from_either_side(part, layer, tmp_path):
    name = LAYER.format(layer, part)

    def edit(weights: Weights) -> None:
        weights[name] = weights[name].flip(0) if "norm" in name else weights[name].roll(1, dims=0)

    planted = edited(HF, tmp_path / "planted", edit)
    for report in (verify(NATIVE, planted), verify(planted, NATIVE)):
        assert not report.logits.passed
        assert report.logits.first_divergence == module_of(name)


def test_rows_of_tokens_that_do_not_occur_are_caught_at_the_tied_head(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(40))
    report = verify(
        NATIVE, edited(HF, tmp_path / "planted", swap_two_unused_tokens), tokens=tmp_path / "ids.npy"
    )  # fmt: skip
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert (report.first_divergence, report.logits.first_divergence) == ("model.embed_tokens", "lm_head")


def test_rows_reordered_where_logits_cannot_see_it_are_caught_by_tensors(tmp_path):
    # Layers 3 and 7 have no rotary embedding: reordering q and k together inside heads leaves every q.k as it was.
    report = verify(NATIVE, edited(HF, tmp_path / "planted", flip_heads("q", "k", layers=(3, 7))))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": True}
    assert report.first_divergence == "model.layers.3.self_attn"


def one_ulp(weights: Weights) -> None:
    norm = weights["model.norm.weight"]
    norm[0] = torch.nextafter(norm[0], torch.tensor(torch.inf))


def one_bit(weights: Weights) -> None:
    weights[LAYER.format(2, "self_attn.k_proj")].view(torch.int32)[5, 7] ^= 1


@pytest.mark.parametrize(
    ("edit", "module"), [(one_ulp, "model.norm"), (one_bit, "model.layers.2.self_attn")], ids=["ulp", "bit"]
)
def test_the_smallest_change_of_one_weight_is_caught_by_tensors(edit, module, tmp_path):
    report = verify(NATIVE, edited(HF, tmp_path / "planted", edit))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": True}
    assert (report.tensors.compared - report.tensors.equal, report.first_divergence) == (1, module)
    assert 0 < report.tensors.max_abs < 1e-6


def with_config(source: Path, target: Path, **fields: Any) -> Path:
    """A copy whose config.json, or nanotron's model_config.json, says something else."""
    shutil.copytree(source, target)
    path = target / "config.json" if (target / "config.json").is_file() else step_folder(target) / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


ATTENTION, NORM = "model.layers.{}.self_attn", "model.layers.0.input_layernorm"


@pytest.mark.parametrize(
    ("fields", "named", "module"),
    [
        ({"rope_theta": 12345.0}, "rope_theta", ATTENTION.format(0)),
        ({"no_rope_layers": [0, 0, 0, 1, 0, 0, 0, 1]}, "use_rope", ATTENTION.format(0)),
        ({"no_rope_layers": [1] * 8}, "use_rope", ATTENTION.format(3)),
        ({"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 1]}, "use_rope", ATTENTION.format(7)),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps", NORM),  # for 1e-6
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling", ATTENTION.format(0)),
        ({"hidden_act": "gelu"}, "activation", "model.layers.0.mlp"),
    ],
    ids=["theta", "NoPE inverted", "NoPE off", "NoPE off in one layer", "eps", "rope scaling", "activation"],
)
def test_a_config_that_changes_the_function_is_caught_by_the_spec_and_by_logits(fields, named, module, tmp_path):
    report = verify(NATIVE, with_config(HF, tmp_path / "planted", **fields))
    assert tiers(report) == {"spec": False, "tensors": True, "logits": False}
    assert named in report.reason
    assert report.first_divergence == module


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"beta_fast": 32, "beta_slow": 1.0}, True),
        ({"attention_factor": None, "mscale": None}, True),
        ({"beta_fast": 16}, False),
        ({"attention_factor": 1.0}, False),  # yarn's own is 1.14
        ({"truncate": False}, False),
    ],
    ids=str,
)
def test_a_rotary_embedding_with_its_defaults_spelled_out_is_the_same(fields, same, tmp_path):
    source = saved(llama(**rope(1e4, YARN)), tmp_path / "hf")
    spelled = saved(llama(**rope(1e4, {**YARN, **fields})), tmp_path / "spelled")
    found = verify(source, spelled, logits=False).spec_differences
    assert [line.partition(":")[0] for line in found] == ([] if same else ["rope_scaling"])


def test_theta_of_smollm_1_for_that_of_smollm_2_fails_with_default_settings(tmp_path):
    run = with_config(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "run", rope_theta=100_000.0)  # and 10,000 in HF's
    left, right = read_checkpoint(run), read_checkpoint(SMOLLM2 / "expected_hf")
    report = verify_checkpoints(left, right, stored=(AsStored(folder=run), AsStored(folder=right.root)))
    assert tiers(report) == {"spec": False, "tensors": True, "logits": False}
    assert report.first_divergence == "model.layers.0.self_attn"
    assert report.spec_differences == ("rope_theta: 100000.0 in A, 10000.0 in B",)


def test_interleaved_rows_that_hugging_face_got_as_they_were_are_caught(tmp_path):
    run = with_config(SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "run", rope_interleaved=True)
    report = verify(run, HF)
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == "model.layers.0.self_attn"


def test_an_interleaved_model_is_the_same_as_its_hugging_face_form(tmp_path):
    assert verify(as_interleaved(SMOLLM3 / "tp1-pp2-dp1-zero0", tmp_path / "run"), HF).passed


# --- documents in a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(NATIVE, HF), (HF, NATIVE)], ids=["nanotron first", "hf first"])
def test_packed_documents_pass_where_both_sides_separate_them(a, b):
    report = verify(a, b, documents=4)
    assert report.passed and report.logits.documents == 4
    assert report.logits.gates["documents"].value < 1e-5


def test_a_document_mask_that_is_off_is_caught_where_documents_are_packed(tmp_path):
    run = with_config(NATIVE, tmp_path / "run", _use_doc_masking=False)
    assert verify(run, HF).passed
    for a, b in ((run, HF), (HF, run)):
        report = verify(a, b, documents=4)
        assert tiers(report) == {"spec": True, "tensors": True, "logits": False}
        assert report.first_divergence == "model.layers.0.self_attn"


def test_nanotrons_llama_which_mixes_documents_is_not_hugging_faces_on_packed_rows():
    report = verify(SMOLLM2 / "tp1-pp1-dp1-zero0", SMOLLM2 / "expected_hf", documents=3)
    assert tiers(report) == {"spec": True, "tensors": True, "logits": False}
    assert not report.logits.gates["documents"].passed


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_documents_of_one_token_each_have_nothing_to_predict_and_pass(compute):
    report = verify(NATIVE, HF, documents=64, compute=compute)
    assert report.passed, report.reason
    json.dumps(report.to_json(), allow_nan=False)


def test_two_runs_that_both_mix_documents_fail_by_the_gate_of_documents_alone(tmp_path):
    run = with_config(NATIVE, tmp_path / "run", _use_doc_masking=False)
    report = verify(run, run, documents=4)
    assert [name for name, gate in report.logits.gates.items() if not gate.passed] == ["documents"]


# --- heads and padding -----------------------------------------------------------------------------------------------


def untie(source: Path, target: Path, change: float) -> Path:
    """An HF folder with a head of its own: a copy of the embedding, or not quite."""

    def edit(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][3] += change

    return with_config(edited(source, target.with_name("weights"), edit), target, tie_word_embeddings=False)


@pytest.mark.parametrize("change", [0.0, 0.1], ids=["copy", "changed copy"])
def test_a_head_untied_on_one_side_is_another_model(change, tmp_path):
    report = verify(NATIVE, untie(HF, tmp_path / "untied", change))
    assert not report.passed and report.spec_differences and report.logits is None
    assert (report.tensors.unexpected, report.first_divergence) == (("lm_head.weight",), "lm_head")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A nanotron run whose head is its own, beside the HF folder that it was made from."""
    home = tmp_path_factory.mktemp("untied")
    convert(untie(SMOLLM2 / "expected_hf", home / "hf", 0.1), home / "run", "nanotron", tp=2, pp=2)
    return home / "run"


def test_a_head_of_its_own_that_was_changed_is_caught_at_the_head(untied, tmp_path):
    def swap(weights: Weights) -> None:
        weights["lm_head.weight"][[0, 200]] = weights["lm_head.weight"][[200, 0]]

    assert verify(untied, untied.with_name("hf")).passed
    report = verify(untied, edited(untied.with_name("hf"), tmp_path / "planted", swap))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == report.logits.first_divergence == "lm_head"


def test_an_untied_head_that_became_the_embedding_is_caught_at_the_head(untied, tmp_path):
    def tie(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    report = verify(untied, edited(untied.with_name("hf"), tmp_path / "planted", tie))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == "lm_head"


def test_padding_trimmed_on_one_side_only_is_another_model(tmp_path):
    convert(NATIVE, tmp_path / "hf", "hf", vocab_size=250)
    report = verify(NATIVE, tmp_path / "hf")
    assert not report.passed and report.logits is None
    assert "vocab_size" in report.reason
    assert report.first_divergence == "model.embed_tokens"


# --- errors of the mapping, made in both directions ------------------------------------------------------------------
# Whatever is read back through the same mapping agrees with itself; only a forward on the stored tensors can tell.


def swapped_gate_and_up(rules: Callable[[ModelSpec], tuple[Rule, ...]]) -> Callable[[ModelSpec], tuple[Rule, ...]]:
    def wrong(spec: ModelSpec) -> tuple[Rule, ...]:
        fused, down = rules(spec)
        return (replace(fused, canonical=fused.canonical[::-1]), down)

    return wrong


@dataclass(frozen=True)
class TurnedHeads:
    """An operation that is its own inverse: the rows of each head in the other order."""

    def to_layout(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        (part,) = parts
        rows = [row_slice(part, i, i + 1) for i in range(part.shape[0])]
        return join([row for i in range(0, len(rows), HEAD_SIZE) for row in rows[i : i + HEAD_SIZE][::-1]])

    def to_canonical(self, tensor: LazyTensor) -> tuple[LazyTensor, ...]:
        return (self.to_layout([tensor]),)


def turned_rows(parts: str) -> Callable[..., Callable[..., Rule]]:
    def wrapped(rule: Callable[..., Rule]) -> Callable[..., Rule]:
        def wrong(spec: ModelSpec, kind: str, *, interleaved: bool) -> Rule:
            inner = tuple(TurnedHeads() if part in parts else Rename() for part in "qkv")
            found = rule(spec, kind, interleaved=interleaved)
            assert isinstance(found.op, JoinRows)
            return replace(found, op=JoinRows(found.op.rows, inner))

        return wrong

    return wrapped


SYMMETRIC: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "gate and up": ("mlp_rules", swapped_gate_and_up, "model.layers.0.mlp"),
    "q rows": ("attention_rule", turned_rows("q"), "model.layers.0.self_attn"),
    "q and k rows": ("attention_rule", turned_rows("qk"), "model.layers.0.self_attn"),
    "v rows": ("attention_rule", turned_rows("v"), "model.layers.0.self_attn"),
}


@pytest.mark.parametrize(("name", "wrong", "module"), SYMMETRIC.values(), ids=SYMMETRIC)
@pytest.mark.parametrize("architecture", ["llama", "smollm3"])
def test_an_error_of_the_mapping_in_both_directions_is_caught_by_our_own_forward(
    architecture, name, wrong, module, tmp_path, monkeypatch
):
    run = SMOLLM2 / "tp1-pp1-dp1-zero0" if architecture == "llama" else NATIVE
    monkeypatch.setattr(nanotron_models, name, wrong(getattr(nanotron_models, name)))
    convert(run, tmp_path / "hf", "hf", optimizer=False)
    report = verify(run, tmp_path / "hf")
    assert tiers(report) == {"spec": True, "tensors": True, "logits": False}
    assert report.first_divergence == module
    # transformers on the tensors as the mapping reads them sees nothing.
    assert verify(run, tmp_path / "hf", engine="transformers").passed


def test_interleaved_rows_that_the_mapping_ignores_are_caught_by_our_own_forward(tmp_path, monkeypatch):
    run = as_interleaved(NATIVE, tmp_path / "run")
    monkeypatch.setattr("smolconv.layouts.nanotron.reader.nanotron_interleaved", lambda config, where="": False)
    convert(run, tmp_path / "hf", "hf", optimizer=False)
    report = verify(run, tmp_path / "hf")
    assert tiers(report) == {"spec": True, "tensors": True, "logits": False}
    assert report.first_divergence == "model.layers.0.self_attn"
    assert verify(run, tmp_path / "hf", engine="transformers").passed


def test_a_longer_context_is_another_spec_but_the_same_function(tmp_path):
    report = verify(NATIVE, with_config(HF, tmp_path / "planted", max_position_embeddings=128))
    assert tiers(report) == {"spec": False, "tensors": True, "logits": True}
    assert report.first_divergence is None and not report.passed


def test_models_of_other_shapes_are_told_apart_without_running_them():
    report = verify(NATIVE, SMOLLM2 / "expected_hf")
    assert not report.passed and report.logits is None
    assert report.spec_differences and not report.tensors.passed


def test_nan_is_a_difference(tmp_path):
    def poisoned(weights: Weights) -> None:
        weights[LAYER.format(4, "mlp.down_proj")][0, 0] = torch.nan

    report = verify(NATIVE, edited(HF, tmp_path / "planted", poisoned))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == "model.layers.4.mlp"
    assert "NaN" not in json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("row", [3, 700])
def test_nan_at_any_position_is_the_largest_difference(row):
    a, b = torch.zeros(1, 1024, 4), torch.ones(1, 1024, 4)
    b[0, row] = torch.nan
    assert np.isnan(_largest(a, b))
    assert _largest(a, torch.ones_like(a)) == 1


def test_the_same_nan_on_both_sides_is_no_difference_of_tensors():
    weights = {"model.norm.weight": literal(torch.tensor([1.0, torch.nan]))}
    assert compare_tensors(weights, weights).passed


def test_equal_infinities_do_not_hide_by_how_much_others_differ():
    a, b = ({"model.norm.weight": literal(torch.tensor([torch.inf, x, -torch.inf]))} for x in (1.0, 3.5))
    report = compare_tensors(a, b)
    assert (report.max_abs, report.worst, report.overflowed) == (2.5, "model.norm.weight", ())


def test_zeros_of_other_signs_are_named_as_what_they_are(tmp_path):
    def zero(value: float) -> Callable[[Weights], None]:
        return lambda weights: weights["model.norm.weight"].__setitem__(3, value)

    plus, minus = (edited(HF, tmp_path / str(value), zero(value)) for value in (0.0, -0.0))
    report = verify(plus, minus, logits=False)
    assert not report.passed and report.reason.startswith("1 of 74 tensors differ")
    assert "all differences are signs of zeros" in report.reason


POISONED = ["model.embed_tokens.weight", *(LAYER.format(4, part) for part in PARTS), "model.norm.weight"]


def poisoned_with(value: float, name: str) -> Callable[[Weights], None]:
    def edit(weights: Weights) -> None:
        weights[name].view(-1)[9] = value

    return edit


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", POISONED)
def test_a_model_that_is_not_finite_is_converted_and_is_the_same_as_itself(value, name, tmp_path):
    source = edited(HF, tmp_path / "hf", poisoned_with(value, name))
    result = convert(source, tmp_path / "run", "nanotron", verifier=verified)
    assert result.verification["passed"] and result.verification["first_divergence"] is None
    report = verify(source, tmp_path / "run")
    assert report.passed and report.logits is None and "left out" in report.reason


@pytest.mark.parametrize("fields", [{"rope_theta": 12345.0}, {"rms_norm_eps": 1e-5}], ids=["theta", "eps"])
@pytest.mark.parametrize("name", [POISONED[0], POISONED[-2]])
def test_another_function_of_the_same_tensors_that_are_not_finite_still_fails(name, fields, tmp_path):
    source = edited(HF, tmp_path / "hf", poisoned_with(torch.nan, name))
    report = verify(source, with_config(source, tmp_path / "planted", **fields))
    assert report.tensors.passed and report.spec_differences and not report.passed


def test_an_error_of_the_mapping_before_what_is_not_finite_is_still_caught_by_logits(tmp_path, monkeypatch):
    source = edited(HF, tmp_path / "hf", poisoned_with(torch.nan, LAYER.format(4, "mlp.down_proj")))
    monkeypatch.setattr(nanotron_models, "mlp_rules", swapped_gate_and_up(nanotron_models.mlp_rules))
    convert(source, tmp_path / "run", "nanotron", optimizer=False)
    report = verify(source, tmp_path / "run")
    assert tiers(report) == {"spec": True, "tensors": True, "logits": False}
    assert report.first_divergence == "model.layers.0.mlp"


def test_tensors_that_differ_fail_where_neither_side_is_finite(tmp_path):
    name = LAYER.format(4, "mlp.down_proj")
    a, b = (edited(HF, tmp_path / str(value), poisoned_with(value, name)) for value in (torch.nan, torch.inf))
    assert tiers(verify(a, b)) == {"spec": True, "tensors": False, "logits": False}


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The fixture as an HF folder with its Adam state."""
    folder = tmp_path_factory.mktemp("trained") / "hf"
    convert(NATIVE, folder, "hf")
    return folder


def changed_file(folder: Path, target: Path, pattern: str) -> Path:
    """A copy in which the last byte of one file is another."""
    shutil.copytree(folder, target)
    (path,) = target.glob(pattern)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return target


@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq"])
def test_a_changed_moment_is_caught_when_optimizers_are_compared(slot, trained, tmp_path):
    other = changed_file(trained, tmp_path / "other", f"smolconv_state/{slot}-*.safetensors")
    report = verify(NATIVE, other, optimizer=True, logits=False)
    assert not report.passed
    assert {name: r.compared - r.equal for name, r in report.optimizer.items() if not r.passed} == {slot: 1}
    assert verify(NATIVE, other, logits=False).passed


def edit_state(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    path = target / "smolconv_state/state.json"
    state = json.loads(path.read_text())
    edit(state["optimizer"])
    path.write_text(json.dumps(state))
    return target


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.5), ("weight_decay", 0.3), ("eps", 1e-3), ("betas", [0.9, 0.999])], ids=str
)
def test_a_changed_hyperparameter_is_caught(key, value, trained, tmp_path):
    other = edit_state(
        trained, tmp_path / "other", lambda state: state["groups"][1]["hyperparameters"].update({key: value})
    )
    report = verify(NATIVE, other, optimizer=True, logits=False)
    assert not report.passed
    assert key in report.reason


def test_a_changed_adam_step_is_caught(trained, tmp_path):
    other = edit_state(trained, tmp_path / "other", lambda state: state["steps"].update({"model.norm.weight": 4.0}))
    report = verify(NATIVE, other, optimizer=True, logits=False)
    assert report.optimizer_differences == ("model.norm.weight: Adam step 3 in A, 4 in B",)


def test_an_optimizer_on_one_side_only_is_caught(tmp_path):
    convert(NATIVE, tmp_path / "weights", "hf", optimizer=False)
    report = verify(NATIVE, tmp_path / "weights", optimizer=True, logits=False)
    assert "only A has an optimizer" in report.optimizer_differences
    assert not report.passed
    assert "74 are missing and 0 unexpected; first model.embed_tokens.weight" in report.reason


# --- what is no difference of the models ---


def beside(source: Path, target: Path, name: str, **fields: Any) -> Path:
    """A copy with fields changed or added in one of its documents."""
    shutil.copytree(source, target)
    document = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps({**document, **fields}, indent=7))
    return target


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("generation_config.json", {"eos_token_id": 77}, ["generation_config.json of A and B differ"]),
        ("config.json", {"eos_token_id": 77}, ["eos_token_id is 1 in A's config and 77 in B's"]),
        ("generation_config.json", {"transformers_version": "9"}, []),
        ("config.json", {"use_cache": False}, []),
    ],
    ids=["generation", "eos", "version", "cache"],
)
def test_other_documents_beside_equal_weights_pass_and_are_told(name, fields, told, tmp_path):
    report = verify(HF, beside(HF, tmp_path / "other", name, **fields), logits=False)
    assert report.passed
    assert [line.partition(",")[0] for line in report.warnings] == told
    assert report.to_json()["warnings"] == list(report.warnings)


def test_another_tokenizer_is_told(tmp_path):
    one, other = (with_tokenizer(HF, tmp_path / str(size), size) for size in (256, 257))
    assert verify(one, one, logits=False).warnings == ()
    assert verify(one, other, logits=False).warnings == (
        "tokenizer.json of A and B differ, which is no difference of the models.",
    )
    (other / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert verify(one, other, logits=False).passed


def test_another_step_of_equal_weights_is_told(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "other") / "smolconv_state/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "progress": {**state["progress"], "step": 4}}))
    report = verify(NATIVE, path.parents[1], logits=False, optimizer=True)
    assert report.passed
    assert report.warnings == ("A is of step 3, B of step 4, which verify does not judge.",)


def test_padding_that_smolconv_added_is_told_where_vocabularies_differ(tmp_path):
    source = saved(llama(vocab_size=63), tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", tp=2)
    report = verify(tmp_path / "run", source, logits=False)
    assert not report.passed and report.reason == "specs differ: vocab_size: 64 in A, 63 in B"
    (warning,) = report.warnings
    assert warning.startswith("A: the rows of its vocabulary from 63 on are padding that smolconv added")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    again = verify(tmp_path / "back", source, logits=False)
    assert again.passed and again.warnings == ()


def test_which_of_two_checkpoints_in_a_folder_was_compared_is_told(cli, tmp_path):
    both = shutil.copytree(NATIVE, tmp_path / "both")
    shutil.copytree(HF, both, dirs_exist_ok=True)
    done = cli("verify", HF, both, "--tensors-only", "--json")
    (warning,) = json.loads(done.stdout)["warnings"]
    assert done.code == 0 and f"warning: {warning}" in done.stderr
    assert warning.startswith("B: the folder holds Hugging Face files, too: those of nanotron are read")


def test_a_checkpoint_that_changes_while_it_is_compared_has_no_verdict(tmp_path):
    changing = shutil.copytree(HF, tmp_path / "hf")

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: os.utime(changing / "model.safetensors", (1, 1))

    with pytest.raises(SourceChanged, match="was written to while it was compared"):
        smolconv.verify(HF, changing, logits=False, bar=bar)


# --- tokens and gates ------------------------------------------------------------------------------------------------


def test_token_ids_can_be_given(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(10))
    report = verify(NATIVE, HF, tokens=tmp_path / "ids.npy", length=10)
    assert (report.logits.positions, report.logits.tokens_from) == (10, str(tmp_path / "ids.npy"))


def test_token_ids_beyond_the_vocabulary_are_a_usage_error(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([1, 256]))
    with pytest.raises(UsageError, match="256"):
        verify(NATIVE, HF, tokens=tmp_path / "ids.npy")


def test_positions_stay_within_the_context():
    assert verify(NATIVE, HF, length=10_000).logits.positions == 64


def test_a_gate_of_ones_own_can_fail_a_true_pair_and_pass_a_false_one(tmp_path):
    other = edited(HF, tmp_path / "planted", rotate_query_rows)
    strict = verify(NATIVE, SMOLLM3 / "tp1-pp2-dp1-zero0", gates={"max_abs": -1.0})
    loose = verify(NATIVE, other, gates={"max_abs": 1e9, "kl": 1e9, "top1": 0.0})
    assert (strict.logits.passed, strict.passed) == (False, False)
    assert (loose.logits.passed, loose.passed) == (True, False)


@given(st.permutations(sorted(parameter_shapes(read_checkpoint(NATIVE).spec))))
def test_forward_order_puts_embedding_first_layers_by_number_and_the_head_last(names):
    modules = list(dict.fromkeys(module_of(name) for name in sorted([*names, "lm_head.weight"], key=forward_order)))
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    layers = [f"model.layers.{i}.{part}" for i in range(8) for part in parts]
    assert modules == ["model.embed_tokens", *layers, "model.norm", "lm_head"]


# --- convert --verify ------------------------------------------------------------------------------------------------


def verified(plan: ConversionPlan, folder: Path) -> Mapping[str, Any]:
    """As ``convert --verify`` does."""
    return verify_conversion(plan.prepared, folder).to_json()


CONVERSIONS: dict[str, tuple[Path, str, dict[str, Any]]] = {
    "to hf": (NATIVE, "hf", {}),
    "to hf in bf16": (NATIVE, "hf", {"dtype": "bfloat16"}),
    "to hf from master": (BF16 / "tp2-pp1-dp1-zero0", "hf", {"dtype": "float32"}),
    "to hf without padding": (NATIVE, "hf", {"vocab_size": 250}),
    "to nanotron": (SMOLLM2 / "expected_hf", "nanotron", {"tp": 2, "pp": 2}),
    "to another topology": (NATIVE, "nanotron", {"pp": 2, "dp": 3, "zero_stage": 1}),
}


@pytest.mark.parametrize(("source", "to", "options"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions_verify_themselves(source, to, options, tmp_path):
    result = convert(source, tmp_path / "out", to, verifier=verified, **options)
    assert result.verification["passed"]
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: smollm3(attention_bias=True), {"tp": 2}),
        (lambda: llama(tie_word_embeddings=False, vocab_size=63), {"tp": 4, "pp": 2}),  # padded to 64
    ],
    ids=["biases", "padded"],
)
def test_conversions_of_odd_models_verify_themselves(model, options, tmp_path):
    source = saved(model(), tmp_path / "hf")
    assert convert(source, tmp_path / "out", "nanotron", verifier=verified, **options).verification["passed"]


@pytest.mark.parametrize("scale", [1e10, 1e30])
def test_a_limit_is_finite_for_logits_of_any_size(scale, tmp_path):
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    source = saved(model, tmp_path / "hf")
    convert(source, tmp_path / "run", "nanotron", optimizer=False)
    report = smolconv.verify(source, tmp_path / "run", length=64, proof=tmp_path / "card.json")
    limit = report.logits.gates["max_abs"].limit
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.random.default_rng(20240711).integers(0, 64, (1, 64)))).logits
    assert limit == pytest.approx(1e-3 * expected.double().std().item() / 6.4, rel=0.01)
    assert report.passed


def test_a_floor_that_is_not_finite_excuses_nothing():
    noise = {"max_abs": float("inf"), "kl_mean": float("nan"), "top1_agreement": 1.0, "nll_a": 2.0, "nll_b": 2.0}
    assert _limits(noise, 6.4, "float32") == {"max_abs": 1e-3, "kl": 1e-9, "top1": 1.0, "documents": 1e-3}
    assert _limits(noise, float("inf"), "float32")["max_abs"] == 0
    assert all(np.isfinite(limit) for limit in _limits(noise, float("nan"), "bfloat16").values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "deepsped"}, "engine is 'deepsped'; expected one of ours, transformers, deepspeed, nanotron"),
        ({"compute": "int8"}, "compute is 'int8'; expected one of float32, bfloat16"),
        ({"device": "meta"}, "--device meta cannot be used here"),
    ],
    ids=str,
)
def test_an_option_that_no_comparison_has_is_a_usage_error(options, says):
    with pytest.raises(UsageError, match=says):
        smolconv.verify(HF, HF, **options)


@pytest.mark.parametrize("limit", [float("inf"), float("nan")])
def test_a_gate_of_ones_own_is_a_finite_number(limit):
    with pytest.raises(UsageError, match=r"the limit of kl is (inf|nan); expected a finite number"):
        smolconv.verify(NATIVE, HF, gates={"kl": limit})


def test_rope_scaling_that_nanotron_would_ignore_does_not_verify(cli, tmp_path):
    source = saved(llama(**rope(1e4, {"rope_type": "linear", "factor": 2.0})), tmp_path / "hf")
    with pytest.raises(ParityFailed, match=r"logits.*first model\.layers\.0\.self_attn") as raised:
        convert(source, tmp_path / "out", "nanotron", verifier=verified)
    assert raised.value.exit_code == 1
    done = cli("convert", source, tmp_path / "again", "--to", "nanotron", "--verify")
    assert done.code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out.failed", "again.failed"}
    # Without the field nanotron's model is what it would run, and passes.
    plain = with_config(source, tmp_path / "plain", **{**rope(1e4, {"rope_type": "default"}), "rope_scaling": None})
    assert convert(plain, tmp_path / "as trained", "nanotron", verifier=verified).verification["passed"]


def with_tokenizer(source: Path, target: Path, size: int) -> Path:
    """A copy of a folder with a tokenizer whose ids go up to ``size``: bytes are the last 256."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: size - 256 + i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    shutil.copytree(source, target)
    made.save(str(target / "tokenizer.json"))
    return target


def test_a_tokenizer_of_more_tokens_than_the_model_does_not_stop_verification(tmp_path):
    source = with_tokenizer(HF, tmp_path / "hf", 456)
    assert convert(source, tmp_path / "out", "nanotron", verifier=verified).verification["passed"]
    report = verify(source, tmp_path / "out")
    assert report.passed and "random tokens" in report.logits.tokens_from


@pytest.mark.parametrize("fields", [{"pad_token_id": 255}, {}], ids=["trimmed", "left out"])
def test_a_padding_id_beyond_the_vocabulary_is_written_as_none(fields, tmp_path):
    run = with_config(NATIVE, tmp_path / "run", **fields)
    if not fields:
        path = step_folder(run) / "model_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token_id"}))
    assert convert(run, tmp_path / "out", "hf", vocab_size=250, verifier=verified).verification["passed"]
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] is None
    assert verify(tmp_path / "out", tmp_path / "out").passed


def test_an_activation_that_no_forward_knows_is_refused_by_name(tmp_path):
    run = with_config(NATIVE, tmp_path / "run", hidden_act="unheard_of")
    with pytest.raises(UnsupportedModel, match="unheard_of"):
        verify(run, run)


def corrupting(pattern: str) -> Callable[[ConversionPlan, Path], Mapping[str, Any]]:
    """A verifier before which one byte of what was written has changed."""

    def verifier(plan: ConversionPlan, folder: Path) -> Mapping[str, Any]:
        path = next(path for path in sorted(folder.rglob(pattern)) if path.is_file())
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x10
        path.write_bytes(data)
        return verified(plan, folder)

    return verifier


@pytest.mark.parametrize(
    ("to", "pattern"),
    [
        ("hf", "model.safetensors"),
        ("hf", "smolconv_state/exp_avg-*"),
        ("nanotron", "down_proj/*"),
        ("nanotron", "optimizer_*.pt"),
    ],
)
def test_what_does_not_verify_never_gets_its_name(to, pattern, tmp_path):
    with pytest.raises(ParityFailed, match="does not verify") as raised:
        convert(NATIVE, tmp_path / "out", to, verifier=corrupting(pattern))
    assert raised.value.exit_code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out.failed"}


def test_what_cannot_be_read_back_does_not_verify_either(tmp_path):
    def truncating(plan: ConversionPlan, folder: Path) -> Mapping[str, Any]:
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
        return verified(plan, folder)

    with pytest.raises(ParityFailed, match=r"model\.safetensors"):
        convert(NATIVE, tmp_path / "out", "hf", verifier=truncating)
    assert {path.name for path in tmp_path.iterdir()} == {"out.failed"}


def test_a_failed_conversion_is_kept_whole(tmp_path):
    with pytest.raises(ParityFailed):
        convert(
            NATIVE, tmp_path / "out", "nanotron", verifier=lambda *_: {"passed": False, "reason": "planted"}, tp=1, pp=2
        )
    assert run_differences(tmp_path / "out.failed", SMOLLM3 / "tp1-pp2-dp1-zero0") == []


def test_verification_compares_with_the_cast_source_not_with_itself(tmp_path):
    plan = convert(NATIVE, tmp_path / "out", "hf", dtype="bfloat16").plan
    against_source = verify_checkpoints(plan.source, read_checkpoint(tmp_path / "out"), VerifyOptions(logits=False))
    assert verify_conversion(plan.prepared, tmp_path / "out", logits=False).passed
    assert not against_source.passed


def test_a_spec_that_was_written_wrong_fails_verification(tmp_path):
    plan = convert(NATIVE, tmp_path / "out", "hf").plan
    other = replace(plan.prepared, spec=replace(plan.prepared.spec, rope_theta=1.0))
    assert "rope_theta" in verify_conversion(other, tmp_path / "out", logits=False).reason


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_passes_a_true_pair(cli):
    done = cli("verify", NATIVE, HF, "--json")
    assert (done.code, json.loads(done.stdout)["passed"]) == (0, True)


def test_the_command_fails_a_planted_error_with_exit_1_and_its_module(cli, tmp_path):
    done = cli("verify", NATIVE, edited(HF, tmp_path / "planted", swap_gate_and_up), "--json")
    document = json.loads(done.stdout)
    assert (done.code, document["passed"], document["first_divergence"]) == (1, False, "model.layers.1.mlp")


def test_the_command_fails_one_ulp_without_torch(cli, tmp_path):
    done = cli("verify", NATIVE, edited(HF, tmp_path / "planted", one_ulp), "--tensors-only")
    assert done.code == 1
    assert "model.norm" in done.stdout


def test_convert_with_verify_publishes_what_it_proved(cli, tmp_path):
    done = cli("convert", step_folder(NATIVE), tmp_path / "out", "--to", "hf", "--verify", "--json")
    assert (done.code, json.loads(done.stdout)["verification"]["passed"]) == (0, True)
    assert set(hf_weights(tmp_path / "out")) == set(hf_weights(HF)) - {"lm_head.weight"}
