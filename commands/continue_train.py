"""smolconv continue-train"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolconv.commands import console
from smolconv.commands.app import app
from smolconv.continual_pretraining.launchers.registry import LauncherName, find_launcher
from smolconv.errors import UsageError

if TYPE_CHECKING:
    from smolconv.continual_pretraining.launchers.preflight import Preflight

_EPILOG = """
**Examples**

    smolconv continue-train try-out --dry-run

    smolconv continue-train my.yaml --set schedule.train_steps=2000

    smolconv continue-train my.yaml --launcher slurm --nnodes 4

The same command resumes a run that was stopped. It exits with 0 when all steps are done, 75 when a signal stopped it
after a save, and 6 when training stopped itself.
"""


@app.command("continue-train", epilog=_EPILOG)
def continue_train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe. Repeatable.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the recipe, DeepSpeed's JSON, the estimate and the launch; change nothing."
        ),
    ] = False,
    launcher: Annotated[LauncherName | None, typer.Option(help="Override the recipe's launch.launcher.")] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per node. Default: one per GPU.")] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Nodes.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Hostfile for deepspeed: lines of `host slots=N`.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="{auto,never,PATH}", help="auto: from the run's last checkpoint, if any. PATH: step-N, or a run."
        ),
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder of the run; overrides the recipe's output.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON document on stdout.")] = False,
) -> None:
    """Continue pretraining from a checkpoint of any layout with a recipe, or resume a run that was stopped."""
    from smolconv.continual_pretraining.launchers.launch import launch
    from smolconv.continual_pretraining.launchers.preflight import preflight
    from smolconv.continual_pretraining.recipe.files import load_recipe, notes
    from smolconv.continual_pretraining.run.folder import as_it_began, check_run, refuse_trained, write_recipe

    options = {
        "launch.launcher": launcher, "launch.ranks_per_node": nproc_per_node, "launch.nodes": nnodes,
        # Quoted, because a file's name may look like a number or contain a YAML comment.
        "launch.hostfile": hostfile and json.dumps(str(hostfile)), "output": output and json.dumps(str(output)),
    }  # fmt: skip
    given = load_recipe(
        recipe, [*(set_ or []), *(f"{name}={value}" for name, value in options.items() if value is not None)]
    )
    run = Path(given.output).absolute()
    if resume not in ("auto", "never"):
        resume = str(Path(resume).absolute())
    given = as_it_began(given, run, resume)
    told = [*notes(given), *check_run(given, run, resume)]
    if as_json and not dry_run:
        raise UsageError("--json needs --dry-run. The numbers of a run are in its metrics.jsonl.")
    if not dry_run:
        refuse_trained(run)
    found = preflight(given, run, resume)
    if dry_run:
        _show_plan(found, resume, told, as_json=as_json)
        return
    found.refuse()
    for line in [*told, *found.notes]:
        console.say(line)
    write_recipe(given, run)
    raise typer.Exit(launch(given, run, resume=resume))


def _show_plan(found: Preflight, resume: str, told: list[str], *, as_json: bool) -> None:
    """Show the dry run. Afterwards raises the error with which a start would refuse the run, if any."""
    from smolconv.continual_pretraining.estimate.estimate import estimate
    from smolconv.continual_pretraining.estimate.report import render
    from smolconv.continual_pretraining.launchers.launch import batch_script, launch_command
    from smolconv.continual_pretraining.recipe.files import dump_recipe

    recipe, run, spec, engine = found.recipe, found.run, found.spec, found.engine
    if spec is None or engine is None:
        found.refuse()
    assert spec is not None and engine is not None
    told = [*told, *found.notes, *found.told]
    plan = estimate(
        recipe, spec, found.world_size, first_step=found.first_step, tokens_per_source=found.tokens,
        on_gpus=found.on_gpus,
    )  # fmt: skip
    if plan.steps == 0:
        told.append(
            f"all {plan.train_steps:,} steps are done: nothing would be trained"
            f"{'' if recipe.export is None else ', only exported again'}. Raise schedule.train_steps to continue, or "
            "start another run with another --output."
        )
    launcher, words = recipe.launch.launcher, launch_command(recipe, run, resume=resume)
    script = batch_script(recipe, run, resume=resume)
    if as_json:
        document: dict[str, Any] = {
            "schema": 1, "recipe": recipe.model_dump(mode="json"), "run": str(run), "world_size": found.world_size,
            "deepspeed": engine, "estimate": plan.to_json(),
            "problems": [f"{type(problem).__name__}: {problem}" for problem in found.problems],
            "launch": {"launcher": launcher, "command": words, "script": script},
        }  # fmt: skip
        console.print_json(document)
        for line in told:
            console.say(line)
        if (error := found.error) is not None:
            console.say(f"{type(error).__name__}: {error}")
            raise typer.Exit(error.exit_code)  # the JSON document is already printed
        return
    console.line(f"# The recipe, with all defaults\n{dump_recipe(recipe)}")
    console.line(f"# DeepSpeed's JSON for {found.world_size} ranks\n{json.dumps(engine, indent=2)}\n")
    for title, rows in render(plan):
        console.line(f"# {title}")
        width = max((len(label) for label, _ in rows), default=0)
        for label, value in rows:
            console.line(f"{label:<{width}}  {value}".strip())
        console.line("")
    if script is not None:
        console.line(f"# For sbatch; kept in {run}/slurm\n{script}")
    else:
        times = (
            f", {found.world_size} times, with RANK, WORLD_SIZE and MASTER_ADDR"
            if find_launcher(launcher).starts_each_rank
            else ""
        )
        console.line(f"# The launcher runs{times}\n{shlex.join(words)}\n")
    for line in told:
        console.say(line)
    found.refuse()
