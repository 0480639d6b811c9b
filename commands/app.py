"""The Typer app that every command registers itself with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from smolconv.commands import console
from smolconv.version import __version__

app = typer.Typer(
    name="smolconv",
    help="Convert, verify and train SmolLM2 and SmolLM3 checkpoints of nanotron, Hugging Face and DeepSpeed.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Architecture = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel="Source", help="Read a nanotron Qwen2Config as smollm3 or qwen2."),
]

_LAYOUT_HELP = "hf, nanotron or deepspeed. Default: detected."


def _from(option: str, of: str) -> Any:
    return typer.Option(option, metavar="LAYOUT", rich_help_panel="Source", help=f"Layout of {of}: {_LAYOUT_HELP}")


_Layout = Literal["hf", "huggingface", "nanotron", "deepspeed", "ds"] | None
SourceLayout = Annotated[_Layout, _from("--from", "SRC")]
LayoutA = Annotated[_Layout, _from("--from", "A")]
LayoutB = Annotated[_Layout, _from("--from-b", "B")]


def _version(value: bool) -> None:
    if value:
        print(f"smolconv {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors and results only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print more about what is done.")] = False,
) -> None:
    console.settings.debug, console.settings.quiet, console.settings.verbose = debug, quiet, verbose
