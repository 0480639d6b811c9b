"""Prepares what a run's ranks load: from its source, or from its own checkpoint.

One process converts, on the CPU and streaming, before the engine starts; the others wait for it. DeepSpeed always gets
a checkpoint with its own stage and world size, so its elastic loading is never needed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, EngineRecord, Slot, SourceRecord, TrainingProgress, for_another_engine
from smolconv.continual_pretraining.data.token_record import DataPlace
from smolconv.continual_pretraining.engine.config import divisors
from smolconv.continual_pretraining.engine.optimizer import Group, group_parameters
from smolconv.continual_pretraining.recipe.schema import Data, Recipe
from smolconv.continual_pretraining.run.checkpoint_files import read_own
from smolconv.continual_pretraining.run.checkpoints import RunState, choose, chosen, forget, latest, remove_partial
from smolconv.continual_pretraining.run.export import check_exports
from smolconv.continual_pretraining.run.folder import START, check_steps
from smolconv.continual_pretraining.run.gate import SourceLoss, source_loss
from smolconv.continual_pretraining.run.place import own_place, source_place
from smolconv.continual_pretraining.run.resuming import Origin, find_origin
from smolconv.conversion import ConversionPlan, ConvertOptions, plan_from_checkpoint, run_conversion
from smolconv.errors import BadCheckpoint, MachineError, SmolconvError, TrainingStopped, UsageError, counted, some_of
from smolconv.files import is_lfs_pointer, read_bytes
from smolconv.hub.address import is_hub_uri
from smolconv.hub.download import open_source
from smolconv.hub.published import with_published_progress
from smolconv.layouts.layout import ReadOptions, hf_config
from smolconv.layouts.listing import ASSET_NAMES
from smolconv.layouts.registry import LAYOUTS, layout_named, read_checkpoint
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.registry import family_of
from smolconv.models.spec import ModelSpec, spec_differences
from smolconv.parsing import MOST_TOKENIZER_BYTES
from smolconv.tensors.lazy import LazyTensor, is_zero


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """What every rank needs to begin, in plain types that can be sent to other ranks."""

    folder: str  #: where DeepSpeed loads ``tag`` from
    tag: str
    step: int  #: steps completed before this start
    position: Mapping[str, Any] | None  #: of the data; None: its beginning
    config: Mapping[str, Any]  #: the model's, as an HF config.json
    resumed: str | None  #: the checkpoint of the run that it continues from
    adam: bool  #: whether Adam's state is there
    spikes: Mapping[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    gate: SourceLoss | None = None
    frozen: tuple[str, ...] = ()  #: parameters that stay zero
    #: Contents of the tokenizer and other files, by name: retention may delete the folder that they were read from.
    assets: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()
    token_files: Mapping[str, Any] = field(default_factory=dict)  #: the record of ``DataPlace``
    #: For the log: a damaged checkpoint was skipped, data has changed, or the recipe changes the source's rope theta or
    #: context (with both losses).
    events: Sequence[str] = ()


def prepare_start(
    recipe: Recipe, run: Path, world_size: int, resume: str, device: str = "cpu", *, origin: Origin | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> StartPoint:  # fmt: skip
    """Convert the starting checkpoint for these ranks, unless it already fits.

    ``origin`` is the checkpoint that all ranks found undamaged; without it this process looks for one. ``say`` is
    called before anything that takes long. Raises ``UsageError`` if the recipe and the checkpoint contradict each
    other.
    """
    origin = find_origin(recipe, run, resume) if origin is None else origin
    notes = remove_partial(run)
    # Converted by an earlier start, perhaps in part: it is never read, and its space may be needed.
    shutil.rmtree(run / START, ignore_errors=True)
    own = origin.checkpoint
    if own is None:
        if latest(run) is not None:
            raise UsageError(
                f"--resume never: {run} already holds a run's checkpoints. Choose another --output, or --resume auto."
            )
        forget(run)
        start = _fresh(recipe, run, world_size, device, say)
    else:
        state = RunState.read(own)
        checkpoint = checked_own(recipe, own, state)
        place = own_place(recipe, own, state, checkpoint.spec.vocab_size)
        if resume != "auto" or origin.went_back:
            choose(run, own)  # the next start must not return to a damaged latest
        elif chosen(run) is not None:
            notes.append(f"continues from {own}, which an earlier start was given; nothing was saved since")
        start = _resumed(recipe, run, own, world_size, state, checkpoint, place, say)
    events = (origin.went_back, *start.events) if origin.went_back else start.events
    return replace(start, notes=(*notes, *origin.notes, *start.notes), events=events)


def groups_of(recipe: Recipe, spec: ModelSpec, frozen: Sequence[str]) -> tuple[Group, ...]:
    """The engine's parameter groups, in the order in which a checkpoint must hold them."""
    names = [name for name in parameter_shapes(spec) if name not in frozen]
    return group_parameters(names, recipe.optimizer, tied=spec.tied, family=family_of(spec))


def held_at_zero(recipe: Recipe, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Parameters that stay zero, because the source's layout or an export's layout cannot hold them.

    A checkpoint of such a run has them frozen. Raises ``BadCheckpoint`` if any other parameter is frozen.
    """
    formats = () if recipe.export is None else recipe.export.formats
    used = {checkpoint.layout, *(layout_named(word, "export.formats").name for word in formats)}
    held = {
        name
        for layout in LAYOUTS
        for name in layout.without_place(checkpoint.spec)
        if layout.name in used or (name in checkpoint.frozen and is_zero(checkpoint.parameters[name]))
    }
    if other := [name for name in checkpoint.frozen if name not in held]:
        raise BadCheckpoint(
            f"{checkpoint.root} has {len(other)} frozen parameters ({other[0]}, ...): continue-train trains all of "
            "them.\nConvert it to Hugging Face's layout first, which keeps only the weights."
        )
    return tuple(name for name in checkpoint.parameters if name in held)


def plan_start(
    recipe: Recipe, checkpoint: Checkpoint, run: Path, world_size: int, *, optimizer: bool, uri: str
) -> ConversionPlan:
    """Plan what the ranks load and what the run exports. Writes nothing.

    Raises ``UsageError`` for an impossible export, and if ``start.optimizer`` finds no Adam state.
    """
    if optimizer and not checkpoint.has_optimizer:
        raise UsageError(
            f"start.optimizer: {uri} ({checkpoint.layout}) holds no Adam state.\n"
            "Set start.optimizer: false to begin with zero moments."
        )
    given, held = recipe.parallelism, held_at_zero(recipe, checkpoint)
    members = groups_of(recipe, checkpoint.spec, held)
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder) / "groups.json"
        groups.write_text(json.dumps([group.to_json(recipe.optimizer) for group in members]))
        options = ConvertOptions(
            to="deepspeed", zero_stage=given.zero_stage, world_size=world_size if given.zero_stage else None,
            groups=groups, optimizer=optimizer, dtype=recipe.model.dtype, digest="none",
            vocab_size=checkpoint.spec.vocab_size,
        )  # fmt: skip
        start = for_another_engine(replace(checkpoint, frozen=held))
        plan = plan_from_checkpoint(start, uri, run / START / "deepspeed", options)
    # The run's own checkpoints: Adam has made steps, and the source's additional files are missing.
    record = SourceRecord(hf_config=hf_config(checkpoint, recipe.model.dtype), engine=EngineRecord())
    if recipe.export is not None:
        check_exports(recipe.export, replace(plan.prepared, source=record, assets=_assets(checkpoint)), run)
    return plan


def check_model(recipe: Recipe, spec: ModelSpec, source: str) -> None:
    """Raise ``UsageError`` if the data cannot be this model's, or ranks cannot divide its heads."""
    if recipe.data.sequence_length > spec.max_positions:
        raise UsageError(
            f"data.sequence_length {recipe.data.sequence_length} is longer than the context of {source}, "
            f"{spec.max_positions} positions.\nTo extend it, set model.max_positions (and model.rope_theta)."
        )
    if recipe.data.eos_token_id >= spec.vocab_size:
        raise UsageError(
            f"data.eos_token_id {recipe.data.eos_token_id} is outside the vocabulary of {source}, "
            f"{spec.vocab_size} entries. Check which tokenizer wrote the token files."
        )
    if spec.num_heads % recipe.parallelism.sequence_ranks:
        fitting = [str(n) for n in divisors(spec.num_heads)]
        raise UsageError(
            f"parallelism.sequence_ranks {recipe.parallelism.sequence_ranks} does not divide the {spec.num_heads} "
            f"query heads of {source}.\n"
            "Ranks that share a sequence divide the attention heads equally.\n"
            f"Choose {', '.join(fitting[:-1])} or {fitting[-1]}."
        )


def read_source(recipe: Recipe, folder: Path, *, optimizer: bool = True) -> tuple[Checkpoint, Checkpoint]:
    """The recipe's source, unchanged and as trained: with the recipe's rope theta and context.

    Raises as ``with_overrides``, which compares with the source's own config even if ``model.config`` replaces it.
    """
    read = _read_options(recipe, optimizer=optimizer)
    source = as_it_is = read_checkpoint(folder, read)
    if read.config is not None:
        with suppress(BadCheckpoint):  # usually it has no config
            as_it_is = read_checkpoint(folder, replace(read, config=None))
    return as_it_is, with_overrides(source, recipe, as_it_is.spec)


def with_overrides(checkpoint: Checkpoint, recipe: Recipe, as_it_is: ModelSpec | None = None) -> Checkpoint:
    """The checkpoint with the recipe's rope theta and context, for long-context stages.

    Raises ``UsageError`` for another theta of a scaled rotary embedding, and for values lower than ``as_it_is``, by
    default the checkpoint's own: a source that was trained with higher ones would start with a higher loss.
    """
    given, spec = recipe.model, checkpoint.spec
    if given.rope_theta is not None:
        if spec.rope_scaling is not None and given.rope_theta != spec.rope_theta:
            raise UsageError(
                f"model.rope_theta {given.rope_theta:g}: {checkpoint.root} scales its rotary embedding by "
                f"{spec.rope_scaling.get('rope_type')}, which another theta would contradict.\n"
                "Leave model.rope_theta out to train with the scaling."
            )
        spec = replace(spec, rope_theta=given.rope_theta)
    if given.max_positions is not None:
        spec = replace(spec, max_positions=given.max_positions)
    for name, was, now in lengthened(as_it_is or checkpoint.spec, spec):
        if now < was and not given.allow_lowering:
            where = f"model.{name}" if getattr(given, name) is not None else f"{name} in model.config"
            raise UsageError(
                f"{where} is {_number(now)}, but {given.source} was trained with {_number(was)}.\n"
                "Expected the same value, or a higher one for a long-context stage: with a lower one its loss rises.\n"
                f"Remove it to keep {_number(was)}, or set model.allow_lowering: true."
            )
    return checkpoint if spec == checkpoint.spec else replace(checkpoint, spec=spec)


def lengthened(source: ModelSpec, spec: ModelSpec) -> list[tuple[str, float, float]]:
    """Rope theta and context if they differ: name, the source's value and the run's."""
    both = [(name, getattr(source, name), getattr(spec, name)) for name in ("rope_theta", "max_positions")]
    return [(name, was, now) for name, was, now in both if was != now]


def changed_text(source: ModelSpec, spec: ModelSpec) -> str:
    """The differences of ``lengthened`` as text; empty if there are none."""
    told = [f"{name} {_number(now)} (the source's: {_number(was)})" for name, was, now in lengthened(source, spec)]
    return ", ".join(told)


def _number(value: float) -> str:
    return f"{value:,.12g}"


def _read_options(recipe: Recipe, *, optimizer: bool = True) -> ReadOptions:
    given = recipe.model
    config = None if given.config is None else Path(given.config)
    return ReadOptions(config=config, step=given.step, architecture=given.architecture, optimizer=optimizer)


def completed_steps(recipe: Recipe, progress: TrainingProgress | None) -> int:
    """Completed steps of the schedule for a run that begins at a source with this progress. Raises ``UsageError``."""
    wanted = recipe.start
    if (wanted.learning_rate or wanted.data) and progress is None:
        raise UsageError(
            f"start.learning_rate and start.data need the source's progress; {recipe.model.source} has none.\n"
            "Set both to false to begin at step 1 with the first samples."
        )
    step = progress.step if wanted.learning_rate and progress is not None else 0
    if step >= recipe.schedule.train_steps:
        raise UsageError(
            f"start.learning_rate: the source has completed {step} steps, and schedule.train_steps is "
            f"{recipe.schedule.train_steps}. Raise train_steps, or set start.learning_rate: false."
        )
    return step


def _fresh(recipe: Recipe, run: Path, world_size: int, device: str, say: Callable[[str], None]) -> StartPoint:
    wanted = recipe.start
    folder = open_source(recipe.model.source, optimizer=wanted.optimizer, step=recipe.model.step)
    source, checkpoint = read_source(recipe, folder, optimizer=wanted.optimizer)
    source, checkpoint = (with_published_progress(found, recipe.model.source) for found in (source, checkpoint))
    check_model(recipe, checkpoint.spec, recipe.model.source)
    plan = plan_start(recipe, checkpoint, run, world_size, optimizer=wanted.optimizer, uri=recipe.model.source)
    step = completed_steps(recipe, source.progress)
    place = source_place(recipe, source, step, checkpoint.spec.vocab_size)
    gate, changed = None, changed_text(source.spec, checkpoint.spec)
    if wanted.gate:
        read = _read_options(recipe, optimizer=wanted.optimizer)
        batch = first_micro_batch(recipe, checkpoint.spec, step, place.position)
        masters = checkpoint.tensors.get(Slot.MASTER) if recipe.model.dtype == "float32" else None
        say("start gate: computing the source's own loss on the first micro-batch")
        gate = source_loss(_side(checkpoint, folder, read, device, masters), batch)
        if not math.isfinite(gate.loss):
            raise TrainingStopped(
                f"the source model's own loss is {gate.loss} on the first micro-batch ({gate.forward}): "
                f"{recipe.model.source} has weights that are not finite, or so large that they overflow.\n"
                "Nothing was trained. Use the checkpoint of another step, or another copy."
            )
        if changed:
            own = source_loss(_side(source, folder, read, device, masters), batch)
            changed += f"; loss of the first micro-batch: {gate.loss:.4f}, with the source's own: {own.loss:.4f}"
    say(_converting(plan, world_size))
    start, held = _convert(plan, adam=wanted.optimizer), plan.prepared.frozen
    notes = [f"{len(held)} parameters stay zero, because nanotron cannot hold them: {some_of(held, 2)}"] if held else []
    return replace(
        start, step=step, position=place.position, token_files=place.record,
        events=(*place.events, *([changed] if changed else [])), gate=gate, notes=notes,
    )  # fmt: skip


def checked_own(recipe: Recipe, own: Path, state: RunState) -> Checkpoint:
    """Read a run's checkpoint. Raises ``UsageError`` if this recipe may not continue it."""
    check_steps(recipe, state.step, own)
    given = recipe.parallelism
    if state.global_batch_sequences != recipe.global_batch_sequences:
        raise UsageError(
            f"{own} was trained with a global batch of {state.global_batch_sequences} sequences; the recipe has "
            f"{recipe.global_batch_sequences}. Steps would no longer read the same data: start a new run from it."
        )
    if state.micro_batch_sequences != given.micro_batch_sequences and recipe.loss.normalisation != "tokens":
        raise UsageError(
            f"{own} was trained with micro-batches of {state.micro_batch_sequences} sequences; the recipe has "
            f"{given.micro_batch_sequences}. The loss averages over micro-batches, so their size changes it.\n"
            "Keep the micro-batch, or set loss.normalisation: tokens."
        )
    checkpoint = with_overrides(read_own(own), recipe)
    check_model(recipe, checkpoint.spec, str(own))
    _check_same_model(recipe, checkpoint)
    return checkpoint


def plan_resumed(
    recipe: Recipe, run: Path, own: Path, world_size: int, state: RunState, checkpoint: Checkpoint
) -> ConversionPlan | None:
    """What the ranks load instead of the run's checkpoint; None: the checkpoint itself.

    Exports are planned, too. Raises as ``plan_start`` does.
    """
    given = recipe.parallelism
    same = (state.zero_stage, state.world_size, state.dtype) == (given.zero_stage, world_size, recipe.model.dtype)
    if given.zero_stage == 0 == state.zero_stage and state.dtype == recipe.model.dtype:
        same = True  # one file for all ranks
    if not same or held_at_zero(recipe, checkpoint) != checkpoint.frozen:
        return plan_start(recipe, checkpoint, run, world_size, optimizer=True, uri=str(own))
    if recipe.export is not None:
        check_exports(recipe.export, checkpoint, run)
    return None


def _resumed(
    recipe: Recipe, run: Path, own: Path, world_size: int, state: RunState, checkpoint: Checkpoint, place: DataPlace,
    say: Callable[[str], None],
) -> StartPoint:  # fmt: skip
    given = recipe.parallelism
    plan = plan_resumed(recipe, run, own, world_size, state, checkpoint)
    if plan is None:
        start = StartPoint(
            folder=str(own.parent), tag=own.name, step=0, position=None, resumed=None, adam=True,
            config=hf_config(checkpoint, recipe.model.dtype), assets=_asset_bytes(checkpoint),
            frozen=checkpoint.frozen,
        )  # fmt: skip
    else:
        say(_converting(plan, world_size))
        start = _convert(plan, adam=True)
        start = replace(
            start,
            notes=(
                *start.notes,
                f"{own.name} was saved by {state.world_size} ranks of ZeRO-{state.zero_stage} ({state.dtype}) and was "
                f"converted for {world_size} of ZeRO-{given.zero_stage} ({recipe.model.dtype}).",
            ),
        )
    return replace(
        start, step=state.step, position=place.position, token_files=place.record, events=place.events,
        resumed=str(own), spikes=state.spikes, skipped_steps=state.skipped_steps,
    )  # fmt: skip


def _check_same_model(recipe: Recipe, own: Checkpoint) -> None:
    """Raise ``UsageError`` if a run's checkpoint is not the model of the recipe's source.

    Skips a source on the Hub, or one that can no longer be read: a run continues without its source.
    """
    if is_hub_uri(recipe.model.source):
        return
    try:
        source = read_checkpoint(Path(recipe.model.source), _read_options(recipe, optimizer=False))
    except (SmolconvError, OSError):
        return
    # nanotron's Llama ignores rope_scaling, so the run's checkpoint no longer has it.
    spec = replace(with_overrides(source, recipe).spec, rope_scaling=own.spec.rope_scaling)
    differences = spec_differences(own.spec, spec)
    if differences:
        raise UsageError(
            f"{own.root} (A) is another model than model.source, {recipe.model.source} (B):\n  "
            + "\n  ".join(differences)
            + "\nUse the recipe that it was trained with, or choose another --output for a new run."
        )


def _converting(plan: ConversionPlan, world_size: int) -> str:
    return f"converting {plan.uri} for {counted(world_size, 'rank')}: {plan.bytes_written / 1e9:.2f} GB"


def _convert(plan: ConversionPlan, *, adam: bool) -> StartPoint:
    target = plan.target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_conversion(plan, overwrite=True)
    except OSError as error:
        raise MachineError(
            f"{plan.uri} could not be converted for the ranks: {error.filename or target}: {error.strerror or error}.\n"
            f"{plan.bytes_written / 1e9:.2f} GB were to be written below {target}; nothing was trained.\n"
            "Free some space or repair the disk, and repeat the command."
        ) from error
    return StartPoint(
        folder=str(target), tag=(target / "latest").read_text(), step=0, position=None, resumed=None, adam=adam,
        config=json.loads((target / "config.json").read_text()), assets=_asset_bytes(plan.source),
        frozen=plan.prepared.frozen,
    )  # fmt: skip


def _assets(checkpoint: Checkpoint) -> dict[str, Path]:
    """The assets of a run's checkpoint."""
    skipped = ("README.md", "LICENSE")
    return {
        name: path
        for name, path in checkpoint.assets.items()
        if name in ASSET_NAMES and name not in skipped and not is_lfs_pointer(path)
    }


def _asset_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: read_bytes(path, MOST_TOKENIZER_BYTES) for name, path in _assets(checkpoint).items()}


def _side(
    checkpoint: Checkpoint, folder: Path, read: ReadOptions, device: str, masters: Mapping[str, LazyTensor] | None
) -> Any:  # fmt: skip
    """The source's own forward pass. ``masters``: fp32 weights that a float32 engine trains instead of the stored."""
    from smolconv.verification.compare import AsStored, VerifyOptions, side_of

    # A changed theta is not in the folder's config: then the canonical tensors run with the changed spec.
    own = read_checkpoint(folder, replace(read, optimizer=False))
    stored = None if masters or spec_differences(own.spec, checkpoint.spec) else AsStored(folder=folder, options=read)
    if masters:
        parameters = {**checkpoint.tensors[Slot.PARAMETER], **masters}
        checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, Slot.PARAMETER: parameters})
    return side_of(checkpoint, stored, VerifyOptions(device=device))


def first_micro_batch(recipe: Recipe, spec: ModelSpec, step: int, position: Mapping[str, Any] | None) -> Any:
    """The batch that the start gate uses: micro-batch 0 of the first step, for any number of ranks.

    If a loss mask excludes all of it, the batch is read without masks: the gate would otherwise compare nothing.
    """
    from smolconv.continual_pretraining.data.stream import TrainingData

    def read(data: Data) -> Any:
        opened = TrainingData(
            data, global_batch_sequences=recipe.global_batch_sequences,
            micro_batch_sequences=recipe.parallelism.micro_batch_sequences, vocab_size=spec.vocab_size, rank=0,
            world_size=recipe.micro_batches_per_step, position=None if position is None else dict(position),
        )  # fmt: skip
        try:
            return next(iter(opened.steps(step + 1, step + 1))).micro_batches[0]
        finally:
            opened.close()

    batch = read(recipe.data)
    return batch if (batch.labels >= 0).any() else read(recipe.data.model_copy(update={"loss_masks": False}))
