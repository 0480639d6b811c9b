"""Tasks on the run's own checkpoints while it trains: a process beside rank 0, or a job of its own on Slurm.

Both are ``smolconv evaluate``, which leaves its results in ``evaluations/step-N.json``. Training never waits for them
before its end, and nothing that goes wrong with them ends a run. While ``evaluations/step-N.asked`` is there, retention
keeps the checkpoint.
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
#: What a process has to end after SIGTERM.
_GRACE_SECONDS = 5.0
_MOST_SAID = 300
#: A launcher's words for its ranks, and Slurm's for its tasks: none of them is for the evaluation.
_OF_RANKS = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_")
_KEPT = ("SLURM_CONF",)


class Tell(Protocol):
    """How results and failures become events; of a ``Watch``."""

    def tasks(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None: ...

    def event(self, step: int, text: str, *, kind: Any = ..., **more: Any) -> None: ...


class TaskEvaluations:
    """Rank 0's. One process at a time; the steps behind it wait their turn. Jobs wait in Slurm's queue."""

    def __init__(self, recipe: Recipe, run: Path, tell: Tell) -> None:
        assert recipe.evaluation is not None
        self._recipe, self._given, self._run, self._tell = recipe, recipe.evaluation, run, tell
        self._waiting: list[int] = []
        self._jobs: set[int] = set()
        self._process: tuple[int, subprocess.Popen[bytes]] | None = None
        self._looked = 0.0

    def go_on(self, step: int) -> None:
        """Take up what an earlier start has left, up to ``step``: results to tell, and evaluations that are missing."""
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
        """The checkpoint of ``step`` has been published."""
        if self._is_due(step):
            self._ask(step)

    def look(self) -> None:
        """Tell what has come, and start what waits. Called after every step; it waits for nothing."""
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
        """Wait for the processes, unless the run is asked to stop; of jobs only what there is is told."""
        while (self._process is not None or self._waiting) and not stopped():
            time.sleep(0.1)
            self.look()
        self._looked = 0.0
        self.look()
        for step in sorted(self._jobs):
            self._tell.event(step, f"the tasks on step {step} are still Slurm's: {self._results(step)} will hold them")

    def close(self) -> None:
        """End the process that is left. The next start repeats what has no result."""
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
            for kind in ("json", "failed"):  # of a branch that the run has left
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
            if not folder.is_dir():  # after it is kept
                return self._failed(step, f"{folder} has gone: checkpoints.keep was shorter than the wait")
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
        """Tell the results, or the failure, of a step; False where neither is there yet."""
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
        text = f"the tasks on step {step} failed: {why}. Training goes on. To repeat it: {words}"
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
            return self._failed(step, f"sbatch did not take {path}: {str(error)[:_MOST_SAID]}")
        self._jobs.add(step)
        self._tell.event(step, f"the tasks on step {step} are Slurm job {number}")


def evaluate_words(given: Evaluation, run: Path, step: int) -> list[str]:
    """The command that evaluates the checkpoint of ``step``."""
    words = [str(step_folder(run, step)), "--tasks", ",".join(given.tasks), "--device", given.tasks_device]
    if given.include_path is not None:
        words += ["--include-path", os.path.abspath(given.include_path)]
    return module_words(
        "smolconv.commands.main", "evaluate", *words, "--json", "-o", str(evaluation_file(run, step, "json"))
    )


def batch_script(recipe: Recipe, run: Path, step: int) -> str:
    """The job that evaluates one checkpoint, with the account, the walltime and the setup of the run's own."""
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
    """Task -> metric -> value of what ``smolconv evaluate -o`` wrote. Raises ``CorruptFile``."""
    document = read_json(path)
    with corrupt_if_malformed(path):
        tasks = document["checkpoints"][0]["tasks"]
        return {
            str(task): {str(name): float(value) for name, value in metrics.items() if is_number(value)}
            for task, metrics in tasks.items()
        }


def _environment() -> dict[str, str]:
    """Without what makes a library take the process for one of the ranks."""
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
