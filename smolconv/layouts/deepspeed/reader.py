"""Read a DeepSpeed checkpoint: ZeRO 0 to 3, BF16_Optimizer, any number of ranks, AutoTP, universal; without deepspeed.

For every stage, the result is each parameter by name in four slots. Names and flat order come from ``param_shapes``
alone: ``param_slice_mappings`` is wrong under ``round_robin_gradients``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import (
    Checkpoint,
    DataStage,
    EngineRecord,
    OptimizerState,
    ParameterGroup,
    Slot,
    SourceRecord,
    Topology,
    TrainingProgress,
)
from smolconv.errors import MissingShard, MixedCheckpoint, NameMismatch, counted, some_of
from smolconv.layouts.deepspeed.autotp import join_tensor_parallel
from smolconv.layouts.deepspeed.documents import CLIENT_KEY, WITHOUT, ModelDocument, plain
from smolconv.layouts.deepspeed.files import optimizer_file
from smolconv.layouts.deepspeed.listing import LATEST, SOURCE_DOCUMENTS, find_tag_folder
from smolconv.layouts.deepspeed.programs import program_files
from smolconv.layouts.deepspeed.reading import DeepSpeedReading, StoredState
from smolconv.layouts.deepspeed.universal import read_universal
from smolconv.layouts.deepspeed.zero import read_zero
from smolconv.layouts.deepspeed.zero0 import read_zero0
from smolconv.layouts.documents import check_progress, corrupt_if_malformed
from smolconv.layouts.layout import ReadOptions, without_aliases
from smolconv.layouts.listing import assets_in
from smolconv.layouts.record import read_documents
from smolconv.models.names import StoredNames, stored_names
from smolconv.models.registry import is_nanotron_config
from smolconv.tensors.lazy import LazyTensor, cast


def read_deepspeed(
    folder: Path,
    options: ReadOptions = ReadOptions(),  # noqa: B008
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Read headers and small documents only; flat shards are read by range when they are converted.

    ``base`` supplies weights that were left out of the checkpoint (``exclude_frozen_parameters``). Raises
    ``BadCheckpoint`` and its kind for anything missing, contradictory or unsupported.
    """
    return _read(DeepSpeedReading(folder, find_tag_folder(folder, options.step), options, base))


def _read(reading: DeepSpeedReading) -> Checkpoint:
    found = [_read_rank(reading, tp) for tp in range(reading.tp)]
    state = join_tensor_parallel(found, reading.shapes, str(reading.tag))
    if reading.files.universal:  # has whole parameters, whatever the ranks' model files hold
        read_universal(reading, state)
    state = _canonical_names(reading, state)
    frozen = _complete(reading, state)
    parameters = reading.table.to_canonical(
        without_aliases(state.weights, reading.table.aliases, reading.where), str(reading.tag)
    )
    tensors: dict[Slot, Mapping[str, LazyTensor]] = {Slot.PARAMETER: parameters}
    for slot, by_name in state.slots.items():
        # If the module is fp32, the master repeats it.
        kept = {n: t for n, t in by_name.items() if slot is not Slot.MASTER or parameters[n].dtype != t.dtype}
        if kept:
            tensors[slot] = reading.table.to_canonical(kept, f"{reading.tag} ({slot.value})", all_needed=False)
    optimizer = None
    if reading.options.optimizer and state.steps:
        optimizer = OptimizerState(steps=state.steps, groups=state.groups)
    source = _source(reading, state.groups)
    assets = _assets(reading)
    reading.read_files += [*assets.values()]
    return Checkpoint(
        layout="deepspeed",
        root=reading.folder,
        spec=reading.spec,
        tensors=tensors,
        topology=Topology(
            tp=reading.tp if reading.tp > 1 and not reading.files.universal else None,
            dp=None if reading.files.universal else reading.ranks,
            zero_stage=None if reading.files.universal else reading.stage,
            world_size=None if reading.files.universal else reading.ranks * reading.tp,
            universal=reading.files.universal,
        ),
        optimizer=optimizer,
        progress=_progress(reading),
        assets=assets,
        source=source,
        files=tuple(reading.read_files),
        warnings=tuple(reading.warnings),
        frozen=frozen,
        program_files=program_files(reading.run),
    )


def _read_rank(reading: DeepSpeedReading, tp: int) -> StoredState:
    """One tensor-parallel rank's parameters, from the files of its stage."""
    key = next((key for key in reading.files.models if key[1] == tp), None)
    if key is None:
        raise MissingShard(
            f"{reading.tag}: the model file of tensor-parallel rank {tp} of {reading.tp} is missing.\n"
            "Copy it from the training node."
        )
    model = reading.first if tp == 0 else reading.read_model(reading.files.models[key])
    reading.require_same_step(model)
    if model.tp != reading.first.tp or 1 < model.tp < reading.files.tp:
        raise MixedCheckpoint(
            f"{model.path} is of {model.tp} tensor-parallel ranks, {reading.first.path.name} of {reading.first.tp}; "
            f"the folder has files of {reading.files.tp}.\n"
            "Expected one number of ranks.\n"
            "Files of two checkpoints lie in one folder: copy all of one from the training nodes."
        )
    found = StoredState(
        weights={name: tensor for name, tensor in model.module.items() if tensor.numel},
        dtypes={name: tensor.dtype for name, tensor in model.module.items()},
    )
    if reading.files.universal:
        return found
    if any(rank == tp for _, rank in reading.files.optimizers):
        read_zero(reading, model, found, tp)
    elif model.optimizer is not None:
        read_zero0(reading, model, found)
    else:
        _without_state(reading, model, tp)
    return found


def _without_state(reading: DeepSpeedReading, model: ModelDocument, tp: int) -> None:
    stage = model.zero_stage or 0
    if stage == 0 and model.groups is None:
        return  # saved without an optimizer
    bf16 = any(tensor.dtype == "bfloat16" for tensor in model.module.values())
    name = optimizer_file(0, bf16=bf16, tp=tp)
    empty = not any(tensor.numel for tensor in model.module.values())
    if reading.options.optimizer or empty:
        raise MissingShard(
            f"{reading.tag}: {name} and those of the other ranks are missing, but the model file is of "
            f"ZeRO-{stage or '1/2'} on {model.dp} ranks.\n"
            + ("They hold the weights. Copy them from the training nodes." if empty else
               f"Copy them from the training nodes, or {WITHOUT}.")
        )  # fmt: skip
    reading.stage = stage
    reading.warnings.append("the fp32 masters are not there: parameters are the module's, as it was stored.")


def _canonical_names(reading: DeepSpeedReading, state: StoredState) -> StoredState:
    """Without the prefix that a wrapper (torch.compile, a module around the model) adds to every name."""
    names = stored_names([*state.weights, *state.slots[Slot.MASTER]])
    if names == StoredNames():
        return state
    reading.names = names
    if names.wrapper:
        reading.warnings.append(
            f"parameters are named {names.wrapper}{'' if names.bare else 'model'}...: a DeepSpeed target keeps the "
            "prefix, which the run needs; other layouts have none."
        )
    return StoredState(
        weights=names.by_canonical(state.weights),
        dtypes=names.by_canonical(state.dtypes),
        slots={slot: names.by_canonical(by_name) for slot, by_name in state.slots.items()},
        steps=names.by_canonical(state.steps),
        groups=tuple(replace(group, names=tuple(map(names.canonical, group.names))) for group in state.groups),
    )


def _complete(reading: DeepSpeedReading, state: StoredState) -> tuple[str, ...]:
    """Give every parameter its weights: stored, rounded from the master, or the base's. Returns what is frozen."""
    masters = state.slots[Slot.MASTER]
    default = next(iter(state.dtypes.values()), None) or next((t.dtype for t in masters.values()), "float32")
    aliases = {**reading.table.aliases, **reading.first.shared}
    for name, master in masters.items():
        dtype = state.dtypes.get(name, default)
        if dtype == master.dtype:
            state.weights[name] = master
        elif name not in state.weights:
            state.weights[name] = cast(master, dtype)
    grouped = {name for group in state.groups for name in group.names} or set(masters)
    for name in [name for name in state.weights if name in aliases and name not in reading.shapes]:
        # A frozen tied head may be the only stored copy of its embedding.
        state.weights.setdefault(aliases[name], state.weights[name])
    missing = [name for name in reading.shapes if name not in state.weights]
    if missing and reading.base is not None:
        for name in missing:
            if name not in reading.base.parameters or reading.base.parameters[name].shape != reading.shapes[name]:
                raise NameMismatch(
                    f"--base {reading.base.root} has no {name} of {list(reading.shapes[name])}, which {reading.tag} "
                    "left out.\nName the checkpoint that this training began with."
                )
            tensor = reading.base.parameters[name]
            if tensor.dtype != default:
                reading.warnings.append(f"{name} comes from the base as {tensor.dtype}; the checkpoint is {default}.")
            state.weights[name] = cast(tensor, default)
        reading.warnings.append(
            f"{reading.base.root} supplied {counted(len(missing), 'weight')}: {some_of(missing, 5, more=True)}."
        )
    elif missing and len(missing) < len(reading.shapes):
        raise NameMismatch(
            f"{reading.tag} has no weights of {counted(len(missing), 'parameter')}: {some_of(missing, 5, more=True)}.\n"
            "They were frozen and left out when it was saved (exclude_frozen_parameters), or the config is another "
            "model's. Supply the checkpoint that training began with: --base PATH."
        )
    has_groups = bool(state.groups) or bool(masters)
    return tuple(name for name in reading.shapes if name not in grouped) if has_groups else ()


def _progress(reading: DeepSpeedReading) -> TrainingProgress:
    first, mine = reading.first, reading.first.client_state.get(CLIENT_KEY)
    progress = TrainingProgress(step=first.step, consumed_samples=first.samples)
    known = mine.get("progress") if isinstance(mine, Mapping) else None
    if known is not None:
        with corrupt_if_malformed(f"{first.path} ({CLIENT_KEY}: progress)"):
            stages = tuple(DataStage(**stage) for stage in known.get("stages") or ())
            carried = TrainingProgress(**{**known, "stages": stages})
        if carried.step == first.step:
            progress = carried
    return check_progress(progress, first.path)


def _source(reading: DeepSpeedReading, groups: tuple[ParameterGroup, ...]) -> SourceRecord:
    """The documents of the source's layout, the model's config, and DeepSpeed's own state."""
    kept, files = read_documents(reading.run / SOURCE_DOCUMENTS)
    reading.read_files += files
    if is_nanotron_config(reading.config):
        kept = replace(kept, nanotron_config=reading.config)
    else:
        kept = replace(kept, hf_config=reading.config)
    client, dropped, left_out = dict[str, Any](), list[str](), list[str]()
    for key, value in reading.first.client_state.items():
        if key == CLIENT_KEY:
            continue
        try:
            client[key] = plain(value)
        except ValueError as error:
            dropped.append(f"{key!s:.60} ({error})")
    if dropped:
        left_out.append(f"client_state: {some_of(dropped, 5, more=True)}")
    try:
        scheduler = plain(reading.first.lr_scheduler)
    except ValueError as error:
        scheduler = None
        left_out.append(f"the learning-rate scheduler's state ({error!s:.60})")
    reading.warnings += [f"{what} cannot be carried: only plain values can." for what in left_out]
    sampling = [f"{key} (the state of DeepSpeed's data sampling)" for key in reading.first.data_state]
    reading.warnings += [f"{what} is not carried." for what in sampling]
    left_out += sampling
    mine = reading.first.client_state.get(CLIENT_KEY)
    engine = EngineRecord(
        weights_only=isinstance(mine, Mapping) and mine.get("weights_only") is True and reading.first.step == 0,
        client_state=client,
        skipped_steps=reading.first.skipped_steps,
        groups=groups,
        lr_scheduler=scheduler,
        names=reading.names,
        # A tag folder by itself may have been given any name.
        tag=reading.tag.relative_to(reading.run).as_posix()
        if reading.folder != reading.tag or (reading.run / LATEST).is_file()
        else None,
        loss_scaler=reading.loss_scaler,
        left_out=tuple(left_out),
    )
    return replace(kept, engine=engine)


def _assets(reading: DeepSpeedReading) -> dict[str, Path]:
    return {**assets_in(reading.run), **assets_in(reading.tag)}
