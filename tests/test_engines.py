"""``verify --engine deepspeed``: the real DeepSpeed loads the folder and says what it makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert

from smolconv.errors import UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.verify.compare import AsStored, VerifyOptions, VerifyReport, verify_checkpoints
from smolconv.verify.engines.start import engine_logits
from smolconv.verify.inputs import choose_rows

pytest.importorskip("deepspeed")

DEEPSPEED = FIXTURES / "deepspeed"
HF = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"


def verified(a: Path, b: Path, config: Path | None = None) -> VerifyReport:
    read = ReadOptions(config=config)
    stored = (AsStored(folder=a, options=read), AsStored(folder=b, options=ReadOptions()))
    left, right = (read_checkpoint(side.folder, side.options) for side in stored)
    return verify_checkpoints(left, right, VerifyOptions(engine="deepspeed", length=32), stored=stored)


@pytest.mark.parametrize("case", ["zero1-untied-ws2", "zero3-bf16-ws3", "zero1-frozen-ws2"])
def test_the_real_engine_computes_what_transformers_computes_on_the_consolidated_weights(case, tmp_path):
    folder, config = DEEPSPEED / case / "checkpoint", DEEPSPEED / case / "config.json"
    convert(folder, tmp_path / "hf", "hf", config=config, optimizer=False)
    report = verified(folder, tmp_path / "hf", config)
    assert report.passed
    assert report.logits is not None and report.logits.gates["engine a"].value < 5e-3


def test_one_universal_folder_of_ours_is_the_same_model_to_the_real_engine(tmp_path):
    convert(HF, tmp_path / "universal", "deepspeed")
    report = verified(tmp_path / "universal", HF)
    assert report.passed
    assert report.logits is not None and report.logits.gates["engine a"].value < 1e-9


def test_masters_that_were_swapped_after_writing_are_seen_by_the_engine(tmp_path):
    convert(HF, tmp_path / "right", "deepspeed")
    wrong = tmp_path / "wrong"
    shutil.copytree(tmp_path / "right", wrong)
    zero = wrong / (wrong / "latest_universal").read_text() / "zero"
    a, b = (zero / f"model.layers.{i}.mlp.gate_proj.weight" / "fp32.pt" for i in (0, 1))
    shutil.copy(a, tmp_path / "kept"), shutil.copy(b, a), shutil.copy(tmp_path / "kept", b)
    rows = choose_rows(vocab_size=256, max_positions=64, tokenizer=None, length=32)
    found = []
    for folder in (tmp_path / "right", wrong):
        checkpoint = read_checkpoint(folder)
        with engine_logits("deepspeed", checkpoint, folder, ReadOptions(), rows) as logits:
            found.append(torch.from_numpy(np.array(logits)))
    assert float((found[0] - found[1]).abs().max()) > 1e-2


def test_an_engine_for_a_layout_that_is_on_neither_side_is_a_usage_error():
    with pytest.raises(UsageError, match="neither A nor B is a deepspeed folder"):
        verified(HF, HF)


def test_nanotron_where_it_is_not_installed_says_what_to_install(cli):
    native = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
    done = cli("verify", native, HF, "--engine", "nanotron")
    assert done.code == 5 and "pip install nanotron" in done.stderr


def test_the_command_reports_the_engine(cli, tmp_path):
    case = DEEPSPEED / "zero1-untied-ws2"
    convert(case / "checkpoint", tmp_path / "hf", "hf", config=case / "config.json", optimizer=False)
    done = cli(
        "verify",
        case / "checkpoint",
        tmp_path / "hf",
        "--config",
        case / "config.json",
        "--engine",
        "deepspeed",
        "--json",
    )
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["gates"]["engine a"]["passed"]
