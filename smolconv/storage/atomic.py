"""An output folder that appears under its final name only once it is complete, and replaces only what it may.

It is written to ``DST.partial`` under an exclusive lock, with a journal of the files that are finished and on disk. A
kill, an error or Ctrl-C leaves the partial folder, which ``--resume`` continues if the plan is the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from smolconv.errors import Interrupted, MachineError, OutputLocked, SignalReceived, UsageError, counted
from smolconv.storage.planned import WrittenTensor

JOURNAL = "smolconv_journal.jsonl"
LOCK = "smolconv.lock"
#: Marks a folder that is being published without a rename; smolconv's readers refuse such a folder.
INCOMPLETE = "smolconv_incomplete"
_MANIFEST = "smolconv_manifest.json"
#: Files by which other programs recognise a checkpoint: published last if a folder cannot be renamed.
_ENTRY_POINTS = ("config.json", "model_config.json", "latest", "latest.txt", "latest_universal")
_NO_RENAME = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.EINVAL)


#: What else would be lost with a folder or file; completes a sentence that ends with "it". None: nothing.
Loses = Callable[[Path], str | None]


class OutputFolder:
    """``DST`` while it is being written. Use as a context manager; ``publish`` completes it.

    ``overwrite`` replaces a target only if nothing would be lost according to ``loses``.
    """

    def __init__(self, target: Path, plan_digest: str, *, resume: bool, overwrite: bool, loses: Loses) -> None:
        here = Path.cwd()
        if target.name == ".." or Path(os.path.realpath(target)) in (here, *here.parents):
            raise UsageError(
                f"{target} is the working folder of this command, or contains it, so it cannot be replaced.\n"
                "Choose another target, or run from another folder."
            )
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.plan_digest, self.resume, self.overwrite, self.loses = plan_digest, resume, overwrite, loses
        self.done: dict[str, Sequence[WrittenTensor]] = {}
        self.published = False
        self._approved: tuple[int, int] | None = None  #: identity of the target that may be replaced
        self._mutex = threading.Lock()
        self._lock: int | None = None
        self._journal: int | None = None

    def __enter__(self) -> OutputFolder:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists() and not self._ours():
            raise UsageError(
                f"{self.partial} exists but was not written by smolconv. Move it away or choose another target."
            )
        self.partial.mkdir(exist_ok=True)
        self._lock = os.open(self.partial / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputLocked(
                    f"another process is writing {self.target} (it holds {self.partial / LOCK}).\n"
                    "Wait for it to end, or choose another target."
                ) from None
            raise
        try:
            # Checked under the lock: another process may just have published the target.
            self._refuse_stale_lock()
            refuse_existing(self.target, self.overwrite, self.loses)
            self._approved = _identity(self.target)
            self._open_journal()
        except BaseException:
            self._remove_if_empty()
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._remove_if_empty()
        kept = self.partial.is_dir()
        self._close()
        if isinstance(error, SignalReceived):
            raise Interrupted(self._left(error.args[0], kept)) from None

    def _left(self, signal: str, kept: bool) -> str:
        """What remains after a signal, and how to continue."""
        if self.published:
            return f"stopped by {signal}.\n{self.target} is finished.\nNothing is left to do."
        if kept:
            return (
                f"stopped by {signal}; {counted(len(self.done), 'file')} kept.\nThey are in {self.partial}.\n"
                "Repeat the command with --resume to continue, or without it to start over."
            )
        return f"stopped by {signal} before anything was written.\n{self.target} is unchanged.\nRepeat the command."

    def _ours(self) -> bool:
        if not self.partial.is_dir():
            return False
        names = {entry.name for entry in os.scandir(self.partial)}
        return not names or bool(names & {JOURNAL, LOCK})

    def _refuse_stale_lock(self) -> None:
        """Check that the lock file was not deleted, together with its folder, between opening and locking it."""
        assert self._lock is not None
        path = self.partial / LOCK
        if not path.exists() or path.stat().st_ino != os.fstat(self._lock).st_ino:
            raise OutputLocked(f"another process is just publishing {self.target}. Check its result, or try again.")

    def _remove_if_empty(self) -> None:
        """An attempt that ended before its first byte leaves nothing."""
        with contextlib.suppress(OSError):
            if {entry.name for entry in os.scandir(self.partial)} <= {JOURNAL, LOCK}:
                for name in (JOURNAL, LOCK):
                    (self.partial / name).unlink(missing_ok=True)
                self.partial.rmdir()

    def _open_journal(self) -> None:
        journal = self.partial / JOURNAL
        if not (self.resume and journal.exists() and self._read_journal(journal)):
            _empty(self.partial, keep=LOCK)
        self._journal = os.open(journal, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        if not self.done and os.fstat(self._journal).st_size == 0:
            self._append({"plan_digest": self.plan_digest})

    def _read_journal(self, journal: Path) -> bool:
        """Take over finished files; False if the journal has no complete first line.

        Raises ``UsageError`` if it belongs to another plan.
        """
        records, whole_bytes = _whole_records(journal)
        if not records:
            return False
        if records[0].get("plan_digest") != self.plan_digest:
            raise UsageError(
                f"{self.partial} belongs to another plan (other source, options or version) and cannot be resumed.\n"
                "Repeat the first command's options, or run without --resume to start over."
            )
        # A torn last line would merge with the next record.
        os.truncate(journal, whole_bytes)
        for record in records[1:]:
            path = self.partial / record["path"]
            if path.is_file() and path.stat().st_size == record["size"]:
                self.done[record["path"]] = [WrittenTensor(**tensor) for tensor in record["tensors"]]
        return True

    def add(self, path: str, tensors: Sequence[WrittenTensor]) -> None:
        """Record that a file is finished and on disk. Thread-safe."""
        with self._mutex:
            size = (self.partial / path).stat().st_size
            self._append({"path": path, "size": size, "tensors": [asdict(tensor) for tensor in tensors]})
            self.done[path] = list(tensors)

    def _append(self, record: object) -> None:
        assert self._journal is not None
        os.write(self._journal, (json.dumps(record) + "\n").encode())

    def write(self, path: str, data: bytes) -> None:
        """Write a small file that is only known at the end, such as the manifest."""
        target = self.partial / path
        if not target.parent.is_dir():  # a sidecar without other files
            target.parent.mkdir(parents=True)
        write_synced(target, data)

    def publish(self) -> None:
        """Rename the folder to its final name.

        Raises ``UsageError`` if something now exists there that may not be replaced; the partial folder stays complete.
        """
        found = _identity(self.target)
        if found is not None and found != self._approved:
            raise self._occupied(f"{self.target} appeared while the output was being written, and is kept.")
        try:
            refuse_existing(self.target, self.overwrite, self.loses)
        except UsageError as error:
            raise self._occupied(str(error).splitlines()[0]) from None
        self._publish(self.target)
        self.published = True

    def publish_failed(self) -> Path:
        """Rename a folder that did not verify to ``DST.failed``, or with a number."""
        failed = self._ours_or_free(self.target.with_name(self.target.name + ".failed"))
        self._publish(failed)
        return failed

    def _occupied(self, what: str) -> UsageError:
        return UsageError(
            f"{what}\nThe output is complete in {self.partial}.\n"
            f"Move {self.target} away, then repeat the command with --resume, which only renames the folder."
        )

    def _ours_or_free(self, path: Path) -> Path:
        """The path, or the first one with a number, that is free or holds only smolconv's output or its remains."""
        names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
        return next(name for name in names if not _is_there(name) or self._is_ours(name))

    def _is_ours(self, path: Path) -> bool:
        if not path.is_dir() or path.is_symlink():
            return False
        written = (path / _MANIFEST).is_file() and self.loses(path) is None
        return written or _is_marked(path) or not any(os.scandir(path))

    def _publish(self, target: Path) -> None:
        for folder, _, _ in os.walk(self.partial):
            sync_folder(Path(folder))
        # A kill between the two renames leaves it, and the next publication removes it.
        replaced = self._ours_or_free(target.with_name(target.name + ".smolconv-replaced"))
        journal = self.partial / JOURNAL
        records = journal.read_bytes()
        os.unlink(journal)
        try:
            if _is_there(target):
                _discard(replaced)
                os.rename(target, replaced)
            os.rename(self.partial, target)  # fails if another non-empty folder has appeared
        except BaseException as error:  # a signal, too, must not leave the old folder renamed
            if not _is_there(target) and _is_there(replaced):
                os.rename(replaced, target)
            if isinstance(error, OSError) and error.errno in _NO_RENAME:
                _publish_by_copy(self.partial, target)
            else:
                if self.partial.is_dir():
                    journal.write_bytes(records)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise self._occupied(f"{target} appeared at this moment, and is kept.") from None
                raise
        else:
            # Held until here, so that a second process that opened it earlier does not use the folder.
            os.unlink(target / LOCK)
        sync_folder(target.parent)
        _discard(replaced)

    def _close(self) -> None:
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None


def _publish_by_copy(partial: Path, target: Path) -> None:
    """For file systems that cannot rename folders: entry points last, with a marker until all are there."""
    if not target.is_dir() or target.is_symlink():
        _remove(target)
    target.mkdir(exist_ok=True)
    coming = [str(path.relative_to(partial)) for path in partial.rglob("*")]
    _mark(target, [*_below(target), *coming], "publishing")
    _empty(target, keep=INCOMPLETE)
    files = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.name != LOCK]
    files.sort(key=lambda path: path.name in _ENTRY_POINTS or path.name.endswith(".index.json"))
    for path in files:
        copy = target / path.relative_to(partial)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        sync_file(copy)
    os.unlink(target / INCOMPLETE)
    shutil.rmtree(partial)


def files_kept(target: Path, plan_digest: str) -> int:
    """How many files of the same plan an interrupted attempt has finished, from which ``resume`` would continue."""
    try:
        whole = target.absolute()
        records, _ = _whole_records(whole.with_name(whole.name + ".partial") / JOURNAL)
    except OSError:
        return 0
    return len(records) - 1 if records and records[0].get("plan_digest") == plan_digest else 0


def _whole_records(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's records and their size in bytes: a kill may have cut the last line."""
    records, whole_bytes = list[dict[str, Any]](), 0
    for line in journal.read_bytes().splitlines(keepends=True):
        record = _record(line)
        if record is None:
            break  # the work of a cut line is repeated
        records.append(record)
        whole_bytes += len(line)
    return records, whole_bytes


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None if it is incomplete."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None
    return record if "plan_digest" in record or record.keys() >= {"path", "size", "tensors"} else None


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    """Delete what may be deleted. A kill meanwhile leaves a marked folder, or an empty one."""
    if path.is_dir() and not path.is_symlink():
        _mark(path, _below(path), "deleting")
        _empty(path, keep=INCOMPLETE)
    _remove(path)


def _mark(folder: Path, names: Sequence[str], doing: str) -> None:
    """Mark a folder as incomplete, and list the entries in it that may be deleted."""
    said = f"smolconv was interrupted while {doing} this folder; it is not whole. These may be deleted:"
    (folder / INCOMPLETE).write_text("\n".join([said, *names, ""]), "utf-8", "surrogateescape")


def _below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def _is_marked(path: Path) -> bool:
    """Whether the folder remains from an interrupted publication or deletion, without new entries."""
    try:
        listed = (path / INCOMPLETE).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    return listed[:1] != [] and listed[0].startswith("smolconv was interrupted") and set(_below(path)) <= {
        INCOMPLETE, *listed[1:]
    }  # fmt: skip


def _identity(path: Path) -> tuple[int, int] | None:
    """The identity of a folder, apart from its name; None if there is none."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _empty(folder: Path, *, keep: str) -> None:
    for entry in list(os.scandir(folder)):
        if entry.name != keep:
            _remove(Path(entry.path))


def refuse_existing(target: Path, overwrite: bool, loses: Loses) -> None:
    """Raise ``UsageError`` if something would be overwritten that must be kept.

    Remains of an interrupted publication may always be replaced; with ``overwrite`` also a target without losses.
    """
    if not _is_there(target) or _is_marked(target):
        return
    if not overwrite:
        raise UsageError(f"{target} already exists. Choose another target, or pass --overwrite to replace it.")
    if (lost := loses(target)) is not None:
        raise UsageError(
            f"{target} already exists, and --overwrite would lose more than a checkpoint: it {lost}.\n"
            "--overwrite replaces only checkpoints and output of smolconv.\n"
            f"Choose another target, or move it away yourself: mv {target} {target}.old"
        )


def refuse_nested(source: Path, target: Path) -> None:
    """Raise ``UsageError`` if one folder contains the other."""
    inner, outer = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if inner == outer or outer in inner.parents or inner in outer.parents:
        found = f"{target} is the source" if inner == outer else f"{target} and {source} contain each other"
        raise UsageError(f"{found}.\nChoose a target outside the source.")


def require_space(target: Path, needed_bytes: int) -> None:
    """Raise ``MachineError`` if the target's file system has less space than the plan needs."""
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise MachineError(
            f"{parent} has {free / 1e9:.2f} GB free; this conversion needs {needed_bytes / 1e9:.2f} GB.\n"
            "Free some space, or choose a target on another disk. Nothing was written."
        )


@contextlib.contextmanager
def appearing_whole(target: Path, *, synced: bool = False) -> Iterator[Path]:
    """A temporary path that is renamed to ``target`` if the block succeeds, and deleted otherwise.

    ``synced``: sync the content to disk before the rename. Any number of processes may do so at once.
    """
    part = target.with_name(f".{os.urandom(16).hex()}.partial")
    try:
        yield part
        if synced:
            sync_file(part)
        part.replace(target)
    finally:
        # Renaming a hard link onto another one of the same file keeps both names.
        part.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and sync it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Sync a file's content to disk. Raises ``OSError``, which is the only report of a failed write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk. Some file systems cannot do that, and do not need it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
