"""Which files of a listing a Hugging Face checkpoint is read from."""

from __future__ import annotations

import json

from smolconv.errors import CorruptFile, MissingFile, MissingShard, some_of
from smolconv.layouts.huggingface.sidecar import SIDECAR
from smolconv.layouts.listing import WEIGHT_SUFFIXES, Listing, Needed, within

#: Where transformers puts weights, the best first: (name of a single file, index of several shards).
WEIGHTS = tuple((stem, f"{stem}.index.json") for stem in ("model.safetensors", "pytorch_model.bin"))
_STATE_SUFFIXES = (".safetensors", ".safetensors.index.json")


def needed_files(listing: Listing, folder: str, *, step: int | None, optimizer: bool) -> Needed | None:
    """Weights, and the sidecar. Raises ``MissingShard`` and ``CorruptFile`` for an index that does not hold."""
    here = listing.children(folder)
    if "config.json" not in here.files:
        return None
    weights = _weights(listing, folder, here.files)
    if not weights:
        found = sorted(name for name in here.files if name.endswith(WEIGHT_SUFFIXES))
        return Needed(
            lacking=listing.lacking(
                MissingFile,
                folder,
                f"has a config.json but no weights that can be read (found: {some_of(found, 8, more=True) or 'none'})",
                f"Expected {', '.join(name for single, index in WEIGHTS for name in (index, single))}.",
                "Check the subfolder and the revision, or convert those weights to safetensors first.",
            )
        )
    sidecar = listing.tree(within(folder, SIDECAR)) if SIDECAR in here.folders else []
    return Needed(paths=frozenset([*weights, *(p for p in sidecar if optimizer or not p.endswith(_STATE_SUFFIXES))]))


def _weights(listing: Listing, folder: str, files: frozenset[str]) -> list[str]:
    for single, index in WEIGHTS:
        if single in files:  # as transformers chooses, and our reader
            return [within(folder, single)]
        if index in files:
            shards = _shards_in_index(listing, within(folder, index))
            missing = sorted(shards - files)
            if missing:
                raise listing.lacking(
                    MissingShard,
                    folder,
                    f"lacks {len(missing)} of the {len(shards)} shards in {index}: {some_of(missing, 8, more=True)}",
                    "Expected every shard that the index names.",
                    "Choose another revision, or ask the repository's owner to upload them.",
                )
            return [within(folder, name) for name in (index, *shards)]
    return []


def _shards_in_index(listing: Listing, path: str) -> set[str]:
    try:
        names = set(json.loads(listing.text(path))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        names = {error}
    if not names or not all(isinstance(name, str) for name in names):
        raise CorruptFile(
            f"{path} in the repository is not an index of shards.\n"
            'Expected JSON with a "weight_map" from tensor names to file names.\n'
            "Choose another revision, or ask the repository's owner to mend it."
        )
    return names
