"""The position in the data, and its derivation for a run that nanotron trained.

A position is plain JSON: ``{"step", "stages": [{"name", "start_step", "sequence_length", "sources": [{"path", "name",
"weight", "samples"}]}]}``, with every stage that has begun and the samples it actually read from each source. The
weight is null if it comes from another program's record, which has no weights. A source that restarted from its first
sample is also in ``"restarted"``: by path, the input tokens read from it before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smolconv.checkpoint import DataStage
from smolconv.continual_pretraining.data.blending import Blend
from smolconv.continual_pretraining.data.folders import check_sources, plain_path, recorded_as
from smolconv.errors import UsageError
from smolconv.layouts.documents import is_count, is_number

if TYPE_CHECKING:
    from smolconv.continual_pretraining.recipe.schema import Data, Stage

Position = Mapping[str, Any]
#: Nothing was read: the data begins at the first step requested, whatever its number.
BEGINNING: Position = {"step": 0, "stages": []}


#: Products of two such numbers still fit 64 bits.
_MOST = 1 << 40


def is_number_of(value: Any) -> bool:
    """Whether it is a valid count of steps, samples or tokens."""
    return is_count(value) and value <= _MOST


_LIST = ("a list", lambda value: isinstance(value, list))
_TEXT = ("text", lambda value: isinstance(value, str))
_COUNT = ("a count", is_number_of)
_Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]
_POSITION: _Fields = {"step": _COUNT, "stages": _LIST}
_STAGE: _Fields = {
    "name": _TEXT, "start_step": _COUNT, "sources": _LIST,
    "sequence_length": ("a positive count", lambda value: is_number_of(value) and value > 0),
}  # fmt: skip
_SOURCE: _Fields = {
    "path": _TEXT, "name": _TEXT, "samples": _COUNT,
    "weight": ("a positive number or null", lambda value: value is None or (is_number(value) and value > 0)),
}  # fmt: skip


def check_position(found: object) -> None:
    """Raise ``ValueError`` with the field, the value found and what was expected, if it is not a position."""
    _check(found, _POSITION, "position")
    assert isinstance(found, dict)
    for i, stage in enumerate(found["stages"]):
        _check(stage, _STAGE, f"position.stages[{i}]")
        for k, source in enumerate(stage["sources"]):
            _check(source, _SOURCE, f"position.stages[{i}].sources[{k}]")
    restarted = found.get("restarted", {})
    if not isinstance(restarted, dict) or not all(is_number_of(tokens) for tokens in restarted.values()):
        raise ValueError(f"position.restarted is {restarted!r:.60}, expected tokens by path")


def _check(found: object, fields: _Fields, where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {found!r:.60}, expected an object")
    for name, (expected, holds) in fields.items():
        if name not in found:
            raise ValueError(f"{where} has no {name}, expected {expected}")
        if not holds(found[name]):
            raise ValueError(f"{where}.{name} is {found[name]!r:.60}, expected {expected}")


def samples_of(stages: Iterable[Mapping[str, Any]], path: str, sequence_length: int) -> int:
    """Samples that these stages have read from a folder, in windows of ``sequence_length``."""
    total = 0
    for stage in stages:
        samples = sum(source["samples"] for source in stage["sources"] if plain_path(source["path"]) == path)
        # Another length has other windows. Like nanotron, continue after the same number of tokens.
        total += samples * stage["sequence_length"] // sequence_length
    return total


def restarted_at(position: Position, path: str, sequence_length: int) -> int:
    """Samples read from a folder before it restarted from its first; 0 if it never did."""
    return int(position.get("restarted", {}).get(path, 0)) // sequence_length


def tokens_of(position: Position) -> dict[str, int]:
    """Consumed input tokens by source name."""
    tokens: dict[str, int] = {}
    for stage in position["stages"]:
        for source in stage["sources"]:
            tokens[source["name"]] = tokens.get(source["name"], 0) + source["samples"] * stage["sequence_length"]
    return tokens


def stages_of(position: Position) -> tuple[DataStage, ...]:
    """A position in nanotron's form, for exports: consumed input tokens by folder path."""
    return tuple(
        DataStage(
            name=stage["name"],
            start_training_step=stage["start_step"],
            consumed_train_samples=sum(source["samples"] for source in stage["sources"]),
            sequence_length=stage["sequence_length"],
            consumed_tokens_per_dataset_folder={
                source["path"]: source["samples"] * stage["sequence_length"] for source in stage["sources"]
            },
        )
        for stage in position["stages"]
    )


def position_from_stages(stages: Sequence[DataStage], data: Data, step: int) -> dict[str, Any]:
    """The position in the recipe's data of a run that nanotron trained up to ``step``.

    Folders are matched by path. The source's last stage continues if the recipe has a stage with its name; otherwise
    the recipe's stage begins, and its folders continue where the source's stages ended.

    In its later stages nanotron's token counts per folder are off by some samples, although it reads the blend
    correctly. So the counts of the last stage come from replaying the blend (6 to 11 million samples per second), and
    the record must match within one sample per source. Offsets of earlier stages are taken as recorded, because
    nanotron used them.
    Raises ``UsageError`` that names the mismatch.
    """
    check_sources(data)
    if not stages:
        raise UsageError(
            "start.data: the source has no record of its data.\nOnly a nanotron checkpoint, or a conversion of one "
            "with its progress, has it.\nSet start.data: false to begin with the data's first samples."
        )
    names = {
        recorded_as(source): (source.path, name)
        for stage in data.stages
        for source, name in zip(stage.sources, stage.names)
    }
    goes_on = next((stage for stage in data.stages if stage.name == stages[-1].name), None)
    history = [_recorded(stage, names) for stage in (stages[:-1] if goes_on else stages)]
    known = {path for path, _ in names.values()}
    if goes_on:
        history.append(_continued(stages[-1], goes_on, data.sequence_length))
        first = max((stage for stage in data.stages if stage.start_step <= step + 1), key=lambda each: each.start_step)
        if first.start_step < goes_on.start_step:
            raise UsageError(
                f"start.data: the source is in stage {goes_on.name!r}, which the recipe begins at step "
                f"{goes_on.start_step}; training would begin at step {step + 1}, in stage {first.name!r}.\n"
                "Set start.learning_rate: true to continue at the source's step, or start.data: false."
            )
    elif not any(source["path"] in known for stage in history for source in stage["sources"]):
        consumed = sorted({source["path"] for stage in history for source in stage["sources"]})
        raise UsageError(
            f"start.data: the source's last stage is {stages[-1].name!r} and it read {consumed}, but the recipe has "
            f"the stages {[stage.name for stage in data.stages]} and reads {sorted(names)}.\n"
            "To continue, the name of the stage or the path of at least one folder must match.\n"
            "Give the recipe's stage the source's name, give its sources recorded_as, or set start.data: false."
        )
    return {"step": step, "stages": history}


def _recorded(stage: DataStage, names: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    length = stage.sequence_length or 4096  # nanotron's default
    tokens = stage.consumed_tokens_per_dataset_folder or {}
    if stage.consumed_train_samples * length != sum(tokens.values()):
        raise UsageError(
            f"start.data: the source's stage {stage.name!r} consumed {stage.consumed_train_samples} samples of "
            f"{length} tokens, but its folders sum up to {sum(tokens.values())} tokens.\n"
            "The difference would be read twice.\nSet start.data: false to begin with the first samples."
        )
    sources = []
    for recorded, count in tokens.items():
        path, name = names.get(plain_path(recorded), (recorded, recorded))
        sources.append({"path": path, "name": name, "weight": None, "samples": count // length})
    return {
        "name": stage.name, "start_step": stage.start_training_step, "sequence_length": length, "sources": sources,
    }  # fmt: skip


def _continued(stage: DataStage, now: Stage, sequence_length: int) -> dict[str, Any]:
    length = stage.sequence_length or 4096
    if length != sequence_length:
        raise UsageError(
            f"start.data: stage {stage.name!r} was read in sequences of {length}, but data.sequence_length is "
            f"{sequence_length}.\nWindows of different lengths do not match.\n"
            f"Set data.sequence_length={length}, or give the recipe's stage another name."
        )
    consumed = stage.consumed_tokens_per_dataset_folder or {}
    recorded = {plain_path(path): tokens // length for path, tokens in consumed.items()}
    paths = [recorded_as(source) for source in now.sources]
    missing = [path for path in paths if recorded and path not in recorded]
    unknown = [path for path, samples in recorded.items() if samples and path not in paths]
    if missing or unknown:
        raise UsageError(
            f"start.data: the source's stage {stage.name!r} did not read {missing or 'other folders'}"
            f" and read {unknown or 'no others'}.\nA stage must continue with the same folders, by path.\n"
            "Give each source of the recipe the source's name for it (recorded_as), or its stage another name."
        )
    blend = Blend([source.weight for source in now.sources])
    blend.skip(stage.consumed_train_samples)
    for path, read in zip(paths, blend.counts):
        if recorded and abs(recorded[path] - read) > len(paths):
            raise UsageError(
                f"start.data: by the recipe's weights, stage {stage.name!r} read {read} samples of {path}; the source "
                f"recorded {recorded[path]}.\nThe recipe's weights differ from those of the training.\n"
                "Set the source's weights, or give the recipe's stage another name."
            )
    return {
        "name": now.name, "start_step": now.start_step, "sequence_length": length,
        "sources": [
            {"path": source.path, "name": name, "weight": source.weight, "samples": count}
            for source, name, count in zip(now.sources, now.names, blend.counts)
        ],
    }  # fmt: skip
