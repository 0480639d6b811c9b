"""smolconv convert"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from smolconv.commands import console
from smolconv.commands.app import Architecture, SourceLayout, app
from smolconv.errors import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smolconv.carried import Account
    from smolconv.conversion import ConversionPlan, ConversionResult

_EPILOG = """
**Examples**

    smolconv convert checkpoints/nanotron smollm2-hf --to hf --verify

    smolconv convert smollm2-hf resharded --to nanotron --tp 2 --pp 2

    smolconv convert smollm2-hf run --to deepspeed --zero-stage 1 --world-size 8

    smolconv convert ds-run smollm2-hf --to hf --dtype float32

    smolconv convert hf://HuggingFaceTB/SmolLM2-135M out --to nanotron --dry-run
"""


_SOURCE, _NANOTRON, _DEEPSPEED = "Source", "To nanotron", "To DeepSpeed (and nanotron's --zero-stage)"
_HF, _SAFETY = "To Hugging Face", "Safety and speed"


@app.command(epilog=_EPILOG)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, or hf://owner/name[/subfolder][@revision].")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output folder; created only once it is complete.")],
    to: Annotated[
        Literal["hf", "huggingface", "nanotron", "deepspeed", "ds"],
        typer.Option("--to", metavar="LAYOUT", help="Layout to write: hf, nanotron or deepspeed."),
    ],
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
        typer.Option(metavar="TYPE", help="Dtype of the weights: keep, float32, bfloat16, float16."),
    ] = "keep",
    cast_from: Annotated[
        Literal["weights", "master"] | None,
        typer.Option(metavar="WHICH", help="Cast from the stored weights, or from the fp32 master: weights, master."),
    ] = None,
    optimizer: Annotated[
        bool | None,
        typer.Option("--optimizer/--no-optimizer", help="Carry Adam's state. Default: when the source has it."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder or file of the tokenizer to copy.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep the first N rows of the vocabulary; drop the rest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to the Hub (owner/name), verified.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="PATH", rich_help_panel=_SOURCE, help="Config to read instead of the source's own."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", rich_help_panel=_SOURCE, help="Step of a run folder. Default: the latest."),
    ] = None,
    source_layout: SourceLayout = None,
    architecture: Architecture = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", rich_help_panel=_SOURCE, help="Checkpoint with the frozen weights that SRC left out."
        ),
    ] = None,
    rope_scaling: Annotated[
        Literal["as-trained", "as-configured"] | None,
        typer.Option(
            metavar="HOW",
            rich_help_panel=_SOURCE,
            help="as-trained drops nanotron's rope_scaling, which it ignores; as-configured keeps it. Default: "
            "as-configured only where it was imported and not trained since.",
        ),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_NANOTRON, help="Tensor-parallel ranks.")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_NANOTRON, help="Pipeline ranks.")
    ] = None,
    dp: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_NANOTRON, help="Data-parallel ranks.")
    ] = None,
    nanotron_config: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            rich_help_panel=_NANOTRON,
            help="Training config to write as config.yaml when the source has none.",
        ),
    ] = None,
    zero_stage: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=3,
            metavar="N",
            rich_help_panel=_DEEPSPEED,
            help="ZeRO stage of the optimizer files, 0 to 3; 0 or 1 for nanotron.",
        ),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=_DEEPSPEED, help="Data-parallel ranks, with --zero-stage."),
    ] = None,
    universal: Annotated[
        bool,
        typer.Option(
            "--universal", rich_help_panel=_DEEPSPEED, help="Write for ZeRO 1 to 3 at any world size (the default)."
        ),
    ] = False,
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            rich_help_panel=_DEEPSPEED,
            help="Parameter groups of the run that loads it: docs/deepspeed.md.",
        ),
    ] = None,
    sub_group_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=_DEEPSPEED, help="sub_group_size of the ZeRO-3 run. Default: 1e9."
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_DEEPSPEED, help="Tag to write. Default: SRC's, or global_stepN."),
    ] = None,
    program: Annotated[
        Literal["trainer", "accelerate"] | None,
        typer.Option(
            "--for",
            metavar="PROGRAM",
            rich_help_panel=_DEEPSPEED,
            help="Add the files that it resumes from: trainer, accelerate.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", rich_help_panel=_HF, help="Largest file of weights, such as 500MB.")
    ] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=_SAFETY, help="Print what would be written, and write nothing.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", rich_help_panel=_SAFETY, help="Verify the output before publishing it; exit 1 if it differs."
        ),
    ] = False,
    check_source: Annotated[
        bool,
        typer.Option("--check-source", rich_help_panel=_SAFETY, help="Compare every digest recorded for SRC."),
    ] = False,
    digest: Annotated[
        Literal["xxh3", "sha256", "none"],
        typer.Option(metavar="NAME", rich_help_panel=_SAFETY, help="Digest of the output: xxh3, sha256 or none."),
    ] = "xxh3",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", rich_help_panel=_SAFETY, help="Replace the checkpoint at DST by the new one."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=_SAFETY, help="Continue an interrupted conversion.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", rich_help_panel=_SAFETY, help="Threads that copy. Default: up to 4."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", rich_help_panel=_SAFETY, help="Memory limit for copy buffers, such as 64MB."),
    ] = None,
) -> None:
    """Convert a checkpoint to another layout or topology, streaming, on a CPU."""
    from smolconv import api
    from smolconv.conversion import peak_rss_bytes, plan_to_json
    from smolconv.errors import UsageError
    from smolconv.layouts.huggingface.writer import parse_size

    def parsed(name: str, text: str) -> int:
        try:
            return parse_size(text)
        except ValueError:
            raise UsageError(f"{name} {text}: expected a size such as 5GB or 500MB.") from None

    if push is not None and to not in ("hf", "huggingface"):
        raise UsageError("--push uploads Hugging Face folders; use it with --to hf.")
    memory = None if max_memory is None else parsed("--max-memory", max_memory)
    if verify or push:
        from smolconv.verification.logits import require_torch

        require_torch()
    started = time.perf_counter()
    plan = api.plan_conversion(
        source, target, to=to, headers_only=dry_run, tp=tp, pp=pp, dp=dp, zero_stage=zero_stage, dtype=dtype,
        cast_from=cast_from, optimizer=optimizer, max_shard_bytes=parsed("--max-shard-size", max_shard_size),
        tokenizer=tokenizer, vocab_size=vocab_size, rope_scaling=rope_scaling, config=config, step=step,
        architecture=architecture, source_layout=source_layout, nanotron_config=nanotron_config, digest=digest,
        world_size=world_size, universal=universal, groups=groups, sub_group_size=sub_group_size, tag=tag,
        program=program, base=base,
    )  # fmt: skip
    _say_before(plan, resume=resume)
    if dry_run:
        if as_json:
            cost = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
            console.print_json({**plan_to_json(plan), **cost})
        else:
            _show_plan(plan)
        return
    result = api.run_conversion(
        plan, verify=verify or push is not None, resume=resume, overwrite=overwrite, workers=workers,
        max_memory_bytes=memory, check_source=check_source, bar=console.byte_progress,
        verify_bar=console.progress_bar,
    )  # fmt: skip
    console.warn(result.warnings)
    summary = result.to_json()
    if push is not None:
        summary["pushed"] = _push(target, push, source, result)
    if as_json:
        console.print_json(summary)
    else:
        _say_result(result, summary)


def _push(target: Path, repo: str, source: str, result: ConversionResult) -> str:
    """The address of the commit."""
    from smolconv.hub.card import HOW_TO_REPEAT, facts_of_source, named
    from smolconv.hub.push import push_folder

    assert result.verification is not None  # --push verifies
    verified = f"smolconv compared the weights with {named(source)}: {result.verification['reason']}."
    verified += f" {HOW_TO_REPEAT}" if result.verification["proof"] is not None else ""
    facts = facts_of_source(source, repo.partition("/")[2], verified)
    pushed = push_folder(target, repo, facts, message=f"Convert {named(source)} with smolconv")
    console.warn(pushed.notes)
    return pushed.url


def _say_result(result: ConversionResult, summary: Mapping[str, Any]) -> None:
    plan = result.plan
    # With verification most of the time is the two models' forward passes.
    rate = (
        f"{console.size(plan.bytes_written / max(result.seconds, 1e-9))}/s"
        if result.verification is None
        else "verified"
    )
    console.say(
        f"{plan.source.layout} -> {plan.layout}: {counted(plan.tensors, 'tensor')}, {console.size(plan.bytes_written)} "
        f"in {result.seconds:.2f} s ({rate}), peak memory {console.size(summary['peak_rss_bytes'])}"
    )
    console.say(_checked_line(result.source_check))
    _say_account(plan.account)
    if result.verification is not None:
        console.say(f"PASS  {result.verification['reason']}")
        if result.verification["proof"] is not None:
            console.say(f"proof: {plan.target / result.verification['proof']}")
    console.line(str(plan.target))
    if "pushed" in summary:
        console.line(summary["pushed"])


def _say_account(account: Account) -> None:
    """Print one line of what was carried, and one of what was left out."""
    console.say(f"carried: {', '.join(account.carried)}")
    console.say(f"left out: {', '.join(account.left_out) or 'nothing'}")


def _say_before(plan: ConversionPlan, *, resume: bool) -> None:
    """Hints before the work starts: an attempt that --resume could continue, and bytes that were not requested."""
    from smolconv.layouts.huggingface.listing import SIDECAR
    from smolconv.storage.atomic import files_kept

    if not resume and (kept := files_kept(plan.target, plan.digest)):
        console.say(
            f"{plan.target}.partial: an earlier attempt at this conversion has finished "
            f"{counted(kept, 'file')}; --resume continues it; without it, all files are written again."
        )
    sidecar = sum(file.size for file in plan.output.files if file.tensors and file.path.parts[0] == SIDECAR)
    if plan.prepared.has_optimizer and sidecar and plan.options.optimizer is None:
        console.say(
            f"{console.size(sidecar)} of {console.size(plan.bytes_written)} are Adam's state, in {SIDECAR}/: "
            "only training needs it, and --no-optimizer leaves it out."
        )


def _checked_line(check: Mapping[str, Any]) -> str:
    """The result of checking the source's digests, as text."""
    checked, unchecked, bare = check["checked"], len(check["unchecked"]), len(check["without_digest"])
    parts = [f"{checked} recorded digest{' holds' if checked == 1 else 's hold'}"] if checked else []
    parts += [f"{unchecked} not compared"] if unchecked else []
    parts += [f"{bare} file{' has' if bare == 1 else 's have'} none to compare with"] if bare else []
    return f"source: {', '.join(parts)}"


def _show_plan(plan: ConversionPlan) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    table.add_column("bytes", justify="right")
    shown = plan.output.files if console.settings.verbose else plan.output.files[:12]
    for file in shown:
        table.add_row(console.escape(str(file.path)), f"{file.size:,}")
    if len(shown) < len(plan.output.files):
        table.add_row(f"... and {len(plan.output.files) - len(shown)} more (-v shows all)", "")
    console.show(table)
    console.show(console.what_is_planned(plan.source.layout, plan))
    _say_account(plan.account)
    console.warn(plan.warnings)
