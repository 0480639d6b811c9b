"""Terminal output shared by all commands: settings, JSON on stdout, everything else on stderr, readable sizes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from smolconv.errors import counted
from smolconv.parsing import finite_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from smolconv.conversion import ConversionPlan

    out: Console  #: stdout
    err: Console  #: stderr


_WIDEST = 100_000  #: columns of a pipe


@dataclass
class Settings:
    """The common options of one invocation."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False


settings = Settings()


def __getattr__(name: str) -> Console:
    # Importing rich takes a tenth of a second, so it is imported on first use.
    if name in ("out", "err"):
        return _console(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


@cache
def _console(name: str) -> Console:
    from rich.console import Console

    class Out(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1, which means that parity does not hold
            discard_output()

    if name == "out":
        return Out(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDEST)
    return Console(stderr=True, highlight=False, emoji=False)


def prepare_streams() -> None:
    """Make stdout and stderr take any text: a closed one discards it, and none fails in a locale without UTF-8.

    Without this, ``print`` would write to stdout what is meant for a closed stderr.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            # For as long as the process: it takes the closed descriptor, which no file may get.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: object) -> None:
    """Print one JSON document on stdout, in ASCII. Non-finite numbers become null, because JSON has none."""
    line(json.dumps(finite_json(value), indent=2, allow_nan=False))


def show(renderable: RenderableType) -> None:
    """Print a table or text on stdout. In a pipe nothing is cut or wrapped, and no line ends in blanks."""
    console = _console("out")
    if console.is_terminal:
        console.print(renderable)
        return
    with console.capture() as captured:
        console.print(renderable)
    line("\n".join(text.rstrip() for text in captured.get().rstrip("\n").split("\n")))


def line(text: str) -> None:
    """Print a line on stdout unchanged and unwrapped, for scripts."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output(descriptor: int = 1) -> None:
    """Drop further output after the reader of stdout (or 2: stderr) has closed it; the exit code stays meaningful."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def say(text: str) -> None:
    """Print a line on stderr; silent with --quiet."""
    if not settings.quiet:
        tell(printable(text))


def tell(text: str) -> None:
    """Print on stderr, also with --quiet. A log that cannot be written is no failure of the command."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard_output(2)


def warn(warnings: tuple[str, ...] | list[str]) -> None:
    for warning in warnings:
        if sys.stderr.isatty() and not settings.quiet:
            _console("err").print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
        else:
            say(f"warning: {warning}")


def printable(text: str) -> str:
    """The text without what a terminal would obey or hide: names in files may contain escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def escape(text: str) -> str:
    """The text for ``show``, printable and without rich's markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(printable(text))


def what_is_planned(layout: str, plan: ConversionPlan) -> str:
    """Print a dry run's last line."""
    return (
        f"{layout} -> {plan.layout}: {counted(len(plan.output.files), 'file')}, {counted(plan.tensors, 'tensor')}; "
        f"reads {size(plan.bytes_read)}, needs {size(plan.bytes_written)} of disk. Nothing was written."
    )


def size(count: float) -> str:
    """1.5 GB, in powers of 1000 as disks and safetensors count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """134.5 M: parameters and tokens."""
    for unit in ("", " K", " M", " B", " T"):
        if count < 1000 or unit == " T":
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with bytes/s and time left on a terminal; silent in a pipe and with --quiet."""
    if settings.quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_console("err"), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.update(task, advance=count)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with percentage and time left on a terminal; silent in a pipe and with --quiet.

    It keeps its own copy of stderr, so that it stays visible while stderr is redirected to a log.
    """
    if settings.quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with (
        open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace") as terminal,
        Progress(*columns, console=Console(file=terminal), transient=True, redirect_stderr=False) as progress,
    ):
        task = progress.add_task(title, total=total)
        yield lambda count: progress.update(task, advance=count)
