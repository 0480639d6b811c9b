"""smolconv plot"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolconv.commands import console
from smolconv.commands.app import app
from smolconv.errors import UsageError

_EPILOG = """
**Examples**

    smolconv plot run

    smolconv plot run loss.svg

    smolconv plot run-a run-b -o both.html
"""


@app.command(epilog=_EPILOG)
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN... [OUT]", help="Folders of runs, which may still be training."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Output file: .html, .svg or, with cairosvg, .png or .pdf. Default: RUN/plot.html."
        ),
    ] = None,
) -> None:
    """Plot loss, learning rate, gradient norm, throughput, evaluation, mixture and events of one or more runs."""
    from smolconv.continual_pretraining.watch.plot import SUFFIXES, write_plot

    if output is None and len(runs) > 1 and runs[-1].suffix in SUFFIXES and not runs[-1].is_dir():
        *runs, output = runs
    if output is None and len(runs) > 1:
        raise UsageError("several runs need a name for the plot. Add one: -o both.html")
    output = output or runs[0] / "plot.html"
    write_plot(runs, output)
    console.say(f"wrote {output}")
