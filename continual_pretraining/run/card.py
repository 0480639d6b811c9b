"""Facts about the training run for a published model's card; names only, never paths."""

from __future__ import annotations

from pathlib import Path

from smolconv.continual_pretraining.recipe.files import RECIPE, load_recipe
from smolconv.continual_pretraining.recipe.schedules import Schedule, resolved
from smolconv.continual_pretraining.watch.history import Curve, read_run
from smolconv.hub.card import CardFacts, Training, card_beside, on_hub

_EXPORT = "export"
_MOST_ROWS = 10


def run_of_export(folder: Path) -> Path | None:
    """The run in whose ``export/`` the folder is; None for any other folder."""
    run = folder.resolve().parent.parent
    return run if folder.resolve().parent.name == _EXPORT and (run / RECIPE).is_file() else None


def training_of(run: Path) -> Training:
    """Facts from the run's recipe, metrics and events. Raises ``CorruptFile`` and ``MissingFile``."""
    recipe, history = load_recipe(run / RECIPE), read_run(run)
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
    )


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
