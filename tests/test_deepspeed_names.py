"""What the engine that wrote a checkpoint needs to load it again: its names, its tag, its groups, its loss scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert
from real_deepspeed import (
    DeepSpeedFailed,
    Group,
    Job,
    Moments,
    Result,
    Trained,
    assert_same_state,
    continue_with_deepspeed,
    random_batches,
)

from smolconv.checkpoint import for_another_engine
from smolconv.conversion import ConvertOptions, plan_from_checkpoint, run_conversion
from smolconv.errors import BadCheckpoint, UnsupportedModel
from smolconv.layouts.registry import read_checkpoint

pytest.importorskip("deepspeed")

CONFIG = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf" / "config.json"
NANOTRON = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
PREFIX, TAG = "policy._orig_mod.", "checkpoint"
FROZEN = "model.layers.0.input_layernorm.weight"
STEPS = 2
FORMS: Mapping[str, dict[str, Any]] = {
    "zero1": {"zero_stage": 1, "world_size": 3},
    "zero2": {"zero_stage": 2, "world_size": 3},
    "zero3": {"zero_stage": 3, "world_size": 3},
    "universal": {},
}


def groups() -> tuple[Group, ...]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG))
    names = [name for name, _ in model.named_parameters() if name != FROZEN]
    return (
        Group(names=tuple(name for name in names if "norm" not in name), weight_decay=0.1),
        Group(names=tuple(name for name in names if "norm" in name)),
    )


def job(stage: int, **options: Any) -> Job:
    first = options.pop("first", 0)
    batches = random_batches(CONFIG, steps=2 * STEPS, rows=6)[first : first + STEPS]
    return Job(
        **{
            "config": CONFIG, "stage": stage, "groups": groups(), "frozen": (FROZEN,), "wrapper": PREFIX,
            "batches": batches, **options,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def went_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A real checkpoint of a wrapped model, two ranks of ZeRO-1, and the plain resume from it."""
    tmp = tmp_path_factory.mktemp("wrapped")
    run = tmp / "run"
    jobs = [job(1, save=run, save_tag=TAG), job(1, checkpoint=run, first=STEPS)]
    results = continue_with_deepspeed(jobs, 2, tmp)
    (run / "config.json").write_text(CONFIG.read_text())
    return run, results[1]


@pytest.fixture(scope="module")
def again(went_on: tuple[Path, Result], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Resumed by three ranks from every form; universal by ZeRO-1."""
    tmp = tmp_path_factory.mktemp("again")
    jobs = {}
    for form, options in FORMS.items():
        convert(went_on[0], tmp / form, "deepspeed", **options)
        jobs[form] = job(
            options.get("zero_stage", 1), checkpoint=tmp / form, tag=TAG, universal=not options, first=STEPS
        )
    return dict(zip(jobs, continue_with_deepspeed(list(jobs.values()), 3, tmp)))


@pytest.mark.parametrize("form", FORMS)
def test_the_wrapped_engine_goes_on_at_another_stage_and_world(
    went_on: tuple[Path, Result], again: dict[str, Result], form: str
) -> None:
    plain, found = went_on[1], again[form]
    state = Trained([], plain.before.masters, Moments(plain.before.exp_avg, plain.before.exp_avg_sq))
    assert_same_state(found.before, state)
    assert found.before.adam_steps == plain.before.adam_steps == [STEPS, STEPS]
    assert found.losses == pytest.approx(plain.losses, abs=1e-6)
    assert torch.equal(found.before.module[FROZEN], plain.before.module[FROZEN])


def test_an_engine_without_the_wrapper_does_not_load_it(went_on: tuple[Path, Result], tmp_path: Path) -> None:
    convert(went_on[0], tmp_path / "out", "deepspeed", zero_stage=1, world_size=1)
    with pytest.raises(DeepSpeedFailed, match=r"Missing key\(s\) in state_dict"):
        continue_with_deepspeed([job(1, checkpoint=tmp_path / "out", wrapper="")], 1, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_names_and_tag_are_read_back_from_every_form(went_on: tuple[Path, Result], tmp_path: Path, form: str) -> None:
    convert(went_on[0], tmp_path / "out", "deepspeed", **FORMS[form])
    source, found = read_checkpoint(went_on[0]), read_checkpoint(tmp_path / "out")
    for checkpoint in (source, found):
        assert checkpoint.source.engine is not None and checkpoint.optimizer is not None
        assert (checkpoint.source.engine.names.wrapper, checkpoint.source.engine.tag) == (PREFIX, TAG)
        assert checkpoint.frozen == (FROZEN,) and len(checkpoint.optimizer.groups) == 2
    assert source.parameters.keys() == found.parameters.keys()


def test_the_prefix_comes_back_through_hugging_face_and_not_without_its_state(
    went_on: tuple[Path, Result], tmp_path: Path
) -> None:
    convert(went_on[0], tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "deepspeed", zero_stage=1, world_size=1)
    assert parameter_names(tmp_path / "back" / TAG) == parameter_names(went_on[0] / TAG)
    (tmp_path / "hf" / "smolconv_state").rename(tmp_path / "state")
    convert(tmp_path / "hf", tmp_path / "plain", "deepspeed", zero_stage=1, world_size=1)
    assert parameter_names(tmp_path / "plain" / "global_step0") != parameter_names(went_on[0] / TAG)


def parameter_names(tag: Path) -> set[str]:
    return set(load(tag / "mp_rank_00_model_states.pt")["module"])


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)  # DeepSpeed's own objects


# --- fp16's loss scale: no engine of it runs on a CPU, so files are compared ---

SCALE = {"cur_scale": 4096.0, "cur_iter": 77, "last_overflow_iter": 70, "cur_hysteresis": 1}


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """An fp16 checkpoint whose optimizer files hold DeepSpeed's own scaler, in the middle of a run."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    convert(NANOTRON, tmp_path / "fp16", "deepspeed", dtype="float16", zero_stage=1, world_size=2)
    for path in (tmp_path / "fp16").glob("*/*_optim_states.pt"):
        document = load(path)
        scaler = DynamicLossScaler(2**16, 500, 2, 3, consecutive_hysteresis=True)
        vars(scaler).update(SCALE)
        document["optimizer_state_dict"].update(loss_scaler=scaler, dynamic_loss_scale=True)
        torch.save(document, path)
    (tmp_path / "fp16/smolconv_manifest.json").unlink()  # of the files as they were
    return tmp_path / "fp16"


def scaler_in(folder: Path) -> tuple[object, dict[str, Any]]:
    (path, *_) = [*folder.glob("*/zero/optimizer_state.pt"), *folder.glob("*/*_optim_states.pt")]
    document = load(path)
    state = document.get("optimizer_state_dict", {}) if "loss_scaler" not in document else document
    scaler = state["loss_scaler"]
    return type(scaler), {**vars(scaler), "dynamic_loss_scale": state["dynamic_loss_scale"]}


@pytest.mark.parametrize("form", FORMS)
def test_the_dynamic_loss_scale_is_carried_with_its_state(scaled: Path, tmp_path: Path, form: str) -> None:
    done = convert(scaled, tmp_path / "out", "deepspeed", **FORMS[form])
    assert scaler_in(tmp_path / "out") == scaler_in(scaled)
    assert scaler_in(scaled)[1].items() >= SCALE.items()
    assert not any("loss scale" in warning for warning in done.warnings)


def test_the_loss_scale_goes_through_hugging_faces_layout_and_through_zero_0(scaled: Path, tmp_path: Path) -> None:
    convert(scaled, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "deepspeed", zero_stage=2, world_size=3)
    assert scaler_in(tmp_path / "back") == scaler_in(scaled)
    convert(scaled, tmp_path / "zero0", "deepspeed", zero_stage=0)
    (path,) = (tmp_path / "zero0").glob("*/*_model_states.pt")
    state, whole = load(path)["optimizer"], scaler_in(scaled)[1]
    stored = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
    assert state["dynamic_loss_scale"] is True and {key: state[key] for key in stored} == {k: whole[k] for k in stored}
    done = convert(tmp_path / "zero0", tmp_path / "from-zero0", "deepspeed", zero_stage=1, world_size=2)
    assert {key: scaler_in(tmp_path / "from-zero0")[1][key] for key in stored} == {k: whole[k] for k in stored}
    assert any("hysteresis" in warning for warning in done.warnings)


def test_a_loss_scale_is_of_fp16_and_of_a_run_that_goes_on(scaled: Path, tmp_path: Path) -> None:
    form = {"zero_stage": 1, "world_size": 1}
    convert(scaled, tmp_path / "bf16", "deepspeed", dtype="bfloat16", **form)
    done = convert(scaled, tmp_path / "anew", "deepspeed", optimizer=False, **form)
    for folder in ("bf16", "anew"):
        assert scaler_in(tmp_path / folder)[1] == {"cur_scale": 1.0, "dynamic": False, "dynamic_loss_scale": False}
    assert any("static loss scale of 1" in warning for warning in done.warnings)


# --- names of strangers ---


def test_a_prefix_that_leads_out_of_the_folder_is_no_folder_name(went_on: tuple[Path, Result], tmp_path: Path) -> None:
    convert(went_on[0], tmp_path / "hf", "hf")
    record = tmp_path / "hf/smolconv_state/source/deepspeed.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps({**document, "names": {"wrapper": "../../../away.", "bare": False}}))
    with pytest.raises(UnsupportedModel, match="cannot be a folder's name"):
        convert(tmp_path / "hf", tmp_path / "out", "deepspeed")
    assert not list(tmp_path.rglob("away*"))


@pytest.mark.parametrize("value", ["many", float("inf"), [1.0]], ids=str)
def test_a_loss_scale_that_is_no_number_is_refused(scaled: Path, tmp_path: Path, value: object) -> None:
    convert(scaled, tmp_path / "hf", "hf")
    record = tmp_path / "hf/smolconv_state/source/deepspeed.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps({**document, "loss_scaler": {**document["loss_scaler"], "cur_scale": value}}))
    (path, *_) = scaled.glob("*/*_optim_states.pt")
    damaged = load(path)
    damaged["optimizer_state_dict"]["loss_scaler"].cur_scale = value
    torch.save(damaged, path)
    for folder in (tmp_path / "hf", scaled):
        with pytest.raises(BadCheckpoint, match=r"loss.scaler|number|Infinity"):
            read_checkpoint(folder)


def test_an_engine_of_smolconvs_own_gets_the_models_names(went_on: tuple[Path, Result], tmp_path: Path) -> None:
    options = ConvertOptions(to="deepspeed", zero_stage=1, world_size=1)
    source = for_another_engine(read_checkpoint(went_on[0]))
    run_conversion(plan_from_checkpoint(source, "source", tmp_path / "out", options))
    names = {name.removeprefix(PREFIX) for name in parameter_names(went_on[0] / TAG)}
    assert parameter_names(tmp_path / "out" / f"global_step{STEPS}") == names
