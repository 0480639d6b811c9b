"""Interrupted and resumed = never interrupted: by SIGKILL, by SIGTERM, at another world size, at another ZeRO stage."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from forked_worker import work
from safetensors.torch import load_file
from training import losses, metrics, recipe_document, token_folder, train

from smolconv.continual_pretraining.recipe.schema import Checkpoints
from smolconv.continual_pretraining.run.checkpoints import (
    latest,
    prune,
    publish,
    remove_partial,
    saved_steps,
    step_folder,
)
from smolconv.errors import MissingFile

SOURCE = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
STEPS = 12


def document(tokens: Path, **changes):
    base = {
        "schedule": {"train_steps": STEPS, "decay": "cosine", "decay_steps": 6},
        "checkpoints": {"every_steps": 3},
        "parallelism": {"zero_stage": 2},
    }
    made = recipe_document(SOURCE, tokens, **base)
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def uninterrupted(tokens, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(document(tokens, export={"formats": ["hf"], "verify": True}), run, world_size=2)
    return run


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise TimeoutError(run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "hf" / "model.safetensors")


def test_killed_and_resumed_equals_never_stopped_bit_for_bit(tokens, uninterrupted, tmp_path):
    run, made = tmp_path / "run", document(tokens, export={"formats": ["hf"], "verify": True})
    for step in np.random.default_rng(5).integers(2, STEPS - 1, 2):

        def kill(pids: list[int], step: int = int(step)) -> None:
            wait_for_step(run, step)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        assert work(made, run, 2, meanwhile=kill).code == -signal.SIGKILL
    train(made, run, world_size=2)
    assert losses(run) == losses(uninterrupted)
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    for name, tensor in weights(uninterrupted).items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_a_signal_saves_and_ends_with_75(tokens, uninterrupted, tmp_path):
    run, made = tmp_path / "run", document(tokens, checkpoints={"every_steps": 1000})

    def signal_one(pids: list[int]) -> None:
        wait_for_step(run, 4)
        os.kill(pids[1], signal.SIGUSR1)  # one rank's is enough

    assert work(made, run, 2, meanwhile=signal_one).code == 75
    step = json.loads((latest(run) / "trainer.json").read_text())["step"]
    assert 4 <= step < STEPS
    assert [line["step"] for line in metrics(run)] == list(range(1, step + 1))
    train(made, run, world_size=2)
    assert losses(run) == losses(uninterrupted)


@pytest.mark.parametrize(("ranks", "stage"), [
    (2, 3), *(pytest.param(ranks, stage, marks=pytest.mark.matrix) for ranks, stage in ((4, 1), (1, 2), (1, 0))),
])  # fmt: skip
def test_another_world_size_or_stage_goes_on_with_the_same_losses(ranks, stage, tokens, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for step in (9, 12):
        shutil.rmtree(step_folder(run, step))
    (run / "checkpoints" / "latest").write_text("step-6")
    train(document(tokens, parallelism={"zero_stage": stage}), run, world_size=ranks)
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert losses(run)[:6] == losses(uninterrupted)[:6]
    assert np.abs(np.array(losses(run)) - losses(uninterrupted)).max() < 1e-5
    assert metrics(run)[-1]["sources"] == metrics(uninterrupted)[-1]["sources"]


def test_the_export_is_what_the_engine_held(uninterrupted):
    """``export.verify`` compared them in the run; here the exported folder is a model that transformers loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "export" / "hf")
    assert torch.isfinite(model(torch.arange(1, 30)[None]).logits).all()


def test_a_run_is_trained_by_one_start_at_a_time(tokens, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (run / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = work(document(tokens), run)
        assert ended.code == 4
    assert "another process trains" in ended.message
    assert not (run / "checkpoints").exists()


# --- files -----------------------------------------------------------------------------------------------------------


def folder_of(run: Path, step: int) -> Path:
    partial = run / "checkpoints" / f"step-{step}.partial"
    partial.mkdir(parents=True)
    (partial / "trainer.json").write_text("{}")
    return publish(run, step)


def test_latest_names_only_what_is_whole(tmp_path):
    assert latest(tmp_path) is None
    folder_of(tmp_path, 3)
    partial = tmp_path / "checkpoints" / "step-6.partial"
    partial.mkdir()
    assert latest(tmp_path).name == "step-3"
    assert saved_steps(tmp_path) == [3]
    remove_partial(tmp_path)
    assert not partial.exists()
    shutil.rmtree(tmp_path / "checkpoints" / "step-3")
    with pytest.raises(MissingFile, match="step-3"):
        latest(tmp_path)


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    (folder_of(tmp_path, 3) / "old").touch()
    assert not (folder_of(tmp_path, 3) / "old").exists()


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ({}, [2, 4, 6, 8, 10]),
        ({"keep": 2}, [8, 10]),
        ({"keep": 1}, [10]),
        ({"keep": 1, "keep_every_steps": 4}, [4, 8, 10]),
    ],
)
def test_retention_keeps_what_the_recipe_says(policy, left, tmp_path):
    for step in (2, 4, 6, 8, 10):
        folder_of(tmp_path, step)
    prune(tmp_path, Checkpoints(**policy))
    assert saved_steps(tmp_path) == left


def test_retention_never_takes_what_latest_names(tmp_path):
    for step in (2, 4):
        folder_of(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step-2")
    prune(tmp_path, Checkpoints(keep=1))
    assert saved_steps(tmp_path) == [2, 4]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_during_a_save_loses_nothing(policy, tokens, tmp_path):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = disk / "run"
        made = document(tokens, checkpoints={"every_steps": 3, "on_full_disk": policy})
        ended = work(made, run, 2)
        steps = saved_steps(run)
        assert steps and steps[0] == 3
        assert latest(run).name == f"step-{steps[-1]}"
        assert not list((run / "checkpoints").glob("*.partial"))
        assert ended.code == 4, ended.log  # the last step must be saved, whatever the policy
        assert "untouched" in ended.message
        least = STEPS if policy == "continue" else steps[-1] + 3
        # Training learns of it behind the step, before it would save again.
        assert least <= len(metrics(run)) <= min(STEPS, least + 3)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_another_clipping_holds_from_the_resumed_step_on(tokens, tmp_path):
    """DeepSpeed would load the limit that the checkpoint was saved with."""
    run, changed = tmp_path / "run", tmp_path / "changed"
    made = document(tokens, checkpoints={"every_steps": 2}, schedule={"train_steps": 4, "warmup_steps": 0})
    train(made, run)
    shutil.copytree(run, changed)
    clipped = {**made, "optimizer": {"max_grad_norm": 1e-12}}
    train(clipped, changed, resume=str(changed / "checkpoints/step-2"))
    before, after = losses(run), losses(changed)
    assert after[:3] == before[:3]  # the third step's loss is of the weights before it
    assert after[3] != before[3]


def test_a_start_that_fails_at_its_data_leaves_the_metrics_of_saved_steps(tokens, tmp_path):
    run = tmp_path / "run"
    made = document(tokens, checkpoints={"every_steps": 1}, schedule={"train_steps": 4})
    train(made, run)
    lines = metrics(run)
    missing = {"every_steps": 2, "sources": [{"path": str(tmp_path / "gone")}]}
    ended = work({**made, "evaluation": missing}, run, resume=str(run / "checkpoints/step-2"))
    assert ended.code == 3, ended.log
    assert metrics(run) == lines


def test_an_engine_in_float32_that_takes_the_masters_of_a_bf16_source_begins_with_their_loss(tokens, tmp_path):
    """Its weights are the masters, so the gate must look at these, too."""
    source = FIXTURES / "nanotron" / "smollm3-tiny-bf16" / "tp2-pp1-dp1-zero0"
    made = recipe_document(
        source, tokens, schedule={"train_steps": 1}, start={"optimizer": True}, model={"dtype": "float32"}
    )
    train(made, tmp_path / "run")
    texts = [json.loads(line)["text"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    said = next(text for text in texts if text.startswith("start gate"))
    first, of_source = (float(number) for number in re.findall(r"\d+\.\d+", said))
    assert abs(first - of_source) < 1e-4
