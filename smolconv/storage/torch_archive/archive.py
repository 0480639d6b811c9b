"""torch.save zip archives, read and written without torch and without touching tensor data.

Reading returns the saved object with an ``ArchiveTensor`` wherever a tensor belongs: where its bytes lie, never the
bytes. Writing plans the offset of every byte, so that another module can pwrite tensor data in any order and ask
for the checksums at the end.

An archive is a zip of stored (uncompressed) records: ``<stem>/data.pkl`` describes the object, ``<stem>/data/<key>``
holds the bytes of one storage, which several tensors may view. The layout follows torch 2.13: ``_save`` and
``_load`` in torch/serialization.py, ``PyTorchStreamWriter`` in caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what pickle.Unpickler itself uses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn, TypeGuard

from zlib_ng.zlib_ng import crc32

from smolconv.errors import CorruptFile, MachineError, MissingFile, SmolconvError, UnsafePickle
from smolconv.files import note
from smolconv.storage.torch_archive.zip import (
    DIRECTORY_ENTRY,
    DIRECTORY_SIGNATURE,
    END,
    END64,
    END64_SIGNATURE,
    END_SIGNATURE,
    LOCAL_HEADER,
    LOCAL_SIGNATURE,
    LOCATOR64,
    LOCATOR64_SIGNATURE,
    SATURATED_16,
    SATURATED_32,
    ZipDirectory,
    ZipRecord,
    read_zip_directory,
)
from smolconv.tensors.lazy import DTYPE_BYTES

#: A larger data.pkl is refused unread. torch.save spends 100 to 200 bytes on a tensor, so this is room for millions.
MAX_PICKLE_BYTES = 1 << 30

#: Every record starts at a multiple of this, so that a mapped storage is aligned for any dtype.
ALIGNMENT_BYTES = 64


class DtypeRef(str):
    """A torch dtype that was saved as a value: ``DtypeRef("float32")`` for ``torch.float32``."""

    __slots__ = ()


class TorchSize(tuple[int, ...]):
    """A ``torch.Size``."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class GlobalRef:
    """An allowed class or function that a pickle names as a value, without calling it."""

    module: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ArchiveStorage:
    """One ``data/<key>`` record as a pickle refers to it."""

    key: str
    dtype: str | None  #: ``None`` for an UntypedStorage: the tensors that view it bring their own
    offset: int  #: absolute, of its first byte in the file
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ArchiveTensor:
    """Where the elements of a saved tensor lie. A ``Parameter`` is read as its tensor."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  #: in elements
    offset: int  #: absolute, of element 0 in the file, in bytes
    storage: str  #: the record's key (``"17"``); equal for tensors that view one storage

    @property
    def nbytes(self) -> int:
        """Bytes of the elements once they are laid out contiguously; a strided or expanded view spans another range."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are the ``nbytes`` bytes from ``offset`` on, in row-major order."""
        steps = zip(self.shape, self.stride, _contiguous_stride(self.shape), strict=True)
        return 0 in self.shape or all(size == 1 or stride == expected for size, stride, expected in steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """One ``data/<key>`` record to be written. Its identity says which tensors share it."""

    dtype: str
    numel: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES or self.numel < 0:
            raise ValueError(f"no storage can hold {self.numel} elements of {self.dtype}")

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Stands for a contiguous tensor in an object to be saved."""

    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0  #: of element 0 in the storage, in elements

    def __post_init__(self) -> None:
        end = self.offset + math.prod(self.shape)
        if min(self.shape, default=0) < 0 or self.offset < 0 or end > self.storage.numel:
            raise ValueError(f"{self} does not lie within its storage")


@dataclass(frozen=True, kw_only=True)
class PickledObject:
    """Stands for an object of a class that is not imported: its name called with ``args``, then given ``state``.

    With ``state`` the reader's ``__setstate__`` or ``__dict__`` is filled. torch.load with ``weights_only`` wants the
    class in ``torch.serialization.safe_globals``.
    """

    module: str
    name: str
    args: tuple[object, ...] = ()
    state: Mapping[str, object] | None = None


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
        """The whole file, when all its storages are empty."""
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
                patches.append((record.header_offset + _LOCAL_CRC_OFFSET, struct.pack("<I", crc)))
            directory += _directory_entry(record, crc)
        end = _end_of_directory(len(self.zip_records), len(directory), self._directory_offset)
        return (*patches, (self._directory_offset, bytes(directory) + end))

    @property
    def _directory_offset(self) -> int:
        last = self.zip_records[-1]
        return last.data_offset + last.nbytes + _gap_bytes(last.header_offset, last.nbytes)


def read_torch_archive(
    path: Path, *, allow: Mapping[tuple[str, str], Callable[..., object]] = MappingProxyType({})
) -> object:
    """The object that ``torch.save`` wrote, with an ``ArchiveTensor`` for every tensor and no tensor data read.

    ``allow`` maps further ``(module, name)`` pairs, in Python 3's spelling, to what is called in their place. It
    should return something inert. What it returns may be filled by the pickle through ``__setstate__`` if its class
    has one, else through ``__dict__``.

    Raises ``MissingFile``, ``CorruptFile``, ``UnsafePickle`` when the pickle names anything else, and ``MachineError``
    when the disk fails. Nothing that a pickle names is ever imported.
    """
    with _opened(path) as file:
        archive = _open_archive(path, file)
        return _Unpickler(archive, archive.read_pickle(), allow).load()


def is_torch_archive(path: Path) -> bool:
    """Whether a file begins as one, and is no safetensors file, whose first bytes are a length."""
    if path.suffix == ".safetensors":
        return False
    with _opened(path) as file:
        return file.read(len(LOCAL_SIGNATURE)) == LOCAL_SIGNATURE


def read_archive_records(path: Path) -> list[ArchiveRecord]:
    """Every record of an archive: where its bytes lie, and their checksum. Raises as ``read_torch_archive`` does."""
    with _opened(path) as file:
        return _open_archive(path, file).records()


def read_pickle_bytes(path: Path) -> bytes:
    """The archive's pickle as it is. Two files with the same say the same, but for where their tensors' bytes lie.

    Raises as ``read_torch_archive`` does.
    """
    with _opened(path) as file:
        return _open_archive(path, file).read_pickle()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            note(path, file.fileno())
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(
            f"{path}: there is no such file.\n"
            "A file written by torch.save was expected.\n"
            "Check the path, or copy the file from where the checkpoint was written."
        ) from error
    except IsADirectoryError as error:
        raise CorruptFile(
            f"{path}: is a folder.\n"
            "A file written by torch.save was expected.\n"
            "Give the path of the file; an archive that was unpacked has to be copied again as it was."
        ) from error
    except OSError as error:
        raise MachineError(
            f"{path}: cannot be read ({error.strerror or error}).\n"
            "A readable file was expected.\n"
            "Check its permissions and the disk."
        ) from error


def plan_torch_archive(stem: str, obj: object) -> ArchivePlan:
    """Lay out the archive that ``torch.save(obj, "<stem>.pt")`` would write, the same bytes for the same object.

    ``obj`` is made of None, bool, int, float, str, tuple, list, dict, OrderedDict, ``TorchSize``, ``DtypeRef``,
    ``GlobalRef``, ``TensorRef`` and ``PickledObject``; storages are numbered in the order in which they are met.
    Unlike torch, a container that is met twice is written twice. Raises ``TypeError`` for any other type.
    """
    if not stem or "/" in stem or "\0" in stem:
        raise ValueError(f"{stem!r} cannot be the name of the folder in an archive")
    pickled, storages = _pickle_object(obj)
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
        piece += _local_header(path, cursor, nbytes, crc)
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
        piece += bytes(_gap_bytes(cursor, nbytes))
    pieces.append((piece_offset, bytes(piece)))

    directory_offset = piece_offset + len(piece)
    directory_bytes = sum(len(_directory_entry(record, 0)) for record in records)
    end = _end_of_directory(len(records), directory_bytes, directory_offset)
    return ArchivePlan(
        size=directory_offset + directory_bytes + len(end),
        pieces=tuple(pieces),
        records={r.storage: (r.data_offset, r.nbytes) for r in records if r.storage is not None},
        zip_records=tuple(records),
    )


def crc32_combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """The CRC-32 of A followed by B, from theirs and the length of B in bytes, as zlib's ``crc32_combine``."""
    if length_b < 0:
        raise ValueError(f"a length cannot be negative: {length_b}")
    return _multiply(_shift_by_bytes(length_b), crc_a) ^ crc_b


@lru_cache(maxsize=1024)
def crc_of_zeros(nbytes: int) -> int:
    """The CRC-32 of that many zero bytes, without looking at them."""
    crc, power, length = 0, crc32(b"\0"), 1  # power is the CRC of length zeros
    while nbytes:
        if nbytes & 1:
            crc = crc32_combine(crc, power, length)
        power, length, nbytes = crc32_combine(power, power, length), 2 * length, nbytes >> 1
    return crc


# --- CRC-32 as polynomials over GF(2), reflected: bit 31 is x^0. Appending n bytes multiplies by x^(8n). ---

_CRC_POLYNOMIAL = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = b >> 1 ^ _CRC_POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=1024)
def _shift_by_bytes(count: int) -> int:
    power = 0x80000000  # x^0
    square = 0x00800000  # x^8
    while count:
        if count & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        count >>= 1
    return power


# --- The zip container: APPNOTE.TXT 6.3.10, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT ---

_LOCAL_CRC_OFFSET = 14
_NAMES_ARE_UTF8 = 0x0800
_STORED = 0
_FIRST_OF_JANUARY_1980 = 0x0021  # the earliest date that a zip can hold


def _local_header(name: bytes, cursor: int, nbytes: int, crc: int) -> bytes:
    """The header at ``cursor``, padded by an extra field ``FB`` such that the data after it is aligned.

    torch.load computes where the data must start when ``.format_version`` is there, so the padding is torch's, to
    the byte: its zip64 field counts the header's own offset, too. We leave that out, as the standard has no place
    for it in a local header, and pad by as much more.
    """
    zip64 = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= SATURATED_32 else b""
    torch_zip64_bytes = len(zip64)
    if cursor >= SATURATED_32:
        torch_zip64_bytes += 8 if zip64 else 12
    start = cursor + LOCAL_HEADER.size + len(name) + torch_zip64_bytes + 4
    padding = start + -start % ALIGNMENT_BYTES - (cursor + LOCAL_HEADER.size + len(name) + len(zip64) + 4)
    extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = min(nbytes, SATURATED_32)
    fixed = (_version_needed(nbytes, 0), _NAMES_ARE_UTF8, _STORED, 0, _FIRST_OF_JANUARY_1980)
    return LOCAL_HEADER.pack(LOCAL_SIGNATURE, *fixed, crc, size, size, len(name), len(extra)) + name + extra


def _gap_bytes(header_offset: int, nbytes: int) -> int:
    """Zeros between a record and the next header, where torch writes a data descriptor.

    Our sizes and checksums stand in the local headers, but torch.load counts on the descriptors' room when
    it computes offsets (``_get_offset`` in torch/serialization.py; used for ``map_location="meta"``).
    """
    if not nbytes:
        return 0
    return 24 if header_offset >= SATURATED_32 or nbytes >= SATURATED_32 else 16


def _version_needed(nbytes: int, header_offset: int) -> int:
    return 45 if nbytes >= SATURATED_32 or header_offset >= SATURATED_32 else 20


def _directory_entry(record: _Record, crc: int) -> bytes:
    saturated = [
        *([record.nbytes, record.nbytes] if record.nbytes >= SATURATED_32 else []),
        *([record.header_offset] if record.header_offset >= SATURATED_32 else []),
    ]
    zip64 = struct.pack(f"<2H{len(saturated)}Q", 1, 8 * len(saturated), *saturated) if saturated else b""
    needed = _version_needed(record.nbytes, record.header_offset)
    fixed = (needed, needed, _NAMES_ARE_UTF8, _STORED, 0, _FIRST_OF_JANUARY_1980)
    size = min(record.nbytes, SATURATED_32)
    offset = min(record.header_offset, SATURATED_32)
    entry = DIRECTORY_ENTRY.pack(
        DIRECTORY_SIGNATURE, *fixed, crc, size, size, len(record.name), len(zip64), 0, 0, 0, 0, offset
    )
    return entry + record.name + zip64


def _end_of_directory(count: int, nbytes: int, offset: int) -> bytes:
    zip64 = b""
    if count >= SATURATED_16 or nbytes >= SATURATED_32 or offset >= SATURATED_32:
        zip64 = END64.pack(END64_SIGNATURE, END64.size - 12, 45, 45, 0, 0, count, count, nbytes, offset)
        zip64 += LOCATOR64.pack(LOCATOR64_SIGNATURE, 0, offset + nbytes, 1)
    count = min(count, SATURATED_16)
    nbytes, offset = min(nbytes, SATURATED_32), min(offset, SATURATED_32)
    return zip64 + END.pack(END_SIGNATURE, 0, 0, count, count, nbytes, offset, 0)


_COPY_AGAIN = "Copy the file again from where it was written, and compare the sizes."

#: How a file begins that is no archive -> what it is, and what to do about it.
_OTHER_BEGINNINGS: Mapping[bytes, tuple[str, str]] = {
    pickle.PROTO + b"\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.": (  # MAGIC_NUMBER in torch/serialization.py
        "is in the form that torch.save wrote before version 1.6",
        "Load it with torch.load(..., weights_only=True) and save it again with torch.save.",
    ),
    b"version https://git-lfs": ("is a pointer left by Git LFS, not the file itself", "Run git lfs pull."),
}


@dataclass(frozen=True, kw_only=True)
class ArchiveRecord:
    """One record's bytes, and the CRC-32 that was stored for them."""

    name: str  #: without the archive's folder: ``data/17``
    offset: int  #: absolute, of its first byte in the file
    nbytes: int
    crc: int | None  #: None in an archive that was written without checksums


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """An open archive and its directory; good for as long as ``file`` is open."""

    path: Path
    file: BinaryIO
    directory: ZipDirectory
    entries: Mapping[str, ZipRecord]  #: by their name within the archive's folder

    def locate(self, record: str) -> tuple[int, int] | None:
        """The absolute offset and the length of a record's bytes, ``None`` when there is no such record."""
        entry = self.entries.get(record)
        if entry is None:
            return None
        if not entry.stored:
            raise self.damaged(
                f"record {_shown(record)} is compressed or encrypted",
                "torch.save stores records as they are, so that they can be mapped.",
                "Load the file with torch.load(..., weights_only=True) and save it again with torch.save.",
            )
        try:
            return self.directory.place(self.file.fileno(), entry), entry.nbytes
        except ValueError as error:
            raise self.damaged(
                f"record {_shown(record)} is not where the zip directory says ({_shown(str(error))})",
                "Records that lie one after the other, before the directory, were expected.",
            ) from error

    def records(self) -> list[ArchiveRecord]:
        """Every record, where it lies, and its checksum."""
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
            raise self.damaged(f"{record} has {nbytes} bytes", f"At most {most_bytes} were expected.{advice}")
        data = self._read(offset, nbytes)
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
        # Archives before torch 2.1 do not say; torch.load takes them for little-endian, too.
        if found not in (None, b"little"):
            raise self.damaged(
                f"the byte order is {_shown(found[:16].decode('latin-1'))}",
                "Only little-endian archives are read.",
                "Load the file with torch.load(..., weights_only=True) on a little-endian machine and save it again.",
            )

    def damaged(self, found: str, expected: str, advice: str = _COPY_AGAIN) -> CorruptFile:
        return CorruptFile(f"{self.path}: {found}.\n{expected}\n{advice}")

    def _read(self, offset: int, nbytes: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(nbytes)


def _open_archive(path: Path, file: BinaryIO) -> _Archive:
    beginning = file.read(512)
    if not beginning.startswith(LOCAL_SIGNATURE):
        found, advice = _what_begins_with(beginning)
        raise CorruptFile(f"{path}: {found}.\nA zip archive written by torch.save was expected.\n{advice}")
    try:
        directory = read_zip_directory(file.fileno())
    except ValueError as error:
        raise CorruptFile(
            f"{path}: begins like a zip archive, but its directory cannot be read ({_shown(str(error))}).\n"
            "A complete file, with a directory that can be read in one way only, was expected; this one has "
            f"{file.seek(0, 2)} bytes and was perhaps cut short.\n"
            f"{_COPY_AGAIN}"
        ) from error
    folders = {record.name.partition("/")[0] for record in directory.records}
    entries = {record.name.partition("/")[2]: record for record in directory.records}
    names = {record.name.lower() for record in directory.records}  # torch finds records whatever their case
    # torch takes the folder from whichever record is first.
    if len(folders) != 1 or "data.pkl" not in entries or "" in entries or len(names) != len(directory.records):
        raise CorruptFile(
            f"{path}: is a zip archive, but not one of torch.save's: it has {len(directory.records)} records, of "
            f"{len(names)} names in {len(folders)} folders.\n"
            "Exactly one folder, with one data.pkl and no record twice, was expected.\n"
            "Check that the path is right; other zip files, such as .npz, cannot be read here."
        )
    if code := next((name for name in entries if name == "constants.pkl" or name.startswith("code/")), None):
        raise UnsafePickle(
            f"{path}: is a TorchScript archive, which holds code (record {_shown(code)}). Nothing was executed.\n"
            "A file written by torch.save was expected.\n"
            "Load it in a safe place and save its state_dict with torch.save."
        )
    archive = _Archive(path=path, file=file, directory=directory, entries=entries)
    archive.check_byte_order()
    return archive


def _what_begins_with(beginning: bytes) -> tuple[str, str]:
    if not beginning:
        return "is empty", _COPY_AGAIN
    if beginning[257:262] == b"ustar":
        return (
            "is a tar file, perhaps in the form that torch.save wrote before version 0.1.10",
            "Load it with an old torch and save it again with a new one.",
        )
    for start, (found, advice) in _OTHER_BEGINNINGS.items():
        if beginning.startswith(start):
            return found, advice
    return f"begins with the bytes {beginning[:8].hex(' ')}", "Check that the path is right. " + _COPY_AGAIN


def _shown(text: str) -> str:
    """Text from a file as it can stand in a message: one line of ASCII, not too long."""
    short = text if len(text) <= 200 else text[:200] + "..."
    return short.encode("unicode_escape").decode("ascii")


# --- Reading the pickle ---

_STORAGE_DTYPES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_STORAGE_CLASSES = {dtype: name for name, dtype in _STORAGE_DTYPES.items()}

#: The dtypes that may be saved as values, of which tensors may have those in DTYPE_BYTES.
_DTYPE_NAMES = {
    *DTYPE_BYTES,
    *("complex32", "complex64", "complex128"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
}

_UNTYPED_STORAGES = {("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")}
_TENSOR_CLASSES = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter")}
_NAMED_ONLY = _UNTYPED_STORAGES | _TENSOR_CLASSES | {("torch", name) for name in _STORAGE_DTYPES}

_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 63


class _Unpickler:
    """Runs the instructions of one data.pkl, for the length of one ``load``.

    It is not a ``pickle.Unpickler``: that one has instructions which call, build and set attributes as they please,
    reserves memory for any memo index it is told, and leaves by many exceptions. This one knows the few instructions
    that torch.save writes, imports nothing, and never recurses. What it calls stands in ``_BUILDERS`` or ``allow``.
    """

    def __init__(
        self, archive: _Archive, pickled: bytes, allow: Mapping[tuple[str, str], Callable[..., object]]
    ) -> None:
        self.archive = archive
        self.pickled = pickled
        self.allow = allow
        self.protocol = 0
        self.position = 0
        self.stack: list[object] = []
        self.marked: list[list[object]] = []  # the stacks beneath each MARK
        self.memo: dict[int, object] = {}
        self.foreign: dict[int, object] = {}  # by id: what ``allow`` returned, which alone may be given any state

    def load(self) -> object:
        try:
            while (opcode := self.take(1)) != pickle.STOP:
                instruction = _INSTRUCTIONS.get(opcode)
                if instruction is None:
                    self.refuse_instruction(opcode)
                instruction(self)
            result = self.stack.pop()
        except (LookupError, UnicodeDecodeError) as error:  # an empty stack, an unknown memo index, a bad string
            raise self.damaged("is not a valid pickle") from error
        if self.stack or self.marked:
            raise self.damaged("ends before its object is complete")
        return result

    # Failures

    def damaged(self, found: str) -> CorruptFile:
        return self.archive.damaged(
            f"data.pkl {found} (near its byte {self.position})", "A pickle written by torch.save was expected."
        )

    def refuse(self, asked: str) -> NoReturn:
        raise UnsafePickle(
            f"{self.archive.path}: data.pkl asks for {_shown(asked)}, which is not on the list of what a checkpoint "
            "may contain. Nothing was executed.\n"
            "Tensors, parameters, dtypes, sizes and plain Python containers were expected.\n"
            "If you know where the file comes from, load it with torch in a safe place and save only the tensors again."
        )

    def refuse_instruction(self, opcode: bytes) -> NoReturn:
        names = {known.code: known.name for known in pickletools.opcodes}
        name = names.get(opcode.decode("latin-1"))
        if name is None:
            raise self.damaged(f"has the byte {opcode.hex()} where an instruction should be")
        self.refuse(f"the pickle instruction {name}")

    # Parts of instructions

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.pickled):
            raise self.damaged("is cut short")
        taken = self.pickled[self.position : end]
        self.position = end
        return taken

    def take_int(self, nbytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def take_line(self) -> str:
        end = self.pickled.find(b"\n", self.position)
        if end < 0:
            raise self.damaged("is cut short")
        line = self.take(end - self.position)
        self.position += 1
        return line.decode("utf-8")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[object]:
        above = self.stack
        self.stack = self.marked.pop()
        return above

    # Instructions

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def text(self, length_bytes: int) -> None:
        self.push(self.take(self.take_int(length_bytes)).decode("utf-8", "surrogatepass"))

    def long(self, length_bytes: int) -> None:
        self.push(self.take_int(self.take_int(length_bytes), signed=True))

    def double(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    def set_protocol(self) -> None:
        self.protocol = self.take_int(1)
        if self.protocol > 5:
            raise self.damaged(f"has protocol {self.protocol}")

    def pack_last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise self.damaged(f"appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self.damaged(f"sets {len(items)} keys and values of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_plain_key(key):
                raise self.damaged(f"has a {type(key).__name__} as a key")
            target[key] = value

    def set_last_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.damaged("names a global by something other than text")
        if self.protocol < 3:  # written with Python 2's names
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        # Compared whole, never split at dots and never looked up: "OrderedDict.__init__" is just an unknown name.
        asked = (module, name)
        if module == "torch" and name in _DTYPE_NAMES:
            self.push(DtypeRef(name))
        elif asked in _BUILDERS or asked in _NAMED_ONLY or asked in self.allow:
            self.push(GlobalRef(module=module, name=name))
        else:
            self.refuse(f"{module}.{name}")

    def find_global_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.find_global(module, name)

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, GlobalRef) or not isinstance(args, tuple):
            raise self.damaged(f"calls a {type(function).__name__} with a {type(args).__name__}")
        builder = _BUILDERS.get((function.module, function.name))
        self.push(builder(self, args) if builder else self.call_allowed(function, args))

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, GlobalRef) or not isinstance(args, tuple):
            raise self.damaged(f"creates a {type(cls).__name__} from a {type(args).__name__}")
        self.push(self.call_allowed(cls, args))

    def call_allowed(self, function: GlobalRef, args: tuple[object, ...]) -> object:
        substitute = self.allow.get((function.module, function.name))
        if substitute is None:
            self.refuse(f"a call of {function.module}.{function.name}")
        made = self.substituted(lambda: substitute(*args), f"{function.module}.{function.name}")
        self.foreign[id(made)] = made
        return made

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict:
            # A state_dict keeps the versions of its modules in an attribute, _metadata. None may hide a method.
            if not _is_state(state) or any(hasattr(OrderedDict, name) for name in state):
                self.refuse("attributes of an OrderedDict that hide its own")
            vars(target).update(state)
        elif id(target) not in self.foreign:
            self.refuse(f"setting the state of a {type(target).__name__}")
        elif (set_state := getattr(type(target), "__setstate__", None)) is not None:
            self.substituted(lambda: set_state(target, state), f"{type(target).__name__}.__setstate__")
        elif _is_state(state) and hasattr(target, "__dict__"):
            vars(target).update(state)
        else:
            raise self.damaged(f"sets the state of a {type(target).__name__} to a {type(state).__name__}")

    def substituted(self, call: Callable[[], object], name: str) -> object:
        try:
            return call()
        except SmolconvError:
            raise
        except Exception as error:  # our callers' classes cannot foresee what a damaged pickle gives them
            raise self.damaged(f"gives {_shown(name)} what it cannot take ({_shown(str(error))})") from error

    def find_storage(self) -> None:
        match self.stack.pop():
            case ("storage", GlobalRef(module=module, name=name), str(key), str(), int(numel)) if _is_count(numel):
                pass  # the fourth is the device it was on
            case _:
                raise self.damaged("names a storage by something other than (class, key, device, count)")
        dtype = _STORAGE_DTYPES.get(name) if module == "torch" else None
        if dtype is None and (module, name) not in _UNTYPED_STORAGES:
            self.refuse(f"a storage of class {module}.{name}")
        place = self.archive.locate(f"data/{key}")
        if place is None:
            raise self.damaged(f"refers to the record data/{_shown(key)}, which is missing")
        offset, record_bytes = place
        nbytes = numel * (DTYPE_BYTES[dtype] if dtype else 1)
        if nbytes > record_bytes:
            raise self.damaged(f"gives storage {_shown(key)} {nbytes} bytes, but its record has {record_bytes}")
        self.push(ArchiveStorage(key=key, dtype=dtype, offset=offset, nbytes=nbytes))

    # What may be called

    def ordered_dict(self, args: tuple[object, ...]) -> object:
        if args:
            raise self.damaged("fills an OrderedDict in its constructor")
        return OrderedDict()

    def size(self, args: tuple[object, ...]) -> object:
        match args:
            case (tuple(sizes),):
                return TorchSize(self.counts(sizes))
        raise self.damaged("has a torch.Size of something other than a tuple")

    def frozen_set(self, args: tuple[object, ...]) -> object:
        match args:
            case (list(items),) if all(map(_is_plain_key, items)):
                return frozenset(items)
        raise self.damaged("has a set of something other than plain values")

    def tensor(self, args: tuple[object, ...]) -> object:
        # _rebuild_tensor: (storage, offset, shape, stride); _v2 has also (requires_grad, hooks[, metadata])
        match args:
            case (ArchiveStorage(dtype=str(dtype)) as storage, offset, shape, stride):
                return self.place_tensor(storage, dtype, (offset, shape, stride), [])
            case (ArchiveStorage(dtype=str(dtype)) as storage, offset, shape, stride, _, _, *metadata):
                return self.place_tensor(storage, dtype, (offset, shape, stride), metadata)
        raise self.damaged("describes a tensor by other things than storage, offset, shape and stride")

    def tensor_with_dtype(self, args: tuple[object, ...]) -> object:
        # _rebuild_tensor_v3: (storage, offset, shape, stride, requires_grad, hooks, dtype[, metadata])
        match args:
            case (ArchiveStorage() as storage, offset, shape, stride, _, _, DtypeRef() as dtype, *metadata):
                return self.place_tensor(storage, str(dtype), (offset, shape, stride), metadata)
        raise self.damaged("describes a tensor by other things than storage, offset, shape, stride and dtype")

    def parameter(self, args: tuple[object, ...]) -> object:
        # _rebuild_parameter: (tensor, requires_grad, hooks); _with_state has also the Python attributes
        match args:
            case (ArchiveTensor() as tensor, _, _) | (ArchiveTensor() as tensor, _, _, _):
                return tensor
        raise self.damaged("has a parameter made of something other than a tensor")

    def tensor_with_attributes(self, args: tuple[object, ...]) -> object:
        # _rebuild_from_type_v2: (function, class, its arguments, the Python attributes), which are dropped. Called for
        # plain tensors that somebody set attributes on; DeepSpeed does. Subclasses may reinterpret the data: refused.
        match args:
            case (GlobalRef() as function, GlobalRef() as cls, tuple(arguments), _):
                builder = _TENSOR_BUILDERS.get((function.module, function.name))
                if builder is not None and (cls.module, cls.name) in _TENSOR_CLASSES:
                    return builder(self, arguments)
                self.refuse(f"a {cls.module}.{cls.name} made by {function.module}.{function.name}")
        raise self.damaged("describes a tensor with attributes by something else")

    def place_tensor(
        self, storage: ArchiveStorage, dtype: str, view: tuple[object, object, object], metadata: list[object]
    ) -> ArchiveTensor:
        offset, sizes, steps = view[0], self.counts(view[1]), self.counts(view[2])
        if not _is_count(offset) or len(sizes) != len(steps) or math.prod(sizes) >= _MAX_COUNT:
            raise self.damaged(f"gives a tensor of storage {_shown(storage.key)} an impossible shape, stride or offset")
        if any(metadata) or dtype not in DTYPE_BYTES:
            # The metadata says that the elements are yet to be negated or conjugated.
            raise self.archive.damaged(
                f"a tensor of storage {_shown(storage.key)} is {dtype}"
                + (" and marked for negation or conjugation" if any(metadata) else ""),
                f"Plain tensors of {', '.join(DTYPE_BYTES)} can be read.",
                "Convert it with torch and save the file again.",
            )
        item_bytes = DTYPE_BYTES[dtype]
        if 0 in sizes:
            first = 0  # of no elements, which torch lets point anywhere
        else:
            first = offset * item_bytes
            last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) * item_bytes
            if last + item_bytes > storage.nbytes:
                raise self.damaged(
                    f"places a tensor at bytes {first} to {last + item_bytes} of storage {_shown(storage.key)}, "
                    f"which has {storage.nbytes}"
                )
        return ArchiveTensor(
            path=self.archive.path,
            dtype=dtype,
            shape=sizes,
            stride=steps,
            offset=storage.offset + first,
            storage=storage.key,
        )

    def counts(self, values: object) -> tuple[int, ...]:
        if isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS:
            counts = tuple(value for value in values if _is_count(value))
            if len(counts) == len(values):
                return counts
        raise self.damaged("has a shape or stride that is not a short tuple of counts")


_Builder = Callable[[_Unpickler, tuple[object, ...]], object]

_TENSOR_BUILDERS: Mapping[tuple[str, str], _Builder] = {
    ("torch._utils", "_rebuild_tensor"): _Unpickler.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Unpickler.tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Unpickler.tensor_with_dtype,
}

#: Everything that a pickle may call, with what is called in its place.
_BUILDERS: Mapping[tuple[str, str], _Builder] = {
    **_TENSOR_BUILDERS,
    ("torch._utils", "_rebuild_parameter"): _Unpickler.parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Unpickler.parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _Unpickler.tensor_with_attributes,
    ("torch", "Size"): _Unpickler.size,
    ("collections", "OrderedDict"): _Unpickler.ordered_dict,
    ("builtins", "set"): _Unpickler.frozen_set,
}

#: The instructions that torch.save writes by default (protocol 2), and those in which protocols 3 to 5 say the same.
_INSTRUCTIONS: Mapping[bytes, Callable[[_Unpickler], object]] = {
    pickle.PROTO: _Unpickler.set_protocol,
    pickle.FRAME: lambda u: u.take(8),
    pickle.MARK: _Unpickler.mark,
    pickle.NONE: lambda u: u.push(None),
    pickle.NEWTRUE: lambda u: u.push(True),
    pickle.NEWFALSE: lambda u: u.push(False),
    pickle.BININT: lambda u: u.push(u.take_int(4, signed=True)),
    pickle.BININT1: lambda u: u.push(u.take_int(1)),
    pickle.BININT2: lambda u: u.push(u.take_int(2)),
    pickle.LONG1: lambda u: u.long(1),
    pickle.LONG4: lambda u: u.long(4),
    pickle.BINFLOAT: _Unpickler.double,
    pickle.BINUNICODE: lambda u: u.text(4),
    pickle.SHORT_BINUNICODE: lambda u: u.text(1),
    pickle.BINUNICODE8: lambda u: u.text(8),
    pickle.BINBYTES: lambda u: u.push(u.take(u.take_int(4))),
    pickle.SHORT_BINBYTES: lambda u: u.push(u.take(u.take_int(1))),
    pickle.BINBYTES8: lambda u: u.push(u.take(u.take_int(8))),
    pickle.EMPTY_TUPLE: lambda u: u.push(()),
    pickle.TUPLE1: lambda u: u.pack_last(1),
    pickle.TUPLE2: lambda u: u.pack_last(2),
    pickle.TUPLE3: lambda u: u.pack_last(3),
    pickle.TUPLE: lambda u: u.push(tuple(u.pop_to_mark())),
    pickle.EMPTY_LIST: lambda u: u.push([]),
    pickle.APPEND: lambda u: u.append([u.stack.pop()]),
    pickle.APPENDS: lambda u: u.append(u.pop_to_mark()),
    pickle.EMPTY_DICT: lambda u: u.push({}),
    pickle.SETITEM: _Unpickler.set_last_item,
    pickle.SETITEMS: lambda u: u.set_items(u.pop_to_mark()),
    pickle.BINPUT: lambda u: u.remember(u.take_int(1)),
    pickle.LONG_BINPUT: lambda u: u.remember(u.take_int(4)),
    pickle.MEMOIZE: lambda u: u.remember(len(u.memo)),
    pickle.BINGET: lambda u: u.push(u.memo[u.take_int(1)]),
    pickle.LONG_BINGET: lambda u: u.push(u.memo[u.take_int(4)]),
    pickle.GLOBAL: lambda u: u.find_global(u.take_line(), u.take_line()),
    pickle.STACK_GLOBAL: _Unpickler.find_global_on_stack,
    pickle.REDUCE: _Unpickler.reduce,
    pickle.NEWOBJ: _Unpickler.new_object,
    pickle.BUILD: _Unpickler.build,
    pickle.BINPERSID: _Unpickler.find_storage,
}


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_state(value: object) -> TypeGuard[dict[str, object]]:
    return type(value) is dict and all(type(name) is str for name in value)


def _is_plain_key(value: object) -> bool:
    # Tuples within tuples are refused because Python hashes them recursively, each as often as it is contained.
    plain = (str, int, float, bytes, type(None))
    return isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value))


# --- Writing the pickle: protocol 2, in the instructions that torch.load accepts with weights_only ---


@dataclass(frozen=True, kw_only=True)
class _PersistentId:
    value: tuple[object, ...]


def _pickle_object(obj: object) -> tuple[bytes, tuple[Storage, ...]]:
    pickler = _Pickler()
    pickler.write(obj)
    return bytes(pickler.out + pickle.STOP), tuple(pickler.storages)


class _Pickler:
    """Collects the instructions for one object, and the storages in it, numbered as they are met."""

    def __init__(self) -> None:
        self.out = bytearray(pickle.PROTO + b"\x02")
        self.memo: dict[str | GlobalRef, int] = {}  # by value, so that the bytes do not depend on identities
        self.storages: dict[Storage, int] = {}

    def write(self, value: object) -> None:
        kind = type(value)
        writer = _WRITERS.get(kind)
        if writer is None:
            raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be saved in a torch archive")
        writer(self, value)

    def write_bool(self, value: bool) -> None:
        self.out += pickle.NEWTRUE if value else pickle.NEWFALSE

    def write_int(self, value: int) -> None:
        self.out += _int_instruction(value)

    def write_float(self, value: float) -> None:
        self.out += pickle.BINFLOAT + struct.pack(">d", value)

    def write_none(self, _: None) -> None:
        self.out += pickle.NONE

    def write_dtype(self, value: DtypeRef) -> None:
        self.write_memoized(GlobalRef(module="torch", name=str(value)))

    def write_size(self, value: TorchSize) -> None:
        self.write_call("torch", "Size", (tuple(value),))

    def write_list(self, items: list[object]) -> None:
        self.out += pickle.EMPTY_LIST
        self.write_marked(items, pickle.APPENDS)

    def write_dict(self, items: dict[object, object]) -> None:
        self.out += pickle.EMPTY_DICT
        self.write_items(items)

    def write_ordered_dict(self, items: OrderedDict[object, object]) -> None:
        self.write_call("collections", "OrderedDict", ())
        self.write_items(items)
        # A state_dict's _metadata. OrderedDict[str, int]() leaves its type arguments in another attribute.
        if attributes := {name: item for name, item in vars(items).items() if name != "__orig_class__"}:
            self.write(attributes)
            self.out += pickle.BUILD

    def write_object(self, value: PickledObject) -> None:
        self.write_call(value.module, value.name, value.args)
        if value.state is not None:
            self.write(dict(value.state))
            self.out += pickle.BUILD

    def write_persistent_id(self, value: _PersistentId) -> None:
        self.write(value.value)
        self.out += pickle.BINPERSID

    def write_memoized(self, value: str | GlobalRef) -> None:
        index = self.memo.get(value)
        if index is not None:
            self.out += _indexed(pickle.BINGET, pickle.LONG_BINGET, index)
            return
        if isinstance(value, GlobalRef):
            if "\n" in value.module + value.name:
                raise ValueError(f"{value} cannot be the name of a class")
            self.out += pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
        else:
            encoded = value.encode("utf-8", "surrogatepass")
            self.out += pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
        index = self.memo[value] = len(self.memo)
        self.out += _indexed(pickle.BINPUT, pickle.LONG_BINPUT, index)

    def write_tuple(self, items: tuple[object, ...]) -> None:
        short = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
        if len(items) < len(short):
            for item in items:
                self.write(item)
            self.out += short[len(items)]
        else:
            self.write_marked(items, pickle.TUPLE)

    def write_items(self, items: Mapping[object, object]) -> None:
        self.write_marked([part for item in items.items() for part in item], pickle.SETITEMS)

    def write_marked(self, items: Iterable[object], instruction: bytes) -> None:
        self.out += pickle.MARK
        for item in items:
            self.write(item)
        self.out += instruction

    def write_call(self, module: str, name: str, args: tuple[object, ...]) -> None:
        self.write_memoized(GlobalRef(module=module, name=name))
        self.write_tuple(args)
        self.out += pickle.REDUCE

    def write_tensor(self, tensor: TensorRef) -> None:
        storage = tensor.storage
        key = str(self.storages.setdefault(storage, len(self.storages)))
        typed = _STORAGE_CLASSES.get(storage.dtype)  # torch made no storage classes for its later dtypes
        cls = (
            GlobalRef(module="torch", name=typed) if typed else GlobalRef(module="torch.storage", name="UntypedStorage")
        )
        record = _PersistentId(value=("storage", cls, key, "cpu", storage.numel if typed else storage.nbytes))
        stride = _contiguous_stride(tensor.shape)
        args = (record, tensor.offset, tuple(tensor.shape), stride, False, OrderedDict[str, object]())
        if typed:
            self.write_call("torch._utils", "_rebuild_tensor_v2", args)
        else:
            self.write_call("torch._utils", "_rebuild_tensor_v3", (*args, DtypeRef(storage.dtype)))


#: By exact type: a subclass may mean more than its value, and what it means would be lost.
_WRITERS: Mapping[type, Callable[[_Pickler, Any], None]] = {
    type(None): _Pickler.write_none,
    bool: _Pickler.write_bool,
    int: _Pickler.write_int,
    float: _Pickler.write_float,
    str: _Pickler.write_memoized,
    tuple: _Pickler.write_tuple,
    list: _Pickler.write_list,
    dict: _Pickler.write_dict,
    OrderedDict: _Pickler.write_ordered_dict,
    TorchSize: _Pickler.write_size,
    DtypeRef: _Pickler.write_dtype,
    GlobalRef: _Pickler.write_memoized,
    TensorRef: _Pickler.write_tensor,
    PickledObject: _Pickler.write_object,
    _PersistentId: _Pickler.write_persistent_id,
}


def _int_instruction(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    bits = value.bit_length() if value >= 0 else (~value).bit_length()  # without the sign
    encoded = value.to_bytes(bits // 8 + 1, "little", signed=True)
    if len(encoded) > 255:
        raise ValueError(f"torch.load reads integers of at most 255 bytes, not {len(encoded)}")
    return pickle.LONG1 + struct.pack("<B", len(encoded)) + encoded


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + struct.pack("<B", index) if index < 1 << 8 else long + struct.pack("<I", index)


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As torch counts it: a dimension of no elements steps like one of a single element."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
