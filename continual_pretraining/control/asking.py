"""Asking a run that trains to save, or to save and end; and waiting for what comes of it."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.control.queue import cancel_job
from smolconv.continual_pretraining.control.status import ALIVE, RunStatus, read_status
from smolconv.continual_pretraining.run.checkpoints import latest, step_folder
from smolconv.continual_pretraining.run.control import SAVE, STOP, StartRecord
from smolconv.continual_pretraining.run.folder import is_trained
from smolconv.continual_pretraining.watch.lines import EVENTS, event_line, lines_backwards
from smolconv.errors import MachineError, SmolconvError, StoppedBySignal, UsageError
from smolconv.files import MOST_NAME_BYTES, open_file, read_bytes, reading

_EVERY_SECONDS = 0.3
_ORDERLY = (0, StoppedBySignal.exit_code, 130)
#: Of the end of events.jsonl, where the answer to a request stands.
_MOST_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a request."""

    run: Path
    asked: str  #: stop or save
    result: str  #: asked, saved, stopped, finished, cancelled
    message: str
    checkpoint: Path | None = None
    exit_code: int | None = None  #: of the run, where it has ended

    def to_json(self) -> dict[str, Any]:
        """As docs/cli.md has it."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {
            "run": str(self.run), "asked": self.asked, "result": self.result, "message": self.message,
            "checkpoint": checkpoint, "exit_code": self.exit_code,
        }  # fmt: skip


def stop_run(run: Path, *, wait: bool, timeout: float, say: Callable[[str], None]) -> Outcome:
    """Have the run save after the step that it is at, and end; take a job that waits out of the queue.

    Raises ``UsageError`` when nothing trains there; ``MachineError`` when the run does not end within ``timeout``
    seconds, or ends otherwise.
    """
    status = read_status(run)
    if status.state in ("pending", "submitted") and status.job is not None:
        cancel_job(status.job)
        return Outcome(
            run=run, asked="stop", result="cancelled", message=f"job {status.job} was taken out of the queue",
            checkpoint=status.checkpoint,
        )  # fmt: skip
    request = _Request(run, status, STOP)
    if not wait:
        return Outcome(run=run, asked="stop", result="asked", message="it saves after its step, and ends")
    say(f"{run} was asked to stop; it saves after the step that it is at. Ctrl-C ends only this wait.")
    ended = request.wait(request.ended, timeout)
    return request.told(ended, "stop")


def save_run(run: Path, *, wait: bool, timeout: float, say: Callable[[str], None]) -> Outcome:
    """Have the run save after the step that it is at, and train on.

    Raises as ``stop_run`` does, and ``MachineError`` when the save fails.
    """
    status = read_status(run)
    if status.state == "exporting":
        return Outcome(
            run=run, asked="save", result="saved", message="all steps are saved; it exports now",
            checkpoint=status.checkpoint,
        )  # fmt: skip
    request = _Request(run, status, f"{SAVE}{secrets.token_hex(6)}")
    if not wait:
        return Outcome(run=run, asked="save", result="asked", message="it saves after its step, and trains on")
    say(f"{run} was asked to save after the step that it is at. Ctrl-C ends only this wait.")
    try:
        found = request.wait(lambda: request.saved() or request.ended(), timeout)
    finally:
        request.withdraw()
    if isinstance(found, StartRecord):
        return request.told(found, "save")
    step, failure = found
    if failure:
        raise MachineError(
            f"{run} could not save step {step}: {failure}\nIt trains on, and tries again at its next save."
        )
    folder = step_folder(run, step)
    return Outcome(run=run, asked="save", result="saved", message=f"step {step:,} is saved", checkpoint=folder)


class _Request:
    """A request from its file's creation on."""

    def __init__(self, run: Path, status: RunStatus, name: str) -> None:
        self.run, self.record = run, _living(status)
        self.path = self.record.asked(run) / name
        #: Whether a lock that nobody holds says that the run has ended.
        self._sees_lock = is_trained(run) or self.record.host == socket.gethostname()
        self._lost = False
        self._end: StartRecord | None = None
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            pass  # somebody else has asked for the same
        except OSError as error:
            raise MachineError(
                f"{self.path} cannot be written: {error.strerror or error}.\nA request is a file in the run's folder, "
                "which you must be able to write to. Send SIGTERM to the launcher, or scancel its job, instead."
            ) from None

    def withdraw(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    def wait(self, ready: Callable[[], Any], timeout: float) -> Any:
        """What ``ready`` gives, once it does. Raises ``MachineError`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (found := ready()) is None:
            if time.monotonic() >= deadline:
                left = "stays" if self.path.name == STOP else "is taken back"
                raise MachineError(
                    f"{self.run} has not done what it was asked within {timeout:g} s; the request {left}.\n"
                    "A step, a save or an evaluation may take longer: `smolconv runs` tells how far it is.\n"
                    "A run that hangs is ended by Ctrl-C twice, scancel, or SIGKILL to its launcher."
                )
            time.sleep(_EVERY_SECONDS)
        return found

    def ended(self) -> StartRecord | None:
        """How the start ended, once it has. Raises ``MachineError`` when it died."""
        held = is_trained(self.run)  # first the lock: who ends writes that down before it lets the lock go
        now = StartRecord.read(self.run)
        if now is None or now.attempt != self.record.attempt:
            if self._end is not None:
                return self._end
            raise MachineError(
                f"{self.run} has been started anew meanwhile, and how the start before ended is not known.\n"
                "Repeat the command to ask the new one."
            )
        if now.ended is not None:
            self._end = now
            return None if held else now  # the same command, which may follow at once, needs the lock
        if held or not self._sees_lock:
            self._lost = False
            return None
        if self._lost:
            raise MachineError(
                f"{self.run} died before it could do what it was asked (it held the lock, and ended without a word).\n"
                f"Its logs: {self.run / 'logs'}. The checkpoints that were there are whole; the same command resumes."
            )
        self._lost = True  # once more, for file systems on which a file is seen later than a lock
        return None

    def saved(self) -> tuple[int, str] | None:
        """The step that was saved for the request, and why it could not be; None until either is known."""
        with suppress(SmolconvError, ValueError):
            step = int(read_bytes(self.path, MOST_NAME_BYTES, noted=False) or b"-1")
            path = self.run / EVENTS
            if step < 0:
                return None
            with reading(path), open(open_file(path, noted=False), "rb") as file:
                for _, line in lines_backwards(file.fileno(), most_bytes=_MOST_TAIL_BYTES):
                    event = event_line(line)
                    if event.step < step:
                        break
                    if event.step == step and event.kind in ("saved", "save_failed"):
                        return step, "" if event.kind == "saved" else event.text
        return None

    def told(self, ended: StartRecord, asked: str) -> Outcome:
        """What an end means for who asked. Raises ``MachineError`` for one that is no orderly one."""
        if ended.exit_code not in _ORDERLY or (asked == "save" and ended.exit_code == 130):
            why = ended.message.partition("\n")[0] or "it left no reason"
            raise MachineError(
                f"{self.run} ended before it did what it was asked, with exit code {ended.exit_code}: {why}\n"
                f"Its logs: {self.run / 'logs'}. `smolconv continue-train` continues from its last checkpoint."
            )
        done = ended.exit_code == 0
        message = "all steps are done" if done else ended.message.partition(": ")[2] or ended.message
        return Outcome(
            run=self.run, asked=asked, result="finished" if done else "stopped", message=message.partition("\n")[0],
            checkpoint=latest(self.run), exit_code=ended.exit_code,
        )  # fmt: skip


def _living(status: RunStatus) -> StartRecord:
    """The start that a request is for. Raises ``UsageError`` where none trains."""
    if status.state not in ALIVE and status.certain:
        raise UsageError(
            f"nothing trains in {status.run}: the run is {status.state}{status.note and f' ({status.note})'}.\n"
            "`smolconv runs` lists those that train."
        )
    if status.record is None or status.record.ended is not None:
        raise UsageError(
            f"{status.run} is at the very beginning of a start, or trains by an early version: it takes no requests.\n"
            "Repeat the command in a moment, or send SIGTERM to the launcher."
        )
    return status.record
