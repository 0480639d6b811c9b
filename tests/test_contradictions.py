"""Claims about dtypes, replicas and paddings: what a checkpoint says twice is compared, and what no trainer writes is refused.

Inputs are real checkpoints, edited with torch and safetensors."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from deepspeed_folders import Case, case, edit
from hf_models import llama, saved
from safetensors.torch import load_file

from smolconv.errors import BadCheckpoint, MixedCheckpoint, ShapeMismatch, UnsupportedModel

AUTOTP = "autotp2-zero1-bf16"
TP2, PP2 = (FIXTURES / "nanotron" / "smollm2-tiny" / name for name in ("tp2-pp1-dp2-zero1", "tp1-pp2-dp1-zero0"))
NORM = "model.norm.weight"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Asserts the error of a conversion, its exit code, what it names, and that nothing is left."""

    def check(source: Path, error: type[BadCheckpoint], *words: str) -> None:
        with pytest.raises(error) as raised:
            convert(source, tmp_path / "out", "hf")
        assert raised.value.exit_code == 3
        assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
        assert list(tmp_path.glob("out*")) == []

    return check


# --- dtypes -----------------------------------------------------------------------------------------------------------


def relabel(path: Path, old: str, new: str, name: str | None = None) -> None:
    """Change the dtype of one tensor of a safetensors file, or of all, in its header; the bytes stay."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    names = [key for key in header if key != "__metadata__" and header[key]["dtype"] == old and name in (None, key)]
    assert names, f"no tensor of {old} in {path}"
    for key in names:
        header[key]["dtype"] = new
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize("code", ["I32", "U32"])
@pytest.mark.parametrize("name", [None, NORM])
def test_integers_are_no_weights_of_a_hugging_face_model(code, name, refused, tmp_path):
    source = saved(llama(), tmp_path / "hf")
    relabel(source / "model.safetensors", "F32", code, name)
    refused(source, UnsupportedModel, "model.safetensors", "float32", NORM if name else "")


@pytest.mark.parametrize("code", ["I16", "U16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL", "F64", "I64"])
def test_no_other_dtype_is_one_of_weights(code, refused, tmp_path):
    width = {"I16": "BF16", "U16": "BF16", "F64": "F64", "I64": "F64"}.get(code)
    dtype = {"BF16": torch.bfloat16, "F64": torch.float64, None: torch.float8_e4m3fn}[width]
    source = saved(llama(), tmp_path / "hf")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    from safetensors.torch import save_file

    save_file(weights, source / "model.safetensors", {"format": "pt"})
    if code not in ("F64", "F8_E4M3"):
        relabel(source / "model.safetensors", width or "F8_E4M3", code)
    refused(source, UnsupportedModel, "model.safetensors")


@pytest.mark.parametrize("slot", ["master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("code", ["I32", "U32"])
def test_integers_are_no_state_of_adam_in_a_sidecar(slot, code, refused, tmp_path):
    convert(case("smollm2-tiny-bf16-zero1-ws2").checkpoint, tmp_path / "hf", "hf")
    (tmp_path / "hf" / "smolconv_manifest.json").unlink()
    relabel(next((tmp_path / "hf" / "smolconv_state").glob(f"{slot}-*.safetensors")), "F32", code)
    refused(tmp_path / "hf", UnsupportedModel, slot)


def test_integers_are_no_weights_of_nanotron(refused, tmp_path):
    run = Path(shutil.copytree(TP2, tmp_path / "run"))
    for path in (run / "3" / "model").rglob("*.safetensors"):
        relabel(path, "F32", "I32")
    refused(run, UnsupportedModel, "int32")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_integers_are_no_moments_of_nanotron(key, refused, tmp_path):
    run = Path(shutil.copytree(TP2, tmp_path / "run"))
    for path in (run / "3" / "optimizer").glob("optimizer_*.pt"):
        document = torch.load(path, weights_only=False)
        for state in document["state"].values():
            state[key] = state[key].view(torch.int32)
        torch.save(document, path)
    refused(run, UnsupportedModel, "int32")


def as_integers(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16) and value.dim():
        return value.view(torch.int32 if value.dtype == torch.float32 else torch.int16)
    if isinstance(value, dict):
        return type(value)((key, as_integers(item)) for key, item in value.items())
    return [as_integers(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("name", "pattern", "keys"),
    [
        (
            "smollm2-tiny-bf16-zero1-ws2",
            "*optim_states.pt",
            ("optimizer_state_dict", "single_partition_of_fp32_groups"),
        ),
        ("smollm2-tiny-bf16-zero1-ws2", "*optim_states.pt", ("optimizer_state_dict", "base_optimizer_state")),
        ("smollm2-tiny-bf16-zero1-ws2", "*model_states.pt", ("module",)),
        ("zero3-bf16-ws3", "*optim_states.pt", ("optimizer_state_dict", "fp32_flat_groups")),
        ("zero3-bf16-ws3", "*optim_states.pt", ("optimizer_state_dict", "optimizer_state_dict")),
        ("zero0-bf16", "*model_states.pt", ("module",)),
        ("zero0-bf16", "*model_states.pt", ("optimizer",)),
        ("universal-from-zero2-ws3", "zero/*/fp32.pt", ("param",)),
        ("universal-from-zero2-ws3", "zero/*/exp_avg.pt", ("param",)),
    ],
)
def test_integers_are_nothing_in_deepspeeds_files(name, pattern, keys, refused, tmp_path):
    source: Case = case(name).copied(tmp_path)

    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = as_integers(document[keys[-1]])

    for path in source.tag.glob(pattern):
        edit(path, change)
    refused(source.checkpoint, UnsupportedModel, "int")


def test_two_16_bit_dtypes_in_one_model_are_refused(refused, tmp_path):
    source = saved(llama().bfloat16(), tmp_path / "hf")
    relabel(source / "model.safetensors", "BF16", "F16", NORM)
    refused(source, MixedCheckpoint, NORM, "float16", "bfloat16")


# --- what every rank must hold alike ----------------------------------------------------------------------------------


def autotp(tmp_path: Path, **config: Any) -> Case:
    source = case(AUTOTP).copied(tmp_path)
    path = source.config
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return source


def test_a_config_with_half_the_key_value_heads_does_not_halve_them(refused, tmp_path):
    heads = json.loads(case(AUTOTP).config.read_text())["num_key_value_heads"]
    assert heads == 2  # one on each of two ranks, so that every shard has the shape of a whole
    refused(autotp(tmp_path, num_key_value_heads=1).checkpoint, ShapeMismatch, "num_key_value_heads", "proj.weight")


@pytest.mark.parametrize("config", [{"intermediate_size": 12}, {"vocab_size": 32}, {"num_attention_heads": 2}])
def test_no_other_halved_dimension_passes(config, refused, tmp_path):
    key = next(iter(config))
    halved = json.loads(case(AUTOTP).config.read_text())[key] // 2
    refused(autotp(tmp_path, **{key: halved}).checkpoint, BadCheckpoint)


def test_the_copy_itself_is_read(tmp_path):
    convert(autotp(tmp_path).checkpoint, tmp_path / "out", "hf")
    expected = case(AUTOTP).engine("fp32")
    assert all(torch.equal(hf_weights(tmp_path / "out")[name], t.bfloat16()) for name, t in expected.items())


@pytest.mark.parametrize("where", ["module", "master", "exp_avg"])
def test_norms_that_differ_between_tensor_parallel_ranks_are_refused(where, refused, tmp_path):
    source = case(AUTOTP).copied(tmp_path)

    def model(document: dict[str, Any]) -> None:
        document["module"][NORM][3] *= 2

    def optimizer(document: dict[str, Any]) -> None:
        state = document["optimizer_state_dict"]
        flat = (
            state["single_partition_of_fp32_groups"][0] if where == "master"
            else state["base_optimizer_state"]["state"][0]["exp_avg"]
        )  # fmt: skip
        # The final norm lies at the end of the flat group, before its padding.
        flat = flat.detach()
        flat[: (flat != 0).nonzero()[-1] + 1][-3] += 1

    path = next(source.tag.glob("*mp_rank_01_" + ("model" if where == "module" else "optim") + "_states.pt"))
    edit(path, model if where == "module" else optimizer)
    refused(source.checkpoint, BadCheckpoint, "rank")


def test_norms_whose_moments_differ_between_nanotrons_ranks_are_refused(refused, tmp_path):
    run = Path(shutil.copytree(TP2, tmp_path / "run"))  # whose weights have one file for all ranks
    path = next((run / "3" / "optimizer").glob("optimizer_*tp-1-of-2*.pt"))
    document = torch.load(path, weights_only=False)
    index = next(i for i, name in document["names"].items() if "final_layer_norm" in name)
    document["state"][index]["exp_avg"].view(-1)[0] += 1
    torch.save(document, path)
    refused(run, MixedCheckpoint, "final_layer_norm")


def test_the_tied_heads_state_on_the_last_pipeline_rank_is_compared(refused, tmp_path):
    run = Path(shutil.copytree(PP2, tmp_path / "run"))
    path = next((run / "3" / "optimizer").glob("optimizer_pp-1-of-2*.pt"))
    document = torch.load(path, weights_only=False)
    index = next(i for i, name in document["names"].items() if "token_embedding" in name)
    document["state"][index]["exp_avg"].view(-1)[-1] += 1
    torch.save(document, path)
    refused(run, MixedCheckpoint, "pipeline rank")


# --- paddings and counts ----------------------------------------------------------------------------------------------

NUMBERS: list[Any] = [-2, 1, 3, 1 << 62, True, 1.5, None, "1"]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("every_rank", [True, False])
@pytest.mark.parametrize(
    "name", ["zero1-bf16-ws3-uneven", "zero1-bf16-alignment-ws2", "zero2-roundrobin-alignment-ws3"]
)
def test_a_padding_that_contradicts_the_sizes_shifts_nothing(name, every_rank, value, tmp_path):
    """Either it is refused, or what comes out is what the engine held."""
    source = case(name).copied(tmp_path)

    def change(document: dict[str, Any]) -> None:
        state = document["optimizer_state_dict"]
        paddings = [list(group) for group in state["param_alignment_paddings"]]
        max(paddings, key=len)[1] = value
        state["param_alignment_paddings"] = paddings

    for path in sorted(source.tag.glob("*optim_states.pt"))[: None if every_rank else 1]:
        edit(path, change)
    expect_right_or_refused(source, tmp_path)


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("key", ["group_paddings", "partition_count"])
def test_a_count_that_contradicts_the_sizes_shifts_nothing(key, value, tmp_path):
    source = case("zero1-bf16-ws3-uneven").copied(tmp_path)

    def change(document: dict[str, Any]) -> None:
        found = document["optimizer_state_dict"][key]
        document["optimizer_state_dict"][key] = [value, *found[1:]] if isinstance(found, list) else value

    for path in source.tag.glob("*optim_states.pt"):
        edit(path, change)
    expect_right_or_refused(source, tmp_path)


def expect_right_or_refused(source: Case, tmp_path: Path) -> None:
    try:
        convert(source.checkpoint, tmp_path / "out", "hf")
    except BadCheckpoint as error:
        assert error.exit_code == 3
        return
    weights = hf_weights(tmp_path / "out")
    assert all(torch.equal(weights[name], t.to(weights[name].dtype)) for name, t in source.engine("fp32").items())
    sidecar = tmp_path / "out" / "smolconv_state"
    for slot in ("exp_avg", "exp_avg_sq"):
        found = load_file(next(sidecar.glob(f"{slot}-*.safetensors")))
        assert all(torch.equal(found[name], tensor) for name, tensor in source.engine(slot).items())
