"""Which files of a listing a DeepSpeed checkpoint is read from."""

from __future__ import annotations

from smolconv.layouts.deepspeed.files import LATEST, LATEST_UNIVERSAL
from smolconv.layouts.listing import Listing, Needed, companions, documents, folders_above, pointed_folder


def needed_files(listing: Listing, folder: str, *, step: int | None, optimizer: bool) -> Needed | None:
    """A tag's folder, or those that a run's pointers name, and configs above it. Raises ``MissingFile``."""
    here = listing.children(folder)
    is_tag = any(name.endswith("_model_states.pt") for name in here.files)
    pointers = sorted(here.files & {LATEST, LATEST_UNIVERSAL})
    if not is_tag and not pointers:
        return None
    paths = documents(listing, folder)
    for pointer in pointers:
        paths.update(listing.tree(pointed_folder(listing, folder, pointer)))
    if is_tag:
        paths.update(listing.tree(folder))
    # DeepSpeed's own folders hold no model config: it may lie beside `latest`, or above the run.
    for parent in folders_above(folder)[:2]:
        paths |= companions(listing, parent)
    return Needed(paths=frozenset(paths))
