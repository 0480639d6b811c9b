"""smolconv continue-train: what it shows, refuses and writes before any rank starts."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES, Finished, files_below, run_cli
from training import recipe_document, token_folder

from smolconv.continual_pretraining.recipe.files import dump_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import RunState
from smolconv.continual_pretraining.run.folder import changes, check_run, write_recipe
from smolconv.errors import MissingFile, OutputLocked, UsageError

SOURCE = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"


def continue_train(*words: object) -> Finished:
    return run_cli("continue-train", *words, before="import smolconv.commands.continue_train")


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    document = recipe_document(SOURCE, token_folder(tmp_path / "tokens"), output=str(tmp_path / "run"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def recipe(**changed: Any) -> Recipe:
    return Recipe.model_validate(recipe_document(Path("source"), Path("tokens"), **changed))


def saved_run(run: Path, given: Recipe) -> Path:
    """A run's folder with a checkpoint, as far as the start looks at it."""
    write_recipe(given, run)
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-2\n")
    return run


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_touches_nothing(tmp_path, recipe_file):
    before = files_below(tmp_path)
    code, stdout, stderr = continue_train(recipe_file, "--dry-run", "--nproc-per-node", 2)
    assert code == 0, stderr
    for part in ("micro_batch_sequences: 1", '"gradient_accumulation_steps": 2', "Memory of a rank", "Checkpoints",
                 "Learning rate", "epoch", "run_module.py smolconv.continual_pretraining.run.worker"):  # fmt: skip
        assert part in stdout
    assert files_below(tmp_path) == before


def test_a_dry_run_as_json_is_one_document(tmp_path, recipe_file):
    code, stdout, stderr = continue_train(
        recipe_file, "--dry-run", "--json", "--launcher", "slurm", "--nnodes", 2, "--nproc-per-node", 2,
        "--set", "schedule.train_steps=7", "--output", tmp_path / "other",
    )  # fmt: skip
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document["schema"] == 1 and document["world_size"] == 4
    assert document["run"] == str(tmp_path / "other")
    assert document["recipe"]["schedule"]["train_steps"] == 7
    assert document["deepspeed"]["gradient_accumulation_steps"] == 1
    assert document["estimate"]["world_size"] == 4
    assert document["launch"]["script"].startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2" in document["launch"]["script"]
    assert document["problems"] == []


def test_a_dry_run_says_which_data_is_not_there_yet(tmp_path, recipe_file):
    override = "data.stages=[{name: a, sources: [{path: /no/tokens}]}]"
    code, stdout, _ = continue_train(recipe_file, "--dry-run", "--json", "--set", override)
    assert code == 0
    assert "/no/tokens" in json.loads(stdout)["problems"][0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc-per-node", "3"], "4 micro-batches"),
        (["--nnodes", "2", "--nproc-per-node", "1"], "launcher cannot start 2 nodes"),
        (["--set", "schedule.train_step=3"], "train_step"),
        (["--json"], "--dry-run"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, recipe_file, words, says):
    code, _, stderr = continue_train(recipe_file, *words)
    assert code == 2 and says in stderr, stderr
    assert not (tmp_path / "run").exists()


# --- a run that goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"model": {"source": "another"}},
        {"model": {"rope_theta": 5e5}},
        {"data": {"mask_documents": False}},
        {"data": {"stages": [{"name": "only", "sources": [{"path": "tokens", "weight": 1}, {"path": "more"}]}]}},
        {"parallelism": {"global_batch_sequences": 8}},
        {"parallelism": {"micro_batch_sequences": 2}},
        {"optimizer": {"betas": [0.9, 0.99]}},
        {"loss": {"normalisation": "tokens"}},
    ],
)
def test_what_decides_the_data_or_the_model_cannot_change_within_a_run(tmp_path, changed):
    run = saved_run(tmp_path / "run", recipe())
    with pytest.raises(UsageError, match="trained by another recipe"):
        check_run(recipe(**changed), run, "auto")


@pytest.mark.parametrize(
    "changed",
    [
        {"schedule": {"train_steps": 400, "decay": "linear", "decay_steps": 10}},
        {"parallelism": {"zero_stage": 3}},
        {"parallelism": {"global_batch_sequences": None, "global_batch_tokens": 4 * 32}},
        {"launch": {"ranks_per_node": 4}},
        {"checkpoints": {"every_steps": 7}},
        {"logging": {"tensorboard": True}},
    ],
)
def test_what_does_not_decide_them_can_change_and_is_said(tmp_path, changed):
    run = saved_run(tmp_path / "run", recipe())
    notes = check_run(recipe(**changed), run, "auto")
    assert notes[0] == f"goes on from {run / 'checkpoints' / 'step-2'}"
    assert len(notes) > 1 or "global_batch_tokens" in str(changed)


def test_the_micro_batch_is_free_when_the_loss_is_a_mean_over_tokens(tmp_path):
    by_tokens = {"loss": {"normalisation": "tokens"}}
    run = saved_run(tmp_path / "run", recipe(**by_tokens))
    assert "micro-batch: 1 sequences -> 2 sequences" in check_run(
        recipe(**by_tokens, parallelism={"micro_batch_sequences": 2}), run, "auto"
    )[1]  # fmt: skip


def test_a_run_without_a_checkpoint_takes_any_recipe(tmp_path):
    write_recipe(recipe(), tmp_path / "run")
    assert check_run(recipe(seed=1), tmp_path / "run", "auto") == []


def test_resume_never_does_not_write_over_checkpoints(tmp_path):
    run = saved_run(tmp_path / "run", recipe())
    with pytest.raises(UsageError, match="--output"):
        check_run(recipe(), run, "never")
    assert check_run(recipe(), tmp_path / "fresh", "never") == []


def test_a_checkpoint_of_another_run_is_compared_with_that_runs_recipe(tmp_path):
    other = saved_run(tmp_path / "other", recipe(seed=1))
    with pytest.raises(UsageError, match="seed: 1 -> 0"):
        check_run(recipe(), tmp_path / "run", str(other / "checkpoints" / "step-2"))
    assert check_run(recipe(seed=1), tmp_path / "run", str(other)) != []
    with pytest.raises(MissingFile):
        check_run(recipe(), tmp_path / "run", str(tmp_path / "nowhere"))


def test_equal_recipes_have_no_changes():
    assert changes(recipe(), recipe(output="elsewhere")) == []


def test_the_resolved_recipe_is_written_as_a_whole(tmp_path):
    write_recipe(recipe(), tmp_path)
    write_recipe(recipe(seed=3), tmp_path)
    assert files_below(tmp_path) == {"recipe.resolved.yaml": dump_recipe(recipe(seed=3)).encode()}


def test_another_recipe_does_not_replace_that_of_a_run_that_trains(tmp_path):
    """Its ranks, and Slurm's next start of it, read the file."""
    write_recipe(recipe(), tmp_path)
    before = (tmp_path / "recipe.resolved.yaml").read_text()
    with open(tmp_path / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputLocked, match=r"run\.lock"):
            write_recipe(recipe(seed=3), tmp_path)
        assert (tmp_path / "recipe.resolved.yaml").read_text() == before
        write_recipe(recipe(), tmp_path)  # the same one: another node of the same start
    write_recipe(recipe(seed=3), tmp_path)
    assert (tmp_path / "recipe.resolved.yaml").read_text() != before


@pytest.mark.parametrize("name", ["run #2", "1e3", "a: b"])
def test_a_runs_folder_may_have_any_name(name, tmp_path, recipe_file):
    done = run_cli("continue-train", recipe_file, "--output", name, "--dry-run", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(tmp_path / name)


def test_a_dry_run_that_goes_on_counts_from_the_sources_step(recipe_file):
    """The oracle has completed 3 steps."""
    goes_on = ("--set", "start.learning_rate=true", "--set", "schedule.train_steps=13")
    document = json.loads(continue_train(recipe_file, "--dry-run", "--json", *goes_on).stdout)
    assert (document["estimate"]["first_step"], document["estimate"]["tokens"]) == (4, 10 * 4 * 32)


def test_stages_that_have_not_begun_may_be_added_and_those_that_have_may_not(tmp_path):
    """WSD: the decay, and its data, are decided on while the run trains."""

    def staged(*stages: tuple[str, int]) -> Recipe:
        made = [{"name": name, "start_step": at, "sources": [{"path": f"tokens/{name}"}]} for name, at in stages]
        return recipe(data={"stages": made}, schedule={"train_steps": 8})

    run = saved_run(tmp_path, staged(("stable", 1), ("later", 7)))
    state = RunState(
        step=4, position={"step": 4, "stages": []}, zero_stage=1, world_size=1, dtype="float32", micro_batch_sequences=1,
        global_batch_sequences=4, spikes={"losses": [], "spikes": []},
    )  # fmt: skip
    state.write(run / "checkpoints" / "step-2")
    notes = check_run(staged(("stable", 1), ("decay", 5)), run, "auto")
    assert any("data.stages.1.start_step: 7 -> 5" in note for note in notes)
    check_run(staged(("stable", 1)), run, "auto")
    for changed in (staged(("stable", 1), ("decay", 4)), staged(("other", 1), ("later", 7))):
        with pytest.raises(UsageError, match=r"data\.stages\."):
            check_run(changed, run, "auto")
