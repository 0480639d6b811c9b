"""Starts the processes of ranks, and watches them until all have ended."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from smolconv.continual_pretraining.launchers.ends import SAVED, RankEnd, end_of, failure_file, log_file
from smolconv.continual_pretraining.launchers.output import Shown, drawing_environment, tell_stopping
from smolconv.continual_pretraining.launchers.signals import Signals, die_with_us
from smolconv.continual_pretraining.run.folder import refuse_trained, remove_start
from smolconv.continual_pretraining.run.ranks import ATTEMPT
from smolconv.errors import Interrupted, MachineError

#: Time that the other ranks get to end after one has failed, before SIGKILL. A rank that waits inside a collective for
#: the dead one never handles the signal.
GRACE_SECONDS = 15.0
KILLED = "the ranks were killed by a second Ctrl-C; checkpoints are unchanged."


def run_ranks(
    words: Sequence[str],
    environments: Mapping[int, Mapping[str, str]],
    run: Path,
    *,
    abandoned: Callable[[bool], bool] = lambda stopping: False,
    told_elsewhere: bool = False,
) -> list[RankEnd]:
    """Run one process per rank until all have ended, and return how; ranks that we killed are left out.

    When one fails, the others get SIGTERM, and SIGKILL after ``GRACE_SECONDS``. ``abandoned`` is called about once a
    second; if it returns True, the ranks are stopped. Its argument is whether they were already told to stop.
    ``told_elsewhere``: another process tells the user that ranks stop for a signal. Must be called in the main
    thread, since it handles signals. Raises ``OutputLocked``, before it writes to the logs, if another start trains.
    """
    refuse_trained(run)
    with Signals().listening() as signals, selectors.DefaultSelector() as selector:
        selector.register(signals.wakeup, selectors.EVENT_READ)
        ranks = [_start(words, environment, number, run) for number, environment in environments.items()]
        for rank in ranks:
            if rank.shown is not None:
                selector.register(rank.shown.reading, selectors.EVENT_READ, rank.shown)
        stopping, deadline = False, float("inf")
        try:
            # The return code is not enough, because a signal can set it, too: look at how each rank ended.
            while running := [rank for rank in ranks if rank.end is None]:
                for key, _ in selector.select(timeout=min(1.0, max(0.0, deadline - time.monotonic()))):
                    if key.data is None:
                        stopping = _obey(signals.take(), running, stopping, told_elsewhere)
                    elif not key.data.pass_on():
                        selector.unregister(key.fd)
                for rank in running:
                    rank.look(run)
                ends = [rank.end for rank in ranks if rank.end and rank.end.exit_code]
                if deadline == float("inf") and (ends or abandoned(stopping)):
                    deadline = time.monotonic() + GRACE_SECONDS
                    # Ranks that have saved are closing, and no longer handle signals.
                    if not all(end.exit_code == SAVED for end in ends) or not ends:
                        _send(running, signal.SIGTERM)
                elif time.monotonic() >= deadline:
                    _kill(running)
        finally:
            _kill(ranks)
            for rank in ranks:
                if rank.shown is not None:
                    rank.shown.close()
            remove_start(run)
    return [rank.end for rank in ranks if rank.end and not rank.killed]


@dataclass
class _Rank:
    """A rank's process."""

    number: int
    process: subprocess.Popen[bytes]
    attempt: str
    log_start: int  #: bytes that earlier starts wrote to its log
    shown: Shown | None  #: rank 0's output; the others write their logs themselves
    killed: bool = False  #: by this process
    end: RankEnd | None = None

    def look(self, run: Path) -> None:
        """Check whether it has ended, and how."""
        if self.process.poll() is None:
            return
        if self.shown is not None:
            while self.shown.pass_on():
                pass
            self.shown.end_line()
        self.end = end_of(self.number, self.process.returncode, run, attempt=self.attempt, log_start=self.log_start)
        if self.end.message:
            with suppress(OSError), log_file(run, self.number).open("a", encoding="utf-8", errors="replace") as log:
                log.write(f"{self.end.message}\n")


def _start(words: Sequence[str], environment: Mapping[str, str], number: int, run: Path) -> _Rank:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    failure_file(run, number).unlink(missing_ok=True)  # of an earlier start
    log = log_file(run, number).open("ab", buffering=0)
    log_start, shown = log.tell(), None
    theirs = log.fileno()
    if number == 0:
        reading, theirs = os.pipe()
        shown = Shown(reading, log)
    try:
        # Ctrl-C in a terminal goes to its whole process group: a new session keeps it from the ranks.
        process = subprocess.Popen(
            words, env=drawing_environment(environment, shown=shown is not None), stdin=subprocess.DEVNULL,
            stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=die_with_us(signal.SIGKILL),  # noqa: PLW1509 - no threads here
        )  # fmt: skip
    except OSError as error:
        raise MachineError(f"rank {number} could not be started: {error}") from error
    finally:
        if shown is None:
            log.close()
        else:
            os.close(theirs)
    return _Rank(number, process, environment.get(ATTEMPT, ""), log_start, shown)


def _obey(received: Sequence[int], running: Sequence[_Rank], stopping: bool, told_elsewhere: bool) -> bool:
    """Pass signals on. Returns whether the ranks were told to stop. Raises ``Interrupted`` on a second Ctrl-C."""
    for signum in received:
        if not stopping:
            stopping = True
            if not told_elsewhere:
                tell_stopping(signum)
            # A worker handles SIGTERM and SIGUSR1; Ctrl-C is translated here.
            _send(running, signal.SIGUSR1 if signum == signal.SIGUSR1 else signal.SIGTERM)
        elif signum == signal.SIGINT:
            _kill(running)
            raise Interrupted(KILLED)
    return stopping


def _send(ranks: Sequence[_Rank], signum: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(signum)


def _kill(ranks: Sequence[_Rank]) -> None:
    """Send SIGKILL to the ranks and the processes that they started."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.killed = True
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
