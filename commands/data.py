"""smolconv data"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smolconv.commands import console
from smolconv.commands.app import app

data = typer.Typer(
    help="Inspect the token files that training reads.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.add_typer(data, name="data")

_EPILOG = """
**Examples**

    smolconv data inspect tokens

    smolconv data inspect tokens --tokenizer smollm2-hf --documents 5

    smolconv data inspect tokens --eos 0 --json
"""


@data.command(epilog=_EPILOG)
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of datatrove's token files (.ds).")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, tokenizer.json or owner/name, to show documents as text.")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many of the first documents to show.")] = 3,
    sequence_length: Annotated[
        int, typer.Option(min=1, max=1 << 40, help="The recipe's sequence_length, to count windows.")
    ] = 2048,
    eos: Annotated[
        int | None, typer.Option(min=0, metavar="ID", help="The recipe's data.eos_token_id; exit 3 if it is not.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Show what a folder of token files holds: documents, lengths, how they end, windows, text."""
    from smolconv.continual_pretraining.tokens.report import eos_ends_documents, report_tokens

    loaded = None
    if tokenizer is not None:
        from smolconv.continual_pretraining.tokens.tokenizer import find_tokenizer, load_tokenizer

        loaded = load_tokenizer(find_tokenizer(tokenizer))
    report = report_tokens(
        folder, sequence_length=sequence_length, eos_token_id=eos, documents=documents, tokenizer=loaded
    )
    if as_json:
        console.print_json(report)
    else:
        _show(report)
    if eos is not None and not eos_ends_documents(report):
        raise typer.Exit(3)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    lengths, eos, windows = report["lengths"], report["eos"], report["windows"]
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = [
        ("files", f"{len(report['files'])}, of {report['token_bytes']}-byte tokens"),
        ("tokenizer", report["tokenizer"] or "not named"),
        ("tokens", f"{report['tokens']:,} (highest id seen {report['highest_id']})"),
        ("documents", "unknown" if report["documents"] is None else f"{report['documents']:,}"),
    ]
    if lengths is not None:
        names = ("min", "median", "mean", "p90", "p99", "max")
        rows.append(("lengths", ", ".join(f"{name} {lengths[name]:,.0f}" for name in names)))
    if eos is not None:
        token = next((end["token"] for end in report["endings"] if end["id"] == eos["id"]), None)
        named = f" ({token})" if token else ""
        rows.append(("end", f"{eos['documents_ending']:,} of {eos['documents_seen']:,} in id {eos['id']}{named}"))
    per_window = report["documents_per_window"]
    rows.append(
        (
            "windows",
            f"{windows:,} of {report['sequence_length']} + 1 tokens; {report['tail_share']:.2%} of the tokens are lost "
            "to the files' tails" + (f"; {per_window:.1f} documents in each" if per_window else ""),
        )
    )
    if report["masked_share"] is not None:
        rows.append(("loss mask", f"{report['masked_share']:.2%} of the tokens are not trained on"))
    if report["scanned_tokens"] < report["tokens"]:
        rows.append(("scanned", f"the first {console.number(report['scanned_tokens'])} tokens; for lengths, all"))
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", console.escape(value))
    console.show(table)
    if lengths is not None:
        _show_histogram(lengths["histogram"])
    for number, document in enumerate(report["first_documents"]):
        text = document["text"] if "text" in document else " ".join(map(str, document["ids"][:64]))
        text = text if len(text) <= 400 else f"{text[:200]} [...] {text[-200:]}"
        cut = "" if "text" in document or len(document["ids"]) <= 64 else " ..."
        console.show(f"\n[bold]document {number}[/], {document['tokens']:,} tokens")
        console.line(console.printable(text) + cut)
    console.warn(report["problems"])


def _show_histogram(bins: list[dict[str, int]]) -> None:
    from rich.table import Table

    most = max(each["documents"] for each in bins)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    for each in bins:
        bar = "█" * round(40 * each["documents"] / most) or ("▏" if each["documents"] else "")
        table.add_row(f"{each['from']:,} to {each['below'] - 1:,}", f"{bar} {each['documents']:,}")
    console.show(table)
