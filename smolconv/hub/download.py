"""Downloads the files of a Hub checkpoint that its layout needs, or finds them in the Hub's cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from threading import Thread

from smolconv.errors import BadCheckpoint, MachineError, MissingFile, UnknownLayout, some_of
from smolconv.hub.address import HubSource, is_hub_uri, parse_hub_uri, require_known
from smolconv.hub.commit import HubPath, open_commit
from smolconv.hub.digests import check_cached
from smolconv.hub.errors import branches, client_errors
from smolconv.hub.headers import StandIns, headers_root
from smolconv.layouts.huggingface.listing import SIDECAR
from smolconv.layouts.listing import P, files_below
from smolconv.layouts.registry import LAYOUTS, layout_of, signs, source_folder, why_unknown
from smolconv.storage.atomic import JOURNAL

DOWNLOAD_THREADS = 8


def open_source(
    uri: str | Path, *, headers_only: bool = False, optimizer: bool = True, step: int | None = None,
    layout: str | None = None, config: Path | None = None,
) -> Path:  # fmt: skip
    """The local folder of a checkpoint: ``uri`` itself, or a folder with the files that a conversion needs.

    That folder is in the Hub's cache, may hold more files than needed, and must not be written to.

    ``headers_only`` leaves the tensors on the Hub: each safetensors file becomes a sparse file of the real size, with
    the real header and zeros after it, under ``HF_HOME/smolconv-headers/<repo>/<commit>``, next to links to the
    other files. ``.bin`` and ``.pt`` files are downloaded completely: they are zip archives with their directory at
    the end and their tensor names in a pickle, so a header is not enough.

    Without ``optimizer``, Adam's tensors stay on the Hub if they are in separate files. ``step`` chooses a step of a
    run, ``layout`` one of several layouts, and ``config`` supplies a missing config. With ``HF_HUB_OFFLINE`` set, only
    the cache is used.

    Raises ``BadCheckpoint`` if something is not on the Hub, ``MachineError`` for network, login and disk.
    """
    if not is_hub_uri(str(uri)):
        require_known(str(uri))
        return source_folder(_finished(Path(uri)))
    wanted = _Wanted(optimizer=optimizer, step=step, layout=layout, with_config=config is not None)
    source = parse_hub_uri(str(uri))
    with client_errors(str(source)):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return _find_in_cache(source, wanted, headers_only=headers_only)
        commit = open_commit(source)
        folder = source_folder(HubPath(commit=commit, path=source.subfolder))
        needed = wanted.files(folder)
        if needed is None:
            raise _no_checkpoint(folder, commit.tree(""), lambda: branches(source.repo))
        paths = sorted({file.path for file in needed})
        # Every layout has a small file that names it, so this never downloads tensors.
        small = min(paths, key=lambda path: path.endswith(".safetensors"))
        snapshot = commit.download(small).parents[small.count("/")]
        if headers_only:
            root = headers_root(source.repo, commit.sha)
            _run_on_threads(StandIns(commit, root).place, paths)
        else:
            # The client's snapshot_download is not used: its threads delay Ctrl-C, and if the Hub is busy it silently
            # returns what is in the cache.
            root = snapshot
            _run_on_threads(commit.download, paths)
        commit.remember_revision(small)
    return root / folder.path


def _finished(folder: Path) -> Path:
    """The folder. Raises ``BadCheckpoint`` if a conversion did not finish it: its files have holes of zeros."""
    if (folder / JOURNAL).is_file():
        raise BadCheckpoint(
            f"{folder} was left by an interrupted conversion, and is incomplete.\n"
            "Expected a finished checkpoint.\nRepeat that conversion with --resume to finish it."
        )
    return folder


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """The parts of a folder that are needed."""

    optimizer: bool
    step: int | None
    layout: str | None
    with_config: bool  #: a config is supplied, so the folder need not have one

    def files(self, folder: P) -> list[P] | None:
        """The files to read; None if it is no checkpoint. Raises as ``Listing.needed_files`` and ``layout_of``."""
        layout = layout_of(folder, self.layout, with_config=self.with_config) if folder.is_dir() else None
        if layout is None:
            return None
        return layout.listing.needed_files(folder, step=self.step, optimizer=self.optimizer)


def _find_in_cache(source: HubSource, wanted: _Wanted, *, headers_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Without patterns, this only finds the folder. Completeness is checked below, by what a conversion needs.
        snapshot = Path(
            snapshot_download(source.repo, revision=source.revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError as error:
        raise MachineError(
            f"{source} is not in the cache.\n"
            "Expected it there, since HF_HUB_OFFLINE is set.\n"
            "Unset HF_HUB_OFFLINE and run again with a network."
        ) from error

    def needed_in(root: Path) -> tuple[Path, list[Path]]:
        folder = source_folder(root / source.subfolder)
        try:
            needed = wanted.files(folder)
            if needed is None:
                there = (path.relative_to(root).as_posix() for path in files_below(root))
                raise _no_checkpoint(folder, there, list)
            return folder, needed
        except (MissingFile, UnknownLayout) as error:
            # Offline, it is not known whether the repository has it, so this is an error of the machine.
            raise MachineError(
                f"{source}, in the cache: {str(error).rpartition(chr(10))[0] or error}\n"
                "HF_HUB_OFFLINE is set: unset it and run again with a network to download the rest."
            ) from error

    try:
        folder, needed = needed_in(snapshot)
    except MachineError:
        stand_ins = headers_root(source.repo, snapshot.name)
        if not headers_only or not stand_ins.is_dir():
            raise
        return needed_in(stand_ins)[0]
    for path in [] if headers_only else needed:
        check_cached(path, source.inside(path.relative_to(snapshot).as_posix()))
    return folder


def _no_checkpoint(folder: P, repository: Iterable[str], names_of_branches: Callable[[], list[str]]) -> BadCheckpoint:
    """The error for a folder of no layout, by all files of the repository."""
    if (reason := why_unknown(folder)) is not None:
        return reason
    marks = [mark for layout in LAYOUTS for mark in layout.listing.MARKS]
    marked = [path for path in map(PurePosixPath, repository) if any(fnmatchcase(path.name, mark) for mark in marks)]
    candidates = sorted({str(path.parent) for path in marked if SIDECAR not in path.parts} - {"."})
    known = names_of_branches() if not candidates else []
    if candidates:
        remedy = f"Add one of its folders to the address: {some_of(candidates, 8, more=True)}."
    elif len(known) > 1:
        remedy = f"Add one of its branches to the address, after an '@': {some_of(known, 8, more=True)}."
    else:
        remedy = "Check the address: no folder of the repository has these files."
    found = "holds no checkpoint" if folder.is_dir() and any(folder.iterdir()) else "is not a folder with files"
    return MissingFile(f"{folder} {found}.\nExpected {signs(', or ')}.\n{remedy}")


def _run_on_threads(work: Callable[[str], object], paths: Sequence[str]) -> None:
    """Run the work for every path on a few threads, and raise the first failure.

    The threads are daemons, unlike a ThreadPoolExecutor's, so that Ctrl-C does not wait for shards of several GB. The
    client resumes a partial download next time.
    """
    waiting = deque(paths)
    outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        with suppress(IndexError):  # the queue is empty
            while path := waiting.popleft():
                outcomes.put(_failure(work, path))

    for _ in range(min(DOWNLOAD_THREADS, len(paths))):
        Thread(target=run, daemon=True).start()
    try:
        for _ in paths:
            error = outcomes.get()
            if error is not None:
                raise error
    finally:
        waiting.clear()


def _failure(work: Callable[[str], object], path: str) -> BaseException | None:
    try:
        work(path)
    except BaseException as error:
        return error
    return None
