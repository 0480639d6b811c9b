"""There and back in all nine directions between nanotron, Hugging Face and DeepSpeed: no bit, count or document is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, Finished, convert, hf_weights
from hf_models import llama, logits, saved, smollm3
from nanotron_folders import differences, run_differences, shards, step_folder, topology_of
from safetensors.torch import load_file
from test_deepspeed_writing import (
    DEEPSPEED,
    archives,
    case_differences,
    documents,
    expected,
    load,
    meta,
    own_form,
    tag_folder,
)
from test_round_trips import MODELS

from smolconv.conversion import ConversionPlan, ConversionResult, ConvertOptions, plan_conversion, run_conversion
from smolconv.errors import DigestMismatch, ParityFailed, UnsupportedModel
from smolconv.storage.manifest import check_manifest, read_manifest
from smolconv.verification.compare import verify_conversion

NANOTRON = FIXTURES / "nanotron"
SMOLLM2, SMOLLM3, BF16 = (NANOTRON / name for name in ("smollm2-tiny", "smollm3-tiny", "smollm3-tiny-bf16"))
STATE = ("master", "exp_avg", "exp_avg_sq")
ASSETS = {
    "tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}\n", "special_tokens_map.json": b"{} ",
    "chat_template.jinja": "{{ 'Grüße' }}".encode(), "generation_config.json": b'{"eos_token_id": [1, 2]}\n',
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Form:
    """What to ask of ``convert``."""

    to: str
    options: Mapping[str, Any]

    def write(self, source: Path, target: Path, **more: Any) -> Path:
        convert(source, target, self.to, **{**self.options, **more})
        return target


def form(to: str, **options: Any) -> Form:
    return Form(to=to, options=options)


def zero(stage: int, ranks: int, **options: Any) -> Form:
    return form("deepspeed", zero_stage=stage, world_size=ranks, **options)


#: What a checkpoint goes through on its way.
BETWEEN = {
    "nanotron": form("nanotron"),
    "nanotron zero1": form("nanotron", dp=3, zero_stage=1),
    "hf": form("hf"),
    "hf shards": form("hf", max_shard_bytes=9_000),
    "ZeRO-0": form("deepspeed", zero_stage=0),
    "ZeRO-1": zero(1, 3),
    "ZeRO-2": zero(2, 5),
    "ZeRO-3": zero(3, 2, sub_group_size=500),
    "universal": form("deepspeed"),
}


# --- from nanotron ----------------------------------------------------------------------------------------------------

RUNS = [SMOLLM2 / "tp2-pp2-dp1-zero0", BF16 / "tp2-pp1-dp1-zero0"]


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
def test_a_run_of_nanotron_comes_back_with_its_own_files(run, between, tmp_path):
    away = BETWEEN[between].write(run, tmp_path / "away")
    convert(away, tmp_path / "back", "nanotron", **topology_of(run))
    assert run_differences(tmp_path / "back", run) == []


def test_a_run_of_nanotron_comes_back_through_every_layout_and_stage(tmp_path):
    at = run = SMOLLM3 / "tp2-pp1-dp2-zero1"
    for number, between in enumerate(BETWEEN.values()):
        at = between.write(at, tmp_path / str(number))
    convert(at, tmp_path / "back", "nanotron", **topology_of(run))
    assert run_differences(tmp_path / "back", run) == []


@pytest.mark.parametrize("between", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "universal"])
def test_weights_of_nanotron_alone_come_back(between, tmp_path):
    run = BF16 / "tp2-pp1-dp1-zero0"
    convert(run, tmp_path / "weights", "nanotron", tp=2, optimizer=False)
    away = BETWEEN[between].write(tmp_path / "weights", tmp_path / "away")
    convert(away, tmp_path / "back", "nanotron", tp=2)
    back = step_folder(tmp_path / "back")
    assert list(differences(shards(back), shards(step_folder(run)))) == []
    # DeepSpeed's file cannot do without moments: Adam that has made no step is no state.
    assert not (back / "optimizer").exists()


# --- from Hugging Face ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bf16 with masters", "fp32"])
def trained(request, tmp_path_factory) -> Path:
    """An HF folder with Adam's state, progress, documents of nanotron's, a tokenizer, and a field that no spec knows."""
    folder = tmp_path_factory.mktemp("trained") / "hf"
    convert(RUNS[1] if "bf16" in request.param else RUNS[0], folder, "hf")
    for name, data in ASSETS.items():
        (folder / name).write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "a_field_of_theirs": {"kept": [1]}}))
    (folder / "smolconv_manifest.json").unlink()  # it describes the folder before these changes
    return folder


def sidecar(folder: Path) -> dict[str, Any]:
    """Everything that an HF folder has beside the model: by slot the tensors, then what state.json says."""
    home = folder / "smolconv_state"
    slots: dict[str, Any] = {slot: {} for slot in STATE}
    for slot, tensors in slots.items():
        for path in home.glob(f"{slot}-*.safetensors"):
            tensors.update(load_file(path))
    state = json.loads((home / "state.json").read_text())
    return {**slots, **state}


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(group[key]) if key == "betas" else group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def hf_differences(a: Path, b: Path) -> Iterator[str]:
    yield from differences(hf_weights(a), hf_weights(b), "weights")
    left, right = (json.loads((folder / "config.json").read_text()) for folder in (a, b))
    yield from differences(left, right, "config.json")
    left, right = sidecar(a), sidecar(b)
    for state in (left, right):
        # A layout's own switches of the optimizer (fused, capturable) are no hyperparameters.
        groups = state["optimizer"].pop("groups")
        state["groups"] = [(sorted(group["names"]), hyperparameters(group["hyperparameters"])) for group in groups]
    yield from differences(left, right, "sidecar")


def source_documents(folder: Path) -> dict[str, bytes]:
    """nanotron's documents, as an HF folder keeps them."""
    names = ("config.yaml", "model_config.json", "checkpoint_metadata.json")
    return {name: (folder / "smolconv_state/source" / name).read_bytes() for name in names}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_trained_hugging_face_model_comes_back_with_its_state_and_documents(trained, between, tmp_path):
    away = BETWEEN[between].write(trained, tmp_path / "away")
    convert(away, tmp_path / "back", "hf")
    assert list(hf_differences(tmp_path / "back", trained)) == []
    assert {name: (tmp_path / "back" / name).read_bytes() for name in ASSETS} == ASSETS
    if "nanotron" not in between:  # which states its own topology there
        assert source_documents(tmp_path / "back") == source_documents(trained)


@pytest.mark.parametrize("between", ["ZeRO-2", "ZeRO-3", "universal"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_give_the_same_logits_after_deepspeed(name, between, tmp_path):
    model = MODELS[name]()
    source = saved(model, tmp_path / "hf")
    (source / "tokenizer.json").write_bytes(b"{}")
    convert(BETWEEN[between].write(source, tmp_path / "away"), tmp_path / "back", "hf")
    assert list(differences(hf_weights(tmp_path / "back"), hf_weights(source))) == []
    assert not list((tmp_path / "back").glob("smolconv_state/exp_avg*"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    # Said again by no_rope_layers, which transformers obeys; ours follows it where the two disagree.
    before.pop("no_rope_layer_interval", None)
    assert list(differences({key: after.get(key) for key in before}, before)) == []
    assert (tmp_path / "back/tokenizer.json").read_bytes() == b"{}"
    if between == "universal":
        assert torch.equal(logits(tmp_path / "back"), logits(model))


@pytest.mark.parametrize("make", [llama, smollm3])
def test_transformers_loads_the_config_beside_latest(make, tmp_path):
    from transformers import AutoConfig

    model = make()
    convert(saved(model, tmp_path / "hf"), tmp_path / "out", "deepspeed")
    found = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(found) is type(model.config)
    ours, theirs = found.to_dict(), AutoConfig.from_pretrained(tmp_path / "hf").to_dict()
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}


# --- from DeepSpeed ---------------------------------------------------------------------------------------------------

CASES = [
    "zero0-bf16", "zero1-bf16-ws3-uneven", "zero1-untied-ws2", "zero1-frozen-ws2", "zero2-fp32-ws3", "zero3-bf16-ws3",
    "zero3-bf16-frozen-uneven-ws3", "smollm2-tiny-bf16-zero3-ws2",
]  # fmt: skip
#: nanotron keeps groups by hyperparameters, and no frozen parameters.
THROUGH_NANOTRON = ["zero0-bf16", "zero1-untied-ws2", "smollm2-tiny-bf16-zero1-ws2", "smollm2-tiny-bf16-zero3-ws2"]


def directions() -> Iterator[tuple[str, str]]:
    for between in BETWEEN:
        yield from ((case, between) for case in (THROUGH_NANOTRON if "nanotron" in between else CASES))


@pytest.mark.parametrize(("name", "between"), directions(), ids=lambda word: word.replace(" ", "-"))
def test_a_run_of_deepspeed_comes_back_with_its_own_files(name, between, tmp_path):
    case = DEEPSPEED / name
    away = BETWEEN[between].write(case / "checkpoint", tmp_path / "away")
    convert(away, tmp_path / "back", "deepspeed", **own_form(case))
    # nanotron has no place for DeepSpeed's schedule, which continues from the step.
    skip = {"lr_scheduler": "no place in nanotron"} if "nanotron" in between else {}
    assert case_differences(tmp_path / "back", case, skip) == []


def test_groups_with_equal_hyperparameters_lose_through_nanotron_nothing_but_their_borders(tmp_path):
    case = DEEPSPEED / "zero2-fp32-ws3"
    rules = [("^model.norm", 0.0), ("norm", 0.0), ("embed", 0.05), ("", 0.1)]
    path = tmp_path / "groups.json"
    path.write_text(json.dumps([{"regex": regex, "weight_decay": decay} for regex, decay in rules]))
    zero(2, 2, groups=path).write(case / "checkpoint", tmp_path / "four")
    convert(tmp_path / "four", tmp_path / "run", "nanotron")
    convert(tmp_path / "run", tmp_path / "out", "deepspeed")
    folder = tag_folder(tmp_path / "out") / "zero"
    for slot in ("fp32", "exp_avg", "exp_avg_sq"):
        known = expected(case, slot)
        assert list(differences({n: load(folder / n / f"{slot}.pt")["param"] for n in known}, known)) == []
    shapes = load(archives(tmp_path / "out")["mp_rank_00_model_states.pt"])["param_shapes"]
    groups = load(folder / "optimizer_state.pt")["param_groups"]
    found = {name: hyperparameters(group) for group, names in zip(groups, shapes, strict=True) for name in names}
    assert len(groups) == 3
    assert found == {
        name: {**hyperparameters(meta(case)["param_groups"][0]), "weight_decay": decay}
        for name in known
        for decay in [next(decay for regex, decay in rules if re.search(regex, name))]
    }


def test_groups_that_part_what_nanotron_joins_are_refused_by_name(tmp_path):
    source = DEEPSPEED / "zero2-fp32-ws3/checkpoint"
    with pytest.raises(UnsupportedModel, match=r"gate_proj.*up_proj.*hyperparameters"):
        convert(source, tmp_path / "run", "nanotron")
    convert(source, tmp_path / "run", "nanotron", optimizer=False)


@pytest.mark.parametrize("between", ["nanotron", "nanotron zero1"])
def test_frozen_parameters_go_to_nanotron_as_weights_with_a_warning(between, tmp_path):
    case = DEEPSPEED / "zero1-frozen-ws2"
    options = BETWEEN[between].options
    result = convert(case / "checkpoint", tmp_path / "run", "nanotron", **options)
    assert any("4 frozen parameters" in warning for warning in result.warnings)
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert list(differences(hf_weights(tmp_path / "hf"), expected(case, "fp32"))) == []


@pytest.mark.parametrize("between", [name for name in BETWEEN if "nanotron" not in name])
def test_client_state_and_schedule_survive(between, tmp_path):
    case = DEEPSPEED / "zero2-clientstate-ws2"
    away = BETWEEN[between].write(case / "checkpoint", tmp_path / "away")
    convert(away, tmp_path / "back", "deepspeed", **own_form(case))
    assert case_differences(tmp_path / "back", case, skip={"rng": "a tensor"}) == []


@pytest.mark.parametrize("between", BETWEEN)
def test_progress_survives(between, tmp_path):
    case = DEEPSPEED / "smollm2-tiny-bf16-zero1-ws2"
    away = BETWEEN[between].write(case / "checkpoint", tmp_path / "away")
    convert(away, tmp_path / "back", "deepspeed", zero_stage=0)
    known = load(archives(case / "checkpoint")["mp_rank_00_model_states.pt"])
    document = load(archives(tmp_path / "back")["mp_rank_00_model_states.pt"])
    assert (document["global_steps"], document["global_samples"]) == (known["global_steps"], known["global_samples"])
    steps = {entry["step"].item() for entry in document["optimizer"]["optimizer_state_dict"]["state"].values()}
    assert steps == {3.0}


@pytest.mark.parametrize("between", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "universal"])
def test_masters_without_moments_survive(between, tmp_path):
    case = DEEPSPEED / "zero1-bf16-ws3-uneven"
    away = BETWEEN[between].write(case / "checkpoint", tmp_path / "away", optimizer=False)
    convert(away, tmp_path / "back", "deepspeed")
    folder, known = tag_folder(tmp_path / "back") / "zero", expected(case, "fp32")
    assert list(differences({name: load(folder / name / "fp32.pt")["param"] for name in known}, known)) == []
    convert(away, tmp_path / "hf", "hf", dtype="float32")
    assert list(differences(hf_weights(tmp_path / "hf"), known)) == []


# --- world sizes and stages -------------------------------------------------------------------------------------------


def same_archives(a: Path, b: Path) -> list[str]:
    """What parts the torch files of two of our folders; bias_correction is added where a rank's file is written."""
    left, right = (documents(run, {"bias_correction": "of ranks' files"}) for run in (a, b))
    return list(differences(left, right))


STAGES = {
    "ZeRO-0": form("deepspeed", zero_stage=0),
    "ZeRO-1": zero(1, 2),
    "ZeRO-2": zero(2, 3),
    "ZeRO-3": zero(3, 2),
    "universal": form("deepspeed"),
}
SOURCES = ["zero1-bf16-ws3-uneven", "zero2-fp32-ws3"]


@pytest.fixture(scope="module")
def direct(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """What DeepSpeed wrote, in every stage, by (case, stage)."""
    home = tmp_path_factory.mktemp("direct")
    return {
        (case, stage): STAGES[stage].write(DEEPSPEED / case / "checkpoint", home / case / stage)
        for case in SOURCES
        for stage in STAGES
    }


@pytest.mark.parametrize("to", STAGES)
@pytest.mark.parametrize("since", STAGES)
@pytest.mark.parametrize("case", SOURCES)
def test_every_stage_becomes_every_other_as_if_it_came_from_deepspeeds_own_files(direct, case, since, to, tmp_path):
    STAGES[to].write(direct[case, since], tmp_path / "out")
    assert same_archives(tmp_path / "out", direct[case, to]) == []
    convert(tmp_path / "out", tmp_path / "back", "deepspeed", **own_form(DEEPSPEED / case))
    assert case_differences(tmp_path / "back", DEEPSPEED / case) == []


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (3, 11)])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", SOURCES)
def test_growing_and_shrinking_the_world_keeps_every_bit(case, stage, before, after, tmp_path):
    source = DEEPSPEED / case / "checkpoint"
    zero(stage, before).write(source, tmp_path / "before")
    zero(stage, after).write(tmp_path / "before", tmp_path / "after")
    zero(stage, after).write(source, tmp_path / "at once")
    assert same_archives(tmp_path / "after", tmp_path / "at once") == []
    convert(tmp_path / "after", tmp_path / "back", "deepspeed", **own_form(DEEPSPEED / case))
    assert case_differences(tmp_path / "back", DEEPSPEED / case) == []


@pytest.mark.parametrize("size", [1, 60, 300, 10**9])
def test_sub_groups_of_any_size_hold_the_same_state(size, tmp_path):
    case = DEEPSPEED / "zero3-bf16-subgroups-ws3-uneven"
    zero(3, 4, sub_group_size=size).write(case / "checkpoint", tmp_path / "away")
    convert(tmp_path / "away", tmp_path / "back", "deepspeed", **own_form(case))
    assert case_differences(tmp_path / "back", case) == []


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same trained model in each layout."""
    home = tmp_path_factory.mktemp("sources")
    convert(RUNS[1], home / "hf", "hf")
    convert(RUNS[1], home / "deepspeed", "deepspeed", zero_stage=1, world_size=2)
    return {"nanotron": RUNS[1], "hf": home / "hf", "deepspeed": home / "deepspeed"}


TARGETS: dict[str, dict[str, Any]] = {"nanotron": {"tp": 2}, "hf": {}, "deepspeed": {"zero_stage": 3, "world_size": 3}}


def run_verified(
    source: Path, target: Path, to: str, then: Callable[[Path], None] = lambda _: None, **options: Any
) -> ConversionResult:
    """Convert with the tensors tier of ``--verify``; ``then`` may touch what was written before it is verified."""

    def verifier(plan: ConversionPlan, folder: Path) -> Mapping[str, Any]:
        then(folder)
        return verify_conversion(plan.prepared, folder, logits=False).to_json()

    return run_conversion(plan_conversion(source, target, ConvertOptions(to=to, **options)), verifier=verifier)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("since", TARGETS)
def test_every_direction_verifies_in_weights_and_optimizer(sources, since, to, tmp_path):
    result = run_verified(sources[since], tmp_path / "out", to, **TARGETS[to])
    assert result.verification["passed"]
    assert {slot: report["equal"] for slot, report in result.verification["optimizer"]["slots"].items()} == {
        slot: len(hf_weights(sources["hf"])) for slot in STATE
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"dtype": "float16"}, {"optimizer": False}], ids=str)
def test_every_stage_verifies(stage, options, tmp_path):
    source = DEEPSPEED / "zero1-bf16-ws3-uneven/checkpoint"
    result = run_verified(source, tmp_path / "out", "deepspeed", **STAGES[stage].options, **options)
    assert result.verification["passed"]


@pytest.mark.parametrize(("since", "to"), [("deepspeed", "hf"), ("hf", "deepspeed")])
def test_the_command_line_verifies_with_exit_code_0(cli: Callable[..., Finished], sources, since, to, tmp_path):
    options = [word for key, value in TARGETS[to].items() for word in (f"--{key.replace('_', '-')}", value)]
    done = cli("convert", sources[since], tmp_path / "out", "--to", to, *options, "--verify", "--json")
    assert done.code == 0, done.stderr
    verification = json.loads(done.stdout)["verification"]
    assert verification["passed"] and verification["logits"]["max_abs"] == 0.0
    assert verification["optimizer"]["slots"].keys() == set(STATE)


def flip_a_byte(folder: Path, slot: str) -> None:
    """Change one bit in the middle of a tensor of that slot, where the manifest says it lies."""
    manifest = json.loads((folder / "smolconv_manifest.json").read_text())
    entry = max((t for t in manifest["tensors"] if t["slot"] == slot), key=lambda t: t["bytes"])
    path = folder / entry["file"]
    data = bytearray(path.read_bytes())
    data[entry["offset"] + entry["bytes"] // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("slot", ["parameter", *STATE])
@pytest.mark.parametrize("stage", STAGES)
def test_one_bit_in_a_written_file_fails_verification_and_the_digests(stage, slot, tmp_path):
    if slot == "parameter" and stage in ("ZeRO-3", "universal"):
        pytest.skip("the module holds no elements there")
    source, options = DEEPSPEED / "zero1-bf16-ws3-uneven/checkpoint", STAGES[stage].options
    with pytest.raises(ParityFailed) as raised:
        run_verified(source, tmp_path / "out", "deepspeed", lambda folder: flip_a_byte(folder, slot), **options)
    assert raised.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(DigestMismatch, match=slot) as mismatch:
        check_manifest(read_manifest(tmp_path / "out.failed"))
    assert mismatch.value.exit_code == 3


def test_a_step_that_is_another_fails_verification(tmp_path):
    source, options = DEEPSPEED / "zero1-bf16-ws3-uneven/checkpoint", STAGES["universal"].options
    with pytest.raises(ParityFailed):
        run_verified(source, tmp_path / "out", "deepspeed", lambda folder: flip_a_byte(folder, "step"), **options)


def test_inspect_check_exits_with_3_after_one_byte_and_with_0_before(cli: Callable[..., Finished], tmp_path):
    zero(2, 2).write(DEEPSPEED / "zero2-fp32-ws3/checkpoint", tmp_path / "out")
    assert cli("inspect", tmp_path / "out", "--check").code == 0
    flip_a_byte(tmp_path / "out", "exp_avg")
    done = cli("inspect", tmp_path / "out", "--check")
    assert done.code == 3
    assert "exp_avg" in done.stderr and "Traceback" not in done.stderr
