"""DeepSpeed's checkpoints of every form are read as its live engine held them, where its own tools go wrong too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from deepspeed_folders import CASES, Case, case, edit, load, model_file, optimizer_file, rename_parameters, save
from nanotron_folders import differences
from safetensors.torch import load_file

from smolconv.checkpoint import Checkpoint
from smolconv.errors import MissingFile, MixedCheckpoint, UsageError
from smolconv.inspection import inspect_checkpoint
from smolconv.layouts.deepspeed.documents import read_optimizer_document
from smolconv.layouts.deepspeed.matching import Unnamed, name_by_order
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.tensors.lazy import Stored

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
#: Saved without the weights that did not train, or scrambled by ds_to_universal: refused, below.
REFUSED = ("exclfrozen", "universal-from-zero2-roundrobin")
#: Not Adam's moments alone (Muon, SGD, amsgrad), or fp32 ZeRO-0 with frozen parameters, whose state has no names.
WITHOUT_STATE = ("zero2-muon", "zero1-sgd", "zero2-amsgrad", "zero0-frozen")
READABLE = [case for case in CASES if not any(part in case.folder.name for part in REFUSED)]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def has_state(case: Case) -> bool:
    """Whether Adam's state can be read; the weights can in any case."""
    return not case.folder.name.startswith(WITHOUT_STATE)


def read(case: Case, **options: Any) -> Checkpoint:
    return read_checkpoint(case.checkpoint, ReadOptions(**{"config": case.config, **options}))


def to_hf(case: Case, folder: Path, **options: Any) -> Path:
    """What we make of it, in fp32: Hugging Face's weights and the sidecar with Adam's state."""
    convert(case.checkpoint, folder / "hf", "hf", **{"config": case.config, "dtype": "float32", **options})
    return folder / "hf"


def moments(folder: Path, state: str) -> dict[str, torch.Tensor]:
    (path,) = (folder / "smolconv_state").glob(f"{state}-*.safetensors")
    return load_file(path)


def sidecar(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "smolconv_state/state.json").read_text())


def wrong(case: Case, folder: Path, **options: Any) -> list[str]:
    """Every tensor that is not, bit for bit, what the live engine held; with Adam's state where it has one."""
    made = to_hf(case, folder, **options)
    found = list(differences(hf_weights(made), case.engine("fp32"), "fp32"))
    if has_state(case):
        for state in MOMENTS:
            found += differences(moments(made, state), case.engine(state), state)
    return found


# --- every checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", READABLE, ids=str)
def test_weights_and_moments_are_those_of_the_live_engine_bit_for_bit(case, tmp_path):
    assert case.engine("fp32")
    assert wrong(case, tmp_path) == []


@pytest.mark.parametrize("case", READABLE, ids=str)
def test_weights_keep_the_dtype_of_training_and_are_the_rounded_masters(case, tmp_path):
    convert(case.checkpoint, tmp_path / "hf", "hf", config=case.config, optimizer=False)
    expected = {name: tensor.to(TORCH_DTYPES[case.meta["dtype"]]) for name, tensor in case.engine("fp32").items()}
    assert list(differences(hf_weights(tmp_path / "hf"), expected)) == []


def groups_of_the_run(case: Case) -> list[list[str]]:
    """The names in each of the optimizer's groups, in the order in which they were given to it."""
    groups = case.meta["param_group_names"]
    if not case.meta["ds_config"]["zero_optimization"].get("round_robin_gradients"):
        return groups
    # The flat order assigns parameters to ranks in turn, but the groups were made in the model's order.
    module = list(load(model_file(case.tag))["module"])
    return [sorted(group, key=module.index) for group in groups]


@pytest.mark.parametrize("case", [case for case in READABLE if has_state(case)], ids=str)
def test_steps_and_groups_are_those_of_the_live_engine(case):
    checkpoint = read(case)
    groups = checkpoint.optimizer.groups
    assert [list(group.names) for group in groups] == groups_of_the_run(case)
    for group, step in zip(groups, case.meta["optimizer_state_step"]):
        assert {checkpoint.optimizer.steps[name] for name in group.names} == {step}
    if "elastic" not in str(case):  # which stores no hyperparameters
        found = [json.loads(json.dumps(dict(group.hyperparameters))) for group in groups]
        assert found == case.meta["param_groups"]


@pytest.mark.parametrize("case", READABLE, ids=str)
def test_inspect_knows_stage_world_size_step_dtype_and_what_is_frozen_and_tied(case):
    document, meta = inspect_checkpoint(read(case)), case.meta
    topology = document["topology"]
    assert (document["layout"], topology["universal"]) == ("deepspeed", case.is_universal)
    if not case.is_universal:
        assert (topology["zero_stage"], topology["world_size"]) == (meta["zero_stage"], meta["world_size"])
        assert topology["dp"] * (topology["tp"] or 1) == meta["world_size"]
        assert (topology["tp"] or 1) == meta.get("tensor_parallel", 1)
    assert document["progress"]["step"] == meta["step"]
    if "global_samples" in meta:
        assert document["progress"]["consumed_samples"] == meta["global_samples"]
    assert ("bfloat16" in document["dtypes"]) == (meta["dtype"] == "bf16")
    assert document["tied"] == meta["tied"]
    if has_state(case):
        assert sorted(document["frozen"]) == sorted(meta.get("frozen", []))
        assert document["adam_steps"] == sorted(set(meta["optimizer_state_step"]))
        assert [group["parameters"] for group in document["groups"]] == list(map(len, meta["param_group_names"]))
    assert document["has_optimizer"] == has_state(case)


def test_inspect_prints_and_dumps_what_scripts_rely_on(cli):
    source = case("zero1-frozen-ws2")
    document = json.loads(cli("inspect", source.checkpoint, "--json", "--tensors").stdout)
    assert document["topology"] == {
        "tp": None, "pp": None, "dp": 2, "zero_stage": 1, "world_size": 2, "universal": False,
    }  # fmt: skip
    trained = {tensor["name"] for tensor in document["tensors"] if tensor["slot"] == "exp_avg"}
    assert trained == set(source.engine("exp_avg"))
    text = cli("inspect", source.checkpoint).stdout
    assert all(word in text for word in ("deepspeed", "ZeRO-1", "tied", "step 3", "4 parameters", EMBEDDING))


@pytest.mark.parametrize(("name", "slot"), [("zero1-bf16-ws3-uneven", "exp_avg"), ("zero3-bf16-ws3", "exp_avg_sq")])
def test_the_comparison_notices_one_element_that_is_another(name, slot, tmp_path):
    broken = case(name).copied(tmp_path)

    def change(file: dict[str, Any]) -> None:
        state = file["optimizer_state_dict"]
        adam = state.get("base_optimizer_state") or state["optimizer_state_dict"]
        adam["state"][0][slot][1] *= 2

    edit(optimizer_file(broken.tag, 0), change)
    assert wrong(broken, tmp_path) == [f"{slot}.model.norm.weight"]


def test_the_comparison_notices_one_weight_that_is_another(tmp_path):
    broken = case("zero3-bf16-ws3").copied(tmp_path)
    edit(
        optimizer_file(broken.tag, 2), lambda file: file["optimizer_state_dict"]["fp32_flat_groups"][3].data[:1].mul_(2)
    )
    assert wrong(broken, tmp_path) == ["fp32.model.layers.0.self_attn.q_proj.weight"]


# --- what DeepSpeed's own tools get wrong ----------------------------------------------------------------------------


def test_a_tied_model_goes_into_safetensors(tmp_path):
    from transformers import AutoModelForCausalLM

    tied = case("zero1-twotags-ws2")
    assert {EMBEDDING, HEAD} <= set(load(model_file(tied.tag))["module"])
    folder = to_hf(tied, tmp_path)
    assert HEAD not in hf_weights(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight.data, tied.engine("fp32")[EMBEDDING])


def test_bf16_optimizer_which_says_no_stage_is_zero_1(tmp_path):
    bf16_optimizer = case("zero1-bf16optimizer-ws3")
    assert "zero_stage" not in load(optimizer_file(bf16_optimizer.tag, 0))["optimizer_state_dict"]
    assert wrong(bf16_optimizer, tmp_path) == []
    assert read(bf16_optimizer).topology.zero_stage == 1


@pytest.mark.parametrize("name", ["zero0-fp32-ws2", "zero0-bf16", "zero0-bf16-frozen"])
def test_zero_0_whose_state_has_numbers_for_names_finds_them(name, tmp_path):
    zero0 = case(name)
    assert not list(zero0.tag.glob("*optim_states.pt"))
    assert load(model_file(zero0.tag))["param_shapes"] is None
    assert wrong(zero0, tmp_path) == []


def test_parameters_frozen_at_stage_1_are_there_though_no_flat_tensor_has_them(tmp_path):
    frozen = case("zero1-frozen-ws2")
    document = load(model_file(frozen.tag))
    assert document["frozen_param_shapes"] is None
    assert not set(frozen.meta["frozen"]) & {name for group in document["param_shapes"] for name in group}
    assert wrong(frozen, tmp_path) == []


@pytest.mark.parametrize("name", ["zero2-roundrobin-ws2", "zero2-roundrobin-alignment-ws3"])
def test_round_robin_order_is_that_of_param_shapes(name, tmp_path):
    permuted = case(name)
    document = load(model_file(permuted.tag))
    (_, group), module = document["param_shapes"], list(document["module"])
    assert list(group) != sorted(group, key=module.index)
    assert wrong(permuted, tmp_path) == []
    assert any("round_robin_gradients" in warning for warning in read(permuted).warnings)


@pytest.mark.parametrize("name", ["zero2-roundrobin-ws2", "zero2-roundrobin-alignment-ws3", "zero2-fp32-ws3"])
def test_round_robin_is_known_without_the_config_which_older_versions_stored_as_a_path(name, tmp_path):
    known = case(name)
    copy = known.copied(tmp_path)
    for path in copy.tag.glob("*.pt"):
        edit(path, lambda document: document.update(ds_config="ds_config.json"))
    found, expected = (read(each) for each in (copy, known))
    assert found.optimizer.groups == expected.optimizer.groups
    assert found.warnings == expected.warnings


def test_round_robin_groups_are_as_they_were_given_though_that_is_not_the_models_order(tmp_path):
    permuted = case("zero2-roundrobin-ws2").copied(tmp_path)
    shapes = load(model_file(permuted.tag))["param_shapes"][1]
    module = list(load(model_file(permuted.tag))["module"])
    given = sorted(shapes, key=module.index, reverse=True)
    dealt = [*given[0::2], *given[1::2]]

    def lay(slices: list[torch.Tensor]) -> list[torch.Tensor]:
        flat = torch.cat([piece.data for piece in slices]).split([shape.numel() for shape in shapes.values()])
        parts = dict(zip(shapes, flat))
        return [piece.clone() for piece in torch.cat([parts[name] for name in dealt]).chunk(2)]

    edit(model_file(permuted.tag),
         lambda document: document["param_shapes"].__setitem__(1, {name: shapes[name] for name in dealt}))  # fmt: skip
    files = [optimizer_file(permuted.tag, rank) for rank in range(2)]
    contents = [load(path) for path in files]
    states = [content["optimizer_state_dict"] for content in contents]
    holders = [(([state["base_optimizer_state"]["state"][1] for state in states]), key) for key in MOMENTS]
    for places, key in [*holders, ([state["single_partition_of_fp32_groups"] for state in states], 1)]:
        for place, piece in zip(places, lay([place[key] for place in places])):
            place[key] = piece
    for path, content in zip(files, contents):
        save(content, path)
    assert wrong(permuted, tmp_path) == []
    assert list(read(permuted).optimizer.groups[1].names) == given


def in_order_of_the_module(folder: Path) -> Case:
    """ZeRO-0 in fp32 with a group for each parameter, as a learning rate of its own would want."""
    changed = case("zero0-fp32-ws2").copied(folder)
    names = [name for group in changed.meta["param_group_names"] for name in group]

    def change(document: dict[str, Any]) -> None:
        adam = document["optimizer"]
        numbers = [names.index(name) for name in document["module"] if name in names]
        adam["state"] = {new: adam["state"][old] for new, old in enumerate(numbers)}
        adam["param_groups"] = [{**adam["param_groups"][0], "params": [new]} for new in range(len(numbers))]

    edit(model_file(changed.tag), change)
    return changed


def test_zero_0_with_a_group_for_each_parameter_in_the_models_order_is_read(tmp_path):
    zero0 = in_order_of_the_module(tmp_path)
    assert wrong(zero0, tmp_path) == []
    assert any("taken to follow each other" in warning for warning in read(zero0).warnings)


def test_zero_0_with_many_groups_that_fit_in_many_ways_is_given_up_soon(tmp_path):
    shapes = {f"layer.{i}": (8,) if i == 0 else (4,) for i in range(40)}
    module = {
        name: Stored(path=tmp_path, offset=i, shape=shape, dtype="float32")
        for i, (name, shape) in enumerate(shapes.items())
    }
    entries = {i: Unnamed(shape=shape, master=None) for i, shape in enumerate(shapes.values())}
    assert name_by_order(module, module, [[i] for i in range(40)], entries) == dict(enumerate(shapes))
    assert name_by_order(module, module, [[i] for i in reversed(range(40))], entries) is None


def fused(folder: Path, name: str) -> Case:
    """ZeRO-0 with masters and moments flat, as FP16_Optimizer keeps them for one of DeepSpeed's fused Adams."""
    changed = case(name).copied(folder)

    def change(document: dict[str, Any]) -> None:
        state = document["optimizer"]
        adam = state["optimizer_state_dict"]
        kept, flats = {}, []
        for g, (group, masters) in enumerate(zip(adam["param_groups"], state.pop("fp32_groups"))):
            own = [adam["state"][index] for index in group["params"]]
            flats.append(torch.cat([master.data.flatten() for master in masters]))
            kept[g] = {key: torch.cat([one[key].flatten() for one in own]) for key in MOMENTS}
            kept[g]["step"], group["params"] = own[0]["step"], [g]
        adam["state"] = kept
        state.update(fp32_groups_flat=flats, clip_grad=1.0)

    edit(model_file(changed.tag), change)
    return changed


@pytest.mark.parametrize("name", ["zero0-bf16", "zero0-bf16-frozen"])
def test_zero_0_of_a_fused_adam_is_cut_where_the_rounded_masters_are_the_weights(name, tmp_path):
    flat = fused(tmp_path, name)
    assert wrong(flat, tmp_path) == []
    checkpoint = read(flat)
    assert [list(group.names) for group in checkpoint.optimizer.groups] == flat.meta["param_group_names"]
    assert sorted(checkpoint.frozen) == sorted(flat.meta["frozen"])
    assert not read(flat, optimizer=False).has_optimizer


def test_zero_0_of_a_fused_adam_whose_masters_fit_no_weights_gives_the_weights_alone(tmp_path):
    other = fused(tmp_path, "zero0-bf16")
    edit(model_file(other.tag), lambda document: document["optimizer"]["fp32_groups_flat"][0].neg_())
    checkpoint = read(other)
    assert not checkpoint.has_optimizer
    assert any("left out" in warning for warning in checkpoint.warnings)
    convert(other.checkpoint, tmp_path / "hf", "hf", config=other.config)
    expected = {name: tensor.bfloat16() for name, tensor in other.engine("fp32").items()}
    assert list(differences(hf_weights(tmp_path / "hf"), expected)) == []


@pytest.mark.parametrize("name", ["autotp2-zero1-bf16", "autotp2-zero3-ws4"])
def test_shards_of_autotp_are_joined_on_the_dimension_that_was_cut(name, tmp_path):
    cut = case(name)
    assert wrong(cut, tmp_path) == []
    topology = read(cut).topology
    assert (topology.tp, topology.dp) == (2, cut.meta["world_size"] // 2)


def test_elastic_checkpoints_are_read_and_say_that_hyperparameters_are_not_there(tmp_path):
    elastic = case("zero1-elastic-ws3-uneven")
    assert isinstance(load(optimizer_file(elastic.tag, 0))["optimizer_state_dict"]["base_optimizer_state"], list)
    assert wrong(elastic, tmp_path) == []
    checkpoint = read(elastic)
    assert any("elastic_checkpoint" in warning for warning in checkpoint.warnings)
    assert all(not group.hyperparameters for group in checkpoint.optimizer.groups)


def test_sub_groups_are_joined_to_the_groups_that_the_optimizer_had(tmp_path):
    cut = case("zero3-bf16-subgroups-ws3-uneven")
    flat = load(optimizer_file(cut.tag, 0))["optimizer_state_dict"]["fp32_flat_groups"]
    assert len(flat) == len(cut.meta["optimizer_state_step"]) > len(cut.meta["param_group_names"])
    assert wrong(cut, tmp_path) == []
    assert len(read(cut).optimizer.groups) == len(cut.meta["param_group_names"])


def with_frozen_groups(folder: Path) -> Case:
    """Groups that are wholly frozen come first, so many that there are as many groups as sub-groups."""
    changed = case("zero3-bf16-subgroups-ws3-uneven").copied(folder)

    def change(file: dict[str, Any]) -> None:
        state = file["optimizer_state_dict"]
        groups = state["optimizer_state_dict"]["param_groups"]
        missing = len(state["fp32_flat_groups"]) - len(groups)
        groups[:0] = [{**groups[0], "lr": 0.5, "params": []} for _ in range(missing)]

    for rank in range(3):
        edit(optimizer_file(changed.tag, rank), change)
    return changed


def test_sub_groups_are_joined_though_frozen_groups_make_them_as_many_as_the_groups(tmp_path):
    frozen = with_frozen_groups(tmp_path)
    assert wrong(frozen, tmp_path) == []
    names = [list(group.names) for group in read(frozen).optimizer.groups]
    assert [group for group in names if group] == frozen.meta["param_group_names"]
    assert not names[0]


@pytest.mark.parametrize(("stage", "kept"), [(3, True), (2, False)])
def test_a_group_that_is_wholly_frozen_stays_where_zero_3_counts_it_and_only_there(stage, kept, tmp_path):
    frozen = with_frozen_groups(tmp_path)
    before = read(frozen).optimizer.groups
    convert(frozen.checkpoint, tmp_path / "ds", "deepspeed", config=frozen.config, zero_stage=stage, world_size=2)
    (tag,) = (tmp_path / "ds").glob("global_step*")
    document = read_optimizer_document(optimizer_file(tag, 0), with_adam=True)
    assert (document.members[0] == (), document.groups[0]["lr"] == 0.5) == (kept, kept)
    again = read_checkpoint(tmp_path / "ds").optimizer.groups
    assert [group.names for group in again] == [group.names for group in before if group.names or kept]


@pytest.mark.parametrize(("name", "kind"), [("universal-from-zero2-ws3", dict), ("universal-from-zero3-ws3-uneven", torch.Tensor)])  # fmt: skip
def test_both_dialects_of_universal_are_read(name, kind, tmp_path):
    universal = case(name)
    projection = "zero/model.layers.0.mlp.up_proj.weight"
    assert isinstance(load(universal.tag / projection / "fp32.pt"), kind)
    assert (universal.tag / projection / "step.pt").exists() == (kind is dict)
    assert wrong(universal, tmp_path) == []


def test_a_universal_folder_that_deepspeed_scrambled_is_refused():
    with pytest.raises(
        MixedCheckpoint, match=r"(?s)16 parameters .*round_robin_gradients.*convert the ZeRO checkpoint"
    ):
        read(case("universal-from-zero2-roundrobin-ws2"))


# --- frozen and left out ---------------------------------------------------------------------------------------------

EXCLUDED = ["zero1-exclfrozen-ws2", "zero3-exclfrozen-ws2"]


@pytest.mark.parametrize("name", EXCLUDED)
def test_weights_that_were_left_out_are_named_and_nothing_is_written(name, cli, tmp_path):
    excluded = case(name)
    # The tied head is the frozen embedding's second name: ZeRO-1 keeps its values in the module, ZeRO-3 does not.
    missing = [n for n in excluded.meta["frozen"] if n != EMBEDDING or "zero3" in name]
    done = cli("convert", excluded.checkpoint, tmp_path / "out", "--to", "hf")
    assert done.code == 3
    assert all(word in done.stderr for word in [*missing, "exclude_frozen_parameters", "--base"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("layout", ["deepspeed", "hf", "nanotron"])
@pytest.mark.parametrize("name", EXCLUDED)
def test_base_supplies_the_weights_that_were_left_out(name, layout, tmp_path):
    excluded = case(name)
    base = case("zero1-frozen-ws2").checkpoint  # frozen weights are those of the first step at every stage
    if layout != "deepspeed":
        base = convert(base, tmp_path / "base", layout).plan.target
    made = to_hf(excluded, tmp_path, base=base)
    assert list(differences(hf_weights(made), excluded.engine("fp32"))) == []
    for state in MOMENTS:
        assert list(differences(moments(made, state), excluded.engine(state))) == []


def test_base_supplies_nothing_that_the_checkpoint_has(tmp_path):
    base = to_hf(case("zero1-twotags-ws2"), tmp_path / "other")
    assert list(differences(hf_weights(base), case("zero1-frozen-ws2").engine("fp32")))
    assert wrong(case("zero1-frozen-ws2"), tmp_path, base=base) == []


# --- another optimizer than Adam -------------------------------------------------------------------------------------


def with_amsgrad(folder: Path) -> Case:
    """A third state beside Adam's two, as amsgrad keeps it."""
    changed = case("zero1-twotags-ws2").copied(folder)

    def change(file: dict[str, Any]) -> None:
        for state in file["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()

    for rank in range(2):
        edit(optimizer_file(changed.tag, rank), change)
    return changed


NOT_ADAM: dict[str, Callable[[Path], Case]] = {
    "Muon": lambda folder: case("zero2-muon-ws2"),
    "SGD": lambda folder: case("zero1-sgd-ws2"),
    "amsgrad": with_amsgrad,
    "ZeRO-0 with frozen parameters": lambda folder: case("zero0-frozen"),
}


@pytest.mark.parametrize("optimizer", NOT_ADAM)
def test_weights_come_without_a_state_that_cannot_be_named_and_a_warning_says_so(optimizer, tmp_path):
    found = NOT_ADAM[optimizer](tmp_path)
    result = convert(found.checkpoint, tmp_path / "hf", "hf")
    assert list(differences(hf_weights(tmp_path / "hf"), found.engine("fp32"))) == []
    assert any("left out" in warning for warning in result.warnings)
    assert not list(tmp_path.glob("hf/smolconv_state/*.safetensors"))


@pytest.mark.parametrize("optimizer", NOT_ADAM)
def test_asking_for_a_state_that_is_not_adams_is_a_usage_error(optimizer, tmp_path):
    found = NOT_ADAM[optimizer](tmp_path)
    with pytest.raises(UsageError, match=r"--optimizer.*holds no Adam state"):
        convert(found.checkpoint, tmp_path / "hf", "hf", optimizer=True)


def test_exit_codes_of_an_optimizer_that_is_not_adam(cli, tmp_path):
    source = case("zero2-muon-ws2").checkpoint
    done = cli("convert", source, tmp_path / "hf", "--to", "hf")
    assert (done.code, "momentum_buffer" in done.stderr) == (0, True)
    assert cli("convert", source, tmp_path / "again", "--to", "hf", "--optimizer").code == 2


# --- steps, tags and folders -----------------------------------------------------------------------------------------


def test_the_tag_folder_and_the_run_folder_are_the_same_checkpoint(tmp_path):
    source = case("zero1-bf16-ws3-uneven").copied(tmp_path)
    alone = shutil.copytree(source.tag, tmp_path / "alone")
    shutil.copy(source.config, alone)
    for folder, place in (("run", source.checkpoint), ("tag", source.tag), ("moved", alone)):
        convert(place, tmp_path / folder, "hf", dtype="float32")
        assert list(differences(hf_weights(tmp_path / folder), source.engine("fp32"))) == []


def test_step_chooses_among_tags_and_latest_is_the_default(tmp_path):
    run = case("zero1-twotags-ws2")
    before = load_file(run.folder / "expected-global_step2/fp32.safetensors")
    for step, expected in ((2, before), (3, run.engine("fp32")), (None, run.engine("fp32"))):
        convert(run.checkpoint, tmp_path / f"hf{step}", "hf", step=step)
        assert list(differences(hf_weights(tmp_path / f"hf{step}"), expected)) == []
        assert sidecar(tmp_path / f"hf{step}")["step"] == (step or 3)
    assert list(differences(before, run.engine("fp32")))


@pytest.mark.parametrize("tag", ["final", "step-3", "epoch 1, best"])
def test_a_tag_may_have_any_name(tag, tmp_path):
    run = case("zero3-bf16-ws3").copied(tmp_path)
    run.tag.rename(run.checkpoint / tag)
    (run.checkpoint / "latest").write_text(tag)
    assert wrong(run, tmp_path) == []
    assert read(run).progress.step == 3


def test_a_newline_after_the_tag_in_latest_is_no_part_of_it(tmp_path):
    run = case("zero1-bf16-ws3-uneven").copied(tmp_path)
    (run.checkpoint / "latest").write_text("global_step3\n")
    assert read(run).progress.step == 3


# --- the model's config ----------------------------------------------------------------------------------------------


@pytest.fixture
def without_config(tmp_path: Path) -> Case:
    """A run as training leaves it, three folders deep, with no config anywhere."""
    run = case("zero1-bf16-ws3-uneven").copied(tmp_path / "runs")
    (run.folder / "config.json").unlink()
    return run


def test_a_missing_config_is_said_with_every_place_that_was_looked_at(without_config):
    with pytest.raises(MissingFile) as raised:
        read_checkpoint(without_config.checkpoint)
    places = (without_config.tag, without_config.checkpoint, without_config.folder)
    assert all(f"{place}" in str(raised.value) for place in places)
    assert "client_state" in str(raised.value) and "--config" in str(raised.value)
    assert raised.value.exit_code == 3


def config_with(rope_theta: int) -> dict[str, Any]:
    """The model's config, told apart by its rope_theta."""
    known = json.loads(case("zero1-bf16-ws3-uneven").config.read_text())
    return {**known, "rope_parameters": {**known["rope_parameters"], "rope_theta": float(rope_theta)}}


def test_the_config_is_looked_for_in_the_documented_order(without_config, tmp_path):
    run, by_name = without_config, tmp_path / "given.json"

    def rope_theta(**options: Any) -> float:
        return read_checkpoint(run.checkpoint, ReadOptions(**options)).spec.rope_theta

    edit(model_file(run.tag), lambda document: document.update(config=config_with(5)))
    assert rope_theta() == 5  # client_state
    for theta, folder in ((4, run.folder), (3, run.checkpoint), (2, run.tag)):
        (folder / "config.json").write_text(json.dumps(config_with(theta)))
        assert rope_theta() == theta, folder
    by_name.write_text(json.dumps(config_with(1)))
    assert rope_theta(config=by_name) == 1


def test_a_config_nested_in_the_client_state_is_found(without_config):
    edit(model_file(without_config.tag), lambda document: document.update(run={"model": config_with(7)}))
    assert read_checkpoint(without_config.checkpoint).spec.rope_theta == 7


def test_nanotrons_model_config_serves_as_config(tmp_path):
    run = case("smollm2-tiny-bf16-zero1-ws2").copied(tmp_path)
    nanotron = FIXTURES / "nanotron/smollm2-tiny/tp1-pp1-dp1-zero0/3/model_config.json"
    hf = json.loads(run.config.read_text())
    known = json.loads(nanotron.read_text())
    same = {"vocab_size": hf["vocab_size"], "max_position_embeddings": hf["max_position_embeddings"],
            "hidden_size": hf["hidden_size"], "intermediate_size": hf["intermediate_size"],
            "num_hidden_layers": hf["num_hidden_layers"], "num_attention_heads": hf["num_attention_heads"],
            "num_key_value_heads": hf["num_key_value_heads"]}  # fmt: skip
    (tmp_path / "model_config.json").write_text(json.dumps({**known, **same}))
    run.config.unlink()
    convert(run.checkpoint, tmp_path / "hf", "hf", config=tmp_path / "model_config.json", dtype="float32")
    assert list(differences(hf_weights(tmp_path / "hf"), run.engine("fp32"))) == []


# --- what travels along ----------------------------------------------------------------------------------------------


def test_client_state_travels_and_a_tensor_in_it_is_warned_about(tmp_path):
    source = case("zero2-clientstate-ws2")
    stored = load(model_file(source.tag))
    result = convert(source.checkpoint, tmp_path / "hf", "hf")
    carried = json.loads((tmp_path / "hf/smolconv_state/source/deepspeed.json").read_text())
    names = ("step", "consumed_tokens", "nested", "note")
    assert carried["client_state"] == {name: stored[name] for name in names}
    assert carried["lr_scheduler"] == stored["lr_scheduler"]
    assert any("client_state" in warning and "rng" in warning for warning in result.warnings)


@pytest.mark.parametrize("names", [set(), frozenset()], ids=["before 0.17", "0.19.7"])
def test_model_files_may_hold_a_set_as_those_of_older_deepspeeds_do(names, tmp_path):
    older = case("zero1-bf16-ws3-uneven").copied(tmp_path)
    edit(
        model_file(older.tag),
        lambda document: document.update(sparse_tensor_module_names=names, languages={"en", "de"}),
    )
    assert wrong(older, tmp_path) == []
    assert any("languages (a set) cannot be carried" in warning for warning in read(older).warnings)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-ws3", "universal-from-zero2-ws3"])
def test_the_prefix_of_a_wrapper_is_taken_away_and_said(name, prefix, tmp_path):
    wrapped = case(name).copied(tmp_path)
    rename_parameters(wrapped, lambda parameter: prefix + parameter)
    assert wrong(wrapped, tmp_path) == []
    assert any(prefix in warning for warning in read(wrapped).warnings)


# --- what is not needed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero3-bf16-ws3", "universal-from-zero2-ws3"])
def test_neither_deepspeed_nor_torch_is_needed(name, cli, tmp_path):
    without = "import sys; sys.modules.update(deepspeed=None, torch=None, transformers=None, safetensors=None)"
    source = case(name)
    assert cli("inspect", source.checkpoint, before=without).code == 0
    done = cli("convert", source.checkpoint, tmp_path / "hf", "--to", "hf", "--dtype", "float32", before=without)
    assert done.code == 0, done.stderr
    assert list(differences(hf_weights(tmp_path / "hf"), source.engine("fp32"))) == []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, bytes) of every read of tensor data."""
    found: list[tuple[str, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        found.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return found


@pytest.mark.parametrize("name", ["smollm2-tiny-bf16-zero1-ws2", "smollm2-tiny-bf16-zero3-ws2"])
def test_flat_shards_are_read_by_range_and_never_whole(name, reads, tmp_path):
    source = case(name)
    state = load(optimizer_file(source.tag, 0))["optimizer_state_dict"]
    flat = (state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"])[1]
    largest = max(tensor.numel() for tensor in source.engine("fp32").values()) * 4
    assert largest * 2 <= flat.numel() * 4, "the flat tensor was to hold much more than one parameter"
    to_hf(source, tmp_path)
    lengths = [length for file, length in reads if "optim_states" in file]
    assert lengths and max(lengths) <= largest


@pytest.mark.parametrize("name", ["smollm2-tiny-bf16-zero1-ws2", "smollm2-tiny-bf16-zero3-ws2"])
def test_a_checkpoint_is_read_without_its_tensors(name, reads):
    read(case(name))
    stored = sum(path.stat().st_size for path in case(name).tag.iterdir())
    assert sum(length for _, length in reads) < stored / 20
