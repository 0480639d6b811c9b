"""Claims about what ranks hold in common, and about the counts that say where a parameter lies: both are checked.

What is taken from one rank is compared with the others, and a number in a document that contradicts the tensors is
refused. The files are DeepSpeed's and nanotron's own, edited by torch and safetensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from deepspeed_folders import Case, case, edit, model_file, optimizer_file
from nanotron_folders import differences
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smolconv.errors import BadCheckpoint, CorruptFile, MixedCheckpoint, ShapeMismatch
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

AUTOTP, AUTOTP3, ALIGNED = "autotp2-zero1-bf16", "autotp2-zero3-ws4", "zero1-bf16-alignment-ws2"
NANOTRON = FIXTURES / "nanotron/smollm2-tiny"
QKV = "3/model/model/decoder/0/pp_block/attn/qkv_proj"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Case]:
    return lambda name: case(name).copied(tmp_path / "copies")


@pytest.fixture
def nanotron(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(NANOTRON / name, tmp_path / name))


def refused(folder: Path | Case, tmp_path: Path, error: type[BadCheckpoint], *words: str, **options: Any) -> None:
    with pytest.raises(error) as raised:
        convert(folder.checkpoint if isinstance(folder, Case) else folder, tmp_path / "out", "hf", **options)
    message = str(raised.value)
    assert raised.value.exit_code == 3
    assert [word for word in words if word not in message] == [], message
    assert list(tmp_path.glob("out*")) == []


def edit_config(source: Case, **changes: object) -> None:
    source.config.write_text(json.dumps({**json.loads(source.config.read_text()), **changes}))


# --- AutoTP: replicas are compared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [AUTOTP, AUTOTP3])
@pytest.mark.parametrize(
    ("field", "value", "parameter"),
    [
        ("num_key_value_heads", 1, "k_proj"),
        ("num_attention_heads", 2, "q_proj"),
        ("intermediate_size", 12, "gate_proj"),
        ("vocab_size", 20, "embed_tokens"),
    ],
)
@pytest.mark.parametrize("optimizer", [True, False])
def test_shards_are_not_taken_for_replicas_by_a_config_that_is_too_small(
    broken, tmp_path, name, field, value, parameter, optimizer
):
    source = broken(name)
    edit_config(source, **{field: value})
    refused(source, tmp_path, ShapeMismatch, parameter, "tensor-parallel ranks", "rank 1", field, optimizer=optimizer)


def test_the_untouched_config_is_read(broken, tmp_path):
    source = broken(AUTOTP)
    convert(source.checkpoint, tmp_path / "out", "hf")
    expected = {name: tensor.bfloat16() for name, tensor in source.engine("fp32").items()}
    assert list(differences(hf_weights(tmp_path / "out"), expected)) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("norm", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_norm_that_differs_on_one_rank_is_noticed(broken, tmp_path, norm, rank, place):
    source = broken(AUTOTP)

    def change(document: dict[str, Any]) -> None:
        document["module"][norm][place] += 0.5

    edit(model_file(source.tag, tp=rank), change)
    # Rank 0's is also compared with its master.
    refused(source, tmp_path, BadCheckpoint, norm)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_of_a_norm_that_differ_on_one_rank_are_noticed(broken, tmp_path, key):
    source = broken(AUTOTP)
    (path,) = source.tag.glob("*_mp_rank_01_optim_states.pt")

    def change(document: dict[str, Any]) -> None:
        for state in document["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state[key][-3] += 1  # the last of the group without weight decay is a norm

    edit(path, change)
    refused(source, tmp_path, ShapeMismatch, "norm", "other values than rank 0")


def test_a_rank_of_another_number_of_ranks_is_noticed(broken, tmp_path):
    source = broken(AUTOTP)
    edit(model_file(source.tag, tp=1), lambda document: document.update(mp_world_size=4))
    refused(source, tmp_path, MixedCheckpoint, "mp_rank_01_model_states.pt", "4 tensor-parallel ranks")


def test_a_dtype_of_one_tensor_parallel_rank_is_noticed(broken, tmp_path):
    source = broken(AUTOTP)
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(model_file(source.tag, tp=1), lambda d: d["module"].update({name: d["module"][name].float()}))
    refused(source, tmp_path, BadCheckpoint, "rank")


# --- DeepSpeed: the other ranks' documents ----------------------------------------------------------------------------


def swapped_names(document: dict[str, Any]) -> None:
    names = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight")
    swap = dict(zip(names, reversed(names)))
    document["param_shapes"] = [
        {swap.get(name, name): shape for name, shape in group.items()} for group in document["param_shapes"]
    ]


@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero2-fp32-ws3", AUTOTP])
def test_names_of_equal_shape_exchanged_in_the_flat_order_are_noticed(broken, tmp_path, name):
    """Also without a shift of anything else: each weight is compared with its master where it begins."""
    source = broken(name)
    for path in source.tag.glob("*_model_states.pt"):
        edit(path, swapped_names)
    refused(source, tmp_path, MixedCheckpoint, "is not its rounded master")


@pytest.mark.parametrize("rank", [1, 2])
def test_a_model_file_of_zero_3_that_says_something_else_is_noticed(broken, tmp_path, rank):
    source = broken("zero3-bf16-ws3")
    edit(model_file(source.tag, rank), swapped_names)
    path = model_file(source.tag, rank).name
    refused(source, tmp_path, MixedCheckpoint, path, "param_shapes", "copy all of one")


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: torch.cat([t, t[:1]]), lambda t: t[:0]])
def test_a_fragment_of_another_length_is_noticed(broken, tmp_path, change):
    source = broken("zero3-bf16-frozen-uneven-ws3")
    name = "model.embed_tokens.weight"

    def edited(document: dict[str, Any]) -> None:
        document["frozen_param_fragments"][name] = change(document["frozen_param_fragments"][name]).clone()

    edit(model_file(source.tag, 1), edited)
    refused(source, tmp_path, MixedCheckpoint, name, "99 in each of 3")


# --- DeepSpeed: counts that become offsets ----------------------------------------------------------------------------


def edit_optimizers(source: Case, **changes: object) -> None:
    for path in source.tag.glob("*_optim_states.pt"):
        edit(path, lambda document: document["optimizer_state_dict"].update(changes))


def alignment(source: Case) -> list[list[int]]:
    found: list[list[int]] = []
    edit(optimizer_file(source.tag, 0), lambda d: found.extend(d["optimizer_state_dict"]["param_alignment_paddings"]))
    return [list(group) for group in found]


@pytest.mark.parametrize(
    "paddings",
    [(-2, 2), (2, -2), (0, 2), (2, 0), (True, 0), (2.0, 0), ("2", 0), (None, 0), (10**20, 0), (1, 0), (0, 0)],
)
def test_an_alignment_padding_that_shifts_what_follows_is_refused(broken, tmp_path, paddings):
    """The sizes say what the paddings are. The sum is kept by moving one from its place to another's."""
    source = broken(ALIGNED)
    groups = alignment(source)
    at = next(i for i, padding in enumerate(groups[1]) if padding)
    if paddings == (0, 2):
        groups[1][at], groups[1][at + 1] = 0, groups[1][at + 1] + groups[1][at]
    else:
        groups[1][at : at + 2] = paddings
    if groups == alignment(source):
        pytest.fail("nothing was changed")
    edit_optimizers(source, param_alignment_paddings=groups)
    refused(source, tmp_path, CorruptFile, "padding")


@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero1-untied-ws2", AUTOTP])
def test_a_padding_where_there_is_none_is_refused(broken, tmp_path, name):
    source = broken(name)
    groups = alignment(source)
    index = next(i for i, group in enumerate(groups) if len(group) > 1)
    groups[index][:2] = [-2, 2]
    edit_optimizers(source, param_alignment_paddings=groups)
    refused(source, tmp_path, CorruptFile, "padding")


@pytest.mark.parametrize("padding", [-1, True, 1.0, "0", None, 1, 10**9])
def test_a_group_padding_that_contradicts_the_slices_is_refused(broken, tmp_path, padding):
    source = broken("zero1-bf16-ws3-uneven")
    path = optimizer_file(source.tag, 2)
    found: list[int] = []

    def change(document: dict[str, Any]) -> None:
        paddings = list(document["optimizer_state_dict"]["group_paddings"])
        index = next(i for i, value in enumerate(paddings) if value not in (0, padding))
        found.append(paddings[index])
        paddings[index] = padding
        document["optimizer_state_dict"]["group_paddings"] = paddings

    edit(path, change)
    assert found[0] > 0
    refused(source, tmp_path, CorruptFile, "group_paddings", path.name)


@pytest.mark.parametrize("count", [0, -3, True, 3.0, "3", None, [], [3, 3, 3, 2], [3, 3, 3, True], [3, "x"], 10**15])
def test_a_partition_count_that_is_none_is_refused(broken, tmp_path, count):
    source = broken("zero1-bf16-ws3-uneven")
    edit_optimizers(source, partition_count=count)
    refused(source, tmp_path, CorruptFile, "partition_count")


@pytest.mark.parametrize("params", [["a"], [1], [0, 1], [-1], [0.0], [True], [[0]], None, 0])
@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-subgroups-ws3-uneven", "zero0-bf16"])
def test_numbers_of_parameters_that_torch_would_not_give_are_refused(broken, tmp_path, name, params):
    source = broken(name)

    def change(document: dict[str, Any]) -> None:
        inner = document.get("optimizer_state_dict") or document["optimizer"]["optimizer_state_dict"]
        inner = inner.get("base_optimizer_state") or inner.get("optimizer_state_dict") or inner
        inner["param_groups"][0]["params"] = params

    for path in source.tag.glob("*_model_states.pt" if name == "zero0-bf16" else "*_optim_states.pt"):
        edit(path, change)
    refused(source, tmp_path, CorruptFile)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1, 2]])
@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-ws3"])
def test_state_that_one_flat_tensor_has_not_is_missed(broken, tmp_path, name, ranks):
    """Zeros in its place would be another optimizer's state, without a word."""
    source = broken(name)

    def change(document: dict[str, Any]) -> None:
        inner = document["optimizer_state_dict"]
        (inner.get("base_optimizer_state") or inner["optimizer_state_dict"])["state"].pop(1)

    for rank in ranks:
        edit(optimizer_file(source.tag, rank), change)
    refused(source, tmp_path, BadCheckpoint, "step" if len(ranks) < 3 else "flat tensor 1 is missing")


# --- nanotron ---------------------------------------------------------------------------------------------------------


def shard(run: Path, folder: str, rank: int, of: int) -> Path:
    (path,) = (run / folder).glob(f"*_tp-rank-{rank}-of-{of}.safetensors")
    return path


def edit_slices(path: Path, change: Callable[[str], str]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    pairs = change(metadata["local_global_slices_pairs"])
    assert pairs != metadata["local_global_slices_pairs"]
    save_file(load_file(path), path, {**metadata, "local_global_slices_pairs": pairs})


def numbers(text: str) -> str:
    return re.sub(r"np\.int64\((\d+)\)", r"\1", text)


def test_a_slice_that_takes_rows_of_another_is_noticed(nanotron, tmp_path):
    """Keys from the rows of queries: the places in the whole are covered once all the same."""
    run = nanotron("tp1-pp1-dp1-zero0")

    def change(text: str) -> str:
        query, key, value = numbers(text).split(";")
        return ";".join([query, key.replace("48,64,None", "0,16,None", 1), value])

    edit_slices(shard(run, QKV, 0, 1), change)
    refused(run, tmp_path, ShapeMismatch, "qkv_proj", "(0, 16)")


def test_keys_in_the_place_of_values_are_noticed(nanotron, tmp_path):
    run = nanotron("tp2-pp1-dp2-zero1")

    def change(text: str) -> str:
        query, key, value = numbers(text).split(";")
        (a, b), (c, d) = key.split("#"), value.split("#")
        return ";".join([query, f"{a}#{d}", f"{c}#{b}"])

    for rank in range(2):
        edit_slices(shard(run, QKV, rank, 2), change)
    refused(run, tmp_path, ShapeMismatch, "qkv_proj", "by the config")


@pytest.mark.parametrize("name", ["tp1-pp1-dp1-zero0", "tp2-pp1-dp2-zero1"])
def test_heads_of_the_config_that_the_slices_contradict_are_noticed(nanotron, tmp_path, name):
    run = nanotron(name)
    path = run / "3/model_config.json"
    config = json.loads(path.read_text())
    heads = config["num_attention_heads"]
    path.write_text(json.dumps({**config, "num_key_value_heads": heads}))
    refused(run, tmp_path, ShapeMismatch, "qkv_proj", "config")


def nanotron_states(run: Path, pattern: str) -> list[Path]:
    paths = sorted((run / "3/optimizer").glob(pattern))
    assert paths
    return paths


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("tp", [0, 1])
def test_moments_of_a_norm_that_differ_between_tensor_parallel_ranks_are_noticed(nanotron, tmp_path, key, tp):
    run = nanotron("tp2-pp1-dp2-zero1")
    (path,) = nanotron_states(run, f"optimizer_pp-0-of-1_dp-1-of-2_tp-{tp}-of-2_exp-0-of-1.pt")
    document = torch.load(path, weights_only=True)
    index = next(i for i, name in document["names"].items() if "layernorm" in name)
    document["state"][index][key].view(-1)[-1] += 1
    torch.save(document, path)
    refused(run, tmp_path, MixedCheckpoint, document["names"][index], key, "--no-optimizer")
    convert(run, tmp_path / "weights", "hf", optimizer=False)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_of_a_tied_embedding_that_differ_between_pipeline_ranks_are_noticed(nanotron, tmp_path, key):
    run = nanotron("tp1-pp2-dp1-zero0")
    (path,) = nanotron_states(run, "optimizer_pp-1-of-2_*.pt")
    document = torch.load(path, weights_only=True)
    index = next(i for i, name in document["names"].items() if "token_embedding" in name)
    document["state"][index][key].view(-1)[-1] += 1
    torch.save(document, path)
    refused(run, tmp_path, MixedCheckpoint, "token_embedding", key)


@pytest.mark.parametrize("field", ["step", "lr"])
def test_ranks_of_two_steps_or_rates_are_noticed(nanotron, tmp_path, field):
    run = nanotron("tp2-pp1-dp2-zero1")
    (path,) = nanotron_states(run, "optimizer_pp-0-of-1_dp-1-of-2_tp-1-of-2_exp-0-of-1.pt")
    document = torch.load(path, weights_only=True)
    if field == "step":
        for state in document["state"].values():
            state["step"] = state["step"] + 1
    else:
        for group in document["param_groups"]:
            group["lr"] = 0.5
    torch.save(document, path)
    refused(run, tmp_path, MixedCheckpoint, path.name, "copy all of one")


def test_a_norm_that_a_tensor_parallel_rank_has_no_state_of_is_noticed(nanotron):
    run = nanotron("tp2-pp1-dp2-zero1")
    for path in nanotron_states(run, "optimizer_*_tp-1-of-2_*.pt"):
        document = torch.load(path, weights_only=True)
        index = next(i for i, name in document["names"].items() if "layernorm" in name)
        del document["names"][index], document["state"][index]
        torch.save(document, path)
    with pytest.raises(ShapeMismatch, match="tensor-parallel rank 1"):
        read_checkpoint(run, ReadOptions())
