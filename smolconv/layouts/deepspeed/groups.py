"""The optimizer that a DeepSpeed checkpoint must hold: parameter groups in the target run's order, masters, moments.

DeepSpeed never compares names: it assigns a checkpoint's flat tensors to the running engine's groups in order. So
the written groups must be those of the run that continues.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import MOMENTS, Checkpoint, EngineRecord, OptimizerState, ParameterGroup, Slot
from smolconv.errors import CorruptFile, UnsupportedModel, UsageError, counted, some_of
from smolconv.files import read_bytes
from smolconv.layouts.documents import is_number
from smolconv.models.family import Family
from smolconv.models.registry import family_of
from smolconv.parsing import parse_json
from smolconv.tensors.lazy import LazyTensor, Zeros, cast

#: Fields that torch.optim.AdamW stores in a group, and ``bias_correction``, which DeepSpeed's own Adams read.
_ADAMW: Mapping[str, Any] = {
    "lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False,
    "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
    "bias_correction": True,
}  # fmt: skip
#: Implementation switches of Adam that do not change its results: the engine's choice, not the checkpoint's.
_EXECUTION = ("foreach", "capturable", "differentiable", "fused")
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """One entry of a --groups file."""

    names: tuple[str, ...]
    pattern: re.Pattern[str] | None
    values: Mapping[str, Any]

    def takes(self, name: str) -> bool:
        return name in self.names or (self.pattern is not None and self.pattern.search(name) is not None)


def with_adam(checkpoint: Checkpoint, *, groups: Path | None, zero_stage: int | None) -> Checkpoint:
    """The checkpoint as DeepSpeed holds it: fp32 masters, moments (zero without a source), groups, steps.

    ``zero_stage`` is None for universal. ZeRO-3 and universal store only masters, so there the weights are the
    rounded masters.

    Raises ``UsageError`` for a ``groups`` file that does not fit the model, ``UnsupportedModel`` for a state that the
    groups cannot hold.
    """
    warnings = list(checkpoint.warnings)
    trained = [name for name in checkpoint.parameters if name not in checkpoint.frozen]
    known = checkpoint.optimizer if checkpoint.has_optimizer else None
    own = checkpoint.source.engine or EngineRecord()
    if known is not None and (lost := [name for name in trained if name not in known.steps]):
        raise CorruptFile(f"{checkpoint.root}: Adam's state has no {some_of(lost)}. Pass --no-optimizer.")
    family = family_of(checkpoint.spec)
    if groups is not None:
        found = _from_file(groups, trained, known)
    elif known is not None:
        found = list(known.groups)
    elif own.groups:
        found = list(own.groups)
        warnings.append(f"moments are zero and steps 0; the {len(found)} groups are the source's.")
    else:
        found = _default_groups(checkpoint, trained)
        spared = " and ".join(title for name, title in family.undecayed.items() if name in trained)
        warnings.append(
            f"the source has no Adam state: moments are zero and steps 0; {counted(len(found), 'group')} "
            f"{'was' if len(found) == 1 else 'were'} made, {f'{spared} undecayed, the rest' if spared else 'all'} "
            f"with weight decay {family.weight_decay:g} {family.decay_source} (--groups FILE.json chooses)."
        )
    if zero_stage != 3:  # only ZeRO-3's engine counts a group that is entirely frozen
        found = [group for group in found if group.names]
    if zero_stage is not None:  # a rank's file replaces the running optimizer's groups, so it must be complete
        found = _in_full(found, family, warnings)
    if checkpoint.source.engine is None:
        found = [
            replace(group, hyperparameters={**group.hyperparameters, **{k: _ADAMW[k] for k in _EXECUTION}})
            for group in found
        ]
    steps = {name: 0.0 if known is None else known.steps[name] for name in trained}
    schedule = own.lr_scheduler
    lists = isinstance(schedule, Mapping) and any(isinstance(value, list) for value in schedule.values())
    if known is None or (lists and len(found) != len(known.groups)):  # the lists follow the source's groups
        schedule = None
    weights_only = known is None and not checkpoint.tensors.get(Slot.MASTER)
    scaler = None if known is None else own.loss_scaler
    own = replace(own, weights_only=weights_only, groups=(), lr_scheduler=schedule, loss_scaler=scaler)
    return replace(
        checkpoint,
        tensors=_tensors(checkpoint, trained, moments_known=known is not None, zero_stage=zero_stage),
        source=replace(checkpoint.source, engine=own),
        optimizer=OptimizerState(steps=steps, groups=tuple(found)),
        progress=None if known is None else checkpoint.progress,
        warnings=tuple(warnings),
    )


def _in_full(groups: Sequence[ParameterGroup], family: Family, warnings: list[str]) -> list[ParameterGroup]:
    """With every hyperparameter that torch's AdamW stores."""
    if any("lr" not in group.hyperparameters for group in groups):
        warnings.append("no learning rate is known: 0 is stored, until the run's schedule sets one.")
    if any("weight_decay" not in group.hyperparameters for group in groups):
        known = f"{family.weight_decay:g} is stored, {family.decay_source}"
        warnings.append(f"no weight decay is known: {known} (--groups FILE.json chooses).")
    return [
        replace(group, hyperparameters={**_ADAMW, "weight_decay": family.weight_decay, **group.hyperparameters})
        for group in groups
    ]


def _tensors(
    checkpoint: Checkpoint, trained: Sequence[str], *, moments_known: bool, zero_stage: int | None
) -> dict[Slot, dict[str, LazyTensor]]:
    """fp32 masters and moments of all trained parameters, and the weights, rounded if nothing else stores them."""
    tensors = {slot: dict(by_name) for slot, by_name in checkpoint.tensors.items() if by_name}
    masters = tensors.get(Slot.MASTER, {})
    rounded = {name for name in trained if checkpoint.parameters[name].dtype != "float32"}
    tensors[Slot.MASTER] = {
        name: cast(masters.get(name, checkpoint.parameters[name]), "float32")
        for name in trained
        if name in rounded or name in masters
    }
    for slot in MOMENTS:
        moments = tensors.get(slot, {}) if moments_known else {}
        tensors[slot] = {
            name: cast(moments[name], "float32") if name in moments
            else Zeros(shape=checkpoint.parameters[name].shape, dtype="float32")
            for name in trained
        }  # fmt: skip
    if zero_stage in (None, 3):
        tensors[Slot.PARAMETER] = {
            name: cast(tensors[Slot.MASTER].get(name, tensor), tensor.dtype)
            for name, tensor in checkpoint.parameters.items()
        }
    if not tensors[Slot.MASTER]:
        del tensors[Slot.MASTER]
    return tensors


def _default_groups(checkpoint: Checkpoint, trained: Sequence[str]) -> list[ParameterGroup]:
    """The parameters that the family's pretraining decays, and those that it does not, if any."""
    family = family_of(checkpoint.spec)
    rest, undecayed = ([name for name in trained if (name in family.undecayed) == spared] for spared in (False, True))
    return [
        ParameterGroup(names=tuple(names), hyperparameters={"weight_decay": value})
        for names, value in ((rest, family.weight_decay), (undecayed, 0.0))
        if names
    ]


def master(checkpoint: Checkpoint, name: str) -> LazyTensor:
    """The fp32 weights that Adam updates: the master, or the parameter itself if it is fp32."""
    found = checkpoint.tensors.get(Slot.MASTER, {}).get(name, checkpoint.parameters[name])
    return cast(found, "float32")


def one_step(optimizer: OptimizerState, names: Sequence[str]) -> float:
    """Adam's step of a group, whose flat tensor has one. Raises ``UnsupportedModel`` if its parameters disagree."""
    steps = {optimizer.steps[name] for name in names}
    if len(steps) > 1:
        a, b = sorted(steps)[:2]
        raise UnsupportedModel(
            f"Adam has made {a:g} steps with some parameters of a group and {b:g} with others, but ZeRO keeps one step "
            "per group. Separate them with --groups FILE.json, or pass --no-optimizer."
        )
    return steps.pop() if steps else 0.0


def common_values(groups: Sequence[ParameterGroup]) -> dict[str, Any]:
    """The hyperparameters that all groups share.

    A universal load into ZeRO-3 gives every group the first's hyperparameters (measured). With only these, it keeps
    the running engine's own weight decay.
    """
    return _agreed([group.hyperparameters for group in groups])


def _from_file(path: Path, trained: Sequence[str], known: OptimizerState | None) -> list[ParameterGroup]:
    rules = _read_rules(path)
    members: list[list[str]] = [[] for _ in rules]
    for name in trained:
        index = next((i for i, rule in enumerate(rules) if rule.takes(name)), None)
        if index is None:
            raise UsageError(f"--groups {path}: {name} is in no group. The last one may hold the regex '.*'.")
        members[index].append(name)
    groups = []
    for i, (rule, names) in enumerate(zip(rules, members)):
        if unknown := [name for name in rule.names if name not in trained]:
            raise UsageError(f"--groups {path}: group {i} names {unknown[0]}, which is not a trained parameter.")
        if not names:
            raise UsageError(f"--groups {path}: no parameter is in group {i}.")
        if taken := [name for name in rule.names if name not in names or rule.names.count(name) > 1]:
            raise UsageError(f"--groups {path}: group {i} names {taken[0]}, which is named twice.")
        order = list(rule.names) or names
        carried = _agreed([known.hyperparameters(name) for name in names]) if known is not None else {}
        groups.append(ParameterGroup(names=tuple(order), hyperparameters={**carried, **rule.values}))
    return groups


def _agreed(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in values[0].items() if all(other.get(key) == value for other in values)}


def _read_rules(path: Path) -> list[_Rule]:
    try:
        document = parse_json(read_bytes(path))
    except ValueError as error:
        raise UsageError(f"--groups {path} is not valid JSON ({error}).") from None
    expected = 'a list of {"names": [...] or "regex": "...", "weight_decay": 0.1}'
    if not isinstance(document, list) or not document:
        raise UsageError(f"--groups {path} holds {json.dumps(document)[:60]}; expected {expected}.")
    rules = []
    for i, entry in enumerate(document):
        where = f"--groups {path}: group {i}"
        if not isinstance(entry, dict) or ("names" in entry) == ("regex" in entry):
            raise UsageError(f"{where}: expected {expected}.")
        names, regex = entry.get("names", []), entry.get("regex")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{where}: names must be a list of parameter names.")
        if unknown := [key for key in entry if key not in ("names", "regex", *_GROUP_KEYS)]:
            raise UsageError(f"{where}: {unknown[0]} is not known; {', '.join(_GROUP_KEYS)} can be given.")
        values = {key: entry[key] for key in _GROUP_KEYS if key in entry}
        for key, value in values.items():
            betas = key == "betas" and isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
            if not betas and (key == "betas" or not is_number(value)):
                raise UsageError(f"{where}: {key} is {json.dumps(value)[:40]}; expected a number (betas: two).")
            values[key] = tuple(value) if betas else value
        try:
            pattern = None if regex is None else re.compile(regex)
        except (re.error, TypeError) as error:
            raise UsageError(f"{where}: regex {regex!r:.60} cannot be used ({error}).") from None
        rules.append(_Rule(names=tuple(names), pattern=pattern, values=values))
    return rules
