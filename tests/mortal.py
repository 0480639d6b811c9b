"""A process that converts in forks of itself, each of which can be killed at a moment or at a call of the system.

Importing takes longer than a small conversion, so one process imports and every life is a fork of it. ``Mortal`` is the
tests' side; run as a program, this file reads requests as JSON lines and answers each with how the life ended.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

#: Where a life can end: every way in which smolconv changes a disk.
CALLS = ("open", "ftruncate", "pwrite", "write", "fsync", "truncate", "mkdir", "rename", "unlink", "rmdir")


@dataclass(frozen=True, kw_only=True)
class Life:
    """How one conversion ended."""

    status: int  #: the exit code, or minus the signal
    seconds: float
    calls: dict[str, int] = field(default_factory=dict)  #: of a life that ended by itself: how often each was made


class Mortal:
    """Converts in another process. Use as a context manager."""

    faults = 0  #: kills, and lives in which the system refused something

    def __enter__(self) -> Mortal:
        words = [sys.executable, __file__]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate(timeout=60)

    def convert(self, source: Path, target: Path, to: str, **request: Any) -> Life:
        """One life: until it ends, ``kill_after`` seconds, or the ``at``-th ``call``, which then does not happen.

        With ``error`` (an errno's name) that call and all later ones of its kind fail instead, or with ``once`` it alone;
        with ``torn`` half of what was to be written is written before the kill. Other keywords are those of ``convert``.
        """
        line = json.dumps({"source": str(source), "target": str(target), "to": to, **request})
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        life = Life(**json.loads(self.process.stdout.readline()))
        self.faults += life.status == -signal.SIGKILL or bool(request.get("error"))
        return life


def _serve() -> None:
    from conftest import convert  # (imported once, for all lives)

    for line in sys.stdin:
        request = json.loads(line)
        answer_end, child_end = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(answer_end)
            _live(convert, request, child_end)
        os.close(child_end)
        kill_after = request.get("kill_after")
        if kill_after is not None:
            time.sleep(max(0.0, kill_after - (time.monotonic() - started)))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        with open(answer_end, "rb") as answer:
            calls = json.loads(answer.read() or b"{}")
        life = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "calls": calls}
        print(json.dumps(life), flush=True)


def _live(convert: Callable[..., object], request: dict[str, Any], answer: int) -> None:
    from smolconv.errors import SmolconvError

    write = os.write
    fate = {name: request.pop(name, None) for name in ("call", "at", "error", "once", "torn", "kill_after")}
    calls: Counter[str] = Counter()
    for name in CALLS:
        counted = _counted(name, getattr(os, name), calls, fate)
        # Python 3.10's pathlib has kept the calls that it makes; its open is io's, which is no call of the system.
        for module in (os, getattr(pathlib, "_NormalAccessor", None)):
            if hasattr(module, name) and (module is os or name != "open"):
                setattr(module, name, staticmethod(counted))
    status = 70
    try:
        convert(Path(request.pop("source")), Path(request.pop("target")), **request)
        status = 0
    except SmolconvError as error:
        status = error.exit_code
    except OSError:
        status = 4
    finally:
        write(answer, json.dumps(calls).encode())
        os._exit(status)


def _counted(name: str, call: Callable[..., Any], calls: Counter[str], fate: dict[str, Any]) -> Callable[..., Any]:
    mutex = threading.Lock()

    def counted(*words: Any, **more: Any) -> Any:
        with mutex:
            number = calls[name]
            calls[name] += 1
        if name == fate["call"] and number >= fate["at"]:
            if fate["error"] and (number == fate["at"] or not fate["once"]):
                raise OSError(getattr(errno, fate["error"]), os.strerror(getattr(errno, fate["error"])))
            if number == fate["at"]:
                if fate["torn"]:
                    half = bytes(words[1])[: len(words[1]) // 2]
                    call(words[0], half, *words[2:])
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*words, **more)

    return counted


if __name__ == "__main__":
    _serve()
