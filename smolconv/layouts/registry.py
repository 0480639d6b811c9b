"""Lists the layouts, detects a folder's layout, and reads its checkpoint."""

from __future__ import annotations

import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint
from smolconv.errors import BadCheckpoint, SmolconvError, UnknownLayout, UnsupportedModel, UsageError, some_of
from smolconv.files import noting_files, unreadable
from smolconv.layouts.deepspeed.layout import DEEPSPEED
from smolconv.layouts.dtypes import check_dtypes
from smolconv.layouts.huggingface.layout import HUGGINGFACE
from smolconv.layouts.huggingface.listing import ADAPTER
from smolconv.layouts.layout import Layout, ReadOptions
from smolconv.layouts.listing import RUN_CHECKPOINTS, RUN_RECIPE, AnyPath, P
from smolconv.layouts.nanotron.layout import NANOTRON
from smolconv.layouts.unknown import what_is_there
from smolconv.models.registry import family_named
from smolconv.storage.atomic import INCOMPLETE
from smolconv.tensors.reading import close_thread_files

#: If several layouts match a folder, the first one counts.
LAYOUTS: tuple[Layout, ...] = (HUGGINGFACE, NANOTRON, DEEPSPEED)
#: By their names in ``--to``.
BY_WORD = {word: layout for layout in LAYOUTS for word in layout.words}
#: If a folder is not a checkpoint, this many of its entries are searched for one.
MOST_CHILDREN = 200


def layout_named(word: str, option: str) -> Layout:
    """The layout that an option's value names. Raises ``UsageError``."""
    if word not in BY_WORD:
        raise UsageError(f"{option} {word}: expected one of {', '.join(known.words[0] for known in LAYOUTS)}.")
    return BY_WORD[word]


def source_folder(folder: P) -> P:
    """The folder of checkpoints in a run of ``smolconv continue-train``; any other folder unchanged."""
    inside = folder / RUN_CHECKPOINTS
    is_run = (folder / RUN_RECIPE).is_file() and inside.is_dir() and layout_of(inside) is not None
    return inside if is_run else folder


def detect_layout(folder: Path, options: ReadOptions = ReadOptions()) -> Layout:  # noqa: B008
    """Raise ``UnknownLayout`` with the folder's content, ``MissingFile`` if it does not exist."""
    try:
        found = folder.stat()
    except OSError as error:
        raise unreadable(folder, error, "Check the path; Hub repositories are written hf://owner/name.") from None
    if not stat.S_ISDIR(found.st_mode):
        raise UnknownLayout(f"{folder} is a file; a checkpoint is a folder.\n{_hint(folder)}")
    if (folder / INCOMPLETE).exists():
        raise BadCheckpoint(f"{folder} was being published when smolconv was interrupted. Convert it again.")
    if layout := layout_of(folder, options.layout, with_config=options.config is not None):
        return layout
    if (reason := why_unknown(folder)) is not None:
        raise reason
    if inside := [path.name for path in sorted(folder.iterdir())[:MOST_CHILDREN] if is_checkpoint(path)]:
        raise UnknownLayout(
            f"{folder} is not a checkpoint, but folders in it are: {some_of(inside, 8, more=True)}.\n"
            f"Expected the folder of one checkpoint.\nName it, such as {folder / inside[0]}"
        )
    raise UnknownLayout(f"{folder} is not a checkpoint that smolconv knows: it has neither {signs(', nor ')}.")


def is_checkpoint(path: Path) -> bool:
    """Whether the folder holds a checkpoint of any layout, by its names."""
    with suppress(SmolconvError, OSError):
        return path.is_dir() and layout_of(source_folder(path)) is not None
    return False


def why_unknown(folder: AnyPath) -> BadCheckpoint | None:
    """An error that explains what a folder of no layout holds or lacks; None if its names do not show it."""
    return what_is_there(folder) or next(
        (error for layout in LAYOUTS if (error := layout.lacking(folder)) is not None), None
    )


def layout_of(folder: AnyPath, word: str | None = None, *, with_config: bool = False) -> Layout | None:
    """The layout of a folder on disk or on the Hub, by its names; None if it is not a checkpoint.

    If there are several, the one with training state, if only one has it. ``word``: the layout of ``--from``,
    or ``UsageError``. ``with_config``: a config is supplied, so the folder does not need one.
    """

    def fits(layout: Layout) -> bool:
        return layout.listing.detect(folder) or (with_config and layout.detect_with_config(folder))

    if word is not None:
        asked = layout_named(word, "--from")
        if not fits(asked):
            raise UsageError(
                f"--from {word}: {folder} holds no {asked.title} checkpoint.\n"
                f"Expected {asked.signs}.\nOmit --from to detect the layout."
            )
        return asked
    first = next(filter(fits, LAYOUTS), None)
    if first is None or first.listing.holds_training(folder):
        return first
    return next((layout for layout in LAYOUTS if layout is not first and layout.listing.holds_training(folder)), first)


def signs(between: str) -> str:
    """The files that identify each layout, as text."""
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
            f"{folder}: the config's model_type is {checkpoint.spec.architecture}; --architecture is {asked}.\n"
            "Leave it out: only a nanotron config can stand for several architectures."
        )
    return checkpoint


def _read_layout(folder: Path, options: ReadOptions) -> Checkpoint:
    folder = source_folder(folder)
    layout = detect_layout(folder, options)
    if options.base is not None and not layout.takes_base:
        raise UsageError(f"--base supplies weights that a DeepSpeed checkpoint left out; {folder} is {layout.name}.")
    of_base = ReadOptions(optimizer=False, architecture=options.architecture)
    base = None if options.base is None else read_checkpoint(options.base, of_base)
    before = LAYOUTS[: LAYOUTS.index(layout)] if options.layout is None else ()
    other = next((known for known in before if known.listing.detect(folder)), None)
    close_thread_files()  # a caller's that has been replaced since
    try:
        checkpoint = layout.read(folder, options, base)
    except BadCheckpoint as error:
        if other is not None:
            error.args = (f"{error}\n--from {other.words[0]} reads the {other.title} files in the same folder.",)
        raise
    finally:
        close_thread_files()  # reading a layout may keep files open; a file that is replaced later must be reopened
    return replace(checkpoint, warnings=(*_not_read(folder, layout, other), *checkpoint.warnings))


def _not_read(folder: Path, layout: Layout, other: Layout | None) -> list[str]:
    """Warnings about other checkpoints in the same folder."""
    said = []
    if other is not None:
        said.append(
            f"the folder holds {other.title} files, too: those of {layout.title} are read, which have training "
            f"state. --from {other.words[0]} reads the {other.title} files."
        )
    if (folder / ADAPTER).is_file():
        said.append("the folder also has a PEFT adapter, which is not read: to use it, merge it (merge_and_unload).")
    said += [
        f"{name} holds Adam's state of a {program} without DeepSpeed, which names no parameters: it is not read."
        for name, program in (("optimizer.pt", "Trainer"), ("optimizer.bin", "run of accelerate"))
        if layout is HUGGINGFACE and (folder / name).is_file()
    ]
    return said
