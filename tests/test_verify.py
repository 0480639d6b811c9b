"""What verify promises: true pairs pass, and each planted error is noticed, in the tier and the module where it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
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

from smolconv.convert import ConversionPlan
from smolconv.errors import ParityFailed, UsageError
from smolconv.layouts.base import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.spec import parameter_shapes
from smolconv.verify.compare import VerifyOptions, VerifyReport, verify_checkpoints, verify_conversion
from smolconv.verify.tensors import compare_tensors, forward_order, module_of

NANOTRON = FIXTURES / "nanotron"
SMOLLM2, SMOLLM3, BF16 = (NANOTRON / name for name in ("smollm2-tiny", "smollm3-tiny", "smollm3-tiny-bf16"))
NATIVE, HF = SMOLLM3 / "tp2-pp1-dp2-zero1", SMOLLM3 / "expected_hf"
LAYER = "model.layers.{}.{}.weight"


def verify(a: Path, b: Path, **options: Any) -> VerifyReport:
    """As the command does: transformers loads Hugging Face folders itself."""
    read = ReadOptions(optimizer=options.get("optimizer", False))
    left, right = (read_checkpoint(folder, read) for folder in (a, b))
    folders = tuple(side.root if side.layout == "huggingface" else None for side in (left, right))
    return verify_checkpoints(left, right, VerifyOptions(**{"length": 64, **options}), folders=folders)


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


def test_layers_are_listed_in_forward_order():
    modules = [layer["module"] for layer in verify(NATIVE, HF).to_json()["layers"]]
    assert modules[:5] == [
        "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn",
        "model.layers.0.post_attention_layernorm", "model.layers.0.mlp",
    ]  # fmt: skip
    assert modules[-1] == "model.norm"


# --- planted errors --------------------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]


def swap_gate_and_up(weights: Weights) -> None:
    gate, up = LAYER.format(1, "mlp.gate_proj"), LAYER.format(1, "mlp.up_proj")
    weights[gate], weights[up] = weights[up], weights[gate]


def swap_norms_of_two_layers(weights: Weights) -> None:
    first, third = LAYER.format(0, "input_layernorm"), LAYER.format(2, "input_layernorm")
    weights[first], weights[third] = weights[third], weights[first]


def rotate_query_rows(weights: Weights) -> None:
    name = LAYER.format(0, "self_attn.q_proj")
    weights[name] = weights[name].roll(1, dims=0)


def exchange_value_heads(weights: Weights) -> None:
    name = LAYER.format(5, "self_attn.v_proj")
    weights[name] = weights[name].roll(8, dims=0)


def transpose_output(weights: Weights) -> None:
    name = LAYER.format(6, "self_attn.o_proj")
    weights[name] = weights[name].T.contiguous()


def exchange_two_tokens(weights: Weights) -> None:
    rows = weights["model.embed_tokens.weight"]
    rows[[10, 11]] = rows[[11, 10]]


PLANTED: dict[str, tuple[Callable[[Weights], None], str]] = {
    "gate and up swapped": (swap_gate_and_up, "model.layers.1.mlp"),
    "norms of two layers swapped": (swap_norms_of_two_layers, "model.layers.0.input_layernorm"),
    "q rows rotated": (rotate_query_rows, "model.layers.0.self_attn"),
    "v heads exchanged": (exchange_value_heads, "model.layers.5.self_attn"),
    "o_proj transposed": (transpose_output, "model.layers.6.self_attn"),
    "two tokens exchanged": (exchange_two_tokens, "model.embed_tokens"),
}


@pytest.mark.parametrize(("edit", "module"), PLANTED.values(), ids=PLANTED)
def test_a_misplaced_weight_is_caught_by_tensors_and_by_logits_in_its_module(edit, module, tmp_path):
    report = verify(NATIVE, edited(HF, tmp_path / "planted", edit), length=256)
    assert tiers(report) == {"spec": True, "tensors": False, "logits": False}
    assert report.first_divergence == module
    assert module_of(report.tensors.first) == module


def flip_heads_without_rope(weights: Weights) -> None:
    # Layer 3 has no rotary embedding, so reordering q and k together inside heads leaves every q.k as it was.
    for part, heads in (("q", 8), ("k", 4)):
        name = LAYER.format(3, f"self_attn.{part}_proj")
        weights[name] = weights[name].view(heads, 8, -1).flip(1).reshape(weights[name].shape)


def test_rows_reordered_where_logits_cannot_see_it_are_caught_by_tensors(tmp_path):
    report = verify(NATIVE, edited(HF, tmp_path / "planted", flip_heads_without_rope))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": True}
    assert report.first_divergence == "model.layers.3.self_attn"


def one_ulp(weights: Weights) -> None:
    norm = weights["model.norm.weight"]
    norm[0] = torch.nextafter(norm[0], torch.tensor(torch.inf))


def test_one_ulp_in_one_weight_is_caught_by_tensors(tmp_path):
    report = verify(NATIVE, edited(HF, tmp_path / "planted", one_ulp))
    assert tiers(report) == {"spec": True, "tensors": False, "logits": True}
    assert (report.tensors.compared - report.tensors.equal, report.first_divergence) == (1, "model.norm")
    assert 0 < report.tensors.max_abs < 1e-6


def test_bfloat16_weights_passed_off_as_fp32_are_caught(tmp_path):
    def rounded(weights: Weights) -> None:
        weights.update({name: tensor.bfloat16().float() for name, tensor in weights.items()})

    report = verify(NATIVE, edited(HF, tmp_path / "planted", rounded))
    assert not report.tensors.passed
    assert not report.logits.passed
    assert report.first_divergence == "model.embed_tokens"


def with_config(target: Path, **fields: Any) -> Path:
    shutil.copytree(HF, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_theta": 12345.0}, "rope_theta"),
        ({"no_rope_layers": [0, 0, 0, 1, 0, 0, 0, 1]}, "use_rope"),
        ({"rms_norm_eps": 1e-4}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "activation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_changes_the_function_is_caught_by_the_spec_and_by_logits(fields, named, tmp_path):
    report = verify(NATIVE, with_config(tmp_path / "planted", **fields))
    assert tiers(report) == {"spec": False, "tensors": True, "logits": False}
    assert named in report.reason


def test_a_longer_context_is_another_spec_but_the_same_function(tmp_path):
    report = verify(NATIVE, with_config(tmp_path / "planted", max_position_embeddings=128))
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


def test_the_same_nan_on_both_sides_is_no_difference_of_tensors():
    weights = {"model.norm.weight": literal(torch.tensor([1.0, torch.nan]))}
    assert compare_tensors(weights, weights).passed


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
        (lambda: llama(**rope(1e4, {"rope_type": "linear", "factor": 2.0})), {}),
    ],
    ids=["biases", "padded", "rope scaling"],
)
def test_conversions_of_odd_models_verify_themselves(model, options, tmp_path):
    source = saved(model(), tmp_path / "hf")
    assert convert(source, tmp_path / "out", "nanotron", verifier=verified, **options).verification["passed"]


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
