"""Which files of a listing a nanotron checkpoint is read from."""

from __future__ import annotations

from pathlib import PurePosixPath

from smolconv.layouts.listing import Listing, Needed, documents, pointed_folder, within

_STATE = ("optimizer", "lr_scheduler", "random")


def needed_files(listing: Listing, folder: str, *, step: int | None, optimizer: bool) -> Needed | None:
    """A step's folder, or that of a run which ``latest.txt`` or ``step`` names. Raises ``MissingFile``."""
    here = listing.children(folder)
    paths: set[str] = set()
    if "model_config.json" in here.files:
        paths |= documents(listing, folder)
        for name in here.folders.intersection(("model", *_STATE)):
            paths.update(listing.tree(within(folder, name)))
    if "latest.txt" in here.files:
        paths.add(within(folder, "latest.txt"))
        paths.update(listing.tree(pointed_folder(listing, folder, "latest.txt", step)))
    if not optimizer:
        paths = {path for path in paths if not set(PurePosixPath(path).relative_to(folder).parts[:-1]) & {*_STATE}}
    return Needed(paths=frozenset(paths)) if paths else None
