"""smolconv continue-train: what it shows, refuses and writes before any rank starts."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FIXTURES, Finished, files_below, run_cli
from training import recipe_document, token_folder

from smolconv.continual_pretraining.launchers.preflight import preflight
from smolconv.continual_pretraining.recipe.files import dump_recipe, load_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import RunState
from smolconv.continual_pretraining.run.folder import as_it_began, changes, check_run, write_recipe
from smolconv.conversion import ConvertOptions, plan_conversion, run_conversion
from smolconv.errors import CorruptFile, MissingFile, OutputLocked, SmolconvError, UsageError

SMOLLM3 = FIXTURES / "nanotron" / "smollm3-tiny" / "tp1-pp2-dp1-zero0"
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
    (run / "checkpoints" / "step-2").mkdir(parents=True, exist_ok=True)
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


def test_a_dry_run_shows_its_plan_before_it_says_which_data_is_not_there(tmp_path, recipe_file):
    override = "data.stages=[{name: a, sources: [{path: /no/tokens}]}]"
    code, stdout, stderr = continue_train(recipe_file, "--dry-run", "--json", "--set", override)
    assert code == 3
    assert "/no/tokens" in json.loads(stdout)["problems"][0] and "/no/tokens" in stderr
    assert continue_train(recipe_file, "--dry-run", "--set", override).stdout.count("# ") > 6


def _weights_alone(folder: Path, source: Path, **config: Any) -> Path:
    """The source as Hugging Face has it, without Adam's state, and with other values in its config."""
    run_conversion(plan_conversion(source, folder, ConvertOptions(to="huggingface", optimizer=False, digest="none")))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **config}))
    return folder


def _planted(tmp_path: Path) -> dict[str, tuple[list[str], int, list[str]]]:
    """Mistakes by name: the words that make one, the exit code, and what must be said."""
    empty = tmp_path / "empty"
    empty.mkdir()
    weights = _weights_alone(tmp_path / "weights", SOURCE)
    bare = _weights_alone(tmp_path / "bare", SOURCE)
    (bare / "config.json").unlink()
    irregular = _weights_alone(tmp_path / "irregular", SMOLLM3, no_rope_layers=[1, 0, 0, 1, 1, 1, 1, 1])
    missing = "[{name: a, sources: [{path: no/one}, {path: no/two}]}]"
    return {
        "no source": (["model.source=no/model"], 3, ["no/model is not there", "hf download"]),
        "a source that is none": ([f"model.source={empty}"], 3, [str(empty)]),
        "no such step": (["model.step=77"], 3, ["77", "Choose one with model.step."]),
        "no config": ([f"model.source={bare}"], 3, ["with model.config"]),
        "no data": (
            [f"data.stages={missing}"], 3,
            ["no/one is not there", "no/two is not there", "smolconv tokenize TEXT no/two --tokenizer"],
        ),
        "all at once": (
            ["model.source=no/model", f"data.stages={missing}", "logging.wandb=x"], 5,
            ["4 things", "no/model", "no/one", "no/two", "pip install wandb"],
        ),
        "no held-out data": (
            ["evaluation={every_steps: 2, sources: [{path: no/held-out}]}"], 3, ["no/held-out is not there"],
        ),
        "another EOS": (["data.eos_token_id=7"], 2, ["data.eos_token_id"]),
        "no such token": (["data.eos_token_id=99999"], 2, ["outside the vocabulary"]),
        "a tracker": (["logging.wandb=x"], 5, ["logging.wandb needs wandb"]),
        "kernels without a GPU": (["model.liger=on", "launch.slurm.gpus_per_node=0"], 2, ["model.liger is on"]),
        "no Adam": (["start.optimizer=true", f"model.source={weights}"], 2, ["holds no Adam state"]),
        "too long": (["data.sequence_length=100000", "parallelism.global_batch_sequences=4"], 2, ["max_positions"]),
        "an export": (
            ["export={formats: [nanotron]}", f"model.source={irregular}"], 2, ["nanotron cannot hold"],
        ),
        "a step that cannot be shared": (["parallelism.global_batch_sequences=3", "launch.ranks_per_node=2"], 2, ["ranks"]),
        "no launcher": (["launch.launcher=slurm", "launch.ranks_per_node=1"], 5, ["sbatch, which is not on"]),
    }  # fmt: skip


def test_a_run_and_its_dry_run_refuse_the_same_mistakes_and_write_nothing(tmp_path, recipe_file, monkeypatch):
    """Mistakes of every kind: exit code and words agree, and nothing appears."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no sbatch
    planted = _planted(tmp_path)
    before = files_below(tmp_path)
    for name, (changed, code, said) in planted.items():
        with pytest.raises(SmolconvError) as caught:
            preflight(load_recipe(recipe_file, changed), tmp_path / "run", "auto").refuse()
        error = caught.value
        assert error.exit_code == code, (name, error)
        for text in said:
            assert text in str(error), (name, text, error)
        if name not in ("all at once", "no Adam"):
            continue  # the commands take seconds, and ask the same function
        words = [word for change in changed for word in ("--set", change)]
        dry, started = continue_train(recipe_file, "--dry-run", *words), continue_train(recipe_file, *words)
        assert dry.code == started.code == code, (name, dry.stderr, started.stderr)
        assert str(error) in started.stderr and dry.stderr.endswith(started.stderr), (name, dry.stderr, started.stderr)
    assert files_below(tmp_path) == before
    assert continue_train(recipe_file, "--dry-run").code == 0  # control


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


def test_an_output_that_cannot_be_the_runs_folder_is_refused(tmp_path, recipe_file, monkeypatch):
    (tmp_path / "file").write_text("")
    tokens, given = tmp_path / "tokens", load_recipe(recipe_file)

    def said(run: Path) -> str:
        return "\n".join(map(str, preflight(given, run, "auto").problems))

    assert f"output: {tmp_path / 'file'} is not a folder" in said(tmp_path / "file")
    assert f"output: {tmp_path / 'file'} is not a folder" in said(tmp_path / "file" / "below")
    assert f"output: {tokens} is what the run reads" in said(tokens)
    assert f"output: {SOURCE} is what the run reads" in said(SOURCE)
    assert said(tmp_path / "new") == said(tokens.parent) == ""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root
    assert f"no permission to write in {tmp_path}" in said(tmp_path / "new")


def test_a_regex_that_excludes_nothing_from_decay_is_told(recipe_file):
    # nanotron's name for the embedding, and Hugging Face's habit of naming a part.
    for pattern, idle in ((".*token_embedding.*", True), ("norm", True), (".*norm", False), ("lm_head", False)):
        found = preflight(load_recipe(recipe_file, [f"optimizer.no_decay=['{pattern}']"]), Path("new"), "auto")
        assert [pattern in note and "matches no parameter" in note for note in found.notes] == [True] * idle, pattern
    done = continue_train(recipe_file, "--dry-run", "--set", "optimizer.no_decay=[norm]")
    assert done.code == 0 and "optimizer.no_decay: norm matches no parameter" in done.stderr


def finished(run: Path, given: Path, step: int = 3) -> None:
    """A run's folder in which ``step`` steps are done; its checkpoint is the source, as one rank would have it."""
    options = ConvertOptions(to="deepspeed", zero_stage=1, world_size=1, dtype="float32")
    with_groups = plan_conversion(SOURCE, run.parent / "as-deepspeed", options)
    run_conversion(with_groups)
    tag = run.parent / "as-deepspeed" / (run.parent / "as-deepspeed" / "latest").read_text()
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(tag, run / "checkpoints" / "step-2")
    shutil.copy(run.parent / "as-deepspeed" / "config.json", run / "checkpoints" / "step-2")
    saved_run(run, load_recipe(given))
    state = RunState(
        step=step, position={"step": step, "stages": []}, zero_stage=1, world_size=1, dtype="float32",
        micro_batch_sequences=1, global_batch_sequences=4, spikes={"losses": [], "spikes": []},
    )  # fmt: skip
    state.write(run / "checkpoints" / "step-2")


@pytest.mark.parametrize("export", ["null", "{}"])
def test_a_dry_run_of_a_run_that_is_done_says_so(export, tmp_path, recipe_file):
    """As the run itself, which ends with 0 and says that all steps are done."""
    finished(tmp_path / "run", recipe_file)
    words = (recipe_file, "--dry-run", "--set", "schedule.train_steps=3", "--set", f"export={export}")
    done = continue_train(*words)
    assert done.code == 0, done.stderr
    assert "all 3 steps are done: nothing would be trained" in done.stderr
    assert ("exported again" in done.stderr) == (export == "{}") and "Raise schedule.train_steps" in done.stderr
    for said in ("all 3 are done", "none is left to read", "0 in all, 0.00 MB written"):
        assert said in done.stdout
    document = json.loads(continue_train(*words, "--json").stdout)
    assert (document["estimate"]["tokens"], document["estimate"]["disk"]["saves"]) == (0, 0)
    more = continue_train(*words, "--set", "schedule.train_steps=4")
    assert more.code == 0 and "nothing would be trained" not in more.stderr  # control


def test_a_run_beyond_the_last_step_of_its_recipe_is_refused_and_not_called_done(tmp_path, recipe_file):
    finished(tmp_path / "run", recipe_file, step=10)
    for words in (("--dry-run",), ()):
        done = continue_train(recipe_file, *words, "--set", "schedule.train_steps=6")
        assert done.code == 2 and "are done" not in done.stderr, done.stderr
        assert "step-2 has made 10 steps, but schedule.train_steps is 6." in done.stderr
        assert "no checkpoint until step 6 is left" in done.stderr and not (tmp_path / "run" / "logs").exists()
    exact = continue_train(recipe_file, "--dry-run", "--set", "schedule.train_steps=10")
    assert exact.code == 0 and "all 10 steps are done" in exact.stderr  # control


def test_a_dry_run_refuses_a_source_that_is_beyond_the_schedule(recipe_file):
    """The oracle has completed 3 steps; without --dry-run the ranks refuse it in the same words."""
    for steps, code in ((3, 2), (4, 0)):
        done = continue_train(
            recipe_file, "--dry-run", "--set", "start.learning_rate=true", "--set", f"schedule.train_steps={steps}"
        )
        assert done.code == code, done.stderr
    assert "has completed 3 steps" in continue_train(
        recipe_file, "--dry-run", "--set", "start.learning_rate=true", "--set", "schedule.train_steps=3"
    ).stderr  # fmt: skip


# --- a run that continues -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"source": "another"}},
        {"optimizer": {"no_decay": []}},
        {"data": {"file_seed": 1}},
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
        {"parallelism": {"sequence_ranks": 2}},
        {"parallelism": {"global_batch_sequences": None, "global_batch_tokens": 4 * 32}},
        {"launch": {"ranks_per_node": 4}},
        {"checkpoints": {"every_steps": 7}},
        {"logging": {"tensorboard": True}},
        {"seed": 1},  # nothing draws random numbers
        {"data": {"on_change": "restart-source"}},
        {"data": {"stages": [{"name": "only", "sources": [{"path": "tokens", "recorded_as": "s3://tokens"}]}]}},
    ],
)
def test_what_does_not_decide_them_can_change_and_is_said(tmp_path, changed):
    run = saved_run(tmp_path / "run", recipe())
    notes = check_run(recipe(**changed), run, "auto")
    assert notes[0] == f"continues from {run / 'checkpoints' / 'step-2'}"
    assert len(notes) > 1 or "global_batch_tokens" in str(changed)


def test_the_micro_batch_is_free_when_the_loss_is_a_mean_over_tokens(tmp_path):
    by_tokens = {"loss": {"normalisation": "tokens"}}
    run = saved_run(tmp_path / "run", recipe(**by_tokens))
    assert "micro-batch: 1 sequences -> 2 sequences" in check_run(
        recipe(**by_tokens, parallelism={"micro_batch_sequences": 2}), run, "auto"
    )[1]  # fmt: skip


def test_what_a_recipe_leaves_to_the_family_stays_what_the_run_began_with(tmp_path):
    decay = {"weight_decay": 0.03, "no_decay": [".*norm.*"]}
    run, left_out = saved_run(tmp_path / "run", recipe(optimizer=decay)), {"weight_decay": None, "no_decay": None}
    goes_on = as_it_began(recipe(optimizer=left_out), run, "auto")
    assert (goes_on.optimizer.weight_decay, goes_on.optimizer.no_decay) == (0.03, (".*norm.*",))
    assert check_run(goes_on, run, "auto") == [f"continues from {run / 'checkpoints' / 'step-2'}"]
    given = as_it_began(recipe(optimizer={"weight_decay": 0.2, "no_decay": []}), run, "auto").optimizer
    assert (given.weight_decay, given.no_decay) == (0.2, ())
    fresh = as_it_began(recipe(optimizer=left_out), tmp_path / "another", "auto").optimizer
    assert (fresh.weight_decay, fresh.no_decay) == (None, None)


def test_a_rate_that_overflows_is_null_in_the_json_of_a_dry_run(recipe_file):
    done = continue_train(recipe_file, "--set", "schedule.peak_lr=1e308", "--dry-run", "--json")
    assert done.code == 0, done.stderr
    json.loads(done.stdout, parse_constant=pytest.fail)


WSD = {"train_steps": 10, "warmup_steps": 0, "decay": "linear", "decay_steps": 4}


def decayed_run(run: Path, *steps: int, schedule: dict[str, Any] | None) -> Path:
    """A run by ``WSD``: its decay begins after 6 steps. ``schedule`` is what its checkpoints say."""
    write_recipe(recipe(schedule=WSD), run)
    for step in steps:
        state = RunState(
            step=step, position={"step": step, "stages": []}, zero_stage=1, world_size=1, dtype="float32",
            micro_batch_sequences=1, global_batch_sequences=4, spikes={"losses": [], "spikes": []}, schedule=schedule,
        )  # fmt: skip
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        state.write(run / "checkpoints" / f"step-{step}")
    (run / "checkpoints" / "latest").write_text(f"step-{steps[-1]}\n")
    return run


@pytest.mark.parametrize(
    ("steps", "changed", "said"),
    [
        ((2, 6, 8, 10), {"train_steps": 20}, "linear from step 7 to 10 and is now linear from step 17 to 20"),
        ((2, 6, 8), {"train_steps": 20}, "Step 8 trained at 0.00075; step 9 will at 0.001."),  # within the decay
        ((2, 6, 10), {"train_steps": 20, "decay": "none", "decay_steps": None}, "and is now none"),
        (
            (2, 6, 10),
            {"train_steps": 12, "decay_start_step": 6, "decay_steps": None},
            "is now linear from step 7 to 12",
        ),
        ((2, 6, 10), {"train_steps": 20, "decay": "cosine", "decay_steps": 14}, "cosine from step 7 to 20"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_decay_that_moves_within_the_steps_that_are_made_is_said(recorded, steps, changed, said, tmp_path):
    """By hand: 0.001 falls over steps 7 to 10; step 8 follows one of four completed decay steps, at 3/4."""
    given = recipe(schedule=WSD).schedule.model_dump(mode="json") if recorded else None
    run = decayed_run(tmp_path / "run", *steps, schedule=given)
    notes = " ".join(check_run(recipe(schedule={**WSD, **changed}), run, "auto"))
    assert "the decay has moved within the steps already trained" in notes and said in notes
    assert f"resume from it with --resume {run / 'checkpoints' / 'step-6'}." in notes


@pytest.mark.parametrize(
    ("steps", "changed"),
    [
        ((2, 6, 10), {}),
        ((2, 6), {"train_steps": 20}),  # before the decay
        ((2, 6, 7), {"train_steps": 20}),  # its first step is still at the peak
        ((2, 6, 10), {"train_steps": 20, "decay_start_step": 6}),  # it lies where it was
    ],
)
def test_a_decay_that_no_step_was_made_in_may_move_without_a_word(steps, changed, tmp_path):
    run = decayed_run(tmp_path / "run", *steps, schedule=recipe(schedule=WSD).schedule.model_dump(mode="json"))
    assert not any("decay has moved" in note for note in check_run(recipe(schedule={**WSD, **changed}), run, "auto"))


def test_a_decay_that_would_have_begun_before_steps_without_it_is_said(tmp_path):
    later = {**WSD, "train_steps": 20}
    run = decayed_run(tmp_path / "run", 10, schedule=recipe(schedule=later).schedule.model_dump(mode="json"))
    notes = " ".join(check_run(recipe(schedule={**later, "decay_start_step": 6, "decay_steps": 14}), run, "auto"))
    assert "is now linear from step 7 to 20" in notes
    assert "No checkpoint from before the decay (until step 6) is left." in notes


def test_a_named_checkpoint_in_the_decay_is_told_the_one_before_it(tmp_path):
    """The checkpoint speaks for itself: the recipe of the run is another's since a start that did not save."""
    run = decayed_run(tmp_path / "run", 4, 6, 8, 10, schedule=recipe(schedule=WSD).schedule.model_dump(mode="json"))
    longer = recipe(schedule={**WSD, "train_steps": 20})
    write_recipe(longer, run)
    notes = " ".join(check_run(longer, run, str(run / "checkpoints" / "step-8")))
    assert f"--resume {run / 'checkpoints' / 'step-6'}." in notes
    assert "moved" not in " ".join(check_run(longer, run, str(run / "checkpoints" / "step-6")))


def test_a_run_without_a_checkpoint_takes_any_recipe(tmp_path):
    write_recipe(recipe(), tmp_path / "run")
    assert check_run(recipe(seed=1), tmp_path / "run", "auto") == []


def test_resume_never_does_not_write_over_checkpoints(tmp_path):
    run = saved_run(tmp_path / "run", recipe())
    with pytest.raises(UsageError, match="--output"):
        check_run(recipe(), run, "never")
    assert check_run(recipe(), tmp_path / "fresh", "never") == []


def test_a_checkpoint_of_another_run_is_compared_with_that_runs_recipe(tmp_path):
    other = saved_run(tmp_path / "other", recipe(data={"file_seed": 1}))
    with pytest.raises(UsageError, match=r"data.file_seed: 1 -> None"):
        check_run(recipe(), tmp_path / "run", str(other / "checkpoints" / "step-2"))
    assert check_run(recipe(data={"file_seed": 1}), tmp_path / "run", str(other)) != []
    with pytest.raises(MissingFile):
        check_run(recipe(), tmp_path / "run", str(tmp_path / "nowhere"))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def of_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "error", "said"),
    [
        ("recipe.resolved.yaml", pipe, UsageError, r"recipe\.resolved\.yaml is a named pipe"),
        ("recipe.resolved.yaml", of_bytes(b"name: \xff"), UsageError, "not UTF-8"),
        ("recipe.resolved.yaml", of_bytes(b"a: " + b"[" * 3000), UsageError, "nested more than 64 deep"),
        ("checkpoints/latest", pipe, CorruptFile, "latest is a named pipe"),
        ("checkpoints/latest", of_bytes(b"step-2\0"), CorruptFile, r"latest holds 'step-2\\x00'"),
        ("checkpoints/latest", of_bytes(b"\xff" * 300), CorruptFile, "the name of a folder next to it"),
        ("checkpoints/latest", of_bytes(b"step-" + b"9" * 3000), CorruptFile, "the name of a folder next to it"),
        ("checkpoints/latest", of_bytes(b"x" * 5000), CorruptFile, "has 5000 bytes"),
        ("resume-from", pipe, CorruptFile, "resume-from is a named pipe"),
        ("resume-from", of_bytes(b"a\0b"), MissingFile, "was to resume from"),
        ("resume-from", of_bytes(b"x" * 3000), MissingFile, "was to resume from"),
        ("resume-from", of_bytes(b"x" * 5000), CorruptFile, "has 5000 bytes"),
        ("checkpoints/step-2/trainer.json", pipe, None, ""),  # the ranks refuse it
    ],
)
def test_files_of_a_run_that_are_damaged_or_no_files_are_said(name, make, error, said, tmp_path):
    run = saved_run(tmp_path / "run", recipe())
    check_run(recipe(), run, "auto")  # control
    (run / name).unlink(missing_ok=True)
    make(run / name)
    if error is None:
        check_run(recipe(), run, "auto")
        return
    with pytest.raises(error, match=said) as caught:
        check_run(recipe(), run, "auto")
    assert len(str(caught.value)) < 1500


def test_a_resume_path_that_cannot_be_is_not_there(tmp_path):
    with pytest.raises(MissingFile, match="no checkpoint is there"):
        check_run(recipe(), tmp_path, "/" + "x" * 5000)


def test_a_damaged_recipe_of_a_run_is_written_anew(tmp_path):
    (tmp_path / "recipe.resolved.yaml").write_bytes(b"\xff")
    write_recipe(recipe(), tmp_path)
    assert load_recipe(tmp_path / "recipe.resolved.yaml") == recipe()


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


def test_a_dry_run_says_which_theta_the_source_has_and_refuses_a_lower_one(recipe_file):
    """The oracle's is 10,000, by its config."""
    lowered = (recipe_file, "--dry-run", "--set", "model.rope_theta=5000")
    refused = continue_train(*lowered)
    assert refused.code == 2 and "is 5,000" in refused.stderr and "10,000" in refused.stderr, refused.stderr
    allowed = continue_train(*lowered, "--set", "model.allow_lowering=true")
    assert allowed.code == 0 and "rope_theta 5,000 (the source's: 10,000)" in allowed.stderr


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
