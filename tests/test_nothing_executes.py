"""A checkpoint executes nothing: not when a run continues from it, and not in ``verify --engine deepspeed``.

Every attack is a file that makes another, the canary, when Python's own unpickler meets it. It is planted where our reader
does not look and DeepSpeed might.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, Touch, convert
from forked_worker import Ended, work
from training import losses, recipe, recipe_document, token_folder

from smolconv.continual_pretraining.run.checkpoint_files import random_file
from smolconv.continual_pretraining.run.checkpoints import step_folder
from smolconv.continual_pretraining.run.resuming import find_origin
from smolconv.continual_pretraining.run.start import prepare_start
from smolconv.errors import BadCheckpoint, CorruptFile, MissingFile, MixedCheckpoint, UnsafePickle
from smolconv.layouts.deepspeed.checkpoint_engine import CheckpointEngine, digest_file, load_torch_archive
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.engines.start import engine_logits
from smolconv.verification.inputs import choose_rows

deepspeed = pytest.importorskip("deepspeed")

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
ZERO1 = FIXTURES / "deepspeed" / "zero1-untied-ws2"
HF = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"
MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def as_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def as_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def as_torchscript(content: object, path: Path) -> None:
    """A zip that torch takes for TorchScript, by its ``constants.pkl``."""
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(content))


FORMS = [as_zip, as_legacy, as_pickle, as_torchscript]


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a checkpoint was executed"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


def document(tokens: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "parallelism": {"zero_stage": 1, "micro_batch_sequences": 1, "global_batch_sequences": 2},
        "checkpoints": {"every_steps": 1}, "schedule": {"train_steps": 2},
    }  # fmt: skip
    made = recipe_document(NANOTRON, tokens, **base)
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    """Two ranks of ZeRO-1 in float32, steps 1 and 2."""
    run = tmp_path_factory.mktemp("trained") / "run"
    succeeded(work(document(tokens), run, 2))
    return run


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def succeeded(ended: Ended) -> None:
    assert ended.code == 0, ended.log


def rewritten(folder: Path) -> None:
    """What was changed is listed as if it had been saved so: an attacker computes digests, too."""
    path = folder / "smolconv_manifest.json"
    manifest = json.loads(path.read_text())
    for file in manifest["files"]:
        found = digest_file(folder / file["path"])
        file.update(bytes=found.nbytes, digest=found.digest)
    path.write_text(json.dumps(manifest))


def without_manifest(folder: Path) -> None:
    (folder / "smolconv_manifest.json").unlink()
    state = json.loads((folder / "trainer.json").read_text())
    del state["manifest"]
    (folder / "trainer.json").write_text(json.dumps(state))


# --- the checkpoint engine that DeepSpeed is given --------------------------------------------------------------------


@pytest.mark.parametrize("save", FORMS)
def test_no_form_of_file_executes_in_our_checkpoint_engine(save, canary, tmp_path):
    path = tmp_path / MODEL
    save({"module": {}, "code": Touch(canary)}, path)
    with pytest.raises((UnsafePickle, CorruptFile), match=MODEL):
        CheckpointEngine(None).load(str(path), map_location=lambda storage, _: storage)
    assert not canary.exists()
    if save is not as_torchscript:  # the weapon is loaded: DeepSpeed's own engine does run it
        with suppress(RuntimeError):  # of a bare pickle, once it has been read
            torch.load(path, weights_only=False)
        assert canary.exists()
        canary.unlink()


def test_a_global_that_another_library_has_declared_safe_is_still_refused(canary, tmp_path):
    class Declared:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.path.join, ("a", "b")

    torch.save(Declared(), tmp_path / "a.pt")
    torch.serialization.add_safe_globals([os.path.join])
    try:
        with pytest.raises(UnsafePickle, match=r"posixpath\.join"):
            CheckpointEngine(None).load(str(tmp_path / "a.pt"))
    finally:
        torch.serialization.clear_safe_globals()


def test_what_deepspeed_saves_comes_back_as_torch_itself_loads_it(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    flat = torch.arange(24, dtype=torch.float32)
    content = {
        "scaler": LossScaler(4.0), "dynamic": DynamicLossScaler(init_scale=8.0, scale_window=10, min_scale=1, raise_error_at_min_scale=True, delayed_shift=1, consecutive_hysteresis=False, dtype=torch.half),
        "stage": ZeroStageEnum.gradients, "flat": flat, "view": flat[4:16].view(3, 4).t(), "empty": torch.empty(0, 3),
        "bf16": flat.bfloat16(), "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "step": torch.tensor(3.0),
        "groups": [{"betas": (0.9, 0.95), "params": [0, 1]}],
    }  # fmt: skip
    written = CheckpointEngine(None).save(content, str(tmp_path / "a.pt"))
    assert written == digest_file(tmp_path / "a.pt")
    ours, theirs = (
        CheckpointEngine(None).load(str(tmp_path / "a.pt")),
        torch.load(tmp_path / "a.pt", weights_only=False),
    )
    for name in ("flat", "view", "empty", "bf16", "step"):
        assert torch.equal(ours[name], theirs[name]) and ours[name].stride() == theirs[name].stride()
    assert ours["view"].untyped_storage().data_ptr() == ours["flat"].untyped_storage().data_ptr()
    for name in ("size", "dtype", "groups", "stage"):
        assert ours[name] == theirs[name] and (name == "stage" or type(ours[name]) is type(theirs[name]))
    for name in ("scaler", "dynamic"):
        assert type(ours[name]) is type(theirs[name]) and vars(ours[name]) == vars(theirs[name])


def test_a_full_disk_is_an_oserror_and_not_the_end_of_the_process(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "full.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        CheckpointEngine(None).save({"a": torch.zeros(1000)}, str(tmp_path / "full.pt"))


# --- going on from a step's folder --------------------------------------------------------------------------------------


def beside(name: str) -> Callable[[Path, Path, Callable[[object, Path], None]], None]:
    """A file more, of any name."""

    def plant(folder: Path, canary: Path, save: Callable[[object, Path], None]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save({"module": {}, "code": Touch(canary)}, folder / name)

    return plant


def with_weights_of(layout: Path) -> Callable[[Path, Path, Callable[[object, Path], None]], None]:
    """Another layout's files, so that the folder might be taken for it, and the model file evil."""

    def plant(folder: Path, canary: Path, save: Callable[[object, Path], None]) -> None:
        for path in layout.iterdir():
            if not (folder / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        save({"module": {}, "code": Touch(canary)}, folder / MODEL)

    return plant


def by_link(name: str) -> Callable[[Path, Path, Callable[[object, Path], None]], None]:
    def plant(folder: Path, canary: Path, save: Callable[[object, Path], None]) -> None:
        save({"module": {}, "code": Touch(canary)}, canary.with_name("evil.pt"))
        (folder / name).unlink()
        (folder / name).symlink_to(canary.with_name("evil.pt"))

    return plant


def random_by_link(folder: Path, canary: Path, save: Callable[[object, Path], None]) -> None:
    shutil.move(folder / "random", canary.with_name("elsewhere"))
    save(Touch(canary), canary.with_name("elsewhere") / "rank-00000.pt")
    (folder / "random").symlink_to(canary.with_name("elsewhere"))


def with_latest(folder: Path, canary: Path, save: Callable[[object, Path], None]) -> None:
    evil = folder / "evil"
    shutil.copytree(folder, evil)
    save({"module": {}, "code": Touch(canary)}, evil / MODEL)
    (folder / "latest").write_text("evil")


#: What lies in a step's folder beside what the trainer saved there.
FOREIGN = {
    "a Hugging Face model": with_weights_of(HF),
    "nanotron's files": with_weights_of(NANOTRON / "3"),
    "an optimizer file of the old name": beside("zero_pp_rank_0_mp_rank_00optim_states.pt"),
    "a second model file of the rank": beside("mp_rank_0_model_states.pt"),
    "a model file that sorts first": beside("mp_rank_!_model_states.pt"),
    "a third rank": beside(OPTIMIZER.format(2)),
    "the optimizer of bf16": beside("bf16_" + OPTIMIZER.format(0)),
    "ZeRO-3's model file": beside("zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "a pipeline's layer": beside("layer_00-model_00-model_states.pt"),
    "an expert": beside("expp_rank_0_mp_rank_00_optim_states.pt"),
    "a universal parameter": beside("zero/model.norm.weight/fp32.pt"),
    "a universal state": beside("zero/optimizer_state.pt"),
    "a step": beside("step.pt"),
    "an optimizer_state": beside("optimizer_state.pt"),
    "PyTorch's weights": beside("pytorch_model.bin"),
    "a random state of rank 2": beside("random/rank-00002.pt"),
    "a random state of another name": beside("random/rank-0.pt"),
    "offloaded tensors": beside("offloaded_tensors/rank00/a.pt"),
    "a script": beside("zero_to_fp32.py"),
    "a linked model file": by_link(MODEL),
    "a linked state": by_link("trainer.json"),
    "a linked folder": random_by_link,
    "latest": with_latest,
}


@pytest.mark.parametrize("listed", [True, False], ids=["with a manifest", "without"])
@pytest.mark.parametrize("plant", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_with_a_file_that_the_trainer_does_not_save_is_refused(plant, listed, run, tokens, canary):
    folder = step_folder(run, 2)
    if not listed:
        without_manifest(folder)
    before = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    plant(folder, canary, as_zip)
    new = {str(path.relative_to(folder)) for path in folder.rglob("*")} - before
    for resume in ("auto", str(folder)):
        with pytest.raises(MixedCheckpoint) as caught:
            prepare_start(recipe(NANOTRON, tokens, **document(tokens)), run, 2, resume)
        first = str(caught.value).splitlines()[0]
        assert len(first) <= 120 and (not new or any(name.split("/")[0] in first for name in new)), first


@pytest.mark.parametrize("save", FORMS)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER.format(0), OPTIMIZER.format(1), random_file(0), random_file(1)])
def test_a_file_that_was_replaced_is_refused_though_the_manifest_agrees(name, save, run, tokens, canary):
    folder = step_folder(run, 2)
    content = load_torch_archive(folder / name) if name.startswith("random") else {"module": {}, "global_steps": 2}
    save({**content, "code": Touch(canary)}, folder / name)
    rewritten(folder)
    with pytest.raises(BadCheckpoint, match=re.escape(Path(name).name)):
        find_origin(recipe(NANOTRON, tokens, **document(tokens)), run, "auto")


@pytest.mark.parametrize("text", ["../evil", "/tmp", ".", "step-2/../../evil", "evil", "step-2\n../evil", "\xff\x00"])
def test_latest_names_a_step_of_the_run_and_nothing_else(text, run, tokens, canary):
    evil = Path(shutil.copytree(step_folder(run, 2), run / "evil"))
    as_zip({"module": {}, "code": Touch(canary)}, evil / MODEL)
    shutil.copytree(evil, run / "checkpoints" / "evil")
    (run / "checkpoints" / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises((CorruptFile, MissingFile), match="latest"):
        prepare_start(recipe(NANOTRON, tokens, **document(tokens)), run, 2, "auto")


@pytest.mark.parametrize("ranks", [2, 1], ids=["as it was saved", "converted"])
def test_a_run_that_is_told_to_go_on_from_code_ends_with_3_on_all_its_ranks(ranks, run, tokens, canary):
    folder = step_folder(run, 2)
    as_zip({"optimizer_state_dict": {}, "code": Touch(canary)}, folder / OPTIMIZER.format(1))
    rewritten(folder)
    ended = work(document(tokens, schedule={"train_steps": 3}), run, ranks, resume=str(folder))
    assert ended.code == 3 and "Nothing was executed" in ended.message and OPTIMIZER.format(1) in ended.message


def test_a_pattern_in_the_runs_path_leads_to_no_other_folder(trained, tokens, tmp_path):
    """DeepSpeed takes the path of a model file for a pattern, and ``run[1]`` is one for ``run1``."""
    run = Path(shutil.copytree(trained, tmp_path / "run[1]*"))
    other = Path(shutil.copytree(trained, tmp_path / "run1"))
    model = step_folder(other, 2) / MODEL
    content = torch.load(model, weights_only=False)
    torch.save({**content, "module": {name: tensor * 2 for name, tensor in content["module"].items()}}, model)
    succeeded(work(document(tokens, schedule={"train_steps": 3}), run, 2))
    plain = Path(shutil.copytree(trained, tmp_path / "plain"))
    succeeded(work(document(tokens, schedule={"train_steps": 3}), plain, 2))
    assert losses(run) == losses(plain)


def test_a_run_within_a_steps_folder_is_not_taken_for_the_step(trained, run, tokens, canary):
    folder = step_folder(run, 2)
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    as_zip({"module": {}, "code": Touch(canary)}, folder / "checkpoints" / "step-2" / MODEL)
    with pytest.raises(MixedCheckpoint, match="checkpoints in step-2"):
        prepare_start(recipe(NANOTRON, tokens, **document(tokens)), run, 2, str(folder))


#: Whatever reads a file by torch's own means ends the process.
NO_TORCH_LOAD = """
import os, torch
def refused(*given, **more):
    os.write(2, b"torch.load was reached")
    os._exit(99)
torch.load = torch.serialization.load = torch.jit.load = refused
import pickle
pickle.load = refused
from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine
torch_checkpoint_engine.torch.load = refused
"""


@pytest.mark.parametrize(
    ("ranks", "parallelism", "dtype"),
    [
        (2, {"zero_stage": 1}, "float32"), (1, {"zero_stage": 0}, "float32"), (2, {"zero_stage": 0}, "bfloat16"),
        (2, {"zero_stage": 2}, "bfloat16"), (2, {"zero_stage": 3}, "bfloat16"),
    ],
    ids=str,
)  # fmt: skip
def test_no_resume_reaches_torchs_own_unpickler(ranks, parallelism, dtype, run, tokens):
    made = document(tokens, parallelism=parallelism, model={"dtype": dtype}, schedule={"train_steps": 3})
    ended = work(made, run, ranks, before=NO_TORCH_LOAD)  # in most of them converted
    assert ended.code == 0, ended.log
    made["schedule"]["train_steps"] = 4
    ended = work(made, run, ranks, before=NO_TORCH_LOAD)  # from what that saved, as it is
    assert ended.code == 0, ended.log
    assert len(losses(run)) == 4


# --- verify --engine deepspeed ------------------------------------------------------------------------------------------


def engine_reads(folder: Path, config: Path | None = None) -> None:
    options = ReadOptions(config=config)
    checkpoint = read_checkpoint(folder, options)
    rows = choose_rows(vocab_size=256, max_positions=64, tokenizer=None, length=8)
    with engine_logits("deepspeed", checkpoint, folder, options, rows):
        pass


@pytest.mark.parametrize(
    "name",
    ["mp_rank_0_model_states.pt", "mp_rank_!_model_states.pt", "zero_pp_rank_0_mp_rank_00optim_states.pt",
     "zero_pp_rank_1_mp_rank_0_optim_states.pt", "zero_pp_rank_0_mp_rank_0optim_states.pt"],
)  # fmt: skip
@pytest.mark.parametrize("save", FORMS)
def test_the_engine_is_given_no_second_file_of_a_rank(name, save, canary, tmp_path):
    folder = Path(shutil.copytree(ZERO1 / "checkpoint", tmp_path / "checkpoint"))
    tag = folder / (folder / "latest").read_text()
    save({"module": {}, "code": Touch(canary)}, tag / name)
    with pytest.raises(BadCheckpoint) as caught:
        engine_reads(folder, ZERO1 / "config.json")
    assert isinstance(caught.value, (MixedCheckpoint, UnsafePickle, CorruptFile))


@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_model_states.pt", OPTIMIZER.format(1), MODEL])
def test_a_file_of_any_rank_is_looked_into_before_the_engine_starts(name, canary, tmp_path, monkeypatch):
    case = FIXTURES / "deepspeed" / ("zero3-bf16-ws3" if "_1_mp_rank_00_model" in name else "zero1-untied-ws2")
    folder = Path(shutil.copytree(case / "checkpoint", tmp_path / "checkpoint"))
    found = next(folder.rglob(f"*{name.removeprefix('bf16_')}"))
    options = ReadOptions(config=case / "config.json")
    checkpoint = read_checkpoint(folder, options)
    as_zip({"module": {}, "code": Touch(canary)}, found)  # after it was read: a race
    monkeypatch.setattr("smolconv.verification.engines.start._run_all", lambda *_: pytest.fail("a rank was started"))
    rows = choose_rows(vocab_size=256, max_positions=64, tokenizer=None, length=8)
    with pytest.raises(UnsafePickle, match=found.name), engine_logits("deepspeed", checkpoint, folder, options, rows):
        pass


def test_a_universal_folder_is_never_given_to_deepspeed(cli, canary, tmp_path):
    folder = tmp_path / "universal"
    convert(HF, folder, "deepspeed")
    zero = folder / (folder / "latest_universal").read_text() / "zero"
    for place in ("model.norm.weight/step2.pt", "model.norm.weight/other.pt", "other.pt"):
        (zero / place).parent.mkdir(exist_ok=True)
        as_zip(Touch(canary), zero / place)  # what we do not read
    options = ReadOptions()
    checkpoint = read_checkpoint(folder, options)
    as_zip({"optimizer_state": {}, "code": Touch(canary)}, zero / "optimizer_state.pt")  # what DeepSpeed reads first
    rows = choose_rows(vocab_size=256, max_positions=64, tokenizer=None, length=8)
    with engine_logits("deepspeed", checkpoint, folder, options, rows) as logits:
        assert logits.shape == (8, 256)
    done = cli("verify", folder, HF, "--engine", "deepspeed", "--length", "16")
    assert done.code == 3 and "optimizer_state.pt" in done.stderr
