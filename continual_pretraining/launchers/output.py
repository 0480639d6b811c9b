"""What a launcher shows on stderr, and what the log of a rank keeps.

Ranks write to pipes and files. When we write to a terminal, rank 0 learns from its environment that it may draw on it,
and its log keeps what stays in sight there: no colours, and nothing that was drawn over.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO

from smolconv.continual_pretraining.watch.metrics import LIVE

#: What libraries take for the wish to be coloured where there is no terminal.
_COLOURED = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", LIVE)
#: Colours and the cursor's moves (CSI), titles and links (OSC), what has one letter, and one that is cut: ECMA-48.
_ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[^\[\]])|\x1b")


class Shown:
    """Rank 0's output, which is shown and logged; open from its start to its end."""

    def __init__(self, reading: int, log: BinaryIO) -> None:
        self.reading = reading
        self._log = log
        self._line = bytearray()  # not ended yet
        os.set_blocking(reading, False)

    def pass_on(self) -> bool:
        """Show and log what the rank has written by now; False when there is nothing."""
        try:
            chunk = os.read(self.reading, 1 << 16)
        except BlockingIOError:
            return False
        *lines, rest = (self._line + chunk).split(b"\n")
        self._log.write(b"".join(plain(line) + b"\n" for line in lines))
        # A live line may be drawn for days without an end. A return at the end may belong to a line break.
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
    """A line as a terminal leaves it: without escape codes, and without what was drawn over."""
    return _ESCAPES.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]


def drawing_environment(environment: Mapping[str, str], *, shown: bool) -> dict[str, str]:
    """``environment``, and how a rank may draw: as on our terminal when it is ``shown`` there, else plainly.

    Also where we write to a file or a pipe, as a job's log: what is drawn on cannot be read there.
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
    """Bytes to stderr. Nobody listening any more is no reason to end a run: its logs go on."""
    with suppress(OSError):
        while chunk:
            chunk = chunk[os.write(2, chunk) :]
