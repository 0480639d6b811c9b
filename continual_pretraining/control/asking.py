"""Asks a training run to save, or to save and stop, and waits for the result."""

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
#: Bytes read from the end of events.jsonl, which holds the answer to a request.
_MOST_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a request."""

    run: Path
    asked: str  #: stop or save
    result: str  #: asked, saved, stopped, finished, cancelled
    message: str
    checkpoint: Path | None = None
    exit_code: int | None = None  #: of the run, if it has ended

    def to_json(self) -> dict[str, Any]:
        """The JSON object described in docs/cli.md."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {
            "run": str(self.run), "asked": self.asked, "result": self.result, "message": self.message,
            "checkpoint": checkpoint, "exit_code": self.exit_code,
        }  # fmt: skip


def stop_run(run: Path, *, wait: bool, timeout: float, say: Callable[[str], None]) -> Outcome:
    """Ask the run to save after its current step and stop. A job that waits in the queue is cancelled.

    Raises ``UsageError`` if nothing trains there; ``MachineError`` if the run does not end within ``timeout`` seconds,
    or ends in another way.
    """
    status = read_status(run)
    if status.state in ("pending", "submitted") and status.job is not None:
        cancel_job(status.job)
        return Outcome(
            run=run, asked="stop", result="cancelled", message=f"job {status.job} was removed from the queue",
            checkpoint=status.checkpoint,
        )  # fmt: skip
    request = _Request(run, status, STOP)
    if not wait:
        return Outcome(run=run, asked="stop", result="asked", message="it will save after its step and stop")
    say(f"{run} was asked to stop; it saves after its current step. Ctrl-C ends only this wait.")
    ended = request.wait(request.ended, timeout)
    return request.told(ended, "stop")


def save_run(run: Path, *, wait: bool, timeout: float, say: Callable[[str], None]) -> Outcome:
    """Ask the run to save after its current step and continue training.

    Raises as ``stop_run``, and ``MachineError`` if the save fails.
    """
    status = read_status(run)
    if status.state == "exporting":
        return Outcome(
            run=run, asked="save", result="saved", message="all steps are saved; it exports now",
            checkpoint=status.checkpoint,
        )  # fmt: skip
    request = _Request(run, status, f"{SAVE}{secrets.token_hex(6)}")
    if not wait:
        return Outcome(run=run, asked="save", result="asked", message="it will save after its step and continue")
    say(f"{run} was asked to save after its current step. Ctrl-C ends only this wait.")
    try:
        found = request.wait(lambda: request.saved() or request.ended(), timeout)
    finally:
        request.withdraw()
    if isinstance(found, StartRecord):
        return request.told(found, "save")
    step, failure = found
    if failure:
        raise MachineError(
            f"{run} could not save step {step}: {failure}\nIt continues training, and tries again at its next save."
        )
    folder = step_folder(run, step)
    return Outcome(run=run, asked="save", result="saved", message=f"step {step:,} is saved", checkpoint=folder)


class _Request:
    """A pending request; its file exists."""

    def __init__(self, run: Path, status: RunStatus, name: str) -> None:
        self.run, self.record = run, _living(status)
        self.path = self.record.asked(run) / name
        #: Whether a free lock means that the run has ended.
        self._sees_lock = is_trained(run) or self.record.host == socket.gethostname()
        self._lost = False
        self._end: StartRecord | None = None
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            pass  # there is already the same request
        except OSError as error:
            raise MachineError(
                f"{self.path} cannot be written: {error.strerror or error}.\nA request is a file in the run's folder, "
                "which you must be able to write to. Send SIGTERM to the launcher, or scancel its job, instead."
            ) from None

    def withdraw(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    def wait(self, ready: Callable[[], Any], timeout: float) -> Any:
        """Wait for a result of ``ready``. Raises ``MachineError`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (found := ready()) is None:
            if time.monotonic() >= deadline:
                left = "stays" if self.path.name == STOP else "is withdrawn"
                raise MachineError(
                    f"{self.run} did not respond within {timeout:g} s; the request {left}.\n"
                    "A step, a save or an evaluation may take longer: `smolconv runs` shows the run's progress.\n"
                    "To end a run that hangs: Ctrl-C twice, scancel, or SIGKILL to its launcher."
                )
            time.sleep(_EVERY_SECONDS)
        return found

    def ended(self) -> StartRecord | None:
        """How the start ended; None while it runs. Raises ``MachineError`` if it died."""
        held = is_trained(self.run)  # the lock first: an ending start writes its record before it releases the lock
        now = StartRecord.read(self.run)
        if now is None or now.attempt != self.record.attempt:
            if self._end is not None:
                return self._end
            raise MachineError(
                f"{self.run} was started again meanwhile, so how the earlier start ended is not known.\n"
                "Repeat the command to ask the new one."
            )
        if now.ended is not None:
            self._end = now
            return None if held else now  # wait for the lock, which a command that follows at once needs
        if held or not self._sees_lock:
            self._lost = False
            return None
        if self._lost:
            raise MachineError(
                f"{self.run} died before it could respond (its lock was released without a record of its end).\n"
                f"Its logs: {self.run / 'logs'}. Its checkpoints are intact; the same command resumes."
            )
        self._lost = True  # check once more, because some file systems show a file later than a lock
        return None

    def saved(self) -> tuple[int, str] | None:
        """The step saved for the request, and the reason if the save failed; None until then."""
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
        """The outcome for the asker. Raises ``MachineError`` unless the run ended in order."""
        if ended.exit_code not in _ORDERLY or (asked == "save" and ended.exit_code == 130):
            why = ended.message.partition("\n")[0] or "it left no reason"
            raise MachineError(
                f"{self.run} ended before it responded, with exit code {ended.exit_code}: {why}\n"
                f"Its logs: {self.run / 'logs'}. `smolconv continue-train` continues from its last checkpoint."
            )
        done = ended.exit_code == 0
        message = "all steps are done" if done else ended.message.partition(": ")[2] or ended.message
        return Outcome(
            run=self.run, asked=asked, result="finished" if done else "stopped", message=message.partition("\n")[0],
            checkpoint=latest(self.run), exit_code=ended.exit_code,
        )  # fmt: skip


def _living(status: RunStatus) -> StartRecord:
    """The start to send a request to. Raises ``UsageError`` if none trains."""
    if status.state not in ALIVE and status.certain:
        raise UsageError(
            f"nothing trains in {status.run}: the run is {status.state}{status.note and f' ({status.note})'}.\n"
            "`smolconv runs` lists the runs that train."
        )
    if status.record is None or status.record.ended is not None:
        raise UsageError(
            f"{status.run} has only just started, or trains with an early version: it takes no requests.\n"
            "Repeat the command in a moment, or send SIGTERM to the launcher."
        )
    return status.record
