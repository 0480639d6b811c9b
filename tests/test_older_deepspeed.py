"""Claims about what older versions of DeepSpeed wrote: fixtures/deepspeed/older, each with what its live engine held."""

from __future__ import annotations

import json

import pytest
from conftest import convert, hf_weights
from deepspeed_folders import DEEPSPEED, Case, edit
from safetensors.torch import load_file

from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

OLDER = sorted(path.parent for path in (DEEPSPEED / "older").glob("*/checkpoint"))
ZERO3_OF_0_12 = Case(DEEPSPEED / "older" / "0.12.6-zero3-bf16-ws3")


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(ours[name].equal(tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("folder", OLDER, ids=lambda folder: folder.name)
def test_masters_moments_and_steps_are_the_live_engines(folder, tmp_path):
    source = Case(folder)
    assert source.meta["versions"]["deepspeed"].strip() == folder.name.partition("-")[0]
    convert(source.checkpoint, tmp_path / "hf", "hf", config=source.config, dtype="float32")
    assert equal(hf_weights(tmp_path / "hf"), source.engine("fp32"))
    for state in ("exp_avg", "exp_avg_sq"):
        (path,) = (tmp_path / "hf" / "smolconv_state").glob(f"{state}-*.safetensors")
        assert equal(load_file(path), source.engine(state))
    found = read_checkpoint(source.checkpoint, ReadOptions(config=source.config))
    assert found.optimizer is not None and found.progress is not None
    assert set(found.optimizer.steps.values()) == set(source.meta["optimizer_state_step"])
    assert found.progress.step == source.meta["step"] == 3


def test_the_step_that_0_12_began_with_is_no_sign_of_mixed_files(tmp_path):
    def warnings(source):
        return read_checkpoint(source.checkpoint, ReadOptions(config=source.config)).warnings

    assert json.loads((ZERO3_OF_0_12.folder / "expected/meta.json").read_text())["optimizer_state_step"] == [4.0] * 4
    (said,) = warnings(ZERO3_OF_0_12)
    assert "Adam counts 4 steps after 3: DeepSpeed 0.12.6 begins ZeRO-3 with one of zero gradients" in said
    later, behind = (ZERO3_OF_0_12.copied(tmp_path / name) for name in ("later", "behind"))
    for path in later.tag.glob("*_model_states.pt"):
        edit(path, lambda document: document.update(ds_version="0.13.5"))
    for path in behind.tag.glob("*_model_states.pt"):
        edit(path, lambda document: document.update(global_steps=2))
    for source in (later, behind):
        (said,) = warnings(source)
        assert "files of two checkpoints are mixed" in said
