"""A run's output while it trains: metrics.jsonl, events.jsonl, the terminal and the recipe's trackers.

Only rank 0 has a ``Watch``. Nothing here imports torch unless TensorBoard is used.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.watch.lines import EVENTS, METRICS, lines_backwards, step_of, timestamp
from smolconv.errors import BadCheckpoint, MachineError, NotInstalled, first_line
from smolconv.files import MOST_NAME_BYTES, read_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LIVE = "TTY_INTERACTIVE"  #: environment variable; "1": a line may be redrawn although stderr is a pipe
EventKind = Literal[
    "note", "spike", "evaluation", "evaluation_failed", "started", "resumed", "saved", "save_failed", "stopped",
    "finished",
]  # fmt: skip
#: Parts of the live line, in the order in which they are dropped when the terminal is too narrow.
_GIVE_WAY = ("stage", "grad norm", "lr", "MFU", "ETA", "speed", "loss")
#: Minimum terminal width for a progress bar next to the live line.
_BAR_FROM, _BAR_COLUMNS = 120, 20
_OF_SAVES = ("save_seconds", "stall_seconds")  #: fields of a step's line that trackers get once the save has ended
#: The terminal's speed and remaining time are means over this many steps.
_RECENT_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks."""

    step: int
    loss: float
    lr: float
    grad_norm: float  #: before clipping
    tokens: int  #: consumed in the run so far
    step_tokens: int  #: consumed by this step
    seconds: float  #: of wall time
    stage: str
    sources: Mapping[str, int] = field(default_factory=dict)  #: tokens so far
    skipped: bool = False  #: a spike, so the step changed no weights

    @property
    def tokens_per_second(self) -> float:
        return self.step_tokens / self.seconds


class Watch:
    """Open while a run trains. Opening drops lines of ``first_step`` and later from both files.

    ``flops_per_token`` is computed by the formula that ``flops_formula`` names. ``peak_flops`` counts all ranks;
    without it there is no MFU. ``interactive`` asks for a live display on stderr; None: if the launcher set ``LIVE``.
    ``resumed``: whether the run continues from its own checkpoint. ``began``: further fields of its first event.

    Raises ``NotInstalled`` or ``MachineError`` when a tracker of the recipe cannot be started.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, *, first_step: int, flops_per_token: float, flops_formula: str,
        peak_flops: float | None, interactive: bool | None = None, resumed: bool = False,
        began: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._recipe, self._first, self._last = recipe, first_step, recipe.schedule.train_steps
        self._flops_per_token, self._formula, self._peak = flops_per_token, flops_formula, peak_flops
        self._recent: deque[StepRecord] = deque(maxlen=_RECENT_STEPS)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._room = 0  #: columns for the live line's text
        self._step = first_step - 1
        self._saving: dict[str, float] = {}  #: seconds that saves took since the last step's line
        folder.mkdir(parents=True, exist_ok=True)
        run_id = _run_id(folder, new=first_step == 1)
        self._sinks = _open_sinks(folder, recipe, first_step, run_id)
        patient = recipe.checkpoints.on_full_disk == "continue"
        self._metrics = _Lines(folder / METRICS, first_step, patient=patient, warn=self._say)
        self._events = _Lines(folder / EVENTS, first_step, patient=patient, warn=self._say)
        if os.environ.get(LIVE) == "1" if interactive is None else interactive:
            self._start_display()
        said = {name: value for name, value in (began or {}).items() if value is not None}
        by = ", ".join(f"{name} {value}" for name, value in said.items())
        if resumed:
            self.event(first_step, f"resumed after step {first_step - 1:,}{by and f': {by}'}", kind="resumed", **said)
        else:
            self.event(first_step - 1, f"started{by and f': {by}'}", kind="started", **said)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """Write and show one step, and send it to the trackers."""
        self._step = record.step
        mfu = self._mfu(record.tokens_per_second)
        values = {
            "loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm,
            "tokens_per_second": record.tokens_per_second, "seconds": record.seconds, "mfu": mfu, **self._saving,
        }  # fmt: skip
        self._saving = {}
        broken = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        line: dict[str, Any] = {
            "step": record.step,
            "time": timestamp(),
            "tokens": record.tokens,
            "stage": record.stage,
        }
        line |= {name: None if name in broken else value for name, value in values.items()}
        line["sources"] = dict(record.sources)
        # JSON has no NaN, and null would look like an unknown MFU.
        line |= {"not_finite": broken} if broken else {}
        line |= {"skipped": True} if record.skipped else {}
        self._metrics.append(line)
        sent = {f"train/{name}": value for name, value in values.items() if value is not None and name not in _OF_SAVES}
        sent |= {f"tokens/{name}": float(count) for name, count in record.sources.items()}
        self._send(record.step, sent | {"tokens/all": float(record.tokens)})
        if record.step > self._first:  # the first step also compiles, allocates and fills caches
            self._recent.append(record)
        self._show(record)

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Losses on held-out sources, by their names, after ``step``."""
        found = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
        said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.event(step, f"evaluation: {said}", kind="evaluation", losses=found)
        self._send(step, {f"evaluation/{name}": loss for name, loss in losses.items()})

    def tasks(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """Metrics of tasks, by name, for the checkpoint of ``step``. Later steps may have been written before."""
        values = {f"{task} {name}": value for task, metrics in found.items() for name, value in metrics.items()}
        said = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.event(step, f"evaluation: {said}", kind="evaluation", tasks=found)
        sent = {f"evaluation/{name.replace(' ', '/')}": value for name, value in values.items()}
        self._send(max(step, self._step), sent | {"evaluation/checkpoint_step": float(step)})

    def event(self, step: int, text: str, *, kind: EventKind = "note", **more: Any) -> None:
        """Write a line to events.jsonl and the terminal. ``smolconv plot`` marks spikes and resumes by their ``kind``.

        The ``write_seconds`` and ``stall_seconds`` of a ``saved`` event also go to the trackers and into the next
        step's line.
        """
        self._events.append({"step": step, "time": timestamp(), "kind": kind, "text": text, **more})
        self._say(f"step {step:,}  {text}")
        if kind == "saved":
            took = {"save_seconds": float(more["write_seconds"]), "stall_seconds": float(more["stall_seconds"])}
            self._saving = {name: self._saving.get(name, 0.0) + seconds for name, seconds in took.items()}
            # A save that ends after later steps is sent with the newest step: wandb rejects steps that go back.
            self._send(max(step, self._step), {f"save/{name}": seconds for name, seconds in took.items()})

    def close(self) -> None:
        """Close the display, the files and the trackers; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for lines in (self._metrics, self._events):
            lines.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._say(f"warning: {sink.name} could not be closed: {first_line(error)}")
        self._sinks = []

    # --- trackers ---

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        for sink in list(self._sinks):
            try:
                sink.log(step, values)
            except Exception as error:  # no failure of a tracker may end the run
                self._sinks.remove(sink)
                self._say(f"warning: {sink.name} failed at step {step} and is switched off: {first_line(error)}")

    # --- the terminal ---

    def _mfu(self, tokens_per_second: float) -> float | None:
        return None if self._peak is None else self._flops_per_token * tokens_per_second / self._peak

    def _start_display(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(stderr=True, highlight=False, force_terminal=True)
        text = TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, overflow="crop"))
        bar = [BarColumn(_BAR_COLUMNS)] if console.width >= _BAR_FROM else []
        # Some terminals wrap a line that is exactly as wide as they are.
        self._room = console.width - 1 - (_BAR_COLUMNS + 1 if bar else 0)
        self._progress = Progress(*bar, text, console=console, refresh_per_second=4)
        self._task = self._progress.add_task("", total=self._last, completed=self._first - 1, said="the first step")
        self._progress.start()

    def _show(self, record: StepRecord) -> None:
        width = None
        if self._progress is not None and self._task is not None:
            width = self._progress.console.width - 1
            self._progress.update(self._task, completed=record.step, said=self._described(record, self._room))
        if record.step % self._recipe.logging.every_steps == 0 or record.step in (self._first, self._last):
            self._say(self._described(record, width))

    def _described(self, record: StepRecord, width: int | None) -> str:
        """Describe the step in at most ``width`` columns, or in full without a width."""
        recent = self._recent or [record]
        seconds = sum(each.seconds for each in recent)
        speed = sum(each.step_tokens for each in recent) / seconds
        mfu = self._mfu(speed)
        left = timedelta(seconds=round((self._last - record.step) * seconds / len(recent)))
        parts = {
            "step": f"step {record.step:,}/{self._last:,}", "loss": f"loss {record.loss:.4f}",
            "lr": f"lr {record.lr:.2e}", "grad norm": f"grad norm {record.grad_norm:.3f}",
            "speed": f"{speed:,.0f} tokens/s", "MFU": "" if mfu is None else f"MFU {mfu:.1%} ({self._formula})",
            "ETA": f"ETA {left}", "stage": record.stage,
        }  # fmt: skip
        give_way = iter(_GIVE_WAY)
        while True:
            line = "  ".join(filter(None, parts.values()))
            if width is None or len(line) <= width or (name := next(give_way, None)) is None:
                return line
            del parts[name]

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            # The reader of the pipe may have ended, which must not end the run.
            with suppress(BrokenPipeError):
                print(text, file=sys.stderr, flush=True)


# --- files -----------------------------------------------------------------------------------------------------------


class _Lines:
    """A file of JSON lines; each is written to the file before ``append`` returns.

    When the disk is full, ``patient`` keeps the lines in memory until there is space; otherwise ``MachineError``.
    """

    def __init__(self, path: Path, first_step: int, *, patient: bool, warn: Callable[[str], None]) -> None:
        self._path, self._patient, self._warn = path, patient, warn
        self._waiting = bytearray()
        self._warned = False
        self._file: int | None = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o644)
        # One system call, so neither a reader nor a kill finds the file with half of the lines dropped.
        os.ftruncate(self._file, _bytes_before(self._file, first_step))

    def append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._waiting += json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            # A full disk may take a part of a line: the rest stays here and is written first.
            while self._waiting:
                del self._waiting[: os.write(self._file, self._waiting)]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._patient:
                raise MachineError(
                    f"{self._path}: no space left to write step {line['step']}.\nFree some space, then resume the run."
                ) from None
            if not self._warned:
                self._warn(f"warning: {self._path}: no space left; its lines are kept in memory until there is.")
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)
            self._file = None


def _bytes_before(file: int, first_step: int) -> int:
    """Bytes to keep: up to the last complete line of a step before ``first_step``. Reads from the end."""
    if first_step == 1:
        return 0
    for end, line in lines_backwards(file):
        with suppress(ValueError):
            if step_of(line) < first_step:
                return end
    return 0


def _run_id(folder: Path, *, new: bool) -> str:
    """The run's id for trackers, which stays the same after a resume or when the folder is moved."""
    path = folder / "logs" / "run-id"
    with suppress(BadCheckpoint):
        known = b"" if new else read_bytes(path, MOST_NAME_BYTES, noted=False).strip()
        if re.fullmatch(rb"[0-9a-f]{8}", known):
            return known.decode()
    path.parent.mkdir(exist_ok=True)
    path.write_text(run_id := secrets.token_hex(4), encoding="utf-8")
    return run_id


# --- trackers --------------------------------------------------------------------------------------------------------


class _Sink(Protocol):
    """A tracker that accepts named numbers for a step."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # On resume, purge_step makes the viewer ignore what an earlier attempt wrote for these steps.
        purge = first_step if first_step > 1 else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, flush_secs=30)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """Trackio identifies a run by its name alone. Steps repeated after a crash appear twice."""

    name = "trackio"

    def __init__(self, project: str, recipe: Recipe, run_id: str) -> None:
        import trackio

        config = recipe.model_dump(mode="json")
        self._run = trackio.init(project=project, name=f"{recipe.name}-{run_id}", config=config, resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb:
    """wandb ignores steps that it already has, so steps repeated after a crash keep their first values."""

    name = "wandb"

    def __init__(self, folder: Path, project: str, recipe: Recipe, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=project, name=recipe.name, config=recipe.model_dump(mode="json"), dir=str(folder / "logs"),
            id=run_id, resume="allow",
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _open_sinks(folder: Path, recipe: Recipe, first_step: int, run_id: str) -> list[_Sink]:
    given = recipe.logging
    wanted: list[tuple[str, bool, Callable[[], _Sink]]] = [
        ("tensorboard", given.tensorboard, lambda: _TensorBoard(folder, first_step)),
        ("trackio", given.trackio is not None, lambda: _Trackio(given.trackio or "", recipe, run_id)),
        ("wandb", given.wandb is not None, lambda: _Wandb(folder, given.wandb or "", recipe, run_id)),
    ]
    return [_open_sink(name, start) for name, on, start in wanted if on]


def missing_tracker(name: str, state: str) -> NotInstalled:
    """The error for a tracker that the recipe names; ``state`` says why not, such as "is not installed."."""
    return NotInstalled(
        f"logging.{name} needs {name}, which {state}\npip install {name}, or remove logging.{name} from the recipe."
    )


def _open_sink(name: str, start: Callable[[], _Sink]) -> _Sink:
    try:
        return start()
    except ImportError as error:
        raise missing_tracker(name, f"cannot be imported: {first_line(error)}") from None
    except Exception as error:
        raise MachineError(
            f"logging.{name}: {name} could not be started: {type(error).__name__}: {first_line(error)}\n"
            f"Set it up (an account, the network, its offline mode), or remove logging.{name} from the recipe."
        ) from error
