"""A launcher's output on stderr, and the ranks' logs.

Ranks write to pipes and files. If stderr is a terminal, rank 0's environment tells it that it may redraw lines and use
colours. Its log keeps what stays visible: no colours and no overwritten text.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO

from smolconv.continual_pretraining.watch.metrics import LIVE

#: Variables that make libraries print colours without a terminal.
_COLOURED = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", LIVE)
#: Escape sequences of ECMA-48: CSI (colours, cursor), OSC (titles, links), those with one letter, and a cut one.
_ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[^\[\]])|\x1b")


class Shown:
    """Rank 0's output, which is shown and logged; open while the rank runs."""

    def __init__(self, reading: int, log: BinaryIO) -> None:
        self.reading = reading
        self._log = log
        self._line = bytearray()  # the line so far
        os.set_blocking(reading, False)

    def pass_on(self) -> bool:
        """Show and log what the rank has written; False if there is nothing new."""
        try:
            chunk = os.read(self.reading, 1 << 16)
        except BlockingIOError:
            return False
        *lines, rest = (self._line + chunk).split(b"\n")
        self._log.write(b"".join(plain(line) + b"\n" for line in lines))
        # A live line may be redrawn for days without a line feed. A final \r may be half of a line break.
        self._line = rest[rest.rfind(b"\r", 0, -1) + 1 :]
        show(chunk)
        return bool(chunk)

    def end_line(self) -> None:
        self._log.write(plain(self._line))
        self._line.clear()

    def close(self) -> None:
        self.end_line()
        os.close(self.reading)
        self._log.close()


def plain(line: bytes | bytearray) -> bytes:
    """The line as a terminal finally shows it: without escape codes and overwritten text."""
    return _ESCAPES.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]


def drawing_environment(environment: Mapping[str, str], *, shown: bool) -> dict[str, str]:
    """``environment`` with the terminal's width and colours if the rank is ``shown`` on one, else without colours.

    A file or pipe, such as a job's log, is never drawn on: it would be unreadable.
    """
    if not shown or not os.isatty(2):
        return {name: value for name, value in environment.items() if name not in _COLOURED}
    drawing = {LIVE: "1"} | ({} if environment.get("NO_COLOR") else {"FORCE_COLOR": "1"})
    with suppress(OSError):
        if columns := os.get_terminal_size(2).columns:
            drawing["COLUMNS"] = str(columns)
    return {**environment, **drawing}


def tell(text: str) -> None:
    show(f"{text}\n".encode())


def tell_stopping(signum: int) -> None:
    name, more = signal.Signals(signum).name, ""
    if signum == signal.SIGINT:
        name, more = "Ctrl-C", " A second Ctrl-C kills them."
    tell(f"{name}: the ranks stop, after a save if training has begun.{more}")


def show(chunk: bytes) -> None:
    """Write bytes to stderr. A closed stderr does not end the run: its logs continue."""
    with suppress(OSError):
        while chunk:
            chunk = chunk[os.write(2, chunk) :]
