"""The zip container: its directory, read in the one way in which every reader must understand it, and its records.

Zip readers disagree on files that contradict themselves. Python's ``zipfile`` takes the directory that lies before the
end record; torch's reader (miniz) takes the offset that is written there, or the one behind a zip64 locator, and finds
names whatever their case. A checkpoint that is looked at by one reader and loaded by another could so show each
something else. Here a file is refused unless everything that it says twice agrees: no byte between the directory and
the end of the file, no comment, every record in one folder, no two records of one name or on the same bytes.

Formats: APPNOTE.TXT 6.3.10, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_SIGNATURE = b"PK\x03\x04"
_DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")
_DIRECTORY_SIGNATURE = b"PK\x01\x02"
_END = struct.Struct("<4s4H2IH")
END_SIGNATURE, END_BYTES = b"PK\x05\x06", _END.size
_END64 = struct.Struct("<4sQ2H2I4Q")
_END64_SIGNATURE = b"PK\x06\x06"
_LOCATOR64 = struct.Struct("<4sIQI")
_LOCATOR64_SIGNATURE = b"PK\x06\x07"
#: A field that holds this has its value in the zip64 extra field or record.
_SATURATED_16, _SATURATED_32 = 0xFFFF, 0xFFFFFFFF
#: A larger directory is refused unread; torch writes about 100 bytes a record.
_MAX_DIRECTORY_BYTES = 1 << 30
_ZIP64_EXTRA = 1
_ENCRYPTED = 0x0001
_NAMES_ARE_UTF8 = 0x0800
_STORED = 0
_FIRST_OF_JANUARY_1980 = 0x0021  # the earliest date that a zip can hold

#: Every record's bytes start at a multiple of this, so that a mapped storage is aligned for any dtype.
ALIGNMENT_BYTES = 64
#: Of the checksum in a local header.
LOCAL_CRC_OFFSET = 14


@dataclass(frozen=True, kw_only=True)
class ZipRecord:
    """One entry of the directory."""

    name: str  #: ``<folder>/<record>``
    header_offset: int  #: of its local header, in bytes from the start of the file
    nbytes: int
    stored: bool  #: neither compressed nor encrypted
    crc: int


@dataclass(frozen=True, kw_only=True)
class ZipDirectory:
    """All records, in the order of the directory."""

    records: Sequence[ZipRecord]
    header_offsets: Sequence[int]  #: ascending
    offset: int  #: of the directory itself: where the last record must have ended

    @property
    def has_checksums(self) -> bool:
        """False for what ``torch.serialization.set_crc32_options(False)`` wrote: all of its CRC-32s are 0."""
        return any(record.crc for record in self.records)

    def place(self, descriptor: int, record: ZipRecord) -> int:
        """The offset of a record's bytes. Raises ``ValueError`` when they reach into another record or past the end.

        The extra field differs between the directory and the local header, which holds torch's padding.
        """
        name = record.name.encode("utf-8", "surrogateescape")
        header = os.pread(descriptor, _LOCAL_HEADER.size + len(name), record.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(LOCAL_SIGNATURE):
            raise ValueError(f"there is no header of {record.name!r} at byte {record.header_offset}")
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(header)[-2:]
        if name_bytes != len(name) or header[_LOCAL_HEADER.size :] != name:
            raise ValueError(f"the header at byte {record.header_offset} is not that of {record.name!r}")
        offset: int = record.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        after = bisect_right(self.header_offsets, record.header_offset)
        limit = self.header_offsets[after] if after < len(self.header_offsets) else self.offset
        if offset + record.nbytes > limit:
            raise ValueError(
                f"{record.name!r} ends at byte {offset + record.nbytes}, but what follows it begins at {limit}"
            )
        return offset


def read_zip_directory(descriptor: int) -> ZipDirectory:
    """Read and check the directory of an open file. Raises ``ValueError`` with what contradicts itself."""
    size = os.fstat(descriptor).st_size
    start, nbytes, count = _find_directory(descriptor, size)
    if nbytes > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"the directory has {nbytes} bytes")
    raw = os.pread(descriptor, nbytes, start)
    found: list[ZipRecord] = []
    at = 0
    while at < len(raw):
        record, at = _entry(raw, at)
        found.append(record)
        if len(found) > count:
            break
    if len(found) != count or at != nbytes:
        raise ValueError(f"the directory declares {count} records in {nbytes} bytes, but holds others")
    if not found:
        raise ValueError("there are no records")
    if bad := next((record.name for record in found if "\0" in record.name or "\\" in record.name), None):
        raise ValueError(f"readers understand the name {bad!r} differently")
    offsets = sorted(record.header_offset for record in found)
    if len(set(offsets)) != len(offsets) or offsets[-1] >= start:
        raise ValueError("records begin on the same byte, or behind the directory")
    return ZipDirectory(records=found, header_offsets=offsets, offset=start)


def _find_directory(descriptor: int, size: int) -> tuple[int, int, int]:
    """(offset, bytes, records) of the directory."""
    tail_bytes = min(size, _END64.size + _LOCATOR64.size + _END.size)
    tail = os.pread(descriptor, tail_bytes, size - tail_bytes)
    if tail_bytes < _END.size or tail[-_END.size :][:4] != END_SIGNATURE:
        raise ValueError("the last bytes are not the end record of a zip file")
    _, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(tail[-_END.size :])
    if disk or first_disk or comment:
        raise ValueError("the end record speaks of several disks or a comment")
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR64.size : -_END.size]
    if locator[:4] == _LOCATOR64_SIGNATURE:
        end -= _END64.size + _LOCATOR64.size
        _, disk64, where, disks = _LOCATOR64.unpack(locator)
        if end < 0 or (disk64, where, disks) != (0, end, 1) or tail[:4] != _END64_SIGNATURE:
            raise ValueError(f"the zip64 locator points to byte {where}, expected {end}")
        _, rest, _, _, disk, first_disk, here64, count64, nbytes64, start64 = _END64.unpack(tail[: _END64.size])
        same = all(
            short in (long, saturated) and (short == saturated or long < saturated)
            for short, long, saturated in (
                (here, here64, _SATURATED_16), (count, count64, _SATURATED_16), (nbytes, nbytes64, _SATURATED_32),
                (start, start64, _SATURATED_32),
            )
        )  # fmt: skip
        if rest != _END64.size - 12 or disk or first_disk or not same:
            raise ValueError("the zip64 end record contradicts the end record")
        here, count, nbytes, start = here64, count64, nbytes64, start64
    elif _SATURATED_16 in (here, count) or _SATURATED_32 in (nbytes, start):
        raise ValueError("the end record leaves its numbers to a zip64 record that is not there")
    if here != count or start + nbytes != end:
        raise ValueError(f"the directory ends at byte {start + nbytes}, but the end record begins at {end}")
    return start, nbytes, count


def _entry(raw: bytes, at: int) -> tuple[ZipRecord, int]:
    if len(raw) - at < _DIRECTORY_ENTRY.size or raw[at : at + 4] != _DIRECTORY_SIGNATURE:
        raise ValueError(f"the directory has no entry at its byte {at}")
    fields = _DIRECTORY_ENTRY.unpack_from(raw, at)
    flags, method, crc, compressed, nbytes = fields[3], fields[4], *fields[7:10]
    name_bytes, extra_bytes, comment_bytes, disk, offset = *fields[10:14], fields[16]
    at += _DIRECTORY_ENTRY.size
    end = at + name_bytes + extra_bytes + comment_bytes
    if end > len(raw) or disk:
        raise ValueError("an entry of the directory is cut short, or on another disk")
    name = raw[at : at + name_bytes].decode("utf-8", "surrogateescape")
    extra = raw[at + name_bytes : at + name_bytes + extra_bytes]
    wide = iter(_zip64_values(extra) if _SATURATED_32 in (compressed, nbytes, offset) else ())
    try:
        nbytes = next(wide) if nbytes == _SATURATED_32 else nbytes
        compressed = next(wide) if compressed == _SATURATED_32 else compressed
        offset = next(wide) if offset == _SATURATED_32 else offset
    except StopIteration:
        raise ValueError(f"the entry of {name!r} leaves its sizes to a zip64 field that is not there") from None
    stored = method == _STORED and compressed == nbytes and not flags & _ENCRYPTED
    return ZipRecord(name=name, header_offset=offset, nbytes=nbytes, stored=stored, crc=crc), end


def _zip64_values(extra: bytes) -> tuple[int, ...]:
    """The numbers of the zip64 extra field. Two such fields could be read as either: refused."""
    found: list[tuple[int, ...]] = []
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        at += 4
        if at + nbytes > len(extra):
            break
        if kind == _ZIP64_EXTRA:
            found.append(struct.unpack_from(f"<{nbytes // 8}Q", extra, at))
        at += nbytes
    if at != len(extra) or len(found) != 1:
        raise ValueError("the extra fields of a directory entry cannot be read in one way")
    return found[0]


# --- Writing: torch's layout, to the byte ---


def local_header(name: bytes, cursor: int, nbytes: int, crc: int) -> bytes:
    """The header at ``cursor``, padded by an extra field ``FB`` such that the data after it is aligned.

    torch.load computes where the data must start when ``.format_version`` is there, so the padding is torch's, to
    the byte: its zip64 field counts the header's own offset, too. We leave that out, as the standard has no place
    for it in a local header, and pad by as much more.
    """
    zip64 = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= _SATURATED_32 else b""
    torch_zip64_bytes = len(zip64)
    if cursor >= _SATURATED_32:
        torch_zip64_bytes += 8 if zip64 else 12
    start = cursor + _LOCAL_HEADER.size + len(name) + torch_zip64_bytes + 4
    padding = start + -start % ALIGNMENT_BYTES - (cursor + _LOCAL_HEADER.size + len(name) + len(zip64) + 4)
    extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = min(nbytes, _SATURATED_32)
    fixed = (_version_needed(nbytes, 0), _NAMES_ARE_UTF8, _STORED, 0, _FIRST_OF_JANUARY_1980)
    return _LOCAL_HEADER.pack(LOCAL_SIGNATURE, *fixed, crc, size, size, len(name), len(extra)) + name + extra


def gap_bytes(header_offset: int, nbytes: int) -> int:
    """Zeros between a record and the next header, where torch writes a data descriptor.

    Our sizes and checksums stand in the local headers, but torch.load counts on the descriptors' room when
    it computes offsets (``_get_offset`` in torch/serialization.py; used for ``map_location="meta"``).
    """
    if not nbytes:
        return 0
    return 24 if header_offset >= _SATURATED_32 or nbytes >= _SATURATED_32 else 16


def _version_needed(nbytes: int, header_offset: int) -> int:
    return 45 if nbytes >= _SATURATED_32 or header_offset >= _SATURATED_32 else 20


def directory_entry(name: bytes, header_offset: int, nbytes: int, crc: int) -> bytes:
    """The directory's entry for a record."""
    saturated = [
        *([nbytes, nbytes] if nbytes >= _SATURATED_32 else []),
        *([header_offset] if header_offset >= _SATURATED_32 else []),
    ]
    zip64 = struct.pack(f"<2H{len(saturated)}Q", 1, 8 * len(saturated), *saturated) if saturated else b""
    needed = _version_needed(nbytes, header_offset)
    fixed = (needed, needed, _NAMES_ARE_UTF8, _STORED, 0, _FIRST_OF_JANUARY_1980)
    size, offset = min(nbytes, _SATURATED_32), min(header_offset, _SATURATED_32)
    entry = _DIRECTORY_ENTRY.pack(
        _DIRECTORY_SIGNATURE, *fixed, crc, size, size, len(name), len(zip64), 0, 0, 0, 0, offset
    )
    return entry + name + zip64


def end_of_directory(count: int, nbytes: int, offset: int) -> bytes:
    """What follows a directory of ``count`` records in ``nbytes`` bytes at ``offset``."""
    zip64 = b""
    if count >= _SATURATED_16 or nbytes >= _SATURATED_32 or offset >= _SATURATED_32:
        zip64 = _END64.pack(_END64_SIGNATURE, _END64.size - 12, 45, 45, 0, 0, count, count, nbytes, offset)
        zip64 += _LOCATOR64.pack(_LOCATOR64_SIGNATURE, 0, offset + nbytes, 1)
    count = min(count, _SATURATED_16)
    nbytes, offset = min(nbytes, _SATURATED_32), min(offset, _SATURATED_32)
    return zip64 + _END.pack(END_SIGNATURE, 0, 0, count, count, nbytes, offset, 0)
