"""Read a DeepSpeed checkpoint: ZeRO 0 to 3, BF16_Optimizer, any number of ranks, AutoTP, universal; without deepspeed.

Whatever the stage, the result is each parameter by name in four slots. Names and flat order come from ``param_shapes``
alone: ``param_slice_mappings`` is wrong under ``round_robin_gradients``.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from smolconv.checkpoint import (
    MOMENTS,
    Checkpoint,
    DataStage,
    OptimizerState,
    ParameterGroup,
    Slot,
    Topology,
    TrainingProgress,
)
from smolconv.errors import (
    CorruptFile,
    MissingFile,
    MissingShard,
    MixedCheckpoint,
    NameMismatch,
    ShapeMismatch,
)
from smolconv.files import read_bytes
from smolconv.layouts.deepspeed.documents import (
    AdamState,
    AnotherOptimizer,
    ModelDocument,
    OptimizerDocument,
    UniversalDocument,
    adam_states,
    hyperparameters,
    numbered,
    plain,
    read_model_document,
    read_optimizer_document,
    read_universal_document,
    read_universal_step,
    read_universal_tensor,
    stored,
)
from smolconv.layouts.deepspeed.files import TagFiles, optimizer_file, tag_files
from smolconv.layouts.deepspeed.listing import SOURCE_DOCUMENTS, find_tag_folder
from smolconv.layouts.deepspeed.matching import Unnamed, alike, name_by_order, place_by_order, starts_alike
from smolconv.layouts.deepspeed.partitions import (
    check_paddings,
    join_group,
    join_pieces,
    match_sub_groups,
    piece_numel,
    undealt,
)
from smolconv.layouts.documents import check_config, check_progress, understood
from smolconv.layouts.dtypes import check_dtype
from smolconv.layouts.layout import ASSET_NAMES, ReadOptions, read_json, without_aliases
from smolconv.models.huggingface import weight_table
from smolconv.models.spec import ModelSpec, is_nanotron_config, parameter_shapes, spec_from_hf, spec_from_nanotron
from smolconv.storage.integrity import archive_seals, refuse_seals
from smolconv.storage.torch_archive.archive import read_pickle_bytes
from smolconv.tensors.lazy import LazyTensor, Stored, Zeros, cast, equal, flat_slice, join, join_columns, reshape

#: The key of ``client_state`` under which our writer keeps what DeepSpeed has no place for.
CLIENT_KEY = "smolconv"
#: Elements that tell whether a weight is its rounded master, at each place where that is asked.
_COMPARED = 64
_WITHOUT = "pass --no-optimizer to convert the weights only"


@dataclass(kw_only=True)
class _Found:
    """What the files of one tensor-parallel rank hold, by DeepSpeed's names. Filled while reading."""

    weights: dict[str, LazyTensor]  #: as the model file has them; not those that are empty there
    dtypes: dict[str, str]  #: the module's, also of empty tensors
    slots: dict[Slot, dict[str, LazyTensor]] = field(
        default_factory=lambda: {slot: {} for slot in (Slot.MASTER, *MOMENTS)}
    )
    steps: dict[str, float] = field(default_factory=dict)
    flat_steps: Mapping[int, float] = field(default_factory=dict)  #: by flat tensor, also where no state was asked for
    groups: tuple[ParameterGroup, ...] = ()


def read_deepspeed(
    folder: Path,
    options: ReadOptions = ReadOptions(),  # noqa: B008
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Read headers and small documents only; flat shards are read by range when they are converted.

    ``base`` supplies weights that were left out of the checkpoint (``exclude_frozen_parameters``). Raises
    ``BadCheckpoint`` and its kind for anything missing, contradictory or unsupported.
    """
    tag = find_tag_folder(folder, options.step)
    try:
        return _Reader(folder, tag, options, base).read()
    except RecursionError:
        raise CorruptFile(f"{tag}: a value in its files holds itself or is nested too deeply to be read.") from None


class _Reader:
    """Holds what all parts of one read need; lives for one call."""

    def __init__(self, folder: Path, tag: Path, options: ReadOptions, base: Checkpoint | None) -> None:
        self.folder, self.tag, self.options, self.base = folder, tag, options, base
        self.files: TagFiles = tag_files(tag)
        self.warnings: list[str] = []
        self.read_files: list[Path] = []
        self.first = self._model(self.files.first_model)
        self.config, self.where = _find_config(folder, tag, options.config, self.first)
        check_config(self.config, self.where)
        self.spec: ModelSpec = (
            spec_from_nanotron(self.config, self.where) if is_nanotron_config(self.config)
            else spec_from_hf(self.config, self.where)
        )  # fmt: skip
        if not self.spec.tied and "lm_head.weight" in self.first.shared:
            raise MixedCheckpoint(
                f"{self.first.path} ties lm_head.weight to {self.first.shared['lm_head.weight']}, but {self.where} "
                "says that they are two. Check that the config belongs to this checkpoint."
            )
        self.shapes = parameter_shapes(self.spec)
        self.table = weight_table(self.spec)
        self.stage, self.ranks = 0, self.first.dp or 1
        self.tp: int = max(self.first.tp, self.files.tp)

    def read(self) -> Checkpoint:
        found = [self._found(tp) for tp in range(self.tp)]
        state = _join_tensor_parallel(found, self.shapes, str(self.tag))
        if self.files.universal:  # has whole parameters, whatever the ranks' model files hold
            self._read_universal(state)
        state = self._canonical_names(state)
        frozen = self._complete(state)
        parameters = self.table.to_canonical(
            without_aliases(state.weights, self.table.aliases, self.where), str(self.tag)
        )
        tensors: dict[Slot, Mapping[str, LazyTensor]] = {Slot.PARAMETER: parameters}
        for slot, by_name in state.slots.items():
            # Where the module is fp32 the master repeats it.
            kept = {n: t for n, t in by_name.items() if slot is not Slot.MASTER or parameters[n].dtype != t.dtype}
            if kept:
                tensors[slot] = self.table.to_canonical(kept, f"{self.tag} ({slot.value})", all_needed=False)
        optimizer = None
        if self.options.optimizer and state.steps:
            optimizer = OptimizerState(steps=state.steps, groups=state.groups)
        kept_documents = self._source_documents(state.groups)
        assets = self._assets()
        self.read_files += [*assets.values()]
        return Checkpoint(
            layout="deepspeed",
            root=self.folder,
            spec=self.spec,
            tensors=tensors,
            topology=Topology(
                tp=self.tp if self.tp > 1 and not self.files.universal else None,
                dp=None if self.files.universal else self.ranks,
                zero_stage=None if self.files.universal else self.stage,
                world_size=None if self.files.universal else self.ranks * self.tp,
                universal=self.files.universal,
            ),
            optimizer=optimizer,
            progress=self._progress(),
            assets=assets,
            origin={**kept_documents, "config.json": json.dumps(self.config).encode()}
            if not is_nanotron_config(self.config)
            else {**kept_documents, "model_config.json": json.dumps(self.config).encode()},
            files=tuple(self.read_files),
            warnings=tuple(self.warnings),
            frozen=frozen,
        )

    # --- files ---

    def _model(self, path: Path) -> ModelDocument:
        self.read_files.append(path)
        return read_model_document(path)

    def _found(self, tp: int) -> _Found:
        """One tensor-parallel rank's parameters, from whichever files its stage has."""
        key = next((key for key in self.files.models if key[1] == tp), None)
        if key is None:
            raise MissingShard(
                f"{self.tag}: the model file of tensor-parallel rank {tp} of {self.tp} is missing.\n"
                "Copy it from the training node."
            )
        model = self.first if tp == 0 else self._model(self.files.models[key])
        self._require_same_step(model)
        if model.tp != self.first.tp or 1 < model.tp < self.files.tp:
            raise MixedCheckpoint(
                f"{model.path} is of {model.tp} tensor-parallel ranks, {self.first.path.name} of {self.first.tp}; the "
                f"folder has files of {self.files.tp}.\n"
                "Expected one number of ranks.\n"
                "Files of two checkpoints lie in one folder: copy all of one from the training nodes."
            )
        found = _Found(
            weights={name: tensor for name, tensor in model.module.items() if tensor.numel},
            dtypes={name: tensor.dtype for name, tensor in model.module.items()},
        )
        if self.files.universal:
            return found
        if any(rank == tp for _, rank in self.files.optimizers):
            self._read_zero(model, found, tp)
        elif model.optimizer is not None:
            self._read_zero0(model, found)
        else:
            self._without_state(model, tp)
        return found

    def _require_same_step(self, model: ModelDocument) -> None:
        if model.step != self.first.step:
            raise MixedCheckpoint(
                f"{model.path} is of step {model.step}, but {self.first.path.name} of step {self.first.step}.\n"
                "Files of two checkpoints lie in one folder: copy all of one."
            )

    def _without_state(self, model: ModelDocument, tp: int) -> None:
        stage = model.zero_stage or 0
        if stage == 0 and model.groups is None:
            return  # saved without an optimizer
        bf16 = any(tensor.dtype == "bfloat16" for tensor in model.module.values())
        name = optimizer_file(0, bf16=bf16, tp=tp)
        empty = not any(tensor.numel for tensor in model.module.values())
        if self.options.optimizer or empty:
            raise MissingShard(
                f"{self.tag}: {name} and those of the other ranks are missing, but the model file is of "
                f"ZeRO-{stage or '1/2'} on {model.dp} ranks.\n"
                + ("They hold the weights. Copy them from the training nodes." if empty else
                   f"Copy them from the training nodes, or {_WITHOUT}.")
            )  # fmt: skip
        self.stage = stage
        self.warnings.append("the fp32 masters are not there: parameters are the module's, as it was stored.")

    # --- ZeRO 1 to 3 ---

    def _read_zero(self, model: ModelDocument, found: _Found, tp: int) -> None:
        try:
            documents = self._optimizer_documents(model, tp)
        except MissingShard as error:
            if self.options.optimizer or not found.weights:
                raise
            self.warnings.append(f"{str(error).splitlines()[0]} Parameters are the module's, as it was stored.")
            return
        if model.groups is None:
            raise CorruptFile(f"{model.path} has no param_shapes, so nobody knows what the flat tensors hold.")
        first = documents[0]
        self.stage, self.ranks = first.zero_stage, first.ranks
        model = replace(model, groups=_whole_groups(model.groups, first.members))
        assert model.groups is not None
        groups = first.groups or ({},) * len(model.groups)
        if len(groups) != len(model.groups):
            raise MixedCheckpoint(
                f"{first.path} has {len(groups)} parameter groups, but {model.path.name} names {len(model.groups)}.\n"
                "They may be of different runs."
            )
        if first.zero_stage == 3:
            self._require_model_files(model, found, tp)
            if first.steps and model.step - model.skipped_steps not in first.steps.values():
                self.warnings.append(
                    f"the model files are of step {model.step}, but Adam has made {_steps(first.steps)} steps: it "
                    "began anew in between, or files of two checkpoints are mixed."
                )
            placed = list(self._pieces(model, documents))
        else:
            placed = list(self._slices(model, documents))
        if not any(groups) and first.states:
            self.warnings.append("elastic_checkpoint keeps no hyperparameters: weight decay and the rest are unknown.")
        for slot, name, tensor, step in placed:
            found.slots[slot][name] = tensor
            if step is not None:
                found.steps[name] = step
        found.flat_steps = first.steps
        dealt = model.round_robin and first.zero_stage != 3 and not first.bf16_optimizer
        if dealt and tp == 0:
            self.warnings.append(
                "the run had round_robin_gradients: its groups are carried in the order in which they were given to "
                "the optimizer, and what is written from them loads into a run without it."
            )
        found.groups = tuple(
            ParameterGroup(names=undealt(tuple(names), self.ranks) if dealt else tuple(names), hyperparameters=values)
            for names, values in zip(model.groups, groups)
        )
        self._compare_with_module(model, documents, found)

    def _optimizer_documents(self, model: ModelDocument, tp: int) -> list[OptimizerDocument]:
        paths = {dp: path for (dp, rank), path in self.files.optimizers.items() if rank == tp}
        some = read_optimizer_document(next(iter(paths.values())), with_adam=False)
        bf16 = some.path.name.startswith("bf16_")
        # Counted without a list of all ranks: a damaged number of them would fill the memory.
        if missing := some.ranks - sum(rank < some.ranks for rank in paths):
            first_missing = next(rank for rank in range(some.ranks) if rank not in paths)
            name = optimizer_file(first_missing, bf16=bf16, tp=tp)
            raise MissingShard(
                f"{self.tag}: {missing} of {some.ranks} ranks' optimizer files are missing, the first {name}.\n"
                "Masters and moments are split over all ranks, so none can be rebuilt without it. Copy it from the "
                "training node."
            )
        if extra := [path.name for rank, path in sorted(paths.items()) if rank >= some.ranks]:
            raise MixedCheckpoint(
                f"{self.tag}: {extra[0]} is of no rank of a world of {some.ranks}, as {some.path.name} counts it.\n"
                "Files of two checkpoints lie in one folder: keep those of one."
            )
        if model.dp not in (None, some.ranks):
            raise MixedCheckpoint(
                f"{model.path} is of {model.dp} data-parallel ranks, but {some.path.name} of {some.ranks}.\n"
                "They are of different checkpoints: copy all files of one."
            )
        wanted = [paths[rank] for rank in range(some.ranks)]
        try:
            documents = [read_optimizer_document(path, with_adam=self.options.optimizer) for path in wanted]
        except AnotherOptimizer as error:  # Muon, SGD: the masters are there all the same
            self._leave_out(error)
            documents = [read_optimizer_document(path, with_adam=False) for path in wanted]
        self.read_files += [document.path for document in documents]
        first = documents[0]
        for document in documents[1:]:
            self._require_same_run(first, document)
        return documents

    def _leave_out(self, error: AnotherOptimizer) -> None:
        self.warnings.append(f"{error}: the optimizer's state was left out.")

    def _require_same_run(self, first: OptimizerDocument, other: OptimizerDocument) -> None:
        of = (first.zero_stage, first.ranks, len(first.masters), first.groups, first.alignment_paddings)
        found = (other.zero_stage, other.ranks, len(other.masters), other.groups, other.alignment_paddings)
        if of == found and first.steps == other.steps:
            return
        if first.steps != other.steps:
            what = f"after {_steps(other.steps)} of Adam's steps, but {first.path.name} after {_steps(first.steps)}"
        elif of[:2] != found[:2]:
            what = f"of ZeRO-{found[0]} on {found[1]} ranks, but {first.path.name} of ZeRO-{of[0]} on {of[1]}"
        else:
            what = f"of other parameter groups or hyperparameters than {first.path.name}"
        raise MixedCheckpoint(
            f"{other.path} is {what}.\nFiles of two checkpoints lie in one folder: copy all of one from the training "
            "nodes."
        )

    def _slices(
        self, model: ModelDocument, documents: Sequence[OptimizerDocument]
    ) -> Iterator[tuple[Slot, str, LazyTensor, float | None]]:
        """ZeRO 1 and 2: (slot, name, tensor, Adam's step)."""
        assert model.groups is not None
        first = documents[0]
        if len(first.masters) != len(model.groups):
            raise MixedCheckpoint(
                f"{first.path} holds {len(first.masters)} flat groups, but {model.path.name} names {len(model.groups)}."
            )
        for index, group in enumerate(model.groups):
            where = f"{self.tag}: group {index}"
            aligned = first.alignment_paddings
            paddings = aligned[index] if aligned is not None else (0,) * len(group)
            if len(paddings) != len(group):
                raise MixedCheckpoint(f"{where}: paddings of {len(paddings)} parameters, names of {len(group)}.")
            check_paddings([prod(shape) for shape in group.values()], paddings, f"{first.path}: group {index}")
            step, flat = self._flat(documents, index)
            _check_group_paddings(documents, index, flat)
            for slot, slices in flat.items():
                names = zip(group, join_group(slices, list(group.values()), paddings, f"{where} ({slot.value})"))
                for name, tensor in names:
                    yield slot, name, tensor, step if slot is Slot.EXP_AVG else None

    def _pieces(
        self, model: ModelDocument, documents: Sequence[OptimizerDocument]
    ) -> Iterator[tuple[Slot, str, LazyTensor, float | None]]:
        """ZeRO-3: the same, from sub-groups."""
        assert model.groups is not None
        first = documents[0]
        for index, (group, indices) in enumerate(zip(model.groups, first.members)):
            where = f"{self.tag}: group {index}"
            if not group:
                continue
            lengths = [first.masters[i].numel for i in indices]
            places = match_sub_groups([prod(shape) for shape in group.values()], len(documents), lengths, where)
            flats = [self._flat(documents, i) for i in indices]
            for sub, i in enumerate(indices):
                for slot, parts in flats[sub][1].items():
                    if {part.numel for part in parts} != {lengths[sub]}:
                        raise ShapeMismatch(f"{where}: {slot.value} of sub-group {i} differs in length between ranks.")
            for (name, shape), (sub, offset) in zip(group.items(), places):
                step, flat = flats[sub]
                size = piece_numel(prod(shape), len(documents))
                for slot, parts in flat.items():
                    pieces = [flat_slice(part, offset, offset + size) for part in parts]
                    yield slot, name, join_pieces(pieces, shape), step if slot is Slot.EXP_AVG else None

    def _flat(
        self, documents: Sequence[OptimizerDocument], index: int
    ) -> tuple[float | None, dict[Slot, list[LazyTensor]]]:
        """Adam's step and the ranks' flat tensors of one group or sub-group."""
        flat: dict[Slot, list[LazyTensor]] = {Slot.MASTER: [document.masters[index] for document in documents]}
        if documents[0].states is None:
            return None, flat
        states = [(document.states or {}).get(index) for document in documents]
        # Without any state it was saved before the first step: Adam begins with zeros.
        begun = any(document.states for document in documents)
        if not begun:
            flat |= {slot: [Zeros(shape=t.shape, dtype=t.dtype) for t in flat[Slot.MASTER]] for slot in MOMENTS}
        there = [state for state in states if state is not None]
        if begun and len(there) < len(documents):
            path = documents[states.index(None)].path
            raise CorruptFile(
                f"{path}: Adam's state of flat tensor {index} is missing.\n"
                "Expected it there: other flat tensors, or this one on other ranks, have theirs.\n"
                f"Copy the file again, or {_WITHOUT}."
            )
        if begun:
            flat |= {slot: [state.moments[slot] for state in there] for slot in MOMENTS}
        for slot, parts in flat.items():
            if other := next((i for i, part in enumerate(parts) if part.dtype != parts[0].dtype), None):
                raise MixedCheckpoint(
                    f"{documents[other].path}: {slot.value} of flat tensor {index} is {parts[other].dtype}, but "
                    f"{parts[0].dtype} in {documents[0].path.name}.\n"
                    "Expected one dtype on all ranks.\n"
                    "The file is damaged, or of another checkpoint: copy all of one from the training nodes."
                )
        return (there[0].step if begun else 0.0), flat

    def _require_model_files(self, model: ModelDocument, found: _Found, tp: int) -> None:
        """ZeRO-3 writes one model file a rank: nothing but pieces of frozen parameters is in the others."""
        others: list[ModelDocument] = []
        seen: set[bytes] = set()
        for rank in range(self.ranks):
            path = self.files.models.get((rank, tp))
            if path is None:
                raise MissingShard(
                    f"{self.tag}: the model file of rank {rank} of {self.ranks} is missing "
                    f"(zero_pp_rank_{rank}_mp_rank_{tp:02d}_model_states.pt).\nCopy it from the training node."
                )
            if not model.frozen_fragments and path != model.path:
                # Parsing 384 of them takes seconds, and all but the first say the same.
                pickled = read_pickle_bytes(path)
                if pickled in seen:
                    self.read_files.append(path)
                    continue
                seen.add(pickled)
            other = model if path == model.path else self._model(path)
            self._require_same_step(other)
            self._require_same_parameters(model, other)
            others.append(other)
        for name, shape in model.frozen_shapes.items():
            if name not in model.frozen_fragments:
                continue
            fragments = [other.frozen_fragments[name] for other in others if name in other.frozen_fragments]
            size = piece_numel(prod(shape), self.ranks)
            if len(fragments) < self.ranks or {f.numel for f in fragments} != {size}:
                raise MixedCheckpoint(
                    f"{self.tag}: the ranks' model files hold {[f.numel for f in fragments]} elements of {name}.\n"
                    f"Expected {size:,} in each of {self.ranks}, since {name} is {list(shape)}.\n"
                    "Files of two checkpoints are mixed: copy all of one from the training nodes."
                )
            found.weights[name] = join_pieces(fragments, shape)

    def _require_same_parameters(self, model: ModelDocument, other: ModelDocument) -> None:
        """Names, shapes and order are taken from the first rank's model file, so the others must say the same."""
        mine, found = (
            {
                "param_shapes": [item for group in document.groups or () for item in group.items()],
                "frozen_param_shapes": document.frozen_shapes,
                "module": {name: (tensor.shape, tensor.dtype) for name, tensor in document.module.items()},
                "dp_world_size": document.dp,
                "mp_world_size": document.tp,
                "global_samples": document.samples,
                "skipped_steps": document.skipped_steps,
            }
            for document in (model, other)
        )
        if different := [key for key in mine if mine[key] != found[key]]:
            raise MixedCheckpoint(
                f"{other.path}: {different[0]} is not that of {model.path.name}.\n"
                "Expected the same names, shapes, order and counts in every rank's model file.\n"
                "Files of two checkpoints are mixed: copy all of one from the training nodes."
            )

    def _compare_with_module(self, model: ModelDocument, documents: Sequence[OptimizerDocument], found: _Found) -> None:
        """A file of another step or rank gives itself away: the module's weights are not the rounded masters.

        A few elements are compared where each parameter and each rank's slice begins, so that shifted and exchanged
        ones are noticed too.
        """
        masters = found.slots[Slot.MASTER]
        for group, flat in zip(model.groups or (), documents[0].masters):
            names = [name for name in group if name in found.weights]
            ends = list(accumulate(masters[name].numel for name in names))
            if self.stage == 3 or not names:
                continue
            places = [(name, 0) for name in names]
            for rank in range(self.ranks if len(names) == len(group) else 0):
                begin = min(rank * flat.numel, ends[-1] - 1)
                index = bisect_right(ends, begin)
                places.append((names[index], begin - (ends[index] - masters[names[index]].numel)))
            for name, at in places:
                weight, master = found.weights[name], masters[name]
                if weight.shape != master.shape or not alike(weight, master, at, _COMPARED):
                    raise MixedCheckpoint(
                        f"{model.path} is of step {model.step}, Adam has made {_steps(documents[0].steps)} "
                        f"steps in {documents[0].path.name}, and {name} is not its rounded master.\n"
                        "Files of two checkpoints are mixed, or ranks' files swapped: copy all of one from the "
                        "training nodes.\nFor the model file alone, move the others away and pass --no-optimizer."
                    )

    # --- ZeRO-0 ---

    def _read_zero0(self, model: ModelDocument, found: _Found) -> None:
        """Adam's state lies in the model file: by parameter, numbered through the groups, without names."""
        state = model.optimizer
        assert state is not None
        path = model.path
        if "fp32_groups_flat" in state:
            self._read_fused_zero0(model, found)
            return
        with understood(f"{path} (optimizer)"):
            masters: list[Stored] = []
            inner = state
            if "fp32_groups" in state:  # FP16_UnfusedOptimizer, which serves bf16 too
                inner = state["optimizer_state_dict"]
                masters = [stored(t, f"{path}: a master") for group in state["fp32_groups"] for t in group]
            groups = inner["param_groups"]
            states = self._zero0_states(inner, path)
            if not states and not masters:
                return
            for tensor in masters:
                check_dtype(Slot.MASTER, tensor.dtype, f"{path}: a master")
            indices = numbered(groups, path)
            numbers = [index for group in indices for index in group]
            values = tuple(hyperparameters(group, f"{path}: group {i}") for i, group in enumerate(groups))
        if masters and len(masters) != len(numbers):
            raise CorruptFile(f"{path}: {len(masters)} masters of {len(numbers)} parameters.")
        entries = {
            index: Unnamed(
                shape=(
                    masters[position].shape
                    if masters
                    else states[index].moments[Slot.EXP_AVG].shape
                    if index in states
                    else None
                ),
                master=masters[position] if masters else None,
            )
            for position, index in enumerate(numbers)
        }
        if model.groups is not None:
            if [len(group) for group in model.groups] != [len(group) for group in indices]:
                raise CorruptFile(f"{path}: param_shapes names other groups than the optimizer's {len(indices)}.")
            names = {i: name for group, own in zip(indices, model.groups) for i, name in zip(group, own)}
        else:
            named = name_by_order(found.weights, model.module, indices, entries)
            if named is None:
                _require_undamaged(path)
                self.warnings.append(
                    f"ZeRO-0 stores Adam's state without names, and its {len(numbers)} entries fit the parameters in "
                    "more than one way (some are frozen, or the groups' order is not the model's): it was left out."
                )
                return
            names = named
            taken = set(names.values())
            if (
                not masters
                and len(groups) > 1
                and [names[i] for i in numbers] == [name for name in model.module if name in taken]
            ):
                self.warnings.append(
                    f"ZeRO-0 stores Adam's state without names: its {len(groups)} groups were taken to follow each "
                    "other in the model's order, as their shapes do."
                )
        for index, name in names.items():
            if masters and (master := entries[index].master) is not None:
                found.slots[Slot.MASTER][name] = master
            if index in states:
                found.steps[name] = states[index].step
                for slot, tensor in states[index].moments.items():
                    found.slots[slot][name] = tensor
        found.groups = tuple(
            # What has no state after a step is frozen, though it was given to the optimizer.
            ParameterGroup(names=tuple(names[i] for i in group if i in states or not states), hyperparameters=hyper)
            for group, hyper in zip(indices, values)
        )

    def _zero0_states(self, adam: Mapping[str, Any], path: Path) -> dict[int, AdamState]:
        try:
            return adam_states(adam["state"], adam["param_groups"], path) if self.options.optimizer else {}
        except AnotherOptimizer as error:
            self._leave_out(error)
            return {}

    def _read_fused_zero0(self, model: ModelDocument, found: _Found) -> None:
        """``FP16_Optimizer``, around one of DeepSpeed's fused Adams: each group flat and unpadded, without names."""
        path = model.path
        with understood(f"{path} (optimizer)"):
            state: Mapping[str, Any] = model.optimizer or {}
            flats = [stored(tensor, f"{path}: flat group {i}") for i, tensor in enumerate(state["fp32_groups_flat"])]
            groups = state["optimizer_state_dict"]["param_groups"]
            states = self._zero0_states(state["optimizer_state_dict"], path)
            values = [hyperparameters(group, f"{path}: group {i}") for i, group in enumerate(groups)]
            for i, flat in enumerate(flats):
                check_dtype(Slot.MASTER, flat.dtype, f"{path}: flat group {i}")
            adam = [states.get(index) for group in numbered(groups, path) for index in group]
        if not len(adam) == len(groups) == len(flats):
            raise CorruptFile(f"{path}: {len(groups)} groups have {len(adam)} states and {len(flats)} flat masters.")
        if any(t.numel != flat.numel for own, flat in zip(adam, flats) if own for t in own.moments.values()):
            raise CorruptFile(f"{path}: Adam's flat moments are not of the length of their masters.")
        places = place_by_order(found.weights, model.module, flats)
        if places is None:
            _require_undamaged(path)
            self.warnings.append(
                "ZeRO-0 stores Adam's state without names, and its flat masters fit the parameters in no way or in "
                "more than one: it was left out."
            )
            return
        for name, (g, start) in places.items():
            weight, own = found.weights[name], adam[g]
            tensors = {Slot.MASTER: flats[g], **(own.moments if own else {})}
            for slot, flat in tensors.items():
                found.slots[slot][name] = flat_slice(flat, start, start + weight.numel, weight.shape)
            if own:
                found.steps[name] = own.step
        found.groups = tuple(
            ParameterGroup(names=tuple(name for name, (g, _) in places.items() if g == index), hyperparameters=hyper)
            for index, hyper in enumerate(values)
        )

    # --- universal ---

    def _read_universal(self, found: _Found) -> None:
        model, zero = self.first, self.tag / "zero"
        common = UniversalDocument(groups=(), members=(), steps=())
        if (zero / "optimizer_state.pt").is_file():
            common = read_universal_document(zero / "optimizer_state.pt")
            self.read_files.append(zero / "optimizer_state.pt")
        elif self.options.optimizer:
            raise MissingFile(
                f"{zero / 'optimizer_state.pt'} is missing: it holds the parameter groups.\n"
                f"Copy it from the source, or {_WITHOUT}."
            )
        if model.groups is not None:
            model = replace(model, groups=_whole_groups(model.groups, common.members))
        if model.frozen_fragments and (None, 0) not in self.files.models:
            self.ranks = len(self.files.models)
            self._require_model_files(model, found, 0)
        there = {entry.name for entry in zero.iterdir() if entry.is_dir()}
        grouped = [name for group in model.groups or () for name in group]
        wanted = grouped or [name for name in self.shapes if name in there]
        if absent := [name for name in wanted if name not in there]:
            raise MissingShard(
                f"{zero}: {len(absent)} of {len(wanted)} parameters are missing, the first {absent[0]}.\n"
                "Copy its folder from the source."
            )
        for name in wanted:
            self._read_universal_parameter(zero / name, name, model, found)
        # What is in no group is frozen; DeepSpeed's tool writes fp32.pt alone for a tied head and its embedding.
        for name in sorted(there.difference(wanted)):
            if name in self.shapes:
                path = zero / name / "fp32.pt"
                found.weights.setdefault(name, self._universal_tensor(path, Slot.MASTER, self.shapes[name]))
            elif name not in {**model.shared, **self.table.aliases}:
                raise NameMismatch(f"{zero / name} is the folder of no parameter of the config. Check that it belongs.")
        if self.options.optimizer:
            self._universal_groups(model, common, found, wanted)
        wrong = [
            n
            for n, t in found.slots[Slot.MASTER].items()
            if n in found.weights and not starts_alike(found.weights[n], t)
        ]
        if wrong:
            raise MixedCheckpoint(
                f"{zero}: fp32.pt of {len(wrong)} parameters ({_some(wrong)}) is not what {model.path.name} holds.\n"
                "Files of two checkpoints are mixed, or ds_to_universal made it from a run with round_robin_gradients, "
                "which it scrambles: convert the ZeRO checkpoint itself."
            )

    def _read_universal_parameter(self, folder: Path, name: str, model: ModelDocument, found: _Found) -> None:
        shape = next((group[name] for group in model.groups or () if name in group), self.shapes.get(name))
        files = {Slot.MASTER: "fp32", Slot.EXP_AVG: "exp_avg", Slot.EXP_AVG_SQ: "exp_avg_sq"}
        for slot, stem in files.items():
            if slot is not Slot.MASTER and not self.options.optimizer:
                continue
            found.slots[slot][name] = self._universal_tensor(folder / f"{stem}.pt", slot, shape)
        if self.options.optimizer and (folder / "step.pt").is_file():
            found.steps[name] = read_universal_step(folder / "step.pt")
            self.read_files.append(folder / "step.pt")

    def _universal_tensor(self, path: Path, slot: Slot, shape: tuple[int, ...] | None) -> LazyTensor:
        if not path.is_file():
            raise MissingShard(f"{path} is missing. Copy it from the source.")
        self.read_files.append(path)
        tensor = read_universal_tensor(path)
        check_dtype(slot, tensor.dtype, path)
        return reshape(tensor, shape) if shape is not None and tensor.shape == (prod(shape),) else tensor

    def _universal_groups(
        self, model: ModelDocument, common: UniversalDocument, found: _Found, names: Sequence[str]
    ) -> None:
        groups: Sequence[Sequence[str]] = [list(group) for group in model.groups or ()]
        if not groups and len(common.groups) == 1:
            groups = [names]
        if len(groups) != len(common.groups):
            raise MixedCheckpoint(
                f"{self.tag / 'zero' / 'optimizer_state.pt'} has {len(common.groups)} parameter groups, but "
                f"{model.path.name} names {len(groups)}.\nCopy both from one source, or {_WITHOUT}."
            )
        for group, step in zip(groups, common.steps):
            for name in group:
                if name not in found.steps and step is None:
                    raise CorruptFile(f"{self.tag}: Adam's step of {name} is nowhere. {_WITHOUT.capitalize()}.")
                found.steps.setdefault(name, 0.0 if step is None else step)
            if group and (other := next((n for n in group if found.steps[n] != found.steps[group[0]]), None)):
                raise MixedCheckpoint(
                    f"{self.tag}: Adam has made {found.steps[other]:g} steps with {other}, but "
                    f"{found.steps[group[0]]:g} with {group[0]} of the same group.\n"
                    f"Files of two checkpoints are mixed: copy all of one, or {_WITHOUT}."
                )
        found.groups = tuple(
            ParameterGroup(names=tuple(group), hyperparameters=values) for group, values in zip(groups, common.groups)
        )

    # --- names and what is missing ---

    def _canonical_names(self, state: _Found) -> _Found:
        """Without the prefix that a wrapper (torch.compile, a module around the model) puts before every name."""
        known, embedding = [*state.weights, *state.slots[Slot.MASTER]], "model.embed_tokens.weight"
        prefix = next((name.removesuffix(embedding) for name in known if name.endswith(embedding)), "")
        if not prefix:
            return state
        self.warnings.append(f"parameters are named {prefix}model...: the prefix was taken away.")

        def short(name: str) -> str:
            return name.removeprefix(prefix)

        return _Found(
            weights={short(name): tensor for name, tensor in state.weights.items()},
            dtypes={short(name): dtype for name, dtype in state.dtypes.items()},
            slots={slot: {short(n): t for n, t in by_name.items()} for slot, by_name in state.slots.items()},
            steps={short(name): step for name, step in state.steps.items()},
            groups=tuple(replace(group, names=tuple(map(short, group.names))) for group in state.groups),
        )

    def _complete(self, state: _Found) -> tuple[str, ...]:
        """Give every parameter its weights: stored, rounded from the master, or the base's. Returns what is frozen."""
        masters = state.slots[Slot.MASTER]
        default = next(iter(state.dtypes.values()), None) or next((t.dtype for t in masters.values()), "float32")
        aliases = {**self.table.aliases, **self.first.shared}
        for name, master in masters.items():
            dtype = state.dtypes.get(name, default)
            if dtype == master.dtype:
                state.weights[name] = master
            elif name not in state.weights:
                state.weights[name] = cast(master, dtype)
        grouped = {name for group in state.groups for name in group.names} or set(masters)
        for name in [name for name in state.weights if name in aliases and name not in self.shapes]:
            # A frozen tied head may be all that was stored of its embedding.
            state.weights.setdefault(aliases[name], state.weights[name])
        missing = [name for name in self.shapes if name not in state.weights]
        if missing and self.base is not None:
            for name in missing:
                if name not in self.base.parameters or self.base.parameters[name].shape != self.shapes[name]:
                    raise NameMismatch(
                        f"--base {self.base.root} has no {name} of {list(self.shapes[name])}, which {self.tag} "
                        "left out.\nName the checkpoint that this training began with."
                    )
                tensor = self.base.parameters[name]
                if tensor.dtype != default:
                    self.warnings.append(f"{name} comes from the base as {tensor.dtype}; the checkpoint is {default}.")
                state.weights[name] = cast(tensor, default)
            self.warnings.append(f"{len(missing)} weights come from {self.base.root}: {_some(missing)}.")
        elif missing and len(missing) < len(self.shapes):
            raise NameMismatch(
                f"{self.tag} has no weights of {len(missing)} parameters: {_some(missing)}.\n"
                "They were frozen and left out when it was saved (exclude_frozen_parameters), or the config is another "
                "model's. Supply the checkpoint that training began with by --base PATH."
            )
        has_groups = bool(state.groups) or bool(masters)
        return tuple(name for name in self.shapes if name not in grouped) if has_groups else ()

    # --- documents ---

    def _progress(self) -> TrainingProgress:
        first, mine = self.first, self.first.client_state.get(CLIENT_KEY)
        progress = TrainingProgress(step=first.step, consumed_samples=first.samples)
        known = mine.get("progress") if isinstance(mine, Mapping) else None
        if known is not None:
            with understood(f"{first.path} ({CLIENT_KEY}: progress)"):
                stages = tuple(DataStage(**stage) for stage in known.get("stages") or ())
                carried = TrainingProgress(**{**known, "stages": stages})
            if carried.step == first.step:
                progress = carried
        return check_progress(progress, first.path)

    def _source_documents(self, groups: Sequence[ParameterGroup]) -> dict[str, bytes]:
        """The documents of the layout it came from, and what DeepSpeed alone knows, as ``deepspeed.json``."""
        kept: dict[str, bytes] = {}
        folder = self.tag.parent / SOURCE_DOCUMENTS
        if folder.is_dir():
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                kept[path.name] = read_bytes(path)
                self.read_files.append(path)
        client, dropped = {}, []
        for key, value in self.first.client_state.items():
            if key == CLIENT_KEY:
                continue
            try:
                client[key] = plain(value)
            except ValueError:
                dropped.append(key)
        if dropped:
            self.warnings.append(f"client_state: {_some(dropped)} cannot be carried (tensors or objects).")
        mine = self.first.client_state.get(CLIENT_KEY)
        own: dict[str, Any] = {
            "client_state": client,
            "skipped_steps": self.first.skipped_steps,
            "groups": [{"names": list(g.names), "hyperparameters": dict(g.hyperparameters)} for g in groups],
            "weights_only": isinstance(mine, Mapping) and mine.get("weights_only") is True and self.first.step == 0,
        }
        try:
            own["lr_scheduler"] = plain(self.first.lr_scheduler)
        except ValueError:
            self.warnings.append("the learning-rate scheduler's state holds objects and was left out.")
        kept["deepspeed.json"] = json.dumps(own).encode()
        return kept

    def _assets(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in (self.tag, self.tag.parent):
            for name in ASSET_NAMES:
                if name not in found and (folder / name).is_file():
                    found[name] = folder / name
        return found


def _require_undamaged(path: Path) -> None:
    """Before values that fit nothing are left out: they may be damaged. Raises ``DigestMismatch``."""
    refuse_seals(path, archive_seals([path]), 1)


# --- configs ---------------------------------------------------------------------------------------------------------


def _find_config(folder: Path, tag: Path, override: Path | None, model: ModelDocument) -> tuple[dict[str, Any], str]:
    """--config, then the tag folder, beside ``latest``, the run folder's parent, and the client_state."""
    if override is not None:
        return read_json(override), str(override)
    looked = list(dict.fromkeys([tag, tag.parent, tag.parent.parent]))
    for place in looked:
        path = place / "config.json"
        if path.is_file():
            config = read_json(path)
            if "hidden_size" in config:
                return config, str(path)
    for key, value in model.client_state.items():
        for name, config in ((key, value), *(value.items() if isinstance(value, dict) else ())):
            if isinstance(config, dict) and "hidden_size" in config and "num_hidden_layers" in config:
                try:
                    return plain(config), f"{model.path} (client_state: {name})"
                except ValueError:
                    continue
    raise MissingFile(
        f"{folder} holds no model config: DeepSpeed saves none. Looked for config.json in "
        f"{', '.join(map(str, looked))} and in the client_state.\n"
        "Put the model's config.json beside latest, or pass it (or nanotron's model_config.json) with --config."
    )


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def _join_tensor_parallel(found: Sequence[_Found], shapes: Mapping[str, tuple[int, ...]], where: str) -> _Found:
    """AutoTP: each parameter is cut on the one dimension in which the ranks' shapes fall short of the model's."""
    if len(found) == 1:
        return found[0]
    first = found[0]
    for rank, other in enumerate(found):
        if other.dtypes != first.dtypes:
            raise MixedCheckpoint(
                f"{where}: the model file of tensor-parallel rank {rank} has other names or dtypes than rank 0's.\n"
                "Expected the same on all ranks.\n"
                "Files of two checkpoints lie in one folder: copy all of one from the training nodes."
            )
        same_steps = (other.steps, other.flat_steps) == (first.steps, first.flat_steps)
        if not same_steps or other.groups != first.groups:
            what = "parameter groups or hyperparameters" if same_steps else "Adam's steps"
            raise MixedCheckpoint(
                f"{where}: the optimizer files of tensor-parallel rank {rank} hold other {what} than those of rank 0.\n"
                "Files of two checkpoints lie in one folder: copy all of one from the training nodes."
            )
    aliases = {"lm_head.weight": shapes.get("model.embed_tokens.weight", ())}

    def joined(by_rank: Sequence[Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
        result: dict[str, LazyTensor] = {}
        for name in dict.fromkeys(name for rank in by_rank for name in rank):
            shards = [rank[name] for rank in by_rank if name in rank]
            if len(shards) != len(by_rank):
                raise MixedCheckpoint(f"{where}: {name} is not on every tensor-parallel rank.")
            shape = shapes.get(name) or aliases.get(name)
            # A name that the config does not know is refused later, under that name.
            result[name] = shards[0] if shape is None else _join_shards(shards, shape, f"{where}: {name}")
        return result

    return _Found(
        weights=joined([rank.weights for rank in found]),
        dtypes=first.dtypes,
        slots={slot: joined([rank.slots[slot] for rank in found]) for slot in first.slots},
        steps=first.steps,
        groups=first.groups,
    )


def _join_shards(shards: Sequence[LazyTensor], shape: tuple[int, ...], where: str) -> LazyTensor:
    if other := next((rank for rank, shard in enumerate(shards) if shard.dtype != shards[0].dtype), None):
        raise MixedCheckpoint(
            f"{where} is {shards[other].dtype} on tensor-parallel rank {other}, but {shards[0].dtype} on rank 0.\n"
            "Expected one dtype on all ranks.\n"
            "The file is damaged, or of another checkpoint: copy all of one from the training nodes."
        )
    if all(shard.shape == shape for shard in shards):
        # Replicated: norms. A config with too small a dimension makes a shard look whole, too, so they are compared;
        # shards differ in the first chunk, and replicas of these models are a few KB.
        other = next((rank for rank, shard in enumerate(shards) if not equal(shard, shards[0])), None)
        if other is None:
            return shards[0]
        raise ShapeMismatch(
            f"{where} is {list(shape)} by the config and on each of {len(shards)} tensor-parallel ranks, but rank "
            f"{other} holds other values than rank 0.\n"
            "Expected the same on all ranks, or shards that make the config's shape together.\n"
            "Check the config (num_key_value_heads, num_attention_heads, intermediate_size, vocab_size), or copy all "
            "files of one checkpoint."
        )
    if all(len(shard.shape) == len(shape) for shard in shards):
        rows = sum(shard.shape[0] for shard in shards)
        if rows == shape[0] and all(shard.shape[1:] == shape[1:] for shard in shards):
            return join(shards)
        if len(shape) == 2 and all(shard.shape[0] == shape[0] for shard in shards):
            columns = sum(shard.shape[1] for shard in shards)
            if columns == shape[1]:
                return join_columns(shards)
    raise ShapeMismatch(
        f"{where}: {[list(shard.shape) for shard in shards]} on the tensor-parallel ranks do not make {list(shape)}.\n"
        "Check that the config belongs to this checkpoint."
    )


def _check_group_paddings(
    documents: Sequence[OptimizerDocument], index: int, flat: Mapping[Slot, Sequence[LazyTensor]]
) -> None:
    """Raise ``CorruptFile`` where a rank's ``group_paddings`` contradict the lengths of its slices of a group.

    The masters are stored without the padding, the moments with it; ``BF16_Optimizer`` and elastic checkpoints store
    both alike.
    """
    sizes = {part.numel for slot in MOMENTS for part in flat.get(slot, ())}
    if len(sizes) != 1:
        return  # moments were not asked for, or an elastic checkpoint left their padding out
    (size,) = sizes
    for document, master in zip(documents, flat[Slot.MASTER]):
        padding = None if document.group_paddings is None else document.group_paddings[index]
        stripped = size - master.numel
        if padding is not None and (padding > size or stripped not in (0, padding)):
            raise CorruptFile(
                f"{document.path}: group_paddings of group {index} is {padding:,}; its slice has {size:,} elements.\n"
                f"Expected {stripped:,}: the master of that slice has {master.numel:,} elements.\n"
                "The file is damaged, or of another checkpoint: copy all of one from the training nodes."
            )


def _whole_groups(
    groups: Sequence[Mapping[str, tuple[int, ...]]], members: Sequence[Sequence[int]]
) -> tuple[Mapping[str, tuple[int, ...]], ...]:
    """ZeRO-3 lists ``param_shapes`` by sub-group; joined to the optimizer's groups, which name their sub-groups."""
    if sorted(i for group in members for i in group) != list(range(len(groups))):
        return tuple(groups)
    return tuple({name: shape for i in group for name, shape in groups[i].items()} for group in members)


def _steps(steps: Mapping[int, float]) -> str:
    return " and ".join(f"{step:g}" for step in sorted(set(steps.values()))) or "no"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
