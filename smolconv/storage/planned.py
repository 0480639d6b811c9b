"""Output files, planned to the byte before data moves, and the results of writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from smolconv.tensors.lazy import LazyTensor

#: Bytes at an absolute offset of a file.
Piece = tuple[int, bytes]


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor's place in an output file."""

    name: str
    slot: str | None  #: None for a file that is copied unchanged
    offset: int  #: bytes from the start of the file
    source: LazyTensor


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """An output file whose size and offsets are known before any data is read."""

    path: PurePosixPath  #: relative to the output folder
    size: int
    tensors: tuple[PlannedTensor, ...] = ()
    pieces: tuple[Piece, ...] = ()
    #: Pieces that depend on the tensors' CRC-32s (zip archives): CRCs in order -> pieces.
    finish: Callable[[Sequence[int]], Sequence[Piece]] | None = None
    #: Reopens the written file and raises if it differs from the plan.
    check: Callable[[Path], None] | None = None


def plain_file(path: str, data: bytes) -> PlannedFile:
    """A small file held in memory."""
    return PlannedFile(path=PurePosixPath(path), size=len(data), pieces=((0, data),))


@dataclass(frozen=True, kw_only=True)
class WrittenTensor:
    """The results of the pass over a tensor's stored bytes."""

    digest: str | None  #: "xxh3-128:..." or "sha256:..."
    crc: int = 0
    nonfinite: bool = False  #: holds NaN or infinity


class Journal(Protocol):
    """Records finished files, so that an interrupted conversion can continue."""

    @property
    def done(self) -> Mapping[str, Sequence[WrittenTensor]]: ...

    def add(self, path: str, tensors: Sequence[WrittenTensor]) -> None: ...


def total_bytes(files: Iterable[PlannedFile]) -> int:
    return sum(file.size for file in files)
