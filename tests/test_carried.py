"""Claims about the two lines that end every conversion: what was carried, and what was left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Finished, convert

from smolconv.conversion import ConvertOptions, plan_conversion

TINY = FIXTURES / "nanotron" / "smollm2-tiny"
TP2 = TINY / "tp2-pp1-dp2-zero1"
HF = TINY / "expected_hf"
ZERO3 = FIXTURES / "deepspeed" / "smollm2-tiny-bf16-zero3-ws2"
ADAM = "Adam's state after 3 steps"


def accounted(source: Path, tmp_path: Path, to: str, **options: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = plan_conversion(source, tmp_path / "out", ConvertOptions(to=to, **options)).account
    return found.carried, found.left_out


@pytest.mark.parametrize("to", ["hf", "deepspeed"])
def test_a_training_checkpoint_says_its_state_progress_and_the_files_that_have_no_place(
    to: str, tmp_path: Path
) -> None:
    carried, left = accounted(TP2, tmp_path, to)
    assert carried == ("weights (float32)", ADAM, "progress (step 3, 12 samples, 384 tokens, 1 stage)")
    tokenizer, files = left
    assert tokenizer == "a tokenizer: the source has none"
    # Random states of four ranks, and optimizer_config.json.
    assert files.startswith("5 files that nothing was read from (3/optimizer/optimizer_config.json, 3/random/tp-0")


def test_the_same_topology_carries_the_random_states_too(tmp_path: Path) -> None:
    _, left = accounted(TP2, tmp_path, "nanotron", tp=2, pp=1, dp=2, zero_stage=1)
    assert not any("random" in entry for entry in left)


def test_without_the_optimizer_it_is_left_out_and_said(tmp_path: Path) -> None:
    carried, left = accounted(TP2, tmp_path, "hf", optimizer=False, dtype="bfloat16")
    assert carried[0] == "weights (bfloat16)"
    assert ADAM not in carried
    assert "Adam's state, if there is any: --no-optimizer" in left
    assert "precision of 38 weights: float32 to bfloat16" in left


def test_masters_are_carried_or_left_out(tmp_path: Path) -> None:
    config = ZERO3 / "config.json"
    carried, left = accounted(ZERO3 / "checkpoint", tmp_path, "hf", config=config)
    assert "fp32 masters" in carried
    assert "fp32 masters" not in left
    carried, left = accounted(ZERO3 / "checkpoint", tmp_path, "hf", config=config, optimizer=False)
    assert "fp32 masters" in left


def test_rows_that_are_trimmed_are_counted(tmp_path: Path) -> None:
    _, left = accounted(HF, tmp_path, "hf", vocab_size=255)
    assert "the last 1 row of the vocabulary" in left


def test_files_of_a_trainer_beside_the_weights_are_named(tmp_path: Path) -> None:
    source = Path(shutil.copytree(HF, tmp_path / "source"))
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (source / name).write_bytes(b"x")
    _, left = accounted(source, tmp_path, "nanotron")
    assert "3 files that nothing was read from (optimizer.pt, scheduler.pt, trainer_state.json)" in left
    (source / "tokenizer.json").write_text("{}")
    carried, left = accounted(source, tmp_path, "hf")
    assert "2 files beside the weights (generation_config.json, tokenizer.json)" in carried
    assert not any("tokenizer" in entry for entry in left)


def test_what_was_taken_from_or_held_nothing_is_no_loss(tmp_path: Path) -> None:
    convert(HF, tmp_path / "nanotron", "nanotron")
    assert (tmp_path / "nanotron/smolconv_assets/config.json").is_file()
    _, left = accounted(tmp_path / "nanotron", tmp_path, "hf")  # of step 0, with no sample
    assert left == ("a tokenizer: the source has none",)


def test_a_part_of_a_tokenizer_is_none(tmp_path: Path) -> None:
    source = Path(shutil.copytree(HF, tmp_path / "source"))
    (source / "tokenizer_config.json").write_text("{}")
    _, left = accounted(source, tmp_path, "hf")
    assert left == ("a tokenizer: the source has none",)


def test_every_conversion_says_both_lines(cli: Callable[..., Finished], tmp_path: Path) -> None:
    for words in ((), ("--dry-run",)):
        done = cli("convert", HF, tmp_path / "out", "--to", "hf", *words)
        lines = done.stderr.splitlines()
        assert "carried: weights (float32), 1 file beside the weights (generation_config.json)" in lines
        assert "left out: a tokenizer: the source has none" in lines
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    document = json.loads(cli("convert", HF, tmp_path / "out", "--to", "hf", "--json").stdout)
    assert document["carried"][0] == "weights (float32)"
    assert document["left_out"] == ["a tokenizer: the source has none"]
