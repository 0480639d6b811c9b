"""Compares the digests recorded when a source was written with the bytes that are read from it.

A ``Seal`` is a digest of some bytes of a file: the CRC-32 of a record in a torch archive, or a digest from a manifest.
``SourceCheck`` sees the bytes as a conversion reads them, so the check takes no second pass. CRC-32s can be combined
from ranges in any order; other digests need the bytes in order, from one thread. Seals that were read only in part are
reported, or read again if that is requested or small.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash
from zlib_ng.zlib_ng import crc32

from smolconv.errors import CorruptFile, DigestMismatch
from smolconv.files import open_file, reading
from smolconv.storage.torch_archive.crc32 import crc32_combine
from smolconv.storage.torch_archive.records import is_torch_archive, read_archive_records
from smolconv.tensors.lazy import LazyTensor
from smolconv.tensors.reading import as_bytes

_READ_BYTES = 1 << 20
#: Up to this many bytes per seal are read again without request: padding of flat partitions, scalars, headers.
_SMALL_BYTES = 1 << 20


class _Crc32:
    """CRC-32 with the interface of hashlib."""

    name = "crc32"

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: bytes | memoryview) -> None:
        self.value = crc32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"


def new_hasher(algorithm: str) -> Any:
    """A hasher for "xxh3", "xxh3-128", "sha256" or "crc32"; None for "none". Raises ``ValueError`` for any other."""
    match algorithm:
        case "none":
            return None
        case "xxh3" | "xxh3-128":
            return xxhash.xxh3_128()
        case "sha256":
            return hashlib.sha256()
        case "crc32":
            return _Crc32()
    raise ValueError(f"{algorithm} is not a known digest")


def digest_text(hasher: Any) -> str | None:
    """The digest in the format of manifests: algorithm, colon, hexadecimal digits."""
    if hasher is None:
        return None
    return f"{hasher.name if hasher.name in ('sha256', 'crc32') else 'xxh3-128'}:{hasher.hexdigest()}"


@lru_cache(maxsize=1024)
def digest_of_zeros(nbytes: int, digest: str) -> str | None:
    """The digest of that many zero bytes, cached: padding and new moments have few different sizes."""
    hasher, block = new_hasher(digest), bytes(_READ_BYTES)
    if hasher is not None:
        for start in range(0, nbytes, _READ_BYTES):
            hasher.update(block[: min(_READ_BYTES, nbytes - start)])
    return digest_text(hasher)


def digest_of_ranges(
    path: Path, ranges: Iterable[tuple[int, int]], algorithm: str, abandoned: Callable[[], bool] = lambda: False
) -> str | None:
    """The digest of a file's concatenated ranges, (offset, bytes); None for "none", and if abandoned."""
    hasher = new_hasher(algorithm)
    if hasher is not None:
        with reading(path), open(open_file(path), "rb", buffering=0) as file:
            for offset, nbytes in ranges:
                for _, data in _read(file.fileno(), path, offset, nbytes):
                    if abandoned():
                        return None
                    hasher.update(data)
    return digest_text(hasher)


def digest_tensor(tensor: LazyTensor, algorithm: str = "xxh3") -> str:
    """The digest of a tensor's bytes in row-major order, as computed while writing."""
    hasher = new_hasher(algorithm)
    for values in tensor.raw_chunks():
        hasher.update(as_bytes(values))
    text = digest_text(hasher)
    assert text is not None
    return text


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The recorded digest of some of a file's bytes."""

    path: Path
    ranges: tuple[tuple[int, int], ...]  #: (offset, bytes), in order
    digest: str  #: "crc32:...", "xxh3-128:..." or "sha256:..."
    what: str  #: for messages: a tensor's name, a record's

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.ranges)

    @property
    def algorithm(self) -> str:
        return self.digest.partition(":")[0]

    def differs(self, abandoned: Callable[[], bool] = lambda: False) -> str | None:
        """Read the bytes and describe a difference from the digest; None if there is none, and if abandoned."""
        found = digest_of_ranges(self.path, self.ranges, self.algorithm, abandoned)
        return None if found is None else self.contradicted(found)

    def contradicted(self, found: str | None) -> str | None:
        return None if found == self.digest else f"{self.what} in {self.path.name}: {found}, recorded as {self.digest}"


def _read(descriptor: int, path: Path, offset: int, nbytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a range in pieces, with their offsets."""
    end = offset + nbytes
    while offset < end:
        data = os.pread(descriptor, min(_READ_BYTES, end - offset), offset)
        if not data:
            raise CorruptFile(f"{path} ends at byte {offset}; expected {end} bytes.\nIt is truncated: copy it again.")
        yield offset, data
        offset += len(data)


def archive_seals(paths: Iterable[Path]) -> list[Seal]:
    """The CRC-32 of every record in files that are torch archives with checksums."""
    return [
        Seal(
            path=path, ranges=((record.offset, record.nbytes),), digest=f"crc32:{record.crc:08x}",
            what=f"record {record.name}",
        )
        for path in dict.fromkeys(paths)
        if is_torch_archive(path)
        for record in read_archive_records(path)
        if record.crc is not None and record.nbytes
    ]  # fmt: skip


def differences(seals: Sequence[Seal], workers: int) -> list[str]:
    """Read all bytes, and describe the seals that differ."""
    abandoned = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            found = list(pool.map(lambda seal: seal.differs(abandoned.is_set), seals))
        except BaseException:  # Ctrl-C, or an unreadable file: abandon the rest
            abandoned.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [said for said in found if said is not None]


def refuse(where: Path, problems: Sequence[str], advice: str) -> None:
    """Raise ``DigestMismatch`` if there are problems."""
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:5])
    more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    number = "a recorded digest differs" if len(problems) == 1 else f"{len(problems)} recorded digests differ"
    raise DigestMismatch(f"{where}: {number}.\n{shown}{more}\n{advice}")


#: Advice for bytes that differ from those written.
COPY_AGAIN = "The file was damaged after it was written: copy it again from where it was written."
RECORDED_BY_US = (
    "The checkpoint was changed after smolconv wrote it: copy it again, or convert it again from its source.\n"
    "If you changed it on purpose, delete smolconv_manifest.json, which describes what it was."
)


def refuse_seals(where: Path, seals: Sequence[Seal], workers: int) -> None:
    """Read all bytes, and raise ``DigestMismatch`` if seals differ."""
    for ours in (True, False):  # a manifest names tensors, an archive only its records
        wanted = [seal for seal in seals if (seal.algorithm != "crc32") == ours]
        refuse(where, differences(wanted, workers), RECORDED_BY_US if ours else COPY_AGAIN)


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The result of checking a source's bytes during a conversion."""

    checked: int  #: seals that match
    unchecked: Sequence[Seal]  #: read only in part, so not compared


class _Covered:
    """The bytes of a range that were seen, each once, with the CRC-32 of every stretch. The owner must lock it."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # ascending
        self.stretches: dict[int, tuple[int, int | None]] = {}  # start -> (end, CRC-32; None while it is computed)

    def claim(self, first: int, last: int) -> list[tuple[int, int]]:
        """Claim the unseen parts of ``[first, last)``; the caller must ``settle`` them."""
        new: list[tuple[int, int]] = []
        at = first
        index = max(bisect_right(self.starts, first) - 1, 0)
        while index < len(self.starts) and self.starts[index] < last:
            start, index = self.starts[index], index + 1
            if start > at:
                new.append((at, start))
            at = max(at, self.stretches[start][0])
        if at < last:
            new.append((at, last))
        for start, end in new:
            insort(self.starts, start)
            self.stretches[start] = (end, None)
        return new

    def settle(self, start: int, end: int, crc: int) -> None:
        """Set the CRC-32 of a claimed part, and merge it with its neighbours."""
        if (after := self.stretches.get(end, (end, None)))[1] is not None:
            crc = crc32_combine(crc, after[1], after[0] - end)
            self._drop(end)
            end = after[0]
        index = bisect_right(self.starts, start) - 2
        before = self.starts[index] if index >= 0 else start
        stop, known = self.stretches[before]
        if stop == start and known is not None:
            crc = crc32_combine(known, crc, end - start)
            self._drop(start)
            start = before
        self.stretches[start] = (end, crc)

    def _drop(self, start: int) -> None:
        del self.stretches[start], self.starts[bisect_right(self.starts, start) - 1]

    def gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The unseen parts of ``[begin, end)``."""
        found, at = [], begin
        for start in self.starts:
            if start > at:
                found.append((at, start))
            at = max(at, self.stretches[start][0])
        return found + ([(at, end)] if at < end else [])


class SourceCheck:
    """Compares bytes read from files with their seals. One ``Observer`` per thread; ``finish`` when all have ended.

    ``checksums``: CRC-32s of the same bytes as some seals, for bytes that are not read in order.
    """

    def __init__(self, seals: Sequence[Seal], root: Path, checksums: Sequence[Seal] = ()) -> None:
        places = {(seal.path, seal.ranges): len(seals) + index for index, seal in enumerate(checksums)}
        #: By seal: a checksum of the same bytes, equivalent to the seal.
        self.instead = {
            index: places[seal.path, seal.ranges]
            for index, seal in enumerate(seals)
            if seal.algorithm != "crc32" and (seal.path, seal.ranges) in places
        }
        self.recorded, seals = len(seals), (*seals, *checksums)
        self.seals, self.root = seals, root
        self.done: set[int] = set()
        self.touched: set[int] = set()
        self.covered: dict[int, _Covered] = {}
        self.lock = threading.Lock()
        #: By file, for each kind of seal: their starts, ascending, and their indices. Seals of one kind do not overlap.
        self.by_path: dict[Path, dict[str, tuple[list[int], list[int]]]] = {}
        archives = {seal.path for seal in seals[: self.recorded] if seal.algorithm == "crc32"}
        for index in sorted(range(len(seals)), key=lambda index: seals[index].ranges[:1]):
            seal = seals[index]
            whole = seal.algorithm != "crc32" and seal.path in archives and seal.ranges[:1] and not seal.ranges[0][0]
            if len(seal.ranges) == 1 and not whole:  # an archive's records have their own digests
                kinds = self.by_path.setdefault(seal.path, {})
                kind = "checksum" if index >= self.recorded else seal.algorithm
                begins, indices = kinds.setdefault(kind, ([], []))
                begins.append(seal.ranges[0][0])
                indices.append(index)

    def watches(self, path: Path) -> bool:
        return path in self.by_path

    def observer(self) -> Observer:
        """An observer for one thread. The read that completes a differing seal raises ``DigestMismatch``."""
        return Observer(self)

    def compare(self, index: int, found: str | None) -> None:
        seal = self.seals[index]
        if said := seal.contradicted(found):
            of_archive = seal.algorithm == "crc32" and index < self.recorded
            refuse(self.root, [said], COPY_AGAIN if of_archive else RECORDED_BY_US)
        self.done.add(index)

    def see(self, index: int, first: int, last: int, data: memoryview) -> None:
        """Add a range of a record, whichever thread read it, to the record's CRC-32."""
        begin, nbytes = self.seals[index].ranges[0]
        with self.lock:
            covered = self.covered.setdefault(index, _Covered())
            new = covered.claim(first, last)
        for start, end in new:
            crc = crc32(data[start - first : end - first])
            with self.lock:
                covered.settle(start, end, crc)
        with self.lock:
            whole = covered.stretches.get(begin)
        if whole is not None and whole[0] == begin + nbytes and whole[1] is not None:
            self.compare(index, f"crc32:{whole[1]:08x}")

    def finish(self, read_again: Collection[Path], workers: int) -> SourceReport:
        """Read the remaining bytes of seals if they are few, once all threads have ended.

        In the files of ``read_again``, read everything that was not compared yet. Raises ``DigestMismatch``.
        """
        again: list[Seal] = []
        unchecked: list[Seal] = []
        checked = 0
        for index, seal in enumerate(self.seals[: self.recorded]):
            instead = self.instead.get(index, index)
            if self.done & {index, instead} or (
                instead in self.covered and self._completed(instead, seal.path in read_again)
            ):
                checked += 1
            elif seal.path in read_again or seal.nbytes <= _SMALL_BYTES:
                again.append(seal)
            elif index in self.touched:
                unchecked.append(seal)
        refuse_seals(self.root, again, workers)
        return SourceReport(checked=checked + len(again), unchecked=tuple(unchecked))

    def _completed(self, index: int, however_large: bool) -> bool:
        """Read the gaps of a partly seen record. False if they are large and most of the record."""
        seal, covered = self.seals[index], self.covered[index]
        begin, nbytes = seal.ranges[0]
        gaps = covered.gaps(begin, begin + nbytes)
        if not however_large and sum(end - start for start, end in gaps) > max(_SMALL_BYTES, nbytes // 2):
            return False
        descriptor = open_file(seal.path)
        try:
            for start, end in gaps:
                for at, data in _read(descriptor, seal.path, start, end - start):
                    self.see(index, at, at + len(data), memoryview(data))
        finally:
            os.close(descriptor)
        assert index in self.done
        return True


class Observer:
    """Tracks the sealed bytes that one thread reads."""

    def __init__(self, check: SourceCheck) -> None:
        self.check = check
        self._hashers: dict[int, tuple[Any, int]] = {}  # by seal, with the offset of the next byte

    def __call__(self, path: Path, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        for begins, indices in self.check.by_path.get(path, {}).values():
            at = max(bisect_right(begins, offset) - 1, 0)
            while at < len(begins) and begins[at] < end:
                index, at = indices[at], at + 1
                begin, nbytes = self.check.seals[index].ranges[0]
                first, last = max(offset, begin), min(end, begin + nbytes)
                if first >= last or index in self.check.done:
                    continue
                self.check.touched.add(index)
                data = view[first - offset : last - offset]
                if self.check.seals[index].algorithm == "crc32":
                    self.check.see(index, first, last, data)
                else:
                    self._hash(index, first, last, data)

    def _hash(self, index: int, first: int, last: int, data: memoryview) -> None:
        """Update digests that cannot be combined, which this thread reads in order from the first byte."""
        seal = self.check.seals[index]
        begin, nbytes = seal.ranges[0]
        hasher, expected = self._hashers.pop(index, (None, -1))
        if first == begin:
            hasher, expected = new_hasher(seal.algorithm), begin
        if first != expected:
            return  # out of order: ``finish`` handles it
        hasher.update(data)
        if last == begin + nbytes:
            self.check.compare(index, digest_text(hasher))
        else:
            self._hashers[index] = (hasher, last)
