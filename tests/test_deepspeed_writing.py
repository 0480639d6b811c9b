"""What smolconv writes for DeepSpeed: the very files that DeepSpeed itself wrote, as torch and DeepSpeed's tools read them."""

from __future__ import annotations

import enum
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, Finished, convert, environment, files_below, hf_weights, run_cli
from hf_models import llama, saved, smollm3
from mortal import Mortal
from nanotron_folders import differences
from safetensors.torch import load_file, save_file

from smolconv.conversion import ConvertOptions, plan_conversion, plan_to_json
from smolconv.errors import MissingFile, UnsupportedModel, UsageError
from smolconv.layouts.registry import read_checkpoint
from smolconv.storage.atomic import JOURNAL
from smolconv.storage.manifest import check_manifest, read_manifest

DEEPSPEED, NANOTRON = FIXTURES / "deepspeed", FIXTURES / "nanotron"
SMOLLM2, SMOLLM3 = NANOTRON / "smollm2-tiny/tp1-pp1-dp1-zero0", NANOTRON / "smollm3-tiny/tp1-pp2-dp1-zero0"
#: A small model in bf16 with fp32 masters, whose sizes no world size divides.
SMALL = DEEPSPEED / "zero1-bf16-ws3-uneven/checkpoint"
EMBEDDING = "model.embed_tokens.weight"
SLOTS = ("fp32", "exp_avg", "exp_avg_sq")

#: Keys that only one side has, or that hold something else, and why.
EXCEPTIONS: Mapping[str, str] = {
    "ds_config": "the run's own configuration; ours says the stage and the dtype alone",
    "clip_grad": "left out by us: DeepSpeed would put a stored one in the place of the running configuration's",
    "bias_correction": "added to every group by us: DeepSpeed's compiled Adams look for it",
    "universal_checkpoint_info": "added by us: ds_to_universal asks for it",
    "smolconv": "added by us: progress, and the model's config",
}
#: Of ZeRO-0 besides, where DeepSpeed stores no names: Adam's numbers are given names by us.
ZERO0_EXCEPTIONS: Mapping[str, str] = {
    "param_shapes": "None in DeepSpeed's file",
    "shared_params": "None in DeepSpeed's file",
    "dp_world_size": "one file serves any world size; ours says 1",
}


# --- DeepSpeed's files, as torch loads them ---------------------------------------------------------------------------


class _Stranger:
    """Takes the place of one of DeepSpeed's classes; equal when its attributes are."""

    def __init__(self, *args: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None


class LossScaler(_Stranger):
    pass


class FragmentAddress(_Stranger):
    pass


class ZeroStage(enum.IntEnum):
    DISABLED, OPTIMIZER_STATES, GRADIENTS, WEIGHTS = range(4)


STAND_INS: list[Any] = [
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def load(path: Path, **options: Any) -> Any:
    """A file of DeepSpeed's, by torch, without running code."""
    with torch.serialization.safe_globals(STAND_INS):
        return torch.load(path, map_location="cpu", weights_only=True, **options)


def tag_folder(run: Path) -> Path:
    """The folder that ``latest`` or ``latest_universal`` names; the text is exact, without a newline."""
    (latest,) = (run / name for name in ("latest", "latest_universal") if (run / name).exists())
    return run / latest.read_text()


def archives(run: Path) -> dict[str, Path]:
    """Every torch file by its path below the tag folder."""
    tag = tag_folder(run)
    return {str(path.relative_to(tag)): path for path in sorted(tag.rglob("*.pt"))}


def documents(run: Path, skip: Mapping[str, str] = EXCEPTIONS) -> dict[str, Any]:
    """Every torch file, loaded, with ordered mappings as lists of pairs and without ``skip``, at any depth."""
    return {name: _plain(load(path), skip) for name, path in archives(run).items()}


def _plain(value: Any, skip: Mapping[str, str]) -> Any:
    if isinstance(value, OrderedDict):
        return [(key, _plain(item, skip)) for key, item in value.items()]
    if isinstance(value, dict):
        return {key: _plain(item, skip) for key, item in value.items() if key not in skip}
    return [_plain(item, skip) for item in value] if isinstance(value, list) else value


def own_documents(case: Path) -> dict[str, Any]:
    """What DeepSpeed wrote, with zeros where it left uninitialised memory: after the pieces of ZeRO-3 parameters."""
    found = documents(case / "checkpoint", exceptions(case))
    if meta(case)["zero_stage"] == 3:
        ranks = meta(case)["world_size"]
        for rank in range(ranks):
            model = found[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"]
            (optimizer,) = (found[name] for name in found if f"zero_pp_rank_{rank}_mp_rank_00_optim" in name)
            flats = optimizer["optimizer_state_dict"]["fp32_flat_groups"]
            for flat, shapes in zip(flats, model["param_shapes"], strict=True):
                _blank(flat, [shape for _, shape in shapes], rank, ranks)
            for (_, fragment), (_, shape) in zip(model["frozen_param_fragments"], model["frozen_param_shapes"]):
                _blank(fragment, [shape], rank, ranks)
    return found


def _blank(flat: torch.Tensor, shapes: list[tuple[int, ...]], rank: int, ranks: int) -> None:
    at = 0
    for shape in shapes:
        size = -(-prod(shape) // ranks)
        filled = min(max(prod(shape) - rank * size, 0), size)
        flat.detach()[at + filled : at + size] = 0
        at += size
    assert at == flat.numel()


# --- the fixtures -----------------------------------------------------------------------------------------------------


@cache
def meta(case: Path) -> dict[str, Any]:
    return json.loads((case / "expected/meta.json").read_text())


def expected(case: Path, slot: str) -> dict[str, torch.Tensor]:
    """``fp32``, ``exp_avg`` or ``exp_avg_sq`` as the live engine held it."""
    folder = case / "expected"
    return load_file(folder / meta(case).get("tensors_same_as", ".") / f"{slot}.safetensors")


def own_form(case: Path) -> dict[str, int]:
    """Options of ``convert`` that ask for the stage, the world size and the sub-groups that the case has."""
    stage, zero = meta(case)["zero_stage"], meta(case)["ds_config"]["zero_optimization"]
    form = {"zero_stage": stage, **({"world_size": meta(case)["world_size"]} if stage else {})}
    return form | ({"sub_group_size": zero["sub_group_size"]} if "sub_group_size" in zero else {})


def exceptions(case: Path) -> Mapping[str, str]:
    return EXCEPTIONS if meta(case)["zero_stage"] else {**EXCEPTIONS, **ZERO0_EXCEPTIONS}


def case_differences(run: Path, case: Path, skip: Mapping[str, str] | None = None) -> list[str]:
    """Everything but ``EXCEPTIONS`` (and ``skip``) that parts our folder from the one that DeepSpeed wrote."""
    also = {**exceptions(case), **(skip or {})}
    theirs = {name: _plain(document, also) for name, document in own_documents(case).items()}
    return list(differences(documents(run, also), theirs))


REWRITTEN = [
    "zero0-bf16", "zero0-bf16-frozen", "zero0-fp32-ws2", "zero1-bf16-ws3-uneven", "zero1-frozen-ws2",
    "zero1-untied-ws2", "zero1-twotags-ws2", "zero2-fp32-ws3", "zero3-bf16-ws3", "zero3-bf16-subgroups-ws3-uneven",
    "zero3-bf16-frozen-uneven-ws3", "smollm2-tiny-bf16-zero1-ws2", "smollm2-tiny-bf16-zero3-ws2",
]  # fmt: skip


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By case name: the folder that DeepSpeed wrote, converted to its own stage and world size."""

    @cache
    def make(name: str) -> Path:
        target = tmp_path_factory.mktemp("rewritten") / name
        convert(DEEPSPEED / name / "checkpoint", target, "deepspeed", **own_form(DEEPSPEED / name))
        return target

    return make


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder without Adam's state, in bf16."""
    folder = tmp_path_factory.mktemp("untrained") / "hf"
    convert(SMALL, folder, "hf", optimizer=False)
    shutil.rmtree(folder / "smolconv_state")
    return folder


FORMS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1, "world_size": 3},
    "zero2": {"zero_stage": 2, "world_size": 2},
    "zero3": {"zero_stage": 3, "world_size": 3, "sub_group_size": 60},
    "universal": {},
}


@pytest.fixture(scope="module")
def fresh(untrained, tmp_path_factory) -> dict[str, Path]:
    """The untrained model in every form."""
    home = tmp_path_factory.mktemp("fresh")
    for name, options in FORMS.items():
        convert(untrained, home / name, "deepspeed", **options)
    return {name: home / name for name in FORMS}


# --- to the stage and world size it has: DeepSpeed's own files again --------------------------------------------------


@pytest.mark.parametrize("name", REWRITTEN)
def test_every_file_has_the_name_the_keys_the_order_and_the_tensors_of_deepspeeds_own(rewritten, name):
    assert case_differences(rewritten(name), DEEPSPEED / name) == []


@pytest.mark.parametrize("name", REWRITTEN)
def test_the_exceptions_are_what_they_are_said_to_be(rewritten, name):
    ours, theirs = (archives(run) for run in (rewritten(name), DEEPSPEED / name / "checkpoint"))
    for file in theirs:
        found, known = load(ours[file]), load(theirs[file])
        config, their_config = found["ds_config"], known["ds_config"]
        assert config["zero_optimization"]["stage"] == their_config["zero_optimization"]["stage"]
        assert config["bf16"]["enabled"] == ("bf16" in their_config)
        if "module" in found:
            assert found["universal_checkpoint_info"]["universal_checkpoint_version"] == 0.4
            assert found["smolconv"]["progress"]["step"] == known["global_steps"]
        else:
            ours_only = {"bias_correction"}
            groups, their_groups = (_param_groups(document) for document in (found, known))
            assert [set(a) - set(b) for a, b in zip(groups, their_groups)] == [ours_only] * len(their_groups)


def _param_groups(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    state = document["optimizer_state_dict"]
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))["param_groups"]


def test_client_state_is_carried_but_for_tensors(tmp_path):
    case = DEEPSPEED / "zero2-clientstate-ws2"
    result = convert(case / "checkpoint", tmp_path / "out", "deepspeed", **own_form(case))
    assert case_differences(tmp_path / "out", case, skip={"rng": "a tensor"}) == []
    state = load(archives(tmp_path / "out")["mp_rank_00_model_states.pt"])
    assert (state["consumed_tokens"], state["nested"], state["note"]) == (12345, {"a": [1, 2]}, "text")
    assert any("rng" in warning for warning in result.warnings)


@pytest.mark.parametrize("name", [name for name in REWRITTEN if "zero3" not in name])
def test_a_tied_head_is_the_embeddings_own_storage(rewritten, name):
    for run in (rewritten(name), DEEPSPEED / name / "checkpoint"):
        module = load(archives(run)["mp_rank_00_model_states.pt"])["module"]
        same = module["lm_head.weight"].data_ptr() == module[EMBEDDING].data_ptr()
        assert same == ("untied" not in name)


#: (source, its state in another form as DeepSpeed wrote it): the tensors of both are bitwise the same (meta.json).
ONE_STATE = [
    ("zero0-fp32-ws2", "zero1-twotags-ws2"),
    ("zero1-twotags-ws2", "zero0-fp32-ws2"),
    ("zero2-roundrobin-ws2", "zero0-fp32-ws2"),
    ("zero2-roundrobin-ws2", "zero1-twotags-ws2"),
    ("universal-from-zero1-frozen-ws2", "zero1-frozen-ws2"),
    ("universal-from-zero2-ws3", "zero2-fp32-ws3"),
    ("smollm2-tiny-bf16-universal-from-zero3", "smollm2-tiny-bf16-zero3-ws2"),
    ("zero3-bf16-ws3", "zero3-bf16-subgroups-ws3-uneven"),
    ("zero3-bf16-subgroups-ws3-uneven", "zero3-bf16-ws3"),
]


@pytest.mark.parametrize(("source", "target"), ONE_STATE, ids=lambda name: name)
def test_one_state_in_another_form_is_what_deepspeed_wrote_in_that_form(source, target, tmp_path):
    # A round-robin run's own flat order is no other run's: its groups must come back in named_parameters order.
    convert(DEEPSPEED / source / "checkpoint", tmp_path / "out", "deepspeed", **own_form(DEEPSPEED / target))
    assert case_differences(tmp_path / "out", DEEPSPEED / target) == []


def test_frozen_weights_that_were_left_out_come_from_the_base(tmp_path):
    source, base = DEEPSPEED / "zero1-exclfrozen-ws2", DEEPSPEED / "zero1-frozen-ws2"
    result = convert(
        source / "checkpoint", tmp_path / "out", "deepspeed", **own_form(base), base=base / "checkpoint"
    )  # fmt: skip
    assert case_differences(tmp_path / "out", base) == []
    assert any(str(base) in warning for warning in result.warnings)


def test_zero_2_keeps_the_frozen_parameters_beside_the_module(tmp_path):
    # zero_to_fp32 looks for them there; at ZeRO-1 DeepSpeed has None (facts, trap 2).
    case = DEEPSPEED / "zero1-frozen-ws2"
    convert(case / "checkpoint", tmp_path / "out", "deepspeed", zero_stage=2, world_size=2)
    document = load(archives(tmp_path / "out")["mp_rank_00_model_states.pt"])
    fragments, module = document["frozen_param_fragments"], document["module"]
    assert list(fragments) == meta(case)["frozen"]
    assert {name: tuple(shape) for name, shape in document["frozen_param_shapes"].items()} == {
        name: tuple(tensor.shape) for name, tensor in fragments.items()
    }
    original = load(archives(case / "checkpoint")["mp_rank_00_model_states.pt"])["module"]
    assert list(differences(dict(fragments), {name: original[name] for name in fragments})) == []
    assert all(fragments[name].data_ptr() == module[name].data_ptr() for name in fragments)


# --- the archives -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FORMS)
def written(request, tmp_path_factory) -> Path:
    """A trained model in every form."""
    target = tmp_path_factory.mktemp("written") / request.param
    convert(SMALL, target, "deepspeed", **FORMS[request.param])
    return target


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_model_files_and_universal_tensors_load_as_they_are(written, mmap):
    plain = [path for name, path in archives(written).items() if "model_states" in name or name.count("/") == 2]
    assert plain
    for path in plain:
        torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_optimizer_files_need_three_names_of_deepspeed_and_no_other(written, mmap):
    rest = [path for name, path in archives(written).items() if "optim_states" in name or "optimizer_state" in name]
    assert bool(rest) == ("zero0" not in written.name)
    for path in rest:
        load(path, mmap=mmap)


def test_every_archive_passes_zips_own_test(written, fresh):
    for run in (written, fresh[written.name]):
        for path in archives(run).values():
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None, path


def test_zero_moments_are_holes_that_read_as_zeros(tmp_path):
    with (tmp_path / "probe").open("wb") as probe:
        probe.truncate(1 << 20)
    holes = (tmp_path / "probe").stat().st_blocks == 0
    source = saved(llama(vocab_size=20_000, num_hidden_layers=1), tmp_path / "hf")
    for name, options in FORMS.items():
        run = tmp_path / name
        convert(source, run, "deepspeed", **options)
        stored = on_disk = 0
        for path in archives(run).values():
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
                last = archive.infolist()[-1]
            stat = path.stat()
            assert stat.st_size > last.header_offset + last.compress_size
            stored, on_disk = stored + stat.st_size, on_disk + stat.st_blocks * 512
        moments = [tensor for name, tensor in adam_tensors(run) if name != "step"]
        assert sum(tensor.numel() for tensor in moments) >= 2 * 20_000 * 32
        assert not any(tensor.any() for tensor in moments)
        # Parameters in fp32, masters, two moments; without the module where it is empty.
        assert not holes or on_disk < 0.7 * stored, name


def adam_tensors(run: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Adam's step and moments, wherever the form keeps them."""
    for name, path in archives(run).items():
        if name.startswith("zero/") and name.count("/") == 2:
            value, key = load(path), path.stem
            if key != "fp32":
                yield key, value if key == "step" else value["param"]
            continue
        yield from _adam_tensors(load(path))


def _adam_tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in ("step", "exp_avg", "exp_avg_sq") and isinstance(item, torch.Tensor):
            yield key, item
        yield from _adam_tensors(item)


def test_the_manifest_has_every_tensor_and_its_digest(written):
    assert check_manifest(read_manifest(written)) > 0


def test_files_lie_where_deepspeed_looks_for_them(written):
    tag = tag_folder(written)
    prefix = "bf16_" if written.name != "universal" else ""
    optimizers = {f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)}
    model, models = "mp_rank_00_model_states.pt", {f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(3)}
    files = {
        "zero0": {model},
        "zero1": {model, *optimizers},
        "zero2": {model, *sorted(optimizers)[:2]},
        "zero3": {*models, *optimizers},
        "universal": {model, sorted(models)[0], "zero"},
    }
    assert set(os.listdir(tag)) == files[written.name]
    assert tag.name == ("global_step3_universal" if written.name == "universal" else "global_step3")
    assert (written / "config.json").exists()


# --- DeepSpeed's own tools --------------------------------------------------------------------------------------------

TOOLS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

for folder in map(Path, json.loads(sys.argv[1])):
    torch.save(get_fp32_state_dict_from_zero_checkpoint(str(folder)), folder / "zero_to_fp32.bin")
    tag = folder / (folder / "latest").read_text()
    ds_to_universal.main(SimpleNamespace(
        input_folder=str(tag), output_folder=f"{tag}_universal", num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, inject_missing_state=False, strict=True,
    ))
"""
#: (source, its form): real states, and how they are handed to DeepSpeed's tools.
FOR_TOOLS: dict[str, tuple[str, dict[str, int]]] = {
    "bf16 uneven to ZeRO-1": ("zero1-bf16-ws3-uneven", {"zero_stage": 1, "world_size": 2}),
    "bf16 uneven to ZeRO-2": ("zero1-bf16-ws3-uneven", {"zero_stage": 2, "world_size": 4}),
    "bf16 uneven to ZeRO-3": ("zero1-bf16-ws3-uneven", {"zero_stage": 3, "world_size": 2}),
    "ZeRO-3 to ZeRO-1": ("zero3-bf16-ws3", {"zero_stage": 1, "world_size": 3}),
    "ZeRO-2 to ZeRO-3 with sub-groups": ("zero2-fp32-ws3", {"zero_stage": 3, "world_size": 3, "sub_group_size": 60}),
    "ZeRO-0 to ZeRO-2": ("zero0-bf16", {"zero_stage": 2, "world_size": 3}),
    "more ranks than elements": ("zero2-fp32-ws3", {"zero_stage": 1, "world_size": 11}),
    "more ranks than elements in ZeRO-3": ("zero2-fp32-ws3", {"zero_stage": 3, "world_size": 11}),
    "untied": ("zero1-untied-ws2", {"zero_stage": 2, "world_size": 3}),
    "frozen in ZeRO-2": ("zero1-frozen-ws2", {"zero_stage": 2, "world_size": 3}),
    "frozen in ZeRO-3": ("zero3-bf16-frozen-uneven-ws3", {"zero_stage": 3, "world_size": 2}),
}


def test_deepspeeds_own_tools_find_the_state_of_the_live_engine(tmp_path):
    pytest.importorskip("deepspeed")
    folders = {name: tmp_path / re.sub(r"\W+", "-", name) for name in FOR_TOOLS}
    for name, (source, form) in FOR_TOOLS.items():
        convert(DEEPSPEED / source / "checkpoint", folders[name], "deepspeed", **form)
    # Importing deepspeed costs seconds, so one process serves all.
    done = subprocess.run(
        [sys.executable, "-c", TOOLS, json.dumps([str(folder) for folder in folders.values()])],
        capture_output=True, text=True, timeout=300, check=False, env=environment(DS_ACCELERATOR="cpu"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = {
        name: [*zero_to_fp32_differences(folder, case), *ds_to_universal_differences(folder, case)]
        for name, folder in folders.items()
        for case in [DEEPSPEED / FOR_TOOLS[name][0]]
    }
    assert wrong == {name: [] for name in FOR_TOOLS}


def zero_to_fp32_differences(run: Path, case: Path) -> Iterator[str]:
    found = torch.load(run / "zero_to_fp32.bin", weights_only=True)
    if meta(case)["tied"]:
        yield from differences(found.pop("lm_head.weight"), found[EMBEDDING], "lm_head.weight")
    frozen = {name: found[name].float() for name in meta(case)["frozen"]}  # in the module's dtype, as they are stored
    yield from differences({**found, **frozen}, expected(case, "fp32"), "zero_to_fp32")


def ds_to_universal_differences(run: Path, case: Path) -> Iterator[str]:
    zero = run / "global_step3_universal/zero"
    for slot in SLOTS:
        known = {name: tensor for name, tensor in expected(case, slot).items() if name in trained(case)}
        found = {name: load(zero / name / f"{slot}.pt") for name in known}
        # From ZeRO-3 it makes bare vectors.
        found = {n: t["param"] if isinstance(t, dict) else t.reshape(known[n].shape) for n, t in found.items()}
        yield from differences(found, known, slot)


def trained(case: Path) -> list[str]:
    return [name for group in meta(case)["param_group_names"] for name in group]


@pytest.mark.parametrize("source", sorted({source for source, _ in FOR_TOOLS.values()}))
def test_the_universal_folder_holds_the_state_of_the_live_engine(source, tmp_path):
    case = DEEPSPEED / source
    convert(case / "checkpoint", tmp_path / "out", "deepspeed")
    zero = tag_folder(tmp_path / "out") / "zero"
    names = trained(case)
    assert {path.name for path in zero.iterdir()} == {*names, "optimizer_state.pt"}
    for slot in SLOTS:
        found = {name: load(zero / name / f"{slot}.pt")["param"] for name in names}
        known = expected(case, slot)
        assert list(differences(found, {name: known[name] for name in names})) == [], slot
    steps = [step for step, group in zip(adam_steps(case), meta(case)["param_group_names"]) for _ in group]
    assert [load(zero / name / "step.pt").item() for name in names] == steps
    groups = load(zero / "optimizer_state.pt")["param_groups"]
    wanted = [
        dict(group, betas=tuple(group["betas"]), params=[i]) for i, group in enumerate(meta(case)["param_groups"])
    ]
    assert list(differences(groups, wanted)) == []


def adam_steps(case: Path) -> list[float]:
    """Adam's step of every group."""
    steps = meta(case)["optimizer_state_step"]
    assert len(set(steps)) == 1
    return steps[:1] * len(meta(case)["param_groups"])


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"universal": True, "zero_stage": 1, "world_size": 2}, "--universal"),
        ({"universal": True, "zero_stage": 0}, "--universal"),
        ({"universal": True, "world_size": 2}, "--universal"),
        ({"zero_stage": 1}, "--world-size"),
        ({"zero_stage": 2}, "--world-size"),
        ({"zero_stage": 3}, "--world-size"),
        ({"zero_stage": 0, "world_size": 2}, "--world-size"),
        ({"world_size": 2}, "--zero-stage"),
        ({"zero_stage": 4, "world_size": 2}, "--zero-stage"),
        ({"zero_stage": 1, "world_size": 0}, "--world-size"),
        ({"zero_stage": 3, "world_size": 1, "sub_group_size": 0}, "--sub-group-size"),
        ({"tp": 2}, "--tp"),
        ({"tp": 1}, "--tp"),
        ({"pp": 2}, "--pp"),
        ({"dp": 2}, "--dp"),
        ({"nanotron_config": Path("config.yaml")}, "--nanotron-config"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_usage_errors(options, named, tmp_path):
    with pytest.raises(UsageError, match=re.escape(named)) as raised:
        convert(SMOLLM2, tmp_path / "out", "deepspeed", **options)
    assert raised.value.exit_code == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["world_size", "universal", "groups", "sub_group_size"])
@pytest.mark.parametrize("to", ["hf", "nanotron"])
def test_options_of_deepspeed_have_no_meaning_for_other_layouts(to, option, tmp_path):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
        convert(SMOLLM2, tmp_path / "out", to, **{option: Path("groups.json") if option == "groups" else 2})


def test_the_command_line_says_the_same_with_exit_code_2(cli: Callable[..., Finished], tmp_path):
    done = cli("convert", SMOLLM2, tmp_path / "out", "--to", "deepspeed", "--universal", "--zero-stage", 1)
    assert (done.code, done.stdout) == (2, "")
    assert "--universal" in done.stderr and "Traceback" not in done.stderr
    assert cli("convert", SMOLLM2, tmp_path / "out", "--to", "deepspeed", "--tp", 2).code == 2


@pytest.mark.parametrize("options", [{}, {"universal": True}], ids=str)
def test_without_a_stage_a_universal_folder_is_written(options, tmp_path):
    convert(SMOLLM2, tmp_path / "out", "deepspeed", **options)
    assert (tmp_path / "out/latest_universal").read_text() == "global_step3_universal"
    assert not (tmp_path / "out/latest").exists()


@pytest.mark.parametrize("world_size", [None, 1])
def test_zero_0_takes_no_world_size_or_1(world_size, tmp_path):
    convert(SMOLLM2, tmp_path / "out", "deepspeed", zero_stage=0, world_size=world_size)
    assert [*archives(tmp_path / "out")] == ["mp_rank_00_model_states.pt"]


@pytest.mark.parametrize("form", FORMS)
def test_a_dry_run_says_every_file_and_its_size(form, tmp_path):
    planned = plan_to_json(plan(SMALL, tmp_path / "out", **FORMS[form]))
    assert os.listdir(tmp_path) == []
    convert(SMALL, tmp_path / "out", "deepspeed", **FORMS[form])
    sizes = {name: len(content) for name, content in files_below(tmp_path / "out").items()}
    del sizes["smolconv_manifest.json"]
    assert {file["path"]: file["bytes"] for file in planned["files"]} == sizes
    assert planned["bytes_written"] == sum(sizes.values())


@pytest.mark.parametrize("words", [["--dry-run"], []], ids=["dry run", "conversion"])
def test_neither_torch_nor_deepspeed_is_needed(words, tmp_path):
    before = "import sys\nfor name in ('torch', 'deepspeed', 'transformers', 'safetensors'): sys.modules[name] = None"
    form = ("--to", "deepspeed", "--zero-stage", 2, "--world-size", 3)
    done = run_cli("convert", SMALL, tmp_path / "out", *form, *words, before=before)
    assert done.code == 0, done.stderr
    assert (tmp_path / "out").exists() == (not words)


# --- groups -----------------------------------------------------------------------------------------------------------


def group_names(run: Path) -> list[list[str]]:
    """Names by group, in flat order, as DeepSpeed's own tools read them."""
    (first, *_) = (path for name, path in archives(run).items() if "model_states" in name)
    return [list(group) for group in load(first)["param_shapes"]]


def decays(run: Path) -> list[float]:
    (first, *_) = (path for name, path in archives(run).items() if "optim_states" in name)
    return [group["weight_decay"] for group in _param_groups(load(first))]


ONE_RANK = {"zero_stage": 1, "world_size": 1}
MODELS = {
    "llama": (llama, 0.01),
    "untied llama": (lambda: llama(tie_word_embeddings=False), 0.01),
    "smollm3": (smollm3, 0.1),
    "untied smollm3 with biases": (lambda: smollm3(tie_word_embeddings=False, attention_bias=True), 0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_default_groups_are_those_of_the_published_runs_in_named_parameters_order(name, tmp_path):
    """SmolLM3 leaves its embedding out; SmolLM1, SmolLM2 and FineMath, which are Llamas, nothing."""
    make, decay = MODELS[name]
    model = make()
    names = [name for name, _ in model.named_parameters()]
    result = convert(saved(model, tmp_path / "hf"), tmp_path / "out", "deepspeed", **ONE_RANK)
    spared = "smollm3" in name
    assert group_names(tmp_path / "out") == ([[n for n in names if n != EMBEDDING], [EMBEDDING]] if spared else [names])
    assert decays(tmp_path / "out") == [decay, 0.0][: 1 + spared]
    made = "2 groups were made, the embedding undecayed, the rest with" if spared else "1 group was made, all with"
    assert any(f"{made} weight decay {decay} as in" in warning for warning in result.warnings)
    # DeepSpeed's module has the same order, and both names of a tied head.
    assert [*load(archives(tmp_path / "out")["mp_rank_00_model_states.pt"])["module"]] == [*model.state_dict()]


def test_groups_of_nanotron_are_by_weight_decay_in_order_of_first_appearance(tmp_path):
    convert(SMOLLM3, tmp_path / "out", "deepspeed", **ONE_RANK)
    names = [name for name, _ in hf_names(SMOLLM3.parent)]
    assert decays(tmp_path / "out") == [0.0, 0.1]
    assert group_names(tmp_path / "out") == [[EMBEDDING], [name for name in names if name != EMBEDDING]]
    (optimizer,) = (load(path) for name, path in archives(tmp_path / "out").items() if "optim_states" in name)
    stored = torch.load(next((SMOLLM3 / "3/optimizer").glob("optimizer_pp*.pt")), weights_only=True)["param_groups"]
    for key in ("lr", "betas", "eps", "initial_lr"):
        assert [group[key] for group in _param_groups(optimizer)] == [stored[0][key]] * 2


def hf_names(model: Path) -> list[tuple[str, torch.nn.Parameter]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model / "expected_hf"))
    return list(empty.named_parameters())


def write_groups(folder: Path, document: object) -> Path:
    path = folder / "groups.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_groups_file_chooses_members_order_and_hyperparameters(tmp_path):
    norms = ["model.norm.weight", "model.layers.1.input_layernorm.weight"]
    groups = [
        {"names": norms, "weight_decay": 0.0, "lr": 5e-4},
        {"regex": r"layers\.0\..*norm", "weight_decay": 0, "betas": [0.8, 0.99], "eps": 1e-6},
        {"regex": ".*", "weight_decay": 0.05},
    ]
    case = DEEPSPEED / "zero2-fp32-ws3"
    path = write_groups(tmp_path, groups)
    convert(case / "checkpoint", tmp_path / "out", "deepspeed", zero_stage=2, world_size=2, groups=path)
    module = list(load(archives(case / "checkpoint")["mp_rank_00_model_states.pt"])["module"])
    first = [name for name in module if re.search(r"layers\.0\..*norm", name)]
    rest = [name for name in module if name not in (*norms, *first, "lm_head.weight")]
    assert group_names(tmp_path / "out") == [norms, first, rest]
    found = _param_groups(load(archives(tmp_path / "out")["zero_pp_rank_1_mp_rank_00_optim_states.pt"]))
    assert [(g["weight_decay"], g["lr"], g["betas"], g["eps"]) for g in found] == [
        (0.0, 5e-4, (0.9, 0.95), 1e-8), (0, 1e-3, (0.8, 0.99), 1e-6), (0.05, 1e-3, (0.9, 0.95), 1e-8),
    ]  # fmt: skip


def test_a_groups_file_moves_every_parameters_state_with_it(tmp_path):
    case = DEEPSPEED / "zero2-fp32-ws3"
    path = write_groups(tmp_path, [{"regex": "norm", "weight_decay": 0.0}, {"regex": "", "weight_decay": 0.1}])
    convert(case / "checkpoint", tmp_path / "away", "deepspeed", zero_stage=3, world_size=2, groups=path)
    names = meta(case)["param_group_names"]
    home = [
        {"names": names, "weight_decay": group["weight_decay"]}
        for names, group in zip(names, meta(case)["param_groups"])
    ]
    path = write_groups(tmp_path, home)
    convert(tmp_path / "away", tmp_path / "back", "deepspeed", **own_form(case), groups=path)
    assert case_differences(tmp_path / "back", case) == []


EVERY = {"regex": ".*", "weight_decay": 0.1}
BAD_GROUPS: dict[str, tuple[object, str]] = {
    "no JSON": ("[{", "not valid JSON"),
    "NaN": ('[{"regex": ".*", "weight_decay": NaN}]', "not valid JSON"),
    "an object": (EVERY, "expected a list"),
    "an empty list": ([], "expected a list"),
    "a number": (3, "expected a list"),
    "an entry that is no object": ([EVERY, "x"], "group 1"),
    "neither names nor regex": ([{"weight_decay": 0.1}], "group 0"),
    "both names and regex": ([EVERY, {**EVERY, "names": [EMBEDDING]}], "group 1"),
    "names that are no list": ([{"names": EMBEDDING}, EVERY], "group 0"),
    "a name that is no text": ([{"names": [1]}, EVERY], "group 0"),
    "an unknown name": ([{"names": ["model.embed.weight"]}, EVERY], "group 0 .*model.embed.weight"),
    "an unknown key": ([{**EVERY, "decay": 0.1}], "group 0.* decay"),
    "a weight decay that is text": ([{"regex": ".*", "weight_decay": "0.1"}], "group 0.* weight_decay"),
    "a weight decay that is true": ([{"regex": ".*", "weight_decay": True}], "group 0.* weight_decay"),
    "a weight decay that is null": ([{"regex": ".*", "weight_decay": None}], "group 0.* weight_decay"),
    "one beta": ([{**EVERY, "betas": [0.9]}], "group 0.* betas"),
    "betas that are a number": ([{**EVERY, "betas": 0.9}], "group 0.* betas"),
    "betas that are text": ([{**EVERY, "betas": ["0.9", 0.95]}], "group 0.* betas"),
    "a learning rate that is a list": ([{**EVERY, "lr": [1e-3]}], "group 0.* lr"),
    "a regex that is none": ([{"regex": "(", "weight_decay": 0.1}], "group 0.* regex"),
    "a regex that is a number": ([{"regex": 3, "weight_decay": 0.1}], "group 0.* regex"),
    "parameters in no group": ([{"regex": "norm", "weight_decay": 0.0}], re.escape(EMBEDDING)),
    "a group without parameters": ([EVERY, {"regex": "embed", "weight_decay": 0.0}], "group 1"),
    "a name twice": ([{"names": [EMBEDDING, EMBEDDING]}, EVERY], f"group 0.*{re.escape(EMBEDDING)}"),
    "a name in two groups": (
        [{"regex": "norm"}, {"names": ["model.norm.weight", EMBEDDING]}, EVERY], r"group 1.*model\.norm\.weight",
    ),
    "the tied head": ([{"names": ["lm_head.weight"]}, EVERY], r"group 0.*lm_head\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_GROUPS)
def test_a_groups_file_that_does_not_fit_is_a_usage_error_that_names_the_entry(kind, tmp_path):
    document, message = BAD_GROUPS[kind]
    path = write_groups(tmp_path, document)
    with pytest.raises(UsageError, match=rf"--groups {re.escape(str(path))}(.|\n)*{message}") as raised:
        convert(SMOLLM2, tmp_path / "out", "deepspeed", groups=path)
    assert raised.value.exit_code == 2
    assert os.listdir(tmp_path) == ["groups.json"]


def test_a_groups_file_that_names_a_frozen_parameter_is_a_usage_error(tmp_path):
    case = DEEPSPEED / "zero1-frozen-ws2"
    path = write_groups(tmp_path, [{"names": [EMBEDDING]}, EVERY])
    with pytest.raises(UsageError, match=r"group 0.*embed_tokens"):
        convert(case / "checkpoint", tmp_path / "out", "deepspeed", groups=path)


def test_a_groups_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFile, match=r"nowhere\.json"):
        convert(SMOLLM2, tmp_path / "out", "deepspeed", groups=tmp_path / "nowhere.json")


# --- without Adam's state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_of_weights_alone_a_run_that_has_not_begun_is_made(fresh, untrained, form):
    run = fresh[form]
    tensors = list(adam_tensors(run))
    assert {name for name, _ in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(tensor.any() for _, tensor in tensors)
    for name, path in archives(run).items():
        if "model_states" in name:
            document = load(path)
            assert document["lr_scheduler"]["last_batch_iteration"] == -1
            assert (document["global_steps"], document["global_samples"], document["skipped_steps"]) == (0, 0, 0)
    assert tag_folder(run).name.startswith("global_step0")
    masters = {name: tensor.float() for name, tensor in hf_weights(untrained).items()}
    assert list(differences(master_tensors(run), masters)) == []


def master_tensors(run: Path) -> dict[str, torch.Tensor]:
    """fp32 masters by name, put together here: flat groups of ZeRO 1 and 2, pieces of ZeRO-3, or one by one."""
    found = documents(run, {})
    if any(name.startswith("zero/") for name in found):
        return {name.split("/")[1]: found[name]["param"] for name in found if name.endswith("/fp32.pt")}
    model = next(document for name, document in found.items() if "model_states" in name)
    groups = model["param_shapes"]
    if model["optimizer"] is not None:
        flat = [tensor for group in model["optimizer"]["fp32_groups"] for tensor in group]
        return dict(zip([name for group in groups for name, _ in group], flat, strict=True))
    states = [document["optimizer_state_dict"] for name, document in found.items() if "optim_states" in name]
    masters: dict[str, torch.Tensor] = {}
    for index, group in enumerate(groups):
        at = 0
        if "fp32_flat_groups" in states[0]:
            for name, shape in group:
                size = -(-prod(shape) // len(states))
                pieces = [state["fp32_flat_groups"][index][at : at + size] for state in states]
                masters[name] = torch.cat(pieces)[: prod(shape)].reshape(shape)
                at += size
        else:
            flat = torch.cat([state["single_partition_of_fp32_groups"][index] for state in states])
            for name, shape in group:
                masters[name] = flat[at : at + prod(shape)].reshape(shape)
                at += prod(shape)
    return masters


def test_of_weights_alone_the_warning_says_what_was_made_up(untrained, tmp_path):
    universal = plan(untrained, tmp_path / "out").warnings
    ranks = plan(untrained, tmp_path / "out", **FORMS["zero2"]).warnings
    for warnings in (universal, ranks):
        assert any("no Adam state" in warning and "moments are zero and steps 0" in warning for warning in warnings)
        assert any("weight decay 0.01" in warning and "--groups" in warning for warning in warnings)
    assert any("no learning rate" in warning for warning in ranks)


def plan(source: Path, target: Path, **options: Any) -> Any:
    return plan_conversion(source, target, ConvertOptions(to="deepspeed", **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-ws3"])
def test_without_the_optimizer_the_real_masters_stay_and_adam_begins_anew(name, form, tmp_path):
    case = DEEPSPEED / name
    convert(case / "checkpoint", tmp_path / "out", "deepspeed", **FORMS[form], optimizer=False)
    assert list(differences(master_tensors(tmp_path / "out"), expected(case, "fp32"))) == []
    assert not any(tensor.any() for _, tensor in adam_tensors(tmp_path / "out"))
    for file, path in archives(tmp_path / "out").items():
        if "model_states" in file:
            document = load(path)
            assert (document["global_steps"], document["lr_scheduler"]["last_batch_iteration"]) == (0, -1)


def test_an_optimizer_that_is_not_there_cannot_be_asked_for(untrained, tmp_path):
    with pytest.raises(UsageError, match="--optimizer"):
        convert(untrained, tmp_path / "out", "deepspeed", optimizer=True)


# --- dtypes and vocabulary --------------------------------------------------------------------------------------------


def module_of(run: Path) -> dict[str, torch.Tensor]:
    module = dict(load(archives(run)["mp_rank_00_model_states.pt"])["module"])
    module.pop("lm_head.weight")
    return module


@pytest.mark.parametrize("form", ["zero0", "zero1", "zero2"])
def test_float32_takes_the_masters_and_the_names_of_an_fp32_engine(form, tmp_path):
    case = DEEPSPEED / "zero1-bf16-ws3-uneven"
    convert(case / "checkpoint", tmp_path / "out", "deepspeed", **FORMS[form], dtype="float32")
    masters = expected(case, "fp32")
    assert list(differences(module_of(tmp_path / "out"), masters)) == []
    if form != "zero0":
        assert list(differences(master_tensors(tmp_path / "out"), masters)) == []
    assert not any("bf16_" in name for name in archives(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("form", ["zero0", "zero1", "zero2"])
def test_bfloat16_rounds_the_module_and_keeps_the_masters_and_moments(form, tmp_path):
    case = DEEPSPEED / "zero2-fp32-ws3"
    convert(case / "checkpoint", tmp_path / "out", "deepspeed", **FORMS[form], dtype="bfloat16")
    masters = expected(case, "fp32")
    rounded = {name: tensor.bfloat16() for name, tensor in masters.items()}
    assert list(differences(module_of(tmp_path / "out"), rounded)) == []
    assert list(differences(master_tensors(tmp_path / "out"), masters)) == []
    assert all("bf16_" in name for name in archives(tmp_path / "out") if "optim_states" in name)
    convert(tmp_path / "out", tmp_path / "back", "deepspeed", **own_form(case), dtype="float32")
    assert case_differences(tmp_path / "back", case) == []


def test_bfloat16_at_zero_3_shows_in_the_empty_tensors(tmp_path):
    convert(DEEPSPEED / "zero2-fp32-ws3/checkpoint", tmp_path / "out", "deepspeed", **FORMS["zero3"], dtype="bfloat16")
    for name, path in archives(tmp_path / "out").items():
        if "model_states" in name:
            module = load(path)["module"]
            assert {(t.dtype, tuple(t.shape)) for t in module.values()} == {(torch.bfloat16, (0,))}
    assert list(differences(master_tensors(tmp_path / "out"), expected(DEEPSPEED / "zero2-fp32-ws3", "fp32"))) == []


@pytest.mark.parametrize("source", ["zero2-fp32-ws3", "zero1-bf16-ws3-uneven", "zero3-bf16-ws3"])
def test_a_trimmed_vocabulary_is_trimmed_in_every_slot(source, tmp_path):
    case = DEEPSPEED / source
    convert(case / "checkpoint", tmp_path / "universal", "deepspeed", vocab_size=30)
    zero = tag_folder(tmp_path / "universal") / "zero"
    for slot in SLOTS:
        known = {name: tensor[:30] if name == EMBEDDING else tensor for name, tensor in expected(case, slot).items()}
        found = {name: load(zero / name / f"{slot}.pt")["param"] for name in known}
        assert list(differences(found, known)) == []
    convert(case / "checkpoint", tmp_path / "zero2", "deepspeed", **FORMS["zero2"], vocab_size=30)
    module, masters = module_of(tmp_path / "zero2"), expected(case, "fp32")
    assert torch.equal(module[EMBEDDING], masters[EMBEDDING][:30].to(module[EMBEDDING].dtype))
    assert json.loads((tmp_path / "zero2/config.json").read_text())["vocab_size"] == 30


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zero2", "zero3", "universal"])
def test_a_conversion_that_was_killed_and_resumed_is_the_same_to_the_byte(form, tmp_path):
    options = {**FORMS[form], "workers": 1}
    with Mortal() as mortal:
        whole = mortal.convert(SMALL, tmp_path / "whole", "deepspeed", **options)
        assert whole.status == 0
        known = files_below(tmp_path / "whole")
        for call, part in (("pwrite", 0.3), ("write", 0.5), ("fsync", 0.8), ("rename", 0)):
            target, at = tmp_path / call, int(part * whole.calls[call])
            assert mortal.convert(SMALL, target, "deepspeed", **options, call=call, at=at).status == -9
            assert not target.exists()
            assert mortal.convert(SMALL, target, "deepspeed", **options, resume=True).status == 0
            found = files_below(target)
            assert found.keys() == known.keys()
            assert found == known, call


def test_resumed_holes_are_zeros_whatever_the_interrupted_file_held(untrained, tmp_path):
    with Mortal() as mortal:
        options = {**FORMS["zero2"], "workers": 1}
        whole = mortal.convert(untrained, tmp_path / "whole", "deepspeed", **options)
        life = mortal.convert(
            untrained, tmp_path / "out", "deepspeed", **options, call="write", at=whole.calls["write"] // 2
        )
        assert life.status == -9
        for path in (tmp_path / "out.partial").rglob("*.pt"):
            path.write_bytes(b"\xff" * path.stat().st_size)
        (tmp_path / "out.partial" / JOURNAL).write_bytes(b"")
        assert mortal.convert(untrained, tmp_path / "out", "deepspeed", **options, resume=True).status == 0
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    assert not any(tensor.any() for _, tensor in adam_tensors(tmp_path / "out"))


# --- what is refused or warned of -------------------------------------------------------------------------------------


def test_parameters_of_one_group_with_different_adam_steps_are_refused(tmp_path):
    convert(SMALL, tmp_path / "hf", "hf")
    path = tmp_path / "hf/smolconv_state/state.json"
    state = json.loads(path.read_text())
    state["optimizer"]["steps"]["model.norm.weight"] = 2.0
    path.write_text(json.dumps(state))
    (tmp_path / "hf/smolconv_manifest.json").unlink()
    groups = write_groups(tmp_path, [{"regex": ".*"}])
    with pytest.raises(UnsupportedModel, match=r"--groups FILE\.json"):
        convert(tmp_path / "hf", tmp_path / "out", "deepspeed", **FORMS["zero2"], groups=groups)
    groups = write_groups(tmp_path, [{"names": ["model.norm.weight"]}, {"regex": ".*"}])
    convert(tmp_path / "hf", tmp_path / "out", "deepspeed", **FORMS["zero2"], groups=groups)
    state = load(archives(tmp_path / "out")["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])["optimizer_state_dict"]
    assert [state["base_optimizer_state"]["state"][g]["step"].item() for g in (0, 1)] == [2.0, 3.0]


def test_nan_and_infinity_are_kept_and_named(tmp_path):
    source = saved(llama(), tmp_path / "hf")
    weights = hf_weights(source)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = convert(source, tmp_path / "out", "deepspeed")
    assert any("model.norm.weight (master)" in warning for warning in result.warnings)
    zero = tag_folder(tmp_path / "out") / "zero"
    assert load(zero / "model.norm.weight/fp32.pt")["param"].isnan().tolist().index(True) == 3


def test_without_adams_state_the_groups_stay_those_of_the_run(tmp_path):
    case = DEEPSPEED / "zero2-fp32-ws3"
    convert(case / "checkpoint", tmp_path / "out", "deepspeed", **own_form(case), optimizer=False)
    written = read_checkpoint(tmp_path / "out")
    assert written.optimizer is not None
    assert [list(group.names) for group in written.optimizer.groups] == meta(case)["param_group_names"]
    found = [group.hyperparameters["weight_decay"] for group in written.optimizer.groups]
    assert found == [group["weight_decay"] for group in meta(case)["param_groups"]]
    assert set(written.optimizer.steps.values()) == {0.0}
