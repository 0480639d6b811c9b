"""Claims about how people's DeepSpeed runs lie on a disk: tags with a slash, states on NVMe, adapters."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import FIXTURES, convert, hf_weights, run_cli
from deepspeed_folders import Case, case, edit, rename_parameters
from safetensors.torch import load_file, save_file

from smolconv.errors import CorruptFile, MissingFile, SmolconvError, UnsupportedModel
from smolconv.layouts.deepspeed import listing
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

NAME = "zero1-bf16-ws3-uneven"


def run_with_tags(tmp_path: Path, *tags: str) -> Case:
    """A run whose tags are those, each of the step that its name ends with; the last one is ``latest``."""
    run = case(NAME).copied(tmp_path)
    saved = run.tag.rename(tmp_path / "saved")
    for tag in tags:
        place = run.checkpoint / tag
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(saved, place)
        found = re.search(r"\d+$", tag)
        assert found
        changes = {"global_steps": int(found[0])}
        edit(place / "mp_rank_00_model_states.pt", partial(dict.update, **changes))
    (run.checkpoint / "latest").write_text(tags[-1])
    for name in ("config.json", "tokenizer_config.json"):  # beside ``latest``, as people keep them
        shutil.copy(run.config, run.checkpoint / name)
    run.config.unlink()
    return run


def step_of(run: Case, **options: int) -> int:
    progress = read_checkpoint(run.checkpoint, ReadOptions(**options)).progress  # type: ignore[arg-type]
    assert progress is not None
    return progress.step


@pytest.mark.parametrize("tag", ["runs/step3", "a/b/c.d/step3", "best model/step3"])
def test_a_tag_may_have_a_slash(tag, tmp_path):
    run = run_with_tags(tmp_path, tag)
    convert(run.checkpoint, tmp_path / "hf", "hf", dtype="float32")
    expected = run.engine("fp32")
    assert all(tensor.equal(expected[name]) for name, tensor in hf_weights(tmp_path / "hf").items())
    assert (tmp_path / "hf" / "tokenizer_config.json").exists()
    needed = listing.needed_files(run.checkpoint, step=None, optimizer=True)
    assert {run.checkpoint / "latest", run.checkpoint / "config.json", *run.tag.iterdir()} <= set(needed)


def test_a_tag_with_a_slash_stays_the_tag(tmp_path):
    run = run_with_tags(tmp_path, "runs/step3")
    out = tmp_path / "out"
    convert(run.checkpoint, out, "deepspeed", zero_stage=2, world_size=2)
    assert (out / "latest").read_text() == "runs/step3" and (out / "runs/step3/mp_rank_00_model_states.pt").is_file()
    convert(out, tmp_path / "hf", "hf", dtype="float32")
    expected = run.engine("fp32")
    assert all(tensor.equal(expected[name]) for name, tensor in hf_weights(tmp_path / "hf").items())
    assert run_cli("convert", run.checkpoint, out, "--to", "deepspeed", "--overwrite").code == 0


def test_any_of_them_is_chosen_by_its_step(tmp_path):
    run = run_with_tags(tmp_path, "runs/step1", "other/deeper/step2", "step4", "runs/step3")
    assert [step_of(run), step_of(run, step=1), step_of(run, step=3), step_of(run, step=4)] == [3, 1, 3, 4]
    with pytest.raises(MissingFile, match=r"no tag of step 2; tags found: runs/step1, runs/step3, step4"):
        step_of(run, step=2)  # lies deeper than the tag that latest names


def test_links_to_the_folder_itself_are_not_followed(tmp_path):
    run = run_with_tags(tmp_path, "runs/step3")
    for name in ("a", "b"):
        (run.checkpoint / name).symlink_to(".")
    (run.checkpoint / "latest").write_text("/".join("ab" * 30))
    with pytest.raises(MissingFile, match="no tag of step 9; tags found: runs/step3"):
        step_of(run, step=9)


def test_a_folder_of_runs_is_no_run(tmp_path):
    run = run_with_tags(tmp_path, "runs/step3")
    (run.checkpoint / "latest").unlink()
    assert not listing.detect(run.checkpoint) and listing.detect(run.checkpoint / "runs")


@pytest.mark.parametrize(
    "text",
    ["../saved", "runs/../../saved", "/etc", "runs//step3", "runs/./step3", "runs/step3/..", "a/\0", "./runs", "runs/"],
)
def test_latest_leads_nowhere_but_below(text, tmp_path):
    run = run_with_tags(tmp_path, "runs/step3")
    (run.checkpoint / "latest").write_text(text)
    with pytest.raises(CorruptFile, match="expected the name of a folder next to it"):
        step_of(run)
    shutil.copytree(run.checkpoint / "runs" / "step3", run.checkpoint / "step3")
    assert step_of(run, step=3) == 3  # which asks for no latest


def test_nor_does_it_by_a_link(tmp_path):
    run = run_with_tags(tmp_path, "runs/step3")
    elsewhere = (run.checkpoint / "runs").rename(tmp_path / "elsewhere")
    (run.checkpoint / "runs").symlink_to(elsewhere)
    with pytest.raises(CorruptFile, match="expected the name of a folder next to it"):
        step_of(run)
    (run.checkpoint / "runs").unlink()
    elsewhere.rename(run.checkpoint / "here")
    (run.checkpoint / "runs").symlink_to("here")
    assert step_of(run) == 3


# --- what has its weights elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [True, False])
def test_states_on_nvme_are_refused_with_the_reason(optimizer, tmp_path):
    run = case("zero3-bf16-ws3").copied(tmp_path)
    folder = run.tag / "offloaded_tensors" / "rank00"
    folder.mkdir(parents=True)
    (folder / "0_140.tensor.swp").write_bytes(bytes(64))
    with pytest.raises(UnsupportedModel, match="on NVMe") as caught:
        convert(run.checkpoint, tmp_path / "hf", "hf", config=run.config, optimizer=optimizer)
    assert "save_16bit_model" in str(caught.value) and len(str(caught.value).splitlines()) == 3


def lora_names(name: str) -> str:
    """As PEFT has them around a target module."""
    name = f"base_model.model.{name}"
    return name.replace("q_proj.weight", "q_proj.lora_A.default.weight")


@pytest.mark.parametrize("name", [NAME, "zero3-bf16-ws3"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the adapter"])
def test_a_lora_training_is_said_to_be_one(name, beside, tmp_path):
    run = case(name).copied(tmp_path)
    rename_parameters(run, lora_names)
    if beside:
        (run.checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b"}))
        (run.checkpoint / "adapter_model.safetensors").write_bytes(bytes(8))
    for folder in (run.checkpoint, run.tag):
        with pytest.raises(SmolconvError) as caught:
            read_checkpoint(folder, ReadOptions(config=run.config))
        said = str(caught.value)
        assert "LoRA" in said and "lora_A" in said and "merge_and_unload" in said


def test_so_is_a_hugging_face_folder_with_its_names(tmp_path):
    hf = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf"
    shutil.copytree(hf, tmp_path / "hf")
    weights = {lora_names(name): tensor for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"LoRA.*q_proj\.lora_A"):
        read_checkpoint(tmp_path / "hf", ReadOptions())
