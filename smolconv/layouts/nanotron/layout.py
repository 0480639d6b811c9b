"""nanotron as a layout: what the registry lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint, OptimizerState, Slot
from smolconv.layouts.layout import Layout, OwnFiles, ReadOptions
from smolconv.layouts.listing import ASSET_PATTERN
from smolconv.layouts.nanotron import listing
from smolconv.layouts.nanotron.optimizer import stands_for
from smolconv.layouts.nanotron.reader import read_nanotron
from smolconv.layouts.nanotron.writer import NanotronOptions, plan_nanotron
from smolconv.models.nanotron import without_place
from smolconv.tensors.lazy import Zeros


def _own_files(folder: Path) -> OwnFiles:
    read_nanotron(folder, ReadOptions(check_sidecar=False))  # it lists every file of a step's folder
    return OwnFiles(
        pattern=(
            rf"latest\.txt|{ASSET_PATTERN}|(\d+/)?(model_config\.json|config\.yaml|checkpoint_metadata\.json|"
            r"(model|optimizer|lr_scheduler|random|smolconv_assets)/.*\.(safetensors|pt|json|jinja|model|txt))"
        ),
        step=listing.find_step_folder(folder, None),
        beside=rf"{listing.ASSETS}/({ASSET_PATTERN})",
    )


def _without_adam(checkpoint: Checkpoint) -> str | None:
    frozen = len(set(checkpoint.frozen) - set(without_place(checkpoint.spec)))
    return f"nanotron's optimizer cannot hold {frozen} frozen parameters" if frozen else None


def _prepare(checkpoint: Checkpoint, options: NanotronOptions) -> Checkpoint:
    """Add the state of parameters that nanotron cannot hold, which a run has kept at zero."""
    own = checkpoint.optimizer
    held = [name for name in without_place(checkpoint.spec) if own is not None and name not in own.steps]
    if own is None or not held or not checkpoint.has_optimizer:
        return checkpoint
    near = {name: stands_for(name) for name in held}
    tensors = {
        slot: {**found, **{name: Zeros(shape=checkpoint.parameters[name].shape, dtype="float32") for name in held}}
        if found and slot is not Slot.PARAMETER else found
        for slot, found in checkpoint.tensors.items()
    }  # fmt: skip
    groups = tuple(
        replace(group, names=(*group.names, *(name for name in held if near[name] in group.names)))
        for group in own.groups
    )
    state = OptimizerState(steps={**own.steps, **{name: own.steps[near[name]] for name in held}}, groups=groups)
    return replace(checkpoint, tensors=tensors, optimizer=state, frozen=())


NANOTRON = Layout(
    name="nanotron",
    words=("nanotron",),
    title="nanotron",
    signs="latest.txt or model_config.json",
    listing=listing,
    read=lambda folder, options, base: read_nanotron(folder, options),
    own_files=_own_files,
    options=NanotronOptions,
    plan=plan_nanotron,
    prepare=_prepare,
    without_adam=_without_adam,
    without_place=without_place,
)
