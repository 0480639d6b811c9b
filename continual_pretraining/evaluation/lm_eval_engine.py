"""Runs lm-eval (EleutherAI's lm-evaluation-harness) in this process, on a loaded model."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.evaluation.bootstrap import RESAMPLES
from smolconv.continual_pretraining.evaluation.tasks import TaskScore, plain_task, unknown_task
from smolconv.errors import MachineError, NotInstalled, SmolconvError, UsageError, first_line

_MISSING = (
    "evaluating tasks needs lm-eval, which is not installed.\n"
    "Expected lm-eval 0.4.9 or later, torch and transformers; --held-out works without it.\n"
    'Install it: pip install "lm-eval>=0.4.9"'
)
#: Names of tasks, groups and tags in a task file.
_NAMES = re.compile(r"^(?:task|group|tag): *[\"']?([\w.:-]+)", re.M)


def require_lm_eval() -> None:
    """Raise ``NotInstalled``."""
    if find_spec("lm_eval") is None:
        raise NotInstalled(_MISSING)


class LmEval:
    """The tasks, to run on one checkpoint after the other. Nothing is downloaded if all tasks are local.

    Raises ``UsageError`` for an unknown task, ``NotInstalled`` without lm-eval.
    """

    def __init__(self, names: Sequence[str], include: Path | None, *, quiet: bool) -> None:
        require_lm_eval()
        local: dict[str, Any] = {name: task for name in names if (task := plain_task(name, include)) is not None}
        if len(local) == len(names):
            # The libraries read this on import: these tasks need no network, and must not wait for one.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        self._quiet = quiet or not sys.stderr.isatty()
        with _foreign_output():
            from lm_eval.tasks import TaskManager

            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            folder = None if include is None else str(include)
            self._manager = TaskManager(include_path=folder, include_defaults=False)
            known = set(self._manager.all_tasks) | set(local)
            if others := [name for name in names if name not in known]:
                _require_mentioned(others, known)
                self._manager = TaskManager(include_path=folder)  # parses all of lm-eval's tasks for a minute
                known |= set(self._manager.all_tasks)
        for name in others:
            if name not in known:
                raise unknown_task(name, {*known, "smolconv_cloze"}, "lm-eval")
        self._tasks = [local.get(name, name) for name in names]

    def score(
        self, model: Any, tokenizer: Any, *, limit: int | None, batch_size: int, device: str
    ) -> dict[str, TaskScore]:
        """Run every task and group. Raises ``MachineError`` for exceptions in a task's code."""
        with _foreign_output():
            from lm_eval import simple_evaluate

            try:
                found = simple_evaluate(
                    self._harness_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device),
                    tasks=list(self._tasks), limit=limit, task_manager=self._manager, bootstrap_iters=RESAMPLES,
                )  # fmt: skip
            except (SmolconvError, MemoryError):
                raise
            except Exception as error:  # a task may run any code
                raise MachineError(
                    f"lm-eval could not evaluate {', '.join(map(_name, self._tasks))} "
                    f"({type(error).__name__}: {first_line(error):.300}).\n"
                    "Expected its data on this machine or on the Hub, and the packages that it names.\n"
                    "Try one task alone with --debug, or lm-eval's own: lm_eval validate --tasks NAME"
                ) from error
        if not found or not found["results"]:
            raise UsageError("lm-eval gave no result: the tasks have no samples. Raise --limit, or choose others.")
        return {
            name: _score(values, found["samples"].get(name, ()), found["higher_is_better"].get(name) or {})
            for name, values in found["results"].items()
        }

    def _harness_model(self, **options: Any) -> Any:
        """lm-eval's model, with progress bars only on a terminal."""
        from lm_eval.models.huggingface import HFLM

        found = HFLM(**options)
        if self._quiet:
            for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(found, method, partial(getattr(found, method), disable_tqdm=True))
        return found


def _require_mentioned(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise ``UsageError`` for a name that is in none of lm-eval's task files, before parsing them for a minute."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.yaml")]
    for name in names:
        if not any(name in text for text in texts):
            own = {found for text in texts for found in _NAMES.findall(text)}
            raise unknown_task(name, {*own, *known, "smolconv_cloze"}, "lm-eval")


def _name(task: Any) -> str:
    return task if isinstance(task, str) else str(task["task"])


def _score(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], higher: Mapping[str, Any]) -> TaskScore:
    """A metric's name without the filter, as in ``acc,none``, if it has only one filter."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        kept = name.removesuffix("_stderr") + ("" if chosen == "none" else f",{chosen}")
        (stderr if name.endswith("_stderr") else metrics)[kept] = float(value)
    by_sample: dict[str, dict[str, float]] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for name in sample["metrics"]:
            value = sample[name]
            if isinstance(value, (bool, int, float)):
                by_sample.setdefault(f"{name}{suffix}", {})[str(sample["doc_id"])] = float(value)
    directions = {name: bool(higher.get(name.partition(",")[0], True)) for name in metrics}
    counts = len({str(sample["doc_id"]) for sample in samples}) or int(values.get("sample_len") or 0)
    return TaskScore(
        metrics=metrics, stderr={name: value for name, value in stderr.items() if math.isfinite(value)},
        samples=counts, by_sample=by_sample, higher_is_better=directions,
    )  # fmt: skip


def _foreign_output() -> contextlib.AbstractContextManager[Any]:
    """Redirect output to stderr: stdout is only for results."""
    return contextlib.redirect_stdout(sys.stderr)
