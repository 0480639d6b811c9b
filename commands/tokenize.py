"""smolconv tokenize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from smolconv.commands import console
from smolconv.commands.app import app

if TYPE_CHECKING:
    from smolconv.continual_pretraining.tokens.tokenize import TokenizePlan

_EPILOG = """
**Examples**

    smolconv tokenize corpus/ tokens --model smollm2-hf --hold-out 0.5%

    smolconv tokenize notes/ tokens --tokenizer smollm2-hf --format txt

    smolconv tokenize a.parquet tokens --tokenizer smollm2-hf --text-key content

    smolconv tokenize corpus/ tokens --tokenizer chat-hf --eos '<|endoftext|>'

    smolconv tokenize corpus/ tokens --tokenizer t --executor slurm --tasks 64
"""


@app.command(epilog=_EPILOG)
def tokenize(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help=".jsonl(.gz, .zst), .parquet, .txt files, or folders of them."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Output folder; created only once it is complete.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="T", help="Folder, tokenizer.json, or owner/name on the Hub.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="SRC", help="Checkpoint, or hf://owner/name, whose tokenizer to use.")
    ] = None,
    format_: Annotated[
        Literal["jsonl", "parquet", "txt"] | None,
        typer.Option("--format", metavar="NAME", help="Read every file as jsonl, parquet or txt. Default: by suffix."),
    ] = None,
    hold_out: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Hold out a share of the documents, such as 0.5%.")
    ] = None,
    hold_out_output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for held-out documents. Default: OUTPUT-held-out.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    separator: Annotated[
        str | None, typer.Option(help="Split .txt files at this text. Default: one document a file.")
    ] = None,
    eos: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Token that ends each document. Default: the tokenizer's own.")
    ] = None,
    no_eos: Annotated[bool, typer.Option("--no-eos", help="Add no token at the end of documents.")] = False,
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the documents' order within a task. Default: 0.")
    ] = None,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="Keep the documents in order.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tasks at a time. Default: one per core; on Slurm no limit.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Divide the input files among N tasks. Default: one per 100 MB.")
    ] = None,
    max_tokens_per_file: Annotated[
        int | None, typer.Option(min=1, help="Start a new file after the document that exceeds this.")
    ] = None,
    executor: Annotated[
        Literal["local", "slurm"], typer.Option(metavar="NAME", help="local, or slurm: a job array.")
    ] = "local",
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    time: Annotated[str, typer.Option(help="Slurm's time limit per task.")] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option(min=1, help="Slurm's CPUs per task.")] = 1,
    mem_per_cpu: Annotated[int, typer.Option(min=1, help="Slurm's memory per CPU, in GB.")] = 2,
    qos: Annotated[str | None, typer.Option(help="Slurm's quality of service.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT once the new is complete.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished tasks of an interrupted run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Turn text into token files for training, with datatrove."""
    from smolconv.continual_pretraining.tokens.tokenize import (
        SlurmOptions,
        TokenizeOptions,
        lost_with_tokens,
        plan_tokenization,
        run_local,
        submit_to_slurm,
    )
    from smolconv.errors import UsageError
    from smolconv.storage.atomic import refuse_existing

    if executor == "slurm" and partition is None:
        raise UsageError("--executor slurm needs --partition; sinfo lists them.")
    if no_eos and eos is not None:
        raise UsageError("--eos and --no-eos contradict each other.")
    if no_shuffle and shuffle_seed is not None:
        raise UsageError("--shuffle-seed and --no-shuffle contradict each other.")
    refuse_existing(target, overwrite, lost_with_tokens)
    plan = plan_tokenization(
        inputs, target,
        TokenizeOptions(
            tokenizer=tokenizer, model=model, format=format_, hold_out=hold_out, hold_out_target=hold_out_output,
            eos=eos, no_eos=no_eos, text_key=text_key, separator=separator,
            shuffle_seed=None if no_shuffle else shuffle_seed or 0, max_tokens_per_file=max_tokens_per_file,
            tasks=tasks,
        ),
    )  # fmt: skip
    document: dict[str, Any] = plan.to_json()
    if not as_json:
        _say_plan(plan)
    if dry_run:
        document["dry_run"] = True
        if not as_json:
            console.say("Nothing was written.")
    elif executor == "slurm":
        assert partition is not None
        slurm = SlurmOptions(
            partition=partition, time=time, cpus_per_task=cpus_per_task, mem_per_cpu_gb=mem_per_cpu, qos=qos,
            account=account,
        )  # fmt: skip
        document |= submit_to_slurm(plan, slurm, workers=workers, overwrite=overwrite, resume=resume)
        if not as_json:
            jobs = document["jobs"]
            console.say(
                f"jobs {jobs['tokenize']} (tasks) and {jobs['finish']} (names the folder); {document['script']}"
            )
            console.line(str(target))
    else:
        result = run_local(
            plan, workers=workers, overwrite=overwrite, resume=resume, show=console.settings.verbose,
            bar=console.progress_bar,
        )  # fmt: skip
        console.warn(result.warnings)
        document |= {
            "files": list(result.files),
            "documents": result.documents,
            "tokens": result.tokens,
            "held_out_documents": result.held_out_documents,
            "held_out_tokens": result.held_out_tokens,
            "seconds": result.seconds,
            "warnings": list(result.warnings),
        }
        if not as_json:
            console.say(
                f"{result.documents:,} documents, {result.tokens:,} tokens in {_count(len(result.files), 'file')}, "
                f"{result.seconds:.1f} s ({console.number(result.tokens / max(result.seconds, 1e-9))} tokens/s)"
            )
            if plan.held_out is not None:
                held = _count(result.held_out_documents, "document")
                console.say(f"held out: {held}, {result.held_out_tokens:,} tokens in {plan.held_out}")
            console.line(_recipe_lines(plan, held_out=result.held_out_documents > 0))
    if as_json:
        console.print_json(document)


def _say_plan(plan: TokenizePlan) -> None:
    ending = (
        "no token: set data.boundaries: index in the recipe" if plan.eos_token is None
        else f"{plan.eos_token} (id {plan.eos_token_id}), by {plan.eos_from}"
    )  # fmt: skip
    order = "in order" if plan.options.shuffle_seed is None else f"shuffled with seed {plan.options.shuffle_seed}"
    console.say(plan.found.account)
    if plan.found.advice is not None:
        console.say(plan.found.advice)
    console.say(
        f"{_count(len(plan.inputs), 'file')}, {console.size(plan.input_bytes)}, in {_count(plan.tasks, 'task')}, "
        f"documents {order}\n"
        f"tokenizer {plan.tokenizer}: {plan.vocab_size} entries, {plan.token_bytes} bytes a token\n"
        f"documents end in {ending}"
    )
    if plan.held_out is not None:
        console.say(f"{plan.options.hold_out} of the documents, by a hash of their text, go to {plan.held_out}")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _recipe_lines(plan: TokenizePlan, *, held_out: bool) -> str:
    import yaml

    # The schema requires an EOS; with boundaries by index it is not used.
    data: dict[str, Any] = {"eos_token_id": plan.eos_token_id or 0}
    if plan.eos_token is None:
        data["boundaries"] = "index"
    data["stages"] = [{"name": "stable", "sources": [{"path": str(plan.target)}]}]
    document: dict[str, Any] = {"data": data}
    if held_out:
        document["evaluation"] = {"every_steps": 100, "sources": [{"path": str(plan.held_out)}]}
    return str(yaml.safe_dump(document, sort_keys=False)).rstrip()
