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
from smolconv.errors import SmolconvError, UsageError

if TYPE_CHECKING:
    from smolconv.continual_pretraining.recipe.schema import Recipe
    from smolconv.models.spec import ModelSpec

_EPILOG = """
**Examples**

    smolconv continue-train try-out --dry-run

    smolconv continue-train my.yaml --set schedule.train_steps=2000

    smolconv continue-train my.yaml --launcher slurm --nnodes 4

The same command goes on with a run that was stopped. It ends with 0 when all steps are done, 75 when it was stopped by
a signal and has saved, 6 when training stopped itself.
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
            "--dry-run", help="Show the recipe, DeepSpeed's JSON, the estimate and the launch; touch nothing."
        ),
    ] = False,
    launcher: Annotated[LauncherName | None, typer.Option(help="Instead of the recipe's launch.launcher.")] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each node. Default: one a GPU.")] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Nodes.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="For deepspeed: lines of `host slots=N`.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="{auto,never,PATH}", help="auto: from the run's last checkpoint, if any. PATH: step-N, or a run."
        ),
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="The run's folder, instead of the recipe's output.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON document on stdout.")] = False,
) -> None:
    """Continue pretraining from a checkpoint of any layout, by a recipe; or go on with a run that was stopped."""
    from smolconv.continual_pretraining.launchers.launch import launch, placement
    from smolconv.continual_pretraining.recipe.files import load_recipe, notes
    from smolconv.continual_pretraining.run.folder import as_it_began, check_run, write_recipe

    options = {
        "launch.launcher": launcher, "launch.ranks_per_node": nproc_per_node, "launch.nodes": nnodes,
        # Quoted: a file's name may be a number, or hold what YAML takes for a comment.
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
    if dry_run:
        _show_plan(given, run, resume, told, as_json=as_json)
        return
    if as_json:
        raise UsageError("a run's figures are in its metrics.jsonl; --json is for --dry-run.")
    placement(given)  # what cannot be run is refused before anything is written
    for line in told:
        console.say(line)
    write_recipe(given, run)
    raise typer.Exit(launch(given, run, resume=resume))


def _show_plan(recipe: Recipe, run: Path, resume: str, told: list[str], *, as_json: bool) -> None:
    from smolconv.continual_pretraining.engine.config import engine_config
    from smolconv.continual_pretraining.estimate.estimate import estimate
    from smolconv.continual_pretraining.estimate.report import render
    from smolconv.continual_pretraining.launchers.launch import batch_script, launch_command
    from smolconv.continual_pretraining.launchers.launcher import count_gpus
    from smolconv.continual_pretraining.recipe.files import dump_recipe

    tokens, problems = _tokens(recipe)
    spec, world_size, first_step, events = _start(recipe, run, resume, compare_data=not problems)
    told += events
    asked = find_launcher(recipe.launch.launcher).asks_for_gpus(recipe.launch)
    gpus = count_gpus() > 0 if asked is None else asked
    engine = engine_config(recipe, world_size, "nccl" if gpus else "gloo")
    plan = estimate(recipe, spec, world_size, first_step=first_step, tokens_per_source=tokens, on_gpus=gpus)
    if plan.steps == 0:
        told.append(
            f"all {plan.train_steps:,} steps are done: nothing would be trained"
            f"{'' if recipe.export is None else ', only exported again'}. Raise schedule.train_steps to train on, or "
            "begin another run with another --output."
        )
    launcher, words = recipe.launch.launcher, launch_command(recipe, run, resume=resume)
    script = batch_script(recipe, run, resume=resume)
    if as_json:
        for line in told:
            console.say(line)
        document: dict[str, Any] = {
            "schema": 1, "recipe": recipe.model_dump(mode="json"), "run": str(run), "world_size": world_size,
            "deepspeed": engine, "estimate": plan.to_json(), "problems": problems,
            "launch": {"launcher": launcher, "command": words, "script": script},
        }  # fmt: skip
        console.print_json(document)
        return
    console.line(f"# The recipe, with all defaults\n{dump_recipe(recipe)}")
    console.line(f"# DeepSpeed's JSON for {world_size} ranks\n{json.dumps(engine, indent=2)}\n")
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
            f", {world_size} times, with RANK, WORLD_SIZE and MASTER_ADDR"
            if find_launcher(launcher).starts_each_rank
            else ""
        )
        console.line(f"# What the launcher starts{times}\n{shlex.join(words)}\n")
    for line in told:
        console.say(line)
    console.warn(problems)


def _start(
    recipe: Recipe, run: Path, resume: str, *, compare_data: bool
) -> tuple[ModelSpec, int, int, tuple[str, ...]]:
    """The trained spec, from headers alone; the number of ranks; the first step; and what is to be said.

    The latter is of data that has changed, and of a theta that the recipe changes. Ranks refuse by the same functions.
    """
    from smolconv.continual_pretraining.launchers.launch import placement
    from smolconv.continual_pretraining.run.checkpoints import RunState, find_resume
    from smolconv.continual_pretraining.run.place import own_place, source_place
    from smolconv.continual_pretraining.run.start import (
        changed_text,
        check_model,
        completed_steps,
        plan_start,
        read_source,
    )
    from smolconv.hub.download import open_source
    from smolconv.hub.published import with_published_progress

    uri = recipe.model.source
    source, trained = read_source(recipe, open_source(uri, headers_only=True))
    check_model(recipe, trained.spec, uri)
    world_size = placement(recipe, trained.spec.num_heads).world_size
    own = find_resume(run, resume)
    changed = changed_text(source.spec, trained.spec)
    said = (changed,) if changed else ()
    if own is not None:
        state = RunState.read(own)
        events = own_place(recipe, own, state, trained.spec.vocab_size).events if compare_data else ()
        return trained.spec, world_size, state.step + 1, (*said, *events)
    plan_start(recipe, trained, run, world_size, optimizer=recipe.start.optimizer, uri=uri)
    source = with_published_progress(source, uri)
    step = completed_steps(recipe, source.progress)
    compare_data = compare_data and (recipe.start.data or recipe.start.learning_rate)
    events = source_place(recipe, source, step, trained.spec.vocab_size).events if compare_data else ()
    return trained.spec, world_size, step + 1, (*said, *events)


def _tokens(recipe: Recipe) -> tuple[dict[str, int], list[str]]:
    """By the sources' names; and what is wrong with them: a plan can be made before the data is there."""
    from smolconv.continual_pretraining.tokens.files import TokenFolder

    tokens: dict[str, int] = {}
    problems: list[str] = []
    for stage in recipe.data.stages:
        for name, source in zip(stage.names, stage.sources):
            try:
                tokens[name] = TokenFolder.open(source.path, recipe.data.sequence_length).tokens
            except SmolconvError as error:
                problems.append(f"{type(error).__name__}: {error}")
    return tokens, problems
