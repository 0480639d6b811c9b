"""Finds text files and reads their documents for datatrove."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import xxhash

from smolconv.errors import CorruptFile, UsageError, some_of

#: Packages that each kind of input needs besides datatrove and tokenizers; datatrove does not declare them.
KINDS = {"jsonl": ("orjson",), "parquet": ("pyarrow",), "txt": ()}
_SUFFIX = re.compile(r"\.(jsonl|parquet|txt)(\.gz|\.zst)?$")
#: The suffix shown in messages: the last one, with the one before it if the last is a compression's.
_SHOWN_SUFFIX = re.compile(r"(?:\.\w{1,12})?\.(?:gz|zst|bz2|xz|zip)$|\.\w{1,12}$")
_EXPECTED = "Expected .jsonl, .parquet, .txt (.jsonl and .txt also as .gz and .zst), or a folder of them."
#: In datatrove's log: a task skipped documents, or found no separator in its files.
NO_TEXT, NO_SEPARATOR = "document without text", "separator not found"
_PARQUET_ROWS = 1000
#: Read at once; zstd makes at most 32,000 times as many bytes of them.
_COMPRESSED_BYTES = 1 << 14
_FORMATS = "--format txt reads every input as text, --format jsonl as lines of JSON: name the files that are"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files that are read, and those in folders that are not."""

    files: tuple[Path, ...]
    read: Mapping[str, int]  #: files by suffix
    passed_over: Mapping[str, int]  #: by suffix, "hidden" or "without suffix"

    @property
    def account(self) -> str:
        """``read 12 .txt, 3 .jsonl.gz; passed over 4 .md, 1 .csv``."""
        said = f"read {_listed(self.read)}"
        return f"{said}; passed over {_listed(self.passed_over)}" if self.passed_over else said

    @property
    def advice(self) -> str | None:
        """What to do about files that were passed over but are not hidden."""
        return f"{_FORMATS}." if set(self.passed_over) - {"hidden"} else None


def kind_of(path: Path, given: str | None = None) -> str | None:
    """``given``, or the format that the suffix names."""
    found = _SUFFIX.search(path.name)
    return given or (None if found is None or (found[1] == "parquet" and found[2]) else found[1])


def find_inputs(inputs: list[Path], given_format: str | None = None) -> Inputs:
    """Files in the order of the inputs, a folder's sorted by path.

    Hidden files in a folder, and those with another suffix, are passed over and counted. With ``given_format``,
    suffixes do not matter: all files that are not hidden are read.
    """
    files: list[Path] = []
    passed_over = Counter[str]()
    for given in inputs:
        if not os.path.lexists(given):
            raise UsageError(f"{given!s:.200} is not there. {_EXPECTED}")
        if given.is_dir():
            found, others = _of_folder(given, given_format)
            if not found:
                holds = f" (it holds {_listed(others)})" if others else ""
                raise UsageError(f"{given} holds no text that can be read{holds}. {_EXPECTED}\n{_FORMATS}.")
            files += found
            passed_over += others
        elif kind_of(given, given_format) is None:
            raise UsageError(f"{given}: its suffix does not tell its format. {_EXPECTED}\n{_FORMATS}.")
        else:
            files.append(given)
    files = [path.absolute() for path in files]
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice, so its documents would occur twice. Name it once.")
    for path in files:
        if "\n" in str(path) or str(path) != str(path).encode(errors="ignore").decode():
            raise UsageError(f"{str(path)!r} cannot be passed to datatrove. Rename it: UTF-8 without line breaks.")
    read = Counter(_shown_suffix(path) for path in files)
    return Inputs(files=tuple(files), read=dict(read.most_common()), passed_over=dict(passed_over.most_common()))


def _of_folder(folder: Path, given_format: str | None) -> tuple[list[Path], Counter[str]]:
    """The files of a folder that are read, and the number of others by suffix."""
    found, others = list[Path](), Counter[str]()
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            others["hidden"] += 1
        elif kind_of(path, given_format) is None:
            others[_shown_suffix(path)] += 1
        else:
            found.append(path)
    return found, others


def _shown_suffix(path: Path) -> str:
    found = _SHOWN_SUFFIX.search(path.name)
    return "without suffix" if found is None else found[0]


def _listed(counts: Mapping[str, int]) -> str:
    return some_of([f"{count:,} {suffix}" for suffix, count in counts.items()], 8, more=True)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Reads the documents of one kind of file for datatrove, whose own readers log some mistakes and continue.

    ``paths_file`` lists the files. Documents without text are skipped, as datatrove does. Raises ``CorruptFile`` with
    the row that is not a document.
    """

    paths_file: str
    kind: str  #: of ``KINDS``
    text_key: str
    separator: str | None = None  #: divides a .txt file into documents; None: a file is a document

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document
        from datatrove.io import get_shard_from_paths_file
        from datatrove.utils.logging import logger

        yield from data or ()
        empty, found = 0, list[bool]()
        for path in get_shard_from_paths_file(self.paths_file, rank, world_size):
            try:
                number = 0
                for number, text in self._read(path):
                    if text:
                        yield Document(text=text, id=f"{path}/{number}")
                    else:
                        empty += 1
            except UnicodeDecodeError as error:
                raise CorruptFile(f"{path} is not UTF-8: {error}. Convert it, or leave it out.") from None
            found.append(number > 0)
        if empty and self.kind != "txt":
            logger.warning(NO_TEXT)
        if self.kind == "txt" and self.separator is not None and found and not any(found):
            logger.warning(NO_SEPARATOR)

    def _read(self, path: str) -> Iterator[tuple[int, str | None]]:
        if self.kind == "parquet":
            yield from self._rows(path)
        elif self.kind == "jsonl":
            with _opened(path, newline=None) as file:
                yield from self._lines(path, file)
        else:
            with _opened(path, newline="") as file:
                text = file.read()
            for number, part in enumerate([text] if self.separator is None else text.split(self.separator)):
                yield number, part if part.strip() else None

    def _lines(self, path: str, file: TextIO) -> Iterator[tuple[int, str | None]]:
        import orjson

        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise CorruptFile(
                    f"{path}: line {number + 1} is not JSON: {error}.\n"
                    "A .jsonl file has one JSON object on each line. Mend the line, or leave out the file."
                ) from None
            if not isinstance(row, dict):
                raise CorruptFile(
                    f"{path}: line {number + 1} is a {type(row).__name__}, not an object.\n"
                    f'Expected a line such as {{"{self.text_key}": "..."}}.'
                )
            yield number, self._text(path, number, row, row)

    def _rows(self, path: str) -> Iterator[tuple[int, str | None]]:
        from pyarrow import parquet

        number = 0
        with parquet.ParquetFile(path) as file:
            # Other columns may hold what Python cannot, such as nanoseconds.
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_key]):
                for row in batch.to_pylist():
                    yield number, self._text(path, number, row, file.schema_arrow.names)
                    number += 1

    def _text(self, path: str, number: int, row: dict[str, Any], keys: Iterable[str]) -> str | None:
        """The text of a row, None if it is null. ``keys``: of the row, for the message."""
        if self.text_key not in row:
            raise CorruptFile(
                f"{path}: row {number} has no {self.text_key!r} (it has: {', '.join(list(keys)[:8])}).\n"
                "Pass --text-key with the name of the text, or mend the row."
            )
        text = row[self.text_key]
        if text is not None and not isinstance(text, str):
            raise CorruptFile(
                f"{path}: row {number} has a {type(text).__name__} under {self.text_key!r}, not text.\n"
                "Pass --text-key with the name of the text, or mend the row."
            )
        return text


def _opened(path: str, newline: str | None) -> TextIO:
    """A file as text, decompressed by its suffix, without a byte order mark."""
    from fsspec.implementations.local import LocalFileSystem

    if path.endswith(".zst"):
        raw: Any = io.BufferedReader(_Zstandard(path))
    else:  # not fsspec.open, for which "::" in a name means something
        raw = LocalFileSystem().open(path, "rb", compression="infer")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)


class _Zstandard(io.RawIOBase):
    """Decompresses a file. zstandard's own reader takes a truncated file for one that ends there."""

    def __init__(self, path: str) -> None:
        from zstandard import ZstdDecompressor

        self._path, self._file, self._ready = path, open(path, "rb"), memoryview(b"")  # noqa: SIM115 - closed below
        self._new = ZstdDecompressor(max_window_size=1 << 31).decompressobj  # as for zstd --long=31
        self._frame: Any = None  #: the one that is being read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._file.read(_COMPRESSED_BYTES)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError(f"{self._path} ends within its compressed data")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


# --- held out --------------------------------------------------------------------------------------------------------


def is_held_out(text: str, share: Fraction) -> bool:
    """Whether a document is in the ``share`` that is held out, by the xxh3 of its UTF-8 text.

    Only the text decides: adding other documents changes nothing, and a larger share contains every smaller one.
    """
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) < share * 2**64


def parse_share(text: str) -> Fraction:
    """Parse a percentage such as 0.5% into a fraction. Raises ``UsageError``."""
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,12})?)%", text, re.ASCII)
    share = Fraction(found[1]) / 100 if found is not None else Fraction(0)
    if not 0 < share < 1:
        raise UsageError(f"--hold-out {text:.50}: expected a share of the documents between 0% and 100%, such as 0.5%.")
    return share


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Removes held-out documents from the stream, and stores them in a file of ``folder`` for ``HeldOut``."""

    folder: str
    share: Fraction

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        # In a file, because the share may be large and a task's steps run one after the other.
        with open(_held_out_file(self.folder, rank), "w", encoding="ascii") as file:
            for document in data:
                if is_held_out(document.text, self.share):
                    file.write(json.dumps([document.id, document.text]) + "\n")
                else:
                    yield document


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Yields the documents that ``HoldOut`` stored, in order."""

    folder: str

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document

        yield from data or ()
        path = _held_out_file(self.folder, rank)
        with open(path, encoding="ascii") as file:
            for line in file:
                name, text = json.loads(line)
                yield Document(text=text, id=name)
        path.unlink()


def _held_out_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"held-out-{rank:05d}.jsonl"
