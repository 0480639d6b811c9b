"""``smolconv_manifest.json``: the source of an output, and digests that cover every byte of it.

Each tensor has a digest of its stored bytes, and each file a digest of its other bytes: a header, a pickle, a zip
directory, or the whole file if it has no tensors.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from smolconv.checkpoint import Checkpoint
from smolconv.errors import CorruptFile, counted, some_of
from smolconv.files import is_there, read_bytes
from smolconv.parsing import parse_json
from smolconv.storage.integrity import (
    RECORDED_BY_US,
    Seal,
    archive_seals,
    digest_of_ranges,
    new_hasher,
    refuse,
    refuse_seals,
)
from smolconv.storage.planned import PlannedFile, WrittenTensor
from smolconv.tensors.lazy import LazyTensor

MANIFEST = "smolconv_manifest.json"
#: A card of proof, by the name under which smolconv writes and looks for it.
PROOF = "smolconv_proof.json"
SCHEMA = 1
#: Enough for 384 ranks of a 3B model with Adam's state: 460,000 tensors.
_MOST_BYTES = 1 << 28


def make_manifest(
    folder: Path,
    files: Sequence[PlannedFile],
    late: Iterable[str],
    written: Mapping[str, Sequence[WrittenTensor]],
    *,
    digest: str,
    versions: Mapping[str, str],
    source: Mapping[str, Any],
    plan_digest: str,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Build the manifest of ``folder``, as plain JSON types.

    ``late``: files written in addition to the planned ones; ``digest`` is xxh3, sha256 or none.
    """
    tensors: list[dict[str, Any]] = [
        {
            "file": str(file.path), "name": tensor.name, "slot": tensor.slot, "dtype": tensor.source.dtype,
            "shape": list(tensor.source.shape), "offset": tensor.offset, "bytes": tensor.source.nbytes,
            "digest": found.digest, "crc32": None if found.digest is None else f"{found.crc:08x}",
        }
        for file in files
        for tensor, found in zip(file.tensors, written[str(file.path)])
        if tensor.slot is not None
    ]  # fmt: skip
    inside: dict[str, list[tuple[int, int]]] = {}
    for tensor in tensors:
        inside.setdefault(tensor["file"], []).append((tensor["offset"], tensor["bytes"]))
    return {
        "schema": SCHEMA,
        "tool": "smolconv",
        "versions": dict(versions),
        "source": dict(source),
        "plan_digest": plan_digest,
        "files": [
            {"path": path, **_file_entry(folder / path, inside.get(path, ()), digest)}
            for path in (*(str(file.path) for file in files), *late)
        ],
        "tensors": tensors,
        "warnings": list(warnings),
    }


def _file_entry(path: Path, tensors: Iterable[tuple[int, int]], digest: str) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "digest": digest_of_ranges(path, _outside(tensors, size), digest)}


def _outside(tensors: Iterable[tuple[int, int]], size: int) -> tuple[tuple[int, int], ...]:
    """The ranges of a file outside all tensors: (offset, bytes)."""
    found, at = [], 0
    for offset, nbytes in sorted(tensors):
        if offset > at:
            found.append((at, offset - at))
        at = max(at, offset + nbytes)
    if at < size:
        found.append((at, size - at))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A parsed manifest and its folder."""

    folder: Path
    files: Mapping[Path, int]  #: every file that it lists, with its size in bytes
    seals: tuple[Seal, ...]  #: its digests
    checksums: tuple[Seal, ...]  #: CRC-32s of tensors that have a digest, too
    without_digest: tuple[Path, ...]  #: files that were written with --digest none, or by an early version
    step: object  #: of a run's checkpoint, not validated; None for others


def find_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest that lists files of ``checkpoint``, in its folder, the parent folder or the step's; None without
    one.

    Raises ``CorruptFile`` for one that cannot be read or lists nothing.
    """
    root, files = checkpoint.root, {*checkpoint.files, *checkpoint.opened}
    steps = {root / path.relative_to(root).parts[0] for path in files if root in path.parent.parents}
    for folder in (root, root.parent, *sorted(steps | {path.parent for path in files if path.parent == root.parent})):
        manifest = read_manifest(folder)
        if manifest is not None and (folder == root or not files.isdisjoint(manifest.files)):
            return manifest
    return None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``, or None. Raises ``CorruptFile`` if it cannot be read or lists nothing."""
    path = folder / MANIFEST
    if not is_there(path):
        return None
    try:
        document = parse_json(read_bytes(path, _MOST_BYTES))
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r:.40}, but this version reads {SCHEMA}")
        return _parsed(folder, document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{path} cannot be read.\n"
            "Expected the list of files and digests that smolconv writes with a checkpoint; this is none "
            f"({type(error).__name__}: {error!s:.200}).\n"
            "Copy it again from where the checkpoint was written. Without it nothing can be compared."
        ) from None


def _parsed(folder: Path, document: Mapping[str, Any]) -> Manifest:
    files: dict[Path, int] = {}
    digests: dict[Path, str | None] = {}
    for entry in document["files"]:
        name, size, digest = entry["path"], entry["bytes"], entry.get("digest")
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts or "\0" in name or not inner.parts or not _is_count(size):
            raise ValueError(f"it lists {name!r:.80} of {size!r:.40} bytes")
        if folder / inner in files:
            raise ValueError(f"it lists {name!r:.80} twice")
        files[folder / inner], digests[folder / inner] = size, digest
    if not files:
        raise ValueError("it lists no files")
    seals: list[Seal] = []
    checksums: list[Seal] = []
    inside: dict[Path, list[tuple[int, int]]] = {}
    bare: dict[Path, None] = {}
    for entry in document["tensors"]:
        path, offset, nbytes, digest = folder / entry["file"], entry["offset"], entry["bytes"], entry["digest"]
        if not _is_count(offset) or not _is_count(nbytes) or offset + nbytes > files[path]:
            raise ValueError(f"it places {entry['name']!r:.80} outside its file")
        inside.setdefault(path, []).append((offset, nbytes))
        if digest is None:
            bare[path] = None
        else:
            what = f"{entry['name']} ({entry['slot']})"
            seals.append(Seal(path=path, ranges=((offset, nbytes),), digest=_digest(digest), what=what))
            if isinstance(crc := entry.get("crc32"), str):  # early versions wrote none
                checksums.append(Seal(path=path, ranges=((offset, nbytes),), digest=f"crc32:{crc}", what=what))
    for path, digest in digests.items():
        if digest is None:
            bare[path] = None
        else:
            ranges = _outside(inside.get(path, ()), files[path])
            what = "all but the tensors" if path in inside else "the content"
            seals.append(Seal(path=path, ranges=ranges, digest=_digest(digest), what=what))
    return Manifest(
        folder=folder,
        files=files,
        seals=tuple(seals),
        checksums=tuple(checksums),
        without_digest=tuple(bare),
        step=document.get("step"),
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _digest(text: str) -> str:
    new_hasher(text.partition(":")[0])  # raises for an unknown algorithm
    return text


def size_problems(manifest: Manifest, paths: Iterable[Path]) -> list[str]:
    """The listed files that are missing or have another size."""
    problems = []
    for path in paths:
        size = path.stat().st_size if path.is_file() else None
        if size != manifest.files[path]:
            told = "is gone" if size is None else f"has {size} bytes"
            problems.append(f"{path.relative_to(manifest.folder)} {told}, was {manifest.files[path]} bytes")
    return problems


def check_manifest(manifest: Manifest, workers: int = 1) -> int:
    """Re-read everything and compare digests; returns how many were compared.

    Raises ``DigestMismatch`` with the first differing digests and with files that are missing or have another size.
    """
    refuse(manifest.folder, size_problems(manifest, manifest.files), RECORDED_BY_US)
    refuse_seals(manifest.folder, manifest.seals, workers)
    return len(manifest.seals)


# --- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SourceSeals:
    """All digests recorded for the files of a source."""

    seals: tuple[Seal, ...]
    checksums: tuple[Seal, ...]  #: CRC-32s of the same tensors as some of the seals
    unsealed: tuple[Path, ...]  #: files without a digest
    warnings: tuple[str, ...] = ()


def _says_something(path: Path, edited: Container[str]) -> bool:
    """Whether a missing file is a document that changes how the others are read.

    Whole folders may be missing, and tensors that are not requested; the reader reports others that it needs.
    """
    is_document = path.suffix in (".json", ".yaml", ".txt") and not path.name.endswith(".index.json")
    return is_document and path.parent.is_dir() and path.name not in edited


def source_seals(checkpoint: Checkpoint, tensors: Iterable[LazyTensor], editable: Iterable[str]) -> SourceSeals:
    """The seals of all files that ``checkpoint`` was read from, and of those below ``tensors``.

    ``editable``: names of files that people edit, such as README.md, whose change is only a warning. Raises
    ``DigestMismatch`` if a file's size differs from the source's manifest, or if the file is not listed there.
    """
    leaves = {leaf.path for tensor in tensors for leaf in tensor.leaves()}
    paths = [path for path in dict.fromkeys([*checkpoint.files, *checkpoint.opened, *sorted(leaves)]) if path.is_file()]
    seals, warnings, edited = archive_seals(paths), list[str](), set(editable)
    checksums: list[Seal] = []
    read = set(paths)
    manifest = find_manifest(checkpoint)
    if manifest is not None:
        where, listed = manifest.folder, set(manifest.files)
        # A later step that a trainer saved in the same run: its folder is not in the manifest.
        known = {path.relative_to(where).parts[0] for path in listed}
        unlisted = [
            path for path in sorted(leaves)
            if where in path.parents and path not in listed
            and (path.parent == where or path.relative_to(where).parts[0] in known)
        ]  # fmt: skip
        problems = [f"{path.relative_to(where)} is not listed there" for path in unlisted if path.name not in edited]
        problems += size_problems(manifest, [path for path in paths if path in listed and path.name not in edited])
        gone = [path for path in manifest.files if not path.is_file()]
        problems += [f"{path.relative_to(where)} is gone" for path in gone if _says_something(path, edited)]
        refuse(where / MANIFEST, problems, RECORDED_BY_US)
        if gone:
            names = [path.relative_to(where).as_posix() for path in gone]
            verb = "is" if len(gone) == 1 else "are"
            files = counted(len(gone), "file")
            warnings.append(f"{files} that {MANIFEST} lists {verb} gone: {some_of(names, 5, more=True)}.")
        for seal in manifest.seals:
            if seal.path.name in edited and seal.path.is_file():
                if size_problems(manifest, [seal.path]) or seal.differs():
                    warnings.append(f"{seal.path.name} was changed after smolconv wrote {where}.")
            elif seal.path in read:
                seals.append(seal)
        checksums = [seal for seal in manifest.checksums if seal.path in read]
    sealed = {seal.path for seal in seals}
    return SourceSeals(
        seals=tuple(seals), checksums=tuple(checksums), warnings=tuple(warnings),
        unsealed=tuple(path for path in paths if path not in sealed and path.name not in (*edited, MANIFEST)),
    )  # fmt: skip
