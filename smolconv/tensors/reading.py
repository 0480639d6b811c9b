"""Bytes of files, read by threads that each keep what they read last open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smolconv.errors import CorruptFile
from smolconv.files import open_file, reading

if TYPE_CHECKING:
    from smolconv.tensors.elements import Raw

#: Told of every range that is read of a file: path, offset in bytes, the bytes.
ReadObserver = Callable[[Path, int, memoryview], None]


class _ThreadFiles(threading.local):
    """One thread's open files, newest last, and who watches what it reads of tensors."""

    def __init__(self) -> None:
        self.observer: ReadObserver | None = None
        self.files: OrderedDict[Path, int] = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)


_thread = _ThreadFiles()
_OPEN_FILES = 16


def pread(path: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` from a file. Raises ``MissingFile`` when it has gone and ``CorruptFile`` when it ends early."""
    # Opening costs a round trip on network file systems, so each thread keeps the files that it read last.
    descriptor = _thread.files.get(path)
    if descriptor is None:
        descriptor = open_file(path)
        _thread.files[path] = descriptor
        if len(_thread.files) > _OPEN_FILES:
            os.close(_thread.files.popitem(last=False)[1])
    else:
        _thread.files.move_to_end(path)
    done = 0
    while done < len(view):
        with reading(path):
            count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CorruptFile(
                f"{path} ends at byte {offset + done}, but its header promises {offset + len(view)}.\n"
                "The file is truncated: copy it again."
            )
        done += count


def read_observed(path: Path, offset: int, view: memoryview) -> None:
    """``pread``, of which the thread's observer is told."""
    pread(path, offset, view)
    if _thread.observer is not None:
        _thread.observer(path, offset, view)


def as_bytes(raw: Raw) -> memoryview:
    """A contiguous array's bytes, without a copy."""
    return memoryview(raw.data).cast("B") if raw.size else memoryview(b"")


def close_thread_files() -> None:
    """Close the files that the calling thread keeps open for reading."""
    while _thread.files:
        os.close(_thread.files.popitem()[1])


@contextmanager
def observed(observer: ReadObserver | None) -> Iterator[None]:
    """Inside, the observer is told of what this thread reads by ``read_observed``."""
    outer, _thread.observer = _thread.observer, observer
    try:
        yield
    finally:
        _thread.observer = outer
