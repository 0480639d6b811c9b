"""smolconv plan"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolconv.commands import console
from smolconv.commands.app import app
from smolconv.errors import UsageError, counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smolconv.continual_pretraining.estimate.plan import Option, Plan
    from smolconv.continual_pretraining.recipe.schema import Recipe
    from smolconv.models.spec import ModelSpec

_EPILOG = """
**Examples**

    smolconv plan my.yaml --gpus 8,96,384 --gpu h100

    smolconv plan my.yaml --gpus 16 --gpu a100-40gb --network 200
"""
#: Gbit/s, of --network
_MOST_NETWORK = 100_000


@app.command(epilog=_EPILOG)
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    gpus: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of GPUs, such as 8,96,384.")],
    gpu: Annotated[str, typer.Option(metavar="NAME", help="Type of the GPUs: h100, h200, a100-80gb, ...")] = "h100",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to use per GPU, such as 70GB. Default: all.")
    ] = None,
    network: Annotated[
        float, typer.Option(metavar="GBIT/S", help="Bandwidth per GPU to other nodes. Default: 400.")
    ] = 400.0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe. Repeatable.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Settings shown for each number of GPUs.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, with all settings.")] = False,
) -> None:
    """Find settings that fit the GPUs, the fastest first: ZeRO stage, micro-batch, sequence ranks, offload and more."""
    from smolconv.continual_pretraining.estimate.hardware import find_gpu
    from smolconv.continual_pretraining.estimate.plan import check_gpus, divisions_that_fit
    from smolconv.continual_pretraining.recipe.files import load_recipe

    counts, kind = _counts(gpus), find_gpu(gpu)
    check_gpus(counts)
    if not 0 < network <= _MOST_NETWORK:
        raise UsageError(f"--network {network:g}: expected Gbit/s of one GPU, above 0 and at most {_MOST_NETWORK:,}.")
    memory_bytes = kind.memory_bytes if memory is None else _size(memory)
    given = load_recipe(recipe, set_ or [])
    spec, first_step = _read(given)
    plans = [
        divisions_that_fit(
            given, spec, count, kind, network=network * 1e9 / 8, memory_bytes=memory_bytes, first_step=first_step
        )
        for count in counts
    ]
    if as_json:
        document: dict[str, Any] = {
            "schema": 1, "recipe": given.name, "gpu": kind.name, "memory_bytes": memory_bytes,
            "network_gbit": network, "first_step": first_step, "plans": [each.to_json() for each in plans],
        }  # fmt: skip
        console.print_json(document)
        return
    for each in plans:
        _show(each, recipe, set_ or [], memory_bytes, top)
    console.say(
        f"Times are estimates for {kind.name}, {network:g} Gbit/s a GPU between nodes, and documents as long as rows. "
        "docs/estimate.md compares them with published runs."
    )
    if given.loss.normalisation != "tokens":
        console.say(
            "The loss averages over micro-batches, so their size is kept. To vary it: --set loss.normalisation=tokens."
        )


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,12}\s*", word) for word in words):
        raise UsageError(f"--gpus {text:.60}: expected numbers separated by commas, such as 8,96,384.")
    return [int(word) for word in words]


def _size(text: str) -> int:
    from smolconv.layouts.huggingface.writer import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise UsageError(f"--memory {text:.60}: expected a size, such as 70GB.") from None


def _read(recipe: Recipe) -> tuple[ModelSpec, int]:
    """The spec of the trained model, from headers alone, and the first step."""
    from smolconv.continual_pretraining.run.start import check_model, completed_steps, read_source
    from smolconv.hub.download import open_source
    from smolconv.hub.published import with_published_progress

    uri = recipe.model.source
    source, trained = read_source(recipe, open_source(uri, headers_only=True))
    # The plan tries other numbers of sequence ranks anyway.
    alone = recipe.parallelism.model_copy(update={"sequence_ranks": 1})
    check_model(recipe.model_copy(update={"parallelism": alone}), trained.spec, uri)
    source = with_published_progress(source, uri)
    return trained.spec, completed_steps(recipe, source.progress) + 1


# --- output as text
# -----------------------------------------------------------------------------------------------------


def _show(found: Plan, recipe: str, changes: list[str], memory_bytes: int, top: int) -> None:
    from rich.table import Table

    console.line(f"# {counted(found.gpus, 'GPU')}")
    options = [found.nearest] if found.nearest is not None else list(found.smaller_and_smaller())
    if not options:
        console.line(f"{found.reason}\n")
        return
    if found.nearest is not None:
        lacking = found.nearest.gpu_bytes - memory_bytes
        console.line(
            f"Nothing fits {console.size(memory_bytes)}. The smallest setting lacks {console.size(lacking)} per GPU:"
        )
    table = Table(box=None, pad_edge=False)
    for title in ("", "ZeRO", "offload", "sequence ranks", "micro-batch", "accumulation", "checkpointing", "memory",
                  "host", "tokens/s a GPU", "run", "limited by"):  # fmt: skip
        table.add_column(title, justify="left" if title in ("offload", "checkpointing", "limited by") else "right")
    for number, option in enumerate(options[:top], 1):
        table.add_row(*_row(number, option, memory_bytes))
    console.show(table)
    if found.options:
        words = ["smolconv", "continue-train", recipe, *_sets(changes), *found.options[0].words]
        console.line(f"{shlex.join(words)}")
    console.line("")


def _row(number: int, option: Option, memory_bytes: int) -> Iterable[str]:
    from smolconv.continual_pretraining.estimate.report import duration

    return (
        str(number), str(option.zero_stage), option.offload, str(option.sequence_ranks),
        str(option.micro_batch_sequences), str(option.accumulation_steps), option.checkpointing,
        f"{option.gpu_bytes / 1e9:.1f} of {memory_bytes / 1e9:g} GB",
        f"{option.host_bytes / 1e9:.1f} GB" if option.host_bytes else "-",
        f"{option.tokens_per_second:,.0f}", duration(option.days * 86_400), option.limit,
    )  # fmt: skip


def _sets(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]
