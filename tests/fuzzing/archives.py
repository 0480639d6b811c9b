"""Damages inside torch archives: fields of the zip, and instructions of its pickle with the checksum made anew."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

_LOCAL = {
    "version": (4, "H"), "flags": (6, "H"), "method": (8, "H"), "time": (10, "H"), "date": (12, "H"), "crc": (14, "I"),
    "packed": (18, "I"), "size": (22, "I"), "name": (26, "H"), "extra": (28, "H"),
}  # fmt: skip
_CENTRAL = {
    "made_by": (4, "H"), "version": (6, "H"), "flags": (8, "H"), "method": (10, "H"), "crc": (16, "I"), "packed": (20, "I"),
    "size": (24, "I"), "name": (28, "H"), "extra": (30, "H"), "comment": (32, "H"), "disk": (34, "H"), "offset": (42, "I"),
}  # fmt: skip
_END = {
    "disk": (4, "H"), "first_disk": (6, "H"), "count_here": (8, "H"), "count": (10, "H"), "nbytes": (12, "I"), "offset": (16, "I"),
    "comment": (20, "H"),
}  # fmt: skip
FIELDS = {"local": _LOCAL, "central": _CENTRAL, "end": _END}
_ALIGNMENT = 64


def _central(content: bytes) -> tuple[list[int], int]:
    """Where the directory's entries are, and the end record."""
    end = content.rindex(b"PK\x05\x06")
    count, _, at = struct.unpack_from("<H2I", content, end + 10)
    places = []
    for _ in range(count):
        places.append(at)
        at += 46 + sum(struct.unpack_from("<3H", content, at + 28))
    return places, end


def changed_zip(content: bytes, op: Mapping[str, Any]) -> bytes:
    """A field of a header, a record's name, an entry twice or not at all. Raises ``ValueError`` where there is none."""
    entries, end = _central(content)
    changed = bytearray(content)
    if op["where"] == "end":
        at = end
    else:
        at = entries[op["record"] % len(entries)]
        if op["where"] == "local":
            (at,) = struct.unpack_from("<I", content, at + 42)
    match op["do"]:
        case "set":
            offset, kind = FIELDS[op["where"]][op["field"]]
            struct.pack_into("<" + kind, changed, at + offset, op["value"] % (1 << (16 if kind == "H" else 32)))
        case "name":
            length = struct.unpack_from("<H", content, at + (26 if op["where"] == "local" else 28))[0]
            start = at + (30 if op["where"] == "local" else 46)
            name = bytes.fromhex(op["hex"])[:length]
            changed[start : start + len(name)] = name
        case "twice" | "gone":
            size = 46 + sum(struct.unpack_from("<3H", content, at + 28))
            entry = content[at : at + size]
            changed[at : at + size] = entry * 2 if op["do"] == "twice" else b""
            more = 1 if op["do"] == "twice" else -1
            end += size * more
            count, nbytes = struct.unpack_from("<HI", changed, end + 10)
            struct.pack_into("<2HI", changed, end + 8, count + more, count + more, nbytes + size * more)
    return bytes(changed)


def pickle_record(content: bytes) -> tuple[str, bytes]:
    """Name and content of the archive's ``data.pkl``."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return name, archive.read(name)


def instructions(pickled: bytes) -> list[tuple[str, Any, bytes]]:
    """(name, argument, bytes) of each."""
    found = list(pickletools.genops(pickled))
    ends = [position for _, _, position in found[1:]] + [len(pickled)]
    return [(code.name, arg, pickled[at:end]) for (code, arg, at), end in zip(found, ends)]


def changed_pickle(content: bytes, op: Mapping[str, Any]) -> bytes:
    """One instruction replaced, inserted, removed, copied or exchanged, in an archive whose checksums hold."""
    name, pickled = pickle_record(content)
    codes = [code for _, _, code in instructions(pickled)]
    at = op["at"]
    match op["do"]:
        case "replace":
            codes[at] = bytes.fromhex(op["hex"])
        case "insert":
            codes.insert(at, bytes.fromhex(op["hex"]))
        case "remove":
            del codes[at]
        case "copy":
            codes.insert(at, codes[op["from"]])
        case "swap":
            codes[at], codes[op["with"]] = codes[op["with"]], codes[at]
        case "repeat":
            codes[at] = codes[at] * op["count"]
    return rebuilt(content, {name: b"".join(codes)})


def rebuilt(content: bytes, records: Mapping[str, bytes]) -> bytes:
    """The archive with other records, stored and aligned as torch writes them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            entry_bytes = records.get(entry.filename) if entry.filename in records else old.read(entry)
            info = zipfile.ZipInfo(entry.filename)
            padding = -(stream.tell() + 30 + len(entry.filename.encode()) + 4) % _ALIGNMENT
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            new.writestr(info, entry_bytes)
    return stream.getvalue()
