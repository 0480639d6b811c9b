"""What the files of a source were when they were first opened: a conversion of files that change is a mixture.

Readers open files by this module, or tell it of them. ``require_unchanged`` looks again, after the last byte was read.
Files that only choose a step (``latest``) are left out: a run that goes on rewrites them, and its older steps stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from smolconv.errors import SourceChanged


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What tells that a file was written to or replaced, without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int  #: no program can set it back
    inode: tuple[int, int]

    @staticmethod
    def of(stat: os.stat_result) -> FileState:
        return FileState(
            size=stat.st_size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, inode=(stat.st_dev, stat.st_ino)
        )


def states_of(paths: Iterable[Path]) -> dict[Path, FileState]:
    """The files as they are now. Raises ``OSError``."""
    return {path: FileState.of(os.stat(path)) for path in dict.fromkeys(paths)}


_noted: ContextVar[dict[Path, FileState] | None] = ContextVar("_noted", default=None)


@contextmanager
def noting_files() -> Iterator[dict[Path, FileState]]:
    """Inside, every file that is opened here is noted as it was at that moment, in the dictionary."""
    noted: dict[Path, FileState] = {}
    outer = _noted.get()
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)
        for path, state in noted.items():
            if outer is not None:
                outer.setdefault(path, state)


def note(path: Path, descriptor: int) -> None:
    """Remember an open file as it is now, unless it was opened before."""
    noted = _noted.get()
    if noted is not None and path not in noted:
        noted[path] = FileState.of(os.fstat(descriptor))


def read_bytes(path: Path) -> bytes:
    """The content of a small file. Raises as ``open`` does."""
    with open(path, "rb") as file:
        note(path, file.fileno())
        return file.read()


def require_unchanged(files: Mapping[Path, FileState], when: str) -> None:
    """Raise ``SourceChanged`` when a file is not what it was; ``when`` says what went on meanwhile."""
    for path, before in files.items():
        try:
            now = FileState.of(os.stat(path))
        except OSError as error:
            raise SourceChanged(f"{path} {_told(when, f'is gone ({error.strerror})')}") from None
        if now == before:
            continue
        if now.inode != before.inode:
            what = "was replaced by another file"
        elif now.size != before.size:
            what = f"went from {before.size} to {now.size} bytes"
        elif now.mtime_ns != before.mtime_ns:
            what = "was written to"
        else:
            what = "was changed (its content, mode or links)"
        raise SourceChanged(f"{path} {_told(when, what)}")


def _told(when: str, what: str) -> str:
    return (
        f"{what} {when}.\n"
        "A source that stays as it is was expected: what was read of it may be of two states.\n"
        "Wait until nothing writes to it, then convert it again."
    )
