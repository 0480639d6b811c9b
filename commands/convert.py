"""smolconv convert"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smolconv.commands import console
from smolconv.commands.app import app

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smolconv.convert import ConversionPlan

_EPILOG = """
**Examples**

    smolconv convert checkpoints/nanotron smollm2-hf --to hf --verify

    smolconv convert smollm2-hf resharded --to nanotron --tp 2 --pp 2

    smolconv convert checkpoints/nanotron run --to deepspeed --zero-stage 1 --world-size 8

    smolconv convert ds-run smollm2-hf --to hf --dtype float32

    smolconv convert hf://HuggingFaceTB/SmolLM2-135M out --to nanotron --tp 2 --dry-run
"""


@app.command(epilog=_EPILOG)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, or hf://owner/name[/subfolder][@revision].")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make. It appears only when it is whole.")],
    to: Annotated[str, typer.Option("--to", help="Layout to write: hf, nanotron or deepspeed.")],
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks (nanotron).")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline ranks (nanotron).")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks (nanotron).")] = None,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage of the optimizer files.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Data-parallel ranks that will load it (deepspeed, with --zero-stage).")
    ] = None,
    universal: Annotated[
        bool, typer.Option("--universal", help="One folder for ZeRO 1, 2 and 3 at any world size (deepspeed default).")
    ] = False,
    groups: Annotated[
        Path | None,
        typer.Option(help='Parameter groups of the run that loads it: [{"regex": "...", "weight_decay": 0.1}].'),
    ] = None,
    sub_group_size: Annotated[
        int | None, typer.Option(min=1, help="sub_group_size of the ZeRO-3 run to load into. Default: DeepSpeed's 1e9.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Checkpoint with the weights that SRC left out as frozen (deepspeed source).")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file (hf), such as 5GB or 500MB.")] = "5GB",
    dtype: Annotated[str, typer.Option(help="keep, float32, bfloat16 or float16.")] = "keep",
    cast_from: Annotated[
        str | None, typer.Option(help="Cast from the stored weights or from the fp32 master: weights, master.")
    ] = None,
    optimizer: Annotated[
        bool | None,
        typer.Option("--optimizer/--no-optimizer", help="Carry Adam's state. Default: when the source has it."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder or file with the tokenizer to put beside.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Keep the first N vocabulary rows, drop padding.")
    ] = None,
    rope_scaling: Annotated[
        str, typer.Option(help="as-trained drops nanotron's rope_scaling, which it ignores; as-configured keeps it.")
    ] = "as-trained",
    config: Annotated[Path | None, typer.Option(help="Config to read instead of the source's own.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Step of a run folder. Default: the latest.")] = None,
    nanotron_config: Annotated[
        Path | None, typer.Option(help="Training YAML to write as config.yaml when the source has none (nanotron).")
    ] = None,
    digest: Annotated[str, typer.Option(help="Digest of every tensor: xxh3, sha256 or none.")] = "xxh3",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and its size, write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove the result before it gets its name; exit 1 if not.")
    ] = False,
    check_source: Annotated[
        bool, typer.Option("--check-source", help="Read all of SRC and compare every digest recorded for it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint at DST, once the new one is whole.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Threads that copy. Default: up to 4.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Bound of the copy buffers, such as 64MB.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload to the Hub once verified.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Rewrite a checkpoint in another layout or topology, streaming, on a CPU."""
    from smolconv.convert import (
        ConvertOptions,
        peak_rss_bytes,
        plan_conversion,
        plan_to_json,
        run_conversion,
    )
    from smolconv.errors import UsageError
    from smolconv.layouts.huggingface.huggingface import parse_size

    def parsed(name: str, text: str) -> int:
        try:
            return parse_size(text)
        except ValueError:
            raise UsageError(f"{name} {text}: expected a size such as 5GB or 500MB.") from None

    if push is not None and to not in ("hf", "huggingface"):
        raise UsageError("--push uploads Hugging Face folders; use it with --to hf.")
    options = ConvertOptions(
        to=to, tp=tp, pp=pp, dp=dp, zero_stage=zero_stage, dtype=dtype, cast_from=cast_from, optimizer=optimizer,
        max_shard_bytes=parsed("--max-shard-size", max_shard_size), tokenizer=tokenizer, vocab_size=vocab_size,
        rope_scaling=rope_scaling, config=config, step=step, nanotron_config=nanotron_config, digest=digest,
        world_size=world_size, universal=universal, groups=groups, sub_group_size=sub_group_size, base=base,
    )  # fmt: skip
    memory = None if max_memory is None else parsed("--max-memory", max_memory)
    if verify or push:
        from smolconv.verify.logits import require_torch

        require_torch()
    started = time.perf_counter()
    plan = plan_conversion(source, target, options, headers_only=dry_run)
    if dry_run:
        if as_json:
            cost = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
            console.print_json({**plan_to_json(plan), **cost})
        else:
            _show_plan(plan)
        return
    verifier = _verifier if verify or push else None
    with console.byte_progress(f"{plan.source.layout} -> {plan.layout}", plan.bytes_written) as progress:
        result = run_conversion(
            plan, resume=resume, overwrite=overwrite, workers=workers, max_memory_bytes=memory, progress=progress,
            verifier=verifier, check_source=check_source,
        )  # fmt: skip
    console.warn(result.warnings)
    summary = result.to_json()
    if push is not None:
        from smolconv.hub.push import push_folder

        summary["pushed"] = push_folder(target, push, message=f"Convert {source} with smolconv")
    if as_json:
        console.print_json(summary)
        return
    # With verification most of the time is the two models' forward passes.
    rate = "verified" if verifier else f"{console.size(plan.bytes_written / max(result.seconds, 1e-9))}/s"
    console.say(
        f"{plan.source.layout} -> {plan.layout}: {plan.tensors} tensors, {console.size(plan.bytes_written)} in "
        f"{result.seconds:.2f} s ({rate}), peak memory {console.size(summary['peak_rss_bytes'])}"
    )
    console.say(_checked_line(result.source_check))
    if result.verification is not None:
        console.say(f"PASS  {result.verification['reason']}")
    console.line(str(target))
    if "pushed" in summary:
        console.line(summary["pushed"])


def _checked_line(check: Mapping[str, Any]) -> str:
    """What is known of the source's bytes."""
    checked, unchecked, bare = check["checked"], len(check["unchecked"]), len(check["without_digest"])
    parts = [f"{checked} recorded digest{' holds' if checked == 1 else 's hold'}"] if checked else []
    parts += [f"{unchecked} not compared"] if unchecked else []
    parts += [f"{bare} file{' has' if bare == 1 else 's have'} none to compare with"] if bare else []
    return f"source: {', '.join(parts)}"


def _verifier(plan: ConversionPlan, folder: Path) -> Mapping[str, Any]:
    from smolconv.layouts.layout import ReadOptions
    from smolconv.verify.compare import Stored, verify_conversion

    options = plan.options
    as_stored = plan.prepared.parameters == plan.source.parameters and plan.prepared.spec == plan.source.spec
    source = Stored(folder=plan.source.root, options=ReadOptions(config=options.config, step=options.step))
    return verify_conversion(plan.prepared, folder, source=source if as_stored else None).to_json()


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
    console.out.print(table)
    console.out.print(
        f"{plan.source.layout} -> {plan.layout}: {len(plan.output.files)} files, {plan.tensors} tensors; reads "
        f"{console.size(plan.bytes_read)}, needs {console.size(plan.bytes_written)} of disk. Nothing was written."
    )
    console.warn(plan.warnings)
