"""The data stages of ``checkpoint_metadata.json``, for a source that has none or that another run continues from.

nanotron counts its config's stages, finds each by its start step, and asserts in the first training step that the
current one has the config's sequence length. Its sums must hold: samples over the stages, tokens over their folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolconv.checkpoint import TrainingProgress
from smolconv.errors import CorruptFile
from smolconv.layouts.documents import corrupt_if_malformed, is_count

#: Names for a stage without a document, and for the folder of tokens of unknown origin.
IMPORTED = "imported"

Stage = dict[str, Any]


def data_stages(
    progress: TrainingProgress, config: Mapping[str, Any] | None, *, chosen: str | None, warnings: list[str]
) -> tuple[list[Stage], int]:
    """The stages, and the index of the one that the last step belongs to.

    ``config`` is the training config that is written; ``chosen`` is its path if the user gave it: then its
    stages count instead of the source's. Adds missing information to ``warnings``. Raises ``CorruptFile``.
    """
    own = [
        _stage(
            stage.name, stage.start_training_step, stage.sequence_length, stage.consumed_train_samples,
            stage.consumed_tokens_per_dataset_folder,
        )
        for stage in progress.stages
    ]  # fmt: skip
    if own and chosen is None:
        return own, progress.last_stage_index or 0
    where = chosen or "the source's config.yaml"
    folders: list[list[str]] = []
    planned: list[Stage] = []
    length = None
    if config is not None:
        planned, folders, length = _planned(config, where)
    if not own:
        stages = planned or [_stage(IMPORTED, 1, length, 0, None)]
        current = _current(stages, progress.step)
        _share(progress, stages, current, folders, warnings)
        return stages, current
    starts = [stage["start_training_step"] for stage in planned]
    counted = {stage["start_training_step"]: stage for stage in own if stage["consumed_train_samples"]}
    if lost := [start for start in counted if start not in starts]:
        warnings.append(
            f"{where} has no data stage that starts at step {lost[0]}, but the source has one, and nanotron finds "
            "stages by their start: the source's were written. Give the config of the run that continues."
        )
        return own, progress.last_stage_index or 0
    for stage in planned:
        before = counted.get(stage["start_training_step"])
        if before is None:
            continue
        if before["sequence_length"] != stage["sequence_length"]:
            warnings.append(
                f"data stage {stage['name']!r}: {where} has sequences of {stage['sequence_length']} tokens; the source "
                f"consumed {before['consumed_train_samples']} of {before['sequence_length']}."
            )
        for count in ("consumed_train_samples", "consumed_tokens_per_dataset_folder"):
            stage[count] = before[count]
    return planned, _current(planned, progress.step)


def _stage(name: str, start: int, length: int | None, samples: int, folders: Mapping[str, int] | None) -> Stage:
    return {
        "name": name, "start_training_step": start, "consumed_train_samples": samples,
        "sequence_length": 4096 if length is None else length,  # as nanotron reads a missing one
        "consumed_tokens_per_dataset_folder": dict(folders or {}),
    }  # fmt: skip


def _planned(config: Mapping[str, Any], where: str) -> tuple[list[Stage], list[list[str]], int | None]:
    """A training config's stages in nanotron's order, their folders, and its sequence length."""
    with corrupt_if_malformed(where):
        length = (config.get("tokens") or {}).get("sequence_length")
        found = []
        for entry in config.get("data_stages") or []:
            own = entry.get("sequence_length") or length
            start = entry["start_training_step"]
            if not is_count(start) or not is_count(own):
                raise CorruptFile(
                    f"{where}: data stage {entry['name']!r:.60} has start_training_step {start!r:.20} and "
                    f"sequence_length {own!r:.20}; expected whole numbers. Correct them in the file."
                )
            folders = ((entry.get("data") or {}).get("dataset") or {}).get("dataset_folder") or []
            found.append((_stage(str(entry["name"]), start, own, 0, None), _listed(folders)))
        found.sort(key=lambda pair: int(pair[0]["start_training_step"]))
        return [stage for stage, _ in found], [folders for _, folders in found], length if is_count(length) else None


def _listed(folders: Any) -> list[str]:
    return [folders] if isinstance(folders, str) else [str(folder) for folder in folders]


def _current(stages: list[Stage], step: int) -> int:
    return max((i for i, stage in enumerate(stages) if stage["start_training_step"] <= step), default=0)


def _share(
    progress: TrainingProgress, stages: list[Stage], current: int, folders: list[list[str]], warnings: list[str]
) -> None:
    """Divide the source's counts for the whole run among the stages, by their steps."""
    step, samples, tokens = progress.step, progress.consumed_samples, progress.consumed_tokens
    starts = [stage["start_training_step"] for stage in stages[: current + 1]]
    starts[0] = min(starts[0], 1)
    steps = [end - start for start, end in zip(starts, [*starts[1:], step + 1])]
    evenly = step > 0 and samples % step == 0 and (tokens or 0) % step == 0
    if not evenly and current and (samples or tokens):
        warnings.append(
            f"{samples} samples do not divide by {step} steps: all were counted in the stage "
            f"{stages[current]['name']!r}."
        )
    unplaced = 0
    for i, made in enumerate(steps):
        stage = stages[i]
        mine = [count // step * made if evenly else count * (i == current) for count in (samples, tokens or 0)]
        stage["consumed_train_samples"] = mine[0]
        if mine[1]:
            folder = folders[i][0] if folders and len(folders[i]) == 1 else IMPORTED
            stage["consumed_tokens_per_dataset_folder"] = {folder: mine[1]}
            unplaced += mine[1] if folder == IMPORTED else 0
    if samples and tokens is None:
        warnings.append(
            f"the source has consumed {samples} samples, without a record of the tokens and their folders: they "
            "are counted from 0."
        )
    elif unplaced:
        warnings.append(
            f"{unplaced} tokens were consumed from folders that the source does not name: they count as {IMPORTED!r}."
        )
