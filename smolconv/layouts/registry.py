"""Which layouts there are: detect one, read a checkpoint of it."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint
from smolconv.errors import BadCheckpoint, UnknownLayout, UnsupportedModel, UsageError
from smolconv.files import noting_files, unreadable
from smolconv.layouts.deepspeed.layout import DEEPSPEED
from smolconv.layouts.dtypes import check_dtypes
from smolconv.layouts.huggingface.layout import HUGGINGFACE
from smolconv.layouts.layout import Layout, ReadOptions
from smolconv.layouts.listing import AnyPath
from smolconv.layouts.nanotron.layout import NANOTRON
from smolconv.models.registry import family_named
from smolconv.storage.atomic import INCOMPLETE
from smolconv.tensors.reading import close_thread_files

#: A folder that could be read as several is the first of them.
LAYOUTS: tuple[Layout, ...] = (HUGGINGFACE, NANOTRON, DEEPSPEED)
#: By what ``--to`` calls them.
BY_WORD = {word: layout for layout in LAYOUTS for word in layout.words}


def detect_layout(folder: Path) -> Layout:
    """Raise ``UnknownLayout`` with what was looked for, ``MissingFile`` when nothing is there."""
    try:
        found = folder.stat()
    except OSError as error:
        raise unreadable(folder, error, "Check the path; Hub repositories are written hf://owner/name.") from None
    if not stat.S_ISDIR(found.st_mode):
        raise UnknownLayout(f"{folder} is a file; a checkpoint is a folder.\n{_hint(folder)}")
    if (folder / INCOMPLETE).exists():
        raise BadCheckpoint(f"{folder} was being published when smolconv was interrupted. Convert it again.")
    if layout := layout_of(folder):
        return layout
    raise UnknownLayout(f"{folder} is not a checkpoint that smolconv knows: neither {signs(', nor ')} is there.")


def layout_of(folder: AnyPath) -> Layout | None:
    """The layout of a folder on disk or on the Hub, by its names alone; None for no checkpoint."""
    return next((layout for layout in LAYOUTS if layout.listing.detect(folder)), None)


def signs(between: str) -> str:
    """What each layout is recognised by, for people."""
    return between.join(f"{layout.signs} ({layout.title})" for layout in LAYOUTS)


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
    asked = None if options.architecture is None else family_named(options.architecture).name
    checkpoint = check_dtypes(_read_layout(folder, options))
    if asked not in (None, checkpoint.spec.architecture):
        raise UnsupportedModel(
            f"{folder}: the config's model_type is {checkpoint.spec.architecture}; --architecture says {asked}.\n"
            "Leave it out: only a nanotron config can be of several architectures."
        )
    return checkpoint


def _read_layout(folder: Path, options: ReadOptions) -> Checkpoint:
    layout = detect_layout(folder)
    if options.base is not None and not layout.takes_base:
        raise UsageError(f"--base supplies weights that a DeepSpeed checkpoint left out; {folder} is {layout.name}.")
    of_base = ReadOptions(optimizer=False, architecture=options.architecture)
    base = None if options.base is None else read_checkpoint(options.base, of_base)
    try:
        return layout.read(folder, options, base)
    finally:
        close_thread_files()  # reading a layout may open them; a file that is replaced later must be opened anew
