"""Reads bytes of files. Each thread keeps the files that it read last open."""

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

#: Called for every range read: path, offset in bytes, the bytes.
ReadObserver = Callable[[Path, int, memoryview], None]


class _ThreadFiles(threading.local):
    """One thread's open files, newest last, and its observer."""

    def __init__(self) -> None:
        self.observer: ReadObserver | None = None
        self.files: OrderedDict[Path, int] = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)


_thread = _ThreadFiles()
_OPEN_FILES = 16


def pread(path: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` from a file. Raises ``MissingFile`` if it no longer exists, ``CorruptFile`` if it ends early."""
    # Opening takes a round trip on network file systems, so each thread keeps its last files open.
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
                f"{path} ends at byte {offset + done}, but by its header at {offset + len(view)}.\n"
                "The file is truncated: copy it again."
            )
        done += count


def read_observed(path: Path, offset: int, view: memoryview) -> None:
    """``pread`` that reports to the thread's observer."""
    pread(path, offset, view)
    if _thread.observer is not None:
        _thread.observer(path, offset, view)


def as_bytes(raw: Raw) -> memoryview:
    """A contiguous array's bytes, without a copy."""
    return memoryview(raw.data).cast("B") if raw.size else memoryview(b"")


def close_thread_files() -> None:
    """Close the files that the calling thread keeps open."""
    while _thread.files:
        os.close(_thread.files.popitem()[1])


@contextmanager
def observed(observer: ReadObserver | None) -> Iterator[None]:
    """Within the block, report everything that this thread reads with ``read_observed`` to the observer."""
    outer, _thread.observer = _thread.observer, observer
    try:
        yield
    finally:
        _thread.observer = outer
