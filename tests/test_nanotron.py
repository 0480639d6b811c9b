"""nanotron's layout: the split over ranks, and folders that equal those which nanotron itself wrote, file by file."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FIXTURES, convert, hf_weights, nanotron_topologies, topology_id
from hf_models import largest_logits_difference
from hypothesis import given
from hypothesis import strategies as st
from nanotron_folders import (
    differences,
    file_names,
    parameter_of,
    run_differences,
    shards,
    states,
    step_folder,
    topology_of,
)
from safetensors.torch import load_file

from smolconv.checkpoint import MOMENTS
from smolconv.errors import NameMismatch, UnsupportedModel, UsageError
from smolconv.layouts.nanotron.reader import read_nanotron
from smolconv.layouts.nanotron.schedule import scheduled_lr
from smolconv.layouts.nanotron.topology import pipeline_ranks, zero1_slices
from smolconv.models.nanotron import spec_from_nanotron
from smolconv.models.spec import ModelSpec

NANOTRON = FIXTURES / "nanotron"
SMOLLM2, SMOLLM3, BF16 = (NANOTRON / name for name in ("smollm2-tiny", "smollm3-tiny", "smollm3-tiny-bf16"))
#: Runs whose folder's name is their whole topology; others differ from their model's runs in more than that.
NAMED = [run for run in nanotron_topologies() if topology_of(run)]
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
#: fp32 on CPU, another order of summation; nanotron's own converter reaches 1.5e-6 (shared oracle's README).
MAX_LOGITS_DIFFERENCE = 5e-6


def resharding_pairs() -> list[tuple[Path, Path]]:
    """Topologies of one model, in every order and each to itself."""
    configs = {run: (step_folder(run) / "model_config.json").read_text() for run in NAMED}
    pairs = itertools.product(NAMED, NAMED)
    return [(a, b) for a, b in pairs if a.parent.name == b.parent.name and configs[a] == configs[b]]


def pair_id(pair: tuple[Path, Path]) -> str:
    return f"{topology_id(pair[0])} to {pair[1].name}"


# --- the split over pipeline ranks -----------------------------------------------------------------------------------


def published(
    architecture: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> ModelSpec:
    return ModelSpec(
        architecture=architecture, hidden_size=hidden, intermediate_size=inner, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_size=hidden // heads, vocab_size=vocab, max_positions=8192, rms_norm_eps=1e-5,
        rope_theta=1e5, rope_scaling=None, use_rope=(True,) * layers, tied=True, attention_bias=False, mlp_bias=False,
        activation="silu",
    )  # fmt: skip


SMOLLM2_135M = published("llama", 576, 1536, 30, 9, 3, 49152)
SMOLLM2_1700M = published("llama", 2048, 8192, 24, 32, 32, 49152)
SMOLLM3_3B = published("smollm3", 2048, 11008, 36, 16, 4, 128256)


@pytest.mark.parametrize(
    ("spec", "blocks_by_rank"),
    [
        (SMOLLM2_135M, [11, 9, 9, 4]),
        (SMOLLM2_1700M, [14, 13]),
        (SMOLLM2_1700M, [8, 6, 7, 6]),
        (SMOLLM3_3B, [21, 18]),
        (SMOLLM3_3B, [11, 10, 10, 8]),
    ],
    ids=["135M pp4", "1.7B pp2", "1.7B pp4", "3B pp2", "3B pp4"],
)
def test_blocks_lie_on_the_pipeline_ranks_where_nanotron_puts_them(spec, blocks_by_rank):
    # Counted in nanotron (branch smollm3, bc1f5a61): embedding, layers, final norm and head.
    ranks = list(pipeline_ranks(spec, len(blocks_by_rank)).values())
    assert [Counter(ranks)[rank] for rank in range(len(blocks_by_rank))] == blocks_by_rank
    assert ranks == sorted(ranks)


def test_a_block_that_just_reaches_the_threshold_leaves_room_for_the_next():
    # A layer costs 4 * E * E + 3 * F * E = 156 * E, and so does the head: eight equal costs, two for each rank.
    spec = published("llama", 24, 20, 7, 6, 2, 156)
    assert list(pipeline_ranks(spec, 4).values()) == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_split_that_leaves_a_rank_empty_is_refused():
    with pytest.raises(UsageError, match="--pp 8"):
        pipeline_ranks(SMOLLM2_135M, 8)


@pytest.mark.parametrize("run", nanotron_topologies(), ids=topology_id)
def test_file_names_of_nanotron_state_the_ranks_that_we_compute(run):
    step = step_folder(run)
    spec = spec_from_nanotron(json.loads((step / "model_config.json").read_text()))
    blocks = {"token_position_embeddings": "embedding", "lm_head": "head"}
    for path in (step / "model").rglob("*pp-rank-*"):
        rank, size = map(int, re.search(r"pp-rank-(\d+)-of-(\d+)", path.name).groups())
        _, block, layer, *_ = parameter_of(path, step).split(".")
        assert pipeline_ranks(spec, size)[blocks.get(block, layer)] == rank, path


# --- ZeRO-1 ----------------------------------------------------------------------------------------------------------


def zero1_runs() -> list[Path]:
    return [run for run in nanotron_topologies() if "zero1" in run.name]


@pytest.mark.parametrize("run", zero1_runs(), ids=topology_id)
def test_zero1_slices_are_those_that_nanotron_recorded(run):
    configs = json.loads((step_folder(run) / "optimizer/optimizer_config.json").read_text())["configs"]
    for name, offsets in configs["param_name_to_dp_rank_offsets"].items():
        numel = torch.Size(map(int, configs["orig_param_shapes"][name])).numel()
        recorded = {int(rank): (int(start), int(stop)) for rank, (start, stop) in offsets.items()}
        computed = dict(enumerate(zero1_slices(numel, len(offsets))))
        assert computed == recorded, name


@pytest.mark.parametrize(
    ("numel", "sizes"), [(8, [2, 2, 2, 2]), (7, [2, 2, 2, 1]), (5, [2, 1, 1, 1]), (3, [1, 1, 1, 0]), (1, [1, 0, 0, 0])]
)
def test_the_last_data_parallel_ranks_hold_one_element_less_and_maybe_none(numel, sizes):
    assert [stop - start for start, stop in zero1_slices(numel, 4)] == sizes


@given(st.integers(1, 200), st.integers(1, 9))
def test_zero1_slices_cover_a_tensor_once(numel, dp):
    slices = zero1_slices(numel, dp)
    assert len(slices) == dp
    assert [n for start, stop in slices for n in range(start, stop)] == list(range(numel))


# --- to Hugging Face -------------------------------------------------------------------------------------------------


@pytest.fixture(params=nanotron_topologies(), ids=topology_id)
def converted(request, tmp_path) -> tuple[Path, Path]:
    """A run folder of nanotron, and what we make of it."""
    convert(request.param, tmp_path / "hf", "hf")
    return request.param, tmp_path / "hf"


def test_every_topology_becomes_the_model_that_nanotrons_converter_makes_and_its_logits(converted):
    run, folder = converted
    expected, found = load_file(run.parent / "expected_hf/model.safetensors"), hf_weights(folder)
    expected = {name: tensor.to(found["model.norm.weight"].dtype) for name, tensor in expected.items()}
    if "lm_head.weight" not in found:
        assert torch.equal(
            expected.pop("lm_head.weight", found["model.embed_tokens.weight"]), found["model.embed_tokens.weight"]
        )
    assert list(differences(found, expected)) == []
    # nanotron ignores rope_scaling, and bf16 copies of an fp32 model are rounded: those have no reference logits.
    if "ropescaling" not in run.parent.name and "bf16" not in run.name:
        assert largest_logits_difference(folder, run.parent / "reference.safetensors") <= MAX_LOGITS_DIFFERENCE


# --- to another topology ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", resharding_pairs(), ids=pair_id)
def test_resharding_gives_the_very_checkpoint_that_nanotron_wrote_at_that_topology(pair, tmp_path):
    source, expected = pair
    convert(source, tmp_path / "out", "nanotron", **topology_of(expected))
    assert run_differences(tmp_path / "out", expected) == []


@pytest.mark.parametrize("run", NAMED, ids=topology_id)
def test_at_the_same_topology_random_states_and_config_are_kept_whole(run, tmp_path):
    convert(run, tmp_path / "out", "nanotron", **topology_of(run))
    found, expected = step_folder(tmp_path / "out"), step_folder(run)
    states_found, states_expected = (
        {path.name: path.read_bytes() for path in (step / "random").iterdir()} for step in (found, expected)
    )
    assert states_found == states_expected
    assert yaml.safe_load((found / "config.yaml").read_text()) == yaml.safe_load((expected / "config.yaml").read_text())


def test_random_states_of_other_ranks_are_dropped_with_a_warning(tmp_path):
    result = convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "out", "nanotron", tp=2)
    assert not (tmp_path / "out/3/random").exists()
    assert any("random states" in warning for warning in result.warnings)


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
@pytest.mark.parametrize("source", [SMOLLM3 / "tp1-pp2-dp1-zero0", BF16 / "tp2-pp1-dp1-zero0"], ids=topology_id)
def test_written_optimizer_files_load_in_torch_without_running_code(source, mmap, tmp_path):
    convert(source, tmp_path / "out", "nanotron", tp=2, pp=2)
    loaded = states(tmp_path / "out/3", "optimizer", mmap=mmap)
    assert len(loaded) == 4
    assert all(state["exp_avg"].isfinite().all() for file in loaded.values() for state in file["state"].values())


def test_masters_are_views_of_one_buffer_as_nanotron_stores_them(tmp_path):
    convert(BF16 / "tp2-pp1-dp1-zero0", tmp_path / "out", "nanotron")
    (file,) = states(tmp_path / "out/3", "optimizer").values()
    masters = file["gradient_accumulator"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in masters.values()}) == 1
    assert {name: tensor.dtype for name, tensor in masters.items()} == dict.fromkeys(
        file["names"].values(), torch.float32
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_on_another_pipeline_rank_counts_its_copy_of_the_embedding_last(tp, tmp_path):
    convert(SMOLLM3 / "tp2-pp1-dp2-zero1", tmp_path / "out", "nanotron", tp=tp, pp=2)
    loaded = states(tmp_path / "out/3", "optimizer")
    for rank in range(tp):
        first, last = (loaded[f"optimizer_pp-{pp}-of-2_tp-{rank}-of-{tp}_exp-0-of-1.pt"] for pp in (0, 1))
        assert (first["names"][0], list(last["names"].values())[-1]) == (EMBEDDING, EMBEDDING)
        assert list(differences(first["state"][0], last["state"][max(last["state"])])) == []
        assert first["param_groups"][0]["weight_decay"] == last["param_groups"][-1]["weight_decay"] == 0.0


@pytest.mark.parametrize(("pp", "dp"), [(4, 3), (2, 7), (1, 50)])
def test_topologies_that_no_fixture_has_come_back_to_one_that_has(pp, dp, tmp_path):
    # At DP 50 the last two ranks' slices of norms (48 elements) are empty.
    home = SMOLLM2 / "tp1-pp1-dp1-zero0"
    convert(home, tmp_path / "away", "nanotron", tp=1 if dp == 50 else 2, pp=pp, dp=dp, zero_stage=1)
    convert(tmp_path / "away", tmp_path / "back", "nanotron")
    assert run_differences(tmp_path / "back", home) == []


def test_a_parameter_whose_slice_is_empty_is_missing_in_that_ranks_file(tmp_path):
    convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "out", "nanotron", dp=49, zero_stage=1)
    files = states(tmp_path / "out/3", "optimizer")
    first, last = (
        set(files[f"optimizer_pp-0-of-1_dp-{dp}-of-49_tp-0-of-1_exp-0-of-1.pt"]["names"].values()) for dp in (0, 48)
    )
    assert first - last == {name for name in first if "norm" in name}


@pytest.mark.parametrize(
    "options", [{"tp": 3}, {"tp": 32}, {"pp": 7}, {"tp": 0}, {"zero_stage": 2}, {"dp": 0}], ids=str
)
def test_a_topology_that_the_model_does_not_fit_is_a_usage_error(options, tmp_path):
    with pytest.raises(UsageError):
        convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "out", "nanotron", **options)
    assert not (tmp_path / "out").exists()


def test_a_cut_through_heads_is_made_with_a_warning_and_joins_again(tmp_path):
    home = SMOLLM2 / "tp1-pp1-dp1-zero0"
    result = convert(home, tmp_path / "away", "nanotron", tp=4, pp=2)  # 2 key/value heads of 8 rows over 4 ranks
    convert(tmp_path / "away", tmp_path / "back", "nanotron")
    assert any("heads" in warning for warning in result.warnings)
    assert run_differences(tmp_path / "back", home) == []


def test_norms_are_written_once_without_ranks_or_metadata(tmp_path):
    convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "out", "nanotron", tp=2, pp=2)
    norms = {path: metadata for path, (_, metadata) in shards(tmp_path / "out/3").items() if "norm" in path}
    assert len(norms) == 9
    assert all(Path(path).name == "model_weight.safetensors" and not metadata for path, metadata in norms.items())


def test_without_optimizer_no_state_is_written_and_progress_is_kept(tmp_path):
    convert(SMOLLM2 / "tp2-pp1-dp2-zero1", tmp_path / "out", "nanotron", optimizer=False)
    assert not any(name.startswith("optimizer/") for name in file_names(tmp_path / "out/3"))
    metadata = json.loads((tmp_path / "out/3/checkpoint_metadata.json").read_text())["metas"]
    assert (metadata["last_train_step"], metadata["consumed_train_samples"]) == (3, 12)


def test_without_scheduler_files_the_note_says_both_switches(tmp_path):
    result = convert(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "out", "nanotron", optimizer=False)
    assert not (tmp_path / "out/3/lr_scheduler").exists()
    said = "resume in nanotron with checkpoints.load_optimizer and checkpoints.load_lr_scheduler false (it then begins"
    assert any(warning.startswith(said) for warning in result.warnings)


@pytest.mark.parametrize("run", NAMED, ids=topology_id)
def test_the_schedule_in_config_yaml_gives_the_learning_rate_that_nanotron_stored(run):
    config = yaml.safe_load((step_folder(run) / "config.yaml").read_text())
    for stored in states(step_folder(run), "lr_scheduler").values():
        peak, last = scheduled_lr(config, stored["last_epoch"], "here")
        assert (set(stored["base_lrs"]), set(stored["_last_lr"])) == ({peak}, {last})


@pytest.mark.parametrize("number", ["1e-6", "1.0e6"])
def test_a_number_that_yaml_reads_as_text_is_refused_with_how_to_write_it(number, tmp_path):
    run = Path(shutil.copytree(SMOLLM2 / "tp1-pp1-dp1-zero0", tmp_path / "run"))
    (step_folder(run) / "model_config.json").unlink()
    path = step_folder(run) / "config.yaml"
    path.write_text(re.sub(r"rms_norm_eps: \S+", f"rms_norm_eps: {number}", path.read_text()))
    assert yaml.safe_load(path.read_text())["model"]["model_config"]["rms_norm_eps"] == number  # not a float
    with pytest.raises(UnsupportedModel, match=rf"rms_norm_eps is '{number}'.*\n.* write 1\.0e-5, 1\.0e\+6"):
        read_nanotron(run)


@pytest.mark.parametrize("style", [{}, {"lr_decay_style": None}], ids=["missing", "null"])
def test_a_decay_without_a_style_is_linear_as_nanotrons_config_makes_it(style):
    rates = {"learning_rate": 1e-3, "min_decay_lr": 2e-4, "lr_warmup_steps": 2, "lr_warmup_style": "linear", **style}
    config = {"optimizer": {"learning_rate_scheduler": rates}, "tokens": {"train_steps": 10}}
    assert scheduled_lr(config, 6, "here")[1] == pytest.approx(2e-4 + 8e-4 * (8 - 4) / 8)  # 4 of 8 decay steps


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", NAMED, ids=topology_id)
def test_topology_is_read_from_the_files(run):
    found = read_nanotron(run).topology
    assert {"tp": found.tp, "pp": found.pp, "dp": found.dp, "zero_stage": found.zero_stage} == topology_of(run)


def without_state(run: Path, target: Path, *, every: bool = True) -> Path:
    """The run as nanotron saves it before the first step, when Adam holds nothing; else without one parameter's."""
    shutil.copytree(run, target)
    for path in (step_folder(target) / "optimizer").glob("*.pt"):
        document = torch.load(path, weights_only=True)
        for found in (document["state"], document["names"]):
            found.clear() if every else found.pop(0)
        torch.save(document, path)
    return target


@pytest.mark.parametrize("run", NAMED, ids=topology_id)
def test_before_the_first_step_there_is_no_adam_but_progress_its_schedule_and_masters(run, tmp_path):
    whole, found = read_nanotron(run), read_nanotron(without_state(run, tmp_path / "run"))
    assert (found.optimizer, found.topology, found.progress) == (None, whole.topology, whole.progress)
    assert found.progress.scheduler is not None
    assert found.tensors.keys() == whole.tensors.keys() - set(MOMENTS)
    result = convert(tmp_path / "run", tmp_path / "hf", "hf")
    convert(run, tmp_path / "expected", "hf", optimizer=False)
    assert list(differences(hf_weights(tmp_path / "hf"), hf_weights(tmp_path / "expected"))) == []
    assert any("no Adam state" in warning for warning in result.warnings)


@pytest.mark.parametrize("run", NAMED, ids=topology_id)
def test_adam_state_that_only_some_parameters_have_is_refused(run, tmp_path):
    with pytest.raises(NameMismatch):
        read_nanotron(without_state(run, tmp_path / "run", every=False))


def test_a_pipeline_rank_without_adam_state_is_refused(tmp_path):
    run = SMOLLM2 / "tp1-pp2-dp1-zero0"
    empty = next((without_state(run, tmp_path / "empty") / "3/optimizer").glob("*pp-1-of-2*.pt"))
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(empty, tmp_path / "run/3/optimizer")
    with pytest.raises(NameMismatch):
        read_nanotron(tmp_path / "run")


def test_groups_are_by_hyperparameters_and_canonical_name():
    groups = read_nanotron(SMOLLM3 / "tp1-pp2-dp1-zero0").optimizer.groups
    assert [group.hyperparameters["weight_decay"] for group in groups] == [0.0, 0.1]
    assert groups[0].names == ("model.embed_tokens.weight",)
    assert {"model.norm.weight", "model.layers.7.self_attn.q_proj.weight"} <= set(groups[1].names)


def test_progress_is_that_of_the_metadata():
    progress = read_nanotron(SMOLLM3 / "tp2-pp1-dp2-zero1").progress
    metas = json.loads((SMOLLM3 / "tp2-pp1-dp2-zero1/3/checkpoint_metadata.json").read_text())["metas"]
    assert (progress.step, progress.consumed_samples, progress.consumed_tokens, progress.last_stage_index) == (
        metas["last_train_step"], metas["consumed_train_samples"], metas["consumed_tokens_total"], metas["last_stage_idx"],
    )  # fmt: skip
    assert [stage.name for stage in progress.stages] == [stage["name"] for stage in metas["data_stages"]]


def test_linked_folders_are_read_once_and_other_programs_hidden_files_not_at_all(tmp_path):
    run = Path(shutil.copytree(SMOLLM2 / "tp2-pp1-dp2-zero1", tmp_path / "run"))
    decoder = step_folder(run) / "model/model/decoder"
    for folder in (decoder / "1", step_folder(run) / "model", step_folder(run) / "optimizer"):
        moved = tmp_path / f"moved-{folder.name}"
        folder.rename(moved)
        folder.symlink_to(moved)
    (decoder / "2/back").symlink_to("../..")
    (decoder / "2/root").symlink_to("/")
    weight = next((decoder / "0/pp_block/attn/o_proj").iterdir())
    for name in (".DS_Store", f"._{weight.name}", ".nfs0001"):
        weight.with_name(name).write_bytes(b"another program's")
    shutil.copytree(decoder / "0", decoder / ".trash/0")
    for source, target in ((run, "hf"), (SMOLLM2 / "tp2-pp1-dp2-zero1", "expected")):
        convert(source, tmp_path / target, "hf")
    assert list(differences(hf_weights(tmp_path / "hf"), hf_weights(tmp_path / "expected"))) == []
