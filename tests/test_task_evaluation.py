"""Tasks beside a run: what is evaluated, what retention keeps meanwhile, and that no failure of theirs ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from forked_worker import work
from hf_models import llama, saved
from test_evaluate import byte_level_tokenizer
from training import recipe, recipe_document, token_folder

from smolconv.continual_pretraining.launchers.preflight import preflight
from smolconv.continual_pretraining.run import task_evaluation
from smolconv.continual_pretraining.run.checkpoints import prune, saved_steps
from smolconv.continual_pretraining.run.task_evaluation import TaskEvaluations, batch_script

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("forked worker")

SOURCE = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
#: ``evaluate RUN STEP``: step 2 takes until retention has deleted step 4; a rank's variables must not reach it.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
run, step = Path(sys.argv[1]), int(sys.argv[2])
assert "RANK" not in os.environ and "MASTER_ADDR" not in os.environ
seen_four, deadline = False, time.monotonic() + 100
while step == 2:
    there = (run / "checkpoints" / "step-4").is_dir()
    if (seen_four and not there) or time.monotonic() > deadline:
        break
    seen_four |= there
    time.sleep(0.002)
assert (run / "checkpoints" / f"step-{step}" / "trainer.json").is_file()
tasks = {"mine": {"acc": step / 10, "stderr": {"acc": 0.1}, "samples": 4}}
(run / "evaluations" / f"step-{step}.json").write_text(json.dumps({"checkpoints": [{"tasks": tasks}]}))
"""


class Told:
    """Takes the place of a ``Watch``."""

    def __init__(self) -> None:
        self.results: list[tuple[int, Mapping[str, Mapping[str, float]]]] = []
        self.events: list[tuple[str, str]] = []

    def tasks(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        self.results.append((step, found))

    def event(self, step: int, text: str, *, kind: str = "note", **more: Any) -> None:
        self.events.append((kind, text))


def asked(run: Path, *steps: int, **evaluation: Any) -> tuple[TaskEvaluations, Told]:
    """Of a run that has saved these steps."""
    for step in steps:
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    given = recipe(
        SOURCE, run / "tokens", schedule={"train_steps": 9}, checkpoints={"every_steps": 1, "keep": 1},
        evaluation={"tasks": ["mine"], **evaluation},
    )  # fmt: skip
    told = Told()
    return TaskEvaluations(given, run, told), told


def standing_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def words(given: object, run: Path, step: int) -> list[str]:
        return [sys.executable, "-c", f"import json, sys, time\nstep, out = {step}, {str(run)!r}\n{code}"]

    monkeypatch.setattr(task_evaluation, "evaluate_words", words)


_WRITE = """
with open(f"{out}/evaluations/step-{step}.json", "w") as file:
    json.dump({"checkpoints": [{"tasks": {"mine": {"acc": step / 10}}}]}, file)
"""


def test_a_run_evaluates_its_checkpoints_beside_the_training_and_keeps_the_one_that_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    document = recipe_document(
        SOURCE, token_folder(tmp_path / "tokens"), schedule={"train_steps": 6},
        checkpoints={"every_steps": 2, "keep": 1}, evaluation={"tasks": ["mine"]},
    )  # fmt: skip
    before = (
        "from smolconv.continual_pretraining.run import task_evaluation\n"
        f"task_evaluation.evaluate_words = lambda given, run, step: [{sys.executable!r}, '-c', {STAND_IN!r}, "
        "str(run), str(step)]\n"
    )
    ended = work(document, run, 1, before=before)
    assert ended.code == 0, ended.log[-4000:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = {each["step"]: each["tasks"] for each in events if each["kind"] == "evaluation"}
    assert found == {2: {"mine": {"acc": 0.2, "samples": 4.0}}, 6: {"mine": {"acc": 0.6, "samples": 4.0}}}
    failed = [each for each in events if each["kind"] == "evaluation_failed"]
    assert [each["step"] for each in failed] == [4] and "no longer exists" in failed[0]["text"]
    assert not list((run / "evaluations").glob("*.asked"))


def test_a_failure_is_an_event_with_what_was_said_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, told = asked(tmp_path, 1, 2, 3)
    standing_in(monkeypatch, f"if step == 1: sys.exit('no such task')\n{_WRITE}\nif step == 3: open(file.name, 'w')")
    for step in (1, 2, 3):
        tasks.saved(step)
    tasks.finish(lambda: False)
    assert told.results == [(2, {"mine": {"acc": 0.2}})]
    assert [kind for kind, _ in told.events] == ["evaluation_failed"] * 2
    assert "exit code 1, no such task" in told.events[0][1]
    assert not list((tmp_path / "evaluations").glob("*.asked"))


def test_only_the_steps_that_are_due_are_evaluated_and_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, told = asked(tmp_path, 1, 2, 3, 9, tasks_every_steps=2)
    standing_in(monkeypatch, _WRITE)
    for step in (1, 2, 3, 9):
        tasks.saved(step)
    tasks.finish(lambda: False)
    assert [step for step, _ in told.results] == [2, 9]


def test_a_run_that_stops_ends_the_process_and_the_next_start_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, told = asked(tmp_path, 1, 2)
    standing_in(monkeypatch, "time.sleep(600)")
    tasks.saved(1)
    tasks.saved(2)
    tasks.finish(lambda: True)
    tasks.close()
    assert told.results == [] and "were stopped with the run" in told.events[0][1]
    assert (tmp_path / "evaluations" / "step-1.asked").is_file()
    (tmp_path / "checkpoints" / "step-4").mkdir()  # of a branch that the next start leaves

    standing_in(monkeypatch, _WRITE)
    again, told = asked(tmp_path)
    again.go_on(3)
    again.finish(lambda: False)
    assert [step for step, _ in told.results] == [1, 2]
    once_more, told = asked(tmp_path)
    once_more.go_on(3)
    once_more.finish(lambda: False)
    assert told.results == []


def test_retention_keeps_what_is_read(tmp_path: Path) -> None:
    tasks, _ = asked(tmp_path, 1, 2, 3)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "step-1.asked").touch()
    prune(tmp_path, tasks._recipe.checkpoints)
    assert saved_steps(tmp_path) == [1, 3]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that runs nothing and gives the number 77; what it was given lies in the file."""
    program, given = tmp_path / "bin" / "sbatch", tmp_path / "given"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@ ${{SLURM_JOB_ID-none}}" >> {given}\necho 77\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    return given


def test_on_slurm_it_is_a_job_of_its_own_whose_result_is_told_when_it_is_there(
    tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_in(monkeypatch, f"if step == 2: sys.exit(3)\n{_WRITE}")
    run = tmp_path / "run"
    tasks, told = asked(run, 1, 2, 3, tasks_as="slurm")
    for step in (1, 2, 3):
        tasks.saved(step)
    scripts = [run / "slurm" / f"evaluate-step-{step}.sh" for step in (1, 2, 3)]
    assert sbatch.read_text().splitlines() == [f"--parsable {path} none" for path in scripts]
    codes = [subprocess.run(["bash", str(path)], check=False).returncode for path in scripts[:2]]
    assert codes == [0, 3]
    tasks.finish(lambda: False)
    assert told.results == [(1, {"mine": {"acc": 0.1}})]
    kinds = [kind for kind, _ in told.events]
    assert kinds == ["note", "note", "note", "evaluation_failed", "note"], told.events
    assert "are still in Slurm's queue" in told.events[-1][1]
    assert sorted(path.name for path in (run / "evaluations").glob("*.asked")) == ["step-3.asked"]
    subprocess.run(["bash", str(scripts[2])], check=True)
    later, told = asked(run, tasks_as="slurm")
    later.go_on(3)
    assert [step for step, _ in told.results] == [3]


def test_the_jobs_script_has_the_runs_account_and_one_gpu(tmp_path: Path) -> None:
    given = recipe(
        SOURCE, tmp_path / "tokens", evaluation={"tasks": ["a", "b"], "tasks_as": "slurm", "tasks_device": "cuda"},
        launch={"slurm": {"account": "me", "setup": ["module load x"], "time": "01:00:00"}},
    )  # fmt: skip
    script = batch_script(given, tmp_path / "a run", 4)
    for line in ("#SBATCH --account=me", "#SBATCH --gpus-per-node=1", "#SBATCH --time=01:00:00", "module load x"):
        assert line in script.splitlines()
    assert "--tasks a,b --device cuda" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"every_steps": 2}}, "give sources with every_steps, or tasks"),
        ({"evaluation": {"tasks": ["a"], "every_steps": 2}}, "sources and every_steps need each other"),
        ({"evaluation": {"tasks": ["a,b"]}}, "evaluation.tasks.0"),
        ({"evaluation": {"tasks": ["a"], "tasks_every_steps": 3}, "checkpoints": {"every_steps": 2}}, "not a multiple"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(SOURCE, tmp_path, **changes)


def test_a_dry_run_refuses_what_the_tasks_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setenv("PATH", "")
    given = recipe(
        SOURCE, token_folder(tmp_path / "tokens"),
        evaluation={"tasks": ["a"], "tasks_as": "slurm", "include_path": str(tmp_path / "no")},
    )  # fmt: skip
    said = "\n".join(map(str, preflight(given, tmp_path / "run", "auto").problems))
    assert "lm-eval, which is not installed" in said
    assert "sbatch is not on this machine" in said
    assert f"evaluation.include_path {tmp_path / 'no'}: no such folder" in said


@pytest.mark.evaluate
def test_a_real_run_evaluates_the_shipped_task(tmp_path: Path) -> None:
    folder, run = saved(llama(), tmp_path / "model"), tmp_path / "run"
    byte_level_tokenizer(folder)
    document = recipe_document(
        folder, token_folder(tmp_path / "tokens", vocabulary=64), schedule={"train_steps": 2},
        checkpoints={"every_steps": 1}, evaluation={"tasks": ["smolconv_cloze"], "tasks_every_steps": 2},
    )  # fmt: skip
    ended = work(document, run, 2)
    assert ended.code == 0, ended.log[-4000:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = [each for each in events if each["kind"] == "evaluation"]
    assert [each["step"] for each in found] == [2], events
    assert found[0]["tasks"]["smolconv_cloze"]["samples"] == 32
    document = json.loads((run / "evaluations" / "step-2.json").read_text())
    assert found[0]["tasks"]["smolconv_cloze"]["acc"] == document["checkpoints"][0]["tasks"]["smolconv_cloze"]["acc"]
