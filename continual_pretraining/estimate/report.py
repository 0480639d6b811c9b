"""Formats an estimate as rows of text."""

from __future__ import annotations

from collections.abc import Sequence

from smolconv.continual_pretraining.estimate.estimate import DAY, Estimate, size_text
from smolconv.errors import counted

_BARS = "▁▂▃▄▅▆▇█"


def render(estimate: Estimate) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings with rows of label and value, in reading order."""
    given, disk = estimate, estimate.disk
    run = [
        ("parameters", f"{given.parameters:,}"),
        ("tokens", f"{given.tokens:,} = {given.steps:,} steps x {given.tokens_per_step:,}"),
        *([("steps", _steps(given))] if given.first_step > 1 else []),
        ("a step of a rank", _micro_batches(given)),
        ("FLOPs per token", ", ".join(f"{flops:.3g} ({name})" for name, flops in given.flops_per_token.items())),
    ]
    host = " (host)" if given.gpu_bytes else ""
    memory = [
        (f"{part.name}{host * (part.where == 'host')}", f"{size_text(part.bytes)}  {part.formula}")
        for part in given.memory
    ]
    memory += [
        (f"together{where}", size_text(size))
        for where, size in (("", given.gpu_bytes), (host, given.host_bytes))
        if size
    ]
    checkpoints = [
        ("one checkpoint", size_text(disk.checkpoint_bytes)),
        ("every", f"{_apart(given)}{disk.saves} in all, {size_text(disk.written_bytes)} written"),
        ("kept", f"{disk.kept}, {size_text(disk.kept_bytes)}; {size_text(disk.peak_bytes)} at most"),
    ]
    rates = [(f"step {step:,}", f"{rate:.3g}") for step, rate in given.learning_rates]
    rates.append(("curve", _sparkline(given.learning_rate_curve)))
    data = [(f"{use.stage}: {use.source}", f"{use.tokens:,} tokens, {_epochs(use.epochs)}") for use in given.sources]
    data = data or [("", "none is left to read")]
    sections = [
        ("Run", run), ("Time", _time(given)), ("Memory of a rank", memory), ("Checkpoints", checkpoints),
        ("Learning rate", rates), ("Data", data),
    ]  # fmt: skip
    if given.warnings:
        sections.append(("Warnings", [("", warning) for warning in given.warnings]))
    return sections


def _time(given: Estimate) -> list[tuple[str, str]]:
    if given.tokens_per_second is None or given.seconds_per_step is None:
        return [("", "not estimated on CPUs: metrics.jsonl has it after the first steps")]
    gpus = f"{counted(given.world_size, 'GPU')} of {given.peak_tflops:g} TFLOPS"
    by_rank = given.tokens_per_second / given.world_size
    return [
        ("assumed", f"MFU {given.mfu:.1%} (6N) = {given.mfu_nanotron:.1%} (nanotron's formula) on {gpus}"),
        ("tokens per second", f"{given.tokens_per_second:,.0f}; {by_rank:,.0f} a GPU"),
        ("step", f"{duration(given.seconds_per_step)}; {given.steps_per_day:,.0f} a day"),
        ("run", duration(given.steps * given.seconds_per_step)),
    ]


def _apart(given: Estimate) -> str:
    return "" if given.save_seconds is None else f"{duration(given.save_seconds)}; "


def _micro_batches(given: Estimate) -> str:
    count, ranks = given.accumulation_steps, given.sequence_ranks
    return f"{count} micro-batch{'es' if count > 1 else ''}{f', each shared by {ranks} ranks' if ranks > 1 else ''}"


def _steps(given: Estimate) -> str:
    return f"{given.first_step:,} to {given.train_steps:,}" if given.steps else f"all {given.train_steps:,} are done"


def duration(seconds: float) -> str:
    """A duration as text: "0.8 s", "40 minutes", "3.5 hours", "24 days"."""
    for unit, length in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.3g} s"


def _epochs(epochs: float | None) -> str:
    return "epochs unknown" if epochs is None else f"{epochs:.3g} epochs"


def _sparkline(values: Sequence[float]) -> str:
    top = max(values) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)
