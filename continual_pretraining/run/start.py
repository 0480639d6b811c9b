"""Where a run begins: the source checkpoint, or a checkpoint of its own, in the form that its ranks load.

One process prepares, on the CPU and streaming, before the engine starts; the others wait for it. DeepSpeed is always
handed a checkpoint of the very stage and world size that it runs with, so its own elastic loading is never needed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, Slot, TrainingProgress, for_another_engine
from smolconv.continual_pretraining.engine.optimizer import Group, group_parameters
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoint_files import read_own
from smolconv.continual_pretraining.run.checkpoints import RunState, choose, chosen, forget, latest, remove_partial
from smolconv.continual_pretraining.run.gate import SourceLoss, source_loss
from smolconv.continual_pretraining.run.resuming import Origin, find_origin
from smolconv.convert import ConvertOptions, plan_from_checkpoint, run_conversion
from smolconv.errors import BadCheckpoint, SmolconvError, TrainingStopped, UsageError
from smolconv.files import is_lfs_pointer, read_bytes
from smolconv.hub.address import is_hub_uri
from smolconv.hub.download import open_source
from smolconv.hub.published import with_published_progress
from smolconv.layouts.layout import ReadOptions, hf_config
from smolconv.layouts.listing import ASSET_NAMES
from smolconv.layouts.registry import read_checkpoint
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.spec import ModelSpec, spec_differences
from smolconv.parsing import MOST_TOKENIZER_BYTES
from smolconv.tensors.lazy import LazyTensor

#: Below the run's folder; removed when the first checkpoint of the run is whole.
FOLDER = "start"


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """What every rank needs to begin. Plain types, so that it can be sent."""

    folder: str  #: that DeepSpeed loads ``tag`` from
    tag: str
    step: int  #: completed before the first
    position: Mapping[str, Any] | None  #: of the data; None: its beginning
    config: Mapping[str, Any]  #: the model's, as an HF config.json
    resumed: str | None  #: the checkpoint of the run that it goes on from
    adam: bool  #: whether Adam's state is there
    spikes: Mapping[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    gate: SourceLoss | None = None
    #: Tokenizer and the like, by name. Their content: retention may delete the folder that they were read from.
    assets: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()
    went_back: str | None = None  #: from a damaged checkpoint, and why; for the log of events


def prepare_start(
    recipe: Recipe, run: Path, world_size: int, resume: str, device: str = "cpu", *, origin: Origin | None = None
) -> StartPoint:
    """Convert what the run begins with for these ranks, where it is not so already.

    ``origin`` is what all ranks have found whole; without it this process looks alone. Raises ``UsageError`` when the
    recipe and the checkpoint contradict each other.
    """
    origin = find_origin(recipe, run, resume) if origin is None else origin
    notes = remove_partial(run)
    # What an earlier start converted, whole or not: nothing is read from it, and its space may be needed.
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    own = origin.checkpoint
    if own is None:
        if latest(run) is not None:
            raise UsageError(
                f"--resume never: {run} holds checkpoints of a run already. Choose another --output, or --resume auto."
            )
        forget(run)
        start = _fresh(recipe, run, world_size, device)
    else:
        state, checkpoint = _checked(recipe, own)
        if resume != "auto" or origin.went_back:
            choose(run, own)  # the next start must not come back to a damaged latest
        elif chosen(run) is not None:
            notes.append(f"goes on from {own}, as an earlier start was told; nothing was saved since")
        start = _resumed(recipe, run, own, world_size, state, checkpoint)
    return replace(start, notes=(*notes, *origin.notes, *start.notes), went_back=origin.went_back)


def groups_of(recipe: Recipe, spec: ModelSpec) -> tuple[Group, ...]:
    """The engine's parameter groups, in the order in which a checkpoint must hold them."""
    return group_parameters(parameter_shapes(spec), recipe.optimizer, tied=spec.tied)


def check_model(recipe: Recipe, spec: ModelSpec, source: str) -> None:
    """Raise ``UsageError`` where the data cannot be this model's."""
    if recipe.data.sequence_length > spec.max_positions:
        raise UsageError(
            f"data.sequence_length {recipe.data.sequence_length} is longer than the context of {source}, "
            f"{spec.max_positions} positions.\nTo extend it, set model.max_positions (and model.rope_theta)."
        )
    if recipe.data.eos_token_id >= spec.vocab_size:
        raise UsageError(
            f"data.eos_token_id {recipe.data.eos_token_id} is outside the vocabulary of {source}, "
            f"{spec.vocab_size} entries. Check which tokenizer the token files were made with."
        )


def with_overrides(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with the recipe's own rope theta and context, for long-context stages."""
    changes: dict[str, Any] = {}
    if recipe.model.rope_theta is not None:
        changes["rope_theta"] = recipe.model.rope_theta
        if checkpoint.spec.rope_scaling is not None and recipe.model.rope_theta != checkpoint.spec.rope_theta:
            raise UsageError(
                f"model.rope_theta {recipe.model.rope_theta:g}: {checkpoint.root} scales its rotary embedding by "
                f"{checkpoint.spec.rope_scaling.get('rope_type')}, which another theta would contradict.\n"
                "Leave model.rope_theta out to train with the scaling."
            )
    if recipe.model.max_positions is not None:
        changes["max_positions"] = recipe.model.max_positions
    return replace(checkpoint, spec=replace(checkpoint.spec, **changes)) if changes else checkpoint


def completed_steps(recipe: Recipe, progress: TrainingProgress | None) -> int:
    """Of the schedule, when a run begins at a source with this progress. Raises ``UsageError`` when it cannot."""
    wanted = recipe.start
    if (wanted.learning_rate or wanted.data) and progress is None:
        raise UsageError(
            f"start.learning_rate and start.data go on from the source's progress; {recipe.model.source} has none.\n"
            "Set both to false to begin at step 1 with the first samples."
        )
    step = progress.step if wanted.learning_rate and progress is not None else 0
    if step >= recipe.schedule.train_steps:
        raise UsageError(
            f"start.learning_rate: the source has completed {step} steps, and schedule.train_steps is "
            f"{recipe.schedule.train_steps}. Raise train_steps, or set start.learning_rate: false."
        )
    return step


def _fresh(recipe: Recipe, run: Path, world_size: int, device: str) -> StartPoint:
    wanted = recipe.start
    folder = open_source(recipe.model.source, optimizer=wanted.optimizer, step=recipe.model.step)
    read = ReadOptions(
        config=None if recipe.model.config is None else Path(recipe.model.config), step=recipe.model.step,
        architecture=recipe.model.architecture, optimizer=wanted.optimizer,
    )  # fmt: skip
    source = with_published_progress(read_checkpoint(folder, read), recipe.model.source)
    checkpoint = with_overrides(source, recipe)
    check_model(recipe, checkpoint.spec, recipe.model.source)
    if wanted.optimizer and not checkpoint.has_optimizer:
        raise UsageError(
            f"start.optimizer: {recipe.model.source} ({checkpoint.layout}) holds no Adam state.\n"
            "Set start.optimizer: false to begin with zero moments."
        )
    step = completed_steps(recipe, source.progress)
    position: Mapping[str, Any] | None = None
    if wanted.data:
        position = _source_position(recipe, source, step)
    elif step:
        position = {"step": step, "stages": []}  # the schedule goes on, the data begins
    gate = None
    if wanted.gate:
        batch = first_micro_batch(recipe, checkpoint.spec, step, position)
        masters = checkpoint.tensors.get(Slot.MASTER) if recipe.model.dtype == "float32" else None
        gate = source_loss(_side(checkpoint, folder, read, device, masters), batch)
        if not math.isfinite(gate.loss):
            raise TrainingStopped(
                f"the source model's own loss is {gate.loss} on the first micro-batch ({gate.forward}): "
                f"{recipe.model.source} holds weights that are not finite, or so large that they overflow.\n"
                "Nothing was trained. Take another step of it, or another copy."
            )
    start = _convert(checkpoint, recipe, run, world_size, optimizer=wanted.optimizer, uri=recipe.model.source)
    return replace(start, step=step, position=position, gate=gate)


def _checked(recipe: Recipe, own: Path) -> tuple[RunState, Checkpoint]:
    """A run's checkpoint, from which this recipe may go on."""
    state = RunState.read(own)
    given = recipe.parallelism
    if state.global_batch_sequences != recipe.global_batch_sequences:
        raise UsageError(
            f"{own} was trained with a global batch of {state.global_batch_sequences} sequences; the recipe has "
            f"{recipe.global_batch_sequences}. Steps would no longer mean the same data: start a new run from it."
        )
    if state.micro_batch_sequences != given.micro_batch_sequences and recipe.loss.normalisation != "tokens":
        raise UsageError(
            f"{own} was trained with micro-batches of {state.micro_batch_sequences} sequences; the recipe has "
            f"{given.micro_batch_sequences}. The loss is a mean of micro-batch means, so it would change.\n"
            "Keep the micro-batch, or set loss.normalisation: tokens."
        )
    checkpoint = with_overrides(read_own(own), recipe)
    check_model(recipe, checkpoint.spec, str(own))
    _check_same_model(recipe, checkpoint)
    return state, checkpoint


def _resumed(
    recipe: Recipe, run: Path, own: Path, world_size: int, state: RunState, checkpoint: Checkpoint
) -> StartPoint:
    given = recipe.parallelism
    same = (state.zero_stage, state.world_size, state.dtype) == (given.zero_stage, world_size, recipe.model.dtype)
    if given.zero_stage == 0 == state.zero_stage and state.dtype == recipe.model.dtype:
        same = True  # one file for all ranks
    if same:
        start = StartPoint(
            folder=str(own.parent), tag=own.name, step=0, position=None, resumed=None, adam=True,
            config=hf_config(checkpoint, recipe.model.dtype), assets=_assets(checkpoint),
        )  # fmt: skip
    else:
        start = _convert(checkpoint, recipe, run, world_size, optimizer=True, uri=str(own))
        start = replace(
            start,
            notes=(
                *start.notes,
                f"{own.name} was saved by {state.world_size} ranks of ZeRO-{state.zero_stage} ({state.dtype}) and was "
                f"converted for {world_size} of ZeRO-{given.zero_stage} ({recipe.model.dtype}).",
            ),
        )
    return replace(
        start, step=state.step, position=state.position, resumed=str(own), spikes=state.spikes,
        skipped_steps=state.skipped_steps,
    )  # fmt: skip


def _check_same_model(recipe: Recipe, own: Checkpoint) -> None:
    """Raise ``UsageError`` when a run's checkpoint is another model than the recipe's source.

    A source that is on the Hub, or that cannot be read any more, is not asked: a run goes on without it.
    """
    if is_hub_uri(recipe.model.source):
        return
    config = None if recipe.model.config is None else Path(recipe.model.config)
    try:
        given = recipe.model
        read = ReadOptions(config=config, step=given.step, architecture=given.architecture, optimizer=False)
        source = read_checkpoint(Path(recipe.model.source), read)
    except (SmolconvError, OSError):
        return
    # nanotron's Llama ignores its rope_scaling, which the run's checkpoint then no longer has.
    spec = replace(with_overrides(source, recipe).spec, rope_scaling=own.spec.rope_scaling)
    differences = spec_differences(own.spec, spec)
    if differences:
        raise UsageError(
            f"{own.root} (A) is another model than model.source, {recipe.model.source} (B):\n  "
            + "\n  ".join(differences)
            + "\nGo on with the recipe that it was trained by, or choose another --output for a new run."
        )


def _convert(
    checkpoint: Checkpoint, recipe: Recipe, run: Path, world_size: int, *, optimizer: bool, uri: str
) -> StartPoint:
    given, place = recipe.parallelism, run / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    groups = place / "groups.json"
    members = groups_of(recipe, checkpoint.spec)
    if checkpoint.frozen:
        raise BadCheckpoint(
            f"{uri} has {len(checkpoint.frozen)} frozen parameters ({checkpoint.frozen[0]}, ...): continue-train "
            "trains all of them.\nConvert it to Hugging Face's layout first, which keeps only the weights."
        )
    groups.write_text(json.dumps([group.to_json(recipe.optimizer) for group in members]))
    target = place / "deepspeed"
    options = ConvertOptions(
        to="deepspeed", zero_stage=given.zero_stage, world_size=world_size if given.zero_stage else None, groups=groups,
        optimizer=optimizer, dtype=recipe.model.dtype, digest="none", vocab_size=checkpoint.spec.vocab_size,
    )  # fmt: skip
    plan = plan_from_checkpoint(for_another_engine(checkpoint), uri, target, options)
    run_conversion(plan, overwrite=True)
    return StartPoint(
        folder=str(target), tag=(target / "latest").read_text(), step=0, position=None, resumed=None, adam=optimizer,
        config=json.loads((target / "config.json").read_text()), assets=_assets(checkpoint),
    )  # fmt: skip


def _assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    skipped = ("README.md", "LICENSE")
    return {
        name: read_bytes(path, MOST_TOKENIZER_BYTES)
        for name, path in checkpoint.assets.items()
        if name in ASSET_NAMES and name not in skipped and not is_lfs_pointer(path)
    }


def _side(
    checkpoint: Checkpoint, folder: Path, read: ReadOptions, device: str, masters: Mapping[str, LazyTensor] | None
) -> Any:  # fmt: skip
    """The source's own forward; ``masters`` are what an engine in float32 trains in place of the stored weights."""
    from smolconv.verify.compare import AsStored, VerifyOptions, side_of

    # A changed theta is not in the folder's own config: then the canonical tensors are led with the changed spec.
    own = read_checkpoint(folder, replace(read, optimizer=False))
    stored = None if masters or spec_differences(own.spec, checkpoint.spec) else AsStored(folder=folder, options=read)
    if masters:
        parameters = {**checkpoint.tensors[Slot.PARAMETER], **masters}
        checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, Slot.PARAMETER: parameters})
    return side_of(checkpoint, stored, VerifyOptions(device=device))


def first_micro_batch(recipe: Recipe, spec: ModelSpec, step: int, position: Mapping[str, Any] | None) -> Any:
    """The batch that the start gate looks at: micro-batch 0 of the first step, whatever the ranks."""
    from smolconv.continual_pretraining.data.stream import TrainingData

    data = TrainingData(
        recipe.data, global_batch_sequences=recipe.global_batch_sequences,
        micro_batch_sequences=recipe.parallelism.micro_batch_sequences, vocab_size=spec.vocab_size, rank=0,
        world_size=recipe.micro_batches_per_step, position=None if position is None else dict(position),
    )  # fmt: skip
    try:
        return next(iter(data.steps(step + 1, step + 1))).micro_batches[0]
    finally:
        data.close()


def _source_position(recipe: Recipe, source: Checkpoint, step: int) -> Mapping[str, Any]:
    from smolconv.continual_pretraining.data.position import position_from_stages

    assert source.progress is not None
    stages, last = source.progress.stages, source.progress.last_stage_index
    # nanotron lists the stages that are still to come, too.
    return position_from_stages(stages if last is None else stages[: last + 1], recipe.data, step)
