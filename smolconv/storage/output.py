"""Streams tensors into planned files.

A plan fixes every byte offset before data moves. Then each tensor is one task: read a chunk, add it to the digest,
write it at its offset. Memory stays below a few chunks per worker, files are flushed while others are being written,
and a file counts as finished only once it is on disk and in the journal.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from smolconv.files import open_file
from smolconv.storage.integrity import SourceCheck, digest_of_zeros, digest_text, new_hasher
from smolconv.storage.planned import Journal, PlannedFile, PlannedTensor, WrittenTensor, total_bytes
from smolconv.storage.torch_archive.crc32 import crc_of_zeros
from smolconv.tensors.dtypes import DTYPE_BYTES
from smolconv.tensors.elements import Raw, raw_dtype, scratch
from smolconv.tensors.finite import has_nonfinite
from smolconv.tensors.lazy import CHUNK_BYTES, Zeros
from smolconv.tensors.reading import as_bytes, close_thread_files, observed

#: Bytes that a worker writes before it starts writeback to the disk.
_WRITEBACK_BYTES = 8 << 20


def write_files(
    files: Sequence[PlannedFile],
    folder: Path,
    journal: Journal,
    *,
    workers: int,
    digest: str = "xxh3",
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] = lambda _: None,
    check: SourceCheck | None = None,
    rounded_to: str | None = None,
) -> dict[str, Sequence[WrittenTensor]]:
    """Write ``files`` below ``folder`` with ``workers`` threads; returns the results by file.

    Keeps files that the journal lists. ``check`` sees all bytes read. The first error stops all workers and is raised.
    ``rounded_to``: the dtype to which an engine rounds these tensors when it loads them; float32 values beyond its
    range count as ``nonfinite``.
    """
    todo = [file for file in files if str(file.path) not in journal.done]
    for parent in sorted({(folder / file.path).parent for file in todo}):
        parent.mkdir(parents=True, exist_ok=True)
    _WritePass(todo, folder, journal, digest, chunk_bytes, progress, check, rounded_to).run(workers)
    return {str(file.path): journal.done[str(file.path)] for file in files}


@dataclass
class _OpenFile:
    """A file while its tensors are being written, by any number of workers."""

    plan: PlannedFile
    lock: threading.Lock = field(default_factory=threading.Lock)
    #: Held while writing: threads that contend for the kernel's lock of one file spin, which takes more time than
    #: copying.
    write_lock: threading.Lock = field(default_factory=threading.Lock)
    descriptor: int | None = None
    next_task: int = 0
    found: dict[int, WrittenTensor] = field(default_factory=dict)

    @property
    def tasks_left(self) -> int:
        """Tensors that are not assigned yet; a file without tensors is one task."""
        return max(1, len(self.plan.tensors)) - self.next_task


class _Abandoned(Exception):
    """Another worker failed, so this one stops within its tensor."""


class _WritePass:
    def __init__(
        self, files: Sequence[PlannedFile], folder: Path, journal: Journal, digest: str, chunk_bytes: int,
        progress: Callable[[int], None], check: SourceCheck | None, rounded_to: str | None,
    ) -> None:  # fmt: skip
        self.check, self.rounded_to = check, rounded_to
        self.folder, self.journal, self.digest, self.chunk_bytes = folder, journal, digest, chunk_bytes
        self.progress = progress
        self.keep_cached = total_bytes(files) < _bytes_to_cache()
        self.waiting = deque(_OpenFile(file) for file in files)
        self.begun: list[_OpenFile] = []
        self.finished: deque[_OpenFile] = deque()
        self.wake = threading.Condition()
        self.working = 0
        self.error: BaseException | None = None

    def run(self, workers: int) -> None:
        self.working = workers
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        # Flushing waits for the disk, not for a CPU: two additional threads keep the disk busy.
        flushers = [threading.Thread(target=self._flush, daemon=True) for _ in range(2)]
        for thread in threads + flushers:
            thread.start()
        try:
            for thread in threads + flushers:
                while thread.is_alive():
                    thread.join(0.2)  # a plain join would delay Ctrl-C
        except BaseException as error:
            self._fail(error)
            for thread in threads + flushers:
                thread.join()
            raise
        finally:
            for opened in self.begun:
                if opened.descriptor is not None:
                    os.close(opened.descriptor)
        if self.error is not None:
            raise self.error

    def _fail(self, error: BaseException) -> None:
        with self.wake:
            self.error = self.error or error
            self.wake.notify_all()

    def _next_task(self, current: _OpenFile | None) -> tuple[_OpenFile, int] | None:
        """The next tensor of the worker's current file, else of a file without a writer, else of any file.

        Writers of one file wait for each other in the kernel, so each worker has its own file while there are enough.
        """
        with self.wake:
            if self.error is not None:
                return None
            if current is None or not current.tasks_left:
                if self.waiting:
                    current = self.waiting.popleft()
                    self.begun.append(current)
                else:
                    current = next((opened for opened in self.begun if opened.tasks_left), None)
                    if current is None:
                        return None
            current.next_task += 1
            return current, current.next_task - 1

    def _work(self) -> None:
        try:
            observer = None if self.check is None else self.check.observer()
            with scratch(self.chunk_bytes, raw_dtype("uint8")) as buffer, observed(observer):
                opened = None
                while (task := self._next_task(opened)) is not None:
                    opened, index = task
                    self._write_one(opened, index, buffer)
        except _Abandoned:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            close_thread_files()
            with self.wake:
                self.working -= 1
                self.wake.notify_all()

    def _write_one(self, opened: _OpenFile, index: int, buffer: Raw) -> None:
        plan = opened.plan
        with opened.lock:
            if opened.descriptor is None:
                opened.descriptor = os.open(self.folder / plan.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
                os.ftruncate(opened.descriptor, 0)  # data of an interrupted run would show through holes
                os.ftruncate(opened.descriptor, plan.size)
                for offset, data in plan.pieces:
                    _pwrite(opened.descriptor, data, offset)
        if plan.tensors:
            found = self._stream(opened, plan.tensors[index], buffer)
            with opened.lock:
                opened.found[index] = found
                if len(opened.found) < len(plan.tensors):
                    return
        if plan.finish is not None:
            for offset, data in plan.finish([opened.found[i].crc for i in range(len(plan.tensors))]):
                _pwrite(opened.descriptor, data, offset)
        self.progress(plan.size - sum(tensor.source.nbytes for tensor in plan.tensors))
        with self.wake:
            self.finished.append(opened)
            self.wake.notify()

    def _stream(self, opened: _OpenFile, tensor: PlannedTensor, buffer: Raw) -> WrittenTensor:
        # Checksums of ranges can be combined in any order; a manifest's digests cannot.
        descriptor, with_crc = opened.descriptor, opened.plan.finish is not None or self.digest != "none"
        assert descriptor is not None
        source, item = tensor.source, DTYPE_BYTES[tensor.source.dtype]
        hasher = new_hasher(self.digest)
        if isinstance(source, Zeros):
            self.progress(source.nbytes)  # a hole in the file: nothing to write
            return WrittenTensor(
                digest=digest_of_zeros(source.nbytes, self.digest), crc=crc_of_zeros(source.nbytes) if with_crc else 0
            )
        if hasher is None and not with_crc and self._copied_in_kernel(descriptor, tensor):
            return WrittenTensor(digest=None)
        crc, nonfinite, behind = 0, False, tensor.offset
        for start, stop in source.chunks(self.chunk_bytes):
            if self.error is not None:
                raise _Abandoned  # an unfinished tensor must not have a result
            view = buffer[: (stop - start) * item].view(raw_dtype(source.dtype))
            source.read(start, stop, view)
            data = as_bytes(view)
            if hasher is not None:
                hasher.update(data)
            nonfinite = nonfinite or has_nonfinite(view, source.dtype, self.rounded_to)
            if with_crc:
                crc = crc32(data, crc)
            at = tensor.offset + start * item
            with opened.write_lock:
                _pwrite(descriptor, data, at)
            if at + len(data) - behind >= _WRITEBACK_BYTES:
                _begin_writeback(descriptor, behind if self.keep_cached else 0, at + len(data))
                behind = at + len(data)
            self.progress(len(data))
        return WrittenTensor(digest=digest_text(hasher), crc=crc, nonfinite=nonfinite)

    def _copied_in_kernel(self, descriptor: int, tensor: PlannedTensor) -> bool:
        extents = tensor.source.extents()
        if extents is None or not hasattr(os, "copy_file_range"):
            return False
        if self.check is not None and any(self.check.watches(extent.path) for extent in extents):
            return False  # the kernel's copy would skip the comparison
        at = tensor.offset
        for extent in extents:
            with open(open_file(extent.path), "rb", buffering=0) as source:
                done = 0
                while done < extent.nbytes:
                    try:
                        count = os.copy_file_range(
                            source.fileno(), descriptor, extent.nbytes - done, extent.offset + done, at + done
                        )
                    except OSError:  # another or an unsupported file system: the caller copies from the start
                        return False
                    if count == 0:
                        return False  # the plain copy reports where the file ends
                    done += count
            at += extent.nbytes
        self.progress(at - tensor.offset)
        return True

    def _flush(self) -> None:
        try:
            while True:
                with self.wake:
                    while not self.finished and self.working and self.error is None:
                        self.wake.wait()
                    if not self.finished:
                        return
                    opened = self.finished.popleft()
                assert opened.descriptor is not None
                os.fsync(opened.descriptor)
                if not self.keep_cached:
                    _begin_writeback(
                        opened.descriptor, 0, opened.plan.size
                    )  # all is written: this drops the remaining pages
                os.close(opened.descriptor)
                opened.descriptor = None
                if opened.plan.check is not None:
                    opened.plan.check(self.folder / opened.plan.path)
                self.journal.add(str(opened.plan.path), [opened.found[i] for i in sorted(opened.found)])
        except BaseException as error:
            self._fail(error)


def _begin_writeback(descriptor: int, start: int, stop: int) -> None:
    """Start writeback of written data while the rest is being copied, and drop pages that are on disk from the cache.

    Otherwise the kernel would wait until a tenth of the memory is dirty, or for fsync. Only clean pages are dropped; a
    range that was just written has almost none.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def _bytes_to_cache() -> int:
    """How much output may stay in the page cache: an eighth of the memory, or the unused memory if that is more.

    Beyond that the kernel must evict other pages, which takes it as much time as copying, and takes cached data from
    other programs. If the system does not report its memory, everything stays.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
        return max(sizes["MemTotal"] // 8, sizes["MemFree"])
    except (OSError, LookupError, ValueError):
        return sys.maxsize


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
