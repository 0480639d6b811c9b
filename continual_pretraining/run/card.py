"""Facts about the training run for a published model's card; names only, never paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.recipe.files import RECIPE, load_recipe
from smolconv.continual_pretraining.recipe.schedules import Schedule, resolved
from smolconv.continual_pretraining.run.checkpoints import evaluation_file
from smolconv.continual_pretraining.watch.history import Curve, read_run
from smolconv.hub.card import CardFacts, TaskResult, Training, card_beside, on_hub
from smolconv.layouts.documents import corrupt_if_malformed, is_count, is_number
from smolconv.parsing import read_json

_EXPORT = "export"
_MOST_ROWS = 10
_NO_METRICS = ("samples", "stderr")  #: beside the metrics of a task


def run_of_export(folder: Path) -> Path | None:
    """The run in whose ``export/`` the folder is; None for any other folder."""
    run = folder.resolve().parent.parent
    return run if folder.resolve().parent.name == _EXPORT and (run / RECIPE).is_file() else None


def training_of(run: Path) -> Training:
    """Facts from the run's recipe, metrics and events. Raises ``CorruptFile`` and ``MissingFile``."""
    recipe, history = load_recipe(run / RECIPE), read_run(run)
    engine, tasks = _tasks(run, history.last.step)
    return Training(
        recipe=recipe.name,
        source=recipe.model.source,
        stages=tuple((stage.name, tuple(zip(stage.names, stage.weights))) for stage in recipe.data.stages),
        steps=history.last.step,
        tokens=history.last.tokens or history.last.step * recipe.tokens_per_step,
        sequence_length=recipe.data.sequence_length,
        schedule=_schedule(recipe.schedule),
        losses=_rows(history.curves["loss"]),
        evaluations=tuple(
            (name, curve.means()[0].value, curve.means()[-1].value) for name, curve in history.evaluations.items()
        ),
        tasks=tasks,
        task_engine=engine,
    )


def _tasks(run: Path, step: int) -> tuple[str, tuple[TaskResult, ...]]:
    """Who ran the tasks on the checkpoint of ``step``, and what came of them; nothing where none were run."""
    path = evaluation_file(run, step, "json")
    if not path.is_file():
        return "", ()
    document = read_json(path)
    with corrupt_if_malformed(path):
        tasks = document["checkpoints"][0]["tasks"]
        found = tuple(
            _result(str(task), str(name), float(value), scores)
            for task, scores in tasks.items()
            for name, value in scores.items()
            if name not in _NO_METRICS and is_number(value)
        )
        return str(document.get("engine") or ""), found


def _result(task: str, metric: str, value: float, scores: Mapping[str, Any]) -> TaskResult:
    stderr: Any = (scores.get("stderr") or {}).get(metric)
    samples: Any = scores.get("samples")
    return TaskResult(
        task=task, metric=metric, value=value, stderr=float(stderr) if is_number(stderr) else None,
        samples=int(samples) if is_count(samples) else None,
    )  # fmt: skip


def _schedule(schedule: Schedule) -> str:
    phases = resolved(schedule)
    parts = [f"{phases.warmup_steps:,} steps of warm-up"] if phases.warmup_steps else []
    parts.append(f"peak {schedule.peak_lr:g}")
    if phases.decay_steps:
        parts.append(
            f"{phases.decay} decay to {schedule.min_lr:g} over {phases.decay_steps:,} steps from step "
            f"{phases.decay_start_step:,}"
        )
    else:
        parts.append("no decay")
    return ", ".join(parts) + "."


def _rows(curve: Curve) -> tuple[tuple[int, float], ...]:
    """At most ten of the curve's means, including the first and the last."""
    means = curve.means()
    last = len(means) - 1
    chosen = range(len(means)) if last < _MOST_ROWS else (round(i * last / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS))
    return tuple((means[i].step, means[i].value) for i in chosen)


def facts_of_run(run: Path, title: str, verified: str, licence: str | None = None) -> CardFacts:
    """The card's facts for a model that the run exported."""
    training = training_of(run)
    return CardFacts(
        title=title, verified=verified, licence=licence, base_model=on_hub(training.source),
        source_card=card_beside(training.source), training=training,
    )  # fmt: skip
