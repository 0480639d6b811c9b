"""Finds runs below a folder, and each one's state from small files, its lock and Slurm's queue."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smolconv.continual_pretraining.control.queue import RUNNING, WAITING, job_states
from smolconv.continual_pretraining.recipe.files import RECIPE, load_recipe
from smolconv.continual_pretraining.run.checkpoints import FOLDER, LATEST, latest, step_of
from smolconv.continual_pretraining.run.control import StartRecord
from smolconv.continual_pretraining.run.folder import is_trained
from smolconv.continual_pretraining.watch.lines import METRICS, MetricsLine, lines_backwards, metrics_line, seconds_of
from smolconv.errors import MissingFile, SmolconvError, StoppedBySignal, first_line
from smolconv.files import open_file, reading

State = Literal[
    "new", "submitted", "pending", "starting", "running", "saving", "exporting",
    "stopped", "finished", "failed", "dead", "unreadable",
]  # fmt: skip
#: States in which a process trains or is about to.
ALIVE = ("starting", "running", "saving", "exporting")
MOST_DEPTH, MOST_FOLDERS = 4, 10_000
#: Bytes read from the end of metrics.jsonl: two lines of maximum length.
_MOST_TAIL_BYTES = 1 << 21
#: A run whose lock is not visible on this machine counts as alive for this long after its last sign of life.
_TRUSTED_SECONDS = 600.0
#: A note is added if a training run makes no step for this long and for this many times its last step's duration.
_SILENT_SECONDS, _SILENT_STEPS = 300.0, 20
_SCRIPT = re.compile(r"job-(\d{1,18})\.sh")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run's state as seen by other processes. Ages are in seconds."""

    run: Path
    state: State
    certain: bool = True  #: False if a lock on another machine, or Slurm, could not be checked
    note: str = ""
    name: str | None = None
    step: int | None = None
    train_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    step_age: float | None = None
    checkpoint: Path | None = None
    checkpoint_age: float | None = None
    job: int | None = None
    record: StartRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object described in docs/cli.md."""
        record = self.record
        return {
            "run": str(self.run), "name": self.name, "state": self.state, "certain": self.certain, "note": self.note,
            "step": self.step, "train_steps": self.train_steps, "loss": self.loss,
            "tokens_per_second": self.tokens_per_second, "step_age_seconds": self.step_age,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "checkpoint_age_seconds": self.checkpoint_age, "job": self.job,
            **{
                name: getattr(record, name, None)
                for name in ("launcher", "host", "pid", "ranks", "nodes", "began", "ended", "exit_code", "message")
            },
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The runs below a folder."""

    runs: tuple[RunStatus, ...]
    warnings: tuple[str, ...] = ()


def list_runs(folder: Path) -> Listing:
    """The run in ``folder``, or the runs a few levels below it, sorted by path.

    A run that cannot be read is listed as such. Raises ``MissingFile`` if the folder does not exist.
    """
    if not os.path.isdir(folder):
        raise MissingFile(f"{folder} is not a folder.\nExpected a run's folder, or one that contains runs.")
    warnings: list[str] = []
    found = [_Seen.read(run) for run in _find_runs(folder, warnings)]
    states = job_states(number for seen in found for number in seen.jobs)
    return Listing(runs=tuple(seen.status(states) for seen in found), warnings=tuple(warnings))


def read_status(run: Path) -> RunStatus:
    """The state of one run. Raises ``MissingFile`` if there is none, and any error that makes it unreadable."""
    if not _is_run(run):
        raise MissingFile(
            f"{run} is not a run's folder: it has no {RECIPE}.\n"
            "Give the folder that `smolconv continue-train` wrote (its recipe's output); `smolconv runs` lists them."
        )
    seen = _Seen.read(run)
    if seen.problem is not None:
        raise seen.problem
    return seen.status(job_states(seen.jobs))


def _is_run(folder: Path) -> bool:
    return os.path.lexists(folder / RECIPE) and not os.path.isdir(folder / RECIPE)


def _find_runs(top: Path, warnings: list[str]) -> Iterator[Path]:
    """Find runs. Does not follow links, or search hidden folders and the inside of runs."""
    looked, level = 0, [top]
    for depth in range(MOST_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            looked += 1
            if looked > MOST_FOLDERS:
                warnings.append(f"only the first {MOST_FOLDERS:,} folders below {top} were searched")
                return
            if _is_run(folder):
                yield folder
            elif depth < MOST_DEPTH:
                try:
                    with os.scandir(folder) as entries:
                        names = [each.name for each in entries if each.is_dir(follow_symlinks=False)]
                except OSError as error:
                    warnings.append(f"{folder} cannot be searched: {error.strerror or error}")
                    continue
                below += [folder / name for name in sorted(names) if not name.startswith(".")]
        level = below


@dataclass(kw_only=True)
class _Seen:
    """The contents of a run's folder."""

    run: Path
    problem: SmolconvError | None = None
    name: str | None = None
    train_steps: int | None = None
    record: StartRecord | None = None
    held: bool = False
    last: MetricsLine | None = None
    last_written: float | None = None  #: time of the last line, in seconds since the epoch
    checkpoint: Path | None = None
    checkpoint_written: float | None = None
    saving: bool = False
    submitted: int | None = None  #: the newest job
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def read(run: Path) -> _Seen:
        seen = _Seen(run=run)
        try:
            seen._look()
        except SmolconvError as error:
            seen.problem = error
        except OSError as error:
            seen.problem = MissingFile(f"{run} cannot be read: {error}")
        return seen

    def _look(self) -> None:
        # The lock first: an ending start writes its record before it releases the lock.
        self.held = is_trained(self.run)
        self.record = StartRecord.read(self.run)
        recipe = load_recipe(self.run / RECIPE)
        self.name, self.train_steps = recipe.name, recipe.schedule.train_steps
        self.submitted = max((int(match[1]) for match in _matches(self.run / "slurm", _SCRIPT)), default=None)
        self._read_metrics()
        self.saving = any(True for _ in _matches(self.run / FOLDER, re.compile(r"step-\d{1,18}\.partial")))
        try:
            self.checkpoint = latest(self.run)
        except SmolconvError as error:
            self.notes.append(first_line(error))
        if self.checkpoint is not None:
            self.checkpoint_written = os.stat(self.run / FOLDER / LATEST).st_mtime

    def _read_metrics(self) -> None:
        path = self.run / METRICS
        if not os.path.lexists(path):
            return
        with reading(path), open(open_file(path, noted=False), "rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            for _, line in lines_backwards(file.fileno(), most_bytes=_MOST_TAIL_BYTES):
                with suppress(ValueError):  # the last line may be cut or foreign
                    self.last = metrics_line(line)
                    self.last_written = written if self.last.time is None else self.last.time
                    return

    @property
    def jobs(self) -> list[int]:
        own = None if self.record is None else self.record.job
        return [number for number in (own, self.submitted) if number is not None]

    def _is_job(self, record: StartRecord) -> bool:
        """Whether the start is the newest submitted job, and not part of a job that the user wrote."""
        return record.job is not None and record.job == self.submitted

    def status(self, queue: Mapping[int, str] | None) -> RunStatus:
        now = time.time()
        if self.problem is not None:
            return RunStatus(run=self.run, state="unreadable", note=first_line(self.problem))
        state, certain = self._state(queue, now)
        step = None if self.checkpoint is None else step_of(self.checkpoint)
        last, record = self.last, self.record
        step_age = _age(now, self.last_written)
        if state == "running" and last and step_age is not None:
            began = now - seconds_of(record.began) if record else step_age
            silent = min(step_age, began)
            if silent > max(_SILENT_SECONDS, _SILENT_STEPS * (last.seconds or 0.0)):
                self.notes.append(f"no step for {silent:,.0f} s")
        if state == "failed" and record is not None:
            self.notes.append(record.message.partition("\n")[0])
        return RunStatus(
            run=self.run, state=state, certain=certain, note="; ".join(self.notes), name=self.name,
            step=step if last is None else last.step, train_steps=self.train_steps,
            loss=None if last is None else last.values.get("loss"),
            tokens_per_second=None if last is None else last.values.get("tokens_per_second"), step_age=step_age,
            checkpoint=self.checkpoint, checkpoint_age=_age(now, self.checkpoint_written),
            job=max(self.jobs, default=None), record=record,
        )  # fmt: skip

    def _state(self, queue: Mapping[int, str] | None, now: float) -> tuple[State, bool]:
        """The state, and whether it is certain."""
        record = self.record
        queued = None if queue is None or not self.jobs else queue.get(max(self.jobs), "")
        if record is not None and record.ended is None:
            if self.held or (self._is_job(record) and queued in RUNNING):
                return self._alive(record), True
            return self._silent(record, queued, now)
        if self.held:
            return "starting", True  # the start has not written its record yet
        if queued:
            return ("pending" if queued in WAITING else "starting"), True
        newer = self.submitted is not None and (record is None or record.job is None or self.submitted > record.job)
        if newer and queue is None:
            return "submitted", False
        if record is not None:
            ends: dict[int | None, State] = {0: "finished", StoppedBySignal.exit_code: "stopped", 130: "stopped"}
            return ends.get(record.exit_code, "failed"), True
        if self.last is None and self.checkpoint is None:
            return "new", True
        done = self.last is not None and self.last.step >= (self.train_steps or 0)
        return ("finished" if done else "stopped"), False  # an early version wrote no record

    def _alive(self, record: StartRecord) -> State:
        if record.phase == "training":
            return "saving" if self.saving else "running"
        return "exporting" if record.phase == "exporting" else "starting"

    def _silent(self, record: StartRecord, queued: str | None, now: float) -> tuple[State, bool]:
        """The state of a start without a recorded end, whose lock is free as far as this machine can see."""
        if queued in WAITING:
            return "pending", True  # requeued when its node failed
        here = record.host == socket.gethostname()
        if here or (self._is_job(record) and queued == ""):
            return "dead", True
        signs = [seconds_of(record.began), self.last_written or 0.0, self.checkpoint_written or 0.0]
        return (self._alive(record) if now - max(signs) < _TRUSTED_SECONDS else "dead"), False


def _matches(folder: Path, name: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Names in a folder; empty if it does not exist."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if match := name.fullmatch(entry.name):
                yield match


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else max(0.0, now - then)
