"""nanotron as a layout: what the registry lists."""

from __future__ import annotations

from pathlib import Path

from smolconv.checkpoint import Checkpoint
from smolconv.layouts.layout import Layout, OwnFiles, ReadOptions
from smolconv.layouts.listing import ASSET_PATTERN
from smolconv.layouts.nanotron import listing
from smolconv.layouts.nanotron.reader import read_nanotron
from smolconv.layouts.nanotron.writer import NanotronOptions, plan_nanotron


def _own_files(folder: Path) -> OwnFiles:
    read_nanotron(folder, ReadOptions(check_sidecar=False))  # whose list of files is whatever lies in a step's folder
    return OwnFiles(
        pattern=(
            rf"latest\.txt|{ASSET_PATTERN}|(\d+/)?(model_config\.json|config\.yaml|checkpoint_metadata\.json|"
            r"(model|optimizer|lr_scheduler|random|smolconv_assets)/.*\.(safetensors|pt|json|jinja|model|txt))"
        ),
        step=listing.find_step_folder(folder, None),
        beside=rf"{listing.ASSETS}/({ASSET_PATTERN})",
    )


def _without_adam(checkpoint: Checkpoint) -> str | None:
    frozen = len(checkpoint.frozen)
    return f"nanotron's optimizer cannot hold {frozen} frozen parameters" if frozen else None


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
    without_adam=_without_adam,
)
