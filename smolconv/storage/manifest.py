"""``smolconv_manifest.json``: what was written from what, and a digest for every tensor's stored bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Stored
from smolconv.errors import CorruptFile, DigestMismatch
from smolconv.storage.output import PlannedFile, WrittenTensor, digest_tensor

MANIFEST = "smolconv_manifest.json"
SCHEMA = 1


def make_manifest(
    files: Sequence[PlannedFile],
    written: Mapping[str, Sequence[WrittenTensor]],
    *,
    versions: Mapping[str, str],
    source: Mapping[str, Any],
    plan_digest: str,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The manifest as plain JSON types; digests are of the bytes as stored."""
    return {
        "schema": SCHEMA,
        "tool": "smolconv",
        "versions": dict(versions),
        "source": dict(source),
        "plan_digest": plan_digest,
        "files": [{"path": str(file.path), "bytes": file.size} for file in files],
        "tensors": [
            {
                "file": str(file.path), "name": tensor.name, "slot": tensor.slot, "dtype": tensor.source.dtype,
                "shape": list(tensor.source.shape), "offset": tensor.offset, "bytes": tensor.source.nbytes,
                "digest": found.digest,
            }
            for file in files
            for tensor, found in zip(file.tensors, written[str(file.path)])
            if tensor.slot is not None
        ],
        "warnings": list(warnings),
    }  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in ``folder``, or None. Raises ``CorruptFile`` when it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"its schema is {manifest['schema']}, this version reads {SCHEMA}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}.") from None
    return dict(manifest)


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Re-read every tensor and compare digests; returns how many were compared.

    Raises ``DigestMismatch`` naming the first tensors that differ, and files that are gone or of another size.
    """
    problems = []
    for file in manifest["files"]:
        path = folder / file["path"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            problems.append(f"{file['path']} has {'gone' if size is None else f'{size} bytes'}, was {file['bytes']}")
    compared = 0
    for entry in [] if problems else manifest["tensors"]:
        if entry["digest"] is None:
            continue
        stored = Stored(
            path=folder / entry["file"], offset=entry["offset"], shape=tuple(entry["shape"]), dtype=entry["dtype"]
        )
        algorithm = "sha256" if entry["digest"].startswith("sha256:") else "xxh3"
        compared += 1
        if digest_tensor(stored, algorithm) != entry["digest"]:
            problems.append(f"{entry['name']} ({entry['slot']}) in {entry['file']}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        raise DigestMismatch(
            f"{folder}: {len(problems)} of the manifest's entries no longer hold:\n{shown}\n"
            "The checkpoint was changed after smolconv wrote it: convert it again from its source."
        )
    return compared
