"""Checkpoints on the Hugging Face Hub: ``hf://owner/name[/subfolder][@revision]``.

``huggingface_hub`` does the transfer, the cache and the login. This room knows which files of a repository a conversion
needs, how to see a model's tensors without downloading them, and what the client's errors mean to a user. The client
is imported only when an ``hf://`` address is used; 0.36, 1.x and 2.x are all spoken to through the same calls.

Paths inside a repository are strings with ``/``; ``""`` is its root.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from textwrap import shorten
from threading import Thread
from typing import TYPE_CHECKING, Protocol, TypeVar

from smolconv.errors import (
    BadCheckpoint,
    CorruptFile,
    MachineError,
    MissingFile,
    MissingShard,
    NotInstalled,
    SmolconvError,
    UsageError,
)
from smolconv.storage.atomic import appearing_whole

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoFolder

SCHEME = "hf://"

#: Small files that belong to a checkpoint in any layout.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "smolconv_manifest.json",
)
#: Where Transformers puts weights, the best first: (index of several shards, name of a single file).
WEIGHTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
#: Suffixes of weights for any program: taken only when an entry of WEIGHTS names the file.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".onnx_data", ".gguf", ".msgpack", ".h5", ".ckpt", ".tflite")
NANOTRON_FOLDERS = ("model", "optimizer", "lr_scheduler", "random")
NOT_NEEDED = ("README.md", ".gitattributes", ".gitignore", "LICENSE*")
NEVER_PUSHED = ("*.lock", "*.journal", "*journal.json", "*journal.jsonl", "*.tmp")

DOWNLOAD_THREADS = 8
# Headers computed from the names and shapes, bf16 in one file: SmolLM2-135M 30,530 bytes (272 tensors), 360M 32,670,
# 1.7B 25,181, SmolLM3-3B 37,844 (326 tensors). So one request serves for each; a longer header costs a second one.
FIRST_READ_BYTES = 48 * 1024
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself (MAX_HEADER_SIZE)
RANGE_RETRIES = 2
#: Answers after which the same request may succeed a little later.
_PASSING = (429, 500, 502, 503, 504)
#: No request is waited for longer, whatever Retry-After says.
_LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where on the Hub a checkpoint lies."""

    repo: str  #: ``owner/name``
    subfolder: str  #: ``""`` for the root
    revision: str | None  #: branch, tag or commit; None for the default branch

    def __post_init__(self) -> None:
        _check_repo(self.repo)
        if self.subfolder and any(part in ("", ".", "..") for part in self.subfolder.split("/")):
            raise UsageError(
                f"The folder {self.subfolder!r} is not a path inside {self.repo}.\n"
                "Expected names with single slashes between them, without '.' and '..'.\n"
                f"Write it as in {SCHEME}{self.repo}/folder/in/it."
            )
        # The rules of `git check-ref-format` that keep a name from leaving the cache's refs/ folder.
        if self.revision is not None and not re.fullmatch(
            r"(?!.*(\.\.|//))[^\s\\~^:?*\[/.-][^\s\\~^:?*\[]*(?<![/.])", self.revision
        ):
            raise UsageError(
                f"{self.revision!r} cannot be a revision of {self.repo}.\n"
                "Expected a branch, a tag or a commit after the '@', as in @main.\n"
                "Leave '@...' out for the default branch."
            )

    def __str__(self) -> str:
        folder = f"/{self.subfolder}" if self.subfolder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{folder}{revision}"


def is_hub_uri(text: str) -> bool:
    return text.startswith(SCHEME)


def parse_hub_uri(uri: str) -> HubSource:
    """Read ``hf://owner/name[/subfolder][@revision]``. The revision comes last and may hold slashes.

    Raises ``UsageError`` when the address is malformed.
    """
    path, at, revision = uri.removeprefix(SCHEME).partition("@")
    parts = path.removesuffix("/").split("/")
    if not is_hub_uri(uri) or len(parts) < 2 or (at and not revision) or "@" in revision:
        raise UsageError(
            f"{uri!r} is not an address on the Hub.\n"
            f"Expected {SCHEME}owner/name[/subfolder][@revision].\n"
            f"Write it as in {SCHEME}HuggingFaceTB/SmolLM2-135M or {SCHEME}HuggingFaceTB/SmolLM3-3B@main."
        )
    if parts[0] in ("datasets", "spaces", "kernels", "buckets", "models"):
        raise UsageError(
            f"{uri}: {parts[0]!r} is a kind of repository, not an owner.\n"
            f"Expected a model repository, {SCHEME}owner/name[/subfolder][@revision].\n"
            "Checkpoints are read from model repositories only; leave out 'models/'."
        )
    return HubSource(repo="/".join(parts[:2]), subfolder="/".join(parts[2:]), revision=revision or None)


def open_source(
    uri: str | Path, *, headers_only: bool = False, optimizer: bool = True, step: int | None = None
) -> Path:
    """A local folder for ``uri``: itself, or what is needed of a Hub repository, downloaded to the cache."""
    if is_hub_uri(str(uri)):
        return fetch_source(parse_hub_uri(str(uri)), headers_only=headers_only, optimizer=optimizer, step=step)
    return Path(uri)


def fetch_source(
    source: HubSource, *, headers_only: bool = False, optimizer: bool = True, step: int | None = None
) -> Path:
    """Download what a conversion needs and return the local folder of the checkpoint.

    The folder lies in the Hub's cache, may hold more files than were needed, and must not be written to.

    ``headers_only`` leaves the tensors on the Hub: each safetensors file becomes a sparse file of the true size that
    holds the real header and reads as zeros after it, under ``HF_HOME/smolconv-headers/<repo>/<commit>``, with the
    other files linked beside it. ``.bin`` and ``.pt`` files are still downloaded whole: they are zip archives, whose
    directory stands at the end and whose tensor names stand in a pickle, so their first bytes say nothing.

    Without ``optimizer``, Adam's tensors stay on the Hub; ``step`` chooses a step of a nanotron run. With
    ``HF_HUB_OFFLINE`` set, the cache alone is used.

    Raises ``BadCheckpoint`` for what is not on the Hub, ``MachineError`` for network, login and disk.
    """
    _require_client()
    from huggingface_hub import constants

    with _client_errors(str(source)):
        if constants.HF_HUB_OFFLINE:
            return _find_in_cache(source, headers_only, step)
        commit = _open_commit(source)
        paths = _needed_files(commit, source.subfolder, step)
        if not optimizer:
            paths = [path for path in paths if not _is_adam_state(path, source.subfolder)]
        # Every layout has a small file that names it, so this never downloads tensors.
        snapshot = commit.snapshot(next(path for path in paths if not path.endswith(".safetensors")))
        if headers_only:
            root = _headers_root(source.repo, commit.sha)
            _run_on_threads(_StandIns(commit, root).place, paths)
        else:
            root = snapshot
            _run_on_threads(commit.download, paths)
        _remember_revision(snapshot, source.revision or constants.DEFAULT_REVISION, commit.sha)
    return root / source.subfolder


def push_folder(folder: Path, repo: str, *, message: str, private: bool = False) -> str:
    """Upload a folder as one commit, creating the repository if needed, and return the commit's address.

    Locks and journals stay behind, and files that only the repository has are kept. ``private`` False leaves the
    choice to the owner's default. A push that asks for a private repository is refused when it exists as a public one.
    """
    _check_repo(repo)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.\nExpected the folder of a finished checkpoint.\nCheck the path.")
    _require_client()
    from huggingface_hub import HfApi

    api = HfApi()
    with _client_errors(SCHEME + repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UsageError(
                f"{SCHEME}{repo} exists already and is public, so nothing was uploaded.\n"
                "Expected a private repository, or none.\n"
                "Make it private in its settings, or push under another name."
            )
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=list(NEVER_PUSHED)
        )
    return str(commit.commit_url)


# Which files a conversion needs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Children:
    """The names directly in one folder."""

    files: frozenset[str]
    folders: frozenset[str]


class _Commit(Protocol):
    """One commit of a repository, as far as it can be seen from here."""

    def children(self, folder: str) -> _Children:
        """The names in a folder; none when there is no such folder."""

    def tree(self, folder: str) -> list[str]:
        """The paths of all files under a folder, at any depth."""

    def text(self, path: str) -> str: ...

    def branches(self) -> list[str]: ...

    def lacking(self, kind: type[BadCheckpoint], folder: str, found: str, expected: str, remedy: str) -> SmolconvError:
        """The error for something that should be in ``folder`` and is not."""


def _needed_files(commit: _Commit, folder: str, step: int | None = None) -> list[str]:
    """The paths that a conversion of the checkpoint in ``folder`` reads, sorted; never empty.

    The layouts are recognised by the same files as in a local folder. They are not exclusive: what each of them
    needs is added up, and the reader decides.
    """
    here = commit.children(folder)
    needed = {_join(folder, name) for name in here.files if _matches(name, COMPANIONS)}
    if "smolconv_state" in here.folders:
        needed.update(commit.tree(_join(folder, "smolconv_state")))

    is_tag = any(name.endswith("_model_states.pt") for name in here.files)
    pointers = sorted(here.files & {"latest", "latest_universal"})
    other_layout = is_tag or pointers or here.files & {"latest.txt", "model_config.json"}
    if "config.json" not in here.files and not other_layout:
        raise _no_checkpoint(commit, folder)

    weights = _huggingface_weights(commit, folder, here.files) if "config.json" in here.files else []
    if not weights and not other_layout:
        found = sorted(name for name in here.files if name.endswith(WEIGHT_SUFFIXES))
        raise commit.lacking(
            MissingFile,
            folder,
            f"has a config.json but no weights that can be read (found: {_listed(found) or 'none'})",
            f"Expected {', '.join(name for pair in WEIGHTS for name in pair)}.",
            "Check the subfolder and the revision, or convert those weights to safetensors first.",
        )
    needed.update(weights)

    if "model_config.json" in here.files:
        needed.update(_other_files(folder, here.files))
        for name in here.folders.intersection(NANOTRON_FOLDERS):
            needed.update(commit.tree(_join(folder, name)))
    if "latest.txt" in here.files:
        needed.add(_join(folder, "latest.txt"))
        needed.update(_pointed_folder(commit, folder, "latest.txt", here.folders, step))

    if pointers or is_tag:
        needed.update(_other_files(folder, here.files))
        for pointer in pointers:
            needed.update(_pointed_folder(commit, folder, pointer, here.folders))
        if is_tag:
            needed.update(commit.tree(folder))
        # DeepSpeed's own folders hold no model config: it may lie beside `latest`, or above the run.
        for parent in _parents(folder)[:2]:
            above = commit.children(parent).files
            needed.update(_join(parent, name) for name in above if _matches(name, COMPANIONS))
    return sorted(needed)


def _huggingface_weights(commit: _Commit, folder: str, files: frozenset[str]) -> list[str]:
    for index, single in WEIGHTS:
        if single in files:  # as transformers chooses, and our reader
            return [_join(folder, single)]
        if index in files:
            shards = _shards_in_index(commit, _join(folder, index))
            missing = sorted(shards - files)
            if missing:
                raise commit.lacking(
                    MissingShard,
                    folder,
                    f"lacks {len(missing)} of the {len(shards)} shards in {index}: {_listed(missing)}",
                    "Expected every shard that the index names.",
                    "Choose another revision, or ask the repository's owner to upload them.",
                )
            return [_join(folder, name) for name in (index, *shards)]
    return []


def _shards_in_index(commit: _Commit, path: str) -> set[str]:
    try:
        names = set(json.loads(commit.text(path))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        names = {error}
    if not names or not all(isinstance(name, str) for name in names):
        raise CorruptFile(
            f"{path} in the repository is not an index of shards.\n"
            'Expected JSON with a "weight_map" from tensor names to file names.\n'
            "Choose another revision, or ask the repository's owner to mend it."
        )
    return names


def _is_adam_state(path: str, folder: str) -> bool:
    inside = PurePosixPath(path).relative_to(folder).parts
    sidecar = inside[0] == "smolconv_state" and path.endswith((".safetensors", ".safetensors.index.json"))
    return sidecar or any(part in ("optimizer", "lr_scheduler", "random") for part in inside[:-1])


def _pointed_folder(
    commit: _Commit, folder: str, pointer: str, folders: frozenset[str], step: int | None = None
) -> list[str]:
    name = commit.text(_join(folder, pointer)).strip() if step is None else str(step)
    if name not in folders:
        raise commit.lacking(
            MissingFile,
            folder,
            f"has a {pointer} that names {name!r}, but no such folder (found: {_listed(sorted(folders)) or 'none'})",
            "Expected the folder of the newest step beside it.",
            "Name the folder of a step in the address, or choose another revision.",
        )
    return commit.tree(_join(folder, name))


def _other_files(folder: str, files: frozenset[str]) -> list[str]:
    return [
        _join(folder, name)
        for name in files
        if not _matches(name, NOT_NEEDED)
        and (name.endswith(".pt") or not name.endswith(WEIGHT_SUFFIXES))
        # The indexes go with the weights that they index.
        and not name.endswith(".index.json")
    ]


def _no_checkpoint(commit: _Commit, folder: str) -> SmolconvError:
    marks = {"config.json", "model_config.json", "latest.txt", "latest", "latest_universal"}
    candidates = sorted(
        {
            str(PurePosixPath(path).parent)
            for path in commit.tree("")
            if PurePosixPath(path).name in marks or path.endswith("_model_states.pt")
            if "smolconv_state" not in PurePosixPath(path).parts
        }
        - {"."}
    )
    branches = commit.branches() if not candidates else []
    if candidates:
        remedy = f"Name one of its folders in the address: {_listed(candidates)}."
    elif len(branches) > 1:
        remedy = f"Name one of its branches in the address, after an '@': {_listed(branches)}."
    else:
        remedy = "Check the address: no folder of the repository has them."
    here = commit.children(folder)
    return commit.lacking(
        MissingFile,
        folder,
        "holds no checkpoint" if here.files or here.folders else "is not a folder with files",
        "Expected a config.json (Hugging Face), a model_config.json or latest.txt (nanotron), or a latest (DeepSpeed).",
        remedy,
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parents(folder: str) -> list[str]:
    """The folders above, nearest first, down to the root."""
    return ["" if str(parent) == "." else str(parent) for parent in PurePosixPath(folder).parents] if folder else []


def _listed(names: list[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


# Commits: on the Hub and in the cache ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Listed:
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
class _HubCommit:
    """A commit on the Hub. Listings are asked for once and kept as long as this object."""

    source: HubSource
    sha: str
    listed: dict[str, _Listed] = field(default_factory=dict)  #: every file listed so far
    _children: dict[str, _Children] = field(default_factory=dict)

    def children(self, folder: str) -> _Children:
        if folder not in self._children:
            files, folders = self._list(folder, recursive=False)
            self._children[folder] = _Children(
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
        where = _address(self.source, folder)
        try:
            with _sound(f"the listing of {where}"):
                for entry in _patiently(lambda: self._entries(folder, recursive=recursive)):
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
        return _branches(self.source.repo)

    def lacking(self, kind: type[BadCheckpoint], folder: str, found: str, expected: str, remedy: str) -> SmolconvError:
        return kind(f"{_address(self.source, folder)} {found}.\n{expected}\n{remedy}")

    def download(self, path: str) -> Path:
        """Bring one file into the Hub's cache, unless it is there, and return its path in the snapshot.

        Raises ``CorruptFile`` when it is not the file whose digest the Hub lists, twice. Such a file does not stay.
        """
        from huggingface_hub import hf_hub_download

        listed = self.listed[path]  # whoever asks for a file has seen it in a listing
        for again in (False, True):
            local = Path(
                _patiently(
                    lambda again=again: hf_hub_download(  # type: ignore[misc]
                        self.source.repo, path, revision=self.sha, force_download=again
                    )
                )
            )
            if _was_checked(local, listed) or listed.matches(local):
                _remember_checked(local, listed)
                return local
            _discard(local)
        raise CorruptFile(
            f"{_address(self.source, path)}: what the Hub sent is not the file that it lists.\n"
            f"Expected {listed.size} bytes of {listed.digest}; two downloads gave other bytes, which were deleted.\n"
            "Run again later, or check HF_ENDPOINT and the proxy, which may have changed it."
        )

    def snapshot(self, path: str) -> Path:
        """The snapshot's root, found through one file of it."""
        return self.download(path).parents[len(PurePosixPath(path).parts) - 1]


@dataclass(frozen=True, kw_only=True)
class _CachedCommit:
    """What a local folder holds of a commit, while the Hub must not be asked."""

    source: HubSource
    root: Path

    def children(self, folder: str) -> _Children:
        try:
            entries = list((self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        return _Children(
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
            f"{_address(self.source, folder)}, as far as it is in the cache ({self.root}), {found}.\n{expected}\n"
            "HF_HUB_OFFLINE is set: unset it and run again with a network, so that the rest is fetched."
        )


def _open_commit(source: HubSource) -> _HubCommit:
    from huggingface_hub import HfApi, constants

    # The name of a branch is looked up once, so that every file comes from the same commit.
    with _sound(f"what the Hub says of {source}"):
        info = _patiently(
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
    return _HubCommit(source=source, sha=info.sha)


_Answer = TypeVar("_Answer")


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask again, twice at most, after an answer that passes; the server may say when (Retry-After)."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(RANGE_RETRIES):
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


def _listed_file(entry: RepoFile) -> _Listed:
    size, lfs = entry.size, entry.lfs
    digest = entry.blob_id if lfs is None else lfs.sha256
    if type(size) is not int or size < 0 or (lfs is not None and lfs.size != size):
        raise ValueError(f"{entry.path!r:.80} has {size!r:.40} bytes")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{40}" if lfs is None else "[0-9a-f]{64}", digest):
        raise ValueError(f"{entry.path!r:.80} has the digest {digest!r:.80}")
    return _Listed(size=size, digest=f"{'git' if lfs is None else 'sha256'}:{digest}")


def _mark(listed: _Listed) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolconv-checked" / listed.digest.replace(":", "-")


def _state_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _was_checked(local: Path, listed: _Listed) -> bool:
    """Whether this very file had this digest, and was not written to since: a model is not hashed at every start."""
    try:
        return _mark(listed).read_text() == _state_of(local)
    except OSError:
        return False


def _remember_checked(local: Path, listed: _Listed) -> None:
    mark = _mark(listed)
    with suppress(OSError):  # a cache that cannot be written to is checked each time
        if not _was_checked(local, listed):
            mark.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(mark) as part:
                part.write_text(_state_of(local))


def _discard(local: Path) -> None:
    """Delete a file from the Hub's cache, and the blob that it is a link to."""
    blob = local.resolve()
    local.unlink(missing_ok=True)
    if blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)


def _find_in_cache(source: HubSource, headers_only: bool, step: int | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No patterns: only the folder is looked up. Completeness is judged below, by what a conversion needs.
        snapshot = Path(
            snapshot_download(source.repo, revision=source.revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError as error:
        raise MachineError(
            f"{source} is not in the cache.\n"
            "Expected it there, since HF_HUB_OFFLINE is set.\n"
            "Unset HF_HUB_OFFLINE and run again with a network."
        ) from error
    cached = _CachedCommit(source=source, root=snapshot)
    stand_ins = _headers_root(source.repo, snapshot.name)
    try:
        needed = _needed_files(cached, source.subfolder, step)
    except MachineError:
        if not headers_only or not stand_ins.is_dir():
            raise
        cached = _CachedCommit(source=source, root=stand_ins)
        _needed_files(cached, source.subfolder, step)
        return cached.root / source.subfolder
    for path in [] if headers_only else needed:
        _check_cached(snapshot / path, _address(source, path))
    return cached.root / source.subfolder


def _check_cached(local: Path, address: str) -> None:
    """Compare a file of the cache with the digest that its blob is named by. Raises ``CorruptFile``."""
    blob = local.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without links does not tell
    digest = f"{'git' if len(blob.name) == 40 else 'sha256'}:{blob.name}"
    listed = _Listed(size=blob.stat().st_size, digest=digest)
    if not _was_checked(local, listed) and not listed.matches(local):
        raise CorruptFile(
            f"{address}: the file in the cache is not the one that was downloaded.\n"
            f"Expected {digest} of {blob}.\n"
            "Unset HF_HUB_OFFLINE and run again with a network, so that it is fetched again."
        )
    _remember_checked(local, listed)


def _remember_revision(snapshot: Path, revision: str, sha: str) -> None:
    """Note which commit a branch stood at, so that the cache can answer offline.

    The files were asked for by commit, and then the client notes nothing itself. The place is part of its documented
    cache structure: ``refs/<revision>`` beside ``snapshots``.
    """
    ref = snapshot.parent.parent / "refs" / revision
    with suppress(OSError):  # a cache shared by many users may be read-only; online it serves all the same
        if revision != sha and not (ref.is_file() and ref.read_text() == sha):
            ref.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(ref) as part:
                part.write_text(sha)


def _branches(repo: str) -> list[str]:
    """The repository's branches for an error message, or none if they cannot be had either."""
    from huggingface_hub import HfApi

    try:
        return sorted(branch.name for branch in HfApi().list_repo_refs(repo).branches)
    except Exception:  # a hint must not replace the error that it belongs to
        return []


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(
            f"{path} holds bytes that are not text.\nExpected UTF-8.\nChoose another revision, or have it mended."
        ) from error


def _address(source: HubSource, folder: str) -> str:
    return str(HubSource(repo=source.repo, subfolder=folder, revision=source.revision))


# Headers without tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Range:
    start: int
    stop: int  #: one past the last byte


class _StandIns:
    """Puts files of a commit under ``root``: safetensors as headers only, the rest as links into the Hub's cache."""

    def __init__(self, commit: _HubCommit, root: Path) -> None:
        self.commit = commit
        self.root = root
        top = _headers_top()
        if not top.is_dir():
            top.mkdir(mode=0o700, parents=True, exist_ok=True)
            (top / "README").write_text("Model files here are stand-ins for `smolconv inspect`: headers, no tensors.\n")

    def place(self, path: str) -> None:
        target = self.root / path
        if target.exists():  # a commit never changes, so neither does what stands for it
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        local = self._whole_file(path)
        with appearing_whole(target) as part:
            if local is not None:
                _link_or_copy(local.resolve(), part)
            else:
                size = self.commit.listed[path].size
                with part.open("wb") as file:
                    file.write(self._header(path, size))
                    file.truncate(size)

    def _whole_file(self, path: str) -> Path | None:
        if not path.endswith(".safetensors"):
            return self.commit.download(path)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.commit.source.repo, path, revision=self.commit.sha)
        # One that was never compared is not hashed for its header, which costs a request instead.
        known = isinstance(found, str) and _was_checked(Path(found), self.commit.listed[path])
        return Path(found) if isinstance(found, str) and known else None

    def _header(self, path: str, size: int) -> bytes:
        start = self._read(path, _Range(start=0, stop=min(size, FIRST_READ_BYTES)), size)
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size, HEADER_LIMIT_BYTES):
            raise CorruptFile(
                f"{_address(self.commit.source, path)} is {size} bytes, but its header would end at {length}.\n"
                "Expected the header inside the file.\n"
                "Choose another revision, or ask the repository's owner to upload it again."
            )
        if length > len(start):
            start += self._read(path, _Range(start=len(start), stop=length), size)
        return start[:length]

    def _read(self, path: str, wanted: _Range, size: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if wanted.start == wanted.stop:
            return b""
        headers = build_hf_headers()
        headers["Range"] = f"bytes={wanted.start}-{wanted.stop - 1}"
        headers["Accept-Encoding"] = "identity"  # a range of compressed bytes would be of no use
        response = http_backoff(
            "GET",
            hf_hub_url(self.commit.source.repo, path, revision=self.commit.sha),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            max_retries=RANGE_RETRIES,
            base_wait_time=0.5,
        )
        hf_raise_for_status(response)
        content: bytes = response.content
        if response.status_code == 200 and len(content) == size:  # the server does not know ranges
            content = content[wanted.start : wanted.stop]
        if len(content) != wanted.stop - wanted.start:
            raise MachineError(
                f"{_address(self.commit.source, path)}: {len(content)} bytes came for {headers['Range']}.\n"
                f"Expected {wanted.stop - wanted.start}, from a server that answers range requests.\n"
                "Run again; if it stays so, check HF_ENDPOINT and the proxy."
            )
        return content


def _headers_top() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "smolconv-headers"


def _headers_root(repo: str, sha: str) -> Path:
    return _headers_top() / repo / sha


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, target)


def _run_on_threads(work: Callable[[str], object], paths: Sequence[str]) -> None:
    """Do the work for every path on a few threads, and raise the first failure.

    The threads are daemons, unlike a ThreadPoolExecutor's, so that Ctrl-C does not wait for shards of several GB. The
    client continues half a download next time.
    """
    waiting = deque(paths)
    outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        while True:
            try:
                path = waiting.popleft()
            except IndexError:
                return
            try:
                work(path)
            except BaseException as error:
                outcomes.put(error)
            else:
                outcomes.put(None)

    for _ in range(min(DOWNLOAD_THREADS, len(paths))):
        Thread(target=run, daemon=True).start()
    try:
        for _ in paths:
            error = outcomes.get()
            if error is not None:
                raise error
    finally:
        waiting.clear()


# What the client's errors mean ----------------------------------------------------------------------------------------


def _require_client() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise NotInstalled(
            f"An {SCHEME} address needs the package huggingface_hub, which cannot be imported ({error}).\n"
            "Expected it in this Python environment.\n"
            "Install it: pip install huggingface_hub"
        ) from error


def _check_repo(repo: str) -> None:
    # As on the Hub (huggingface_hub.utils.validate_repo_id), but an owner is required.
    name = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?<![.-])"
    if not re.fullmatch(f"{name}/{name}", repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise UsageError(
            f"{repo!r} is not the name of a repository.\n"
            "Expected owner/name, of letters, digits, '-', '_' and '.'.\n"
            "Copy it from the top of the model's page."
        )


@contextmanager
def _client_errors(address: str) -> Iterator[None]:
    """Raise what goes wrong inside the client as one of ours; our own errors and unknown ones pass."""
    try:
        yield
    except SmolconvError:
        raise
    except Exception as error:
        ours = _as_ours(error, address)
        if ours is None:
            raise
        raise ours from error


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    """One failure of the client, in the terms that tell failures apart."""

    error: BaseException
    address: str
    repo: str
    status: int | None  #: of the Hub's answer, if there was one
    code: str | None  #: the Hub's own name for the failure
    said: str


def _as_ours(error: BaseException, address: str) -> SmolconvError | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    # "Not in the cache and the Hub could not be asked", or "an upload failed": the reason stands behind it.
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)  # compared with None, since requests' failed responses are falsy
    trouble = _Trouble(
        error=error,
        address=address,
        repo="/".join(address.removeprefix(SCHEME).partition("@")[0].split("/")[:2]),
        status=None if response is None else response.status_code,
        code=None if response is None else response.headers.get("X-Error-Code"),
        said=shorten(str(error) or "no message", 160, placeholder=" ..."),
    )
    return _refused(trouble) or _not_found(trouble) or _failed(trouble)


def _refused(trouble: _Trouble) -> SmolconvError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    if isinstance(trouble.error, GatedRepoError):
        return MachineError(
            f"{trouble.address}: access to {trouble.repo} is restricted and was not given (HTTP {trouble.status}).\n"
            "Expected a token of someone who has been let in.\n"
            f"Ask for access on {constants.ENDPOINT}/{trouble.repo}, then run `hf auth login` or set HF_TOKEN."
        )
    # The Hub answers 401 to a visitor without a token for what is private and for what does not exist alike.
    if trouble.status in (401, 403) and trouble.code != "RepoNotFound":
        return MachineError(
            f"{trouble.address}: the Hub refused (HTTP {trouble.status}). It says so of a private repository, to a\n"
            "token that may not do this and, to those without a token, also of a name that does not exist.\n"
            "Check the name, then run `hf auth login` or set HF_TOKEN."
        )
    return None


def _not_found(trouble: _Trouble) -> SmolconvError | None:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(trouble.error, RevisionNotFoundError):
        branches = _branches(trouble.repo)
        return BadCheckpoint(
            f"{trouble.address}: {trouble.repo} has no such revision.\n"
            f"Expected a branch, a tag or a commit{f' (branches: {_listed(branches)})' if branches else ''}.\n"
            "Correct what stands after the '@'."
        )
    if isinstance(trouble.error, RepositoryNotFoundError):
        return BadCheckpoint(
            f"{trouble.address}: the Hub has no model repository {trouble.repo}, or not for this user "
            f"(HTTP {trouble.status}).\n"
            "Expected a public repository, or one that your token may read.\n"
            "Check the name; if it is private, run `hf auth login` or set HF_TOKEN."
        )
    not_remote = isinstance(trouble.error, LocalEntryNotFoundError)
    if trouble.status == 404 or (isinstance(trouble.error, EntryNotFoundError) and not not_remote):
        return MissingFile(
            f"{trouble.address}: what was asked for is not there ({trouble.said}).\n"
            "Expected every file that the repository lists.\n"
            "Run again, in case it was being changed; else choose another revision."
        )
    return None


def _failed(trouble: _Trouble) -> SmolconvError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    error, kind = trouble.error, type(trouble.error)
    if isinstance(error, OfflineModeIsEnabled):
        return MachineError(
            f"{trouble.address}: the Hub was not asked, because HF_HUB_OFFLINE is set.\n"
            "Expected a network for this step.\nUnset HF_HUB_OFFLINE and run again."
        )
    if isinstance(error, HFValidationError):
        return UsageError(
            f"{trouble.address}: {trouble.said}\n"
            f"Expected {SCHEME}owner/name[/subfolder][@revision].\nCheck the address."
        )
    if trouble.status is not None:
        return MachineError(
            f"{trouble.address}: the Hub at {constants.ENDPOINT} answered HTTP {trouble.status} ({trouble.said}).\n"
            "Expected the answer to a request for this repository.\nWait a little and run again."
        )
    # hf_xet, the transfer of large files, reports a failed network as a bare RuntimeError.
    network = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "hf_xet"}
    if kind.__module__.partition(".")[0] in network or isinstance(error, (json.JSONDecodeError, RuntimeError)):
        return MachineError(
            f"{trouble.address}: the connection to {constants.ENDPOINT} failed ({kind.__name__}: {trouble.said}).\n"
            "Expected to reach the Hub.\n"
            "Check the network, the proxy and HF_ENDPOINT. With HF_HUB_OFFLINE=1, what is in the cache is used."
        )
    if isinstance(error, OSError):
        return MachineError(
            f"{trouble.address}: reading or writing a local file failed ({kind.__name__}: {error}).\n"
            f"Expected room and permission in {constants.HF_HOME}.\nFree some space, or set HF_HOME to another folder."
        )
    return None
