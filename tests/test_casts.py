"""Claims about casts: what a dtype cannot hold is never said to be equal. torch makes the values and rounds them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, Finished, convert
from deepspeed_folders import load
from hf_models import llama, saved
from lazy import literal
from safetensors.torch import load_file, save_file

from smolconv.conversion import ConversionPlan
from smolconv.errors import ParityFailed
from smolconv.tensors.finite import finiteness
from smolconv.tensors.lazy import cast
from smolconv.verification.compare import verify_conversion
from smolconv.verification.tensors import compare_tensors

NAME = "model.layers.0.mlp.down_proj.weight"
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


def with_value(folder: Path, dtype: torch.dtype, value: float, **arguments: Any) -> Path:
    """A tiny model in that dtype, one of whose weights is that value."""
    saved(llama(**arguments).to(dtype), folder)
    weights = load_file(folder / "model.safetensors")
    weights[NAME][1, 2] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def verifier(plan: ConversionPlan, folder: Path) -> dict[str, Any]:
    return verify_conversion(plan.prepared, folder, logits=False).to_json()


#: (stored dtype, value, target dtype): values that torch rounds to infinity.
LOST = [
    ("bfloat16", 1e5, "float16"), ("bfloat16", -3e38, "float16"), ("float32", 65520.0, "float16"),
    ("float32", 3.4e38, "bfloat16"), ("float32", -3.4e38, "bfloat16"), ("float32", 1e30, "float16"),
]  # fmt: skip
#: Values next to these that it does not, and those of which next to nothing is left.
KEPT = [
    ("bfloat16", 65024.0, "float16"), ("float32", 65519.0, "float16"), ("float32", 3.38e38, "bfloat16"),
    ("float32", 1e-30, "float16"), ("float32", -2e-8, "float16"), ("float32", 6e-8, "float16"),
    ("float32", 1e-45, "bfloat16"), ("bfloat16", -0.0, "float16"),
]  # fmt: skip
TO = [
    {"to": "hf"}, {"to": "nanotron", "tp": 2}, {"to": "deepspeed"},
    *({"to": "deepspeed", "zero_stage": stage, "world_size": 2} for stage in (1, 3)),
]  # fmt: skip


def test_torch_agrees_which_values_are_lost():
    for stored, value, target in LOST + KEPT:
        rounded = torch.tensor(value, dtype=DTYPES[stored]).to(DTYPES[target]).item()
        assert math.isinf(rounded) == ((stored, value, target) in LOST)


@pytest.mark.parametrize("to", TO, ids=str)
@pytest.mark.parametrize(("stored", "value", "target"), LOST)
def test_a_value_that_the_dtype_cannot_hold_fails_verification_and_is_a_warning_without(
    stored, value, target, to, tmp_path
):
    source = with_value(tmp_path / "hf", DTYPES[stored], value)
    with pytest.raises(ParityFailed, match="no longer finite") as raised:
        convert(source, tmp_path / "out", dtype=target, verifier=verifier, **to)
    assert raised.value.exit_code == 1 and NAME in str(raised.value)
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "plain", dtype=target, **to)
    (warning,) = [warning for warning in result.warnings if "became infinite" in warning]
    assert not [warning for warning in result.warnings if "kept unchanged" in warning]
    assert NAME in warning and target in warning and "self_attn" not in warning
    # Without digests too: the pass is another one.
    result = convert(source, tmp_path / "undigested", dtype=target, digest="none", **to)
    assert any("became infinite" in warning for warning in result.warnings)


@pytest.mark.parametrize("to", TO, ids=str)
@pytest.mark.parametrize(("stored", "value", "target"), KEPT)
def test_what_the_dtype_can_hold_or_rounds_to_nothing_passes(stored, value, target, to, tmp_path):
    source = with_value(tmp_path / "hf", DTYPES[stored], value)
    result = convert(source, tmp_path / "out", dtype=target, verifier=verifier, **to)
    assert result.verification["passed"] and result.verification["casts"]["overflowed"] == []
    assert not [warning for warning in result.warnings if "infini" in warning]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_was_not_finite_before_stays_a_warning(value, tmp_path):
    source = with_value(tmp_path / "hf", torch.float32, value)
    result = convert(source, tmp_path / "out", "hf", dtype="float16", verifier=verifier)
    assert result.verification["passed"]
    assert [warning for warning in result.warnings if "kept unchanged" in warning]
    assert not [warning for warning in result.warnings if "became infinite" in warning]


def test_masters_that_the_weights_dtype_cannot_hold_are_noticed(tmp_path):
    case = FIXTURES / "deepspeed" / "smollm2-tiny-bf16-zero1-ws2" / "checkpoint"
    convert(case, tmp_path / "hf", "hf")
    state = tmp_path / "hf" / "smolconv_state"
    path = next(state.glob("master-*.safetensors"))
    masters = load_file(path)
    masters[NAME][0, 0] = 3.4e38
    save_file(masters, path)
    (tmp_path / "hf" / "smolconv_manifest.json").unlink()
    with pytest.raises(ParityFailed, match="no longer finite"):
        convert(tmp_path / "hf", tmp_path / "out", "hf", cast_from="master", verifier=verifier)


def test_the_command_line_ends_with_1_and_names_the_tensor(cli, tmp_path):
    source = with_value(tmp_path / "hf", torch.bfloat16, 1e5)
    words = ("convert", source, tmp_path / "out", "--to", "hf", "--dtype", "float16")
    done: Finished = cli(*words, "--verify")
    assert done.code == 1 and NAME in done.stderr and "no longer finite" in done.stderr
    plain: Finished = cli(*words)
    assert plain.code == 0 and "became infinite" in plain.stderr
    compared: Finished = cli("verify", source, tmp_path / "out", "--tensors-only", "--json")
    document = json.loads(compared.stdout)
    assert compared.code == 1 and document["tensors"]["overflowed"] == [NAME]
    assert "no longer finite" in document["reason"]


def test_verify_tells_a_rounded_copy_from_another_model(cli, tmp_path):
    source = with_value(tmp_path / "hf", torch.float32, 1.0)
    convert(source, tmp_path / "out", "hf", dtype="bfloat16")
    for a, b in ((source, tmp_path / "out"), (tmp_path / "out", source)):
        done: Finished = cli("verify", a, b, "--tensors-only", "--json")
        document = json.loads(done.stdout)
        assert done.code == 1 and "within the rounding" in document["reason"]
        assert document["tensors"]["rounded"] + document["tensors"]["equal"] == document["tensors"]["compared"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights[NAME].view(torch.int16)[0, 0] += 1  # one unit in the last place, twice what rounding explains
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    document = json.loads(cli("verify", source, tmp_path / "out", "--tensors-only", "--json").stdout)
    assert "within the rounding" not in document["reason"]


# --- The arithmetic, against torch -------------------------------------------------------------------------------------


def everywhere(dtype: torch.dtype) -> torch.Tensor:
    """Values of all magnitudes: random bits, and the borders of every dtype."""
    dice = torch.Generator().manual_seed(1)
    wide = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=dice).to(torch.int32).view(torch.float32)
    edges = [
        sign * value * factor
        for sign in (1, -1)
        for kind in DTYPES.values()
        for value in (
            torch.finfo(kind).max,
            torch.finfo(kind).tiny,
            torch.finfo(kind).smallest_normal,
            2.0**-24,
            2.0**-25,
        )
        for factor in (1.0, 0.5, 0.999, 1.001, 2.0)
    ]
    values = torch.cat([wide.double(), torch.tensor(edges, dtype=torch.float64), torch.tensor([0.0, -0.0])])
    return values.to(dtype)


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float16"])
def test_torchs_rounding_is_within_rounding_and_a_unit_more_is_not(stored, target):
    values = everywhere(DTYPES[stored])
    rounded = values.to(DTYPES[target])
    keeps = values.isfinite() == rounded.isfinite()
    values, rounded = values[keeps], rounded[keeps]
    # torch rounds float64 to 16 bits by way of float32.
    rounding = {"x": ("float32", target) if stored == "float64" and target != "float32" else (target,)}
    report = compare_tensors({"x": literal(values)}, {"x": literal(rounded)}, steps=rounding)
    assert report.within_rounding and report.overflowed == ()
    bits = {torch.float32: torch.int32}.get(DTYPES[target], torch.int16)
    wrong = rounded.clone()
    place = int((rounded.isfinite() & (rounded.abs() > 1) & (rounded.abs() < 1000)).nonzero()[0])
    wrong.view(bits)[place] += 1
    report = compare_tensors({"x": literal(values)}, {"x": literal(wrong)}, steps=rounding)
    assert not report.within_rounding


@pytest.mark.parametrize(
    ("exact", "wrong"),
    [(0.0, 1e-4), (0.0, 6e-8), (1.0, 1 - 2.0**-8), (-1.0, -1 + 2.0**-8), (2.0, 2 - 2.0**-7), (5.0, -5.0)],
)
def test_zero_and_powers_of_two_allow_no_more_than_others(exact, wrong):
    a, b = torch.tensor([exact], dtype=torch.float32), torch.tensor([wrong]).bfloat16()
    assert not compare_tensors({"x": literal(a)}, {"x": literal(b)}, steps={"x": ("bfloat16",)}).within_rounding


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float16"])
def test_overflow_is_what_torch_makes_infinite(stored, target):
    for value in everywhere(DTYPES[stored])[-300:]:
        one = value.reshape(1)
        lost = bool(one.isfinite()) and not bool(one.to(DTYPES[target]).isfinite())
        assert finiteness(cast(literal(one), target)) == (not bool(one.isfinite()), lost), value


# --- the masters of an engine that computes in another dtype than the source's ------------------------------------------


def masters_in(run: Path) -> dict[str, torch.Tensor]:
    """By name, from the files of one rank's ZeRO-1 (flat, in the order of param_shapes) or of universal."""
    tag = run / next(run.glob("latest*")).read_text()
    if (tag / "zero").is_dir():
        return {path.parent.name: torch.load(path)["param"] for path in tag.glob("zero/*/fp32.pt")}
    model = torch.load(tag / "mp_rank_00_model_states.pt")
    (file,) = tag.glob("*_optim_states.pt")
    state = load(file)["optimizer_state_dict"]
    found: dict[str, torch.Tensor] = {}
    for flat, shapes in zip(state["single_partition_of_fp32_groups"], model["param_shapes"], strict=True):
        pieces = flat[: sum(map(math.prod, shapes.values()))].split([math.prod(shape) for shape in shapes.values()])
        found |= {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    return found


@pytest.mark.parametrize("to", [{}, {"zero_stage": 1, "world_size": 1}], ids=str)
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")]
)
def test_an_engine_begins_with_masters_that_were_never_rounded(stored, dtype, to, tmp_path):
    source = llama().to(DTYPES[stored])
    saved(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", "deepspeed", dtype=dtype, **to)
    masters = masters_in(tmp_path / "run")
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    assert masters.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(masters[name], tensor.float()), name
    assert any(not torch.equal(tensor.to(DTYPES[dtype]).float(), tensor.float()) for tensor in weights.values())
    if to:
        module = torch.load(next((tmp_path / "run").rglob("mp_rank_00_model_states.pt")))["module"]
        assert all(torch.equal(module[name], tensor.to(DTYPES[dtype])) for name, tensor in weights.items())
    convert(tmp_path / "run", tmp_path / "again", "hf", dtype="float32")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in weights.items())


def test_a_training_state_of_float32_keeps_its_weights_as_masters_whatever_the_dtype(tmp_path):
    nanotron = FIXTURES / "nanotron" / "smollm2-tiny"
    weights = load_file(nanotron / "expected_hf" / "model.safetensors")
    for name, options in (("with", {}), ("without", {"optimizer": False})):
        convert(nanotron / "tp2-pp1-dp2-zero1", tmp_path / name, "deepspeed", dtype="bfloat16", **options)
        masters = masters_in(tmp_path / name)
        assert masters.keys() == weights.keys() - {"lm_head.weight"}
        assert all(torch.equal(masters[key], weights[key].float()) for key in masters)
