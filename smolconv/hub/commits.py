"""A commit of a repository as a listing of files: on the Hub, or what the cache holds of it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import TYPE_CHECKING, TypeVar

from smolconv.errors import BadCheckpoint, CorruptFile, MachineError, SmolconvError
from smolconv.hub.address import HubSource
from smolconv.hub.errors import branches_of
from smolconv.layouts.listing import Children
from smolconv.storage.atomic import appearing_whole

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoFolder

RETRIES = 2
#: Answers that pass: another try may be served.
_PASSING = (429, 500, 502, 503, 504)
#: What a server may ask to wait for; beyond it, the user is told rather than kept.
_LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """What the Hub says of a file. Its digest tells whether what came is that file."""

    size: int
    digest: str  #: "sha256:..." of the content (LFS), or "git:...", the SHA-1 of git's blob

    def matches(self, path: Path) -> bool:
        """Read the whole file, and compare it."""
        algorithm, _, wanted = self.digest.partition(":")
        if path.stat().st_size != self.size:
            return False
        hasher = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(b"blob %d\0" % self.size)
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                hasher.update(data)
        return hasher.hexdigest() == wanted


@dataclass(kw_only=True)
class HubCommit:
    """A commit on the Hub. Listings are asked for once and kept as long as this object."""

    source: HubSource
    sha: str
    listed: dict[str, ListedFile] = field(default_factory=dict)  #: every file listed so far
    _children: dict[str, Children] = field(default_factory=dict)

    def children(self, folder: str) -> Children:
        if folder not in self._children:
            files, folders = self._list(folder, recursive=False)
            self._children[folder] = Children(
                files=frozenset(PurePosixPath(path).name for path in files),
                folders=frozenset(PurePosixPath(path).name for path in folders),
            )
        return self._children[folder]

    def tree(self, folder: str) -> list[str]:
        return self._list(folder, recursive=True)[0]

    def _list(self, folder: str, *, recursive: bool) -> tuple[list[str], list[str]]:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        files, folders = [], []
        where = self.source.at(folder)
        try:
            with _sound(f"the listing of {where}"):
                for entry in patiently(lambda: self._entries(folder, recursive=recursive)):
                    if isinstance(entry, RepoFile):
                        listed = _listed_file(entry)
                        if self.listed.setdefault(entry.path, listed) != listed:
                            raise ValueError(f"{entry.path!r:.80} is another file than before")
                        files.append(entry.path)
                    else:
                        folders.append(entry.path)
        except EntryNotFoundError:
            pass  # git knows no empty folders: one that is not there has no files
        return files, folders

    def _entries(self, folder: str, *, recursive: bool) -> list[RepoFile | RepoFolder]:
        """All pages of a listing. Raises ``ValueError`` for a name that is there twice: pages may go in circles."""
        from huggingface_hub import HfApi

        found: dict[str, RepoFile | RepoFolder] = {}
        for entry in HfApi().list_repo_tree(self.source.repo, folder or None, recursive=recursive, revision=self.sha):
            path = _path_inside(entry.path, folder)
            if path in found:
                raise ValueError(f"{path!r:.80} is there twice")
            found[path] = entry
        return list(found.values())

    def text(self, path: str) -> str:
        return _text_of(self.download(path))

    def branches(self) -> list[str]:
        return branches_of(self.source.repo)

    def lacking(self, kind: type[BadCheckpoint], folder: str, found: str, expected: str, remedy: str) -> SmolconvError:
        return kind(f"{self.source.at(folder)} {found}.\n{expected}\n{remedy}")

    def download(self, path: str) -> Path:
        """Bring one file into the Hub's cache, unless it is there, and return its path in the snapshot.

        Raises ``CorruptFile`` when it is not the file whose digest the Hub lists, twice. Such a file does not stay.
        """
        from huggingface_hub import hf_hub_download

        listed = self.listed[path]  # whoever asks for a file has seen it in a listing
        for again in (False, True):
            local = Path(
                patiently(
                    lambda again=again: hf_hub_download(  # type: ignore[misc]
                        self.source.repo, path, revision=self.sha, force_download=again
                    )
                )
            )
            if was_checked(local, listed) or listed.matches(local):
                remember_checked(local, listed)
                return local
            _discard(local)
        raise CorruptFile(
            f"{self.source.at(path)}: what the Hub sent is not the file that it lists.\n"
            f"Expected {listed.size} bytes of {listed.digest}; two downloads gave other bytes, which were deleted.\n"
            "Run again later, or check HF_ENDPOINT and the proxy, which may have changed it."
        )

    def snapshot(self, path: str) -> Path:
        """The snapshot's root, found through one small file.

        It is asked for by the branch's name, so that the client notes in its cache which commit the branch stood at:
        offline, the name is enough then. All other files are asked for by commit.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        depth = len(PurePosixPath(path).parts) - 1
        found = try_to_load_from_cache(self.source.repo, path, revision=self.source.revision)
        if not isinstance(found, str) or Path(found).parents[depth].name != self.sha:
            found = patiently(partial(hf_hub_download, self.source.repo, path, revision=self.source.revision))
        if Path(found).parents[depth].name != self.sha:  # the branch has moved on meanwhile
            found = str(self.download(path))
        return Path(found).parents[depth]


@dataclass(frozen=True, kw_only=True)
class CachedCommit:
    """What a local folder holds of a commit, while the Hub must not be asked."""

    source: HubSource
    root: Path

    def children(self, folder: str) -> Children:
        try:
            entries = list((self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        return Children(
            files=frozenset(entry.name for entry in entries if entry.is_file()),
            folders=frozenset(entry.name for entry in entries if entry.is_dir()),
        )

    def tree(self, folder: str) -> list[str]:
        found = (self.root / folder).rglob("*")
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())

    def text(self, path: str) -> str:
        return _text_of(self.root / path)

    def branches(self) -> list[str]:
        return []

    def lacking(self, kind: type[BadCheckpoint], folder: str, found: str, expected: str, remedy: str) -> SmolconvError:
        # Whether the repository lacks it too cannot be known offline, so it is the machine that falls short.
        return MachineError(
            f"{self.source.at(folder)}, as far as it is in the cache ({self.root}), {found}.\n{expected}\n"
            "HF_HUB_OFFLINE is set: unset it and run again with a network, so that the rest is fetched."
        )


def open_commit(source: HubSource) -> HubCommit:
    from huggingface_hub import HfApi, constants

    # The name of a branch is looked up once, so that every file comes from the same commit.
    with _sound(f"what the Hub says of {source}"):
        info = patiently(
            lambda: HfApi().model_info(source.repo, revision=source.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        )
        # It becomes the name of folders.
        if info.sha is not None and not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError(f"{info.sha!r:.60} is not the name of a commit")
    if info.sha is None:
        raise MachineError(
            f"{source}: the server at {constants.ENDPOINT} named no commit.\n"
            "Expected a Hugging Face Hub.\nCheck HF_ENDPOINT and the proxy."
        )
    return HubCommit(source=source, sha=info.sha)


_Answer = TypeVar("_Answer")


def patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask again, twice at most, after an answer that passes; the server may say when (Retry-After)."""
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
    """Seconds from a Retry-After header, which holds a number of them or a date."""
    if value is None:
        return default
    try:
        return max(0.0, float(value)) if value.strip().isdigit() else max(
            0.0, parsedate_to_datetime(value).timestamp() - time.time()
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError):
        return default


@contextmanager
def _sound(what: str) -> Iterator[None]:
    """Inside, an answer of the Hub is taken apart; what Python says of one of another kind becomes ``CorruptFile``."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HFValidationError, json.JSONDecodeError, SmolconvError):
        raise
    except OSError:  # the client's own errors are
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        if type(error).__name__ == "JSONDecodeError":  # of requests: no JSON at all came, from a proxy perhaps
            raise
        raise CorruptFile(
            f"{what} cannot be read ({type(error).__name__}: {shorten(str(error), 120, placeholder=' ...')}).\n"
            "Expected the answer of a Hugging Face Hub: files with paths, sizes and digests.\n"
            "Check HF_ENDPOINT. Nothing was downloaded from it."
        ) from None


def _path_inside(path: object, folder: str) -> str:
    """A path from a listing, once it is one below ``folder``. Raises ``ValueError``."""
    if not isinstance(path, str) or "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise ValueError(f"{path!r:.80} is no path")
    path.encode()  # raises for half a character
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r:.80} leaves its folder")
    if folder and not path.startswith(f"{folder}/"):
        raise ValueError(f"{path!r:.80} is not below {folder}")
    return path


def _listed_file(entry: RepoFile) -> ListedFile:
    size, lfs = entry.size, entry.lfs
    digest = entry.blob_id if lfs is None else lfs.sha256
    if type(size) is not int or size < 0 or (lfs is not None and lfs.size != size):
        raise ValueError(f"{entry.path!r:.80} has {size!r:.40} bytes")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{40}" if lfs is None else "[0-9a-f]{64}", digest):
        raise ValueError(f"{entry.path!r:.80} has the digest {digest!r:.80}")
    return ListedFile(size=size, digest=f"{'git' if lfs is None else 'sha256'}:{digest}")


def _mark(listed: ListedFile) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolconv-checked" / listed.digest.replace(":", "-")


def _state_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def was_checked(local: Path, listed: ListedFile) -> bool:
    """Whether this very file had this digest, and was not written to since: a model is not hashed at every start."""
    try:
        return _mark(listed).read_text() == _state_of(local)
    except OSError:
        return False


def remember_checked(local: Path, listed: ListedFile) -> None:
    mark = _mark(listed)
    with suppress(OSError):  # a cache that cannot be written to is checked each time
        if not was_checked(local, listed):
            mark.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(mark) as part:
                part.write_text(_state_of(local))


def _discard(local: Path) -> None:
    """Delete a file from the Hub's cache, and the blob that it is a link to."""
    blob = local.resolve()
    local.unlink(missing_ok=True)
    if blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(
            f"{path} holds bytes that are not text.\nExpected UTF-8.\nChoose another revision, or have it mended."
        ) from error
