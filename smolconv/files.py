"""How files of a source are opened, and what they were then: a conversion of files that change is a mixture.

Every file that somebody gives us is opened here: only regular ones, since a pipe is waited for and a device has no end.
``require_unchanged`` looks again, after the last byte was read. Files that only choose a step (``latest``) are left
out: a run that continues rewrites them, and its older steps stay.
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

from smolconv.errors import CorruptFile, LfsPointer, MachineError, MissingFile, SmolconvError, SourceChanged

#: A document that people or programs wrote about tensors: configs, sidecars, recipes. Indexes may have more.
MOST_DOCUMENT_BYTES = 1 << 24
#: A file whose text is the name of another, or one number.
MOST_NAME_BYTES = 4096
#: How what Git LFS leaves in a file's place begins, and the bytes that it stays below: git-lfs/docs/spec.md.
_LFS_POINTER, _LFS_POINTER_BYTES = b"version https://git-lfs", 1024

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
#: What ``stat`` says where a path leads nowhere.
_NOWHERE = {
    errno.ENOENT: "is not there",
    errno.ENOTDIR: "is not there: something above it is no folder",
    errno.ELOOP: "is a link that leads back to itself",
    errno.ENAMETOOLONG: "cannot be: its name is longer than names of files are",
}


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


def open_file(path: Path, *, noted: bool = True) -> int:
    """A descriptor to read a regular file by; the file is noted as it is now, unless it was opened before.

    Raises ``MissingFile``, ``CorruptFile`` for what is no file or a pointer of Git LFS, and ``MachineError``.
    """
    with reading(path):
        _require_regular(path, os.stat(path))  # before it is opened: to open a device may already do something
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
            f"Its content was expected; the pointer has {size} bytes.\n"
            "Run git lfs install and git lfs pull in the clone, or download the repository with hf download."
        )


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS left a pointer there in the file's place; False also for what cannot be opened."""
    try:
        os.close(open_file(path, noted=False))
    except LfsPointer:
        return True
    except SmolconvError:
        return False
    return False


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise CorruptFile(f"{path} is {kind}; a file was expected.\nName the file itself, or copy it again.")


def is_there(path: Path) -> bool:
    """Whether a file of that name is there. Raises ``CorruptFile`` and ``MissingFile`` for anything else in its place.

    A document that may be left out must not be taken for left out because it is a pipe, or a link to nothing.
    """
    found = _stat_if_any(path)
    if found is not None:
        _require_regular(path, found)
    return found is not None


def is_folder_there(path: Path) -> bool:
    """Whether a folder of that name is there. Raises as ``is_there`` does for anything else in its place."""
    found = _stat_if_any(path)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a file")
        raise CorruptFile(f"{path} is {kind}; a folder was expected.\nCopy it again, or take it away.")
    return found is not None


def _stat_if_any(path: Path) -> os.stat_result | None:
    """What has that name; None for nothing, which a link to nothing is not."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.islink(path):
            return None
        raise unreadable(path, error) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, a file is opened or read: what the system refuses is raised as ``unreadable`` has it."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: object, error: OSError, advice: str = "") -> SmolconvError:
    """What the system said when a file was to be read, with what to do: ``MissingFile`` or ``MachineError``."""
    if error.errno in _NOWHERE:
        shown = f"{path}" if len(f"{path}") <= MOST_NAME_BYTES else f"{path!s:.200}..."
        dangling = error.errno == errno.ENOENT and os.path.islink(shown)
        nowhere = "is a link to nothing" if dangling else _NOWHERE[error.errno]
        if dangling and "blobs" in os.readlink(shown):
            advice = "A file was expected: the Hub's cache links to its folder blobs, which is not there.\n"
            advice += "Download the checkpoint again, or copy it with its files from where they are: cp -rL"
        advice = advice or "A file was expected there.\nCheck the path, or copy the file from where it was written."
        return MissingFile(f"{shown} {nowhere}.\n{advice}")
    return MachineError(
        f"{path} cannot be read ({error.strerror or error}).\n"
        "A readable file was expected.\nCheck its permissions and the disk."
    )


def read_bytes(path: Path, most_bytes: int = MOST_DOCUMENT_BYTES, *, noted: bool = True) -> bytes:
    """The content of a small file. Raises as ``open_file`` does, and ``CorruptFile`` when it is larger."""
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
        f"{path} has {size} bytes; at most {most_bytes} were expected of a file of its kind.\n"
        "It is not what its name says: copy it again."
    )


def file_size(path: Path, most_bytes: int | None = None) -> int:
    """Bytes of a regular file, which is not noted. Raises as ``open_file``, and for more than ``most_bytes``."""
    with reading(path):
        found = os.stat(path)
    _require_regular(path, found)
    if most_bytes is not None and found.st_size > most_bytes:
        raise _too_large(path, found.st_size, most_bytes)
    return found.st_size


def is_file_name(text: str) -> bool:
    """Whether it can name a file or a folder beside the one that says so, and nothing elsewhere."""
    try:
        length = len(os.fsencode(text))
    except UnicodeEncodeError:
        return False
    return 0 < length <= 255 and text not in (".", "..") and "/" not in text and "\0" not in text


def is_path_below(text: str) -> bool:
    """Whether it can name a file or a folder below the one that says so, by names alone, and nothing elsewhere."""
    return all(map(is_file_name, text.split("/")))


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
