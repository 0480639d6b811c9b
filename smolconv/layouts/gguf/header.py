"""A GGUF file's header (ggml's docs/gguf.md, versions 2 and 3): metadata by key, and the tensors' positions."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from smolconv.errors import CorruptFile, UnsupportedModel
from smolconv.files import open_file, reading

if TYPE_CHECKING:
    from types import ModuleType

#: Types of metadata values: struct's codes for numbers, a string, an array of either.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Elements of an array, and 8-byte words of a string; real vocabularies stay below 2^20, a damaged length does not.
_MOST = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the header."""

    shape: tuple[int, ...]
    kind: Any  #: gguf.GGMLQuantizationType
    offset: int  #: bytes from the start of the file
    nbytes: int


class _Header:
    """The open file from its start; every length is checked before it is used.

    gguf's own GGUFReader reads the same (the tests compare them), but it checks nothing: one damaged length keeps it
    busy until memory ends. It also takes 3.2 s and 202 MB for the 98,000 strings of SmolLM2-135M; this takes 0.1 s.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file

    def corrupt(self, why: str) -> CorruptFile:
        return CorruptFile(f"{self.path} is not a whole GGUF file: {why}.\nCopy or download it again.")

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= _MOST * 8 else b""
        if len(data) != count:
            raise self.corrupt(f"{count} bytes are missing at byte {self.file.tell() - len(data)}")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a string is not UTF-8 ({error})") from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.corrupt(f"a value has type {kind}, which does not exist")
        inner, count = self.number("I"), self.number("Q")
        if count > _MOST or inner not in (_STRING, *_NUMBERS):
            raise self.corrupt(f"an array has {count} elements of type {inner}")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        data = self.take(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", data))


def read_header(path: Path, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, Entry]]:
    """All metadata by key, and the tensors' positions by name."""
    with reading(path), open(open_file(path), "rb") as file:
        header = _Header(path, file)
        if header.take(4) != b"GGUF":
            raise header.corrupt("it does not begin with GGUF")
        version = header.number("I")
        if version not in (2, 3):
            raise UnsupportedModel(f"{path} is GGUF version {version}; little-endian versions 2 and 3 are read.")
        tensor_count, key_count = header.number("Q"), header.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.string()
            if key in metadata:
                raise header.corrupt(f"the key {key} occurs twice")
            metadata[key] = header.value(header.number("I"))
        entries: dict[str, Entry] = {}
        for _ in range(tensor_count):
            name = header.string()
            if name in entries:
                raise header.corrupt(f"the tensor {name} occurs twice")
            entries[name] = _read_entry(header, name, gguf)
        end_of_header = file.tell()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise header.corrupt(f"general.alignment is {alignment!r}")
    start, size = -(-end_of_header // alignment) * alignment, path.stat().st_size
    at = 0
    for name, entry in entries.items():
        # As in llama.cpp, tensors must be consecutive, so that none can overlap another.
        if entry.offset != at:
            raise header.corrupt(f"{name} begins at byte {entry.offset} of the data, expected {at}")
        at += -(-entry.nbytes // alignment) * alignment
        if start + entry.offset + entry.nbytes > size:
            raise header.corrupt(
                f"{name} would end at byte {start + entry.offset + entry.nbytes}, the file ends at {size}"
            )
    return metadata, {name: replace(entry, offset=start + entry.offset) for name, entry in entries.items()}


def _read_entry(header: _Header, name: str, gguf: ModuleType) -> Entry:
    dimensions = header.number("I")
    if not 1 <= dimensions <= 4:
        raise header.corrupt(f"{name} has {dimensions} dimensions")
    shape = tuple(reversed([header.number("Q") for _ in range(dimensions)]))
    number, offset = header.number("I"), header.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedModel(
            f"{header.path}: {name} has type {number}, which this version of gguf does not know.\n"
            "Install a newer one: pip install --upgrade gguf"
        ) from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise header.corrupt(f"{name} has rows of {shape[-1]} elements in blocks of {block}")
    return Entry(shape=shape, kind=kind, offset=offset, nbytes=math.prod(shape) // block * block_bytes)
