"""One commit of a repository on the Hub: checked listings, and files that are downloaded one by one.

``huggingface_hub`` does the transfer, the cache and the login, and is imported only for an ``hf://`` address. The same
calls work with 0.36, 1.x and 2.x.
Paths inside a repository are strings with ``/``; ``""`` is its root.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from smolconv.errors import CorruptFile, MachineError
from smolconv.files import read_bytes
from smolconv.hub.address import HubSource
from smolconv.hub.digests import Listed, discard, remember_checked, was_checked
from smolconv.hub.errors import sound

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoFolder

RETRIES = 2
#: HTTP statuses after which the same request may succeed a little later.
_PASSING = (429, 500, 502, 503, 504)
#: The longest wait before a retry, whatever Retry-After says.
_LONGEST_WAIT_SECONDS = 60.0


@dataclass(kw_only=True)
class HubCommit:
    """A commit on the Hub. Listings are requested once and cached in this object."""

    source: HubSource
    sha: str
    listed: dict[str, Listed] = field(default_factory=dict)  #: every file listed so far
    _children: dict[str, Mapping[str, bool]] = field(default_factory=dict)

    def children(self, folder: str) -> Mapping[str, bool]:
        """The names in a folder, with True for a file; None if there is no such folder."""
        above, _, name = folder.rpartition("/")
        if folder and above in self._children and name not in self._children[above]:
            return {}
        if folder not in self._children:
            found = self._list(folder, recursive=False)
            self._children[folder] = {PurePosixPath(path).name: is_file for path, is_file in found.items()}
        return self._children[folder]

    def tree(self, folder: str) -> list[str]:
        """The paths of all files under a folder, at any depth."""
        return [path for path, is_file in self._list(folder, recursive=True).items() if is_file]

    def _list(self, folder: str, *, recursive: bool) -> dict[str, bool]:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        found: dict[str, bool] = {}
        with suppress(EntryNotFoundError), sound(f"the listing of {self.source.inside(folder)}"):
            for entry in _patiently(lambda: self._entries(folder, recursive=recursive)):
                found[entry.path] = isinstance(entry, RepoFile)
                if isinstance(entry, RepoFile):
                    listed = _listed_file(entry)
                    if self.listed.setdefault(entry.path, listed) != listed:
                        raise ValueError(f"{entry.path!r:.80} differs from an earlier listing")
        return found  # git has no empty folders, so a missing folder has no files

    def _entries(self, folder: str, *, recursive: bool) -> list[RepoFile | RepoFolder]:
        """All pages of a listing. Raises ``ValueError`` for a duplicate name, because pages may repeat for ever."""
        from huggingface_hub import HfApi

        found: dict[str, RepoFile | RepoFolder] = {}
        for entry in HfApi().list_repo_tree(self.source.repo, folder or None, recursive=recursive, revision=self.sha):
            path = _path_inside(entry.path, folder)
            if path in found:
                raise ValueError(f"{path!r:.80} is listed twice")
            found[path] = entry
        return list(found.values())

    def download(self, path: str) -> Path:
        """Download one file to the Hub's cache, unless it is there, and return its path in the snapshot.

        Raises ``CorruptFile`` if two downloads differ from the digest that the Hub lists; they are deleted.
        """
        from huggingface_hub import hf_hub_download

        listed = self.listed[path]  # callers take the path from a listing
        for again in (False, True):
            local = Path(
                _patiently(
                    lambda again=again: hf_hub_download(  # type: ignore[misc]
                        self.source.repo, path, revision=self.sha, force_download=again
                    )
                )
            )
            if was_checked(local, listed) or listed.matches(local):
                remember_checked(local, listed)
                return local
            discard(local)
        raise CorruptFile(
            f"{self.source.inside(path)}: the Hub sent other bytes than it lists.\n"
            f"Expected {listed.size} bytes of {listed.digest}; two downloads gave other bytes, which were deleted.\n"
            "Try again later, or check HF_ENDPOINT and the proxy, which may have changed it."
        )

    def remember_revision(self, path: str) -> None:
        """Make the client's cache record the branch's commit, so that it can be used offline.

        Files are requested by commit, which records nothing, so one small file is requested by branch.
        """
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        revision = self.source.revision or constants.DEFAULT_REVISION
        local = try_to_load_from_cache(self.source.repo, path, revision=self.sha)
        if try_to_load_from_cache(self.source.repo, path, revision=revision) != local:
            with suppress(OSError):  # a shared cache may be read-only, which does not matter online
                hf_hub_download(self.source.repo, path, revision=revision)


@dataclass(frozen=True, kw_only=True)
class HubPath:
    """A file or folder of a commit with the interface of ``pathlib.Path``; only ``read_bytes`` downloads."""

    commit: HubCommit
    path: str

    def __str__(self) -> str:
        return self.commit.source.inside(self.path)

    def __truediv__(self, name: str) -> HubPath:
        return HubPath(commit=self.commit, path=f"{self.path}/{name}" if self.path else name)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> HubPath:
        return HubPath(commit=self.commit, path=self.path.rpartition("/")[0])

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self.commit.children(self.parent.path).get(self.name) is True

    def is_dir(self) -> bool:
        return not self.path or self.commit.children(self.parent.path).get(self.name) is False

    def iterdir(self) -> Iterator[HubPath]:
        return (self / name for name in self.commit.children(self.path))

    def rglob(self, pattern: str) -> Iterator[HubPath]:
        """All files, for any ``pattern``."""
        return (HubPath(commit=self.commit, path=path) for path in self.commit.tree(self.path))

    def read_bytes(self) -> bytes:
        return read_bytes(self.commit.download(self.path))


def open_commit(source: HubSource) -> HubCommit:
    from huggingface_hub import HfApi, constants

    # The branch is resolved once, so that every file comes from the same commit.
    with sound(f"the Hub's information on {source}"):
        info = _patiently(
            lambda: HfApi().model_info(source.repo, revision=source.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        )
        # It is used as a folder name.
        if info.sha is not None and not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError(f"{info.sha!r:.60} is not the name of a commit")
    if info.sha is None:
        raise MachineError(
            f"{source}: the server at {constants.ENDPOINT} returned no commit.\n"
            "Expected a Hugging Face Hub.\nCheck HF_ENDPOINT and the proxy."
        )
    return HubCommit(source=source, sha=info.sha)


_Answer = TypeVar("_Answer")


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Retry a temporary failure, at most twice; the server may set the wait (Retry-After)."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(RETRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            response = error.response
            if response is None or response.status_code not in _PASSING:
                raise
            wait = _asked_to_wait(response.headers.get("Retry-After"), default=0.5 * 2**attempt)
            if wait > _LONGEST_WAIT_SECONDS:
                raise
            time.sleep(wait)
    return ask()


def _asked_to_wait(value: str | None, default: float) -> float:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return default
    try:
        return max(0.0, float(value)) if value.strip().isdigit() else max(
            0.0, parsedate_to_datetime(value).timestamp() - time.time()
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError):
        return default


def _path_inside(path: object, folder: str) -> str:
    """Check that a path from a listing is below ``folder``. Raises ``ValueError``."""
    if not isinstance(path, str) or "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise ValueError(f"{path!r:.80} is not a path")
    path.encode()  # raises for a lone surrogate
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r:.80} leaves its folder")
    if folder and not path.startswith(f"{folder}/"):
        raise ValueError(f"{path!r:.80} is not below {folder}")
    return path


def _listed_file(entry: RepoFile) -> Listed:
    size, lfs = entry.size, entry.lfs
    digest = entry.blob_id if lfs is None else lfs.sha256
    if type(size) is not int or size < 0 or (lfs is not None and lfs.size != size):
        raise ValueError(f"{entry.path!r:.80} has {size!r:.40} bytes")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{40}" if lfs is None else "[0-9a-f]{64}", digest):
        raise ValueError(f"{entry.path!r:.80} has the digest {digest!r:.80}")
    return Listed(size=size, digest=f"{'git' if lfs is None else 'sha256'}:{digest}")
