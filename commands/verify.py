"""smolconv verify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolconv.commands import console
from smolconv.commands.app import Architecture, LayoutA, LayoutB, app

if TYPE_CHECKING:
    from smolconv.api import ProofCheck
    from smolconv.verification.compare import VerifyReport

_EPILOG = """
**Examples**

    smolconv verify checkpoints/nanotron smollm2-hf

    smolconv verify smollm2-hf smollm2-hf-resharded --tensors-only

    smolconv verify before after --optimizer --json

    smolconv verify checkpoints/nanotron smollm2-hf --proof proof.json

    smolconv verify checkpoints/nanotron smollm2-hf --check-proof proof.json
"""


@app.command(epilog=_EPILOG)
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, or hf://owner/name[/subfolder][@revision].")],
    b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint to compare it with, in any layout.")],
    tensors_only: Annotated[bool, typer.Option("--tensors-only", help="Specs and tensors; needs no torch.")] = False,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Compare logits in fp32.")] = True,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Compare masters, moments, steps and groups.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="PATH", help="Config of A instead of its own.")] = None,
    config_b: Annotated[Path | None, typer.Option(metavar="PATH", help="Config of B instead of its own.")] = None,
    layout_a: LayoutA = None,
    layout_b: LayoutB = None,
    architecture: Architecture = None,
    text: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Text to run both models on; needs a tokenizer with A or B.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(metavar="NPY", help="Token ids to run both models on.")] = None,
    length: Annotated[int, typer.Option(min=2, metavar="N", help="Positions to compare, at most the context.")] = 2048,
    documents: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pack N documents into the row; compare each with itself alone.")
    ] = 1,
    compute: Annotated[
        Literal["float32", "bfloat16", "fp32", "bf16"],
        typer.Option(metavar="TYPE", help="Dtype to compute in: float32 or bfloat16, with its own gates."),
    ] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="Where models run, such as cpu or cuda.")] = "cpu",
    engine: Annotated[
        Literal["ours", "transformers", "deepspeed", "nanotron"],
        typer.Option(
            metavar="NAME",
            help="ours, transformers, or the real deepspeed or nanotron (needs a GPU) beside our forward pass.",
        ),
    ] = "ours",
    gate_max_abs: Annotated[float | None, typer.Option(metavar="X", help="Largest difference that passes.")] = None,
    gate_kl: Annotated[float | None, typer.Option(metavar="X", help="Largest mean KL divergence that passes.")] = None,
    gate_top1: Annotated[float | None, typer.Option(metavar="X", help="Smallest top-1 agreement that passes.")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="List every module's largest difference.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--report", metavar="OUT.html", dir_okay=False, help="Write a self-contained HTML page."),
    ] = None,
    proof: Annotated[
        Path | None,
        typer.Option("--proof", metavar="FILE", dir_okay=False, help="Write a card that lets others repeat this."),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--check-proof", metavar="FILE", help="Repeat a card's comparison with its options."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Verify that two checkpoints are the same model: spec, tensors bit for bit, fp32 logits. Exit 1 if not."""
    from smolconv import api
    from smolconv.errors import UsageError
    from smolconv.files import require_place

    if html is not None:
        require_place("--report", html)
    if card is not None:
        if proof is not None or html is not None:
            raise UsageError("--check-proof writes nothing: leave out --proof and --report.")
        _check(
            api.check_proof(
                card, a, b, layout_a=layout_a, layout_b=layout_b, config=config, config_b=config_b,
                architecture=architecture, device=device, bar=console.progress_bar,
            ),
            card, per_layer=per_layer, as_json=as_json,
        )  # fmt: skip
        return
    report = api.verify(
        a, b, logits=logits and not tensors_only, optimizer=optimizer, layout_a=layout_a, layout_b=layout_b,
        config=config, config_b=config_b, architecture=architecture, text=text, tokens=tokens, length=length,
        documents=documents, compute=compute, device=device, engine=engine, proof=proof, bar=console.progress_bar,
        gates={"max_abs": gate_max_abs, "kl": gate_kl, "top1": gate_top1},
    )  # fmt: skip
    if html is not None:
        from smolconv.verification.report import render_html

        html.write_text(render_html(report.to_json(), a=a, b=b), encoding="utf-8", errors="backslashreplace")
    console.warn(report.warnings)
    if as_json:
        console.print_json(report.to_json())
    else:
        _show(report, per_layer=per_layer)
    if not report.passed:
        raise typer.Exit(1)


def _check(found: ProofCheck, card: Path, *, per_layer: bool, as_json: bool) -> None:
    console.warn(found.report.warnings)
    if as_json:
        console.print_json(found.to_json())
    else:
        _show(found.report, per_layer=per_layer)
        for line in found.differences:
            console.show(f"proof     [red]differs[/]  {console.escape(line)}")
        for line in found.weaknesses:
            console.show(f"proof     [yellow]weaker[/]   {console.escape(line)}")
        if found.holds:
            console.show(f"[green]PROOF HOLDS[/]  {console.escape(card.name)}: the same tensors, limits and verdict")
        else:
            console.show(f"[red]PROOF DOES NOT HOLD[/]  {console.escape(card.name)}")
    if not found.holds:
        raise typer.Exit(1)


def _show(report: VerifyReport, *, per_layer: bool) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    spec, tensors, logits = report.spec_differences, report.tensors, report.logits
    table.add_row("spec", _mark(not spec), console.escape("; ".join(spec[:3]) or "every field equal"))
    found = f"{tensors.equal} of {tensors.compared} equal bit for bit"
    found += f", {len(tensors.missing)} missing, {len(tensors.unexpected)} unexpected" if not tensors.passed else ""
    found += f"; worst {tensors.worst} by {tensors.max_abs:.3g}" if tensors.worst else ""
    table.add_row("tensors", _mark(tensors.passed), console.escape(found))
    if report.optimizer is not None:
        fine = all(r.passed for r in report.optimizer.values()) and not report.optimizer_differences
        slots = ", ".join(f"{slot} {r.equal} of {r.compared} equal" for slot, r in report.optimizer.items()) or "none"
        table.add_row("optimizer", _mark(fine), console.escape("; ".join([slots, *report.optimizer_differences[:3]])))
    if logits is None:
        left_out = "left out: not finite on either side, of tensors that are equal"
        table.add_row("logits", "-", left_out if report.logits_left_out else "not compared")
    else:
        limit = f"limit {logits.gates['max_abs'].limit:.2g}, " if "max_abs" in logits.gates else ""
        documents = f" in {logits.documents} documents" if logits.documents > 1 else ""
        floor = f"floor {logits.noise_floor['max_abs']:.2g}"
        said = (
            f"max abs {logits.max_abs:.2g} ({limit}{floor}), KL {logits.kl_mean:.2g}, top-1 "
            f"{logits.top1_agreement:.4f}, NLL {logits.nll_a:.4f} and {logits.nll_b:.4f}; {logits.compute}, "
            f"{logits.positions} positions{documents} of {logits.tokens_from}"
        )
        table.add_row("logits", _mark(logits.passed), console.escape(said))
        for name, gate in logits.gates.items():
            if name not in ("max_abs", "kl", "top1"):
                table.add_row(f"  {name}", _mark(gate.passed), f"{gate.value:.2g} (limit {gate.limit:.2g})")
        table.add_row("forwards", "", console.escape(f"A: {logits.forwards[0]}; B: {logits.forwards[1]}"))
    console.show(table)
    if per_layer and logits is not None:
        layers = Table(box=None, pad_edge=False)
        for title in ("module", "max abs", "floor"):
            layers.add_column(title, justify="left" if title == "module" else "right")
        for layer in logits.layers:
            style = "red" if layer["diverged"] else None
            layers.add_row(layer["module"], f"{layer['max_abs']:.2g}", f"{layer['floor']:.2g}", style=style)
        console.show(layers)
    if report.passed:
        console.show("[green]PASS[/]  the same model")
    else:
        where = report.first_divergence
        console.show(
            f"[red]FAIL[/]  {console.escape(report.reason)}" + (f"  (first divergence: {where})" if where else "")
        )


def _mark(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[red]differs[/]"
