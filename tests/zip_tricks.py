"""Zip archives that contradict themselves, made with zipfile and struct: what one reader sees of them another does not."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path


class Canary:
    """Pickled, it writes a file when it is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


def evil_pickle(canary: Path) -> bytes:
    return pickle.dumps({"module": Canary(canary)}, 2)


def archive_bytes(pickled: bytes, folder: str = "archive", records: dict[str, bytes] | None = None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        for name, content in {"byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"{folder}/{name}", content)
    return stream.getvalue()


def parts(archive: bytes) -> tuple[bytes, bytes, int]:
    """(records, directory, number of records) of an archive without comment or zip64."""
    count, nbytes, offset = struct.unpack("<HII", archive[-12:-2])
    return archive[:offset], archive[offset : offset + nbytes], count


def end(count: int, nbytes: int, offset: int, comment: bytes = b"") -> bytes:
    return struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, nbytes, offset, len(comment)) + comment


def moved(directory: bytes, by: int) -> bytes:
    """The directory of records that lie ``by`` bytes further on."""
    out, at = bytearray(directory), 0
    while at < len(out):
        name, extra, comment = struct.unpack_from("<3H", out, at + 28)
        (offset,) = struct.unpack_from("<I", out, at + 42)
        struct.pack_into("<I", out, at + 42, offset + by)
        at += 46 + name + extra + comment
    return bytes(out)


def two_directories(shown: bytes, hidden: bytes) -> bytes:
    """zipfile takes the directory before the end record, of ``shown``; torch the written offset, of ``hidden``.

    zipfile adds the distance between the two to every offset, so the first one's are written that much too small.
    """
    good, good_directory, count = parts(shown)
    evil, evil_directory, evil_count = parts(hidden)
    nbytes = max(len(good_directory), len(evil_directory))
    assert count == evil_count and nbytes == len(good_directory) == len(evil_directory)
    records = evil + good
    return records + evil_directory + moved(good_directory, len(evil) - nbytes) + end(count, nbytes, len(records))


def zip64_elsewhere(shown: bytes, hidden: bytes) -> bytes:
    """The locator points to the zip64 record of ``hidden``; the one beside the locator is of ``shown``."""
    good, good_directory, count = parts(shown)
    evil, evil_directory, evil_count = parts(hidden)
    evil_directory = moved(evil_directory, len(good))

    def end64(number: int, nbytes: int, offset: int) -> bytes:
        return struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, number, number, nbytes, offset)

    body = good + evil + evil_directory
    evil_end = len(body)
    body += end64(evil_count, len(evil_directory), len(good) + len(evil))
    good_at = len(body)
    body += good_directory + end64(count, len(good_directory), good_at)
    body += struct.pack("<4sIQI", b"PK\x06\x07", 0, evil_end, 1)
    return body + end(count, len(good_directory), good_at)
