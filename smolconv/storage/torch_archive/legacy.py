"""Reads files of torch.save before version 1.6, which it still writes on request, and which are not zip archives.

Five pickles stand one after the other: a magic number, the form's version, facts of the machine, the object, and the
storages' keys. Each storage follows in the order of the keys: the number of its elements in 8 bytes, then the elements.
Nothing is aligned, and there are no checksums. ``_legacy_save`` and ``_legacy_load`` in torch/serialization.py, 2.13.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smolconv.errors import CorruptFile
from smolconv.storage.torch_archive.records import COPY_AGAIN, MAX_PICKLE_BYTES, shown
from smolconv.storage.torch_archive.unpickle import MAX_COUNT, unpickle_at

#: The pickle of MAGIC_NUMBER.
_BEGINNING = pickle.PROTO + b"\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_VERSION = 1001
#: The pickles' length is not stored: this much is read first, and eight times as much while they are incomplete.
_FIRST_BYTES = 1 << 20
_COUNT = struct.Struct("<q")


@dataclass(frozen=True, kw_only=True)
class _LegacyFile:
    """What the pickles are read by."""

    path: Path
    places: Mapping[str, tuple[int, int]] | None  #: (offset, bytes) of the storages' elements, once it is known
    pickle_name = "its pickle"
    after_count = (None,)  # once the place of a storage in another one

    def locate(self, record: str) -> tuple[int, int] | None:
        return (0, MAX_COUNT) if self.places is None else self.places.get(record.removeprefix("data/"))

    def damaged(self, found: str, expected: str, advice: str = COPY_AGAIN) -> CorruptFile:
        return CorruptFile(f"{self.path}: {found}.\n{expected}\n{advice}")


def is_legacy(file: BinaryIO) -> bool:
    return os.pread(file.fileno(), len(_BEGINNING), 0) == _BEGINNING


def read_legacy(
    path: Path,
    file: BinaryIO,
    allow: Mapping[tuple[str, str], Callable[..., object]],
    plain_keys: Collection[str] | None,
) -> object:
    """The saved object, as ``read_torch_archive`` has it. Parameters and errors are the same."""
    descriptor = file.fileno()
    size, nbytes = os.fstat(descriptor).st_size, _FIRST_BYTES
    while True:
        beginning = os.pread(descriptor, min(nbytes, MAX_PICKLE_BYTES), 0)
        try:
            return _read(path, descriptor, size, beginning, allow, plain_keys)
        except CorruptFile:
            if len(beginning) == min(size, MAX_PICKLE_BYTES):
                raise
            nbytes *= 8


def _read(
    path: Path,
    descriptor: int,
    size: int,
    beginning: bytes,
    allow: Mapping[tuple[str, str], Callable[..., object]],
    plain_keys: Collection[str] | None,
) -> object:
    unplaced = _LegacyFile(path=path, places=None)
    version, at, _ = unpickle_at(unplaced, beginning, len(_BEGINNING))
    machine, start, _ = unpickle_at(unplaced, beginning, at)
    if version != _VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise unplaced.damaged(
            f"is of version {shown(repr(version))}, or from a machine that is not little-endian",
            f"Only version {_VERSION} from little-endian machines is read.",
            "Load the file with torch.load(..., weights_only=True) where it was written, and save it again.",
        )
    # The storages' places follow from their sizes, which the object's pickle tells: it is read twice.
    _, at, item_bytes = unpickle_at(unplaced, beginning, start, allow, plain_keys)
    keys, end, _ = unpickle_at(unplaced, beginning, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise unplaced.damaged("does not list its storages", "Expected the keys of its storages as text.")
    sizes = {key: next(iter(found)) for key, found in item_bytes.items() if len(found) == 1}
    if len(set(keys)) != len(keys) or not set(keys) == set(sizes) == set(item_bytes):
        raise unplaced.damaged(
            f"lists {len(keys)} storages, which are not the {len(item_bytes)} of its tensors",
            "Expected each of them once, with elements of one size.",
        )
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        raw = os.pread(descriptor, _COUNT.size, end)
        count = _COUNT.unpack(raw)[0] if len(raw) == _COUNT.size else -1
        places[key] = end + _COUNT.size, count * sizes[key]
        end = sum(places[key])
        if count < 0 or end > size:
            raise unplaced.damaged(
                f"ends within storage {shown(key)}", f"It has {size} bytes, and was perhaps cut short."
            )
    if end != size:
        raise unplaced.damaged(f"has {size - end} bytes after its last storage", "Expected nothing there.")
    return unpickle_at(_LegacyFile(path=path, places=places), beginning, start, allow, plain_keys)[0]
