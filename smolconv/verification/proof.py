"""The card of a verification that others can repeat: ``verify --proof`` writes it, ``--check-proof`` reads it.

docs/proof.md describes the document, and docs/smolconv_proof.schema.json is its JSON schema. It contains no local path:
folders are given by name, and sources on the Hub by address.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolconv.checkpoint import Checkpoint, Slot
from smolconv.errors import CorruptFile
from smolconv.files import require_unchanged
from smolconv.models.spec import spec_to_json
from smolconv.parsing import finite_json, read_json
from smolconv.processes import usable_cores
from smolconv.storage.atomic import appearing_whole
from smolconv.tensors.lazy import LazyTensor
from smolconv.tensors.reading import as_bytes
from smolconv.verification.compare import VerifyOptions, VerifyReport
from smolconv.version import __version__

PROOF_SCHEMA = "smolconv_proof.schema.json"
#: Size limit. The tensors of a 3B model take 60 kB.
MOST_BYTES = 64 << 20
_PACKAGES = ("numpy", "torch", "transformers", "deepspeed")
_Text = Annotated[str, Field(max_length=10_000)]
#: Options that say how to read A and B: each takes a word, and may stand at the end of a card's command.
READING_OPTIONS = ("--from", "--from-b", "--config", "--config-b", "--architecture")
#: Gates whose limits a user may set.
AskedGate = Literal["max_abs", "kl", "top1"]


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
    spec: dict[str, Any] = Field(description="The architecture: every field of the model's spec.")
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
    gates: dict[AskedGate, float] = Field(description="Limits that were asked for, in place of the measured ones.")


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

    def command_words(self) -> list[str]:
        """Those of ``command`` that follow from the names and options."""
        asked = self.options
        words = ["smolconv", "verify", self.a.name, self.b.name, "--length", str(asked.length)]
        for name, limit in asked.gates.items():
            words += [f"--gate-{name.replace('_', '-')}", f"{limit:g}"]
        words += ["--optimizer"] if asked.optimizer else []
        words += ["--no-logits"] if not asked.logits else []
        words += ["--compute", asked.compute] if asked.compute != "float32" else []
        words += ["--documents", str(asked.documents)] if asked.documents != 1 else []
        words += ["--engine", asked.engine] if asked.engine != "ours" else []
        return words


def make_proof(
    report: VerifyReport, options: VerifyOptions, sides: Sequence[Checkpoint], names: Sequence[str], *,
    words: Sequence[str] = (), advance: Callable[[int], None] = lambda _: None,
) -> Proof:  # fmt: skip
    """The card of a verification; every tensor of A is read once more for its digest, and those of B that differ.

    ``words`` are options of the command that say how to read A and B. ``advance`` is called after each tensor.
    """
    # A folder's name may hold bytes that are not UTF-8.
    names, words = ([each.encode("utf-8", "backslashreplace").decode() for each in texts] for texts in (names, words))
    found = report.to_json()
    logits = found["logits"]
    a = _side(sides[0], names[0], options.optimizer, advance)
    tiers = {Slot.PARAMETER.value: (report.tensors, a["tensors"])}
    tiers |= {slot: (tier, a["optimizer"].get(slot, {})) for slot, tier in (report.optimizer or {}).items()}
    # Reading the second side again could only find what the comparison has found.
    equal = {slot: listed for slot, (tier, listed) in tiers.items() if tier.passed}
    document = {
        "schema": 1,
        "made": date.today().isoformat(),
        "command": "",
        "versions": {"smolconv": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.system(), "architecture": platform.machine(), "processor": _processor(),
            "cores": usable_cores(),
        },
        "a": a,
        "b": _side(sides[1], names[1], options.optimizer, advance, equal),
        "options": {
            "logits": options.logits, "optimizer": options.optimizer, "length": options.length,
            "documents": options.documents, "compute": options.compute, "engine": options.engine,
            "gates": {name: limit for name, limit in (options.gates or {}).items() if limit is not None},
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
    for side in sides:
        require_unchanged(side.opened, "while its digests were computed")
    proof = Proof.model_validate_json(json.dumps(finite_json(document)))
    return proof.model_copy(update={"command": shlex.join([*proof.command_words(), *words])})


def _tensors(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ProvenTensors.model_fields}


def read_side(checkpoint: Checkpoint, name: str) -> ProvenSide:
    """A checkpoint as a card has it, without Adam's state; every tensor is read."""
    side = _side(checkpoint, name, False, lambda _: None)
    return ProvenSide.model_validate_json(json.dumps(finite_json(side)))


def _side(
    checkpoint: Checkpoint, name: str, optimizer: bool, advance: Callable[[int], None],
    equal: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """``equal``: digests by slot of tensors that were found to be the same, bit for bit, where dtype and shape are."""

    def proven(slot: Slot) -> dict[str, Any]:
        listed, known = {}, equal.get(slot.value, {})
        for tensor_name, tensor in checkpoint.tensors.get(slot, {}).items():
            told = {"dtype": tensor.dtype, "shape": tensor.shape}
            same = known.get(tensor_name)
            reused = same is not None and told.items() <= same.items()
            listed[tensor_name] = same if reused else {**told, "sha256": sha256_of(tensor)}
            advance(1)
        return listed

    slots = [slot for slot, found in checkpoint.tensors.items() if found and slot is not Slot.PARAMETER]
    return {
        "name": name, "revision": checkpoint.revision, "layout": checkpoint.layout,
        "spec": spec_to_json(checkpoint.spec), "tensors": proven(Slot.PARAMETER),
        "optimizer": {slot.value: proven(slot) for slot in slots} if optimizer else {},
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
    """Raises ``MissingFile``, and ``CorruptFile`` for anything that is no card of a known version."""
    document = read_json(path, MOST_BYTES, unique=True)
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


def proof_schema() -> dict[str, Any]:
    """The JSON schema in docs/."""
    return Proof.model_json_schema(by_alias=True)


def write_proof(proof: Proof, path: Path) -> None:
    """Write a card; the file appears only when it is complete."""
    with appearing_whole(path) as part:
        part.write_text(proof_text(proof), encoding="utf-8")


def reading_words(
    layouts: tuple[str | None, str | None],
    configs: tuple[str | PathLike[str] | None, str | PathLike[str] | None],
    architecture: str | None,
) -> list[str]:
    """The command-line options that say how to read A and B, with file names instead of paths."""
    paths = [None if each is None else Path(each).name for each in configs]
    given = dict(zip(READING_OPTIONS, (*layouts, *paths, architecture)))
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def proof_text(proof: Proof) -> str:
    return json.dumps(proof.to_json(), indent=1, ensure_ascii=False) + "\n"
