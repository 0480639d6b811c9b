"""A checkpoint on the Hub as a local folder: what a conversion needs of it, in the client's own cache.

``huggingface_hub`` does the transfer, the cache and the login, and is imported only when an ``hf://`` address is used;
0.36, 1.x and 2.x are all spoken to through the same calls. Which files are needed, the layouts say.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from smolconv.errors import CorruptFile, MachineError
from smolconv.hub.address import HubSource, is_hub_uri, parse_hub_uri
from smolconv.hub.commits import CachedCommit, ListedFile, open_commit, remember_checked, was_checked
from smolconv.hub.errors import client_errors, require_client
from smolconv.hub.headers import StandIns, headers_root
from smolconv.layouts.registry import needed_files

DOWNLOAD_THREADS = 8


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
    require_client()
    from huggingface_hub import constants

    with client_errors(str(source)):
        if constants.HF_HUB_OFFLINE:
            return _find_in_cache(source, headers_only, step)
        commit = open_commit(source)
        paths = needed_files(commit, source.subfolder, step=step, optimizer=optimizer)
        # Every layout has a small file that names it, so this never downloads tensors.
        snapshot = commit.snapshot(next(path for path in paths if not path.endswith(".safetensors")))
        if headers_only:
            root = headers_root(source.repo, commit.sha)
            _run_on_threads(StandIns(commit, root).place, paths)
        else:
            root = snapshot
            _run_on_threads(commit.download, paths)
    return root / source.subfolder


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
    cached = CachedCommit(source=source, root=snapshot)
    stand_ins = headers_root(source.repo, snapshot.name)
    try:
        needed = needed_files(cached, source.subfolder, step=step)
    except MachineError:
        if not headers_only or not stand_ins.is_dir():
            raise
        cached = CachedCommit(source=source, root=stand_ins)
        needed_files(cached, source.subfolder, step=step)
        return cached.root / source.subfolder
    for path in [] if headers_only else needed:
        _check_cached(snapshot / path, source.at(path))
    return cached.root / source.subfolder


def _check_cached(local: Path, address: str) -> None:
    """Compare a file of the cache with the digest that its blob is named by. Raises ``CorruptFile``."""
    blob = local.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without links does not tell
    digest = f"{'git' if len(blob.name) == 40 else 'sha256'}:{blob.name}"
    listed = ListedFile(size=blob.stat().st_size, digest=digest)
    if not was_checked(local, listed) and not listed.matches(local):
        raise CorruptFile(
            f"{address}: the file in the cache is not the one that was downloaded.\n"
            f"Expected {digest} of {blob}.\n"
            "Unset HF_HUB_OFFLINE and run again with a network, so that it is fetched again."
        )
    remember_checked(local, listed)


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
