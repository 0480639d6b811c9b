"""Checks that files in the Hub's cache have the digests that the Hub lists, once per file."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from smolconv.errors import CorruptFile
from smolconv.storage.atomic import appearing_whole


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The Hub's entry for a file; its digest identifies the content."""

    size: int
    digest: str  #: "sha256:..." of the content (LFS), or "git:...", the SHA-1 of git's blob

    def matches(self, path: Path) -> bool:
        """Read the whole file and compare its digest."""
        algorithm, _, wanted = self.digest.partition(":")
        if path.stat().st_size != self.size:
            return False
        hasher = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(b"blob %d\0" % self.size)
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                hasher.update(data)
        return hasher.hexdigest() == wanted


def _mark(listed: Listed) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolconv-checked" / listed.digest.replace(":", "-")


def _state_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def was_checked(local: Path, listed: Listed) -> bool:
    """Whether this file had this digest and was not written to since, so that a model is not hashed at every start."""
    try:
        return _mark(listed).read_text() == _state_of(local)
    except OSError:
        return False


def remember_checked(local: Path, listed: Listed) -> None:
    mark = _mark(listed)
    with suppress(OSError):  # a read-only cache is checked each time
        if not was_checked(local, listed):
            mark.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(mark) as part:
                part.write_text(_state_of(local))


def check_cached(local: Path, address: str) -> None:
    """Compare a file of the cache with the digest in its blob's name. Raises ``CorruptFile``."""
    blob = Path(os.path.realpath(local))
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # without links, the cache does not have the digest
    digest = f"{'git' if len(blob.name) == 40 else 'sha256'}:{blob.name}"
    listed = Listed(size=blob.stat().st_size, digest=digest)
    if not was_checked(local, listed) and not listed.matches(local):
        raise CorruptFile(
            f"{address}: the file in the cache is not the one that was downloaded.\n"
            f"Expected {digest} for {blob}.\n"
            "Unset HF_HUB_OFFLINE and run again with a network to download it again."
        )
    remember_checked(local, listed)


def discard(local: Path) -> None:
    """Delete a file from the Hub's cache together with its blob."""
    blob = Path(os.path.realpath(local))
    local.unlink(missing_ok=True)
    if blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)
