"""Names in DeepSpeed's folders: how a run or a tag is recognised, which tag is meant, and which files are needed.

A run folder holds ``latest`` (or ``latest_universal``), whose text names a tag folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from smolconv.errors import BadCheckpoint, MissingFile
from smolconv.layouts.deepspeed.files import MODEL, OPTIMIZER
from smolconv.layouts.listing import AnyPath, P, companions, files_below, read_name, there

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
#: Folder next to ``latest`` in which smolconv's writer stores documents of the source's layout.
SOURCE_DOCUMENTS = "smolconv_source"
#: Names by which a checkpoint is recognised.
MARKS: tuple[str, ...] = (LATEST, LATEST_UNIVERSAL, "*_model_states.pt")


def detect(folder: AnyPath) -> bool:
    """Whether ``folder`` is a DeepSpeed run folder or one of its tag folders."""
    return any((folder / name).is_file() for name in (LATEST, LATEST_UNIVERSAL)) or holds_training(folder)


def holds_training(folder: AnyPath) -> bool:
    """``Listing.holds_training``. A ``latest`` alone does not count: Trainers upload it without its tag."""
    return _is_tag_folder(folder) or any(True for _ in _tags(folder, 1))


def _is_tag_folder(folder: AnyPath) -> bool:
    return any(MODEL.fullmatch(path.name) or OPTIMIZER.fullmatch(path.name) for path in _inside(folder))


def _inside(folder: P) -> list[P]:
    """A folder's entries; empty if it is not a folder, or cannot be listed."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _tags(folder: P, depth: int) -> Iterator[str]:
    """The tags in a folder; those with a slash are deeper, at most ``depth`` folders below."""
    level = {"": folder}
    for _ in range(depth):
        below = {f"{tag}/{path.name}".lstrip("/"): path for tag, each in level.items() for path in _inside(each)}
        folders = {tag: path for tag, path in below.items() if path.is_dir()}
        found = [tag for tag, path in folders.items() if _is_tag_folder(path)]
        yield from found
        # Links to parent folders would be followed forever.
        linked = {tag for tag, path in folders.items() if isinstance(path, Path) and path.is_symlink()}
        level = {tag: path for tag, path in folders.items() if tag not in {*found, *linked}}


def run_folder(folder: P, tag: P) -> P:
    """The folder that holds ``latest``: for a tag folder, its parent."""
    return tag.parent if folder == tag else folder


def find_tag_folder(folder: P, step: int | None = None) -> P:
    """The tag folder that ``folder`` is or holds: that of ``step``, or else the one that ``latest`` names.

    Raises ``MissingFile`` if it does not exist, with the existing tags.
    """
    if _is_tag_folder(folder):
        if step is not None and _step_of(folder.name) != step:
            raise MissingFile(f"{folder} is one tag's folder, but --step asks for {step}. Name the run folder instead.")
        return folder
    named = _named_tag(folder, needed=step is None)
    if step is None and named is not None and _is_tag_folder(folder / named[1]):  # without listing the other tags
        return folder / named[1]
    tags = sorted(_tags(folder, 1 if named is None else 1 + named[1].count("/")))
    known = ", ".join(tags) or "none"
    if step is not None:
        # A step saved in both ways: training continues from the ranks' files.
        found = sorted((tag.endswith("_universal"), tag) for tag in tags if _step_of(tag) == step)
        if not found:
            raise MissingFile(f"{folder}: no tag of step {step}; tags found: {known}. Choose one with --step.")
        return folder / found[0][1]
    if named is None:
        raise MissingFile(f"{folder} has neither {LATEST} nor {LATEST_UNIVERSAL}. Name a tag's folder ({known}).")
    pointer, tag = named
    empty = "its folder holds no *_model_states.pt" if (folder / tag).is_dir() else "there is no such folder"
    raise MissingFile(
        f"{pointer} names the tag {tag!r:.60}, but {empty}; tags found: {known}.\n"
        "Copy it from where the run was saved, or name a tag's folder."
    )


def _named_tag(folder: P, *, needed: bool) -> tuple[P, str] | None:
    """The existing pointer, and the tag that it names. A damaged one is an error only if it is ``needed``."""
    try:
        pointer = next((path for name in (LATEST, LATEST_UNIVERSAL) if there(path := folder / name)), None)
        return None if pointer is None else (pointer, read_name(pointer))
    except BadCheckpoint:
        if needed:
            raise
        return None


def _step_of(tag: str) -> int | None:
    match = re.search(r"(\d{1,18})(?:_universal)?$", tag)
    return None if match is None else int(match[1])


def needed_files(folder: P, *, step: int | None, optimizer: bool) -> list[P]:
    """``Listing.needed_files``. Always includes Adam's state, because the masters are in the same files."""
    tag = find_tag_folder(folder, step)
    run = run_folder(folder, tag)
    pointers = [path for name in (LATEST, LATEST_UNIVERSAL) if (path := folder / name).is_file()]
    # DeepSpeed saves no model config: it may be next to ``latest``, or above the run.
    above = [path for place in (run, run.parent) for path in companions(place)]
    return [*pointers, *files_below(tag), *above, *files_below(run / SOURCE_DOCUMENTS)]
