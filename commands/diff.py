"""smolconv diff"""

from __future__ import annotations

from typing import Annotated

import typer

from smolconv.commands import console
from smolconv.commands.app import Architecture, LayoutA, LayoutB, app

_EPILOG = """
**Examples**

    smolconv diff checkpoints/nanotron smollm2-hf

    smolconv diff before after --json
"""


@app.command(epilog=_EPILOG)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, or hf://owner/name[/subfolder][@revision].")],
    b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint to compare it with, in any layout.")],
    layout_a: LayoutA = None,
    layout_b: LayoutB = None,
    architecture: Architecture = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Compare two checkpoints' specs, and their tensors' names, shapes and dtypes. Exit 1 if they differ.

    It reads no tensor; **smolconv verify** compares values.
    """
    from smolconv import api

    document = api.diff(a, b, layout_a=layout_a, layout_b=layout_b, architecture=architecture)
    if as_json:
        console.print_json(document)
    else:
        for line in document["spec_differences"]:
            console.line(f"spec    {console.printable(line)}")
        for side, key in (("A", "only_a"), ("B", "only_b")):
            for entry in document[key][:20]:
                console.line(f"only {side}  {entry['name']} ({entry['slot']})")
            if len(document[key]) > 20:
                console.show(f"only {side}  ... and {len(document[key]) - 20} more (--json lists all)")
        for entry in document["changed"][:20]:
            text = f"{entry['name']} ({entry['slot']}): {entry['dtype_a']} {entry['shape_a']} in A, {entry['dtype_b']} "
            console.line(f"tensor  {text}{entry['shape_b']} in B")
        if len(document["changed"]) > 20:
            console.show(f"tensor  ... and {len(document['changed']) - 20} more (--json lists all)")
        if document["same"]:
            console.show("the same spec and the same tensors by name, shape and dtype")
    if not document["same"]:
        raise typer.Exit(1)
