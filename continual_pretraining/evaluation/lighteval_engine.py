"""Runs lighteval in a child process with the Python of another environment, because it needs xxhash below 4."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.evaluation.tasks import TaskScore, plain_task
from smolconv.errors import CorruptFile, MachineError, NotInstalled, UsageError
from smolconv.parsing import read_json
from smolconv.processes import EMPTY_FOLDER, safe_environment

#: Environment variable with the Python of lighteval's environment.
LIGHTEVAL_PYTHON = "SMOLCONV_LIGHTEVAL_PYTHON"
_CHILD = Path(__file__).absolute().parent / "lighteval_child.py"
_INSTALL = (
    "Create an environment for it:\n"
    "  python3 -m venv lighteval-env\n"
    '  lighteval-env/bin/pip install torch "lighteval==0.13.0" "xxhash<4"\n'
    f"and pass its Python: --engine-python lighteval-env/bin/python, or {LIGHTEVAL_PYTHON}."
)
_MOST_LOG_LINES = 6


class Lighteval:
    """The tasks, to run on one checkpoint after the other.

    A plain multiple-choice task file of lm-eval (its fields name those of a JSONL) is converted to a task of lighteval;
    any other name must be one of lighteval's. Raises ``NotInstalled`` if the Python has no lighteval.
    """

    def __init__(self, names: Sequence[str], include: Path | None, *, python: str | None) -> None:
        self._python = _find_python(python)
        self._plain = {name: _question(name, task) for name in names if (task := plain_task(name, include)) is not None}
        self._names = list(names)

    def score(
        self, model: Path, work: Path, *, limit: int | None, batch_size: int, dtype: str, device: str
    ) -> dict[str, TaskScore]:
        """Run every task on a Hugging Face folder. Raises ``MachineError`` with the end of lighteval's output."""
        for name, task in self._plain.items():
            folder = work / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(task["file"], folder / "test.jsonl")
            task["folder"] = str(folder)
        asked, answer = work / "asked.json", work / "answer.json"
        request = {
            "model": str(Path(model).absolute()), "tasks": self._names, "plain": self._plain, "limit": limit,
            "batch_size": batch_size, "dtype": dtype, "device": device, "work": str(work), "answer": str(answer),
        }  # fmt: skip
        asked.write_text(json.dumps(request), encoding="utf-8")
        environment = safe_environment({**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        environment.pop("PYTHONPATH", None)
        if len(self._plain) == len(self._names):
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        ended = subprocess.run(
            [self._python, str(_CHILD), str(asked)], capture_output=True, text=True, env=environment, check=False,
            cwd=EMPTY_FOLDER,
        )  # fmt: skip
        if ended.returncode or not answer.is_file():
            said = "\n".join((ended.stderr or ended.stdout).strip().splitlines()[-_MOST_LOG_LINES:])
            raise MachineError(
                f"lighteval ended with {ended.returncode} on {', '.join(self._names)}:\n{said}\n"
                "Expected results.\nCheck the names (lighteval tasks list) and its environment (docs/evaluate.md)."
            )
        return _scores(read_json(answer), answer)


def lacking_lighteval(given: str) -> str | None:
    """Why ``given`` is not a Python with lighteval; None if it is one."""
    python = shutil.which(given)
    if python is None:
        return f"{given:.200} is not a program"
    ended = subprocess.run(
        [os.path.abspath(python), "-c", "import importlib.util as u, sys; sys.exit(not u.find_spec('lighteval'))"],
        capture_output=True, env=safe_environment(), check=False, cwd=EMPTY_FOLDER,
    )  # fmt: skip
    return f"{given:.200} has no lighteval" if ended.returncode else None


def _find_python(given: str | None) -> str:
    if given is None and find_spec("lighteval") is not None:
        return sys.executable
    if given is None:
        raise NotInstalled(f"--engine lighteval: lighteval is not in this environment.\n{_INSTALL}")
    if (reason := lacking_lighteval(given)) is not None:
        raise NotInstalled(f"--engine-python: {reason}.\n{_INSTALL}")
    return os.path.abspath(shutil.which(given) or given)


def _question(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """The roles of the JSONL's fields. Raises ``UsageError`` for a task that cannot be converted."""
    fields = [task.get(key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")]
    files = list(task["dataset_kwargs"]["data_files"].values())
    plain = all(isinstance(field, str) and field.isidentifier() for field in fields)
    if task.get("output_type") != "multiple_choice" or not plain or len(files) != 1:
        raise UsageError(
            f"--tasks {name}: this task of lm-eval cannot be converted for lighteval.\n"
            "Expected output_type: multiple_choice, one data file, and names of its fields for doc_to_text, "
            "doc_to_choice and doc_to_target.\nRun it with --engine lm-eval."
        )
    return {"file": files[0], "text": fields[0], "choices": fields[1], "target": fields[2]}


def _scores(answer: Mapping[str, Any], path: Path) -> dict[str, TaskScore]:
    try:
        return {
            name: TaskScore(
                metrics=each["metrics"], stderr=each["stderr"], samples=each["samples"], by_sample=each["by_sample"],
                higher_is_better=each["higher_is_better"],
            )
            for name, each in answer["tasks"].items()
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise CorruptFile(f"{path} is not a result of smolconv's lighteval script.\nRepeat the command.") from None
