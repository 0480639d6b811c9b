"""Which layouts there are: detect one, read a checkpoint of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint
from smolconv.errors import BadCheckpoint, MissingFile, UnknownLayout, UsageError
from smolconv.files import noting_files
from smolconv.layouts.deepspeed import listing as deepspeed
from smolconv.layouts.deepspeed import read_deepspeed
from smolconv.layouts.dtypes import check_dtypes
from smolconv.layouts.huggingface import listing as huggingface
from smolconv.layouts.huggingface.huggingface import read_huggingface
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.listing import AnyPath, Listing
from smolconv.layouts.nanotron import listing as nanotron
from smolconv.layouts.nanotron import read_nanotron
from smolconv.storage.atomic import INCOMPLETE
from smolconv.tensors.lazy import close_thread_files

#: In the order in which a folder is shown to them.
LISTINGS: Mapping[str, Listing] = {"huggingface": huggingface, "nanotron": nanotron, "deepspeed": deepspeed}


def layout_of(folder: AnyPath) -> str | None:
    """The layout of a folder on disk or on the Hub, by its names alone; None for no checkpoint."""
    return next((layout for layout, listing in LISTINGS.items() if listing.detect(folder)), None)


def detect_layout(folder: Path) -> str:
    """Raise ``UnknownLayout`` with what was looked for, ``MissingFile`` when nothing is there.

    The result is "nanotron", "huggingface" or "deepspeed".
    """
    if not folder.exists():
        raise MissingFile(f"{folder} is not there. Check the path; Hub repositories are written hf://owner/name.")
    if not folder.is_dir():
        raise UnknownLayout(f"{folder} is a file; a checkpoint is a folder.\n{_hint(folder)}")
    if (folder / INCOMPLETE).exists():
        raise BadCheckpoint(f"{folder} was being published when smolconv was interrupted. Convert it again.")
    layout = layout_of(folder)
    if layout is not None:
        return layout
    raise UnknownLayout(
        f"{folder} is not a checkpoint that smolconv knows: neither config.json beside weights (Hugging Face), nor "
        "latest.txt or model_config.json (nanotron), nor latest or *_model_states.pt (DeepSpeed) is there."
    )


def _hint(path: Path) -> str:
    if path.suffix == ".gguf":
        return "For a GGUF file use: smolconv import-gguf FILE OUT"
    return f"Name the folder that holds it: {path.parent}"


def read_checkpoint(folder: Path, options: ReadOptions = ReadOptions()) -> Checkpoint:  # noqa: B008
    """Read a checkpoint of any layout, headers only. Raises ``BadCheckpoint`` and its kind."""
    with noting_files() as opened:
        checkpoint = _read(folder, options)
    return replace(checkpoint, opened=dict(opened))


def _read(folder: Path, options: ReadOptions) -> Checkpoint:
    layout = detect_layout(folder)
    if options.base is not None and layout != "deepspeed":
        raise UsageError(f"--base supplies weights that a DeepSpeed checkpoint left out; {folder} is {layout}.")
    if layout == "huggingface":
        return check_dtypes(read_huggingface(folder, options))
    if layout == "nanotron":
        return check_dtypes(read_nanotron(folder, options))
    base = None if options.base is None else read_checkpoint(options.base, ReadOptions(optimizer=False))
    try:
        return check_dtypes(read_deepspeed(folder, options, base))
    finally:
        close_thread_files()  # reading steps opened them; a file that is replaced later must be opened anew
