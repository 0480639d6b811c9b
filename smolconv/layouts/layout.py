"""The interface of a layout: a reader from a folder to a ``Checkpoint``, and a writer from one to planned files.

A layout is a package with a ``layout.py`` that holds its ``Layout``, and a line in ``registry.py``. Whoever converts,
verifies or downloads uses the record, and names no layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from smolconv.checkpoint import Checkpoint
from smolconv.errors import CorruptFile, MissingFile, NameMismatch
from smolconv.files import file_size, is_lfs_pointer
from smolconv.layouts.listing import AnyPath, Listing
from smolconv.models.huggingface import spec_to_hf
from smolconv.models.spec import ModelSpec
from smolconv.parsing import MOST_TOKENIZER_BYTES, read_json
from smolconv.storage.planned import Piece, PlannedFile, PlannedTensor, WrittenTensor
from smolconv.storage.torch_archive.archive import plan_torch_archive, read_torch_archive
from smolconv.storage.torch_archive.crc32 import crc32_combine
from smolconv.storage.torch_archive.values import ArchiveTensor, Storage
from smolconv.tensors.lazy import LazyTensor, Stored, equal
from smolconv.version import __version__

#: The results of the pass over the tensors, by file; digests are known only afterwards.
Written = Mapping[str, Sequence[WrittenTensor]]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading a source."""

    config: Path | None = None  #: a config to use instead of the folder's own
    layout: str | None = None  #: the layout to read (``--from``), if a folder holds several; None: detect it
    step: int | None = None  #: which step of a run folder; the latest by default
    architecture: str | None = None  #: the family, if a nanotron config could belong to several
    #: Use nanotron's rope_scaling, which nanotron itself ignores; None: only if the checkpoint says that it was
    #: imported with it and not trained since.
    rope_as_configured: bool | None = None
    optimizer: bool = True  #: read Adam's state if it is there
    check_sidecar: bool = True  #: compare the weights with those that an HF sidecar was written with
    base: Path | None = None  #: a checkpoint that supplies weights which were left out (DeepSpeed)


@dataclass(frozen=True, kw_only=True)
class PlannedOutput:
    """The plan of a complete output folder: only headers have been read, and nothing written."""

    files: tuple[PlannedFile, ...]
    #: Small files whose content needs the digests: path -> a function of what was written.
    late: Mapping[str, Callable[[Written], bytes]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """The files of a checkpoint in the layout, and those that programs write with it."""

    names: frozenset[str] = frozenset()  #: paths within the folder
    pattern: str = ""  #: a pattern of such paths, for files that no reader opens
    step: Path | None = None  #: the step folder that a reader uses; files of other steps do not belong to it
    beside: str = ""  #: paths in folders next to the steps' folders, which belong to all steps


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout: how it is recognised, read and written."""

    name: str  #: in JSON, manifests and messages
    words: tuple[str, ...]  #: its names for ``--to``, the shortest first
    title: str  #: for messages
    signs: str  #: files that identify its folders, for the message that no layout was recognised
    listing: Listing  #: the package's module ``listing``
    #: Raises ``BadCheckpoint`` and its kind. The third is what ``ReadOptions.base`` names, read.
    read: Callable[[Path, ReadOptions, Checkpoint | None], Checkpoint]
    own_files: Callable[[Path], OwnFiles]
    options: type[Any]  #: a dataclass with its writer's options; raises ``UsageError`` for invalid ones
    plan: Callable[[Checkpoint, Any], PlannedOutput]
    #: Completes the checkpoint for its writer, after dtype and vocabulary are chosen.
    prepare: Callable[[Checkpoint, Any], Checkpoint] = lambda checkpoint, options: checkpoint
    #: Why it cannot hold a checkpoint's Adam state, or None.
    without_adam: Callable[[Checkpoint], str | None] = lambda checkpoint: None
    #: Canonical names of parameters that it cannot hold: they are read as zero, and must be zero to be written.
    without_place: Callable[[ModelSpec], Sequence[str]] = lambda spec: ()
    #: Whether a folder is in this layout once ``ReadOptions.config`` supplies the missing config.
    detect_with_config: Callable[[AnyPath], bool] = lambda folder: False
    #: Why a folder that looks like this layout cannot be read.
    lacking: Callable[[AnyPath], MissingFile | None] = lambda folder: None
    #: Whether it stores fp32 masters, with Adam's state or zeros; the weights are then their rounded values.
    of_an_engine: bool = False
    takes_base: bool = False  #: a checkpoint may lack weights, which another one supplies


@dataclass(frozen=True, kw_only=True)
class ArchiveContent:
    """One of the consecutive tensors that fill a storage of a torch archive."""

    name: str
    slot: str
    source: LazyTensor


def archive_file(
    path: str,
    obj: object,
    contents: Mapping[Storage, Sequence[ArchiveContent]],
    *,
    allow: Mapping[tuple[str, str], Callable[..., object]] = MappingProxyType({}),
) -> PlannedFile:
    """Plan a torch archive that holds ``obj``, whose storages are filled by ``contents``.

    ``allow`` are the classes that ``obj`` names, for reading it back.
    """
    plan = plan_torch_archive(PurePosixPath(path).stem, obj)
    tensors: list[PlannedTensor] = []
    records: list[tuple[Storage, int]] = []  # each storage and its number of tensors
    for storage, (offset, nbytes) in sorted(plan.records.items(), key=lambda item: item[1]):
        parts = contents[storage]
        assert sum(part.source.nbytes for part in parts) == nbytes, path
        records.append((storage, len(parts)))
        for part in parts:
            tensors.append(PlannedTensor(name=part.name, slot=part.slot, offset=offset, source=part.source))
            offset += part.source.nbytes

    def finish(crcs: Sequence[int]) -> Sequence[Piece]:
        found, at = {}, 0
        for storage, count in records:
            crc = 0
            for tensor, part_crc in zip(tensors[at : at + count], crcs[at : at + count]):
                crc = crc32_combine(crc, part_crc, tensor.source.nbytes)
            found[storage] = crc
            at += count
        return plan.finish(found)

    def check(written: Path) -> None:
        found = {(t.offset, t.dtype) for t in _archive_tensors(read_torch_archive(written, allow=allow)) if t.nbytes}
        wanted = {(t.offset, t.source.dtype) for t in tensors if t.source.nbytes}
        if found != wanted or written.stat().st_size != plan.size:
            raise CorruptFile(f"{written} reads back differently from what was planned.")

    return PlannedFile(
        path=PurePosixPath(path), size=plan.size, tensors=tuple(tensors), pieces=plan.pieces, finish=finish, check=check
    )


def _archive_tensors(value: object) -> Iterator[ArchiveTensor]:
    if isinstance(value, ArchiveTensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _archive_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _archive_tensors(item)


def without_aliases(
    found: Mapping[str, LazyTensor], aliases: Mapping[str, str], where: object
) -> dict[str, LazyTensor]:
    """Without a tied head's second copy, once it is known to be the same, bit for bit. Raises ``NameMismatch``."""
    kept = dict(found)
    for alias, name in aliases.items():
        if alias not in found or name not in found:
            continue
        if found[alias] != found[name] and not equal(found[alias], found[name]):
            raise NameMismatch(
                f"{where}: config.json ties {alias} to {name}, but they are different tensors.\n"
                "Set tie_word_embeddings to false if the head was trained separately."
            )
        del kept[alias]
    return kept


def copied_file(path: str, source: Path) -> PlannedFile:
    """A file that is copied byte for byte."""
    size = file_size(source, MOST_TOKENIZER_BYTES)
    content = Stored(path=source, offset=0, shape=(size,), dtype="uint8")
    tensors = (PlannedTensor(name=source.name, slot=None, offset=0, source=content),) if size else ()
    return PlannedFile(path=PurePosixPath(path), size=size, tensors=tensors)


def copied_assets(assets: Mapping[str, Path], folder: str = "") -> list[PlannedFile]:
    """Files to copy with the weights, except Git LFS pointers, which are left out with a warning.

    Raises ``CorruptFile`` for a config that is not JSON: no program could load the model with it.
    """
    travelling = {name: path for name, path in assets.items() if not is_lfs_pointer(path)}
    for name in travelling.keys() & {"config.json", "generation_config.json"}:
        read_json(travelling[name])
    return [copied_file(f"{folder}{name}", path) for name, path in travelling.items()]


def hf_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json of the model: the spec, and other fields of the source's document."""
    known = checkpoint.source.hf_config or {}
    if not known and "config.json" in checkpoint.assets:
        # An HF folder was converted to nanotron and back: its document holds fields that are not in the spec.
        known = read_json(checkpoint.assets["config.json"])
    carried = {**(checkpoint.source.nanotron_config or {}), **known}
    if known.get("model_type") != checkpoint.spec.architecture:
        known = {}  # --architecture chose another family, whose class has other fields
    return {**known, **spec_to_hf(checkpoint.spec, carried, dtype)}


#: Markers around smolconv's section in a model card. Other text is kept when it is published again.
SECTION_BEGIN, SECTION_END = "<!-- smolconv: begin -->", "<!-- smolconv: end -->"


def one_line(text: str, *, most: int = 120) -> str:
    """Text from a file without line breaks and control characters, of at most ``most`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def plain_text(text: str, *, most: int = 120) -> str:
    """Text from a file as Markdown that shows it, in one line: a name cannot be a heading, a link, HTML or a table."""
    return re.sub(r"([\\`*_\[\]<>|#&!~])", r"\\\1", one_line(text, most=most))


def repository_of(folder: Path) -> str | None:
    """``owner/name`` of a folder in the Hub's cache (``models--owner--name/snapshots/COMMIT``)."""
    parts = folder.parts
    for name, below in pairwise(parts):
        if below == "snapshots" and (found := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", name, re.ASCII)):
            return f"{found[1]}/{found[2]}"
    return None


def model_card(checkpoint: Checkpoint, what: str, tokenizer: bool) -> bytes:
    """A model card that states where the weights come from, with a name instead of a local path."""
    spec = checkpoint.spec
    repository = repository_of(checkpoint.root)
    name = plain_text(repository or checkpoint.root.name or spec.architecture)
    lines = [
        "---", "library_name: transformers", *([f"base_model: {repository}"] if repository else []),
        "tags: [smolconv]", "---", SECTION_BEGIN, f"# {name}", "",
        f"{what} written by smolconv {__version__} from {name} ({checkpoint.layout} layout).",
        "Digests of every tensor are in `smolconv_manifest.json`; `smolconv inspect --check .` compares them.", "",
        f"- {spec.num_layers} layers, hidden size {spec.hidden_size}, {spec.num_heads} query and {spec.num_kv_heads} "
        f"key/value heads, vocabulary {spec.vocab_size}, rope theta {spec.rope_theta:g}",
    ]  # fmt: skip
    if checkpoint.progress is not None:
        lines.append(f"- trained for {checkpoint.progress.step} steps")
    if not tokenizer:
        lines.append("- no tokenizer came with the source: add the one that the model was trained with")
    return ("\n".join([*lines, SECTION_END]) + "\n").encode()
