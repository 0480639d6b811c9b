"""How ranks ended: one rank's end, the file it writes for its launcher, and the run's exit code from all of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from smolconv.continual_pretraining.launchers.output import tell
from smolconv.continual_pretraining.launchers.signals import STOPS
from smolconv.continual_pretraining.run.heartbeat import LostRank
from smolconv.errors import Interrupted, MachineError, SmolconvError, StoppedBySignal
from smolconv.layouts.documents import is_count, is_number
from smolconv.parsing import read_json
from smolconv.storage.atomic import appearing_whole

SAVED = StoppedBySignal.exit_code  #: exit code of a rank that saved after a signal
#: File in an attempt's folder of ends: a rank has failed. All ranks check this one file, however many there are.
FAILED = "failed"
LOST = "lost"  #: file next to it: the first rank to fail did so because it lost another
_KNOWN_CODES = frozenset({2, 3, 4, 5, 6, 70, 130})
INTERRUPTED = "Interrupted: stopped by a signal during its start. Nothing was trained; checkpoints are unchanged."
_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How and when a rank ended. The earliest failure is taken for the cause of the others."""

    rank: int
    exit_code: int
    seconds: float  #: since the epoch
    message: str = ""  #: "ErrorClass: what happened"; empty for 0
    last_lines: tuple[str, ...] = ()  #: of the rank's log, if there is a message

    def __post_init__(self) -> None:
        texts = (self.message, *self.last_lines)
        if not (is_count(self.rank) and is_count(self.exit_code) and is_number(self.seconds)) or self.exit_code > 255:
            raise ValueError(f"not a valid end of a rank: {self!r:.200}")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"rank {self.rank}: its message or last lines are not text")


def end_of(rank: int, code: int, run: Path, *, attempt: str, log_start: int) -> RankEnd:
    """How a rank ended, by its process's return ``code`` and its failure file, if it wrote one.

    ``log_start``: bytes that earlier starts wrote to its log.
    """
    now = time.time()
    if code == 0:
        return RankEnd(rank=rank, exit_code=code, seconds=now)
    path = failure_file(run, rank)
    try:
        failure = read_json(path)
        if failure["attempt"] != attempt or not is_count(failure["exit_code"]):
            raise ValueError("another start's")
        code, now = min(failure["exit_code"], 255), path.stat().st_mtime
        text = f"{failure['error']}: {failure['message']}"
    except (SmolconvError, OSError, ValueError, KeyError):  # it wrote none
        # The sender does not matter: Slurm signals every process of a task, the supervisor perhaps after the rank.
        if code == SAVED:
            text = ""
        elif code < 0 and -code in STOPS:
            text, code = INTERRUPTED, Interrupted.exit_code
        elif code < 0:
            text = f"MachineError: killed by {_signal_name(-code)}."
            text += " Often the machine ran out of memory: check `dmesg`." if -code == signal.SIGKILL else ""
            # Its peers' failure files are stamped by a clock that lags up to 10 ms, and its own death was noticed late.
            code, now = MachineError.exit_code, now - 0.1
        else:
            text = f"ended with exit code {code}."
            code = code if code in _KNOWN_CODES else SmolconvError.exit_code
    lines = tuple(_last_lines(log_file(run, rank), log_start))
    return RankEnd(rank=rank, exit_code=code, seconds=now, message=text, last_lines=lines)


def report(ends: Sequence[RankEnd], run: Path, world_size: int, *, shown: bool = False) -> int:
    """Return the run's exit code, and report on stderr if it is not 0. Only here is the reason of a failure printed.

    ``shown``: the failed rank's supervisor has already printed its last lines.
    """
    end = _first_failure(ends)
    if end is None:
        return 0
    if end.exit_code == SAVED:
        tell(end.message or f"stopped after a save; the same command resumes from there ({run}).")
    elif end.exit_code == Interrupted.exit_code:
        tell(end.message)
    else:
        lost = is_lost(end)  # this rank reports that it lost another
        if not shown and not lost:
            tell_last_lines(end, run)
        log = f"\nIts log: {log_file(run, end.rank)}" if end.last_lines and not lost else ""
        tell(f"{end.message}{log}" if lost else f"rank {end.rank} of {world_size} failed first: {end.message}{log}")
    return end.exit_code


def is_lost(end: RankEnd) -> bool:
    """Whether the rank ended because another rank showed no sign of life."""
    return end.message.startswith(f"{LostRank.__name__}: ")


def tell_last_lines(end: RankEnd, run: Path) -> None:
    """Print the end of a failed rank's log; not for rank 0, whose output was shown."""
    if end.last_lines and end.rank != 0:
        tell("\n".join([f"the last lines of {log_file(run, end.rank)}:", *(f"  {line}" for line in end.last_lines)]))


def report_left(
    run: Path, attempt: str, world_size: int, status: int, *, stopped: bool = False, told: bool = False
) -> int:
    """``report`` from the files that an attempt's ranks wrote; the launcher ended with ``status``.

    ``stopped``: the launcher was told to stop, perhaps before it had started a rank. ``told``: a rank that was stopped
    during its start has reported that itself.
    """
    ends = _read_ends(ends_folder(run, attempt))
    if told and (end := _first_failure(ends)) is not None and end.exit_code == Interrupted.exit_code:
        return end.exit_code
    if status and not any(end.exit_code for end in ends):
        if stopped:
            tell(INTERRUPTED)
            return Interrupted.exit_code
        tell(f"MachineError: the launcher ended with status {status}, and no rank said why. See {run / 'logs'}.")
        return MachineError.exit_code
    return report(ends, run, world_size, shown=True)


def has_failed(folder: Path) -> bool:
    """Whether a rank of the attempt has failed."""
    return os.path.exists(folder / FAILED)


def was_lost(folder: Path) -> bool:
    """Whether the attempt failed because a rank was lost."""
    return os.path.exists(folder / LOST)


def leave_end(folder: Path, end: RankEnd) -> bool:
    """Write how the rank ended, for its launcher. False if another rank of the attempt failed before."""
    path = folder / f"rank-{end.rank:05d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with appearing_whole(path) as part:
            part.write_text(json.dumps(asdict(end)))
        if end.exit_code not in (0, SAVED):
            (folder / FAILED).touch(exist_ok=False)
            if is_lost(end):
                (folder / LOST).touch()
    except FileExistsError:
        return False
    except OSError:
        pass  # the disk itself may have failed; stderr reports it anyway
    return True


def log_file(run: Path, rank: int) -> Path:
    return run / "logs" / f"rank-{rank:05d}.log"


def failure_file(run: Path, rank: int) -> Path:
    return run / "logs" / f"failure-rank-{rank:05d}.json"


def ends_folder(run: Path, attempt: str) -> Path:
    return run / "logs" / "ends" / attempt


def _read_ends(folder: Path) -> list[RankEnd]:
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(SmolconvError, ValueError, TypeError, KeyError):
            document = read_json(path)
            found.append(RankEnd(**{**document, "last_lines": tuple(document["last_lines"])}))
    return found


def _first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """The first failure; without any, a rank that saved and stopped; None when all have finished.

    A rank stopped by a signal during its start counts among failures: its peers then fail because they lost it.
    """
    failed = [end for end in ends if end.exit_code not in (0, SAVED, Interrupted.exit_code)]
    saved = [end for end in ends if end.exit_code == SAVED]  # all or none: they save together
    stopped = [end for end in ends if end.exit_code == Interrupted.exit_code]
    found = [*failed, *stopped] if failed else saved or stopped
    first = min(found, key=lambda end: end.seconds, default=None)
    # If several ranks fail with the same message, take the one whose output is shown.
    alike = [end for end in found if first and (end.exit_code, end.message) == (first.exit_code, first.message)]
    return min(alike, key=lambda end: end.rank, default=None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(log: Path, start: int) -> list[str]:
    """The log's end, without what earlier starts wrote before ``start``."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - (1 << 16)))
        return [line[:1000] for line in file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]]
    return []
