"""Opens a source's files and records their state: converting files that change would mix two states.

All input files are opened here, and only regular ones: opening a pipe may block, and a device may have no end.
``require_unchanged`` checks the files again after the last byte was read. It ignores files that only choose a step
(``latest``), because a run that continues rewrites them and keeps its older steps.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from smolconv.errors import (
    CorruptFile,
    LfsPointer,
    MachineError,
    MissingFile,
    SmolconvError,
    SourceChanged,
    UsageError,
)

#: Size limit of documents about tensors: configs, sidecars, recipes. Indexes may be larger.
MOST_DOCUMENT_BYTES = 1 << 24
#: Size limit of a file that holds a name or a number.
MOST_NAME_BYTES = 4096
#: The first bytes of a Git LFS pointer, and the size that it stays below: git-lfs/docs/spec.md.
_LFS_POINTER, _LFS_POINTER_BYTES = b"version https://git-lfs", 1024

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
#: Errors of ``stat`` for a path that leads nowhere.
_NOWHERE = {
    errno.ENOENT: "is not there",
    errno.ENOTDIR: "is not there: a part of the path is not a folder",
    errno.ELOOP: "is a link that leads back to itself",
    errno.ENAMETOOLONG: "cannot exist: its name is too long for a file",
}


@dataclass(frozen=True, kw_only=True)
class FileState:
    """Metadata that shows whether a file was written to or replaced, without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int  #: programs cannot set it
    inode: tuple[int, int]

    @staticmethod
    def of(stat: os.stat_result) -> FileState:
        return FileState(
            size=stat.st_size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, inode=(stat.st_dev, stat.st_ino)
        )


def states_of(paths: Iterable[Path]) -> dict[Path, FileState]:
    """The current state of the files. Raises ``OSError``."""
    return {path: FileState.of(os.stat(path)) for path in dict.fromkeys(paths)}


_noted: ContextVar[dict[Path, FileState] | None] = ContextVar("_noted", default=None)


@contextmanager
def noting_files() -> Iterator[dict[Path, FileState]]:
    """Within the block, record the state of every file opened here in the dictionary."""
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


def open_file(path: Path, *, noted: bool = True) -> int:
    """Open a regular file for reading; its state is recorded when it is opened first.

    Raises ``MissingFile``, ``CorruptFile`` for anything but a regular file or for a Git LFS pointer, ``MachineError``.
    """
    with reading(path):
        _require_regular(path, os.stat(path))  # before opening it, because opening a device may have effects
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            now = os.fstat(descriptor)
            _require_regular(path, now)
            _refuse_lfs_pointer(path, descriptor, now.st_size)
        except BaseException:
            os.close(descriptor)
            raise
    notes = _noted.get()
    if noted and notes is not None and path not in notes:
        notes[path] = FileState.of(now)
    return descriptor


def _refuse_lfs_pointer(path: Path, descriptor: int, size: int) -> None:
    if size < _LFS_POINTER_BYTES and os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
        raise LfsPointer(
            f"{path} is a pointer left by Git LFS, not the file itself.\n"
            f"Expected its content; the pointer has {size} bytes.\n"
            "Run git lfs install and git lfs pull in the clone, or download the repository with hf download."
        )


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git LFS pointer; False also if it cannot be opened."""
    try:
        os.close(open_file(path, noted=False))
    except LfsPointer:
        return True
    except SmolconvError:
        return False
    return False


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "not a regular file")
        raise CorruptFile(f"{path} is {kind}; expected a file.\nGive the file itself, or copy it again.")


def is_there(path: Path) -> bool:
    """Whether a file of that name exists. Raises ``CorruptFile`` and ``MissingFile`` for anything else with the name.

    An optional document that is a pipe or a dangling link must not count as absent.
    """
    found = _stat_if_any(path)
    if found is not None:
        _require_regular(path, found)
    return found is not None


def is_folder_there(path: Path) -> bool:
    """Whether a folder of that name exists. Raises like ``is_there`` for anything else with the name."""
    found = _stat_if_any(path)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a file")
        raise CorruptFile(f"{path} is {kind}; expected a folder.\nCopy it again, or remove it.")
    return found is not None


def _stat_if_any(path: Path) -> os.stat_result | None:
    """The entry of that name, which may be a dangling link; None if there is none."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.islink(path):
            return None
        raise unreadable(path, error) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, convert errors of the system while opening and reading a file with ``unreadable``."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: object, error: OSError, advice: str = "") -> SmolconvError:
    """The system's error for a file that cannot be read, with advice: ``MissingFile`` or ``MachineError``."""
    if error.errno in _NOWHERE:
        shown = f"{path}" if len(f"{path}") <= MOST_NAME_BYTES else f"{path!s:.200}..."
        dangling = error.errno == errno.ENOENT and os.path.islink(shown)
        nowhere = "is a dangling link" if dangling else _NOWHERE[error.errno]
        if dangling and "blobs" in os.readlink(shown):
            advice = "Expected a file: the Hub's cache links to its folder blobs, which is missing.\n"
            advice += "Download the checkpoint again, or copy the folder with the linked files: cp -rL"
        advice = advice or "Expected a file.\nCheck the path, or copy the file from where it was written."
        return MissingFile(f"{shown} {nowhere}.\n{advice}")
    return MachineError(
        f"{path} cannot be read ({error.strerror or error}).\n"
        "Expected a readable file.\nCheck its permissions and the disk."
    )


def read_bytes(path: Path, most_bytes: int = MOST_DOCUMENT_BYTES, *, noted: bool = True) -> bytes:
    """The content of a small file. Raises as ``open_file``, and ``CorruptFile`` if it is larger than the limit."""
    descriptor = open_file(path, noted=noted)
    with reading(path), open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        data = bytearray()
        while size <= most_bytes and (more := file.read(max(1, min(size + 1, most_bytes + 1) - len(data)))):
            data += more
            size = max(size, len(data))
    if size > most_bytes:
        raise _too_large(path, size, most_bytes)
    return bytes(data)


def _too_large(path: Path, size: int, most_bytes: int) -> CorruptFile:
    return CorruptFile(
        f"{path} has {size} bytes; expected at most {most_bytes} for a file of this kind.\n"
        "Its content does not match its name: copy it again."
    )


def file_size(path: Path, most_bytes: int | None = None) -> int:
    """The content of a regular file whose state is not recorded. Raises as ``open_file``, and for a larger file."""
    with reading(path):
        found = os.stat(path)
    _require_regular(path, found)
    if most_bytes is not None and found.st_size > most_bytes:
        raise _too_large(path, found.st_size, most_bytes)
    return found.st_size


def require_place(option: str, path: Path) -> None:
    """Raise ``UsageError`` unless a file can appear there, in a folder that exists, in place of at most another file.

    A rename would replace a device by a file.
    """
    folder = os.path.realpath(path.absolute().parent)
    if not os.path.isdir(folder):
        raise UsageError(f"{option} {path}: the folder {folder} does not exist.\nCreate it first.")
    if folder == "/dev" or (os.path.exists(path) and not os.path.isfile(path)):
        raise UsageError(f"{option} {path} is no regular file.\nExpected the name of a new file, or of one to replace.")


def is_file_name(text: str) -> bool:
    """Whether the text can only name a file or folder next to the document that contains it."""
    try:
        length = len(os.fsencode(text))
    except UnicodeEncodeError:
        return False
    return 0 < length <= 255 and text not in (".", "..") and "/" not in text and "\0" not in text


def is_path_below(text: str) -> bool:
    """Whether the text can only name a file or folder below the document that contains it."""
    return all(map(is_file_name, text.split("/")))


def require_unchanged(files: Mapping[Path, FileState], when: str) -> None:
    """Raise ``SourceChanged`` if a file's state has changed; ``when`` names the work meanwhile."""
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
        "Expected an unchanged source: the bytes read may be of two states.\n"
        "Wait until nothing writes to it, then repeat the command."
    )
