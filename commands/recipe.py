"""smolconv recipe"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolconv.commands import console
from smolconv.commands.app import app

if TYPE_CHECKING:
    from smolconv.continual_pretraining.recipe.nanotron import Translation

recipe_app = typer.Typer(help="Recipes for continue-train: list, show, copy, translate.", no_args_is_help=True)
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
**Example**

    smolconv recipe init try-out my.yaml
"""
_VALIDATE = """
**Examples**

    smolconv recipe validate try-out

    smolconv recipe validate my.yaml --set schedule.train_steps=2000

`smolconv continue-train my.yaml --dry-run` looks at what must be there for a start: source, data, packages, disk.
"""
_SCHEMA = """
**Example**

    smolconv recipe schema > recipe.schema.json

`recipe init` writes a first line by which editors with a YAML language server find the schema.
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
    """Name the recipes that ship with smolconv."""
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
    """Print a recipe as it is written, with its comments."""
    from smolconv.continual_pretraining.recipe.files import read_recipe

    console.line(read_recipe(name).rstrip("\n"))


@recipe_app.command(epilog=_INIT)
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or a file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    overwrite: _Overwrite = False,
) -> None:
    """Copy a recipe to a file of your own, to be edited."""
    from smolconv.continual_pretraining.recipe.files import read_recipe
    from smolconv.continual_pretraining.recipe.json_schema import with_modeline

    _write(out, with_modeline(read_recipe(name)), overwrite)
    console.line(str(out))


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
    """The fields that were not carried, grouped by why."""
    reasons: dict[str, list[str]] = {"unknown to smolconv": list(made.unknown)} if made.unknown else {}
    for field, reason in made.dropped.items():
        reasons.setdefault(reason, []).append(field)
    return [f"{reason}: {_joined(fields)}" for reason, fields in reasons.items()]


def _joined(fields: list[str]) -> str:
    """What dotted names have in common once, as the shell writes it: general.{project, run}."""
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
