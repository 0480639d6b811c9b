"""smolconv doctor"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolconv.commands import console
from smolconv.commands.app import app
from smolconv.errors import NotInstalled

if TYPE_CHECKING:
    from smolconv.doctor import CommandState, Diagnosis

_EPILOG = """
**Examples**

    smolconv doctor

    smolconv doctor --for continue-train      # exit 5 if it cannot run

    smolconv doctor --json
"""


_Command = Literal[
    "convert", "hub", "verify", "continue-train", "tokenize", "import-gguf", "evaluate"
]  # of doctor.EXTRAS


@app.command(epilog=_EPILOG)
def doctor(
    command: Annotated[
        _Command | None,
        typer.Option(
            "--for",
            metavar="COMMAND",
            help="Exit with 5 if it cannot run here: convert, hub, verify, continue-train, tokenize, import-gguf or "
            "evaluate.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Check what each command needs on this machine: packages that really import, GPUs, launchers, what would hang."""
    from smolconv.doctor import diagnose

    found = diagnose(console.progress_bar)
    if as_json:
        console.print_json(found.to_json())
    else:
        _show(found)
    if command is not None and not found.commands[command].ready:
        error = NotInstalled(f"{command} cannot run here: {_lacking(found.commands[command])}.")
        if not as_json:
            raise error
        console.say(f"{type(error).__name__}: {error}")
        raise typer.Exit(error.exit_code)  # the JSON document is already printed


def _lacking(state: CommandState) -> str:
    missing = [package.name for package in state.packages if package.version is None]
    broken = [f"{package.name}: {package.problem}" for package in state.packages if package.problem is not None]
    return "; ".join([*([f"{', '.join(missing)} missing, {state.install}"] if missing else []), *broken])


def _show(found: Diagnosis) -> None:
    from rich.table import Table

    machine, torch = found.machine, found.torch
    memory = "memory unknown" if machine.memory_bytes is None else f"{console.size(machine.memory_bytes)} memory"
    shared = machine.shared_memory_bytes
    rows = [
        ("smolconv", f"{found.smolconv}, Python {machine.python}, {machine.system}"),
        (
            "machine",
            f"{machine.cores} cores, {memory}, {console.size(machine.disk_free_bytes)} free on this disk"
            + ("" if shared is None else f", {console.size(shared)} in /dev/shm"),
        ),
    ]
    if torch is not None:
        gpus = ", ".join(f"{gpu['name']} ({console.size(gpu['bytes'])})" for gpu in torch["gpus"])
        instructions = "has" if torch["cpu_bf16"] else "has no"
        rows.append(("GPUs", gpus or f"torch sees none; the processor {instructions} bf16 instructions"))
        rows.append(("attention", f"{torch['attention']} in training"))
    faster = [f"{each.name} {each.version or 'not installed'}" for each in found.faster]
    rows.append(("on GPUs", ", ".join(faster)))
    launchers = [f"{name} (lacks {', '.join(lacks)})" if lacks else name for name, lacks in found.launchers.items()]
    rows.append(("launchers", ", ".join(launchers)))
    for name, state in found.commands.items():
        versions = ", ".join(f"{package.name} {package.version}" for package in state.packages if package.version)
        rows.append((name, f"ready: {versions}" if state.ready else f"not ready: {_lacking(state)}"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", console.escape(value))
    console.show(table)
    console.warn(list(found.problems))
