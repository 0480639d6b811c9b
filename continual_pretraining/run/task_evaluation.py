"""Evaluates tasks on a run's checkpoints while it trains: in a child process of rank 0, or in a separate Slurm job.

Both run ``smolconv evaluate``, which writes ``evaluations/step-N.json``. Training waits for them only at its end, and
no failure of theirs ends a run. While ``evaluations/step-N.asked`` exists, retention keeps the checkpoint.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from smolconv.continual_pretraining.recipe.schema import Evaluation, Recipe
from smolconv.continual_pretraining.run.batch import sbatch
from smolconv.continual_pretraining.run.checkpoints import (
    evaluation_file,
    saved_steps,
    step_folder,
    steps_in_evaluation,
)
from smolconv.errors import MachineError, SmolconvError, first_line
from smolconv.layouts.documents import corrupt_if_malformed, is_number
from smolconv.parsing import read_json
from smolconv.processes import module_words, safe_environment

#: How often a run looks for results.
_EVERY_SECONDS = 1.0
#: How long a process may take to end after SIGTERM.
_GRACE_SECONDS = 5.0
_MOST_SAID = 300
#: Variables that launchers set for ranks and Slurm sets for tasks; the evaluation must not see them.
_OF_RANKS = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_")
_KEPT = ("SLURM_CONF",)


class Tell(Protocol):
    """The methods of ``Watch`` that write results and failures as events."""

    def tasks(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None: ...

    def event(self, step: int, text: str, *, kind: Any = ..., **more: Any) -> None: ...


class TaskEvaluations:
    """Exists on rank 0. It runs one process at a time, and further steps wait; jobs wait in Slurm's queue."""

    def __init__(self, recipe: Recipe, run: Path, tell: Tell) -> None:
        assert recipe.evaluation is not None
        self._recipe, self._given, self._run, self._tell = recipe, recipe.evaluation, run, tell
        self._waiting: list[int] = []
        self._jobs: set[int] = set()
        self._process: tuple[int, subprocess.Popen[bytes]] | None = None
        self._looked = 0.0

    def go_on(self, step: int) -> None:
        """Continue what an earlier start left, up to ``step``: results to report and missing evaluations."""
        for each in sorted(steps_in_evaluation(self._run) | set(saved_steps(self._run))):
            if each > step:
                continue
            asked = evaluation_file(self._run, each, "asked").is_file()
            if asked and self._collect(each):
                continue
            if asked and self._given.tasks_as == "slurm":
                self._jobs.add(each)
            elif asked or (self._is_due(each) and not self._results(each).is_file()):
                self._ask(each)

    def saved(self, step: int) -> None:
        """Called when the checkpoint of ``step`` is published."""
        if self._is_due(step):
            self._ask(step)

    def look(self) -> None:
        """Report new results and start the next evaluation. Called after every step; never waits."""
        if time.monotonic() - self._looked < _EVERY_SECONDS:
            return
        self._looked = time.monotonic()
        for step in sorted(self._jobs):
            if self._collect(step):
                self._jobs.discard(step)
        if self._process is not None and self._process[1].poll() is not None:
            self._ended(*self._process)
        if self._process is None and self._waiting:
            self._start(self._waiting.pop(0))

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Wait for processes, unless the run is asked to stop. Of jobs, report only the available results."""
        while (self._process is not None or self._waiting) and not stopped():
            time.sleep(0.1)
            self.look()
        self._looked = 0.0
        self.look()
        for step in sorted(self._jobs):
            self._tell.event(step, f"the tasks on step {step} are still in Slurm's queue: {self._results(step)}")

    def close(self) -> None:
        """End the remaining process. The next start repeats evaluations without results."""
        if self._process is None:
            return
        step, process = self._process
        self._process = None
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if not self._collect(step):
            self._tell.event(step, f"the tasks on step {step} were stopped with the run; the next start repeats them")

    # --- one checkpoint ---

    def _is_due(self, step: int) -> bool:
        every = self._given.tasks_every_steps
        return every is None or step % every == 0 or step == self._recipe.schedule.train_steps

    def _results(self, step: int) -> Path:
        return evaluation_file(self._run, step, "json")

    def _ask(self, step: int) -> None:
        try:
            for kind in ("json", "failed"):  # from a branch that the run has abandoned
                evaluation_file(self._run, step, kind).unlink(missing_ok=True)
            if self._given.tasks_as == "slurm":
                self._keep(step)
                self._submit(step)
            else:
                self._waiting.append(step)
                self._looked = 0.0
                self.look()
        except OSError as error:
            self._failed(step, first_line(error))

    def _keep(self, step: int) -> None:
        path = evaluation_file(self._run, step, "asked")
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def _start(self, step: int) -> None:
        folder = step_folder(self._run, step)
        try:
            self._keep(step)
            if not folder.is_dir():  # checked after the .asked file exists, from which on it is kept
                return self._failed(step, f"{folder} no longer exists: checkpoints.keep deleted it before its turn")
            with self._log(step).open("wb") as log:
                process = subprocess.Popen(
                    evaluate_words(self._given, self._run, step), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=_environment(), start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            return self._failed(step, first_line(error))
        self._process = step, process

    def _log(self, step: int) -> Path:
        path = self._run / "logs" / f"evaluate-step-{step}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    def _ended(self, step: int, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        if process.returncode or not self._collect(step):
            self._failed(step, f"exit code {process.returncode}{_last_said(self._log(step))}")

    def _collect(self, step: int) -> bool:
        """Report a step's results or failure; False if there is neither yet."""
        failed = evaluation_file(self._run, step, "failed")
        if self._results(step).is_file():
            try:
                found = read_results(self._results(step))
            except SmolconvError as error:
                self._failed(step, first_line(error))
            else:
                self._tell.tasks(step, found)
                self._forget(step)
        elif failed.is_file():
            self._failed(step, "its job failed")
        else:
            return False
        return True

    def _failed(self, step: int, why: str) -> None:
        words = shlex.join(["smolconv", *evaluate_words(self._given, self._run, step)[3:]])
        text = f"the tasks on step {step} failed: {why}. Training continues. To repeat them: {words}"
        self._tell.event(step, text, kind="evaluation_failed")
        self._forget(step)

    def _forget(self, step: int) -> None:
        for kind in ("asked", "failed"):
            with suppress(OSError):
                evaluation_file(self._run, step, kind).unlink(missing_ok=True)

    # --- Slurm ---

    def _submit(self, step: int) -> None:
        path = self._run / "slurm" / f"evaluate-step-{step}.sh"
        path.parent.mkdir(exist_ok=True)
        path.write_text(batch_script(self._recipe, self._run, step), encoding="utf-8")
        if shutil.which("sbatch") is None:
            return self._failed(step, "sbatch is not on this node")
        try:
            number = sbatch(path, environment=_environment(), seconds=60)
        except MachineError as error:
            return self._failed(step, f"sbatch rejected {path}: {str(error)[:_MOST_SAID]}")
        self._jobs.add(step)
        self._tell.event(step, f"the tasks on step {step} run as Slurm job {number}")


def evaluate_words(given: Evaluation, run: Path, step: int) -> list[str]:
    """The command that evaluates the checkpoint of ``step``."""
    words = [str(step_folder(run, step)), "--tasks", ",".join(given.tasks), "--device", given.tasks_device]
    if given.include_path is not None:
        words += ["--include-path", os.path.abspath(given.include_path)]
    return module_words(
        "smolconv.commands.main", "evaluate", *words, "--json", "-o", str(evaluation_file(run, step, "json"))
    )


def batch_script(recipe: Recipe, run: Path, step: int) -> str:
    """The job script that evaluates one checkpoint, with the run's account, walltime and setup."""
    given, evaluation = recipe.launch.slurm, recipe.evaluation
    assert evaluation is not None
    options = [f"--job-name=evaluate-step-{step}", "--nodes=1", "--ntasks=1", f"--time={given.time}"]
    chosen = {"partition": given.partition, "account": given.account, "qos": given.qos}
    options += [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    options += [f"--cpus-per-task={given.cpus_per_task}"] if given.cpus_per_task else []
    options += ["--gpus-per-node=1"] if evaluation.tasks_device == "cuda" else []
    options.append(f'--output="{run / "logs" / f"evaluate-step-{step}.log"}"')
    failed = shlex.quote(str(evaluation_file(run, step, "failed")))
    lines = [
        "#!/bin/bash",
        f"# {recipe.name}: tasks on step {step}.".replace("\n", " "),
        *(f"#SBATCH {option}" for option in options),
        "",
        *given.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in recipe.launch.environment.items()),
        "export PYTHONSAFEPATH=1",
        shlex.join(evaluate_words(evaluation, run, step)),
        "status=$?",
        f'[ "$status" -eq 0 ] || echo "$status" > {failed}',
        'exit "$status"',
        "",
    ]
    return "\n".join(lines)


def read_results(path: Path) -> dict[str, dict[str, float]]:
    """Task -> metric -> value from the file of ``smolconv evaluate -o``. Raises ``CorruptFile``."""
    document = read_json(path)
    with corrupt_if_malformed(path):
        tasks = document["checkpoints"][0]["tasks"]
        return {
            str(task): {str(name): float(value) for name, value in metrics.items() if is_number(value)}
            for task, metrics in tasks.items()
        }


def _environment() -> dict[str, str]:
    """The environment without variables that make a library take the process for a rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name in ("RANK", "WORLD_SIZE") or name.startswith(_OF_RANKS))
    }
    return safe_environment(kept)


def _last_said(log: Path) -> str:
    """The end of a log, in one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f", {' '.join(lines[-3:])[-_MOST_SAID:]} ({log})" if lines else ""
