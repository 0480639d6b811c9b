"""smolconv evaluate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolconv.commands import console
from smolconv.commands.app import SourceLayout, app

if TYPE_CHECKING:
    from smolconv.continual_pretraining.evaluation.evaluate import Evaluation

_EPILOG = """
**Examples**

    smolconv evaluate smollm2-hf --tasks smolconv_cloze

    smolconv evaluate before run --held-out tokens/held-out

    smolconv evaluate run --tasks arc_easy,hellaswag --limit 200 --json
"""


@app.command(epilog=_EPILOG)
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Folders of any layout, or hf://owner/name.")
    ],
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="NAMES", help="Tasks, separated by commas.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder of your own lm-eval tasks.")
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", metavar="TOKENS", help="Folder of token files (.ds) to predict. Repeatable."),
    ] = None,
    engine: Annotated[
        Literal["lm-eval", "lighteval"], typer.Option(metavar="NAME", help="Runs the tasks: lm-eval or lighteval.")
    ] = "lm-eval",
    engine_python: Annotated[
        str | None,
        typer.Option(metavar="PATH", envvar="SMOLCONV_LIGHTEVAL_PYTHON", help="Python of lighteval's environment."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Limit of documents per task and held-out folder.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the held-out sample and the intervals.")] = 0,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Context of held-out documents, in tokens.")] = 2048,
    eos: Annotated[
        int | None, typer.Option(min=0, metavar="ID", help="Token that ends held-out documents without .ds.index.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "fp32", "bf16"], typer.Option(metavar="TYPE", help="float32 or bfloat16.")
    ] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="Where models run, such as cpu or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Requests of a task per batch.")] = 8,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Tokenizer to use instead of the checkpoints' own.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Model config for a checkpoint without one.")
    ] = None,
    layout: SourceLayout = None,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for temporary files. Default: the system's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also write the JSON document to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Measure checkpoints on tasks and on held-out tokens, and compare each with the first."""
    from smolconv import api
    from smolconv.continual_pretraining.evaluation.tasks import names_of
    from smolconv.files import require_place
    from smolconv.layouts.layout import ReadOptions
    from smolconv.storage.atomic import appearing_whole

    if output is not None:
        require_place("--output", output)
    found = api.evaluate(
        checkpoints, tasks=names_of(tasks or []), include=include, held_out=held_out or [], engine=engine,
        engine_python=engine_python, limit=limit, seed=seed, length=length, eos=eos, dtype=dtype, device=device,
        batch_size=batch_size, tokenizer=tokenizer, work=work_dir, quiet=console.settings.quiet,
        read=ReadOptions(config=config, layout=layout, optimizer=False), bar=console.progress_bar,
    )  # fmt: skip
    document = found.to_json()
    if output is not None:
        with appearing_whole(output) as part:
            part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        console.print_json(document)
    else:
        _show(found)
    console.warn(list(found.notes))


def _show(found: Evaluation) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("on", "metric", *(each.name for each in found.scores)):
        table.add_column(console.escape(title), justify="left" if title in ("on", "metric") else "right")
    cells: dict[tuple[str, str], list[str]] = {}

    def put(index: int, on: str, metric: str, text: str) -> None:
        cells.setdefault((on, metric), ["-"] * len(found.scores))[index] = text

    for index, scores in enumerate(found.scores):
        for name, score in scores.held_out.items():
            values = score.to_json()
            put(index, name, "documents", f"{values['documents']:,}")
            put(index, name, "nll per token", f"{values['nll']:.4f}")
            put(index, name, "perplexity", f"{values['perplexity']:.3f}")
            if values["bits_per_byte"] is not None:
                put(index, name, "bits per byte", f"{values['bits_per_byte']:.4f}")
        for name, task in scores.tasks.items():
            put(index, name, "samples", f"{task.samples:,}")
            for metric, value in task.metrics.items():
                error = task.stderr.get(metric)
                put(index, name, metric, f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    for (on, metric), row in cells.items():
        table.add_row(console.escape(on), console.escape(metric), *row)
    console.show(table)
    for each in found.comparisons:
        interval = "" if each.interval is None else f" [{each.interval[0]:+.4f}, {each.interval[1]:+.4f}]"
        console.line(
            f"{each.checkpoint} against {each.against}, {each.on} {each.metric}: {each.difference:+.4f}{interval}: "
            f"{each.verdict}"
        )
