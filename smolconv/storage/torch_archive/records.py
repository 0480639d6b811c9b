"""Lists the records of a torch.save archive, with the positions of their bytes and their checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zlib_ng.zlib_ng import crc32

from smolconv.errors import CorruptFile, LfsPointer, UnsafePickle
from smolconv.files import open_file, reading
from smolconv.storage.torch_archive.zip import (
    END_BYTES,
    END_SIGNATURE,
    LOCAL_SIGNATURE,
    ZipDirectory,
    ZipRecord,
    read_zip_directory,
)

#: A larger data.pkl is refused unread. torch.save spends 100 to 200 bytes on a tensor: room for half a million.
MAX_PICKLE_BYTES = 1 << 26

COPY_AGAIN = "Copy the file again from where it was written, and compare the sizes."


@dataclass(frozen=True, kw_only=True)
class ArchiveRecord:
    """One record's bytes, and the CRC-32 that was stored for them."""

    name: str  #: without the archive's folder: ``data/17``
    offset: int  #: absolute, of its first byte in the file
    nbytes: int
    crc: int | None  #: None in an archive that was written without checksums


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An open archive and its directory; good for as long as ``file`` is open."""

    path: Path
    file: BinaryIO
    directory: ZipDirectory
    entries: Mapping[str, ZipRecord]  #: by their name within the archive's folder
    pickle_name = "data.pkl"
    after_count = ()

    def locate(self, record: str) -> tuple[int, int] | None:
        """The absolute offset and the length of a record's bytes, ``None`` when there is no such record."""
        entry = self.entries.get(record)
        if entry is None:
            return None
        if not entry.stored:
            raise self.damaged(
                f"record {shown(record)} is compressed or encrypted",
                "torch.save stores records as they are, so that they can be mapped.",
                "Load the file with torch.load(..., weights_only=True) and save it again with torch.save.",
            )
        try:
            return self.directory.place(self.file.fileno(), entry), entry.nbytes
        except ValueError as error:
            raise self.damaged(
                f"record {shown(record)} is not at the place in the zip directory ({shown(str(error))})",
                "Expected consecutive records before the directory.",
            ) from error

    def records(self) -> list[ArchiveRecord]:
        """Every record, with its position and checksum."""
        found: list[ArchiveRecord] = []
        for name, entry in self.entries.items():
            place = self.locate(name)
            assert place is not None
            crc = entry.crc if self.directory.has_checksums else None
            found.append(ArchiveRecord(name=name, offset=place[0], nbytes=place[1], crc=crc))
        return found

    def read_checked(self, record: str, most_bytes: int, advice: str = "") -> bytes | None:
        """A small record's bytes, compared with its checksum; None when there is no such record."""
        place = self.locate(record)
        if place is None:
            return None
        offset, nbytes = place
        if nbytes > most_bytes:
            raise self.damaged(f"{record} has {nbytes} bytes", f"Expected at most {most_bytes}.{advice}")
        self.file.seek(offset)
        data = self.file.read(nbytes)
        if self.directory.has_checksums and (expected := self.entries[record].crc) != crc32(data):
            raise self.damaged(f"{record} has CRC-32 {crc32(data):08x}", f"{expected:08x} was recorded for it.")
        return data

    def read_pickle(self) -> bytes:
        advice = (
            " It describes tensors but does not hold their data. If these are not tensors, save them in another form."
        )
        pickled = self.read_checked("data.pkl", MAX_PICKLE_BYTES, advice)
        if pickled is None:
            raise self.damaged("record data.pkl is missing", "It describes the saved object.")
        return pickled

    def check_byte_order(self) -> None:
        found = self.read_checked("byteorder", 1 << 20)
        # Archives before torch 2.1 do not store the byte order; torch.load assumes little-endian, too.
        if found not in (None, b"little"):
            raise self.damaged(
                f"the byte order is {shown(found[:16].decode('latin-1'))}",
                "Only little-endian archives are read.",
                "Load the file with torch.load(..., weights_only=True) on a little-endian machine and save it again.",
            )

    def damaged(self, found: str, expected: str, advice: str = COPY_AGAIN) -> CorruptFile:
        return CorruptFile(f"{self.path}: {found}.\n{expected}\n{advice}")


def is_torch_archive(path: Path) -> bool:
    """Whether a file begins or ends like one, and is not a safetensors file, whose first bytes are a length."""
    if path.suffix == ".safetensors":
        return False
    try:
        with opened(path) as file:
            if file.read(len(LOCAL_SIGNATURE)) == LOCAL_SIGNATURE:
                return True
            file.seek(-min(file.seek(0, os.SEEK_END), END_BYTES), os.SEEK_END)
            return file.read(len(END_SIGNATURE)) == END_SIGNATURE  # damaged at its beginning
    except LfsPointer:  # of a file beside the weights, which stays behind
        return False


def read_archive_records(path: Path) -> list[ArchiveRecord]:
    """Every record of an archive: its position and checksum. Raises as ``read_torch_archive``."""
    with open_archive(path) as archive:
        return archive.records()


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """An archive whose directory can be trusted. Raises as ``read_torch_archive`` does."""
    with opened(path) as file:
        yield archive_in(path, file)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file of any form, to be read. Raises as ``open_file`` does."""
    with reading(path), open(open_file(path), "rb") as file:
        yield file


def archive_in(path: Path, file: BinaryIO) -> Archive:
    """The archive that an open file is, once its directory can be trusted. Raises as ``read_torch_archive`` does."""
    beginning = file.read(512)
    if not beginning.startswith(LOCAL_SIGNATURE):
        found, advice = _what_begins_with(beginning)
        raise CorruptFile(f"{path}: {found}.\nExpected a zip archive written by torch.save.\n{advice}")
    try:
        directory = read_zip_directory(file.fileno())
    except ValueError as error:
        raise CorruptFile(
            f"{path}: begins like a zip archive, but its directory cannot be read ({shown(str(error))}).\n"
            "Expected a complete file with an unambiguous directory; this one has "
            f"{file.seek(0, 2)} bytes and was perhaps cut short.\n"
            f"{COPY_AGAIN}"
        ) from error
    folders = {record.name.partition("/")[0] for record in directory.records}
    entries = {record.name.partition("/")[2]: record for record in directory.records}
    names = {record.name.lower() for record in directory.records}  # torch finds records whatever their case
    # torch takes the folder from whichever record is first.
    if len(folders) != 1 or "data.pkl" not in entries or "" in entries or len(names) != len(directory.records):
        raise CorruptFile(
            f"{path}: is a zip archive, but not one of torch.save's: it has {len(directory.records)} records, of "
            f"{len(names)} names in {len(folders)} folders.\n"
            "Expected exactly one folder, with one data.pkl and no duplicate record.\n"
            "Check that the path is right; other zip files, such as .npz, cannot be read here."
        )
    if code := next((name for name in entries if name == "constants.pkl" or name.startswith("code/")), None):
        raise UnsafePickle(
            f"{path}: is a TorchScript archive, which holds code (record {shown(code)}). Nothing was executed.\n"
            "Expected a file written by torch.save.\n"
            "Load it in a safe place and save its state_dict with torch.save."
        )
    archive = Archive(path=path, file=file, directory=directory, entries=entries)
    archive.check_byte_order()
    return archive


def _what_begins_with(beginning: bytes) -> tuple[str, str]:
    if not beginning:
        return "is empty", COPY_AGAIN
    if beginning[257:262] == b"ustar":
        return (
            "is a tar file, perhaps in the form that torch.save wrote before version 0.1.10",
            "Load it with an old torch and save it again with a new one.",
        )
    return f"begins with the bytes {beginning[:8].hex(' ')}", "Check that the path is right. " + COPY_AGAIN


def shown(text: str) -> str:
    """Text from a file as it can stand in a message: one line of ASCII, not too long."""
    short = text if len(text) <= 200 else text[:200] + "..."
    return short.encode("unicode_escape").decode("ascii")
