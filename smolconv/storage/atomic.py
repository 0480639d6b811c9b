"""An output folder that appears under its final name only when it is whole, and replaces nothing but what it may.

Work happens in ``DST.partial`` under an exclusive lock, with a journal of the files that are finished and on disk. A
kill, an error or Ctrl-C leaves the partial folder, which ``--resume`` continues when the plan is the same one.
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
#: Lies in a folder that is being published without rename; our readers refuse such a folder.
INCOMPLETE = "smolconv_incomplete"
_MANIFEST = "smolconv_manifest.json"
#: What tells other programs that a folder is a checkpoint: published last where a folder cannot be renamed.
_ENTRY_POINTS = ("config.json", "model_config.json", "latest", "latest.txt", "latest_universal")
_NO_RENAME = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.EINVAL)


#: What would be lost with a folder or file, in words that go on "...: it "; None when nothing of anybody else's would.
Loses = Callable[[Path], str | None]


class OutputFolder:
    """``DST`` while it is being made. Use as a context manager; ``publish`` ends it well.

    ``overwrite`` replaces a target of which ``loses`` says that nothing is lost with it, and no other.
    """

    def __init__(self, target: Path, plan_digest: str, *, resume: bool, overwrite: bool, loses: Loses) -> None:
        here = Path.cwd()
        if target.name == ".." or Path(os.path.realpath(target)) in (here, *here.parents):
            raise UsageError(
                f"{target} is the folder that this command runs in, or one around it, which is not replaced.\n"
                "Choose another target, or run from another folder."
            )
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.plan_digest, self.resume, self.overwrite, self.loses = plan_digest, resume, overwrite, loses
        self.done: dict[str, Sequence[WrittenTensor]] = {}
        self.published = False
        self._approved: tuple[int, int] | None = None  #: the very thing at the target that may be replaced
        self._mutex = threading.Lock()
        self._lock: int | None = None
        self._journal: int | None = None

    def __enter__(self) -> OutputFolder:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists() and not self._ours():
            raise UsageError(
                f"{self.partial} is there and was not made by smolconv. Move it away or choose another target."
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
            # Checked under the lock: another process may have published the target a moment ago.
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
        """What a signal left, and how to go on."""
        if self.published:
            return f"stopped by {signal}.\n{self.target} is finished.\nNothing is left to do."
        if kept:
            return (
                f"stopped by {signal}; {counted(len(self.done), 'whole file')} kept.\nThey lie in {self.partial}.\n"
                "Repeat the command with --resume to go on, or without it to begin again."
            )
        return f"stopped by {signal} before anything was written.\n{self.target} is as it was.\nRepeat the command."

    def _ours(self) -> bool:
        if not self.partial.is_dir():
            return False
        names = {entry.name for entry in os.scandir(self.partial)}
        return not names or bool(names & {JOURNAL, LOCK})

    def _refuse_stale_lock(self) -> None:
        """The lock file may have gone between opening and locking it, with the folder that it lay in."""
        assert self._lock is not None
        path = self.partial / LOCK
        if not path.exists() or path.stat().st_ino != os.fstat(self._lock).st_ino:
            raise OutputLocked(f"another process wrote {self.target} at this moment. Look at its result, or try again.")

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
        """Take over what is done; False when the kill came before the journal's first line was whole.

        Raises ``UsageError`` when another plan began it.
        """
        records, whole_bytes = _whole_records(journal)
        if not records:
            return False
        if records[0].get("plan_digest") != self.plan_digest:
            raise UsageError(
                f"{self.partial} was begun by another plan (other source, options or version) and cannot be resumed.\n"
                "Repeat the first command's options, or run without --resume to start again."
            )
        # A torn last line would swallow the next record.
        os.truncate(journal, whole_bytes)
        for record in records[1:]:
            path = self.partial / record["path"]
            if path.is_file() and path.stat().st_size == record["size"]:
                self.done[record["path"]] = [WrittenTensor(**tensor) for tensor in record["tensors"]]
        return True

    def add(self, path: str, tensors: Sequence[WrittenTensor]) -> None:
        """Record that a file is whole and on disk. Thread-safe."""
        with self._mutex:
            size = (self.partial / path).stat().st_size
            self._append({"path": path, "size": size, "tensors": [asdict(tensor) for tensor in tensors]})
            self.done[path] = list(tensors)

    def _append(self, record: object) -> None:
        assert self._journal is not None
        os.write(self._journal, (json.dumps(record) + "\n").encode())

    def write(self, path: str, data: bytes) -> None:
        """A small file that is known only at the end, such as the manifest."""
        target = self.partial / path
        if not target.parent.is_dir():  # a sidecar that holds nothing else
            target.parent.mkdir(parents=True)
        write_synced(target, data)

    def publish(self) -> None:
        """Give the folder its final name.

        Raises ``UsageError`` when something is there by now that may not be replaced; the partial folder stays whole.
        """
        found = _identity(self.target)
        if found is not None and found != self._approved:
            raise self._occupied(f"{self.target} appeared while the output was being written, and stays as it is.")
        try:
            refuse_existing(self.target, self.overwrite, self.loses)
        except UsageError as error:
            raise self._occupied(str(error).splitlines()[0]) from None
        self._publish(self.target)
        self.published = True

    def publish_failed(self) -> Path:
        """Give the folder the name of output that did not verify: ``DST.failed``, or with a number."""
        failed = self._ours_or_free(self.target.with_name(self.target.name + ".failed"))
        self._publish(failed)
        return failed

    def _occupied(self, what: str) -> UsageError:
        return UsageError(
            f"{what}\nThe output is whole in {self.partial}.\n"
            f"Move {self.target} away, then repeat the command with --resume, which only gives it its name."
        )

    def _ours_or_free(self, path: Path) -> Path:
        """The path, or one with a number after it, where nothing is but output of ours or what a kill left of it."""
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
            os.rename(self.partial, target)  # fails where another folder with anything in it has appeared
        except BaseException as error:  # a signal, too, must not leave the old folder aside
            if not _is_there(target) and _is_there(replaced):
                os.rename(replaced, target)
            if isinstance(error, OSError) and error.errno in _NO_RENAME:
                _publish_by_copy(self.partial, target)
            else:
                if self.partial.is_dir():
                    journal.write_bytes(records)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise self._occupied(f"{target} appeared at this moment, and stays as it is.") from None
                raise
        else:
            # Held until here: a second process that opened it before must not take the folder for its own.
            os.unlink(target / LOCK)
        sync_folder(target.parent)
        _discard(replaced)

    def _close(self) -> None:
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None


def _publish_by_copy(partial: Path, target: Path) -> None:
    """For file systems that cannot rename folders: entry points last, and a marker until all is there."""
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
    """How many files of this very plan an interrupted attempt has finished, which ``resume`` would go on from."""
    try:
        whole = target.absolute()
        records, _ = _whole_records(whole.with_name(whole.name + ".partial") / JOURNAL)
    except OSError:
        return 0
    return len(records) - 1 if records and records[0].get("plan_digest") == plan_digest else 0


def _whole_records(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's records, and how many bytes they take: a kill may have come in the middle of the last line."""
    records, whole_bytes = list[dict[str, Any]](), 0
    for line in journal.read_bytes().splitlines(keepends=True):
        record = _record(line)
        if record is None:
            break  # what it spoke of is done again
        records.append(record)
        whole_bytes += len(line)
    return records, whole_bytes


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None when it is not whole."""
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
    """Delete what may be deleted. A kill in the middle leaves a folder that says so, or an empty one."""
    if path.is_dir() and not path.is_symlink():
        _mark(path, _below(path), "deleting")
        _empty(path, keep=INCOMPLETE)
    _remove(path)


def _mark(folder: Path, names: Sequence[str], doing: str) -> None:
    """Say that a folder is not whole, and which of the things in it may be deleted."""
    said = f"smolconv was interrupted while {doing} this folder; it is not whole. These may be deleted:"
    (folder / INCOMPLETE).write_text("\n".join([said, *names, ""]), "utf-8", "surrogateescape")


def _below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def _is_marked(path: Path) -> bool:
    """Whether an interrupted publication or deletion left a folder, and nothing was put into it since."""
    try:
        listed = (path / INCOMPLETE).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    return listed[:1] != [] and listed[0].startswith("smolconv was interrupted") and set(_below(path)) <= {
        INCOMPLETE, *listed[1:]
    }  # fmt: skip


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name; None when nothing is there."""
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
    """Raise ``UsageError`` when something would be overwritten that may not be.

    What an interrupted publication left may always be; with ``overwrite`` also that of which ``loses`` knows nothing.
    """
    if not _is_there(target) or _is_marked(target):
        return
    if not overwrite:
        raise UsageError(f"{target} is there already. Choose another target, or pass --overwrite to replace it.")
    if (lost := loses(target)) is not None:
        raise UsageError(
            f"{target} is there already, and --overwrite would lose more than a checkpoint: it {lost}.\n"
            "--overwrite replaces checkpoints and output of smolconv, nothing else.\n"
            f"Choose another target, or move it away yourself: mv {target} {target}.old"
        )


def refuse_nested(source: Path, target: Path) -> None:
    """Raise ``UsageError`` when one folder lies in the other."""
    inner, outer = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if inner == outer or outer in inner.parents or inner in outer.parents:
        found = f"{target} is the source" if inner == outer else f"{target} and {source} lie in each other"
        raise UsageError(f"{found}.\nChoose a target outside the source.")


def require_space(target: Path, needed_bytes: int) -> None:
    """Raise ``MachineError`` when the target's file system has less room than the plan needs."""
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise MachineError(
            f"{parent} has {free / 1e9:.2f} GB free; this conversion needs {needed_bytes / 1e9:.2f} GB.\n"
            "Free some space, or choose a target on another disk. Nothing was written."
        )


@contextlib.contextmanager
def appearing_whole(target: Path, *, synced: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the name ``target`` when the block ends well and vanishes otherwise.

    ``synced``: what is written there is on disk before it gets its name. Any number of processes may do so at once.
    """
    part = target.with_name(f".{os.urandom(16).hex()}.partial")
    try:
        yield part
        if synced:
            sync_file(part)
        part.replace(target)
    finally:
        # Renaming one hard link onto another of the same file leaves both names.
        part.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and put it on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Put a file's content on disk. Raises ``OSError``, which is then the only news of what could not be written."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on disk. Some file systems cannot, and need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
