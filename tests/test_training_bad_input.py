"""What a run is given and cannot use: each ends with its exit code, says what and where and what to do, and leaves
nothing that looks finished. Through the worker process or the command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES, convert, files_below, run_cli
from forked_worker import Ended, work
from training import metrics, recipe_document, token_folder

pytest.importorskip("deepspeed")

SMOLLM3 = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
LLAMA = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
HF = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"
QUICK = {
    "schedule": {"train_steps": 2},
    "parallelism": {"micro_batch_sequences": 1, "global_batch_sequences": 2},
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    """A run of SmolLM3 that has done its two steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ended = work(recipe_document(SMOLLM3, tokens, **QUICK), run)
    assert ended.code == 0, ended.log
    return run


def nothing_looks_finished(run: Path) -> bool:
    saved = list((run / "checkpoints").glob("step-*")) if (run / "checkpoints").exists() else []
    return not saved and not (run / "export").exists() and not ((run / "metrics.jsonl").exists() and metrics(run))


# --- at the start -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """What is wrong with a first start, and what must be said."""

    make: Callable[[Path, dict[str, Any]], object]  #: changes the recipe's document, and may write below a folder
    code: int
    says: tuple[str, ...]  #: what was found, where, and what to do
    ranks: int = 1


def source_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["data"]["stages"][0]["sources"][0]


def empty_folder(folder: Path, document: dict[str, Any]) -> None:
    (folder / "nothing").mkdir()
    source_of(document)["path"] = str(folder / "nothing")


def other_ids(folder: Path, document: dict[str, Any]) -> None:
    source_of(document)["path"] = str(token_folder(folder / "llama3", vocabulary=5000))


def late_id(folder: Path, document: dict[str, Any]) -> None:
    """In a file that is not looked at when the folder is opened: found when the step that reads it is made."""
    made = folder / "late"
    made.mkdir()
    for number in range(17):
        part = token_folder(folder / f"part-{number}", documents=8, lengths=(20, 21))  # 5 windows
        for file in part.iterdir():
            file.rename(made / file.name.replace("00000", f"{number:05d}"))
    ids = np.fromfile(made / "00001_unshuffled.ds", "<u2")
    ids[3] = 300
    ids.tofile(made / "00001_unshuffled.ds")
    source_of(document)["path"] = str(made)
    document["schedule"]["train_steps"] = 5


def renamed_model(folder: Path, document: dict[str, Any], **changes: Any) -> None:
    shutil.copytree(HF, folder / "hf")
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(config | changes))
    document["model"]["source"] = str(folder / "hf")


def without_optimizer(folder: Path, document: dict[str, Any]) -> None:
    convert(SMOLLM3, folder / "plain", "hf", optimizer=False)
    document["model"]["source"] = str(folder / "plain")
    document["start"] = {"optimizer": True}


def truncated(folder: Path, document: dict[str, Any]) -> None:
    shutil.copytree(HF, folder / "hf")
    weights = folder / "hf" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    document["model"]["source"] = str(folder / "hf")


def not_a_number(folder: Path, document: dict[str, Any]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")

    document["model"]["source"] = str(hf_models.edited(HF, folder / "hf", spoil))


def section(name: str, **values: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, document: dict[str, Any]) -> None:
        document[name] = {**document.get(name, {}), **values}

    return change


def without_progress(folder: Path, document: dict[str, Any]) -> None:
    document["model"]["source"] = str(hf_models.saved(hf_models.smollm3(vocab_size=256), folder / "new"))


def with_learning_rate_but_no_progress(folder: Path, document: dict[str, Any]) -> None:
    without_progress(folder, document)
    document.update(start={"learning_rate": True})


def scaled_with_theta(folder: Path, document: dict[str, Any]) -> None:
    model = hf_models.llama(vocab_size=256, **hf_models.rope(10_000.0, hf_models.LLAMA3_SCALING))
    document["model"] |= {"source": str(hf_models.saved(model, folder / "scaled")), "rope_theta": 5e5}


BAD = {
    "an unknown key": Bad(
        section("schedule", warmup_step=3), 2, ("recipe.resolved.yaml", "schedule", "warmup_step")
    ),
    "no such data": Bad(
        lambda folder, document: source_of(document).update(path=str(folder / "nowhere")), 3, ("nowhere",)
    ),
    "an empty data folder": Bad(empty_folder, 3, ("nothing", ".ds")),
    "data of a larger vocabulary": Bad(other_ids, 3, ("llama3", "00000_unshuffled.ds", "256")),
    "data that ends its documents otherwise": Bad(
        section("data", eos_token_id=2), 2, ("data.eos_token_id 2", "Set data.eos_token_id=0")
    ),
    "an EOS outside the vocabulary": Bad(
        section("data", eos_token_id=50_000), 2, ("data.eos_token_id 50000", "256 entries", "tokenizer")
    ),
    "a token beyond the vocabulary late in the data": Bad(late_id, 3, ("late/00001_unshuffled.ds", "300", "256")),
    "data that is too small for a row": Bad(
        lambda folder, document: source_of(document).update(path=str(token_folder(folder / "few", documents=1, lengths=(3, 8)))), 2,
        ("few", "data.sequence_length 32"),
    ),
    "rows longer than the context": Bad(
        section("data", sequence_length=128), 2,
        ("data.sequence_length 128", "64 positions", "set model.max_positions", "model.rope_theta"),
    ),
    "a number of ranks that does not divide": Bad(
        lambda *_: None, 2, ("2 micro-batches of 1", "3 ranks", "2 or 1 ranks"), ranks=3
    ),
    "no such source": Bad(section("model", source="/nowhere/at/all"), 3, ("/nowhere/at/all",)),
    "a truncated source": Bad(truncated, 3, ("model.safetensors",)),
    "a source whose weights are not finite": Bad(
        not_a_number, 6, ("the source model's own loss is nan", "Nothing was trained"), ranks=2
    ),
    "a source of another architecture": Bad(
        lambda folder, document: renamed_model(folder, document, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        3, ("gpt2",),
    ),
    "a source with dropout": Bad(
        lambda folder, document: renamed_model(folder, document, attention_dropout=0.1), 3,
        ("attention_dropout", "0.1"),
    ),
    "an optimizer where there is none": Bad(
        without_optimizer, 2, ("start.optimizer", "no Adam state", "Set start.optimizer: false"), ranks=2
    ),
    "a place in the schedule where there is none": Bad(
        with_learning_rate_but_no_progress,
        2, ("start.learning_rate", "has none", "Set both to false"),
    ),
    "a source that is beyond the schedule": Bad(
        section("start", learning_rate=True), 2, ("has completed 3 steps", "train_steps is 2", "Raise train_steps")
    ),
    "a place in other data": Bad(
        lambda folder, document: (
            document.update(start={"learning_rate": True, "data": True}), document["schedule"].update(train_steps=9)
        ),
        2, ("start.data", "set start.data: false"),
    ),
    "an attention that only GPUs have": Bad(section("model", attention="flash"), 2, ("flash", "GPU", "Set model.attention to auto")),
    "another theta for a scaled rotary embedding": Bad(
        scaled_with_theta, 2, ("model.rope_theta", "llama3", "contradict", "Leave model.rope_theta out")
    ),
    "bfloat16 sums": Bad(
        lambda folder, document: (document["model"].update(dtype="bfloat16"),
                                  document["parallelism"].update(zero_stage=0)),
        2, ("zero_stage 0 with bfloat16", "Choose zero_stage 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_run_that_cannot_start_says_why_and_leaves_nothing(name, tokens, tmp_path):
    bad, run = BAD[name], tmp_path / "run"
    document = json.loads(json.dumps(recipe_document(SMOLLM3, tokens, **QUICK)))
    bad.make(tmp_path, document)
    ended = work(document, run, bad.ranks)
    assert ended.code == bad.code, ended.log
    for words in bad.says:
        assert words in ended.message
    assert "Traceback" not in ended.log
    if name != "a token beyond the vocabulary late in the data":
        assert nothing_looks_finished(run)
    else:  # steps before it were good
        assert len(metrics(run)) == 2 and not list((run / "checkpoints").glob("*"))


def test_missing_deepspeed_is_said_with_what_to_install(tokens, tmp_path):
    """A process of its own, in which deepspeed cannot be found."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe_document(SMOLLM3, tokens, **QUICK)))
    program = "import sys; sys.modules['deepspeed'] = None\nfrom smolconv.continual_pretraining.run.worker import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "deepspeed" in done.stderr and "pip install 'deepspeed" in done.stderr
    failure = json.loads((run / "logs" / "failure-rank-00000.json").read_text())
    assert (failure["exit_code"], failure["error"]) == (5, "NotInstalled")
    assert nothing_looks_finished(run)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_refuses_a_recipe_with_typos_before_it_writes(tokens, tmp_path):
    document = recipe_document(SMOLLM3, tokens, output=str(tmp_path / "run"))
    document["parallelism"]["zero_stag"] = document["parallelism"].pop("zero_stage")
    document["schedule"]["peak_lr"] = "quick"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    before = files_below(tmp_path)
    code, _, stderr = run_cli("continue-train", path)
    assert code == 2
    for words in (f"{path}:", "zero_stag", "peak_lr", "quick"):
        assert words in stderr
    assert files_below(tmp_path) == before


def test_weights_that_do_not_sum_are_normalised_and_it_is_said(tokens, tmp_path):
    other = token_folder(tmp_path / "other", seed=3)
    document = recipe_document(SMOLLM3, [tokens, other], output=str(tmp_path / "run"))
    for source, weight in zip(document["data"]["stages"][0]["sources"], (6, 2)):
        source["weight"] = weight
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    code, _, stderr = run_cli("continue-train", path, "--dry-run")
    assert code == 0 and "sum" in stderr and "0.75" in stderr and "0.25" in stderr
    ended = work(document, tmp_path / "run")
    assert ended.code == 0, ended.log
    assert metrics(tmp_path / "run")[-1]["sources"] == {"tokens": 12 * 32, "other": 4 * 32}


# --- going on ---------------------------------------------------------------------------------------------------------


def going_on(run: Path, trained: Path, tokens: Path, resume: str = "auto", **changes: Any) -> Ended:
    """The run with two more steps, by a changed recipe."""
    shutil.copytree(trained, run)
    document = recipe_document(SMOLLM3, tokens, **QUICK)
    document["schedule"]["train_steps"] = 4
    for name, values in changes.items():
        document[name] = {**document.get(name, {}), **values}
    return work(document, run, resume=resume)


def wider(folder: Path) -> Path:
    return hf_models.saved(hf_models.smollm3(hidden_size=64, num_hidden_layers=8, vocab_size=256), folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallelism": {"micro_batch_sequences": 2}}, ("micro-batches of 1", "loss.normalisation: tokens")),
        ({"parallelism": {"global_batch_sequences": 4}}, ("global batch of 2", "has 4", "start a new run")),
        ({"model": {"source": str(LLAMA)}}, ("another model", "architecture: 'smollm3' in A, 'llama' in B", "--output")),
        ({"data": {"sequence_length": 16}}, ("sequence_length 32", "16", "add a stage")),
    ],
    ids=["micro-batch", "global batch", "another architecture", "sequence length"],
)  # fmt: skip
def test_a_run_does_not_go_on_as_something_else(changes, says, trained, tokens, tmp_path):
    run = tmp_path / "run"
    ended = going_on(run, trained, tokens, **changes)
    assert ended.code == 2, ended.log
    for words in says:
        assert words in ended.message
    assert len(metrics(run)) == 2 and [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-2"]


def test_a_checkpoint_of_other_sizes_is_not_gone_on_from(trained, tokens, tmp_path):
    ended = going_on(tmp_path / "run", trained, tokens, model={"source": str(wider(tmp_path / "wider"))})
    assert ended.code == 2
    assert "intermediate_size: 56 in A, 24 in B" in ended.message and "another model than model.source" in ended.message


def test_a_run_goes_on_when_its_source_is_gone(trained, tokens, tmp_path):
    ended = going_on(tmp_path / "run", trained, tokens, model={"source": "/moved/since"})
    assert ended.code == 0, ended.log
    assert len(metrics(tmp_path / "run")) == 4


def test_a_run_goes_on_from_a_source_in_another_layout_of_the_same_model(trained, tokens, tmp_path):
    """The control: only another model is refused."""
    ended = going_on(tmp_path / "run", trained, tokens, model={"source": str(HF)})
    assert ended.code == 0, ended.log


def test_the_micro_batch_may_change_with_a_mean_over_tokens(trained, tokens, tmp_path):
    by_tokens: dict[str, Any] = {"loss": {"normalisation": "tokens"}, "parallelism": {"micro_batch_sequences": 2}}
    for name, values in by_tokens.items():
        by_tokens[name] = {**recipe_document(SMOLLM3, tokens, **QUICK).get(name, {}), **values}
    ended = going_on(tmp_path / "run", trained, tokens, **by_tokens)
    assert ended.code == 0, ended.log


def test_resume_never_does_not_touch_a_used_folder(trained, tokens, tmp_path):
    run = tmp_path / "run"
    ended = going_on(run, trained, tokens, resume="never")
    assert ended.code == 2
    assert "--resume never" in ended.message and "--output" in ended.message and "--resume auto" in ended.message
    assert files_below(run / "checkpoints") == files_below(trained / "checkpoints") and len(metrics(run)) == 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, ("step-2", "missing", "--resume never")),
        (lambda step: (step / "trainer.json").unlink(), ("trainer.json", "model.source")),
        (lambda step: (step / "trainer.json").write_text('{"schema": 1, "st'), ("trainer.json",)),
        (lambda step: next(step.glob("*optim_states.pt")).unlink(), ("optim_states", "missing")),
        (lambda step: os.truncate(next(step.glob("*model_states.pt")), 1000), ("model_states.pt",)),
    ],
    ids=["gone", "no state", "cut state", "no optimizer", "cut weights"],
)
def test_a_damaged_checkpoint_is_not_gone_on_from(spoil, says, trained, tokens, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run / "checkpoints" / "step-2")
    document = recipe_document(SMOLLM3, tokens, **QUICK)
    document["schedule"]["train_steps"] = 4
    ended = work(document, run)
    assert ended.code == 3, ended.log
    for words in says:
        assert words in ended.message
    assert len(metrics(run)) == 2


def test_a_path_to_resume_from_that_holds_nothing_is_said(trained, tokens, tmp_path):
    ended = going_on(tmp_path / "run", trained, tokens, resume=str(tmp_path / "nowhere"))
    assert ended.code == 3 and "--resume" in ended.message and "step-N" in ended.message


def test_a_source_that_is_resumed_from_is_told_apart_from_a_run(trained, tokens, tmp_path):
    convert(SMOLLM3, tmp_path / "foreign", "deepspeed", zero_stage=1, world_size=1)
    tag = next(path for path in (tmp_path / "foreign").iterdir() if path.is_dir())
    ended = going_on(tmp_path / "run", trained, tokens, resume=str(tag))
    assert ended.code == 3 and "not saved by smolconv continue-train" in ended.message
    assert "model.source" in ended.message
