"""smolconv import-gguf"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from smolconv.commands import console
from smolconv.commands.app import app
from smolconv.errors import counted

_EPILOG = """
**Examples**

    smolconv import-gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2-hf

    smolconv import-gguf SmolLM2-135M-Instruct.Q4_1.gguf out --dtype bfloat16
"""


@app.command("import-gguf", epilog=_EPILOG)
def import_gguf(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="GGUF file of the Llama architecture, such as SmolLM2's.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; created only once it is complete.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
        typer.Option(metavar="TYPE", help="float32 keeps dequantised values exactly; or bfloat16, float16."),
    ] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and its size; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted import.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Threads that dequantise. Default: up to 4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Dequantise a GGUF file into a Hugging Face folder, with its tokenizer, config and chat template.

    Nothing is guessed: it refuses a file that lacks a value, or has one without an exact equivalent.
    """
    from smolconv.conversion import ConvertOptions, plan_gguf_import, plan_to_json, run_conversion
    from smolconv.tensors.dtypes import DTYPE_WORDS

    plan = plan_gguf_import(file, target, ConvertOptions(to="hf", dtype=DTYPE_WORDS.get(dtype, dtype)))
    if dry_run:
        if as_json:
            console.print_json(plan_to_json(plan))
            return
        console.show(console.what_is_planned("gguf", plan))
        console.warn(plan.warnings)
        return
    with console.byte_progress(f"gguf -> {plan.layout}", plan.bytes_written) as progress:
        result = run_conversion(plan, resume=resume, overwrite=overwrite, workers=workers, progress=progress)
    console.warn(result.warnings)
    summary = result.to_json()
    if as_json:
        console.print_json(summary)
        return
    console.say(
        f"gguf -> {plan.layout}: {counted(plan.tensors, 'tensor')} dequantised to {dtype}, "
        f"{console.size(plan.bytes_written)} in {result.seconds:.2f} s, "
        f"peak memory {console.size(summary['peak_rss_bytes'])}"
    )
    console.line(str(target))
