"""DeepSpeed as a layout: what the registry lists."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from smolconv.errors import MissingFile
from smolconv.layouts.deepspeed import listing
from smolconv.layouts.deepspeed.groups import with_adam
from smolconv.layouts.deepspeed.programs import PROGRAM_PATTERN
from smolconv.layouts.deepspeed.reader import read_deepspeed
from smolconv.layouts.deepspeed.writer import DeepSpeedOptions, plan_deepspeed
from smolconv.layouts.layout import Layout, OwnFiles, ReadOptions
from smolconv.layouts.listing import ASSET_PATTERN


def _own_files(folder: Path) -> OwnFiles:
    with suppress(MissingFile):  # runs hold no config of the model
        read_deepspeed(folder, ReadOptions(check_sidecar=False))
    return OwnFiles(
        names=frozenset(
            f"{listing.SOURCE_DOCUMENTS}/{path.name}"
            for path in folder.glob(f"{listing.SOURCE_DOCUMENTS}/*")
            if re.fullmatch(r"[\w.]+", path.name)  # the names of our writer's documents
        ),
        pattern=(
            rf"latest|latest_universal|([^/]+/)?({ASSET_PATTERN}|zero_to_(fp32|torch)\.py|{PROGRAM_PATTERN}|"
            r"(\w*zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt|"
            r"zero/(optimizer_state|[^/]+/(fp32|exp_avg|exp_avg_sq|step))\.pt)"
        ),
        step=listing.find_tag_folder(folder, None),
        beside=ASSET_PATTERN,
    )


DEEPSPEED = Layout(
    name="deepspeed",
    words=("deepspeed", "ds"),
    title="DeepSpeed",
    signs="latest or *_model_states.pt",
    listing=listing,
    read=read_deepspeed,
    own_files=_own_files,
    options=DeepSpeedOptions,
    plan=plan_deepspeed,
    prepare=lambda checkpoint, options: with_adam(checkpoint, groups=options.groups, zero_stage=options.zero_stage),
    of_an_engine=True,
    takes_base=True,
)
