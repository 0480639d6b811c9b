"""Parses and checks DeepSpeed's files, without layout arithmetic; reads no tensors except scalars.

Model files and ``zero/<name>/*.pt`` are plain. Optimizer files name three of DeepSpeed's classes, which stand-ins
replace, and schedules leave numpy's numbers there; no other name in a pickle is accepted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import MOMENTS, Slot
from smolconv.errors import CorruptFile, MixedCheckpoint, UnsupportedModel
from smolconv.layouts.deepspeed.files import MODEL, OPTIMIZER
from smolconv.layouts.documents import (
    adam_step,
    check_plain,
    corrupt_if_malformed,
    is_count,
    is_number,
    is_world,
    refuse_adapter,
    with_tuples,
)
from smolconv.layouts.dtypes import check_dtype
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.storage.torch_archive.harmless import HARMLESS, NumpyNumber, native
from smolconv.storage.torch_archive.records import shown
from smolconv.storage.torch_archive.values import ArchiveTensor, DtypeRef, Opaque, PickledObject, TorchSize
from smolconv.tensors.lazy import LazyTensor, Stored, Zeros
from smolconv.tensors.reading import pread

#: DeepSpeed's own keys of a model file; all other keys come from the user's ``client_state``.
MODEL_KEYS = frozenset(
    ("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
     "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
     "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
     "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info", "autoep_layers",
     "ds_autoep_layers", "num_experts")
)  # fmt: skip
#: The key of ``client_state`` under which smolconv's writer stores data that DeepSpeed cannot hold.
CLIENT_KEY = "smolconv"
#: Keys of a model file without objects. Below any other key they may be a user's (argparse's); DeepSpeed's own data
#: sampler, which we do not read, stores numpy's random state.
PLAIN_KEYS = MODEL_KEYS - {"data_sampler"} | {CLIENT_KEY}
#: How an error ends if the weights can be read without the damaged part.
WITHOUT = "pass --no-optimizer to convert the weights only"
#: The version whose format we write; it was tested with this version.
DEEPSPEED_VERSION = "0.19.8"
_ZIP_HEADER_BYTES = 30  #: of a local file header, before the name
_SLOTS = {"exp_avg": Slot.EXP_AVG, "exp_avg_sq": Slot.EXP_AVG_SQ}


class AnotherOptimizer(UnsupportedModel):
    """The state is not Adam's but undamaged: the weights can be read without it."""


class _StandIn:
    """Stands in for one of DeepSpeed's objects; keeps the arguments and state that it was made from."""

    def __init__(self, *args: object) -> None:
        self.args = args


STAND_INS: Mapping[tuple[str, str], Callable[..., object]] = {
    **HARMLESS,
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): _StandIn,
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): _StandIn,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _StandIn,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): _StandIn,
}


#: The state of a DynamicLossScaler by default: the defaults of DeepSpeed's ``fp16``.
SCALER_DEFAULTS: Mapping[str, Any] = {
    "cur_iter": 0, "last_overflow_iter": -1, "scale_factor": 2.0, "scale_window": 1000, "min_scale": 1,
    "delayed_shift": 2, "cur_hysteresis": 2, "consecutive_hysteresis": False, "raise_error_at_min_scale": True,
}  # fmt: skip


def loss_scaler(known: Mapping[str, Any] | None = None) -> PickledObject:
    """The object for a ``scaler_state``; by default a static scale of 1, which bf16 and fp32 engines have."""
    module, state = "deepspeed.runtime.fp16.loss_scaler", {"cur_scale": 1.0, "dynamic": False, **(known or {})}
    if not state["dynamic"]:
        return PickledObject(module=module, name="LossScaler", args=(state["cur_scale"],), state=state)
    state = {**SCALER_DEFAULTS, **state, "dtype": DtypeRef("float16")}
    args = ("cur_scale", "scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis")
    return PickledObject(module=module, name="DynamicLossScaler", args=tuple(state[name] for name in args), state=state)


def scaler_state(found: object, where: object) -> dict[str, Any] | None:
    """The plain attributes of a stored loss scaler, or of what ZeRO-0 stores for one; None if it scales nothing."""
    values = vars(found) if isinstance(found, _StandIn) else found
    if not isinstance(values, Mapping):
        return None
    wanted = ("cur_scale", "dynamic", *SCALER_DEFAULTS)
    state = {
        name: value if isinstance(value, (bool, int)) else number(value, f"{where}: {name} of the loss scaler")
        for name in wanted if (value := values.get(name)) is not None
    }  # fmt: skip
    if strange := [name for name, value in state.items() if not isinstance(value, bool) and not is_number(value)]:
        raise CorruptFile(
            f"{where}: {strange[0]} of the loss scaler is {state[strange[0]]!r:.60}.\nExpected a finite number.\n"
            f"The file is damaged: copy it again, or {WITHOUT}."
        )
    if not state.get("cur_scale") or (state["cur_scale"] == 1 and not state.get("dynamic")):
        return None
    return state


def zero_stage_enum(stage: int) -> PickledObject:
    return PickledObject(module="deepspeed.runtime.zero.config", name="ZeroStageEnum", args=(stage,))


def fragment_address(numel: int, start: int) -> PickledObject:
    return PickledObject(
        module="deepspeed.utils.tensor_fragment", name="fragment_address", args=(numel, start),
        state={"numel": numel, "start": start},
    )  # fmt: skip


def stored(tensor: object, where: object) -> Stored:
    """A tensor of an archive as a range of the file."""
    if not isinstance(tensor, ArchiveTensor) or not tensor.is_contiguous:
        raise CorruptFile(f"{where} is not a contiguous tensor.")
    return Stored(path=tensor.path, offset=tensor.offset, shape=tensor.shape, dtype=tensor.dtype)


def number(value: object, where: object) -> float:
    """A number, as Python's or as a tensor of one element. Raises ``CorruptFile``."""
    if isinstance(value, ArchiveTensor):
        tensor = stored(value, where)
        form = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}.get(tensor.dtype)
        if tensor.numel != 1 or form is None:
            raise CorruptFile(f"{where} is {list(tensor.shape)} of {tensor.dtype}, expected one number.")
        (value,) = struct.unpack(form, tensor.raw_bytes())
    value = native(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CorruptFile(f"{where} is {value!r:.60}, expected a number.")
    return float(value)


# --- model files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelDocument:
    """One model file."""

    path: Path
    module: Mapping[str, Stored]  #: by DeepSpeed's names; elements are missing at ZeRO-3: shape (0,)
    groups: tuple[Mapping[str, tuple[int, ...]], ...] | None  #: name -> shape, in the order of the flat tensors
    shared: Mapping[str, str]  #: alias -> name
    frozen_shapes: Mapping[str, tuple[int, ...]]
    frozen_fragments: Mapping[str, Stored]
    optimizer: Mapping[str, Any] | None  #: of ZeRO-0
    step: int
    skipped_steps: int
    samples: int
    dp: int | None
    tp: int  #: tensor-parallel ranks, each with its own files
    lr_scheduler: object
    zero_stage: int | None  #: by the run's own ds_config
    data_state: tuple[str, ...]  #: DeepSpeed's own states of the data, by key
    #: Its flat order assigns parameters to ranks in turn; the groups' own order differs. None: its ds_config, which
    #: older versions stored as a path, does not say.
    round_robin: bool | None
    client_state: Mapping[str, Any]  #: as given by the user; anything but plain data is an ``Opaque``
    ds_version: str | None


def read_model_document(path: Path) -> ModelDocument:
    """Parse a model file. Raises ``CorruptFile`` if it is not one."""
    document = _mapping(path, ("module", "global_steps"), plain_keys=PLAIN_KEYS)
    with corrupt_if_malformed(path):
        module = {str(name): stored(tensor, f"{path}: {name}") for name, tensor in (document["module"] or {}).items()
                  if isinstance(tensor, ArchiveTensor)}  # fmt: skip
        refuse_adapter(map(str, document["module"] or ()), path)
        for name, tensor in module.items():
            check_dtype(Slot.PARAMETER, tensor.dtype, f"{path}: {name}")
        shapes = document.get("param_shapes")
        names = [name for group in shapes or () for name in group]
        if len(set(names)) != len(names):
            raise CorruptFile(f"{path}: param_shapes names {next(n for n in names if names.count(n) > 1)} twice.")
        fragments = document.get("frozen_param_fragments") or {}
        config = document.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        found = ModelDocument(
            path=path,
            module=module,
            groups=tuple(_shapes(group, path) for group in shapes) if shapes else None,
            shared={str(alias): str(name) for alias, name in (document.get("shared_params") or {}).items()},
            frozen_shapes=_shapes(document.get("frozen_param_shapes") or {}, path),
            frozen_fragments={name: stored(tensor, f"{path}: {name}") for name, tensor in fragments.items()},
            optimizer=document.get("optimizer"),
            step=document["global_steps"],
            skipped_steps=document.get("skipped_steps") or 0,
            samples=document.get("global_samples") or 0,
            dp=document.get("dp_world_size"),
            tp=document.get("mp_world_size") or 1,
            lr_scheduler=native(document.get("lr_scheduler")),
            zero_stage=stage if is_count(stage) else None,
            data_state=tuple(key for key in ("data_sampler", "random_ltd") if document.get(key) is not None),
            round_robin=zero.get("round_robin_gradients") is True if isinstance(zero, dict) else None,
            client_state={key: value for key, value in document.items() if key not in MODEL_KEYS},
            ds_version=document.get("ds_version"),
        )
        for name, tensor in found.frozen_fragments.items():
            check_dtype(Slot.PARAMETER, tensor.dtype, f"{path}: the fragment of {name}")
        if not isinstance(found.optimizer, (dict, type(None))):
            raise CorruptFile(f"{path}: optimizer is {type(found.optimizer).__name__}; expected a mapping.")
    for name, value in (("global_steps", found.step), ("skipped_steps", found.skipped_steps),
                        ("global_samples", found.samples)):  # fmt: skip
        if not is_count(value):
            raise CorruptFile(f"{path}: {name} is {value!r:.60}; expected a whole number, 0 or more.")
    for name, value in (("dp_world_size", found.dp or 1), ("mp_world_size", found.tp)):
        if not is_world(value):
            raise CorruptFile(f"{path}: {name} is {value!r:.60}; expected the number of ranks.")
    return found


def _shapes(group: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {str(name): tuple(shape) for name, shape in group.items()}
    if not all(is_count(size) for shape in shapes.values() for size in shape):
        raise CorruptFile(f"{path}: param_shapes holds something that is not a shape.")
    return shapes


# --- optimizer files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """Adam's state of one flat tensor (or, in ZeRO-0, of one parameter)."""

    step: float
    moments: Mapping[Slot, Stored]


@dataclass(frozen=True, kw_only=True)
class OptimizerDocument:
    """One rank's optimizer file."""

    path: Path
    zero_stage: int
    bf16_optimizer: bool  #: ``BF16_Optimizer``, a ZeRO-1 that does not store its stage
    ranks: int
    masters: tuple[Stored, ...]  #: one flat tensor per group (ZeRO 1 and 2) or per sub-group (ZeRO-3)
    states: Mapping[int, AdamState] | None  #: by the same indices; None if not requested
    steps: Mapping[int, float]  #: the optimizer's, by the same indices, if it counts them
    groups: tuple[Mapping[str, Any], ...]  #: hyperparameters
    members: tuple[tuple[int, ...], ...]  #: indices of each group's flat tensors
    alignment_paddings: tuple[tuple[int, ...], ...] | None  #: after each parameter of each group
    group_paddings: tuple[int, ...] | None  #: at the end of this rank's slice of each group
    loss_scaler: Mapping[str, Any] | None  #: as ``scaler_state`` gives it
    mapped: tuple[tuple[str, ...], ...]  #: names of each group in ``param_slice_mappings``, in the group's own order


def read_optimizer_document(path: Path, *, with_adam: bool) -> OptimizerDocument:
    """Parse an optimizer file of any ZeRO stage or of ``BF16_Optimizer``. Raises ``CorruptFile`` if it is not one."""
    document = _mapping(path, ("optimizer_state_dict",))
    with corrupt_if_malformed(path):
        state = document["optimizer_state_dict"]
        counts = state["partition_count"]
        counts = counts if isinstance(counts, list) and counts else [counts]
        ranks = counts[0]
        # One per group; only experts are spread over different ranks than the rest.
        if not is_world(ranks) or any(type(count) is not int or count != ranks for count in counts):
            raise CorruptFile(f"{path}: partition_count is {counts!r:.60}; expected the number of ranks.")
        bf16_optimizer = "zero_stage" not in state
        stage = 1 if bf16_optimizer else _stage(state["zero_stage"], path)
        masters = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        masters = tuple(stored(tensor, f"{path}: flat group {i}") for i, tensor in enumerate(masters))
        for i, master in enumerate(masters):
            check_dtype(Slot.MASTER, master.dtype, f"{path}: flat group {i}")
        base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        if isinstance(base, list):  # elastic_checkpoint: a list of states, and no hyperparameters
            states, groups = dict(enumerate(base)), [{"params": [i]} for i in range(len(base))]
            if "base_optimizer_state_step" in state:
                states = {i: {"step": state["base_optimizer_state_step"], **found} for i, found in states.items()}
        else:
            states, groups = base["state"], base["param_groups"]
        alignment = _paddings(state, "param_alignment_paddings", len(masters), path)
        group_paddings = _paddings({"group_paddings": [state.get("group_paddings")]}, "group_paddings", 1, path)
        if group_paddings and len(group_paddings[0]) != len(masters):
            raise CorruptFile(f"{path}: group_paddings has {len(group_paddings[0])} groups; there are {len(masters)}.")
        members = numbered(groups, path)
        if members != tuple((i,) for i in range(len(members))) and stage != 3:
            raise CorruptFile(f"{path}: its groups hold the flat tensors {members!r:.60}; expected one each.")
        if sum(map(len, members)) != len(masters):
            raise CorruptFile(
                f"{path}: the groups name {sum(map(len, members))} flat tensors, but {len(masters)} are there."
            )
        return OptimizerDocument(
            path=path,
            zero_stage=stage,
            bf16_optimizer=bf16_optimizer,
            ranks=ranks,
            masters=masters,
            states=adam_states(states, groups, path) if with_adam else None,
            steps={i: number(state["step"], f"{path}: step") for i, state in states.items() if "step" in state},
            groups=tuple(hyperparameters(group, f"{path}: group {i}") for i, group in enumerate(groups)),
            members=members,
            alignment_paddings=alignment,
            group_paddings=None if group_paddings is None else group_paddings[0],
            loss_scaler=scaler_state(state.get("loss_scaler"), path),
            mapped=tuple(tuple(map(str, names)) for names in state.get("param_slice_mappings") or ()),
        )


def numbered(groups: Sequence[Mapping[str, Any]], path: Path) -> tuple[tuple[int, ...], ...]:
    """Each group's ``params``: torch numbers them from 0, across all groups. Raises ``CorruptFile`` otherwise."""
    members = tuple(tuple(group["params"]) for group in groups)
    numbers = [index for group in members for index in group]
    if not all(map(is_count, numbers)) or numbers != list(range(len(numbers))):
        raise CorruptFile(
            f"{path}: the parameters of its groups are numbered {numbers!r:.60}.\n"
            f"Expected 0 to {len(numbers) - 1} in order, as torch numbers them.\n"
            "The file is damaged: copy it again."
        )
    return members


def _paddings(state: Mapping[str, Any], key: str, groups: int, path: Path) -> tuple[tuple[int, ...], ...] | None:
    """Lists of paddings by group; None if the version that wrote the file had none."""
    found = state.get(key)
    if found is None or found == [None]:
        return None
    paddings = tuple(tuple(group) for group in found)
    if len(paddings) != groups:
        raise CorruptFile(f"{path}: {key} has {len(paddings)} groups, but there are {groups}.")
    if not all(is_count(count) for group in paddings for count in group):
        raise CorruptFile(
            f"{path}: {key} is {found!r:.60}.\nExpected whole numbers, 0 or more.\nThe file is damaged: copy it again."
        )
    return paddings


def _stage(value: object, path: Path) -> int:
    stage = value.args[0] if isinstance(value, _StandIn) and value.args else value
    if type(stage) is not int or stage not in (1, 2, 3):
        raise CorruptFile(f"{path}: zero_stage is {stage!r:.60}; expected 1, 2 or 3.")
    return stage


def adam_states(
    states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], path: Path
) -> dict[int, AdamState]:
    """Adam's state by index. Raises ``AnotherOptimizer`` for another optimizer's."""
    found: dict[int, AdamState] = {}
    # Some of DeepSpeed's compiled optimizers count their steps in the group.
    group_steps = {index: group["step"] for group in groups if "step" in group for index in group["params"]}
    for index, state in states.items():
        unknown = set(state) - {"step", *_SLOTS}
        if unknown or not set(_SLOTS) <= set(state):
            raise AnotherOptimizer(
                f"{path.name} holds {', '.join(sorted(map(str, state)))}; only Adam's exp_avg and exp_avg_sq are read"
            )
        where = f"{path}: flat tensor {index}"
        step = adam_step(number(state.get("step", group_steps.get(index)), where), where)
        moments = {slot: stored(state[key], f"{path}: {key} of {index}") for key, slot in _SLOTS.items()}
        for slot, tensor in moments.items():
            check_dtype(slot, tensor.dtype, f"{path}: {slot.value} of {index}")
        found[index] = AdamState(step=step, moments=moments)
    return found


def hyperparameters(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A group without its parameters, as plain values."""
    plain: dict[str, Any] = {
        str(key): number(value, f"{where}: {key}") if isinstance(value, ArchiveTensor) else native(value)
        for key, value in group.items()
        if key not in ("params", "step", "param_names")
    }
    check_plain(plain, where)
    return with_tuples(plain)


# --- universal -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UniversalDocument:
    """``zero/optimizer_state.pt``: what all ranks have in common."""

    groups: tuple[Mapping[str, Any], ...]
    members: tuple[tuple[int, ...], ...]  #: indices of each group's flat tensors, in the source
    steps: tuple[float | None, ...]  #: by group; None if only a parameter's ``step.pt`` has it
    loss_scaler: Mapping[str, Any] | None = None


def read_universal_document(path: Path) -> UniversalDocument:
    document = _mapping(path, ())
    with corrupt_if_malformed(path):
        inner = document.get("optimizer_state_dict") or {}
        groups = document.get("param_groups") or inner.get("param_groups") or []
        states, steps = inner.get("state") or {}, []
        for group in groups:
            state = next((states[i] for i in group.get("params") or () if i in states), states.get(0)) or {}
            steps.append(adam_step(number(state["step"], path), path) if "step" in state else None)
        return UniversalDocument(
            groups=tuple(hyperparameters(group, f"{path}: group {i}") for i, group in enumerate(groups)),
            members=_universal_members(groups, path),
            steps=tuple(steps),
            loss_scaler=scaler_state(document.get("loss_scaler"), path),
        )


def _universal_members(groups: Sequence[Mapping[str, Any]], path: Path) -> tuple[tuple[int, ...], ...]:
    """Numbers of flat tensors in the source; ``ds_to_universal`` leaves them out, or keeps those of one rank."""
    members = tuple(tuple(group.get("params") or ()) for group in groups)
    if not all(is_count(index) for group in members for index in group):
        raise CorruptFile(f"{path}: a parameter group holds {members!r:.60}; expected numbers of parameters.")
    return members


def read_universal_tensor(path: Path) -> Stored:
    """One tensor of ``zero/<name>/``: ``{"param": tensor}`` from ZeRO 1 and 2, a bare vector from ZeRO-3."""
    value = read_torch_archive(path, allow=STAND_INS)
    if isinstance(value, dict):
        if value.get("is_expert_param") or value.get("sub_param_shape") is not None:
            raise UnsupportedModel(f"{path} is an expert's or a fused parameter, which these models do not have.")
        value = value.get("param")
    return stored(value, path)


def read_universal_step(path: Path) -> float:
    return adam_step(number(read_torch_archive(path, allow=STAND_INS), path), path)


def _mapping(path: Path, keys: Sequence[str], plain_keys: Collection[str] | None = None) -> dict[str, Any]:
    document = read_torch_archive(path, allow=STAND_INS, plain_keys=plain_keys)
    if not isinstance(document, dict) or not set(keys) <= set(document):
        raise CorruptFile(f"{path} is not a file of DeepSpeed: it has no {' and '.join(keys) or 'entries'}.")
    _require_own_rank(path)
    return document


def _require_own_rank(path: Path) -> None:
    """Raise ``MixedCheckpoint`` for a file of another rank: the folder in torch's archive has the name it was saved by.

    Nothing else in the files of ZeRO-3 and AutoTP says whose they are. An archive written to a buffer has no such name.
    """
    head = bytearray(_ZIP_HEADER_BYTES)
    pread(path, 0, memoryview(head))
    name = bytearray(int.from_bytes(head[26:28], "little") if head.startswith(b"PK\3\4") else 0)
    pread(path, len(head), memoryview(name))
    saved = name.partition(b"/")[0].decode(errors="replace") + ".pt"
    for pattern in (MODEL, OPTIMIZER):
        own, other = pattern.fullmatch(path.name), pattern.fullmatch(saved)
        if own and other and any(own[of] and other[of] and int(own[of]) != int(other[of]) for of in ("dp", "tp")):
            raise MixedCheckpoint(
                f"{path} was saved as {saved}.\n"
                "Expected the file of its own rank: ranks' files were swapped, or one was copied to another's name.\n"
                "Copy all files of one checkpoint from the training nodes."
            )


def plain(value: object) -> Any:
    """The parts of a client_state that JSON can hold; raises ``ValueError`` with the name of any other part."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key is not text")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, TorchSize):
        return [plain(item) for item in value]
    if isinstance(value, TorchSize):
        return list(value)
    if value is None or isinstance(value, (bool, int, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    if isinstance(value, Opaque):
        raise ValueError(shown(value.asked))
    if isinstance(value, NumpyNumber):
        raise ValueError("a numpy scalar")
    raise ValueError("a tensor" if isinstance(value, ArchiveTensor) else f"a {type(value).__name__}")


def flat_tensors(
    documents: Sequence[OptimizerDocument], index: int
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
            f"Copy the file again, or {WITHOUT}."
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
