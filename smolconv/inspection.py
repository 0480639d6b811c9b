"""Collects facts about a checkpoint for inspect and its --json; reads only headers, unless digests are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint
from smolconv.errors import SmolconvError
from smolconv.files import is_there
from smolconv.models.huggingface import parameter_shapes
from smolconv.models.spec import spec_differences, spec_to_json
from smolconv.storage.integrity import refuse_seals
from smolconv.storage.manifest import MANIFEST, PROOF, check_manifest, find_manifest, source_seals
from smolconv.storage.torch_archive.records import is_torch_archive


def _proof(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """The claims of a card in the folder, which inspect does not check."""
    try:
        if not is_there(folder / PROOF):
            return None
        from smolconv.verification.proof import read_proof
        from smolconv.verification.proof_check import doubts

        card = read_proof(folder / PROOF)
    except SmolconvError as error:
        problems.append(str(error).splitlines()[0])
        return None
    problems += [f"{PROOF}: {doubt}" for doubt in doubts(card)]
    return {
        "passed": card.passed, "reason": card.reason, "made": card.made, "a": card.a.name, "b": card.b.name,
        "smolconv": card.versions.get("smolconv"),
    }  # fmt: skip


def inspect_checkpoint(checkpoint: Checkpoint, *, tensors: bool = False) -> dict[str, Any]:
    """The document that ``smolconv inspect --json`` prints."""
    dtypes = Counter(tensor.dtype for found in checkpoint.tensors.values() for tensor in found.values())
    progress = checkpoint.progress
    document: dict[str, Any] = {
        "schema": 1,
        "path": str(checkpoint.root),
        "layout": checkpoint.layout,
        "architecture": checkpoint.spec.architecture,
        "spec": spec_to_json(checkpoint.spec),
        "parameters": sum(prod(shape) for shape in parameter_shapes(checkpoint.spec).values()),
        "bytes": sum(path.stat().st_size for path in set(checkpoint.files) if path.is_file()),
        "dtypes": dict(dtypes),
        "topology": asdict(checkpoint.topology),
        "has_optimizer": checkpoint.has_optimizer,
        "slots": sorted(slot.value for slot, found in checkpoint.tensors.items() if found),
        "progress": None if progress is None else {
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "stages": [asdict(stage) for stage in progress.stages],
            "last_stage_index": progress.last_stage_index,
        },
        "tied": checkpoint.spec.tied,
        "frozen": list(checkpoint.frozen),
        "files": len(set(checkpoint.files)),
        "revision": checkpoint.revision,
        "problems": list(checkpoint.warnings),
    }  # fmt: skip
    document["proof"] = _proof(checkpoint.root, document["problems"])
    if checkpoint.optimizer is not None:
        document["adam_steps"] = sorted(set(checkpoint.optimizer.steps.values()))
        document["groups"] = [
            {"parameters": len(group.names), "hyperparameters": dict(group.hyperparameters)}
            for group in checkpoint.optimizer.groups
        ]
    if tensors:
        document["tensors"] = [
            {"name": name, "slot": slot.value, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for slot, found in checkpoint.tensors.items()
            for name, tensor in found.items()
        ]
    return document


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of ``inspect --check``."""

    checked: int  #: digests that hold: of tensors, of records of torch archives, of files
    unchecked: Mapping[Path, str]  #: files without a recorded digest, and why


def check_checkpoint(checkpoint: Checkpoint, workers: int = 1) -> Checked:
    """Re-read all bytes and compare them with every digest recorded for them.

    Raises ``DigestMismatch``, also if a file in the manifest is missing, and ``CorruptFile`` for a manifest that lists
    nothing.
    """
    tensors = [tensor for found in checkpoint.tensors.values() for tensor in found.values()]
    manifest = find_manifest(checkpoint)
    found = source_seals(checkpoint, tensors, ())
    refuse_seals(checkpoint.root, found.seals, workers)
    checked = len(found.seals)
    if manifest is not None:
        seen = set(found.seals)
        rest = [seal for seal in manifest.seals if seal not in seen]
        checked += check_manifest(replace(manifest, seals=tuple(rest)), workers)
    unchecked = {
        path: "written with --digest none" if manifest is not None and path in manifest.without_digest
        else "a torch archive without checksums" if is_torch_archive(path)
        else f"not listed in {MANIFEST}" if manifest is not None
        else f"no {MANIFEST} lists it, and its format holds no checksums"
        for path in found.unsealed
    }  # fmt: skip
    return Checked(checked=checked, unchecked=unchecked)


def diff_checkpoints(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """Compare specs and tensors' names, shapes and dtypes. Reads no tensor."""
    left = {(slot.value, name): t for slot, found in a.tensors.items() for name, t in found.items()}
    right = {(slot.value, name): t for slot, found in b.tensors.items() for name, t in found.items()}
    changed = [
        {
            "name": key[1], "slot": key[0], "shape_a": list(left[key].shape), "shape_b": list(right[key].shape),
            "dtype_a": left[key].dtype, "dtype_b": right[key].dtype,
        }
        for key in left
        if key in right and (left[key].shape, left[key].dtype) != (right[key].shape, right[key].dtype)
    ]  # fmt: skip
    specs = spec_differences(a.spec, b.spec)
    only_a = [{"name": name, "slot": slot} for slot, name in left if (slot, name) not in right]
    only_b = [{"name": name, "slot": slot} for slot, name in right if (slot, name) not in left]
    return {
        "schema": 1,
        "a": str(a.root),
        "b": str(b.root),
        "same": not (specs or only_a or only_b or changed),
        "spec_differences": specs,
        "only_a": only_a,
        "only_b": only_b,
        "changed": changed,
    }
