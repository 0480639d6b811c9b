"""The card of a verification that others can repeat: ``verify --proof`` writes it, ``--check-proof`` reads it.

docs/proof.md describes the document, and docs/smolconv_proof.schema.json is its JSON schema. It contains no local path:
folders are given by name, and sources on the Hub by address.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolconv.checkpoint import Checkpoint, Slot
from smolconv.errors import CorruptFile, counted
from smolconv.parsing import finite_json, read_json
from smolconv.processes import usable_cores
from smolconv.tensors.lazy import LazyTensor
from smolconv.tensors.reading import as_bytes
from smolconv.verification.compare import VerifyOptions, VerifyReport
from smolconv.version import __version__

PROOF_SCHEMA = "smolconv_proof.schema.json"
#: Size limit. The tensors of a 3B model take 60 kB.
MOST_BYTES = 64 << 20
#: How much larger a card's limit may be than the one measured here, because machines have different noise floors.
_LOOSER = 2.0
#: Tolerance for the NLL of the same model and text on two machines, in nats.
_NLL = {"float32": 1e-3, "bfloat16": 2e-2}
_PACKAGES = ("numpy", "torch", "transformers", "deepspeed")
_Text = Annotated[str, Field(max_length=10_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)


class ProvenTensor(_Strict):
    """A tensor by its canonical name: dtype as stored, and SHA-256 of its elements, row-major and little-endian."""

    dtype: _Text
    shape: tuple[int, ...]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ProvenSide(_Strict):
    """One of the two checkpoints."""

    name: _Text = Field(description="The folder's name, or hf://owner/name.")
    revision: _Text | None = Field(description="The commit on the Hub, where the folder is a snapshot of one.")
    layout: _Text
    architecture: _Text
    tensors: dict[str, ProvenTensor]
    optimizer: dict[str, dict[str, ProvenTensor]] = Field(description="By slot; empty unless it was compared.")


class ProvenOptions(_Strict):
    """How the two were compared: the options of smolconv verify."""

    logits: bool
    optimizer: bool
    length: Annotated[int, Field(ge=2, le=1 << 24)]
    documents: Annotated[int, Field(ge=1, le=1 << 20)]
    compute: Literal["float32", "bfloat16"]
    engine: Literal["ours", "transformers", "deepspeed", "nanotron"]
    gates: dict[str, float | None] = Field(description="Limits that were asked for, in place of the measured ones.")


class ProvenTensors(_Strict):
    """The tier that compares tensors bit for bit."""

    compared: int
    equal: int
    missing: tuple[str, ...] = Field(description="In A only.")
    unexpected: tuple[str, ...] = Field(description="In B only.")


class ProvenGate(_Strict):
    """A value and its limit: top1 passes if it is at least the limit, others if at most."""

    limit: float
    value: float | None = Field(description="null where it was not finite.")
    passed: bool

    def holds(self, name: str) -> bool:
        return self.value is not None and (self.value >= self.limit if name == "top1" else self.value <= self.limit)


class ProvenLogits(_Strict):
    """The tier that compares logits of independent forward passes."""

    positions: int
    tokens_from: _Text
    forwards: tuple[str, str]
    max_abs: float | None
    mean_abs: float | None
    kl_mean: float | None
    top1_agreement: float | None
    nll_a: float | None
    nll_b: float | None
    noise_floor: dict[str, float | None] = Field(description="A beside itself, with another attention.")
    gates: dict[str, ProvenGate]


class Machine(_Strict):
    """The kind of machine, without its name."""

    system: _Text
    architecture: _Text
    processor: _Text
    cores: int


class Proof(_Strict):
    """The complete card."""

    schema_version: Literal[1] = Field(alias="schema")
    made: _Text = Field(description="The day, as YYYY-MM-DD.")
    command: _Text
    versions: dict[str, str]
    machine: Machine
    a: ProvenSide
    b: ProvenSide
    options: ProvenOptions
    spec_differences: tuple[str, ...]
    tensors: ProvenTensors
    optimizer: dict[str, ProvenTensors]
    optimizer_differences: tuple[str, ...]
    logits: ProvenLogits | None
    passed: bool
    reason: _Text

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def verdict(self) -> bool:
        """The verdict by the card's own numbers."""
        tiers = [self.tensors, *self.optimizer.values()]
        return (
            not self.spec_differences
            and not self.optimizer_differences
            and all(each.equal == each.compared and not each.missing and not each.unexpected for each in tiers)
            and (self.logits is None or all(gate.holds(name) for name, gate in self.logits.gates.items()))
        )


def make_proof(
    report: VerifyReport, options: VerifyOptions, sides: Sequence[Checkpoint], names: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
) -> Proof:  # fmt: skip
    """Build the card of a verification, reading every tensor again for its digest. ``advance``: after each tensor."""
    found = report.to_json()
    asked = {name: limit for name, limit in (options.gates or {}).items() if limit is not None}
    words = [
        f"--length {options.length}",
        *(f"--gate-{name.replace('_', '-')} {limit:g}" for name, limit in asked.items()),
    ]
    words += ["--optimizer"] if options.optimizer else []
    words += ["--no-logits"] if not options.logits else []
    words += [f"--compute {options.compute}"] if options.compute != "float32" else []
    words += [f"--documents {options.documents}"] if options.documents != 1 else []
    words += [f"--engine {options.engine}"] if options.engine != "ours" else []
    logits = found["logits"]
    document = {
        "schema": 1,
        "made": date.today().isoformat(),
        "command": " ".join(["smolconv verify", *names, *words]),
        "versions": {"smolconv": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.system(), "architecture": platform.machine(), "processor": _processor(),
            "cores": usable_cores(),
        },
        "a": _side(sides[0], names[0], options.optimizer, advance),
        "b": _side(sides[1], names[1], options.optimizer, advance),
        "options": {
            "logits": options.logits, "optimizer": options.optimizer, "length": options.length,
            "documents": options.documents, "compute": options.compute, "engine": options.engine, "gates": asked,
        },
        "spec_differences": report.spec_differences,
        "tensors": _tensors(found["tensors"]),
        "optimizer": {slot: _tensors(each) for slot, each in (found["optimizer"] or {}).get("slots", {}).items()},
        "optimizer_differences": report.optimizer_differences,
        "logits": None if logits is None else {
            **{name: logits[name] for name in ProvenLogits.model_fields if name not in ("gates",)},
            "gates": found["gates"],
        },
        "passed": report.passed,
        "reason": report.reason,
    }  # fmt: skip
    return Proof.model_validate_json(json.dumps(finite_json(document)))


def _tensors(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ProvenTensors.model_fields}


def _side(checkpoint: Checkpoint, name: str, optimizer: bool, advance: Callable[[int], None]) -> dict[str, Any]:
    def proven(found: Mapping[str, LazyTensor]) -> dict[str, Any]:
        listed = {}
        for tensor_name, tensor in found.items():
            listed[tensor_name] = {"dtype": tensor.dtype, "shape": tensor.shape, "sha256": sha256_of(tensor)}
            advance(1)
        return listed

    slots = [slot for slot, found in checkpoint.tensors.items() if found and slot is not Slot.PARAMETER]
    return {
        "name": name, "revision": checkpoint.revision, "layout": checkpoint.layout,
        "architecture": checkpoint.spec.architecture, "tensors": proven(checkpoint.parameters),
        "optimizer": {slot.value: proven(checkpoint.tensors[slot]) for slot in slots} if optimizer else {},
    }  # fmt: skip


def sha256_of(tensor: LazyTensor) -> str:
    """SHA-256 of the elements, row-major and little-endian, as hexadecimal digits."""
    hasher = hashlib.sha256()
    for chunk in tensor.raw_chunks():
        hasher.update(as_bytes(chunk))
    return hasher.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as told:
            return next(line.partition(":")[2].strip() for line in told if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def read_proof(path: Path) -> Proof:
    """Read a card. Raises ``MissingFile``, and ``CorruptFile`` for anything but a card of a known version."""
    document = read_json(path, MOST_BYTES)
    if document.get("schema") != 1:
        raise CorruptFile(
            f"{path}: schema is {document.get('schema')!r:.40}; smolconv {__version__} reads schema 1.\n"
            "Update smolconv, or ask for a card of schema 1."
        )
    try:
        return Proof.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise CorruptFile(
            f"{path}: {where}: {first['msg']}.\nExpected a card as docs/proof.md describes it. Copy the file again."
        ) from None


def doubts(proof: Proof) -> list[str]:
    """Contradictions within a card, in a few words each: a verdict or digest that its own numbers contradict."""
    found = []
    for name, gate in (proof.logits.gates if proof.logits else {}).items():
        if gate.passed != gate.holds(name):
            said = "passed" if gate.passed else "failed"
            found.append(f"gate {name} is marked {said}, but has {gate.value} with a limit of {gate.limit:g}")
    if proof.passed != proof.verdict():
        found.append(f"the card has passed: {str(proof.passed).lower()}, but its numbers show the opposite")
    if proof.tensors.compared != len(proof.a.tensors.keys() & proof.b.tensors.keys()):
        found.append(f"{proof.tensors.compared} tensors are counted as compared, but other ones are listed")
    if proof.tensors.equal == proof.tensors.compared:
        apart = [
            name for name, one in proof.a.tensors.items()
            if (other := proof.b.tensors.get(name)) and one.dtype == other.dtype and one != other
        ]  # fmt: skip
        found += [f"{counted(len(apart), 'tensor')} called equal with other digests, first {apart[0]}"] if apart else []
    if proof.options.logits and proof.logits is None and proof.passed and "left out" not in proof.reason:
        found.append("logits should be compared, but the card has none")
    return found


def differences(proof: Proof, again: Proof) -> list[str]:
    """Differences between a card and another verification of the same two checkpoints."""
    found = []
    for label, one, other in (("A", proof.a, again.a), ("B", proof.b, again.b)):
        if one.layout != other.layout:
            found.append(f"{label} is a {other.layout} checkpoint here, but {one.layout} on the card")
        sets = [("", one.tensors, other.tensors)]
        sets += [(f"{slot} ", one.optimizer.get(slot, {}), other.optimizer.get(slot, {}))
                 for slot in sorted(one.optimizer.keys() | other.optimizer.keys())]  # fmt: skip
        for slot, on_card, here in sets:
            apart = sorted(name for name in on_card.keys() | here.keys() if on_card.get(name) != here.get(name))
            if apart:
                found.append(f"{label}: {slot}{counted(len(apart), 'tensor')} other than on the card, first {apart[0]}")
    if proof.passed != again.passed:
        found.append(f"the card says passed: {str(proof.passed).lower()}; here: {again.reason}")
    if proof.logits is not None and again.logits is not None:
        found += _figures(proof.logits, again.logits, proof.options)
    return found


def other_weights(proof: Proof, checkpoint: Checkpoint) -> list[str]:
    """Tensors of the card's B that differ from this checkpoint's."""
    here = _side(checkpoint, "", False, lambda _: None)["tensors"]
    on_card = {name: each.model_dump() for name, each in proof.b.tensors.items()}
    apart = sorted(name for name in on_card.keys() | here.keys() if on_card.get(name) != here.get(name))
    return [f"{counted(len(apart), 'tensor')} other than on the card, first {apart[0]}"] if apart else []


def _figures(card: ProvenLogits, here: ProvenLogits, options: ProvenOptions) -> list[str]:
    found = []
    if (card.positions, card.tokens_from) != (here.positions, here.tokens_from):
        told = f"{card.positions} positions of {card.tokens_from}"
        found.append(f"the card's logits are of {told}; here {here.positions} of {here.tokens_from}")
    for name, gate in here.gates.items():
        said = card.gates.get(name)
        if said is None:
            found.append(f"the card has no gate {name}")
        elif options.gates.get(name) is None and (
            said.limit < gate.limit - 0.02 if name == "top1" else said.limit > _LOOSER * gate.limit
        ):
            found.append(f"the limit of {name} is {said.limit:g} on the card, but {gate.limit:g} here")
    for name in ("nll_a", "nll_b"):
        one, other = getattr(card, name), getattr(here, name)
        if (one is None) != (other is None) or abs((one or 0) - (other or 0)) > _NLL[options.compute]:
            found.append(f"{name} is {one} on the card, but {other} here")
    return found


def proof_schema() -> dict[str, Any]:
    """The JSON schema in docs/."""
    return Proof.model_json_schema(by_alias=True)


def proof_text(proof: Proof) -> str:
    return json.dumps(proof.to_json(), indent=1, ensure_ascii=False) + "\n"
