"""Two checkpoints of any layout: spec, tensors, optimizer and logits tiers, one verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint, without_padding
from smolconv.layouts.base import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.spec import spec_differences
from smolconv.verify.logits import LogitsReport, choose_tokens, compare_logits
from smolconv.verify.tensors import TensorReport, compare_optimizers, compare_tensors, forward_order, module_of


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare, and on which tokens."""

    logits: bool = True
    optimizer: bool = False
    text: Path | None = None
    tokens: Path | None = None
    length: int = 512
    gates: Mapping[str, float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found in each tier."""

    spec_differences: tuple[str, ...]
    tensors: TensorReport
    optimizer: Mapping[str, TensorReport] | None
    optimizer_differences: tuple[str, ...]
    logits: LogitsReport | None

    @property
    def passed(self) -> bool:
        return (
            not self.spec_differences
            and self.tensors.passed
            and all(report.passed for report in (self.optimizer or {}).values())
            and not self.optimizer_differences
            and (self.logits is None or self.logits.passed)
        )

    @property
    def first_divergence(self) -> str | None:
        """The earliest module, in forward order, at which the two models part; None when only the spec differs."""
        candidates = [module_of(self.tensors.first)] if self.tensors.first is not None else []
        if self.logits is not None and self.logits.first_divergence is not None:
            candidates.append(self.logits.first_divergence)
        candidates += [module_of(name) for name in (*self.tensors.missing, *self.tensors.unexpected)]
        return min(candidates, key=lambda module: forward_order(f"{module}.weight"), default=None)

    @property
    def reason(self) -> str:
        """One line: what holds, or the first thing that does not."""
        if self.spec_differences:
            return f"specs differ: {self.spec_differences[0]}"
        if not self.tensors.passed:
            unequal = self.tensors.compared - self.tensors.equal
            return (
                f"{unequal} of {self.tensors.compared} tensors differ, {len(self.tensors.missing)} are missing and "
                f"{len(self.tensors.unexpected)} unexpected; first {self.first_divergence}"
            )
        for slot, report in (self.optimizer or {}).items():
            if not report.passed:
                unequal = report.compared - report.equal
                return f"{slot}: {unequal} of {report.compared} tensors differ, first {report.first}"
        if self.optimizer_differences:
            return f"optimizers differ: {self.optimizer_differences[0]}"
        if self.logits is not None and not self.logits.passed:
            failed = next(name for name, gate in self.logits.gates.items() if not gate.passed)
            gate = self.logits.gates[failed]
            return f"logits: {failed} is {gate.value:.3g}, limit {gate.limit:.3g}; first {self.first_divergence}"
        said = [f"{self.tensors.equal} tensors equal bit for bit"]
        if self.optimizer is not None:
            said.append(f"optimizer equal in {', '.join(self.optimizer) or 'steps and groups'}")
        if self.logits is not None:
            said.append(f"logits max abs {self.logits.max_abs:.2g} over {self.logits.positions} positions")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types. NaN and infinity, which JSON has not, become null."""
        logits = None if self.logits is None else asdict(self.logits)
        layers = [] if logits is None else logits.pop("layers")
        gates = {} if logits is None else logits.pop("gates")
        if logits is not None:
            logits.pop("first_divergence")
        document = {
            "schema": 1,
            "passed": self.passed,
            "reason": self.reason,
            "spec_differences": list(self.spec_differences),
            "tensors": asdict(self.tensors),
            "optimizer": None if self.optimizer is None else {
                "slots": {slot: asdict(report) for slot, report in self.optimizer.items()},
                "differences": list(self.optimizer_differences),
            },
            "logits": logits,
            "first_divergence": self.first_divergence,
            "layers": layers,
            "gates": gates,
        }  # fmt: skip
        return {name: _plain_json(value) for name, value in document.items()}


def _plain_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    options: VerifyOptions = VerifyOptions(),
    *,
    folders: tuple[Path | None, Path | None] = (None, None),
) -> VerifyReport:
    """Compare tier by tier. ``folders`` let transformers load a side itself, instead of our reading of it."""
    differences = spec_differences(a.spec, b.spec)
    tensors = compare_tensors(a.parameters, b.parameters)
    optimizer, state_differences = compare_optimizers(a, b) if options.optimizer else (None, [])
    logits = None
    # Tensors of other names or shapes are another model already; its logits could not be laid side by side.
    comparable = not tensors.missing and not tensors.unexpected and tensors.max_abs != float("inf")
    if options.logits and comparable and a.spec.vocab_size == b.spec.vocab_size:
        ids, where = choose_tokens(a, b, text=options.text, tokens=options.tokens, length=options.length)
        logits = compare_logits(a, b, ids, where, folders=folders, gates=options.gates)
    return VerifyReport(
        spec_differences=tuple(differences),
        tensors=tensors,
        optimizer=optimizer,
        optimizer_differences=tuple(state_differences),
        logits=logits,
    )


def verify_conversion(prepared: Checkpoint, folder: Path, *, logits: bool = True) -> VerifyReport:
    """What was written against what was to be written: bitwise in every slot, and logits against the cast source."""
    read_back = read_checkpoint(folder, ReadOptions(rope_as_configured=prepared.spec.rope_scaling is not None))
    rows = prepared.spec.vocab_size
    if read_back.spec.vocab_size > rows:
        read_back = without_padding(read_back, rows)
    hf = folder if read_back.layout == "huggingface" else None
    options = VerifyOptions(logits=logits, optimizer=prepared.has_optimizer)
    return verify_checkpoints(prepared, read_back, options, folders=(None, hf))
