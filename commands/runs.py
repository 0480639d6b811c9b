"""smolconv runs, smolconv stop and smolconv save"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolconv.commands import console
from smolconv.commands.app import app
from smolconv.errors import UsageError

if TYPE_CHECKING:
    from smolconv.continual_pretraining.control.asking import Outcome
    from smolconv.continual_pretraining.control.status import RunStatus

_RUNS_EPILOG = """
**Examples**

    smolconv runs

    smolconv runs /scratch/me --json
"""
_STOP_EPILOG = """
**Examples**

    smolconv stop run

    smolconv stop run --no-wait

A run in Slurm is not requeued; one that still waits in the queue is cancelled. `smolconv continue-train` with the
same recipe resumes the run.
"""
_SAVE_EPILOG = """
**Examples**

    smolconv save run

The checkpoint is like any other: a resume may use it, and `checkpoints.keep` counts it.
"""
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of continue-train.")]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done. Default: wait.")]
_Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait; then exit 4.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command(epilog=_RUNS_EPILOG)
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A run, or a folder with runs below.")] = Path("."),
    as_json: _Json = False,
) -> None:
    """List training runs: state, step, loss, tokens/s, last checkpoint, launcher and job."""
    from smolconv.continual_pretraining.control.status import list_runs

    listing = list_runs(folder)
    console.warn(list(listing.warnings))
    if as_json:
        found = [status.to_json() for status in listing.runs]
        console.print_json({"schema": 1, "folder": str(folder), "runs": found, "warnings": list(listing.warnings)})
        return
    if not listing.runs:
        console.say(f"no runs in {folder} or a few levels below it")
        return
    _show(folder, listing.runs)


@app.command(epilog=_STOP_EPILOG)
def stop(run: _Run, wait: _Wait = True, timeout: _Timeout = 3600.0, as_json: _Json = False) -> None:
    """Stop a run after it has saved its current step, on this machine, on others or in Slurm."""
    from smolconv.continual_pretraining.control.asking import stop_run

    _tell(stop_run(run, wait=wait, timeout=_seconds(timeout), say=console.say), as_json)


@app.command(epilog=_SAVE_EPILOG)
def save(run: _Run, wait: _Wait = True, timeout: _Timeout = 3600.0, as_json: _Json = False) -> None:
    """Save a run's current step; it continues to train."""
    from smolconv.continual_pretraining.control.asking import save_run

    _tell(save_run(run, wait=wait, timeout=_seconds(timeout), say=console.say), as_json)


def _seconds(timeout: float) -> float:
    if not math.isfinite(timeout) or timeout < 0:
        raise UsageError(f"--timeout is {timeout}; expected a number of seconds, 0 or more.")
    return timeout


def _tell(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        console.print_json({"schema": 1, **outcome.to_json()})
        return
    at = "" if outcome.checkpoint is None else f" ({outcome.checkpoint})"
    console.line(f"{outcome.result}: {outcome.message}{at}")


def _show(folder: Path, found: tuple[RunStatus, ...]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "loss", "tokens/s", "last step", "checkpoint", "by", ""):
        table.add_column(title, justify="right" if title in ("step", "loss", "tokens/s", "last step") else "left")
    for each in found:
        name = str(each.run.relative_to(folder)) if each.run != folder else str(each.run)
        table.add_row(*(console.escape(_plain(text)) for text in (name, *_cells(each))))
    console.show(table)


def _cells(run: RunStatus) -> list[str]:
    saved = "" if run.checkpoint is None else f"{run.checkpoint.name}, {_age(run.checkpoint_age)}"
    record = run.record
    by = "" if record is None else f"{record.launcher}, {record.host}" if run.job is None else record.launcher
    if run.job is not None:
        by = f"slurm {run.job}" if by in ("", "slurm") else f"{by}, job {run.job}"
    return [
        run.state if run.certain else f"{run.state}?",
        "" if run.step is None else f"{run.step:,}/{run.train_steps or 0:,}",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        "" if run.step_age is None else f"{_age(run.step_age)} ago",
        saved, by, run.note,
    ]  # fmt: skip


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}" if unit != "min" else f"{seconds / size:.0f} min"
    return f"{seconds:.0f} s"


def _plain(text: str) -> str:
    """Text made safe for a table cell: names of folders and text from files may contain anything."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:300])
