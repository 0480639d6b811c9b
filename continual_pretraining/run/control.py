"""State and requests of a run, for other processes.

``run.json`` says which start trains here, since when, and how it ended. A request is a file in
``logs/asked/ATTEMPT``, so it reaches rank 0 from every machine that shares the run's folder, with every launcher. The
folder is named after the start, so that a request to an earlier start never reaches a later one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.ranks import ATTEMPT
from smolconv.continual_pretraining.watch.lines import is_timestamp, timestamp
from smolconv.errors import SmolconvError
from smolconv.files import is_file_name, is_there
from smolconv.layouts.documents import corrupt_if_malformed, is_count
from smolconv.parsing import read_json
from smolconv.storage.atomic import appearing_whole

RECORD = "run.json"
STOP = "stop"  #: the file of a request to save and end
SAVE = "save-"  #: prefix of a request to save; the asking process adds a name, rank 0 writes the step into the file
STOPPED_IN_START = "stopped by smolconv stop during its start. Nothing was trained; checkpoints are unchanged."
Phase = Literal["starting", "training", "exporting", "ended"]
#: How often rank 0 looks for requests.
_EVERY_SECONDS = 0.5
_MOST_MESSAGE = 2000


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """One start of a run."""

    attempt: str  #: name of the start, and of the folder of its requests
    host: str  #: rank 0's
    pid: int
    launcher: str
    job: int | None  #: Slurm's number of the job that it is in
    ranks: int
    nodes: int
    began: str  #: a timestamp
    phase: Phase
    ended: str | None = None
    exit_code: int | None = None
    message: str = ""  #: why it ended, if it did not finish

    def __post_init__(self) -> None:
        counts = (self.pid, self.ranks, self.nodes, 0 if self.job is None else self.job)
        texts = (self.attempt, self.host, self.launcher, self.message)
        times = [self.began, *([] if self.ended is None else [self.ended])]
        code = self.exit_code is None or (is_count(self.exit_code) and self.exit_code <= 255)
        if not (all(map(is_count, counts)) and all(isinstance(text, str) for text in texts) and code):
            raise ValueError(f"not a valid start of a run: {self!r:.200}")
        if not all(map(is_timestamp, times)) or self.phase not in get_args(Phase):
            raise ValueError(f"began {self.began!r:.60} or phase {self.phase!r:.60} is not valid")
        ended = {self.phase == "ended", self.ended is not None, self.exit_code is not None}
        if not is_file_name(self.attempt) or len(ended) > 1:
            raise ValueError(f"attempt {self.attempt!r:.60} or exit_code {self.exit_code!r} is not valid")

    @staticmethod
    def read(run: Path) -> StartRecord | None:
        """The record of the newest start; None before the first. Raises ``CorruptFile`` for an invalid record."""
        path = run / RECORD
        if not is_there(path):
            return None
        document = read_json(path)
        with corrupt_if_malformed(path):
            document.pop("schema", None)
            return StartRecord(**document)

    def write(self, run: Path) -> None:
        with appearing_whole(run / RECORD) as part:
            part.write_text(json.dumps({"schema": 1, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    def asked(self, run: Path) -> Path:
        """The folder of its requests."""
        return asked_folder(run, self.attempt)


def asked_folder(run: Path, attempt: str) -> Path:
    return run / "logs" / "asked" / attempt


class Control:
    """Exists on rank 0 while it holds the run's lock. A thread looks for requests.

    A request to stop acts like SIGTERM in each phase: save and end after the step, or end at once during the start
    and the export.
    """

    def __init__(self, run: Path, record: StartRecord) -> None:
        self.run, self.record = run, record
        self.stop_asked = False
        self._saves: set[str] = set()  #: requests to save that no step has answered yet
        self._answered: set[str] = set()
        self._folder = record.asked(run)
        self._closed, self._phases = threading.Event(), threading.Lock()
        shutil.rmtree(self._folder, ignore_errors=True)  # several nodes' torchruns may use a name again
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in self._folder.parent.iterdir():
            with suppress(OSError):
                other.rmdir()  # empty: that start had no requests
        self._folder.mkdir(exist_ok=True)
        self._record(record)
        threading.Thread(target=self._watch, name="requests", daemon=True).start()

    def enter(self, phase: Phase, listen: Callable[[], object] = lambda: None) -> None:
        """Begin a phase. ``listen`` installs its handler of SIGTERM; no request is passed on before that."""
        with self._phases:
            listen()
            self._record(replace(self.record, phase=phase))

    def take_saves(self) -> list[str]:
        """The pending requests to save; ``answer`` must follow for all of them."""
        return list(self._saves)

    def answer(self, saves: Collection[str], step: int) -> None:
        """Tell the askers which step is saved for them."""
        self._answered.update(saves)
        self._saves.difference_update(saves)
        for name in saves:
            with suppress(OSError), appearing_whole(self._folder / name) as part:
                part.write_text(str(step))

    def close(self) -> None:
        """Stop looking for requests."""
        with self._phases:
            self._closed.set()

    def _record(self, record: StartRecord) -> None:
        self.record = record
        with suppress(OSError):  # a full disk must not end the run here
            record.write(self.run)

    def _watch(self) -> None:
        while not self._closed.wait(_EVERY_SECONDS):
            with suppress(OSError):
                self._look()

    def _look(self) -> None:
        names = set(os.listdir(self._folder))
        self._saves |= {name for name in names if name.startswith(SAVE)} - self._answered
        if STOP not in names or self.stop_asked:
            return
        with self._phases:
            if self._closed.is_set():
                return
            self.stop_asked = True
            if self.record.phase == "starting":
                record_end(self.run, 130, STOPPED_IN_START)
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def controlled(run: Path, recipe: Recipe, world_size: int, *, first: bool) -> Iterator[Control | None]:
    """From the run's lock until the rank ends: rank 0's ``Control``, and None on other ranks."""
    if not first:
        yield None
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    job = os.environ.get("SLURM_JOB_ID", "")
    record = StartRecord(
        attempt=_attempt(), host=socket.gethostname(), pid=os.getpid(), launcher=recipe.launch.launcher,
        job=int(job) if re.fullmatch(r"\d{1,18}", job) else None, ranks=world_size, nodes=max(1, world_size // local),
        began=timestamp(), phase="starting",
    )  # fmt: skip
    control = Control(run, record)
    try:
        yield control
    finally:
        control.close()


def record_end(run: Path, exit_code: int, message: str) -> None:
    """Record how the start ended, if this process is its rank 0. Only the first reason is kept."""
    with suppress(SmolconvError, OSError):
        record = StartRecord.read(run)
        if record and record.ended is None and (record.pid, record.host) == (os.getpid(), socket.gethostname()):
            ended = replace(
                record, phase="ended", ended=timestamp(), exit_code=exit_code, message=message[:_MOST_MESSAGE]
            )  # fmt: skip
            ended.write(run)


def _attempt() -> str:
    given = os.environ.get(ATTEMPT, "")
    return given if is_file_name(given) else secrets.token_hex(4)
