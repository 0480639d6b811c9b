"""How ranks ended: each by itself, what each leaves for its launcher, and what that makes of the run."""

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

SAVED = StoppedBySignal.exit_code  #: a rank's after a signal and a good save
#: In an attempt's folder of ends: a rank has failed. One file for all to look at, however many ranks there are.
FAILED = "failed"
LOST = "lost"  #: beside it: the first one that failed did so for want of another
_KNOWN_CODES = frozenset({2, 3, 4, 5, 6, 70, 130})
INTERRUPTED = "Interrupted: stopped by a signal in its start. Nothing was trained; checkpoints are as they were."
_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How a rank ended, and when: the earliest failure is the cause of the others."""

    rank: int
    exit_code: int
    seconds: float  #: since the epoch
    message: str = ""  #: "ErrorClass: what happened"; empty for 0
    last_lines: tuple[str, ...] = ()  #: of the rank's log, with a message

    def __post_init__(self) -> None:
        texts = (self.message, *self.last_lines)
        if not (is_count(self.rank) and is_count(self.exit_code) and is_number(self.seconds)) or self.exit_code > 255:
            raise ValueError(f"no rank ended so: {self!r:.200}")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"rank {self.rank} said what is no text")


def end_of(rank: int, code: int, run: Path, *, attempt: str, log_start: int) -> RankEnd:
    """How a rank ended, from its process's ``code`` and the failure file that it may have left.

    ``log_start``: bytes of earlier starts in its log.
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
    except (SmolconvError, OSError, ValueError, KeyError):  # it had no time to write one
        # Whoever sent it: Slurm signals every process of a task, ours perhaps after the rank.
        if code == SAVED:
            text = ""
        elif code < 0 and -code in STOPS:
            text, code = INTERRUPTED, Interrupted.exit_code
        elif code < 0:
            text = f"MachineError: killed by {_signal_name(-code)}."
            text += " Often that is for want of memory: `dmesg` says so." if -code == signal.SIGKILL else ""
            # Its peers' failure files are stamped by a clock that lags by up to 10 ms, and its own death was seen late.
            code, now = MachineError.exit_code, now - 0.1
        else:
            text = f"ended with exit code {code}."
            code = code if code in _KNOWN_CODES else SmolconvError.exit_code
    lines = tuple(_last_lines(log_file(run, rank), log_start))
    return RankEnd(rank=rank, exit_code=code, seconds=now, message=text, last_lines=lines)


def report(ends: Sequence[RankEnd], run: Path, world_size: int, *, shown: bool = False) -> int:
    """Say on stderr how the run ended, when not well, and return its exit code. Only here it is said why a rank failed.

    ``shown``: the failing rank's last lines have been shown by the process beside it.
    """
    end = _first_failure(ends)
    if end is None:
        return 0
    if end.exit_code == SAVED:
        tell(end.message or f"stopped after a save; the same command resumes from there ({run}).")
    elif end.exit_code == Interrupted.exit_code:
        tell(end.message)
    else:
        lost = is_lost(end)  # another than the rank that says so
        if not shown and not lost:
            tell_last_lines(end, run)
        log = f"\nIts log: {log_file(run, end.rank)}" if end.last_lines and not lost else ""
        tell(f"{end.message}{log}" if lost else f"rank {end.rank} of {world_size} failed first: {end.message}{log}")
    return end.exit_code


def is_lost(end: RankEnd) -> bool:
    """Whether it ended for want of another rank, of which there is no sign of life."""
    return end.message.startswith(f"{LostRank.__name__}: ")


def tell_last_lines(end: RankEnd, run: Path) -> None:
    """Show the end of a failed rank's log, but for rank 0's, which was passed on."""
    if end.last_lines and end.rank != 0:
        tell("\n".join([f"the last lines of {log_file(run, end.rank)}:", *(f"  {line}" for line in end.last_lines)]))


def report_left(
    run: Path, attempt: str, world_size: int, status: int, *, stopped: bool = False, told: bool = False
) -> int:
    """``report`` by what the ranks of an attempt left, whose launcher ended with ``status``.

    ``stopped``: it was told to stop, perhaps before it had started a rank. ``told``: a rank that was stopped in its
    start has said so itself.
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
    """Whether what the attempt failed of is a rank that was lost."""
    return os.path.exists(folder / LOST)


def leave_end(folder: Path, end: RankEnd) -> bool:
    """Write down how the rank ended, for its launcher; False when another of its attempt has failed before it."""
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
        pass  # the disk may be what failed; it is said on stderr all the same
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
    """The failure that came first; without any, a rank that saved and stopped; None when all are done.

    A start that was stopped by a signal comes first where it came first: its peers then fail for want of it.
    """
    failed = [end for end in ends if end.exit_code not in (0, SAVED, Interrupted.exit_code)]
    saved = [end for end in ends if end.exit_code == SAVED]  # then all have: they save together
    stopped = [end for end in ends if end.exit_code == Interrupted.exit_code]
    found = [*failed, *stopped] if failed else saved or stopped
    first = min(found, key=lambda end: end.seconds, default=None)
    # Of ranks that all refuse the same, the one whose output is shown.
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
