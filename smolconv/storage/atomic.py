"""An output folder that appears under its final name only when it is whole.

Work happens in ``DST.partial`` under an exclusive lock, with a journal of the files that are finished and on disk. A
kill, an error or Ctrl-C leaves the partial folder, which ``--resume`` continues when the plan is the same one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from smolconv.errors import MachineError, OutputLocked, UsageError
from smolconv.storage.output import WrittenTensor

JOURNAL = "smolconv_journal.jsonl"
LOCK = "smolconv.lock"
#: Lies in a folder that is being published without rename; our readers refuse such a folder.
INCOMPLETE = "smolconv_incomplete"
#: What tells other programs that a folder is a checkpoint: published last where a folder cannot be renamed.
_ENTRY_POINTS = ("config.json", "model_config.json", "latest", "latest.txt", "latest_universal")
_NO_RENAME = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.EINVAL)


class OutputFolder:
    """``DST`` while it is being made. Use as a context manager; ``publish`` ends it well."""

    def __init__(self, target: Path, plan_digest: str, *, resume: bool, overwrite: bool) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.plan_digest, self.resume, self.overwrite = plan_digest, resume, overwrite
        self.done: dict[str, Sequence[WrittenTensor]] = {}
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
            refuse_existing(self.target, self.overwrite)
            self._open_journal()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _ours(self) -> bool:
        names = {entry.name for entry in os.scandir(self.partial)}
        return not names or bool(names & {JOURNAL, LOCK})

    def _open_journal(self) -> None:
        journal = self.partial / JOURNAL
        if self.resume and journal.exists():
            self._read_journal(journal)
        else:
            for entry in list(os.scandir(self.partial)):
                if entry.name != LOCK:
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        self._journal = os.open(journal, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        if not self.done and os.fstat(self._journal).st_size == 0:
            self._append({"plan_digest": self.plan_digest})

    def _read_journal(self, journal: Path) -> None:
        lines = []
        for line in journal.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the kill came in the middle of this line; what it spoke of is done again
        if not lines or lines[0].get("plan_digest") != self.plan_digest:
            raise UsageError(
                f"{self.partial} was begun by another plan (other source, options or version), so it cannot be resumed.\n"
                "Repeat the first command's options, or run without --resume to start again."
            )
        # A torn last line would swallow the next record.
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for line in lines[1:]:
            path = self.partial / line["path"]
            if path.is_file() and path.stat().st_size == line["size"]:
                self.done[line["path"]] = [WrittenTensor(**tensor) for tensor in line["tensors"]]

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
        with open(self.partial / path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, target: Path | None = None) -> None:
        """Give the folder its final name (or ``target``'s, for output that failed verification)."""
        target = self.target if target is None else target
        for folder, _, _ in os.walk(self.partial):
            sync_folder(Path(folder))
        os.unlink(self.partial / JOURNAL)
        os.unlink(self.partial / LOCK)
        replaced = None
        if target.exists() or target.is_symlink():
            replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
            os.rename(target, replaced)
        try:
            os.rename(self.partial, target)
        except OSError as error:
            if error.errno not in _NO_RENAME:
                raise
            _publish_by_copy(self.partial, target)
        sync_folder(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced) if replaced.is_dir() and not replaced.is_symlink() else os.unlink(replaced)

    def _close(self) -> None:
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None


def _publish_by_copy(partial: Path, target: Path) -> None:
    """For file systems that cannot rename folders: entry points last, and a marker until all is there."""
    target.mkdir()
    (target / INCOMPLETE).write_text("smolconv was interrupted while publishing this folder; it is not whole.\n")
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    files.sort(key=lambda path: path.name in _ENTRY_POINTS or path.name.endswith(".index.json"))
    for path in files:
        copy = target / path.relative_to(partial)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())
    os.unlink(target / INCOMPLETE)
    shutil.rmtree(partial)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise ``UsageError`` when something would be overwritten."""
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise UsageError(f"{target} is there already. Choose another target, or pass --overwrite to replace it.")


def refuse_nested(source: Path, target: Path) -> None:
    """Raise ``UsageError`` when one folder lies in the other."""
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UsageError(f"{target} and {source} lie in each other. Choose a target outside the source.")


def require_space(target: Path, needed_bytes: int) -> None:
    """Raise ``MachineError`` when the target's file system has less room than the plan needs."""
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise MachineError(
            f"{parent} has {free / 1e9:.2f} GB free; this conversion needs {needed_bytes / 1e9:.2f} GB.\n"
            "Free some space, or choose a target on another disk. Nothing was written."
        )


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on disk. Some file systems cannot, and need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
