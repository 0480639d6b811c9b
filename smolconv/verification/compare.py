"""Compares two checkpoints of any layout in tiers (spec, tensors, optimizer, logits), with one verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolconv.checkpoint import Checkpoint, Slot, without_padding
from smolconv.errors import UnsupportedModel, UsageError, counted, some_of
from smolconv.files import require_unchanged
from smolconv.layouts.assets import differences_beside_weights
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.nanotron.reader import read_native_model
from smolconv.layouts.registry import read_checkpoint
from smolconv.models.spec import spec_differences
from smolconv.parsing import finite_json
from smolconv.progress import Bar, no_bar
from smolconv.tensors.reading import close_thread_files
from smolconv.verification.engines.start import ENGINES, engine_logits
from smolconv.verification.inputs import choose_rows
from smolconv.verification.logits import LogitsReport, compare_logits, require_torch
from smolconv.verification.tensors import (
    TensorReport,
    compare_casts,
    compare_optimizers,
    compare_tensors,
    forward_order,
    module_of,
)

if TYPE_CHECKING:
    from smolconv.verification.forward import Side

#: For ``convert --verify``, which has already compared the tensors bit for bit.
CONVERSION_POSITIONS = 512


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Settings of a comparison, including the tokens."""

    logits: bool = True
    optimizer: bool = False
    text: Path | None = None
    tokens: Path | None = None
    length: int = 2048
    documents: int = 1  #: packed into the row
    compute: str = "float32"  #: or "bfloat16"
    device: str = "cpu"
    #: "transformers" runs both sides by transformers; "deepspeed" and "nanotron" also run the real engine on
    #: every side of that layout, and compare its logits with that side's.
    engine: str = "ours"
    gates: Mapping[str, float | None] | None = None

    def __post_init__(self) -> None:
        for name, known in (("compute", ("float32", "bfloat16")), ("engine", ("ours", "transformers", *ENGINES))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        for name, limit in (self.gates or {}).items():
            if limit is not None and not isfinite(limit):
                raise UsageError(f"the limit of {name} is {limit}; expected a finite number.")


@dataclass(frozen=True, kw_only=True)
class AsStored:
    """The stored form of a checkpoint, for a forward pass that does not use smolconv's reader."""

    folder: Path
    options: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The results of each tier."""

    spec_differences: tuple[str, ...]
    tensors: TensorReport
    optimizer: Mapping[str, TensorReport] | None
    optimizer_differences: tuple[str, ...]
    logits: LogitsReport | None
    logits_left_out: bool = False  #: not finite on either side, because of NaN or infinity in equal tensors
    casts: TensorReport | None = None  #: for a conversion: values before and after a cast to another dtype
    warnings: tuple[str, ...] = ()  #: what the verdict does not depend on: files not read, other tokenizers

    @property
    def passed(self) -> bool:
        return (
            not self.spec_differences
            and self.tensors.passed
            and (self.casts is None or self.casts.within_rounding)
            and all(report.passed for report in (self.optimizer or {}).values())
            and not self.optimizer_differences
            and (self.logits is None or self.logits.passed)
        )

    @property
    def first_divergence(self) -> str | None:
        """The earliest module, in forward order, at which the models differ; None if only the spec differs."""
        candidates = [module_of(self.tensors.first)] if self.tensors.first is not None else []
        if self.casts is not None and not self.casts.within_rounding:
            candidates += [module_of(name) for name in self.casts.overflowed or (self.casts.first or "",) if name]
        if self.logits is not None and self.logits.first_divergence is not None:
            candidates.append(self.logits.first_divergence)
        candidates += [module_of(name) for name in (*self.tensors.missing, *self.tensors.unexpected)]
        return min(candidates, key=lambda module: forward_order(f"{module}.weight"), default=None)

    @property
    def reason(self) -> str:
        """One line: the result, or the first difference."""
        if self.spec_differences:
            return f"specs differ: {self.spec_differences[0]}"
        if not self.tensors.passed:
            return f"{_counted(self.tensors)}; first {self.first_divergence}"
        if self.casts is not None and not self.casts.within_rounding:
            if self.casts.overflowed:
                return _overflowed(self.casts)
            wrong = self.casts.compared - self.casts.equal - self.casts.rounded
            return f"{wrong} of {self.casts.compared} cast tensors differ by more than rounding"
        for slot, report in (self.optimizer or {}).items():
            if not report.passed:
                first = report.first or (*report.missing, *report.unexpected)[0]
                return f"{slot}: {_counted(report)}; first {first}"
        if self.optimizer_differences:
            return f"optimizers differ: {self.optimizer_differences[0]}"
        if self.logits is not None and not self.logits.passed:
            failed = next(name for name, gate in self.logits.gates.items() if not gate.passed)
            gate = self.logits.gates[failed]
            return f"logits: {failed} is {gate.value:.3g}, limit {gate.limit:.3g}; first {self.first_divergence}"
        said = [f"{counted(self.tensors.equal, 'tensor')} equal bit for bit"]
        if self.casts is not None:
            said.append(f"{self.casts.compared} of them cast, every value within its rounding")
        if self.optimizer is not None:
            said.append(f"optimizer equal in {', '.join(self.optimizer) or 'steps and groups'}")
        if self.logits is not None:
            said.append(f"logits max abs {self.logits.max_abs:.2g} over {self.logits.positions} positions")
        if self.logits_left_out:
            said.append("logits left out: not finite on either side")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types. NaN and infinity become null, because JSON has neither."""
        logits = None if self.logits is None else asdict(self.logits)
        layers = [] if logits is None else logits.pop("layers")
        gates = {} if logits is None else logits.pop("gates")
        if logits is not None:
            del logits["first_divergence"], logits["comparable"]
        document = {
            "schema": 1,
            "passed": self.passed,
            "reason": self.reason,
            "spec_differences": list(self.spec_differences),
            "tensors": asdict(self.tensors),
            "casts": None if self.casts is None else asdict(self.casts),
            "optimizer": None if self.optimizer is None else {
                "slots": {slot: asdict(report) for slot, report in self.optimizer.items()},
                "differences": list(self.optimizer_differences),
            },
            "logits": logits,
            "first_divergence": self.first_divergence,
            "layers": layers,
            "gates": gates,
            "warnings": list(self.warnings),
        }  # fmt: skip
        return {name: finite_json(value) for name, value in document.items()}


def _counted(report: TensorReport) -> str:
    said = (
        f"{report.compared - report.equal} of {report.compared} tensors differ, {len(report.missing)} are missing and "
        f"{len(report.unexpected)} unexpected"
    )
    if report.overflowed:
        return f"{said}; {_overflowed(report)}"
    if report.rounded and report.within_rounding:
        return f"{said}; all differences are within the rounding of another dtype"
    if report.equal < report.compared and report.max_abs == 0:
        return f"{said}; all differences are signs of zeros"
    return said


def _overflowed(report: TensorReport) -> str:
    found = report.overflowed
    return f"{len(found)} tensors hold finite values that are no longer finite ({some_of(found)})"


def verify_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    options: VerifyOptions = VerifyOptions(),
    *,
    stored: tuple[AsStored | None, AsStored | None] = (None, None),
    bar: Bar = no_bar,
) -> VerifyReport:
    """Compare tier by tier. With ``stored`` a side's forward pass runs on the folder, else on its canonical tensors.

    Raises ``SourceChanged`` if a file changes meanwhile: the tiers would have seen different models.
    """
    differences = spec_differences(a.spec, b.spec)
    sets = a.tensors.items() if options.optimizer else [(Slot.PARAMETER, a.parameters)]
    in_both = sum(len(set(found) & set(b.tensors.get(slot, {}))) for slot, found in sets)
    with bar("comparing tensors", in_both) as advance:
        tensors = compare_tensors(a.parameters, b.parameters, advance=advance)
        optimizer, state_differences = compare_optimizers(a, b, advance) if options.optimizer else (None, [])
    logits = None
    # With other names or shapes it is already another model, whose logits cannot be compared.
    comparable = not tensors.missing and not tensors.unexpected and tensors.max_abs != float("inf")
    if options.logits and comparable and a.spec.vocab_size == b.spec.vocab_size:
        require_torch()
        rows = choose_rows(
            vocab_size=a.spec.vocab_size,
            max_positions=min(a.spec.max_positions, b.spec.max_positions),
            tokenizer=a.assets.get("tokenizer.json") or b.assets.get("tokenizer.json"),
            text=options.text,
            tokens=options.tokens,
            length=options.length,
            documents=options.documents,
        )
        sides = [side_of(checkpoint, where, options) for checkpoint, where in zip((a, b), stored)]
        with ExitStack() as stack:
            stack.callback(close_thread_files)  # forward passes read tensors in this thread
            engines = {
                label: stack.enter_context(engine_logits(options.engine, checkpoint, at.folder, at.options, rows))
                for label, checkpoint, at in zip("ab", (a, b), stored)
                if options.engine in ENGINES and at is not None and checkpoint.layout == options.engine
            }
            if options.engine in ENGINES and not engines:
                raise UsageError(f"--engine {options.engine}: neither A nor B is a {options.engine} folder.")
            logits = compare_logits(
                sides[0], sides[1], rows, compute=options.compute, gates=options.gates, engines=engines, bar=bar
            )
    require_unchanged({**a.opened, **b.opened}, "while it was compared")
    left_out = logits is not None and not logits.comparable and tensors.passed
    return VerifyReport(
        spec_differences=tuple(differences),
        tensors=tensors,
        optimizer=optimizer,
        optimizer_differences=tuple(state_differences),
        logits=None if left_out else logits,
        logits_left_out=left_out,
        warnings=tuple(_warnings(a, b)),
    )


def _warnings(a: Checkpoint, b: Checkpoint) -> list[str]:
    said = [f"{label}: {warning}" for label, side in (("A", a), ("B", b)) for warning in side.warnings]
    for label, side, other in (("A", a, b), ("B", b, a)):
        rows = side.unpadded_vocab_size
        if rows is not None and rows == other.spec.vocab_size < side.spec.vocab_size:
            said.append(
                f"{label}: the rows of its vocabulary from {rows} on are padding that smolconv added. Only `convert` "
                "removes them: compare with its output."
            )
    return said + differences_beside_weights(a, b)


def _nanotron_side(stored: AsStored, options: VerifyOptions, dtype: Any) -> Side | None:
    """smolconv's own forward pass on nanotron's tensors."""
    from smolconv.verification.native import NanotronSide

    if options.engine == "transformers":
        return None
    return NanotronSide(read_native_model(stored.folder, stored.options), dtype, options.device)


def _huggingface_side(stored: AsStored, options: VerifyOptions, dtype: Any) -> Side | None:
    """transformers on the folder, unless another config was given."""
    from smolconv.verification.hf import FolderWeights, TransformersSide

    if stored.options.config is not None:
        return None
    return TransformersSide(FolderWeights(stored.folder), dtype, options.device)


#: By layout, a forward pass that does not use smolconv's mapping; None if it does not apply.
_INDEPENDENT: Mapping[str, Callable[[AsStored, VerifyOptions, Any], Side | None]] = {
    "nanotron": _nanotron_side, "huggingface": _huggingface_side,
}  # fmt: skip
#: Layouts whose forward pass ignores ``rope_scaling``, which a conversion may keep: ``ReadOptions.rope_as_configured``.
_WITHOUT_SCALING = frozenset({"nanotron"})


def side_of(checkpoint: Checkpoint, stored: AsStored | None, options: VerifyOptions) -> Side:
    """The forward pass that is as independent of smolconv's mapping as the layout allows.

    Layouts without one, and checkpoints not in their stored form, run with transformers on canonical tensors.
    """
    import torch
    from transformers.activations import ACT2FN

    from smolconv.verification.hf import CanonicalWeights, TransformersSide

    if checkpoint.spec.activation not in ACT2FN:
        raise UnsupportedModel(
            f"hidden_act is {checkpoint.spec.activation!r}, which transformers does not know: it cannot run.\n"
            "Compare with verify --tensors-only, or convert without --verify."
        )
    dtype = getattr(torch, options.compute)
    independent = _INDEPENDENT.get(checkpoint.layout)
    side = None if stored is None or independent is None else independent(stored, options, dtype)
    return side or TransformersSide(CanonicalWeights(checkpoint), dtype, options.device)


def verify_conversion(
    prepared: Checkpoint, folder: Path, *, logits: bool = True, source: AsStored | None = None, bar: Bar = no_bar
) -> VerifyReport:
    """Compare the output with the plan: bitwise in every slot, and logits against the cast source.

    Cast values are also compared with the original values, within the rounding of their new dtype.
    ``source`` is given if its tensors are written unchanged: then its own forward pass runs on them.
    """
    if prepared.layout in _WITHOUT_SCALING and prepared.spec.rope_scaling is not None:
        source = None
    read_back = read_checkpoint(
        folder,
        ReadOptions(rope_as_configured=prepared.spec.rope_scaling is not None, architecture=prepared.spec.architecture),
    )
    rows = prepared.spec.vocab_size
    if read_back.spec.vocab_size > rows:
        read_back = without_padding(read_back, rows)
    options = VerifyOptions(logits=logits, optimizer=prepared.has_optimizer, length=CONVERSION_POSITIONS)
    report = verify_checkpoints(prepared, read_back, options, stored=(source, AsStored(folder=folder)), bar=bar)
    # The warnings of a conversion are its own.
    return replace(report, casts=compare_casts(prepared.tensors, read_back.tensors), warnings=())
