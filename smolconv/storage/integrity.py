"""Digests that were recorded when a source was written, compared with the bytes that are read of it.

A ``Seal`` is a digest of some bytes of a file: the CRC-32 of a record in a torch archive, or a digest from a manifest.
``SourceCheck`` looks at the bytes as a conversion reads them, so that the check costs no second pass. CRC-32s may be
put together from ranges in any order; other digests need the bytes in order, by one thread. What was read in part only
is told, or read again where that is asked for or small.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from zlib_ng.zlib_ng import crc32

from smolconv.errors import CorruptFile, DigestMismatch, MissingFile
from smolconv.storage.torch_archive import crc32_combine, is_torch_archive, read_archive_records

_READ_BYTES = 1 << 20
#: As much is read again without being asked for, a seal: the padding of flat partitions, scalars, headers.
_SMALL_BYTES = 1 << 20


class _Crc32:
    """CRC-32 as hashlib would have it."""

    name = "crc32"

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: bytes | memoryview) -> None:
        self.value = crc32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"


def new_hasher(algorithm: str) -> Any:
    """For "xxh3", "xxh3-128", "sha256" or "crc32"; None for "none". Raises ``ValueError`` for any other."""
    match algorithm:
        case "none":
            return None
        case "xxh3" | "xxh3-128":
            return xxhash.xxh3_128()
        case "sha256":
            return hashlib.sha256()
        case "crc32":
            return _Crc32()
    raise ValueError(f"{algorithm} is no digest that is known here")


def digest_text(hasher: Any) -> str | None:
    """As manifests have it: the algorithm, a colon, hexadecimal digits."""
    if hasher is None:
        return None
    return f"{hasher.name if hasher.name in ('sha256', 'crc32') else 'xxh3-128'}:{hasher.hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Seal:
    """A digest of some of a file's bytes, as it was recorded when they were written."""

    path: Path
    ranges: tuple[tuple[int, int], ...]  #: (offset, bytes), one after the other
    digest: str  #: "crc32:...", "xxh3-128:..." or "sha256:..."
    what: str  #: for messages: a tensor's name, a record's

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.ranges)

    @property
    def algorithm(self) -> str:
        return self.digest.partition(":")[0]

    def differs(self) -> str | None:
        """Read the bytes, and say how they are not what was recorded; None when they are."""
        hasher = new_hasher(self.algorithm)
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingFile(f"{self.path} is gone.\nA digest of its bytes was to be compared. Put it back.") from None
        try:
            for offset, nbytes in self.ranges:
                for data in _read(descriptor, self.path, offset, nbytes):
                    hasher.update(data)
        finally:
            os.close(descriptor)
        return self.contradicted(digest_text(hasher))

    def contradicted(self, found: str | None) -> str | None:
        return None if found == self.digest else f"{self.what} in {self.path.name}: {found}, was {self.digest}"


def _read(descriptor: int, path: Path, offset: int, nbytes: int) -> Iterator[bytes]:
    end = offset + nbytes
    while offset < end:
        data = os.pread(descriptor, min(_READ_BYTES, end - offset), offset)
        if not data:
            raise CorruptFile(f"{path} ends at byte {offset}; {end} were expected.\nIt is truncated: copy it again.")
        yield data
        offset += len(data)


def archive_seals(paths: Iterable[Path]) -> list[Seal]:
    """Every record's CRC-32 in those of the files that are torch archives with checksums."""
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
    """Read all the bytes, and say which seals no longer hold."""
    if not seals:
        return []
    with ThreadPoolExecutor(workers) as pool:
        return [said for said in pool.map(Seal.differs, seals) if said is not None]


def refuse(where: Path, problems: Sequence[str], advice: str) -> None:
    """Raise ``DigestMismatch`` where there are problems."""
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:5])
    more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    number = "a recorded digest no longer holds" if len(problems) == 1 else f"{len(problems)} digests no longer hold"
    raise DigestMismatch(f"{where}: {number}.\n{shown}{more}\n{advice}")


#: What to do about bytes that are not those which were written.
COPY_AGAIN = "The file was damaged after it was written: copy it again from where it was written."
RECORDED_BY_US = (
    "The checkpoint was changed after smolconv wrote it: copy it again, or convert it again from its source.\n"
    "If you changed it on purpose, delete smolconv_manifest.json, which describes what it was."
)


def refuse_seals(where: Path, seals: Sequence[Seal], workers: int) -> None:
    """Read all the bytes, and raise ``DigestMismatch`` where seals no longer hold."""
    for ours in (True, False):  # a manifest names tensors, an archive only its records
        wanted = [seal for seal in seals if (seal.algorithm != "crc32") == ours]
        refuse(where, differences(wanted, workers), RECORDED_BY_US if ours else COPY_AGAIN)


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What is known of a source's bytes after a conversion."""

    checked: int  #: seals that hold
    unchecked: Sequence[Seal]  #: of which only a part was read, so that nobody knows


class SourceCheck:
    """Compares what is read of files with their seals. One ``Observer`` a thread; ``finish`` once all are through."""

    def __init__(self, seals: Sequence[Seal], root: Path) -> None:
        self.seals, self.root = seals, root
        self.done: set[int] = set()
        self.touched: set[int] = set()
        self._observers: list[Observer] = []
        #: By file, for each kind of seal: where they begin, ascending, and their indices. A kind does not overlap.
        self.by_path: dict[Path, dict[bool, tuple[list[int], list[int]]]] = {}
        archives = {seal.path for seal in seals if seal.algorithm == "crc32"}
        for index in sorted(range(len(seals)), key=lambda index: seals[index].ranges[:1]):
            seal = seals[index]
            whole_archive = seal.path in archives and seal.ranges[:1] and seal.ranges[0][0] == 0
            if len(seal.ranges) == 1 and not whole_archive:  # whose records have digests of their own
                kinds = self.by_path.setdefault(seal.path, {})
                begins, indices = kinds.setdefault(seal.algorithm == "crc32", ([], []))
                begins.append(seal.ranges[0][0])
                indices.append(index)

    def watches(self, path: Path) -> bool:
        return path in self.by_path

    def observer(self) -> Observer:
        """For one thread. Raises ``DigestMismatch`` from the read that completes a seal which does not hold."""
        observer = Observer(self)
        self._observers.append(observer)
        return observer

    def compare(self, index: int, found: str | None) -> None:
        seal = self.seals[index]
        if said := seal.contradicted(found):
            refuse(self.root, [said], COPY_AGAIN if seal.algorithm == "crc32" else RECORDED_BY_US)
        self.done.add(index)

    def finish(self, read_again: Collection[Path], workers: int) -> SourceReport:
        """Put together what the threads have seen, and read what is left of seals where that is small.

        Of the files in ``read_again`` everything is read that was not compared yet. Raises ``DigestMismatch``.
        """
        again: list[Seal] = []
        unchecked: list[Seal] = []
        for index, seal in enumerate(self.seals):
            if index in self.done:
                continue
            if seal.algorithm == "crc32" and index in self.touched and self._patched(index, seal.path in read_again):
                continue
            if seal.path in read_again or seal.nbytes <= _SMALL_BYTES:
                again.append(seal)
            elif index in self.touched:
                unchecked.append(seal)
        refuse_seals(self.root, again, workers)
        return SourceReport(checked=len(self.done) + len(again), unchecked=tuple(unchecked))

    def _patched(self, index: int, everything: bool) -> bool:
        """Join the runs of all threads, and read the gaps between them. False where those are large."""
        seal = self.seals[index]
        (begin, nbytes), longest = seal.ranges[0], dict[int, tuple[int, int]]()
        for observer in self._observers:
            for end, (start, crc) in observer.runs.get(index, {}).items():
                if start not in longest or longest[start][0] < end:
                    longest[start] = (end, crc)
        starts, at, crc, gaps = sorted(longest), begin, 0, list[tuple[int, int]]()
        pieces: list[tuple[int, int, int | None]] = []  # (start, end, CRC where it was read)
        while at < begin + nbytes:
            if at in longest:
                end, found = longest[at]
                pieces.append((at, end, found))
            else:
                after = bisect_right(starts, at)
                end = starts[after] if after < len(starts) else begin + nbytes
                pieces.append((at, end, None))
                gaps.append((at, end - at))
            at = end
        if not everything and sum(size for _, size in gaps) > _SMALL_BYTES:
            return False
        descriptor = os.open(seal.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, end, known in pieces:
                if known is not None:
                    crc = crc32_combine(crc, known, end - start)
                else:
                    for data in _read(descriptor, seal.path, start, end - start):
                        crc = crc32(data, crc)
        finally:
            os.close(descriptor)
        self.compare(index, f"crc32:{crc:08x}")
        return True


class Observer:
    """What one thread has read of sealed bytes."""

    def __init__(self, check: SourceCheck) -> None:
        self.check = check
        #: By seal: ranges that were read without a gap, by their end: (start, CRC-32).
        self.runs: dict[int, dict[int, tuple[int, int]]] = {}
        self._hashers: dict[int, tuple[Any, int]] = {}  # by seal, with the byte that comes next

    def __call__(self, path: Path, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        for begins, indices in self.check.by_path.get(path, {}).values():
            at = max(bisect_right(begins, offset) - 1, 0)
            while at < len(begins) and begins[at] < end:
                index, at = indices[at], at + 1
                begin, nbytes = self.check.seals[index].ranges[0]
                first, last = max(offset, begin), min(end, begin + nbytes)
                if first < last and index not in self.check.done:
                    self.check.touched.add(index)
                    self._see(index, first, last, view[first - offset : last - offset])

    def _see(self, index: int, first: int, last: int, data: memoryview) -> None:
        seal = self.check.seals[index]
        (begin, nbytes), complete = seal.ranges[0], None
        if seal.algorithm == "crc32":
            runs = self.runs.setdefault(index, {})
            start, crc = runs.pop(first, (first, 0))
            crc = crc32(data, crc)
            if last not in runs or runs[last][0] > start:
                runs[last] = (start, crc)
            if (start, last) == (begin, begin + nbytes):
                complete = f"crc32:{crc:08x}"
        else:
            hasher, expected = (
                (new_hasher(seal.algorithm), begin) if first == begin else self._hashers.pop(index, (None, -1))
            )
            if first != expected:
                return  # out of order: left to finish
            hasher.update(data)
            self._hashers[index] = (hasher, last)
            if last == begin + nbytes:
                complete = digest_text(hasher)
                del self._hashers[index]
        if complete is not None:
            self.check.compare(index, complete)
