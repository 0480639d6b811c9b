"""Signals that a launcher receives, and those that the kernel sends its children when it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from smolconv.errors import SmolconvError

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Signals:
    """Received signals, and a descriptor that becomes readable when one arrives, SIGCHLD included."""

    def __init__(self) -> None:
        self.wakeup, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._received: list[int] = []

    def take(self) -> list[int]:
        """The signals received since the last call. Waits for one unless ``wakeup`` is readable."""
        os.read(self.wakeup, 1 << 10)
        taken = self._received[:]
        del self._received[: len(taken)]
        return taken

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        """Receive signals within the block. Only in the main thread."""

        def note(signum: int, frame: FrameType | None) -> None:
            if signum != signal.SIGCHLD:
                self._received.append(signum)

        before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
        handlers = {signum: signal.signal(signum, note) for signum in {*STOPS, signal.SIGCHLD} - ignored}
        try:
            yield self
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(before)
            os.close(self.wakeup)
            os.close(self._writing)


def die_with_us(signum: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: make the kernel send ``signum`` to the child when this process ends, even by SIGKILL."""
    ours, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signum))
        if os.getppid() != ours:  # the parent ended before the call
            os._exit(1)

    return before_exec


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its ``parent`` ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit(SmolconvError.exit_code)
