"""Plan a conversion, then run it.

Planning only reads headers and small documents, and fixes every output byte's offset; a plan can be printed. Running it
streams the tensors into ``DST.partial``, reopens the output, and renames the folder.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import xxhash

from smolconv.carried import Account, account
from smolconv.checkpoint import Checkpoint, Slot, SourceRecord, without_padding
from smolconv.errors import BadCheckpoint, ParityFailed, UsageError, counted, some_of
from smolconv.files import FileState, require_unchanged, states_of
from smolconv.hub.address import is_hub_uri, require_known
from smolconv.hub.download import open_source
from smolconv.hub.published import with_published_progress
from smolconv.layouts.assets import given_tokenizer, without_own_code
from smolconv.layouts.layout import Layout, PlannedOutput, ReadOptions, Written
from smolconv.layouts.listing import ASSET_NAMES
from smolconv.layouts.registry import LAYOUTS, is_checkpoint, layout_named, read_checkpoint
from smolconv.processes import usable_cores
from smolconv.replacing import lost_with
from smolconv.storage.atomic import OutputFolder, refuse_existing, refuse_nested, require_space
from smolconv.storage.integrity import SourceCheck
from smolconv.storage.manifest import MANIFEST, make_manifest, source_seals
from smolconv.storage.output import write_files
from smolconv.storage.planned import PlannedFile, total_bytes
from smolconv.tensors.dtypes import FLOAT_DTYPES
from smolconv.tensors.finite import finiteness
from smolconv.tensors.lazy import CHUNK_BYTES, Cast, LazyTensor, Stored, cast
from smolconv.version import __version__

DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options that decide what is written. Those that decide how (workers, resume) go to ``run_conversion``."""

    to: str
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    zero_stage: int | None = None
    max_shard_bytes: int = 5 * 10**9
    dtype: str = "keep"
    cast_from: str | None = None  #: "weights" or "master"
    optimizer: bool | None = None  #: None: carry it if the source has it
    tokenizer: Path | None = None
    vocab_size: int | None = None
    rope_scaling: str | None = None  #: "as-trained" or "as-configured"; None: decided by the checkpoint
    nanotron_config: Path | None = None
    world_size: int | None = None
    universal: bool = False
    groups: Path | None = None
    sub_group_size: int | None = None
    tag: str | None = None
    program: str | None = None  #: the program that will load it: trainer or accelerate
    base: Path | None = None
    digest: str = "xxh3"
    config: Path | None = None
    step: int | None = None
    architecture: str | None = None
    source_layout: str | None = None


#: Names of options on the command line that are not valid names in Python.
_WORDS = {"program": "for"}
_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(ConvertOptions)}


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What will be written from which source, to the byte."""

    uri: str
    source: Checkpoint
    prepared: Checkpoint  #: the source as the target will hold it: dtype, vocabulary and slots chosen
    target: Path
    layout: str
    options: ConvertOptions
    output: PlannedOutput
    files: Mapping[Path, FileState]  #: every file of the source, with its state when it was opened
    account: Account  #: what is carried and what is left out
    digest: str

    @property
    def bytes_written(self) -> int:
        return total_bytes(self.output.files)

    @property
    def bytes_read(self) -> int:
        """The number of distinct bytes read from the source's files."""
        return sum({(s.path, s.offset): s.nbytes for s in _sources(self.output)}.values())

    @property
    def tensors(self) -> int:
        return sum(tensor.slot is not None for file in self.output.files for tensor in file.tensors)

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.prepared.warnings, *self.output.warnings)


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """The result, for messages and --json."""

    plan: ConversionPlan
    seconds: float
    warnings: tuple[str, ...]
    source_check: Mapping[str, Any]  #: as in ``--json``: checked, unchecked, without_digest
    verification: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **plan_to_json(self.plan),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "warnings": list(self.warnings),
            "source_check": dict(self.source_check),
            "verification": self.verification,
        }


def peak_rss_bytes() -> int:
    """This process's peak resident size. ``ru_maxrss`` would start at the parent's size when it forked this process."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan_to_json(plan: ConversionPlan) -> dict[str, Any]:
    """The plan as plain JSON types; ``--dry-run`` prints it."""
    return {
        "schema": 1,
        "source": {"uri": plan.uri, "layout": plan.source.layout, "revision": plan.source.revision},
        "target": {"path": str(plan.target), "layout": plan.layout},
        "files": [{"path": str(file.path), "bytes": file.size} for file in plan.output.files],
        "tensors": plan.tensors,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "plan_digest": plan.digest,
        "carried": list(plan.account.carried),
        "left_out": list(plan.account.left_out),
        "warnings": list(plan.warnings),
    }


def plan_conversion(
    source: str | Path, target: Path, options: ConvertOptions, *, headers_only: bool = False
) -> ConversionPlan:
    """Read headers, choose what the target holds, and fix every output file. Writes nothing.

    With ``headers_only`` a Hub repository's tensors are not downloaded, so the plan can be shown but not run. Raises
    ``UsageError`` for options that do not fit, ``BadCheckpoint`` for a source that cannot be read.
    """
    _checked(options)
    _refuse_swapped(source, target)
    require_known(str(target))
    with_optimizer = options.optimizer is not False
    folder = open_source(
        source, headers_only=headers_only, optimizer=with_optimizer, step=options.step, layout=options.source_layout,
        config=options.config,
    )  # fmt: skip
    refuse_nested(folder, target)
    checkpoint = read_checkpoint(
        folder,
        ReadOptions(
            config=options.config,
            layout=options.source_layout,
            step=options.step,
            architecture=options.architecture,
            rope_as_configured=None if options.rope_scaling is None else options.rope_scaling == "as-configured",
            optimizer=with_optimizer,
            check_sidecar=not headers_only,
            base=options.base,
        ),
    )
    return plan_from_checkpoint(with_published_progress(checkpoint, str(source)), str(source), target, options)


def _refuse_swapped(source: str | Path, target: Path) -> None:
    """Raise ``UsageError`` if source and target were swapped, or if the target is on the Hub."""
    uri = re.sub("^hf:/+", "hf://", str(target))  # Path drops a slash
    folder, on_hub = Path(source), is_hub_uri(uri)
    nothing = not is_hub_uri(str(source)) and not (any(folder.iterdir()) if folder.is_dir() else folder.exists())
    if nothing and (on_hub or is_checkpoint(target)):
        raise UsageError(
            f"{source} holds nothing to convert, and {uri} is already a checkpoint.\n"
            "Expected the source first, then the output folder.\n"
            f"Did you mean smolconv convert {uri} {source}?"
        )
    if on_hub:
        raise UsageError(
            f"{uri} is on the Hub, but the target must be a folder on this machine.\n"
            "Expected an output folder.\nGive one, and add --to hf --push owner/name to upload it."
        )


def plan_gguf_import(path: Path, target: Path, options: ConvertOptions) -> ConversionPlan:
    """Plan the Hugging Face folder of a GGUF file. Raises as ``plan_conversion`` and ``read_gguf`` do."""
    from smolconv.layouts.gguf.reader import read_gguf

    _checked(options)
    refuse_nested(path, target)
    return plan_from_checkpoint(read_gguf(path), str(path), target, options)


def plan_from_checkpoint(checkpoint: Checkpoint, uri: str, target: Path, options: ConvertOptions) -> ConversionPlan:
    """Plan the output for a checkpoint that was already read. ``uri``: its origin, for the manifest."""
    layout, own = _checked(options)
    prepared = prepare(checkpoint, options)
    output = layout.plan(prepared, own)
    written = Counter([*(str(file.path) for file in output.files), *output.late])
    if twice := [path for path, count in written.items() if count > 1]:
        raise BadCheckpoint(
            f"{checkpoint.root}: {twice[0]} would be written twice, because a file next to the weights has that name.\n"
            "Expected different names. Move that file away, and convert again."
        )
    files = {**states_of(leaf.path for leaf in _sources(output)), **checkpoint.opened}
    return ConversionPlan(
        uri=uri,
        source=checkpoint,
        prepared=prepared,
        target=target,
        layout=layout.name,
        options=options,
        output=output,
        files=files,
        account=account(checkpoint, prepared, files.keys(), step=options.step, optimizer=options.optimizer),
        digest=_plan_digest(output, options, files),
    )


def _checked(options: ConvertOptions) -> tuple[Layout, Any]:
    """The target's layout and its options. Raises ``UsageError``."""
    layout = layout_named(options.to, "--to")
    own = {field.name for field in fields(layout.options)}
    for name in sorted({field.name for known in LAYOUTS for field in fields(known.options)} - own):
        # Options that always have a value were not necessarily given. 0 is a ZeRO stage, and equals False.
        if _DEFAULTS[name] in (None, False) and getattr(options, name) is not _DEFAULTS[name]:
            raise UsageError(f"--{_WORDS.get(name, name).replace('_', '-')} has no meaning for --to {options.to}.")
    made = layout.options(**{name: getattr(options, name) for name in own if getattr(options, name) is not None})
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype {options.dtype}: expected one of {', '.join(DTYPES)}.")
    if options.cast_from not in (None, "weights", "master"):
        raise UsageError(f"--cast-from {options.cast_from}: expected weights or master.")
    if options.rope_scaling not in (None, "as-trained", "as-configured"):
        raise UsageError(f"--rope-scaling {options.rope_scaling}: expected as-trained or as-configured.")
    if options.digest not in ("xxh3", "sha256", "none"):
        raise UsageError(f"--digest {options.digest}: expected xxh3, sha256 or none.")
    return layout, made


def prepare(checkpoint: Checkpoint, options: ConvertOptions) -> Checkpoint:
    """The checkpoint as the target will hold it: optimizer kept or not, dtype, vocabulary, tokenizer."""
    if options.optimizer and not checkpoint.has_optimizer:
        raise UsageError(f"--optimizer was given, but {checkpoint.root} holds no Adam state.")
    layout, own = _checked(options)
    checkpoint = _cast_parameters(checkpoint, options, layout)
    if not layout.of_an_engine and options.optimizer is None and _is_weights_only(checkpoint.source):
        note = "Adam has made no step since the weights were converted to DeepSpeed: only the weights are carried."
        checkpoint = replace(checkpoint, optimizer=None, progress=None, warnings=(*checkpoint.warnings, note))
    reason = layout.without_adam(checkpoint) if checkpoint.has_optimizer else None
    if reason is not None:
        if options.optimizer:
            raise UsageError(f"--optimizer: {reason}.")
        note = f"{reason}: Adam's state was left out."
        checkpoint = replace(checkpoint, optimizer=None, warnings=(*checkpoint.warnings, note))
    if not checkpoint.has_optimizer:
        kept = (Slot.PARAMETER, Slot.MASTER) if layout.of_an_engine else (Slot.PARAMETER,)
        tensors = {slot: found for slot, found in checkpoint.tensors.items() if slot in kept}
        checkpoint = replace(checkpoint, tensors=tensors, optimizer=None)
    if options.vocab_size is not None:
        checkpoint = _trim_vocabulary(checkpoint, options.vocab_size, "--vocab-size")
    elif checkpoint.unpadded_vocab_size is not None:
        checkpoint = _trim_vocabulary(checkpoint, checkpoint.unpadded_vocab_size, None)
    if options.tokenizer is not None:
        checkpoint = replace(checkpoint, assets={**checkpoint.assets, **given_tokenizer(options.tokenizer)})
    return layout.prepare(without_own_code(checkpoint), own)


def _is_weights_only(source: SourceRecord) -> bool:
    return source.engine is not None and source.engine.weights_only


def _cast_parameters(checkpoint: Checkpoint, options: ConvertOptions, layout: Layout) -> Checkpoint:
    master = checkpoint.tensors.get(Slot.MASTER) or {}
    if options.cast_from == "master" and not master:
        raise UsageError(f"--cast-from master: {checkpoint.root} holds no fp32 master weights.")
    if master and options.cast_from == "weights" and layout.of_an_engine:
        raise UsageError(
            f"--cast-from weights: a {layout.title} run's weights are its rounded masters, which the source has."
        )
    parameters = dict(checkpoint.parameters)
    from_master = options.cast_from == "master" or (
        options.cast_from is None and (options.dtype == "float32" or layout.of_an_engine)
    )
    warnings = list(checkpoint.warnings)
    if options.dtype == "keep" and options.cast_from is None:
        return checkpoint

    def chosen(name: str, tensor: LazyTensor) -> LazyTensor:
        source = master.get(name, tensor) if from_master else tensor
        wanted = tensor.dtype if options.dtype == "keep" else options.dtype
        return cast(source, wanted) if source.dtype in FLOAT_DTYPES else source

    changed = {name: chosen(name, tensor) for name, tensor in parameters.items()}
    if any(tensor.dtype != changed[name].dtype for name, tensor in parameters.items()):
        origin = "the fp32 master weights" if from_master and master else "the stored weights"
        warnings.append(f"parameters are {options.dtype}, taken from {origin}.")
    tensors = {**checkpoint.tensors, Slot.PARAMETER: changed}
    # Adam updates fp32 weights. With rounded parameters alone, the weights that the moments belong to would be lost,
    # and an engine starts from the weights before rounding.
    unrounded = {name: tensor for name, tensor in parameters.items() if tensor.dtype != changed[name].dtype}
    if options.dtype == "float32":
        # The parameters are now the master, so a second copy would be redundant. Widened weights are not the master.
        if from_master:
            tensors.pop(Slot.MASTER, None)
    elif unrounded and not master:
        of_adam = checkpoint.has_optimizer and all(tensor.dtype == "float32" for tensor in parameters.values())
        if layout.of_an_engine or of_adam:
            tensors[Slot.MASTER] = unrounded
    return replace(checkpoint, tensors=tensors, warnings=tuple(warnings))


def _trim_vocabulary(checkpoint: Checkpoint, rows: int, asked: str | None) -> Checkpoint:
    padded = checkpoint.spec.vocab_size
    if not 0 < rows <= padded:
        given = asked or f"{checkpoint.root}: its own record of the vocabulary,"
        raise UsageError(f"{given} {rows}: the checkpoint has {padded} rows, so 1 to {padded} can be kept.")
    if rows == padded:
        return checkpoint
    why = f" smolconv had padded it (--vocab-size {padded} keeps that)." if asked is None else ""
    note = f"the vocabulary was trimmed from {padded} to {rows} rows.{why}"
    return replace(without_padding(checkpoint, rows), warnings=(*checkpoint.warnings, note))


# --- running ---------------------------------------------------------------------------------------------------------

Verifier = Callable[[ConversionPlan, Path], Mapping[str, Any]]


def run_conversion(
    plan: ConversionPlan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    max_memory_bytes: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    verifier: Verifier | None = None,
    check_source: bool = False,
) -> ConversionResult:
    """Run the plan. ``progress`` is called with bytes as they are written.

    Digests recorded for the source are compared with the bytes read; ``check_source`` reads all of its bytes for that.
    Raises ``DigestMismatch`` if one differs, ``SourceChanged`` if a file of the source changed meanwhile; nothing
    appears under the target's name then.

    ``verifier`` checks the written folder before it is renamed; if its result has ``passed`` false, the folder is kept
    as ``DST.failed`` and ``ParityFailed`` is raised. Raises ``MachineError`` and ``UsageError`` before writing.
    """
    started = time.perf_counter()
    refuse_existing(plan.target, overwrite, lost_with)
    _refuse_replacing_the_source(plan)
    workers = workers or default_workers()
    chunk_bytes = _chunk_bytes(workers, max_memory_bytes)
    editable = {*ASSET_NAMES, *(path.name for path in plan.source.assets.values())}
    sealed = source_seals(plan.source, (t.source for file in plan.output.files for t in file.tensors), editable)
    check = SourceCheck(sealed.seals, plan.source.root, sealed.checksums)
    with OutputFolder(plan.target, plan.digest, resume=resume, overwrite=overwrite, loses=lost_with) as folder:
        done = [file for file in plan.output.files if str(file.path) in folder.done]
        # The bytes that an earlier attempt read were not compared completely.
        read_again = {seal.path for seal in sealed.seals} if check_source else {leaf.path for leaf in _leaves(done)}
        require_space(plan.target, plan.bytes_written - total_bytes(done))
        progress(total_bytes(done))
        written = write_files(
            plan.output.files, folder.partial, folder, workers=workers, digest=plan.options.digest,
            chunk_bytes=chunk_bytes, progress=progress, check=check,
            rounded_to=plan.options.dtype if _has_casts(plan) else None,
        )  # fmt: skip
        report = check.finish(read_again, workers)
        require_unchanged(plan.files, "while it was being converted")
        source_check = {
            "checked": report.checked,
            "unchecked": [f"{seal.path.name}: {seal.what}" for seal in report.unchecked],
            "without_digest": [str(path) for path in sealed.unsealed],
        }
        warnings = (*plan.warnings, *sealed.warnings, *_unchecked(source_check), *_nonfinite(plan, written))
        _write_documents(plan, folder, written, source_check, warnings)
        verification = None if verifier is None else _verified(plan, folder, verifier)
        require_unchanged(plan.files, "while it was being converted")
        folder.publish()
    return ConversionResult(
        plan=plan, seconds=time.perf_counter() - started, warnings=warnings, source_check=source_check,
        verification=verification,
    )  # fmt: skip


def _write_documents(
    plan: ConversionPlan, folder: OutputFolder, written: Written, check: Mapping[str, Any], warnings: tuple[str, ...]
) -> None:
    """Write what requires every tensor to have been read: the late files and the manifest."""
    for path, make in plan.output.late.items():
        folder.write(path, make(written))
    source = {"uri": plan.uri, "layout": plan.source.layout, "revision": plan.source.revision, "check": check}
    manifest = make_manifest(
        folder.partial, plan.output.files, plan.output.late, written, digest=plan.options.digest, versions=_versions(),
        source=source, plan_digest=plan.digest, warnings=warnings,
    )  # fmt: skip
    folder.write(MANIFEST, json.dumps(manifest, separators=(",", ":")).encode())


def _unchecked(check: Mapping[str, Any]) -> list[str]:
    if not check["unchecked"]:
        return []
    return [
        f"not compared: {counted(len(check['unchecked']), 'digest')} of the source, whose bytes were read in part or "
        f"out of order ({some_of(check['unchecked'], more=True)}). --check-source reads them completely."
    ]


def _refuse_replacing_the_source(plan: ConversionPlan) -> None:
    """Raise ``UsageError`` if a source file is in the folder that would be replaced, perhaps through a link."""
    target = Path(os.path.realpath(plan.target))
    for path in plan.files if target.is_dir() else ():
        if target in Path(os.path.realpath(path)).parents:
            raise UsageError(
                f"{path} is read for this conversion, but is in {plan.target}, which would be replaced.\n"
                "Expected a target outside the source.\nChoose another target."
            )


def _verified(plan: ConversionPlan, folder: OutputFolder, verifier: Verifier) -> Mapping[str, Any]:
    try:
        verification = verifier(plan, folder.partial)
    except BadCheckpoint as error:
        # Output that cannot be read back fails like output that differs.
        verification = {"passed": False, "reason": str(error).splitlines()[0]}
    if not verification["passed"]:
        failed = folder.publish_failed()
        raise ParityFailed(
            f"{plan.target} was not created: the output does not verify ({verification['reason']}).\n"
            f"It is kept as {failed}."
        )
    return verification


def default_workers() -> int:
    """The default number of workers: more than a few only share the same memory bandwidth."""
    return min(4, usable_cores())


def _chunk_bytes(workers: int, max_memory_bytes: int | None) -> int:
    if max_memory_bytes is None:
        return CHUNK_BYTES
    # A worker holds its chunk; an expression that it reads holds up to two more of CHUNK_BYTES.
    each = max_memory_bytes // workers - 2 * CHUNK_BYTES
    if each < 1 << 16:
        raise UsageError(f"--max-memory is too small for {workers} workers: give at least {workers * 9} MB.")
    return min(each, 4 * CHUNK_BYTES)


def _nonfinite(plan: ConversionPlan, written: Written) -> list[str]:
    """Warnings about infinity and NaN: those that a cast created, and those that were in the source."""
    names = [
        f"{tensor.name} ({tensor.slot})"
        for file in plan.output.files
        for tensor, found in zip(file.tensors, written[str(file.path)])
        if found.nonfinite
    ]
    names = list(dict.fromkeys(names))
    if not names:
        return []
    if not _has_casts(plan):
        return [f"{_tensors(names)} NaN or infinity and were kept unchanged: {some_of(names, 5, more=True)}"]
    # Checked again by canonical names: separate what was in the source from what a cast created.
    before, lost = list[str](), list[str]()
    for slot, tensors in plan.prepared.tensors.items():
        for name, tensor in tensors.items():
            was, became = finiteness(tensor)
            label = f"{name} ({slot.value})"
            before += [label] if was else []
            lost += [label] if became else []
    said: list[str] = []
    if lost:
        shown = some_of(lost, 5, more=True)
        said.append(
            f"{_tensors(lost)} finite values that {plan.options.dtype} cannot hold, which became infinite: {shown}. "
            "Choose another --dtype."
        )
    if before:
        said.append(f"{_tensors(before)} NaN or infinity and were kept unchanged: {some_of(before, 5, more=True)}")
    return said


def _has_casts(plan: ConversionPlan) -> bool:
    return any(isinstance(t, Cast) for tensors in plan.prepared.tensors.values() for t in tensors.values())


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor holds" if len(names) == 1 else f"{len(names)} tensors hold"


def _sources(output: PlannedOutput) -> list[Stored]:
    return _leaves(output.files)


def _leaves(files: Sequence[PlannedFile]) -> list[Stored]:
    return [leaf for file in files for tensor in file.tensors for leaf in tensor.source.leaves()]


#: Names of files may hold bytes that are not UTF-8.
_ANY_NAME = ("utf-8", "backslashreplace")


def _plan_digest(output: PlannedOutput, options: ConvertOptions, sources: Mapping[Path, FileState]) -> str:
    """A digest of everything that decides the output: files, offsets, expressions, and the sources' sizes and times."""
    hasher = xxhash.xxh3_128()
    hasher.update(json.dumps([__version__, asdict(options)], default=str, sort_keys=True).encode(*_ANY_NAME))
    for file in output.files:
        hasher.update(f"{file.path}\0{file.size}\0".encode(*_ANY_NAME))
        for offset, data in file.pieces:
            hasher.update(f"{offset}\0".encode() + data)
        for tensor in file.tensors:
            hasher.update(f"{tensor.name}\0{tensor.slot}\0{tensor.offset}\0{tensor.source!r}\0".encode(*_ANY_NAME))
    for path, state in sorted(sources.items()):  # without the inode, which a new mount may change
        hasher.update(f"{path}\0{state.size}\0{state.mtime_ns}\0{state.ctime_ns}\0".encode(*_ANY_NAME))
    return str(hasher.hexdigest())


def _versions() -> dict[str, str]:
    import numpy as np

    return {
        "smolconv": __version__, "python": platform.python_version(), "numpy": np.__version__, "xxhash": xxhash.VERSION,
    }  # fmt: skip
