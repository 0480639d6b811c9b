"""smolconv recipe"""

from __future__ import annotations

import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolconv.commands import console
from smolconv.commands.app import app

if TYPE_CHECKING:
    from smolconv.continual_pretraining.recipe.nanotron import Translation

recipe_app = typer.Typer(
    help="Manage recipes for continue-train: list, show, write, check, translate.", no_args_is_help=True
)
app.add_typer(recipe_app, name="recipe")

_LIST = """
**Examples**

    smolconv recipe list

    smolconv recipe list --json
"""
_SHOW = """
**Example**

    smolconv recipe show smollm3-3b-decay
"""
_INIT = """
**Examples**

    smolconv recipe init my.yaml

    smolconv recipe init my.yaml --source smollm2 --data tokens/mine --gpus 8

    smolconv recipe init try-out my.yaml

`smolconv tokenize` writes token files. On a terminal, the command asks for missing options. It chooses batch, ZeRO
stage and checkpointing so that the model fits; you can edit every number.
"""
_VALIDATE = """
**Examples**

    smolconv recipe validate try-out

    smolconv recipe validate my.yaml --set schedule.train_steps=2000

`smolconv continue-train my.yaml --dry-run` checks what a start needs: source, data, packages, disk.
"""
_SCHEMA = """
**Example**

    smolconv recipe schema > recipe.schema.json

`recipe init` writes a first line with which editors that have a YAML language server find the schema.
"""
_FROM_NANOTRON = """
**Examples**

    smolconv recipe from-nanotron 10000/config.yaml my.yaml --source .

    smolconv recipe from-nanotron stage1_8T.yaml smollm3.yaml --eos 128001
"""
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


@recipe_app.command("list", epilog=_LIST)
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the recipes that ship with smolconv."""
    from smolconv.continual_pretraining.recipe.files import load_recipe, shipped_recipes

    found = [
        {"name": name, "description": load_recipe(path).description, "path": str(path)}
        for name, path in shipped_recipes().items()
    ]
    if as_json:
        console.print_json({"schema": 1, "recipes": found})
        return
    width = max(len(one["name"]) for one in found)
    for one in found:
        console.line(f"{one['name']:<{width}}  {one['description']}")


@recipe_app.command(epilog=_SHOW)
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or a file.")]) -> None:
    """Print a recipe's text, with its comments."""
    from smolconv.continual_pretraining.recipe.files import read_recipe

    console.line(read_recipe(name).rstrip("\n"))


@recipe_app.command(epilog=_INIT)
def init(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME] [OUT]", help="Recipe to copy (shipped, or a file), and the file to write."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Checkpoint of any layout, or hf://owner/name.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Token files to train on. Repeatable.")
    ] = None,
    held_out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Token files to evaluate on.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Number of GPUs; 0: train on CPUs.")] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="Type of the GPUs, as for smolconv plan.")] = "h100",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. Default: one epoch, at most 1,000.")] = None,
    eos: Annotated[int | None, typer.Option(min=0, help="Token that ends a document. Default: the data's.")] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Write a recipe that can start, from a few answers; or copy one (NAME OUT) to edit."""
    from smolconv.continual_pretraining.recipe.files import read_recipe
    from smolconv.continual_pretraining.recipe.json_schema import with_modeline
    from smolconv.errors import UsageError

    given = names or []
    answers = {"--source": source, "--data": data, "--held-out": held_out, "--gpus": gpus, "--steps": steps}
    if len(given) > 2:
        raise UsageError(f"{len(given)} names were given; expected NAME OUT to copy a recipe, or OUT alone.")
    if len(given) == 2:
        if asked := [name for name, value in answers.items() if value]:
            raise UsageError(f"{asked[0]} is for a new recipe, but NAME OUT copies one. Drop one of them.")
        out, text = Path(given[1]), with_modeline(read_recipe(given[0]))
    else:
        out = Path(given[0] if given else "recipe.yaml")
        _refuse_shipped(out)
        if out.exists() and not overwrite:
            raise UsageError(f"{out} exists. Choose another name, or replace it with --overwrite.")
        text = _composed(out, source, data, held_out, gpus=gpus, gpu=gpu, steps=steps, eos=eos)
    _write(out, text, overwrite)
    console.line(str(out))


def _refuse_shipped(out: Path) -> None:
    """Explain that ``init try-out`` lacks the second argument."""
    from smolconv.continual_pretraining.recipe.files import shipped_recipes
    from smolconv.errors import UsageError

    if str(out) in shipped_recipes():
        raise UsageError(f"recipe init {out}: expected the file to write, too: smolconv recipe init {out} {out}.yaml")


def _composed(
    out: Path, source: str | None, data: list[Path] | None, held_out: Path | None, *, gpus: int | None, gpu: str,
    steps: int | None, eos: int | None,
) -> str:  # fmt: skip
    """The text of a new recipe; asks for missing options on a terminal."""
    from smolconv.continual_pretraining.estimate.first_recipe import Answers, Data, first_recipe, recipe_name
    from smolconv.continual_pretraining.estimate.hardware import find_gpu
    from smolconv.continual_pretraining.launchers.launcher import count_gpus
    from smolconv.continual_pretraining.tokens.files import TokenFolder
    from smolconv.doctor import machine_memory_bytes
    from smolconv.errors import UsageError
    from smolconv.hub.download import open_source
    from smolconv.layouts.registry import read_checkpoint
    from smolconv.processes import usable_cores

    source = source or _asked("--source", "Checkpoint to start from (a folder, or hf://owner/name)")
    checkpoint = read_checkpoint(open_source(source, headers_only=True))
    data = data or [Path(word) for word in _asked("--data", "Folder of token files to train on").split()]
    folders = [TokenFolder.open(path, 1, vocab_size=checkpoint.spec.vocab_size) for path in data]
    if held_out is None and sys.stdin.isatty():
        held_out = Path(word) if (word := typer.prompt("Folder of held-out token files (empty: none)", "")) else None
    if held_out is not None:
        folders.append(TokenFolder.open(held_out, 1, vocab_size=checkpoint.spec.vocab_size))
    if gpus is None:
        found = count_gpus()
        gpus = typer.prompt("GPUs (0: CPUs)", default=found, type=int) if sys.stdin.isatty() else found
    ends = {folder.ends_in() for folder in folders} if eos is None else {eos}
    known = ends - {None}
    if len(known) != 1:
        shown = ", ".join(str(end) for end in sorted(known, key=str)) or "unknown tokens"
        raise UsageError(
            f"the documents of {', '.join(str(folder.path) for folder in folders)} end in {shown}.\n"
            "Expected one token that ends every document. Give it with --eos ID. For text that was tokenised without "
            "one, give any ID, and add boundaries: index to the recipe's data."
        )
    answers = Answers(
        name=recipe_name(out), source=source, held_out=None if held_out is None else str(held_out),
        data=[Data(path=str(folder.path), tokens=folder.tokens) for folder in folders[: len(data)]],
        eos_token_id=int(known.pop() or 0), gpus=gpus, gpu=find_gpu(gpu), processes=min(2, usable_cores()),
        memory_bytes=machine_memory_bytes(), steps=steps,
    )  # fmt: skip
    return first_recipe(answers, checkpoint.spec)


def _asked(option: str, question: str) -> str:
    """Ask on the terminal. Raises ``UsageError`` without one."""
    from smolconv.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError(
            f"recipe init needs {option}, and cannot ask for it without a terminal.\n"
            "For example: smolconv recipe init my.yaml --source hf://HuggingFaceTB/SmolLM2-135M --data tokens/mine"
        )
    answer: str = typer.prompt(question)
    return answer


@recipe_app.command(epilog=_VALIDATE)
def validate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Check a recipe's fields; exit 2 with the line of every mistake."""
    from smolconv.continual_pretraining.recipe.files import load_recipe, notes

    found = load_recipe(recipe, set_ or [])
    remarks = notes(found)
    if as_json:
        console.print_json({"schema": 1, "recipe": found.model_dump(mode="json"), "notes": remarks})
        return
    for line in remarks:
        console.say(line)
    console.line(
        f"{recipe} is valid: {found.schedule.train_steps:,} steps of {found.tokens_per_step:,} tokens "
        f"from {found.model.source}"
    )


@recipe_app.command(epilog=_SCHEMA)
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and other programs."""
    from smolconv.continual_pretraining.recipe.json_schema import recipe_schema

    console.print_json(recipe_schema())


@recipe_app.command(epilog=_FROM_NANOTRON)
def from_nanotron(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="nanotron's training config.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    eos: Annotated[
        int | None, typer.Option(min=0, help="Token that ends a document. Default: the tokenizer's, where it is known.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Checkpoint to start from. Default: the one that CONFIG resumes from or writes.")
    ] = None,
    overwrite: _Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Translate nanotron's training YAML, and account for every field of it."""
    from smolconv.continual_pretraining.recipe.files import dump_recipe, notes
    from smolconv.continual_pretraining.recipe.nanotron import recipe_from_nanotron

    made = recipe_from_nanotron(config, eos=eos, source=source)
    account = _account(made)
    comments = "\n".join(f"#   {line}" for line in account)
    heading = f"# From nanotron's {config.name} by smolconv recipe from-nanotron. Not carried:\n{comments}\n\n"
    _write(out, heading + dump_recipe(made.recipe), overwrite)
    remarks = [*made.notes, *notes(made.recipe)]
    if as_json:
        document = {
            "schema": 1, "recipe": str(out), "carried": made.carried, "dropped": made.dropped,
            "unknown": made.unknown, "notes": remarks,
        }  # fmt: skip
        console.print_json(document)
        return
    total = len(made.carried) + len(made.dropped) + len(made.unknown)
    console.say(f"{len(made.carried)} of {total} fields carried, {len(made.unknown)} unknown. Not carried:")
    for line in account:
        console.say(f"  {line}")
    console.warn(remarks)
    console.line(str(out))


def _account(made: Translation) -> list[str]:
    """The dropped fields, grouped by reason."""
    reasons: dict[str, list[str]] = {"unknown to smolconv": list(made.unknown)} if made.unknown else {}
    for field, reason in made.dropped.items():
        reasons.setdefault(reason, []).append(field)
    return [f"{reason}: {_joined(fields)}" for reason, fields in reasons.items()]


def _joined(fields: list[str]) -> str:
    """Dotted names with their common prefix written once: general.{project, run}."""
    split = [field.split(".") for field in fields]
    common = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*split)))
    if len(fields) == 1 or not common:
        return ", ".join(fields)
    return f"{'.'.join(split[0][:common])}.{{{', '.join('.'.join(parts[common:]) for parts in split)}}}"


def _write(out: Path, text: str, overwrite: bool) -> None:
    from smolconv.errors import UsageError

    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists. Choose another name, or replace it with --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
