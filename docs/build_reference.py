"""Write docs/reference.md from the commands' help and the API's docstrings: ``make reference``. A test compares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import smolconv
import smolconv.commands.main
from smolconv.commands.app import app

REFERENCE = Path(__file__).resolve().parent / "reference.md"
_HEAD = """# Reference

Written by `make reference` from the commands' help and the docstrings. Exit codes and JSON fields, on which scripts
rely, are in [cli.md](cli.md).
"""


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with the words that call it."""
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*words, name))
        else:
            yield " ".join((*words, name)), found


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _kind(type_: Any) -> str:
    if hasattr(type_, "choices"):
        return "{" + ",".join(map(str, type_.choices)) + "}"
    return "N" if type_.name.startswith(("integer", "int", "float")) else str(type_.name).upper()


def _command(words: str, command: Any) -> Iterator[str]:
    shown = [param for param in command.params if not getattr(param, "hidden", False) and param.name != "help"]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    yield f"## smolconv {' '.join([words, *(param.metavar or param.name.upper() for param in arguments)])}"
    yield ""
    yield from (inspect.cleandoc(command.help or "").replace("\f", "").splitlines())
    if shown:
        yield from ("", "| | |", "|---|---|")
    for param in shown:
        if param.param_type_name == "argument":
            names = param.metavar or param.name.upper()
        else:
            value = "" if param.is_flag else f" {param.metavar or _kind(param.type)}"
            names = ", ".join([*param.opts, *param.secondary_opts]) + value
        yield f"| `{_cell(names)}` | {_cell(param.help or '')} |"
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("    ")]
    if examples:
        yield from ("", "<!-- not run: examples of the help -->", "", *(f"    {line}" for line in examples))
    yield ""


def _member(name: str) -> Iterator[str]:
    found = getattr(smolconv, name)
    if inspect.isclass(found) and issubclass(found, Exception):
        return
    yield f"## smolconv.{name}"
    yield ""
    if not inspect.isclass(found):
        text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(found)))
        text = re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)
        yield from ("<!-- shown: its arguments -->", "", "```", f"{name}{text}", "```", "")
    yield from inspect.getdoc(found).replace("``", "`").splitlines()  # type: ignore[union-attr]
    for each, member in vars(found).items() if inspect.isclass(found) else ():
        if not each.startswith("_") and (doc := inspect.getdoc(member)) and not isinstance(member, str):
            yield from ("", f"- `.{each}`: {_cell(doc).replace('``', '`')}")
    yield ""


def reference() -> str:
    lines = [_HEAD]
    for words, command in commands(typer.main.get_command(app)):
        lines += _command(words, command)
    for name in smolconv.__all__:
        if callable(getattr(smolconv, name)):
            lines += _member(name)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
