"""torch.save zip archives, read and written without torch and without touching tensor data.

Reading returns the saved object with an ``ArchiveTensor`` for every tensor: the position of its bytes, never the
bytes. Writing plans the offset of every byte, so that another module can pwrite tensor data in any order and ask
for the checksums at the end.

An archive is a zip of stored (uncompressed) records: ``<stem>/data.pkl`` describes the object, ``<stem>/data/<key>``
holds the bytes of one storage, which several tensors may view. The layout follows torch 2.13: ``_save`` and
``_load`` in torch/serialization.py, ``PyTorchStreamWriter`` in caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from zlib_ng.zlib_ng import crc32

from smolconv.storage.torch_archive.legacy import is_legacy, read_legacy
from smolconv.storage.torch_archive.pickle import pickle_object
from smolconv.storage.torch_archive.records import archive_in, opened
from smolconv.storage.torch_archive.unpickle import unpickle
from smolconv.storage.torch_archive.values import Storage
from smolconv.storage.torch_archive.zip import (
    ALIGNMENT_BYTES,
    LOCAL_CRC_OFFSET,
    directory_entry,
    end_of_directory,
    gap_bytes,
    local_header,
)


def read_torch_archive(
    path: Path,
    *,
    allow: Mapping[tuple[str, str], Callable[..., object]] = MappingProxyType({}),
    plain_keys: Collection[str] | None = None,
) -> object:
    """The object that ``torch.save`` wrote, with an ``ArchiveTensor`` for every tensor and no tensor data read.

    ``allow`` maps further ``(module, name)`` pairs, in Python 3's spelling, to what is called in their place. It
    should return something inert. What it returns may be filled by the pickle through ``__setstate__`` if its class
    has one, else through ``__dict__``.

    With ``plain_keys`` the object is a mapping that people added keys to: below any other key, what the pickle names
    beyond the list is an ``Opaque``. Without, or anywhere else, it is refused.

    Raises ``MissingFile``, ``CorruptFile``, ``UnsafePickle`` when the pickle names anything else, and ``MachineError``
    when the disk fails. Nothing that a pickle names is ever imported.
    """
    with opened(path) as file:
        if is_legacy(file):
            return read_legacy(path, file, allow, plain_keys)
        return unpickle(archive_in(path, file), allow, plain_keys)


def read_pickle_bytes(path: Path) -> bytes:
    """The archive's pickle, unparsed. Files with equal pickles hold the same object, except for the positions of bytes.

    For a file that is not a zip, whose pickle contains memory addresses, a unique value. Raises as
    ``read_torch_archive`` does.
    """
    with opened(path) as file:
        return os.fsencode(path) if is_legacy(file) else archive_in(path, file).read_pickle()


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One zip entry at its place in the file."""

    name: bytes
    header_offset: int
    data_offset: int
    nbytes: int
    crc: int  #: 0 until ``finish`` for tensor data
    storage: Storage | None


@dataclass(frozen=True, kw_only=True)
class ArchivePlan:
    """Where every byte of an archive goes. ``pieces``, ``records`` and ``finish`` together cover all of ``size``."""

    size: int
    pieces: tuple[tuple[int, bytes], ...]  #: (offset, bytes): everything but tensor data and what depends on its CRC
    records: Mapping[Storage, tuple[int, int]]  #: (absolute offset, nbytes) of each storage's data
    zip_records: tuple[_Record, ...] = field(repr=False)

    def without_data(self) -> bytes:
        """The complete file, if all its storages are empty."""
        data = bytearray(self.size)
        for offset, piece in (*self.pieces, *self.finish({})):
            data[offset : offset + len(piece)] = piece
        return bytes(data)

    def finish(self, crcs: Mapping[Storage, int]) -> tuple[tuple[int, bytes], ...]:
        """What is left to write once the CRC-32 of each storage's bytes is known, as (offset, bytes).

        Write it after ``pieces``: it fills in the checksums there and appends the zip directory, without which
        the file is not an archive. An empty storage needs no entry in ``crcs``.
        """
        patches: list[tuple[int, bytes]] = []
        directory = bytearray()
        for record in self.zip_records:
            crc = record.crc
            if record.storage is not None and record.nbytes:
                crc = crcs[record.storage]
                patches.append((record.header_offset + LOCAL_CRC_OFFSET, struct.pack("<I", crc)))
            directory += directory_entry(record.name, record.header_offset, record.nbytes, crc)
        end = end_of_directory(len(self.zip_records), len(directory), self._directory_offset)
        return (*patches, (self._directory_offset, bytes(directory) + end))

    @property
    def _directory_offset(self) -> int:
        last = self.zip_records[-1]
        return last.data_offset + last.nbytes + gap_bytes(last.header_offset, last.nbytes)


def plan_torch_archive(stem: str, obj: object) -> ArchivePlan:
    """Lay out the archive that ``torch.save(obj, "<stem>.pt")`` would write, the same bytes for the same object.

    ``obj`` is made of None, bool, int, float, str, tuple, list, dict, OrderedDict, ``TorchSize``, ``DtypeRef``,
    ``GlobalRef``, ``TensorRef`` and ``PickledObject``; storages are numbered in order of appearance.
    Unlike torch, a container that occurs twice is written twice. Raises ``TypeError`` for any other type.
    """
    if not stem or "/" in stem or "\0" in stem:
        raise ValueError(f"{stem!r} cannot be the name of the folder in an archive")
    pickled, storages = pickle_object(obj)
    # torch writes a hash of the record names and a combined CRC, 20 digits each, to tell archives apart in its logs.
    # Any 40 digits will do; these are the same for the same object.
    serialization_id = f"{int.from_bytes(hashlib.sha256(pickled).digest(), 'big') % 10**40:040d}"
    contents: list[tuple[str, bytes | Storage]] = [
        ("data.pkl", pickled),
        (".format_version", b"1"),
        (".storage_alignment", str(ALIGNMENT_BYTES).encode()),
        ("byteorder", b"little"),
        *((f"data/{key}", storage) for key, storage in enumerate(storages)),
        ("version", b"3\n"),
        (".data/serialization_id", serialization_id.encode()),
    ]

    records: list[_Record] = []
    pieces: list[tuple[int, bytes]] = []
    piece = bytearray()  # grows until tensor data interrupts it
    piece_offset = 0
    for name, content in contents:
        cursor = piece_offset + len(piece)
        storage = content if isinstance(content, Storage) else None
        nbytes = content.nbytes if isinstance(content, Storage) else len(content)
        crc = 0 if isinstance(content, Storage) else crc32(content)
        path = f"{stem}/{name}".encode()
        piece += local_header(path, cursor, nbytes, crc)
        data_offset = piece_offset + len(piece)
        records.append(
            _Record(name=path, header_offset=cursor, data_offset=data_offset, nbytes=nbytes, crc=crc, storage=storage)
        )
        if isinstance(content, Storage):
            pieces.append((piece_offset, bytes(piece)))
            piece.clear()
            piece_offset = data_offset + nbytes
        else:
            piece += content
        piece += bytes(gap_bytes(cursor, nbytes))
    pieces.append((piece_offset, bytes(piece)))

    directory_offset = piece_offset + len(piece)
    directory_bytes = sum(len(directory_entry(r.name, r.header_offset, r.nbytes, 0)) for r in records)
    end = end_of_directory(len(records), directory_bytes, directory_offset)
    return ArchivePlan(
        size=directory_offset + directory_bytes + len(end),
        pieces=tuple(pieces),
        records={r.storage: (r.data_offset, r.nbytes) for r in records if r.storage is not None},
        zip_records=tuple(records),
    )
