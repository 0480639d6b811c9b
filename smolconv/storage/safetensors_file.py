"""Reads and plans safetensors headers; loads no tensor.

A file is eight bytes of header length, a JSON header padded with spaces, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from smolconv.errors import CorruptFile, MissingFile
from smolconv.files import open_file, reading
from smolconv.parsing import parse_json
from smolconv.storage.planned import PlannedFile, PlannedTensor
from smolconv.tensors.dtypes import DTYPE_BYTES
from smolconv.tensors.lazy import LazyTensor, Stored

_CODES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
#: The safetensors library's limit, so that it can read every header written here.
_MAX_HEADER_BYTES = 100_000_000
_FIRST_READ_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class SafetensorsFile:
    """One file's tensors, by name in the order of their bytes, and its string metadata."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read the header and check it against the file's size.

    Raises ``MissingFile``, and ``CorruptFile`` for a truncated file, a broken header, gaps, overlaps or unknown dtypes.
    """
    try:
        # One read covers the header of most files; each further read is a round trip on a network file system.
        with reading(path), open(open_file(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            first = os.pread(file.fileno(), _FIRST_READ_BYTES, 0)
            if len(first) < 8:
                raise CorruptFile(f"{path} has {size} bytes; a safetensors file has at least 8. Copy the file again.")
            (length,) = struct.unpack_from("<Q", first)
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CorruptFile(
                    f"{path} declares a header of {length} bytes but has only {size} bytes.\n"
                    "It is truncated or not a safetensors file: copy it again."
                )
            raw = first[8 : 8 + length]
            while len(raw) < length:
                more = os.pread(file.fileno(), length - len(raw), 8 + len(raw))
                if not more:
                    break  # truncated meanwhile; the JSON will not parse
                raw += more
    except FileNotFoundError:
        raise MissingFile(f"{path} is not there.") from None
    header = _parse_header(path, raw)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CorruptFile(
            f"{path}: the header's metadata is {metadata!r:.60}, expected an object. Copy the file again."
        )
    start = 8 + length
    tensors = {name: _entry(path, name, value, start) for name, value in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    at = start
    for name, tensor in ordered.items():
        if tensor.offset != at:
            raise CorruptFile(f"{path}: {name} begins at byte {tensor.offset}, expected {at}: the tensors leave gaps.")
        at += tensor.nbytes
    if at != size:
        raise CorruptFile(
            f"{path} has {size} bytes, but {at} by its header.\nThe file is truncated or padded: copy it again."
        )
    return SafetensorsFile(path=path, tensors=ordered, metadata={str(k): str(v) for k, v in metadata.items()})


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw, unique=True)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise CorruptFile(f"{path}: the safetensors header cannot be read ({error}). Copy the file again.") from None
    return header


def _entry(path: Path, name: str, value: Any, start: int) -> Stored:
    try:
        dtype = _DTYPES[value["dtype"]]
        shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
        if not all(type(n) is int for n in (*shape, begin, end)):
            raise ValueError(shape)
    except (KeyError, TypeError, ValueError):
        raise CorruptFile(f"{path}: the header's entry for {name} cannot be read: {value!r:.120}") from None
    if min((*shape, begin), default=0) < 0 or end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise CorruptFile(f"{path}: {name} is {list(shape)} of {dtype}, but has {end - begin} bytes.")
    return Stored(path=path, offset=start + begin, shape=shape, dtype=dtype)


def plan_safetensors(
    path: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], slot: str
) -> PlannedFile:
    """Fix the header and every offset of one file. Tensors keep their order, wider dtypes first for alignment."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in ordered.items():
        header[name] = {
            "dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    planned = tuple(
        PlannedTensor(name=name, slot=slot, offset=start + header[name]["data_offsets"][0], source=tensor)
        for name, tensor in ordered.items()
    )

    def check(written: Path) -> None:
        found = read_safetensors(written).tensors
        wanted = {t.name: (t.offset, t.source.shape, t.source.dtype) for t in planned}
        if {name: (t.offset, t.shape, t.dtype) for name, t in found.items()} != wanted:
            raise CorruptFile(f"{written} reads back differently from what was planned.")

    return PlannedFile(
        path=PurePosixPath(path),
        size=start + at,
        tensors=planned,
        pieces=((0, struct.pack("<Q", len(raw)) + raw),),
        check=check,
    )
