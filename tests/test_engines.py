"""``verify --engine deepspeed``: the real DeepSpeed loads the folder and says what it makes of it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import time
from pathlib import Path

import forked_worker
import numpy as np
import pytest
import torch
from conftest import FIXTURES, convert, run_cli
from packaging.specifiers import SpecifierSet
from training import recipe_document, token_folder

from smolconv.errors import BadCheckpoint, NotInstalled, UsageError
from smolconv.layouts.deepspeed.documents import DEEPSPEED_VERSION
from smolconv.layouts.deepspeed.version import RANGE, check_deepspeed
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.compare import AsStored, VerifyOptions, VerifyReport, verify_checkpoints
from smolconv.verification.engines import start
from smolconv.verification.engines.start import engine_logits
from smolconv.verification.inputs import choose_rows

pytest.importorskip("deepspeed")

DEEPSPEED = FIXTURES / "deepspeed"
HF = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"


@pytest.fixture
def forked_ranks(monkeypatch):
    """The engine's ranks are forks of a process that has imported DeepSpeed."""
    code = "import os, sys\nfrom pathlib import Path\nfrom smolconv.verification.engines.deepspeed import main\n"

    def run_all(commands, work):
        codes = forked_worker.run_ranks(
            [
                forked_worker.Fork(
                    code=f"{code}main(Path(sys.argv[1]))\nos._exit(0)", words=words[-2:], environment=environment,
                    log=work / f"rank-{rank}.log",
                )
                for rank, (words, environment) in enumerate(commands)
            ], on_cpu=True,
        )  # fmt: skip
        assert not any(codes.values()), [path.read_text()[-3000:] for path in work.glob("rank-*.log")]

    monkeypatch.setattr(start, "_run_all", run_all)


def verified(a: Path, b: Path, config: Path | None = None) -> VerifyReport:
    read = ReadOptions(config=config)
    stored = (AsStored(folder=a, options=read), AsStored(folder=b, options=ReadOptions()))
    left, right = (read_checkpoint(side.folder, side.options) for side in stored)
    return verify_checkpoints(left, right, VerifyOptions(engine="deepspeed", length=32), stored=stored)


@pytest.mark.parametrize("case", [
    pytest.param("zero1-untied-ws2", marks=pytest.mark.matrix), "zero3-bf16-ws3", "zero1-frozen-ws2",
])  # fmt: skip
def test_the_real_engine_computes_what_transformers_computes_on_the_consolidated_weights(case, forked_ranks, tmp_path):
    folder, config = DEEPSPEED / case / "checkpoint", DEEPSPEED / case / "config.json"
    convert(folder, tmp_path / "hf", "hf", config=config, optimizer=False)
    report = verified(folder, tmp_path / "hf", config)
    assert report.passed
    assert report.logits is not None and report.logits.gates["engine a"].value < 5e-3


def test_one_universal_folder_of_ours_is_the_same_model_to_the_real_engine(forked_ranks, tmp_path):
    convert(HF, tmp_path / "universal", "deepspeed")
    report = verified(tmp_path / "universal", HF)
    assert report.passed
    assert report.logits is not None and report.logits.gates["engine a"].value < 1e-9


def test_masters_that_were_swapped_after_writing_are_seen_by_the_engine(forked_ranks, tmp_path):
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


def ranks(*codes: str) -> list[tuple[list[str], dict[str, str]]]:
    """Stand-ins for an engine's ranks: Python that each of them runs."""
    return [
        ([sys.executable, "-c", f"import sys, time\nprint('rank {rank}')\n{code}"], {})
        for rank, code in enumerate(codes)
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_those_that_wait_for_it(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_GRACE_SECONDS", 0.5)
    codes = ["time.sleep(1000)"] * 3
    codes[failing] = "sys.exit('of its own accord')"
    begun = time.monotonic()
    with pytest.raises(BadCheckpoint, match=f"(?s)rank {failing} of 3 of the engine failed.*of its own accord"):
        start._run_all(ranks(*codes), tmp_path)
    assert time.monotonic() - begun < 60


def test_a_peer_that_fails_within_the_grace_is_not_taken_for_the_first(tmp_path):
    with pytest.raises(BadCheckpoint, match="rank 1 of 2 of the engine failed:\nrank 1\nfirst"):
        start._run_all(ranks("time.sleep(1)\nsys.exit('later')", "sys.exit('first')"), tmp_path)


def test_ranks_that_never_end_are_killed_and_said_to_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_TIMEOUT_SECONDS", 1.0)
    with pytest.raises(BadCheckpoint, match="rank 1 of 2 of the engine has not ended after 1 s"):
        start._run_all(ranks("", "time.sleep(1000)"), tmp_path)


def test_ranks_that_end_well_are_no_error(tmp_path):
    start._run_all(ranks("time.sleep(0.2)", ""), tmp_path)


# --- which DeepSpeed --------------------------------------------------------------------------------------------------


def test_the_range_of_versions_is_what_the_package_asks_for():
    text = (FIXTURES.parent / "pyproject.toml").read_text()
    assert re.findall(r'"deepspeed([<>=].*?)"', text) == [RANGE]
    assert DEEPSPEED_VERSION in SpecifierSet(RANGE)


@pytest.mark.parametrize("found", ["0.16.9", "0.19.7", "0.19.9"])
def test_a_deepspeed_that_was_not_tried_is_refused_by_version(found, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.raises(NotInstalled) as error:
        check_deepspeed("training")
    assert error.value.exit_code == 5
    assert f"deepspeed {found} is installed" in str(error.value) and f"pip install 'deepspeed{RANGE}'" in str(
        error.value
    )


def test_versions_that_were_tried_are_taken(monkeypatch):
    for found in ("0.19.8", "0.19.8+local"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        check_deepspeed("training")


OLD = "import importlib.metadata as m\nreal = m.version\nm.version = lambda name: '0.15.4' if name == 'deepspeed' else real(name)\n"


def test_verify_ends_with_5_for_another_deepspeed():
    case = DEEPSPEED / "zero1-untied-ws2"
    folder, config = case / "checkpoint", case / "config.json"
    done = run_cli(
        "verify", folder, folder, "--config", config, "--config-b", config, "--engine", "deepspeed", before=OLD
    )
    assert done.code == 5 and "deepspeed 0.15.4 is installed, and --engine deepspeed needs" in done.stderr


def test_training_ends_with_5_for_another_deepspeed(tmp_path):
    source = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
    ended = forked_worker.work(recipe_document(source, token_folder(tmp_path / "tokens")), tmp_path / "run", before=OLD)
    assert ended.code == 5 and "deepspeed 0.15.4 is installed, and training needs" in ended.message


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
