"""smolconv inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smolconv.commands import console
from smolconv.commands.app import Architecture, SourceLayout, app
from smolconv.errors import counted, some_of

_EPILOG = """
**Examples**

    smolconv inspect checkpoints/nanotron

    smolconv inspect hf://HuggingFaceTB/SmolLM2-135M --json

    smolconv inspect converted --check
"""


@app.command(epilog=_EPILOG)
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, or hf://owner/name[/subfolder][@revision].")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor by its canonical name.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Re-read all bytes and compare every digest recorded for them.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Config to read instead of the source's own.")] = None,
    source_layout: SourceLayout = None,
    architecture: Architecture = None,
    step: Annotated[int | None, typer.Option(min=0, help="Step of a run folder. Default: the latest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Show a checkpoint's layout, shapes and progress, from headers alone."""
    from smolconv import api

    document = api.inspect(
        source, tensors=tensors, check=check, layout=source_layout, step=step, config=config, architecture=architecture
    )  # fmt: skip
    if as_json:
        console.print_json(document)
        return
    _show(document, source)


def _show(document: dict[str, Any], source: str) -> None:
    from rich.table import Table

    spec, topology, progress = document["spec"], document["topology"], document["progress"]
    nope = [i for i, on in enumerate(spec["use_rope"]) if not on]
    ranks = [f"{key.upper()} {topology[key]}" for key in ("tp", "pp", "dp") if topology[key] is not None]
    ranks += [f"ZeRO-{topology['zero_stage']}"] if topology["zero_stage"] is not None else []
    ranks += ["universal"] if topology["universal"] else []
    rows = [
        ("layout", " ".join([document["layout"], *ranks])),
        ("model", f"{document['architecture']}, {console.number(document['parameters'])} parameters"
                  f"{', tied' if document['tied'] else ', untied'}"),
        ("shape", f"{spec['num_layers']} layers, hidden {spec['hidden_size']}, heads {spec['num_heads']}/"
                  f"{spec['num_kv_heads']}, mlp {spec['intermediate_size']}, vocabulary {spec['vocab_size']}"),
        ("rope", f"theta {spec['rope_theta']:g}" + (f", scaling {spec['rope_scaling']}" if spec["rope_scaling"] else "")
                 + (f", NoPE in layers {_ranges(nope)}" if nope else "")),
        ("dtypes", ", ".join(f"{dtype} ({counted(count, 'tensor')})" for dtype, count in document["dtypes"].items())),
        ("optimizer", _optimizer(document)),
        ("progress", "none" if progress is None else _progress(progress)),
        ("files", f"{document['files']}, {console.size(document['bytes'])}"),
    ]  # fmt: skip
    if document["frozen"]:
        rows.append(("frozen", f"{counted(len(document['frozen']), 'parameter')}: {some_of(document['frozen'])}"))
    if (card := document["proof"]) is not None:
        verdict = "passed" if card["passed"] else "failed"
        rows.append(
            ("proof", f"{verdict} on {card['made']}, {card['a']} and {card['b']}; verify --check-proof repeats it")
        )
    if "checked" in document:
        rows.append(("digests", _digests(document)))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", console.escape(value))
    console.show(table)
    console.warn(document["problems"])
    if "tensors" in document:
        listing = Table(box=None, pad_edge=False)
        for title in ("tensor", "slot", "dtype", "shape"):
            listing.add_column(title)
        for tensor in document["tensors"]:
            listing.add_row(tensor["name"], tensor["slot"], tensor["dtype"], console.escape(str(tensor["shape"])))
        console.show(listing)


def _digests(document: dict[str, Any]) -> str:
    checked, bare = document["checked"], document["unchecked"]
    told = f"{checked} recorded digest{' holds' if checked == 1 else 's hold'}" if checked else "none was recorded"
    if not bare:
        return told
    by_reason: dict[str, list[str]] = {}
    for entry in bare:
        by_reason.setdefault(entry["reason"], []).append(Path(entry["path"]).name)
    return told + "".join(f"; NOT CHECKED: {some_of(names)} ({reason})" for reason, names in by_reason.items())


def _ranges(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (f", ... {layers[-1]}" if len(layers) > 4 else "")


def _optimizer(document: dict[str, Any]) -> str:
    if not document["has_optimizer"]:
        return "none"
    decays = [f"{group['hyperparameters'].get('weight_decay', '?')}" for group in document["groups"]]
    groups = counted(len(decays), "group")
    steps = " or ".join(f"{step:g}" for step in document["adam_steps"])
    noun = "step" if steps == "1" else "steps"
    master = ", fp32 masters" if "master" in document["slots"] else ""
    return f"Adam after {steps} {noun}, {groups} (weight decay {', '.join(decays)}){master}"


def _progress(progress: dict[str, Any]) -> str:
    tokens = progress["consumed_tokens"]
    stages = [stage["name"] for stage in progress["stages"]]
    return (
        f"step {progress['step']}"
        + (f", {console.number(tokens)} tokens" if tokens is not None else "")
        + (f", stage {stages[progress['last_stage_index'] or 0]!r} of {len(stages)}" if stages else "")
    )
