"""Hugging Face as a layout: what the registry lists."""

from __future__ import annotations

from pathlib import Path

from smolconv.layouts.huggingface import listing
from smolconv.layouts.huggingface.reader import read_huggingface
from smolconv.layouts.huggingface.writer import HuggingFaceOptions, plan_huggingface
from smolconv.layouts.layout import Layout, OwnFiles, ReadOptions
from smolconv.layouts.listing import ASSET_PATTERN


def _own_files(folder: Path) -> OwnFiles:
    files = read_huggingface(folder, ReadOptions(check_sidecar=False)).files
    return OwnFiles(
        names=frozenset(path.relative_to(folder).as_posix() for path in files),
        pattern=(
            rf"{ASSET_PATTERN}|.*\.index\.json|(modeling|configuration|tokenization)_\w+\.py|\.cache/huggingface/.*"
        ),
    )


HUGGINGFACE = Layout(
    name="huggingface",
    words=("hf", "huggingface"),
    title="Hugging Face",
    signs="config.json with weights",
    listing=listing,
    detect_with_config=listing.has_weights,
    lacking=listing.lacking,
    read=lambda folder, options, base: read_huggingface(folder, options),
    own_files=_own_files,
    options=HuggingFaceOptions,
    plan=plan_huggingface,
)
