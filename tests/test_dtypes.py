"""Claims about dtypes: what no trainer writes in a slot is refused in every layout, and what trainers do write is read.

Files are edited by torch, by the safetensors library and by hand; the expected values are theirs.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from deepspeed_folders import Case, case, edit, load, optimizer_file
from nanotron_folders import differences, step_folder
from safetensors.torch import load_file, save_file

from smolconv.errors import BadCheckpoint, CorruptFile, MixedCheckpoint, UnsupportedModel
from smolconv.layouts.registry import read_checkpoint

TINY = FIXTURES / "nanotron/smollm2-tiny"
NAME = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
#: Code in a safetensors header -> torch's dtype, for those that no slot may have, by width.
WIDE = {"I32": torch.int32, "U32": torch.uint32}
NARROW = {"I16": torch.int16, "U16": torch.uint16}
ODD = {
    "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, **WIDE, **NARROW,
}  # fmt: skip


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "expected_hf", tmp_path / "hf"))


@pytest.fixture
def with_state(tmp_path: Path) -> Path:
    """A Hugging Face folder with masters and moments in its sidecar."""
    convert(FIXTURES / "nanotron/smollm3-tiny-bf16/tp2-pp1-dp1-zero0", tmp_path / "state", "hf")
    return tmp_path / "state"


@pytest.fixture
def nanotron(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "tp2-pp1-dp2-zero1", tmp_path / "nanotron"))


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Case]:
    return lambda name: case(name).copied(tmp_path / "copies")


def refused(folder: Path, tmp_path: Path, *words: str, error: type[BadCheckpoint] = UnsupportedModel) -> None:
    with pytest.raises(error) as raised:
        convert(folder, tmp_path / "out", "hf" if folder.name != "hf" else "nanotron")
    message = str(raised.value)
    assert raised.value.exit_code == 3
    assert len(message.splitlines()) == 3
    assert [word for word in words if word not in message] == [], message
    assert list(tmp_path.glob("out*")) == []


def rename_dtype(path: Path, name: str, code: str) -> None:
    """Change a dtype in a header of safetensors, and nothing else but what keeps the file whole."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header[name]["dtype"] = code
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def recast(path: Path, name: str, dtype: torch.dtype) -> None:
    """The same tensor in another dtype, well written."""
    tensors = load_file(path)
    tensors[name] = tensors[name].float().to(dtype)
    save_file(tensors, path, {"format": "pt"})


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", WIDE)
def test_a_weight_whose_header_says_integer_is_refused(hf, tmp_path, code):
    rename_dtype(hf / "model.safetensors", NAME, code)
    refused(hf, tmp_path, NAME, "parameter", {"I32": "int32", "U32": "uint32"}[code], "model.safetensors", "float32")


@pytest.mark.parametrize("code", [code for code in ODD if code not in ("U16", "U32")])
def test_a_weight_of_a_dtype_that_no_trainer_writes_is_refused(hf, tmp_path, code):
    recast(hf / "model.safetensors", NAME, ODD[code])
    refused(hf, tmp_path, NAME, "parameter", str(ODD[code]).removeprefix("torch."), "quantised")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtypes_that_trainers_write_are_read(hf, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "there", "nanotron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert list(differences(hf_weights(tmp_path / "back"), tensors)) == []


def test_norms_of_float32_in_a_model_of_bfloat16_are_read(hf, tmp_path):
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(hf / "model.safetensors").items()}
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    assert {t.dtype for t in read_checkpoint(hf).parameters.values()} == {"float32", "bfloat16"}


def test_bfloat16_read_as_float16_is_noticed(hf, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    rename_dtype(hf / "model.safetensors", NAME, "F16")
    refused(hf, tmp_path, NAME, "float16", "bfloat16", error=MixedCheckpoint)


@pytest.mark.parametrize("file", ["exp_avg", "exp_avg_sq", "master"])
@pytest.mark.parametrize("code", WIDE)
def test_state_of_a_sidecar_whose_header_says_integer_is_refused(with_state, tmp_path, file, code):
    (path,) = (with_state / "smolconv_state").glob(f"{file}-0*.safetensors")
    rename_dtype(path, NAME, code)
    refused(with_state, tmp_path, NAME, file, {"I32": "int32", "U32": "uint32"}[code], path.name)


@pytest.mark.parametrize("step", [2.5, -1, True, "3", None, [3], 1e300])
def test_a_step_of_a_sidecar_that_is_no_count_is_a_corrupt_file(with_state, step):
    path = with_state / "smolconv_state/state.json"
    state = json.loads(path.read_text())
    state["optimizer"]["steps"][NAME] = step
    path.write_text(json.dumps(state))
    with pytest.raises(CorruptFile, match="Adam's step is"):
        read_checkpoint(with_state)


@pytest.mark.parametrize("files", ["safetensors", "bin"])
def test_a_quantised_model_is_called_by_its_dtype_and_not_by_its_names(hf, tmp_path, files):
    tensors = load_file(hf / "model.safetensors")
    tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)
    tensors[f"{NAME}_scale_inv"] = torch.ones(1)
    if files == "bin":
        (hf / "model.safetensors").unlink()
        torch.save({name: t.char() if name == NAME else t for name, t in tensors.items()}, hf / "pytorch_model.bin")
    else:
        save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    refused(hf, tmp_path, NAME, "int8" if files == "bin" else "float8_e4m3fn", "quantised", "dequantise")


# --- nanotron ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", WIDE)
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_nanotron_shard_whose_header_says_integer_is_refused(nanotron, tmp_path, code, ranks):
    for rank in ranks:
        (path,) = nanotron.glob(f"3/model/model/decoder/0/pp_block/attn/qkv_proj/*_tp-rank-{rank}-of-2.safetensors")
        rename_dtype(path, "data", code)
    words = ("decoder/0/pp_block/attn/qkv_proj", {"I32": "int32", "U32": "uint32"}[code])
    refused(nanotron, tmp_path, *words, error=UnsupportedModel if len(ranks) == 2 else MixedCheckpoint)


def nanotron_states(run: Path) -> Iterator[Path]:
    yield from sorted((step_folder(run) / "optimizer").glob("optimizer_*.pt"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float64, torch.uint8])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_nanotron_moment_of_another_kind_is_refused(nanotron, tmp_path, key, dtype):
    for path in nanotron_states(nanotron):
        document = torch.load(path, weights_only=True)
        state = next(iter(document["state"].values()))
        state[key] = state[key].to(dtype)
        torch.save(document, path)
    refused(nanotron, tmp_path, key, str(dtype).removeprefix("torch."), "optimizer_pp-0")


def test_a_nanotron_master_of_integers_is_refused(tmp_path):
    run = Path(shutil.copytree(FIXTURES / "nanotron/smollm3-tiny-bf16/tp2-pp1-dp1-zero0", tmp_path / "nanotron"))
    for path in nanotron_states(run):
        document = torch.load(path, weights_only=True)
        name = next(iter(document["gradient_accumulator"]))
        document["gradient_accumulator"][name] = document["gradient_accumulator"][name].int()
        torch.save(document, path)
    refused(run, tmp_path, "master", "int32", "optimizer_pp-0")


def test_nanotron_moments_of_16_bits_are_read(nanotron, tmp_path):
    """Without ``accumulate_grad_in_fp32`` torch's Adam makes moments of the parameters' dtype."""
    for path in nanotron_states(nanotron):
        document = torch.load(path, weights_only=True)
        for state in document["state"].values():
            state.update({key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})
        torch.save(document, path)
    convert(nanotron, tmp_path / "out", "hf")
    (file,) = (tmp_path / "out/smolconv_state").glob("exp_avg-0*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_moments_of_two_dtypes_are_refused(nanotron, tmp_path):
    for path in nanotron_states(nanotron):
        document = torch.load(path, weights_only=True)
        for state in document["state"].values():
            state["exp_avg"] = state["exp_avg"].bfloat16()
        torch.save(document, path)
    refused(nanotron, tmp_path, "exp_avg_sq", "float32", "bfloat16", error=MixedCheckpoint)


@pytest.mark.parametrize("step", [torch.tensor(2.5), torch.tensor(3, dtype=torch.int8), torch.tensor(True), True, 2.5])
def test_a_nanotron_step_of_another_kind_is_a_corrupt_file(nanotron, step):
    for path in nanotron_states(nanotron):
        document = torch.load(path, weights_only=True)
        next(iter(document["state"].values()))["step"] = step
        torch.save(document, path)
    with pytest.raises(CorruptFile, match="step"):
        read_checkpoint(nanotron)


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor(n, dtype=torch.float64)])
def test_steps_as_trainers_write_them_are_read(nanotron, kind):
    for path in nanotron_states(nanotron):
        document = torch.load(path, weights_only=True)
        for state in document["state"].values():
            state["step"] = kind(int(state["step"]))
        torch.save(document, path)
    steps = read_checkpoint(nanotron).optimizer.steps
    assert set(steps.values()) == {3.0}


# --- DeepSpeed --------------------------------------------------------------------------------------------------------

ZERO = ["zero1-bf16-ws3-uneven", "zero2-fp32-ws3", "zero3-bf16-ws3", "zero1-bf16optimizer-ws3", "autotp2-zero1-bf16"]


def adam(document: dict[str, Any]) -> dict[int, Any]:
    inner = document["optimizer_state_dict"]
    return inner["optimizer_state_dict" if "fp32_flat_groups" in inner else "base_optimizer_state"]["state"]


def masters(document: dict[str, Any]) -> list[torch.Tensor]:
    inner = document["optimizer_state_dict"]
    return inner["fp32_flat_groups" if "fp32_flat_groups" in inner else "single_partition_of_fp32_groups"]


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool])
@pytest.mark.parametrize("what", ["master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("every_rank", [False, True])
def test_a_flat_tensor_of_another_kind_is_refused(broken, tmp_path, name, dtype, what, every_rank):
    source = broken(name)

    def change(document: dict[str, Any]) -> None:
        if what == "master":
            masters(document)[0] = masters(document)[0].to(dtype)
        else:
            adam(document)[0][what] = adam(document)[0][what].to(dtype)

    paths = sorted(source.tag.glob("*_optim_states.pt"))
    for path in paths if every_rank else paths[-1:]:
        edit(path, change)
    refused(source.checkpoint, tmp_path, what, str(dtype).removeprefix("torch."), "_optim_states.pt")


@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-ws3", "zero0-bf16", "autotp2-zero1-bf16"])
def test_a_module_of_integers_is_refused(broken, tmp_path, name):
    source = broken(name)
    for path in source.tag.glob("*_model_states.pt"):
        edit(path, lambda document: document["module"].update({NAME: document["module"][NAME].short()}))
    refused(source.checkpoint, tmp_path, NAME, "parameter", "int16", "_model_states.pt")


def test_state_of_zero_0_of_another_kind_is_refused(broken, tmp_path):
    source = broken("zero0-bf16")
    (path,) = source.tag.glob("*_model_states.pt")

    def change(document: dict[str, Any]) -> None:
        groups = document["optimizer"]["fp32_groups"]
        groups[0][0] = groups[0][0].int()

    edit(path, change)
    refused(source.checkpoint, tmp_path, "master", "int32", path.name)


@pytest.mark.parametrize("name", ["universal-from-zero2-ws3", "universal-from-zero3-ws3-uneven"])
@pytest.mark.parametrize("stem", ["fp32", "exp_avg", "exp_avg_sq"])
def test_a_universal_tensor_of_another_kind_is_refused(broken, tmp_path, name, stem):
    source = broken(name)
    path = source.tag / "zero" / NAME / f"{stem}.pt"
    content = load(path)
    torch.save({"param": content["param"].int()} if isinstance(content, dict) else content.int(), path)
    refused(source.checkpoint, tmp_path, NAME, f"{stem}.pt", "int32")


def test_moments_of_bf16_optimizer_states_are_read(broken, tmp_path):
    """DeepSpeed's ``bf16_master_weights_and_grads`` with ``bf16_optimizer_states``: masters and moments of 16 bits."""
    source = broken("zero1-bf16-ws3-uneven")

    def change(document: dict[str, Any]) -> None:
        masters(document)[:] = [master.bfloat16() for master in masters(document)]
        for state in adam(document).values():
            state.update({key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})

    for path in source.tag.glob("*_optim_states.pt"):
        edit(path, change)
    convert(source.checkpoint, tmp_path / "out", "hf")
    expected = {name: tensor.bfloat16() for name, tensor in source.engine("exp_avg").items()}
    (file,) = (tmp_path / "out/smolconv_state").glob("exp_avg-0*.safetensors")
    assert list(differences(load_file(file), expected)) == []


@pytest.mark.parametrize("step", [torch.tensor(2.5), torch.tensor(-1.0), torch.tensor(3, dtype=torch.int8), True])
@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-ws3"])
def test_a_step_of_another_kind_is_a_corrupt_file(broken, name, step):
    source = broken(name)
    for path in source.tag.glob("*_optim_states.pt"):
        edit(path, lambda document: adam(document)[0].update(step=step))
    with pytest.raises(CorruptFile, match=r"step|one number|a number"):
        read_checkpoint(source.checkpoint)


def test_a_rank_of_another_dtype_is_named(broken, tmp_path):
    source = broken("zero1-bf16-ws3-uneven")
    path = optimizer_file(source.tag, 2)
    edit(path, lambda document: masters(document).__setitem__(0, masters(document)[0].half()))
    refused(source.checkpoint, tmp_path, path.name, "master", "float16", "float32", error=MixedCheckpoint)
