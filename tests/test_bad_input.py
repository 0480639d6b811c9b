"""Claims about what happens when the input, the words or the machine are bad: one exit code, a few lines, no output.

Checkpoints are broken by the safetensors library, by torch, by json and by hand, on copies of what nanotron and
transformers wrote.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FIXTURES,
    Finished,
    command,
    convert,
    environment,
    files_below,
    hf_weights,
    nanotron_topologies,
    topology_id,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smolconv.conversion import ConvertOptions, plan_conversion
from smolconv.errors import BadCheckpoint, CorruptFile, MachineError, ParityFailed, SmolconvError, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.replacing import lost_with

TINY = FIXTURES / "nanotron" / "smollm2-tiny"
TP2 = TINY / "tp2-pp1-dp2-zero1"
HF = TINY / "expected_hf"
DECODER = "3/model/model/decoder"
RANK = "model_weight_pp-rank-0-of-1_tp-rank-{}-of-2.safetensors"
EMBEDDING = "3/model/model/token_position_embeddings/pp_block/token_embedding"
HEADER_BYTES = 8
GONE = object()
#: Every pwrite takes a while, as on a disk that is slow.
SLOW_DISK = "import os, time; fast = os.pwrite; os.pwrite = lambda *words: (time.sleep(0.04), fast(*words))[1]"
EVERY_LINE_FITS = 10  #: lines that an error may have; typer frames its own in a box, and lists choices one a line


# --- Sources to break ---


@pytest.fixture
def nanotron(tmp_path: Path) -> Path:
    """A run folder of TP 2 and ZeRO-1 over two ranks, to be broken."""
    return Path(shutil.copytree(TP2, tmp_path / "nanotron"))


@pytest.fixture
def smollm3(tmp_path: Path) -> Path:
    """A run folder of nanotron's Qwen2, to be broken."""
    return Path(shutil.copytree(FIXTURES / "nanotron/smollm3-tiny/tp1-pp2-dp1-zero0", tmp_path / "smollm3"))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face folder with one safetensors file, to be broken."""
    return Path(shutil.copytree(HF, tmp_path / "hf"))


@pytest.fixture
def sharded(hf: Path) -> Path:
    """The same model in two files and an index."""
    weights = load_file(hf / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in shards.items():
        save_file({name: weights[name] for name in mine}, hf / file, {"format": "pt"})
    weight_map = {name: file for file, mine in shards.items() for name in mine}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (hf / "model.safetensors").unlink()
    return hf


@pytest.fixture
def with_state(tmp_path: Path) -> Path:
    """A Hugging Face folder with Adam's state in its sidecar."""
    convert(TP2, tmp_path / "with-state", "hf")
    return tmp_path / "with-state"


@pytest.fixture
def refused(cli: Callable[..., Finished], tmp_path: Path) -> Callable[..., None]:
    """Converts, and asserts the exit code, a short message with these words, and that nothing was left."""

    def check(source: object, *words: str, code: int = 3, to: str = "hf", options: tuple[object, ...] = ()) -> None:
        target = tmp_path / "out"
        done = cli("convert", source, target, "--to", to, *options)
        assert_short_error(done, code, *words)
        assert done.stdout == ""
        assert not target.exists()
        assert not partial(target).exists()

    return check


def assert_short_error(done: Finished, code: int, *words: str) -> None:
    assert done.code == code, done
    assert "Traceback" not in done.stderr and "bug of smolconv" not in done.stderr
    assert 0 < len(done.stderr.splitlines()) <= EVERY_LINE_FITS, done.stderr
    for word in words:
        assert word in done.stderr


def partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def edit_json(path: Path, **changes: object) -> None:
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: item for name, item in value.items() if item is not GONE}))


def truncate(path: Path, missing_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - missing_bytes)


def save_shard(path: Path, **metadata: str) -> None:
    """Write nanotron's weight file again with other metadata."""
    with safe_open(path, "pt") as file:
        known = file.metadata() or {}
    save_file(load_file(path), path, {**known, **metadata})


# --- Files that are missing ---


def test_a_missing_tensor_parallel_shard_is_named(nanotron, refused):
    (nanotron / DECODER / "2/pp_block/mlp/down_proj" / RANK.format(1)).unlink()
    refused(nanotron, "MissingShard", "decoder.2.pp_block.mlp.down_proj", "rank 1 of 2", "Copy the file")


def test_a_missing_optimizer_rank_is_named_and_no_optimizer_does_without_it(nanotron, refused, cli, tmp_path):
    (nanotron / "3/optimizer/optimizer_pp-0-of-1_dp-1-of-2_tp-0-of-2_exp-0-of-1.pt").unlink()
    refused(nanotron, "MissingShard", "pp rank 0, dp rank 1, tp rank 0", "--no-optimizer")
    assert cli("convert", nanotron, tmp_path / "weights", "--to", "hf", "--no-optimizer").code == 0


def test_a_missing_scheduler_rank_is_noticed(tmp_path, refused):
    source = shutil.copytree(TINY / "tp1-pp2-dp1-zero0", tmp_path / "source")
    (source / "3/lr_scheduler/lr_scheduler_pp-1-of-2_tp-0-of-1_exp-0-of-1.pt").unlink()
    refused(source, "MissingShard", "lr_scheduler", "learning rate", "--no-optimizer")


def test_a_missing_parameter_is_named(nanotron, refused):
    shutil.rmtree(nanotron / DECODER / "1/pp_block/input_layernorm")
    refused(nanotron, "NameMismatch", "model.decoder.1.pp_block.input_layernorm.weight", "missing")


def test_a_missing_pipeline_rank_is_noticed_by_its_parameters(tmp_path, refused):
    source = shutil.copytree(TINY / "tp2-pp2-dp1-zero0", tmp_path / "source")
    for path in source.rglob("*pp-rank-1-of-2*"):
        path.unlink()
    refused(source, "NameMismatch", "model.decoder.3", "missing")


def test_an_index_that_names_a_missing_file_says_which(sharded, refused):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "MissingShard", "model-00002-of-00002.safetensors", "Copy it", to="nanotron")


def test_shards_without_their_index_are_refused(sharded, refused):
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "MissingFile", "model.safetensors.index.json", "Copy the missing file", to="nanotron")


def test_a_source_that_is_not_there_is_said(tmp_path, refused):
    refused(tmp_path / "nowhere", "MissingFile", "nowhere", "Check the path")


def test_a_file_is_not_a_checkpoint_and_its_folder_is_named(hf, refused):
    refused(hf / "model.safetensors", "UnknownLayout", f"Name the folder that holds it: {hf}", to="nanotron")


def test_an_empty_folder_is_not_a_checkpoint(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "UnknownLayout", "config.json", "latest.txt")


def test_a_latest_that_names_a_missing_step_lists_those_that_are_there(nanotron, refused):
    (nanotron / "latest.txt").write_text("7")
    refused(nanotron, "MissingFile", "step 7 is not there", "steps found: 3", "--step")


def test_a_step_that_is_not_there_lists_those_that_are(nanotron, refused):
    refused(nanotron, "MissingFile", "step 9 is not there", "steps found: 3", options=("--step", 9))


def test_several_steps_without_a_latest_are_not_guessed(nanotron, refused):
    shutil.copytree(nanotron / "3", nanotron / "6")
    (nanotron / "latest.txt").unlink()
    refused(nanotron, "MissingFile", "steps found: 3, 6", "--step")


# --- Files that are damaged ---


@pytest.mark.parametrize("missing_bytes", [1, 4096])
def test_truncated_hugging_face_weights_are_noticed_before_anything_is_written(hf, refused, missing_bytes):
    truncate(hf / "model.safetensors", missing_bytes)
    refused(hf, "CorruptFile", "model.safetensors", "truncated", "copy it again", to="nanotron")


def test_a_truncated_nanotron_shard_is_noticed_before_anything_is_written(nanotron, refused):
    truncate(nanotron / EMBEDDING / RANK.format(0), 4)
    refused(nanotron, "CorruptFile", RANK.format(0), "truncated", "copy it again")


@pytest.mark.parametrize(
    "place", ["optimizer/optimizer_pp-0-of-1_dp-0-of-2_tp-1-of-2", "lr_scheduler/lr_scheduler_pp-0-of-1_tp-0-of-2"]
)
def test_a_truncated_torch_archive_is_named(nanotron, refused, place):
    truncate(nanotron / f"3/{place}_exp-0-of-1.pt", 100)
    refused(nanotron, "CorruptFile", place)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_length_that_is_garbage_is_refused(hf, refused, length):
    with (hf / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", length))
    refused(hf, "CorruptFile", "model.safetensors", "opy", to="nanotron")


ZERO_BYTES = {
    "nanotron": [
        f"{EMBEDDING}/{RANK.format(1)}",
        f"{DECODER}/0/pp_block/input_layernorm/model_weight.safetensors",
        "3/optimizer/optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-2_exp-0-of-1.pt",
        "3/lr_scheduler/lr_scheduler_pp-0-of-1_tp-1-of-2_exp-0-of-1.pt",
        "3/model_config.json",
        "3/checkpoint_metadata.json",
        "latest.txt",
    ],
    "sharded": ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"],
    "with_state": ["smolconv_state/state.json", "smolconv_state/exp_avg.safetensors.index.json"],
}


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, paths in ZERO_BYTES.items() for path in paths])
def test_a_file_of_zero_bytes_is_named(request, refused, kind, path):
    source = request.getfixturevalue(kind)
    (source / path).write_bytes(b"")
    refused(source, "CorruptFile", Path(path).name, to="hf" if kind == "nanotron" else "nanotron")


@pytest.mark.parametrize("text", ['{"model_type": "llama",', "null", "[1, 2]", "\x00\x01", '{"hidden_size": 4'])
def test_a_config_that_is_not_a_json_object_is_named(hf, refused, text):
    (hf / "config.json").write_text(text)
    refused(hf, "CorruptFile", "config.json", to="nanotron")


@pytest.mark.parametrize("text", ["three", "-1", "3\n4", "²", "3" * 5000])
def test_a_latest_that_is_no_step_number_is_shown(nanotron, refused, text):
    (nanotron / "latest.txt").write_text(text)
    refused(nanotron, "latest.txt" if not text.startswith("33") else "step", "step")


def test_a_source_that_shrinks_after_planning_stops_the_conversion(hf, tmp_path):
    def shrink(done_bytes: int) -> None:
        os.truncate(hf / "model.safetensors", 1000)

    with pytest.raises(CorruptFile, match=r"model\.safetensors ends at byte"):
        convert(hf, tmp_path / "out", "nanotron", progress=shrink, workers=1)
    assert not (tmp_path / "out").exists()


# --- Files that contradict each other ---


@pytest.mark.parametrize(
    "path", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\\b"]
)
def test_an_index_that_points_out_of_its_folder_is_not_followed(sharded, refused, path):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.norm.weight": path})
    refused(sharded, "CorruptFile", "index.json", repr(path), "It was not opened", to="nanotron")


def test_an_index_entry_without_a_tensor_is_named(sharded, refused):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.ghost.weight": "model-00001-of-00002.safetensors"})
    refused(sharded, "NameMismatch", "model.ghost.weight", "does not hold it", to="nanotron")


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded, refused):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {weight_map["model.norm.weight"]}
    edit_json(index, weight_map={**weight_map, "model.norm.weight": other.pop()})
    refused(sharded, "NameMismatch", "model.norm.weight", "the index has", to="nanotron")


@pytest.mark.parametrize("layout", ["hf", "nanotron"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 96), ("vocab_size", 512), ("num_hidden_layers", 3), ("num_hidden_layers", 5),
     ("intermediate_size", 64), ("num_key_value_heads", 6)],
)  # fmt: skip
def test_a_config_that_contradicts_the_tensors_says_both_sides(request, refused, layout, field, value):
    source = request.getfixturevalue(layout)
    edit_json(source / ("config.json" if layout == "hf" else "3/model_config.json"), **{field: value})
    refused(source, "Mismatch", "config", to="nanotron" if layout == "hf" else "hf")


def test_contradicting_rope_thetas_are_both_shown(hf, refused):
    edit_json(hf / "config.json", rope_theta=10000.0, rope_parameters={"rope_theta": 130000.0, "rope_type": "default"})
    refused(hf, "UnsupportedModel", "rope_theta is 10000", "130000", "make them agree", to="nanotron")


def test_a_tied_config_beside_another_head_is_refused(hf, refused):
    weights = load_file(hf / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, hf / "model.safetensors")
    refused(hf, "NameMismatch", "lm_head.weight", "tie_word_embeddings", to="nanotron")


def test_a_tied_config_beside_an_equal_head_is_fine(hf, cli, tmp_path):
    weights = load_file(hf / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, hf / "model.safetensors")
    assert cli("convert", hf, tmp_path / "out", "--to", "nanotron").code == 0


def test_a_file_of_another_format_version_is_named(nanotron, refused):
    for rank in range(2):
        save_shard(nanotron / DECODER / "1/pp_block/attn/o_proj" / RANK.format(rank), version="1.4")
    refused(nanotron, "MixedCheckpoint", "o_proj", "of format 1.4", "1.5", "copy the checkpoint again")


def test_formats_mixed_without_metadata_are_noticed_too(nanotron, refused):
    (nanotron / "3/checkpoint_metadata.json").unlink()
    for rank in range(2):
        save_shard(nanotron / DECODER / "1/pp_block/attn/o_proj" / RANK.format(rank), version="1.4")
    refused(nanotron, "MixedCheckpoint", "1.4", "1.5")


def test_adams_state_without_the_metadata_that_says_its_step_is_refused(nanotron, refused, cli, tmp_path):
    (nanotron / "3/checkpoint_metadata.json").unlink()
    refused(nanotron, "MissingFile", "checkpoint_metadata.json", "Adam's state is", "--no-optimizer")
    assert cli("convert", nanotron, tmp_path / "out", "--to", "hf", "--no-optimizer").code == 0


def test_metadata_of_another_format_than_the_files_is_refused(nanotron, refused):
    edit_json(nanotron / "3/checkpoint_metadata.json", version="1.4")
    refused(nanotron, "MixedCheckpoint", "of format 1.5", "says 1.4")


def test_an_unknown_format_lists_the_known(nanotron, refused):
    edit_json(nanotron / "3/checkpoint_metadata.json", version="2.0")
    refused(nanotron, "MixedCheckpoint", "format 2.0", "1.2, 1.3, 1.4, 1.5")


@pytest.mark.parametrize("words", [("inspect",), ("inspect", "--json")])
def test_a_last_stage_beyond_the_stages_is_corrupt(nanotron, cli, words):
    path = nanotron / "3/checkpoint_metadata.json"
    metas = json.loads(path.read_text())["metas"]
    edit_json(path, metas={**metas, "last_stage_idx": len(metas["data_stages"])})
    assert_short_error(cli(*words, nanotron), 3, "CorruptFile", "the last stage's index is")


def test_ranks_of_two_topologies_in_one_folder_are_refused(nanotron, refused):
    place = f"{DECODER}/0/pp_block/attn/qkv_proj"
    other = "model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors"
    shutil.copy(TINY / "tp1-pp1-dp1-zero0" / place / other, nanotron / place)
    refused(nanotron, "MixedCheckpoint", "qkv_proj", "rank 0 exists twice", "keep those of one")


def test_a_rank_beyond_its_group_is_not_skipped(nanotron, refused):
    place = nanotron / DECODER / "0/pp_block/attn/qkv_proj"
    shutil.copy(place / RANK.format(1), place / RANK.format(2))
    refused(nanotron, "NameMismatch", RANK.format(2), "Move it out")


def test_parameters_of_two_topologies_in_one_folder_are_refused(nanotron, refused):
    place = f"{DECODER}/0/pp_block/attn/qkv_proj"
    shutil.rmtree(nanotron / place)
    shutil.copytree(TINY / "tp1-pp1-dp1-zero0" / place, nanotron / place)
    refused(nanotron, "MixedCheckpoint", "TP 1 x PP 1", "TP 2 x PP 1", "Keep those of one topology")


def test_an_optimizer_of_another_topology_is_refused(nanotron, refused):
    shutil.rmtree(nanotron / "3/optimizer")
    shutil.copytree(TINY / "tp1-pp2-dp1-zero0/3/optimizer", nanotron / "3/optimizer")
    refused(nanotron, "MixedCheckpoint", "TP 1 x PP 2", "TP 2 x PP 1", "--no-optimizer")


def test_optimizer_files_of_two_topologies_are_refused(nanotron, refused):
    shutil.copytree(TINY / "tp1-pp2-dp1-zero0/3/optimizer", nanotron / "3/optimizer", dirs_exist_ok=True)
    refused(nanotron, "MixedCheckpoint", "several topologies")


def test_a_sidecar_whose_weights_were_changed_is_not_used(with_state, refused, cli, tmp_path):
    weights = load_file(with_state / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, with_state / "model.safetensors")
    refused(with_state, "DigestMismatch", "model.norm.weight", "--no-optimizer", to="nanotron")
    (with_state / "smolconv_manifest.json").unlink()
    assert cli("convert", with_state, tmp_path / "weights", "--to", "nanotron", "--no-optimizer").code == 0


def test_a_checkpoint_changed_after_it_was_written_fails_its_own_digests(with_state, cli):
    path = with_state / "smolconv_state/exp_avg-00001-of-00001.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert_short_error(cli("inspect", with_state, "--check"), 3, "DigestMismatch", "exp_avg", "convert it again")


# --- Models that we cannot represent ---


def test_another_architecture_is_named(hf, refused):
    edit_json(hf / "config.json", model_type="gpt2")
    refused(hf, "UnsupportedModel", "'gpt2'", "llama", "smollm3", to="nanotron")


def test_another_class_of_nanotron_is_named(nanotron, refused):
    edit_json(nanotron / "3/model_config.json", is_llama_config=GONE, is_starcoder2_config=True)
    refused(nanotron, "UnsupportedModel", "is_starcoder2_config", "Llama", "Qwen2")


@pytest.mark.parametrize(
    "field", ["rope_interleaved", "rope_theta", "hidden_size", "vocab_size", "tie_word_embeddings"]
)
def test_a_field_that_would_have_to_be_guessed_is_asked_for(nanotron, refused, field):
    edit_json(nanotron / "3/model_config.json", **{field: GONE})
    refused(nanotron, "UnsupportedModel", "model_config.json", field, "--config")


@pytest.mark.parametrize(
    ("field", "done"), [("rope_interleaved", "always interleaved (true)"), ("rope_theta", "always used 10000")]
)
def test_what_an_older_nanotron_always_did_is_told(nanotron, refused, field, done):
    # nanotron has the fields since its #214 and #173; v0.5 calls FlashRotaryEmbedding(dim, interleaved=True).
    edit_json(nanotron / "3/model_config.json", **{field: GONE})
    refused(nanotron, f"lacks {field}", done, "--config")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window_size", 128), ("moe_config", {"num_experts": 4}), ("rope_seq_len_interpolation_factor", 2.0)],
)
def test_a_field_without_an_equal_is_refused(smollm3, refused, field, value):
    edit_json(smollm3 / "3/model_config.json", **{field: value})
    refused(smollm3, "UnsupportedModel", "model_config.json", field)


def test_a_quantised_model_is_refused(hf, refused):
    edit_json(hf / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(hf, "UnsupportedModel", "config.json", "quantised", to="nanotron")


# --- Pickles that want to run something ---


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def save_zip(obj: object, path: Path) -> None:
    torch.save(obj, path)


def save_legacy(obj: object, path: Path) -> None:
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def save_pickle(obj: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(obj))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize(
    "place",
    ["3/optimizer/optimizer_pp-0-of-1_dp-0-of-2_tp-0-of-2_exp-0-of-1.pt",
     "3/lr_scheduler/lr_scheduler_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt"],
)  # fmt: skip
def test_code_in_a_state_file_is_not_run(nanotron, refused, tmp_path, place, save):
    save({"state": {}, "names": {}, "param_groups": [], "code": Touch(tmp_path / "was-run")}, nanotron / place)
    refused(nanotron, Path(place).name)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_code_in_pytorch_model_bin_is_not_run(hf, refused, tmp_path, save):
    weights = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    save({**weights, "code": Touch(tmp_path / "was-run")}, hf / "pytorch_model.bin")
    refused(hf, "pytorch_model.bin", to="nanotron")
    assert not (tmp_path / "was-run").exists()


def test_the_refused_name_is_said(hf, refused, tmp_path):
    (hf / "model.safetensors").unlink()
    save_zip({"code": Touch(tmp_path / "was-run")}, hf / "pytorch_model.bin")
    refused(hf, "UnsafePickle", "exec", to="nanotron")


# --- Not a number ---


def test_a_shard_full_of_nan_is_kept_bit_for_bit_and_reported(nanotron, cli, tmp_path):
    path = nanotron / EMBEDDING / RANK.format(1)
    shard = load_file(path)["data"]
    bits = 0x7FC00000 + torch.arange(shard.numel(), dtype=torch.int32).reshape(
        shard.shape
    )  # NaN, each with its own payload
    with path.open("r+b") as file:
        file.seek(-shard.numel() * 4, os.SEEK_END)
        file.write(bits.numpy().tobytes())
    done = cli("convert", nanotron, tmp_path / "out", "--to", "hf", "--json")
    assert done.code == 0
    assert any(
        "NaN" in warning and "model.embed_tokens.weight" in warning for warning in json.loads(done.stdout)["warnings"]
    )
    embedding = hf_weights(tmp_path / "out")["model.embed_tokens.weight"].view(torch.int32)
    assert torch.equal(embedding[shard.shape[0] :], bits)
    assert torch.equal(
        embedding[: shard.shape[0]], hf_weights(HF)["model.embed_tokens.weight"].view(torch.int32)[: shard.shape[0]]
    )


# --- Words that do not fit ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--to", "nanotron", "--pp", 8), "--pp 8 leaves pipeline rank"),
        (("--to", "nanotron", "--tp", 5), "--tp 5 does not divide the model's 48 rows of queries"),
        (("--to", "nanotron", "--tp", 3), "--tp 3 does not divide the model's 16 rows of keys"),
        (("--to", "nanotron", "--tp", 0), "--tp"),
        (("--to", "nanotron", "--zero-stage", 2), "--zero-stage 2"),
        (("--to", "nanotron", "--zero-stage", "one"), "--zero-stage"),
        (("--to", "hf", "--tp", 2), "--tp has no meaning for --to hf"),
        (("--to", "hf", "--zero-stage", 1), "--zero-stage has no meaning for --to hf"),
        (("--to", "hf", "--zero-stage", 0), "--zero-stage has no meaning for --to hf"),
        (("--to", "gguf"), "'--to': 'gguf' is not one of 'hf'"),
        (("--to", "deepspeed", "--tp", 2), "--tp has no meaning for --to deepspeed"),
        (("--to", "deepspeed", "--zero-stage", 1), "--zero-stage 1 needs --world-size"),
        (("--to", "deepspeed", "--world-size", 2), "--world-size 2 needs --zero-stage"),
        (("--to", "deepspeed", "--universal", "--zero-stage", 1, "--world-size", 2), "--universal"),
        (("--to", "nanotron", "--universal"), "--universal has no meaning for --to nanotron"),
        (("--to", "hf", "--dtype", "int8"), "'--dtype': 'int8' is not one of 'keep'"),
        (("--to", "hf", "--cast-from", "master"), "--cast-from master"),
        (("--to", "hf", "--cast-from", "moon"), "'--cast-from': 'moon' is not one of 'weights'"),
        (("--to", "hf", "--rope-scaling", "yes"), "'--rope-scaling': 'yes' is not one of 'as-trained'"),
        (("--to", "hf", "--digest", "md5"), "'--digest': 'md5' is not one of 'xxh3'"),
        (("--to", "hf", "--vocab-size", 257), "--vocab-size 257: the checkpoint has 256 rows"),
        (("--to", "hf", "--max-shard-size", "huge"), "--max-shard-size huge"),
        (("--to", "hf", "--max-memory", "1kB"), "--max-memory"),
        (("--to", "hf", "--workers", 0), "--workers"),
        (("--to", "nanotron", "--push", "me/mine"), "--push"),
        (("--to",), "--to"),
        ((), "--to"),
        (("--to", "hf", "--no-such-option"), "--no-such-option"),
    ],
)
def test_words_that_do_not_fit_are_a_usage_error(nanotron, cli, tmp_path, words, expected):
    done = cli("convert", nanotron, tmp_path / "out", *words)
    assert_short_error(done, 2, expected)
    assert not (tmp_path / "out").exists() and not partial(tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"to": "gguf"}, {"dtype": "int8"}, {"cast_from": "moon"}, {"rope_scaling": "yes"}, {"digest": "md5"}]
)
def test_words_that_do_not_fit_are_refused_in_the_library_too(
    nanotron: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: expected "):
        plan_conversion(nanotron, tmp_path / "out", ConvertOptions(**{"to": "hf", **options}))


@pytest.mark.parametrize("words", [("convert",), ("frobnicate",), ("inspect",), ("verify", "a"), ("--nonsense",)])
def test_an_incomplete_command_is_a_usage_error(cli, words):
    assert_short_error(cli(*words), 2)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://alone",
        "hf://a//b",
        "hf://owner/name@",
        "hf://owner/name@a@b",
        "hf://datasets/owner/name",
        "hf:///name",
    ],
)
def test_a_malformed_hub_address_is_a_usage_error(refused, uri):
    refused(uri, "UsageError", "owner/name", code=2)


def test_an_optimizer_that_is_not_there_cannot_be_asked_for(hf, refused):
    refused(hf, "UsageError", "--optimizer", "no Adam state", code=2, to="nanotron", options=("--optimizer",))


def test_a_tokenizer_that_is_not_there_is_named(nanotron, refused, tmp_path):
    refused(nanotron, "--tokenizer", "tokenizer.json", options=("--tokenizer", tmp_path))


@pytest.mark.parametrize("option", ["--config", "--nanotron-config"])
def test_a_config_that_is_not_there_is_named(nanotron, refused, tmp_path, option):
    refused(nanotron, "MissingFile", "nothing.here", to="nanotron", options=(option, tmp_path / "nothing.here"))


@pytest.mark.parametrize("option", ["--config", "--nanotron-config"])
def test_a_folder_given_as_a_config_is_named(nanotron, refused, tmp_path, option):
    refused(nanotron, "CorruptFile", str(tmp_path), "is a folder", to="nanotron", options=(option, tmp_path))


# --- Targets ---


def test_an_existing_target_is_refused_and_untouched(hf, cli, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert_short_error(cli("convert", hf, target, "--to", "nanotron"), 2, "already exists", "--overwrite")
    assert files_below(target) == {"mine.txt": b"mine"}


def test_overwrite_replaces_the_whole_target(hf, cli, tmp_path):
    target = Path(shutil.copytree(TP2, tmp_path / "out"))
    assert cli("convert", hf, target, "--to", "nanotron", "--overwrite").code == 0
    convert(hf, tmp_path / "fresh", "nanotron")
    assert files_below(target) == files_below(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "hf", "out"]


def a_folder_of_notes(target: Path) -> None:
    target.mkdir()
    (target / "mine.txt").write_text("mine")


def a_config_without_weights(target: Path) -> None:
    target.mkdir()
    shutil.copy(HF / "config.json", target)
    (target / "data").mkdir()
    (target / "data/a.json").write_text("{}")


def a_project(target: Path) -> None:
    target.mkdir()
    for name in ("train.py", "results.json", "params.yaml", "my_model.pt", "weights.safetensors", "a.bin"):
        (target / name).write_text("{}")


def a_document(target: Path) -> None:
    target.mkdir()
    (target / "thesis.json").write_text("{}")


def a_config(target: Path) -> None:
    target.mkdir()
    shutil.copy(HF / "config.json", target)


def a_config_of_nanotrons(target: Path) -> None:
    target.mkdir()
    shutil.copy(next(TP2.glob("*/model_config.json")), target)


def a_file_with_a_name_of_deepspeeds(target: Path) -> None:
    target.mkdir()
    (target / "mp_rank_00_model_states.pt").write_text("mine")


def a_trainers_state_beside_a_checkpoint(target: Path) -> None:
    shutil.copytree(HF, target)
    (target / "optimizer.pt").write_text("")


def an_adapter_beside_a_checkpoint(target: Path) -> None:
    shutil.copytree(HF, target)
    shutil.copy(HF / "model.safetensors", target / "adapter_model.safetensors")


def a_script_beside_a_checkpoint(target: Path) -> None:
    shutil.copytree(HF, target)
    (target / "train.py").write_text("")


def a_note_in_a_nanotron_step(target: Path) -> None:
    shutil.copytree(TP2, target)
    (target / "3/todo.md").write_text("")


def two_tags(target: Path) -> None:
    shutil.copytree(FIXTURES / "deepspeed/zero1-twotags-ws2/checkpoint", target)


def a_name_of_ours(target: Path) -> None:
    a_folder_of_notes(target)
    (target / "smolconv_incomplete").write_text("smolconv was interrupted")


def a_file(target: Path) -> None:
    target.write_text("mine")


def a_link_to_notes(target: Path) -> None:
    a_folder_of_notes(target.with_name("elsewhere"))
    target.symlink_to(target.with_name("elsewhere"))


def a_link_to_nothing(target: Path) -> None:
    target.symlink_to("nowhere")


def notes_beside_a_checkpoint(target: Path) -> None:
    shutil.copytree(HF, target)
    (target / "mine.txt").write_text("mine")


def a_repository_around_a_checkpoint(target: Path) -> None:
    shutil.copytree(HF, target)
    (target / ".git/objects").mkdir(parents=True)
    (target / ".git/objects/pack").write_text("history")


def other_checkpoints_inside(target: Path) -> None:
    shutil.copytree(HF, target)
    shutil.copytree(HF, target / "checkpoint-500")


def a_run_of_several_steps(target: Path) -> None:
    shutil.copytree(TP2, target)
    shutil.copytree(target / "3", target / "2")


def our_output_with_notes(target: Path) -> None:
    convert(HF, target.with_name("made"), "nanotron")
    target.with_name("made").rename(target)
    (target / "3").mkdir(exist_ok=True)
    (target / "3/thesis.tex").write_text("precious")


def a_whole_checkpoint(target: Path) -> None:
    shutil.copytree(HF, target)


MINE = [
    a_config_of_nanotrons, a_file_with_a_name_of_deepspeeds, a_folder_of_notes, a_project, a_document, a_config, a_trainers_state_beside_a_checkpoint, two_tags, a_name_of_ours,
    an_adapter_beside_a_checkpoint, a_script_beside_a_checkpoint, a_note_in_a_nanotron_step,
    a_config_without_weights, a_file, a_link_to_notes, a_link_to_nothing, notes_beside_a_checkpoint,
    a_repository_around_a_checkpoint, other_checkpoints_inside, a_run_of_several_steps, our_output_with_notes,
]  # fmt: skip


@pytest.mark.parametrize("make", MINE, ids=lambda make: make.__name__)
def test_overwrite_replaces_nothing_but_a_checkpoint(make, hf, cli, tmp_path):
    make(tmp_path / "out")
    before, link = files_below(tmp_path), os.path.islink(tmp_path / "out")
    done = cli("convert", hf, tmp_path / "out", "--to", "nanotron", "--overwrite")
    assert_short_error(done, 2, "UsageError", "lose more than a checkpoint", f"mv {tmp_path / 'out'}")
    assert (files_below(tmp_path), os.path.islink(tmp_path / "out")) == (before, link)


@pytest.mark.parametrize(
    "make", [a_folder_of_notes, a_file, a_name_of_ours, notes_beside_a_checkpoint, other_checkpoints_inside,
             a_run_of_several_steps, a_whole_checkpoint],
    ids=lambda make: make.__name__,
)  # fmt: skip
@pytest.mark.parametrize("words", [{}, {"overwrite": True}], ids=str)
def test_what_appears_at_the_target_meanwhile_is_not_lost(make, words, hf, cli, tmp_path):
    target = tmp_path / "out"
    made: list[Any] = []

    def appear(count: int) -> None:
        if count and not made:
            make(target)
            made.append(files_below(target) if target.is_dir() else target.read_text())

    with pytest.raises(UsageError, match="--resume"):
        convert(hf, target, "nanotron", progress=appear, workers=1, **words)
    assert (files_below(target) if target.is_dir() else target.read_text()) == made[0]
    target.rename(tmp_path / "moved")
    assert cli("convert", hf, target, "--to", "nanotron", "--resume").code == 0
    convert(hf, tmp_path / "fresh", "nanotron")
    assert files_below(target) == files_below(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "hf", "moved", "out"]


def test_an_empty_folder_that_appears_meanwhile_stays_empty(hf, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="appeared while"):
        convert(hf, target, "nanotron", progress=lambda count: target.mkdir(exist_ok=True) if count else None)
    assert list(target.iterdir()) == []


def test_a_checkpoint_that_gains_a_file_while_it_is_to_be_replaced_is_kept(hf, tmp_path):
    target = Path(shutil.copytree(TP2, tmp_path / "out"))

    def written(count: int) -> None:
        if count:
            (target / "mine.txt").write_text("mine")

    with pytest.raises(UsageError, match=r"mine\.txt"):
        convert(hf, target, "nanotron", overwrite=True, progress=written)
    assert (target / "mine.txt").read_text() == "mine" and (target / "3").is_dir()


@pytest.mark.parametrize("suffix", ["failed", "smolconv-replaced"])
def test_a_folder_of_the_users_with_one_of_our_names_is_not_touched(suffix, hf, tmp_path):
    a_folder_of_notes(tmp_path / f"out.{suffix}")
    with pytest.raises(ParityFailed, match=r"out\.failed"):
        convert(hf, tmp_path / "out", "nanotron", verifier=lambda *_: {"passed": False, "reason": "no"})
    shutil.copytree(TP2, tmp_path / "out")
    convert(hf, tmp_path / "out", "nanotron", overwrite=True)
    assert files_below(tmp_path / f"out.{suffix}") == {"mine.txt": b"mine"}


def test_a_source_whose_weights_are_links_into_the_target_is_not_replaced(hf, cli, tmp_path):
    target = Path(shutil.copytree(hf, tmp_path / "out"))
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").symlink_to(target / "model.safetensors")
    done = cli("convert", hf, target, "--to", "nanotron", "--overwrite")
    assert_short_error(done, 2, "UsageError", "which would be replaced")
    assert files_below(target) == files_below(HF)


@pytest.mark.parametrize("suffix", ["failed", "smolconv-replaced"])
def test_a_checkpoint_of_others_with_one_of_our_names_is_not_touched(suffix, hf, tmp_path):
    shutil.copytree(HF, tmp_path / f"out.{suffix}")
    shutil.copytree(TP2, tmp_path / "out")
    with pytest.raises(ParityFailed):
        convert(hf, tmp_path / "out", "nanotron", overwrite=True, verifier=lambda *_: {"passed": False, "reason": ""})
    convert(hf, tmp_path / "out", "nanotron", overwrite=True)
    assert files_below(tmp_path / f"out.{suffix}") == files_below(HF)


def real_deepspeed_folders() -> list[Path]:
    return sorted(path for path in (FIXTURES / "deepspeed").glob("*/checkpoint") if "twotags" not in path.parent.name)


@pytest.mark.parametrize("source", real_deepspeed_folders(), ids=lambda path: path.parent.name)
def test_overwrite_replaces_every_checkpoint_of_deepspeeds_without_its_config(source, tmp_path):
    assert lost_with(Path(shutil.copytree(source, tmp_path / "out"))) is None
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "notes.txt" in str(lost_with(tmp_path / "out"))


@pytest.mark.parametrize("source", nanotron_topologies(), ids=topology_id)
def test_overwrite_replaces_every_run_of_nanotrons_with_one_step(source, tmp_path):
    assert lost_with(Path(shutil.copytree(source, tmp_path / "out"))) is None
    assert lost_with(tmp_path / "out" / (source / "latest.txt").read_text()) is None


@pytest.mark.parametrize("edit", ["a card", "a tokenizer", "nothing", "a link", "a download"])
def test_overwrite_replaces_a_checkpoint_with_what_belongs_to_one(edit, hf, tmp_path):
    target = tmp_path / "out"
    convert(hf, target, "hf")
    if edit == "a card":
        (target / "README.md").write_text("# my model")
    if edit == "a tokenizer":
        (target / "tokenizer.json").write_text("{}")
        (target / "modeling_mine.py").write_text("")
    if edit == "a download":
        (target / ".cache/huggingface/download").mkdir(parents=True)
        (target / ".cache/huggingface/download/model.safetensors.metadata").write_text("")
    if edit == "a link":
        target.rename(tmp_path / "elsewhere")
        target.symlink_to(tmp_path / "elsewhere")
    convert(hf, target, "nanotron", overwrite=True)
    assert (target / "latest.txt").is_file() and not target.is_symlink()
    assert (tmp_path / "elsewhere/model.safetensors").is_file() == (edit == "a link")


def test_a_failed_overwrite_leaves_the_old_target(hf, cli, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(hf, target)
    truncate(hf / "model.safetensors", 10)
    assert cli("convert", hf, target, "--to", "nanotron", "--overwrite").code == 3
    assert files_below(target) == files_below(HF)


@pytest.mark.parametrize("place", ["hf/out", "hf/deep/out", "hf", "."])
def test_a_target_in_the_source_or_around_it_is_refused(hf, cli, tmp_path, place):
    before = files_below(tmp_path)
    done = cli("convert", hf, tmp_path / place, "--to", "nanotron", "--overwrite")
    assert_short_error(done, 2, "UsageError", "Choose a target outside the source")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", [".", "..", "inner/..", "/here"])
def test_the_folder_that_the_command_runs_in_or_one_around_it_is_not_replaced(cli, tmp_path, name):
    here = tmp_path / "around/here"
    (here / "inner").mkdir(parents=True)
    (here / "mine.txt").write_text("mine")
    done = cli("convert", TP2, here if name == "/here" else name, "--to", "hf", "--overwrite", cwd=here)
    assert_short_error(done, 2, "UsageError", "Choose another target")
    assert files_below(tmp_path) == {"around/here/mine.txt": b"mine"}
    assert os.listdir(tmp_path) == ["around"]


def test_a_partial_folder_of_someone_else_is_not_touched(hf, cli, tmp_path):
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert_short_error(cli("convert", hf, tmp_path / "out", "--to", "nanotron"), 2, "was not written by smolconv")
    assert files_below(other) == {"thesis.tex": b"precious"}


def test_output_that_does_not_verify_gets_another_name(hf, tmp_path):
    with pytest.raises(ParityFailed, match=r"swapped.*\n.*out\.failed") as raised:
        convert(hf, tmp_path / "out", "nanotron", verifier=lambda plan, folder: {"passed": False, "reason": "swapped"})
    assert raised.value.exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["hf", "out.failed"]


def test_two_models_that_differ_are_a_parity_failure(hf, cli, tmp_path):
    shutil.copytree(hf, tmp_path / "other")
    weights = load_file(hf / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, hf / "model.safetensors")
    done = cli("verify", hf, tmp_path / "other", "--tensors-only", "--json")
    assert (done.code, json.loads(done.stdout)["passed"]) == (1, False)


# --- What a command needs ---


@pytest.mark.parametrize("words", [("convert", HF, "out", "--to", "nanotron", "--verify"), ("verify", HF, HF)])
def test_comparing_logits_without_torch_says_what_to_install(cli, tmp_path, words):
    done = cli(*words, before="import sys; sys.modules['torch'] = None", cwd=tmp_path)
    assert_short_error(done, 5, "NotInstalled", "torch", "pip install")
    assert os.listdir(tmp_path) == []


def test_a_hub_address_without_its_client_says_what_to_install(cli, tmp_path):
    done = cli("inspect", "hf://owner/name", before="import sys; sys.modules['huggingface_hub'] = None")
    assert_short_error(done, 5, "NotInstalled", "huggingface_hub", "pip install")


def test_converting_and_inspecting_need_no_torch(cli, tmp_path):
    without = "import sys; sys.modules.update(torch=None, transformers=None, safetensors=None, huggingface_hub=None)"
    assert cli("convert", TP2, tmp_path / "out", "--to", "hf", before=without).code == 0
    assert cli("inspect", tmp_path / "out", "--check", before=without).code == 0


# --- The machine ---


def test_a_parent_that_is_a_file_is_a_machine_error(hf, cli, tmp_path):
    (tmp_path / "file").write_text("")
    assert_short_error(cli("convert", hf, tmp_path / "file/out", "--to", "nanotron"), 4, "MachineError", "file")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system in memory; skips where that is not allowed."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted-{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a tmpfs takes root")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


def test_a_place_without_permission_to_write_is_a_machine_error(hf, cli, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; the read-only file system below shows it")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert_short_error(cli("convert", hf, closed / "out", "--to", "nanotron"), 4, "MachineError", "Permission denied")


def test_a_read_only_file_system_is_a_machine_error(hf, cli, mounted):
    target = mounted("ro") / "out"
    done = cli("convert", hf, target, "--to", "nanotron")
    assert_short_error(done, 4, "MachineError", "Read-only file system", "hoose")


def test_a_source_is_never_written(nanotron, cli, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [nanotron, *nanotron.rglob("*")]}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert cli("convert", nanotron, tmp_path / "out", "--to", "hf").code == 0
    assert cli("inspect", nanotron).code == 0
    assert {path: path.stat().st_mtime_ns for path in [nanotron, *nanotron.rglob("*")]} == before


def test_a_source_on_a_read_only_file_system_converts(cli, mounted, tmp_path):
    place = mounted("size=8m")
    shutil.copytree(TP2, place / "run")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    assert cli("convert", place / "run", tmp_path / "out", "--to", "hf").code == 0


def test_too_little_space_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MachineError, match=r"Free some space.*Nothing was written") as raised:
        convert(TP2, tmp_path / "out", "hf")
    assert raised.value.exit_code == 4
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_a_machine_error_and_resume_completes(cli, tmp_path):
    target = tmp_path / "out"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))"
    done = cli("convert", TP2, target, "--to", "hf", before=limit)
    assert_short_error(done, 4, "MachineError", "File too large", "--resume")
    assert not target.exists() and partial(target).is_dir()
    assert_resume_completes(cli, target, tmp_path / "fresh")


def test_a_disk_that_fills_up_is_a_machine_error_and_resume_completes(cli, mounted, tmp_path):
    disk = mounted("size=3m")
    target = disk / "out"
    with slow_conversion(target) as process:
        wait_until(lambda: len(list(partial(target).rglob("*.safetensors"))) >= 2)
        with pytest.raises(OSError, match="No space"), (disk / "ballast").open("wb") as file:
            while True:
                file.write(bytes(1 << 12))
                file.flush()
        assert_short_error(ended(process), 4, "MachineError", "No space left", "--resume")
    assert not target.exists() and partial(target).is_dir()
    (disk / "ballast").unlink()
    assert_resume_completes(cli, target, tmp_path / "fresh")


def assert_resume_completes(cli: Callable[..., Finished], target: Path, fresh: Path) -> None:
    assert cli("convert", TP2, target, "--to", "hf", "--resume").code == 0
    convert(TP2, fresh, "hf")
    assert files_below(target) == files_below(fresh)
    assert not partial(target).exists()


#: Signals as a terminal leaves them: nohup, and shells for what they run in the background, have some ignored.
HEARS_SIGNALS = """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
"""


def slow_conversion(target: Path) -> subprocess.Popen[str]:
    words = command("convert", TP2, target, "--to", "hf", "--workers", 1, before=HEARS_SIGNALS + SLOW_DISK)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def ended(process: subprocess.Popen[str]) -> Finished:
    stdout, stderr = process.communicate(timeout=60)
    return Finished(process.returncode, stdout, stderr)


def wait_until(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.005)


def test_the_second_of_two_processes_gives_way_at_once(cli, tmp_path):
    target = tmp_path / "out"
    with slow_conversion(target) as first:
        wait_until((partial(target) / "smolconv_journal.jsonl").exists)
        for words in ((), ("--resume",), ("--overwrite",)):
            second = cli("convert", TP2, target, "--to", "hf", *words)
            assert_short_error(second, 4, "OutputLocked", "another process", str(target))
        assert first.poll() is None, "the first was to be still writing"
        assert ended(first).code == 0
    convert(TP2, tmp_path / "fresh", "hf")
    assert files_below(target) == files_below(tmp_path / "fresh")


@pytest.mark.parametrize(("signum", "name"), [("SIGINT", "Ctrl-C"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_a_signal_keeps_the_partial_folder_and_resume_completes(signum, name, cli, tmp_path):
    target = tmp_path / "out"
    with slow_conversion(target) as process:
        wait_until(lambda: len((partial(target) / "smolconv_journal.jsonl").read_text().splitlines()) > 2
                   if (partial(target) / "smolconv_journal.jsonl").exists() else False)  # fmt: skip
        process.send_signal(getattr(signal, signum))
        assert_short_error(ended(process), 130, f"stopped by {name}", str(partial(target)), "--resume")
    assert not target.exists() and partial(target).is_dir()
    assert_resume_completes(cli, target, tmp_path / "fresh")


def test_a_conversion_under_nohup_outlives_its_terminal(tmp_path):
    words = command("convert", TP2, tmp_path / "out", "--to", "hf", "--workers", 1, before=SLOW_DISK)
    with subprocess.Popen(
        ["nohup", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    ) as process:  # fmt: skip
        wait_until((partial(tmp_path / "out") / "smolconv_journal.jsonl").exists)
        process.send_signal(signal.SIGHUP)
        assert ended(process).code == 0
    assert (tmp_path / "out").is_dir()


#: What is read of tensors never comes.
SLOW_READ = """
import smolconv.tensors.reading, smolconv.storage.integrity, time
def never(*_):
    open(WAITING, "w").close()
    while True:
        time.sleep(0.05)
        yield 0, b""
smolconv.tensors.reading.pread = lambda *_: list(never())
smolconv.storage.integrity._read = never
"""


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    "words", [("verify", TP2, HF, "--tensors-only"), ("inspect", TP2, "--check")], ids=lambda w: w[0]
)
def test_a_signal_ends_what_only_reads_and_says_that_nothing_was_written(words, signum, tmp_path):
    process = subprocess.Popen(
        command(*words, before=HEARS_SIGNALS + SLOW_READ.replace("WAITING", repr(str(tmp_path / "waiting")))),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    with process:
        wait_until((tmp_path / "waiting").exists)
        process.send_signal(getattr(signal, signum))
        assert_short_error(ended(process), 130, "stopped by", "Nothing was written")
    assert os.listdir(tmp_path) == ["waiting"]


# --- JSON ---


@pytest.mark.parametrize(
    "words",
    [("convert", TP2, "out", "--to", "nanotron", "--pp", 2, "--dtype", "bfloat16"), ("convert", TP2, "out", "--to", "hf", "--dry-run"),
     ("inspect", TP2), ("inspect", TP2, "--tensors"), ("verify", TP2, HF, "--tensors-only"), ("diff", TP2, HF)],
)  # fmt: skip
def test_json_is_one_document_and_all_of_stdout(cli, tmp_path, words):
    done = cli(*words, "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert (done.code in (0, 1), document["schema"]) == (True, 1)


def test_a_dry_run_says_its_time_and_memory_as_a_conversion_does(cli, tmp_path):
    done = cli("convert", TP2, tmp_path / "out", "--to", "hf", "--dry-run", "--json")
    document = json.loads(done.stdout)
    assert document["seconds"] > 0 and document["peak_rss_bytes"] > 0


def test_warnings_of_a_json_conversion_go_to_stderr_and_into_the_document(cli, tmp_path):
    done = cli("convert", TP2, tmp_path / "out", "--to", "nanotron", "--pp", 2, "--dtype", "bfloat16", "--json")
    warnings = json.loads(done.stdout)["warnings"]
    assert any("bfloat16" in warning for warning in warnings)
    assert all(warning in done.stderr for warning in warnings)


def test_a_reader_that_leaves_early_is_no_failure(tmp_path):
    words = command("inspect", TP2, "--tensors", "--json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")


def test_a_traceback_is_printed_only_when_asked_for(cli, tmp_path):
    done = cli("--debug", "inspect", tmp_path / "nowhere")
    assert done.code == 3 and "Traceback" in done.stderr


# --- Anything else ---


def only_our_errors(source: Path) -> bool:
    """Read and plan; whether it was refused. What is not a ``SmolconvError`` would end the command with 70."""
    to = "nanotron" if (source / "config.json").exists() else "hf"
    try:
        plan_conversion(source, source.parent / "never", ConvertOptions(to=to))
    except SmolconvError as error:
        assert error.exit_code in (2, 3, 4), error
        return True
    return False


def damaged(content: bytes, chance: random.Random) -> bytes | None:
    """The content with a bit flipped, bytes overwritten, a piece cut out or doubled, its end gone; None for no file."""
    at, length = chance.randrange(max(1, min(len(content), 3000))), chance.choice([1, 2, 8, 100])
    match chance.randrange(7):
        case 0 | 1:
            return (
                content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
                if content
                else b"x"
            )
        case 2:
            return content[:at] + chance.randbytes(length) + content[at + length :]
        case 3:
            return content[:at] + content[at + length :]
        case 4:
            return content[: at + length] + content[at:]
        case 5:
            return content[: chance.randrange(len(content) + 1)]
    return None


@pytest.mark.parametrize("kind", ["nanotron", "smollm3", "sharded", "with_state"])
def test_damage_anywhere_ends_in_one_of_our_errors(request, kind):
    source, chance = request.getfixturevalue(kind), random.Random(kind)
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and "random" not in path.parts]
    # Every kind of file equally often, not every file: most of them are alike.
    kinds = sorted({path.suffix + ("c" if "config" in path.name else "") for path in files})
    refusals = 0
    for round_ in range(40):
        kind_of_file = kinds[round_ % len(kinds)]
        path = chance.choice([p for p in files if p.suffix + ("c" if "config" in p.name else "") == kind_of_file])
        content = path.read_bytes()
        changed = damaged(content, chance)
        path.unlink() if changed is None else path.write_bytes(changed)
        refusals += only_our_errors(source)
        path.write_bytes(content)
    assert refusals >= 12, "the damage was to be noticed, most of the time"


STRANGE: tuple[Any, ...] = (None, -1, 0, 1.5, 1 << 40, 1e300, float("nan"), "x", "", [], [None], {}, {"a": 1}, True)


def places(document: object, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document; only to the first few where there are many alike."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items)[: 3 if so_far else None]:
        yield (*so_far, key)
        yield from places(value, (*so_far, key))


def with_value(document: Any, place: tuple[Any, ...], value: object) -> object:
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "name"),
    [("nanotron", "3/model_config.json"), ("nanotron", "3/checkpoint_metadata.json"), ("smollm3", "3/model_config.json"),
     ("hf", "config.json"), ("sharded", "model.safetensors.index.json"), ("with_state", "smolconv_state/state.json")],
)  # fmt: skip
def test_a_strange_value_in_any_field_ends_in_one_of_our_errors(request, kind, name):
    source, chance = request.getfixturevalue(kind), random.Random(name)
    original = json.loads((source / name).read_text())
    for place in places(original):
        for value in chance.sample(STRANGE, 2):
            (source / name).write_text(json.dumps(with_value(original, place, value)))
            try:
                only_our_errors(source)
            except Exception as error:
                raise AssertionError(f"{name}: {place} = {value!r}") from error


@pytest.mark.parametrize("name", ["optimizer/optimizer_pp-0-of-1_dp-0-of-2", "lr_scheduler/lr_scheduler_pp-0-of-1"])
def test_a_strange_value_in_any_field_of_a_state_file_ends_in_one_of_our_errors(nanotron, name):
    path, chance = nanotron / f"3/{name}_tp-0-of-2_exp-0-of-1.pt", random.Random(name)
    original = torch.load(path, weights_only=True)
    for place in places(original):
        for value in chance.sample([*STRANGE, torch.zeros(2), torch.tensor(float("inf"))], 1):
            torch.save(with_value(original, place, value), path)
            try:
                only_our_errors(nanotron)
            except Exception as error:
                raise AssertionError(f"{name}: {place} = {value!r}") from error


def test_a_safetensors_header_with_strange_entries_is_a_corrupt_file(hf):
    path = hf / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:HEADER_BYTES])
    header = json.loads(content[HEADER_BYTES : HEADER_BYTES + length])
    name = "model.norm.weight"
    for place in [
        (name,),
        *((name, key) for key in header[name]),
        (name, "shape", 0),
        (name, "data_offsets", 1),
        ("__metadata__",),
    ]:
        for value in STRANGE:
            raw = json.dumps(with_value(header, place, value)).encode()
            path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[HEADER_BYTES + length :])
            try:
                read_checkpoint(hf, ReadOptions())
            except BadCheckpoint:
                continue
