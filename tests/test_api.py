"""``import smolconv``: what scripts and notebooks call. Expected values are read by safetensors and torch themselves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import FIXTURES, environment, files_below, hf_weights
from fake_hub import FakeHub
from safetensors.torch import load_file

import smolconv
from smolconv.errors import SmolconvError
from smolconv.tensors import lazy, reading

REPOSITORY = Path(__file__).resolve().parent.parent
NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
EXPECTED = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"
DEEPSPEED = FIXTURES / "deepspeed"
Q = "model.layers.0.self_attn.q_proj.weight"


def test_importing_smolconv_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import smolconv; dir(smolconv); print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {name for name in imported if name.startswith("smolconv")} == {"smolconv", "smolconv.version"}
    assert not {name.split(".")[0] for name in imported} & {
        "numpy",
        "torch",
        "typer",
        "rich",
        "pydantic",
        "dataclasses",
    }


def test_every_name_is_there_and_no_other() -> None:
    for name in smolconv.__all__:
        assert getattr(smolconv, name) is not None
    assert set(smolconv.__all__) <= set(dir(smolconv))
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = smolconv.no_such_name


def test_functions_are_not_hidden_by_modules_of_their_names() -> None:
    """``import smolconv.NAME`` would put a module in the function's place."""
    modules = {path.stem for path in (REPOSITORY / "smolconv").glob("*.py")}
    modules |= {path.parent.name for path in (REPOSITORY / "smolconv").glob("*/__init__.py")}
    assert not modules & set(smolconv.__all__)


@pytest.mark.parametrize(
    ("name", "exit_code"), [("UsageError", 2), ("BadCheckpoint", 3), ("MachineError", 4), ("NotInstalled", 5)]
)
def test_errors_have_the_commands_exit_codes(name: str, exit_code: int) -> None:
    assert issubclass(getattr(smolconv, name), SmolconvError) and getattr(smolconv, name).exit_code == exit_code


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_nanotrons_tensors_are_those_that_it_converted_itself() -> None:
    """The expected folder was written by nanotron's own converter."""
    opened, expected = smolconv.open_checkpoint(NANOTRON), hf_weights(EXPECTED)
    assert opened.layout == "nanotron" and opened.keys() == expected.keys()
    for name, tensor in expected.items():
        assert opened[name].shape == tuple(tensor.shape) and opened[name].dtype == str(tensor.dtype).split(".")[1]
        assert torch.equal(opened[name].torch(), tensor)
        assert np.array_equal(opened[name].numpy(), tensor.numpy())
        assert np.array_equal(np.asarray(opened[name]), tensor.numpy())


def test_a_partitioned_engines_masters_and_moments_are_those_of_the_live_engine() -> None:
    case = DEEPSPEED / "zero3-bf16-ws3"
    opened = smolconv.open_checkpoint(case / "checkpoint", config=case / "config.json")
    assert set(opened.slots) == {"parameter", "master", "exp_avg", "exp_avg_sq"}
    for slot, file in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        expected = load_file(case / "expected" / f"{file}.safetensors")
        found = opened.slots[slot]
        assert found.keys() <= expected.keys() and found
        assert all(torch.equal(found[name].torch(), expected[name]) for name in found)
    assert opened.optimizer is not None and opened.progress is not None
    assert smolconv.open_checkpoint(case / "checkpoint", config=case / "config.json", optimizer=False).optimizer is None


@pytest.mark.parametrize("case", sorted(path.name for path in (FIXTURES / "nanotron" / "smollm2-tiny").glob("tp*")))
def test_every_division_of_a_nanotron_model_is_the_model_that_nanotron_converted(case: str) -> None:
    folder = FIXTURES / "nanotron" / "smollm2-tiny"
    opened, expected = smolconv.open_checkpoint(folder / case), hf_weights(folder / "expected_hf")
    assert opened.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(opened[name].torch(), tensor), name
        assert np.array_equal(opened[name][1:3].numpy(), tensor[1:3].numpy())  # rows of one rank, or of two


@pytest.mark.parametrize(
    "case",
    ["universal-from-zero3-ws3-uneven", "zero3-bf16-frozen-uneven-ws3", "zero2-roundrobin-alignment-ws3",
     "zero1-bf16-ws3-uneven", "zero1-elastic-ws3-uneven", "zero0-bf16", "autotp2-zero1-bf16", "autotp2-zero3-ws4"],
)  # fmt: skip
def test_every_kind_of_deepspeed_folder_has_the_live_engines_state(case: str) -> None:
    folder = DEEPSPEED / case
    opened = smolconv.open_checkpoint(folder / "checkpoint", config=folder / "config.json")
    masters, checked = load_file(folder / "expected" / "fp32.safetensors"), 0
    for slot, file in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        path = folder / "expected" / f"{file}.safetensors"
        expected = load_file(path) if path.exists() else {}
        for name, tensor in opened.slots.get(slot, {}).items():
            assert torch.equal(tensor.torch(), expected[name]), (slot, name)
            first, last = tensor.shape[0] // 3, tensor.shape[0] // 3 + 2
            assert torch.equal(tensor[first:last].torch(), expected[name][first:last])
            checked += 1
    assert checked >= 2 * len(masters)
    for name in opened:
        assert torch.equal(opened[name].torch(), masters[name].to(opened[name].torch().dtype)), name


def test_a_folder_in_several_files_is_what_transformers_wrote(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    opened, expected = smolconv.open_checkpoint(tmp_path), model.state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[name].torch(), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "index", [0, -1, slice(3), slice(5, 60), slice(-4, None), slice(9, 2), (3, 4), (slice(2, 9), slice(1, 7)), (slice(None), -2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", [Q, "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_an_index_is_numpys(name: str, index: Any) -> None:
    """Rows of a fused tensor, columns that two ranks hold, and the embedding's."""
    expected = hf_weights(EXPECTED)[name].numpy()[index]
    found = smolconv.open_checkpoint(NANOTRON)[name][index]
    assert found.shape == expected.shape and np.array_equal(found.numpy(), expected)


def test_rows_read_their_own_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = reading.read_observed

    def counted(path: Path, offset: int, out: memoryview) -> None:
        read.append(len(out))
        real(path, offset, out)

    monkeypatch.setattr(lazy, "read_observed", counted)
    tensor = smolconv.open_checkpoint(EXPECTED)["model.embed_tokens.weight"]
    row = tensor[17]
    assert not read
    row.numpy()
    assert sum(read) == tensor.shape[1] * 4 < tensor.nbytes
    read.clear()
    tensor.numpy()  # control
    assert sum(read) == tensor.nbytes


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        (64, IndexError, "outside a dimension of 64"), ((0, -65), IndexError, "outside a dimension of 64"),
        ((0, 0, 0), IndexError, "first 2 dimensions"), (slice(0, 9, 2), TypeError, "step 2"),
        ("a", TypeError, "not by str"), (True, TypeError, "not by bool"), (None, TypeError, "not by NoneType"),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_read_is_refused(index: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        smolconv.open_checkpoint(NANOTRON)[Q][index]


def test_bfloat16_is_bfloat16_or_an_error_and_never_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = smolconv.open_checkpoint(FIXTURES / "nanotron" / "smollm3-tiny-bf16" / "tp2-pp1-dp1-zero0")[Q]
    assert tensor.dtype == "bfloat16" and tensor.torch().dtype is torch.bfloat16
    try:
        import ml_dtypes  # type: ignore[import-not-found]
    except ImportError:
        with pytest.raises(smolconv.NotInstalled, match=r"pip install ml-dtypes.*, or use \.torch\(\)"):
            tensor.numpy()
    else:
        assert tensor.numpy().dtype == ml_dtypes.bfloat16
        assert np.array_equal(tensor.numpy().astype("float32"), tensor.torch().float().numpy())
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(smolconv.NotInstalled, match="which numpy does not have"):
        tensor.numpy()


def test_tensors_are_pickled_and_read_by_threads() -> None:
    tensor = smolconv.open_checkpoint(NANOTRON)[Q]
    expected = tensor.numpy()
    assert np.array_equal(pickle.loads(pickle.dumps(tensor)).numpy(), expected)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda row: row.numpy(), tensor))
    assert np.array_equal(np.stack(rows), expected)


def test_an_unknown_name_has_its_neighbour_in_the_error() -> None:
    with pytest.raises(KeyError, match=r"is it model\.norm\.weight"):
        smolconv.open_checkpoint(NANOTRON)["model.norm.wieght"]


def test_what_is_no_checkpoint_raises_what_the_command_ends_with(tmp_path: Path) -> None:
    with pytest.raises(smolconv.BadCheckpoint):
        smolconv.open_checkpoint(tmp_path)
    with pytest.raises(smolconv.MissingFile):
        smolconv.open_checkpoint(str(tmp_path / "none"))


# --- what commands do -------------------------------------------------------------------------------------------------


def open_files() -> list[str]:
    links = [entry.path for entry in os.scandir("/proc/self/fd")]  # one is of this listing
    return [os.readlink(link) for link in links if os.path.islink(link)]


def test_convert_verify_inspect_and_diff(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    before = set(open_files())  # other tests read the same fixture
    bar = smolconv.on_progress(lambda title, done, total: told.append((title, done, total)))
    result = smolconv.convert(NANOTRON, tmp_path / "out", to="hf", dtype="fp32", bar=bar)
    assert result.plan.tensors and told[-1][0] == "nanotron -> huggingface"
    assert told[-1][1] == told[-1][2] == result.plan.bytes_written
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)

    assert {name: bytes(tensor.numpy()) for name, tensor in hf_weights(tmp_path / "out").items()} == {
        name: bytes(tensor.numpy()) for name, tensor in hf_weights(EXPECTED).items()
    }
    assert smolconv.inspect(str(tmp_path / "out"), check=True)["checked"] > 0
    assert smolconv.diff(NANOTRON, tmp_path / "out")["spec_differences"] == []
    assert smolconv.verify(NANOTRON, tmp_path / "out", logits=False).passed
    report = smolconv.verify(NANOTRON, tmp_path / "out", length=32)
    assert report.passed and report.logits is not None
    read = {path for path in open_files() if path.startswith((str(NANOTRON), str(tmp_path / "out")))}
    assert not read - before

    file = tmp_path / "out" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 0x40
    file.write_bytes(damaged)
    assert not smolconv.verify(NANOTRON, tmp_path / "out", logits=False).passed
    with pytest.raises(smolconv.DigestMismatch):
        smolconv.inspect(tmp_path / "out", check=True)


def test_a_plan_writes_nothing_and_an_unknown_option_names_its_neighbour(tmp_path: Path) -> None:
    plan = smolconv.plan_conversion(NANOTRON, tmp_path / "out", to="deepspeed", zero_stage=3, world_size=5)
    assert plan.bytes_written > 0 and not list(tmp_path.iterdir())
    for call in (smolconv.plan_conversion, smolconv.convert):
        with pytest.raises(smolconv.UsageError, match="Is it 'world_size'"):
            call(NANOTRON, tmp_path / "out", to="deepspeed", worldsize=5)
    with pytest.raises(smolconv.UsageError, match="Is it 'held_out'"):
        smolconv.evaluate([EXPECTED], heldout=[tmp_path])
    with pytest.raises(smolconv.UsageError, match="is a list"):
        smolconv.evaluate([EXPECTED], held_out=str(tmp_path))


def test_a_callback_that_raises_ends_the_work_and_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def stop(title: str, done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        smolconv.convert(NANOTRON, tmp_path / "out", to="hf", bar=smolconv.on_progress(stop))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_on_the_hub_is_opened_by_its_address(tmp_path: Path) -> None:
    code = (
        "import smolconv; found = smolconv.open_checkpoint('hf://lab/smol')\n"
        "print(len(found), found['model.norm.weight'].numpy().sum())"
    )
    with FakeHub() as hub:
        hub.commit("lab/smol", files_below(EXPECTED))
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(**settings)
        )
    expected = hf_weights(EXPECTED)
    count, total = done.stdout.split()
    assert int(count) == len(expected) and float(total) == pytest.approx(float(expected["model.norm.weight"].sum()))


def test_the_notebook_prints_what_is_stored_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(NANOTRON, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = json.loads((REPOSITORY / "docs" / "api.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    for cell in code:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)
        assert printed.getvalue() == "".join("".join(output["text"]) for output in cell["outputs"])
