"""Checks the files of a run's checkpoint: that all are there, that none is added, and that none has changed.

A step's folder must hold exactly what the trainer writes. DeepSpeed finds files by patterns and by older names, so an
extra file might be loaded in place of the right one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from smolconv.checkpoint import Checkpoint
from smolconv.continual_pretraining.run.checkpoints import STATE, RunState, step_of, write_text
from smolconv.errors import (
    BadCheckpoint,
    DigestMismatch,
    MachineError,
    MissingFile,
    MixedCheckpoint,
    SmolconvError,
)
from smolconv.layouts.deepspeed.checkpoint_engine import FileDigest, digest_file
from smolconv.layouts.deepspeed.documents import STAND_INS
from smolconv.layouts.deepspeed.files import model_file, optimizer_file
from smolconv.layouts.deepspeed.reader import read_deepspeed
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.listing import ASSET_NAMES
from smolconv.storage.integrity import archive_seals, refuse_seals
from smolconv.storage.manifest import MANIFEST, SCHEMA, read_manifest
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.tensors.reading import close_thread_files
from smolconv.version import __version__

CONFIG = "config.json"
RANDOM = "random"
_RANK = re.compile(r"(?:zero_pp_rank_|rank-)(\d+)")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A step's folder with the right files by name and size. Their contents are not checked yet."""

    folder: Path
    state: RunState
    bytes_by_name: Mapping[str, int]
    digests: Mapping[str, str]  #: as recorded; empty for a checkpoint that was saved without a manifest


def random_file(rank: int) -> str:
    return f"{RANDOM}/rank-{rank:05d}.pt"


def file_names(state: RunState) -> tuple[set[str], set[str]]:
    """Names below the step's folder that the trainer must write for this state, and those that it may write."""
    ranks, bf16 = range(state.world_size), state.dtype == "bfloat16"
    needed = {STATE, CONFIG}
    needed |= {model_file(rank) for rank in ranks} if state.zero_stage == 3 else {model_file(None)}
    needed |= {optimizer_file(rank, bf16=bf16) for rank in ranks} if state.zero_stage else set()
    random = {random_file(rank) for rank in ranks}
    if state.manifest:
        return needed | random | {MANIFEST}, set(ASSET_NAMES)
    return needed, random | set(ASSET_NAMES)


def refuse_foreign(folder: Path) -> None:
    """Raise ``MixedCheckpoint`` for the first file that a run of this state does not save.

    Ignores a folder whose state cannot be read; ``examine`` reports that.
    """
    try:
        known = set.union(*file_names(_state(folder)))
    except BadCheckpoint:
        return
    for name, entry in _entries(folder):
        if name in known and entry.is_symlink():
            raise MixedCheckpoint(
                f"{_shown(name)} in {folder.name} is a symbolic link, which continue-train does not save.\n"
                f"Expected a regular file: {folder / name}.\n"
                "If the link's target belongs to this checkpoint, copy it there."
            )
        if name not in known:
            raise MixedCheckpoint(
                f"{_shown(name)} in {folder.name} was not saved by continue-train.\n"
                f"A run continues only from its own files; {folder / name} does not belong to {_saved_as(folder)}.\n"
                "Move it out of the folder, and check where it came from."
            )


def _state(folder: Path) -> RunState:
    """Read the state, but not through a link or from a device."""
    path = folder / STATE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise MixedCheckpoint(
            f"{STATE} in {folder.name} is not a regular file.\nExpected a regular file: {path}.\nCopy the file there."
        )
    return RunState.read(folder)


def _saved_as(folder: Path) -> str:
    state = _state(folder)
    return f"{state.world_size} rank{'s' * (state.world_size > 1)} of ZeRO-{state.zero_stage} in {state.dtype}"


def _entries(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything in a step's folder by relative name; of its subfolders only ``random`` is listed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == RANDOM and entry.is_dir(follow_symlinks=False):
            for below in sorted(os.scandir(entry.path), key=lambda entry: entry.name):
                yield f"{RANDOM}/{below.name}", below
        else:
            yield entry.name, entry


def examine(folder: Path) -> Contents:
    """Compare the names and sizes of all files with the run's records.

    Raises ``BadCheckpoint`` or a subclass if the checkpoint is not what the trainer saved.
    """
    refuse_foreign(folder)
    state = _state(folder)
    if (step := step_of(folder)) not in (None, state.step):
        raise MixedCheckpoint(
            f"{STATE} in {folder.name} is of step {state.step}.\nExpected {folder} to hold only step {step}."
        )
    sizes = {name: entry.stat().st_size for name, entry in _entries(folder) if entry.is_file(follow_symlinks=False)}
    needed, _ = file_names(state)
    recorded = _recorded(folder, state) if state.manifest and MANIFEST in sizes else {}
    for name in sorted(needed | set(recorded)):
        if name not in sizes:
            raise MissingFile(f"{name} in {folder.name} is missing.\n{folder / name} was saved with it.")
        if name in recorded and recorded[name].nbytes != sizes[name]:
            raise DigestMismatch(
                f"{name} in {folder.name} has {sizes[name]:,} bytes, but {recorded[name].nbytes:,} when it was "
                f"saved.\nExpected the complete file: {folder / name}."
            )
    if recorded and (unlisted := sorted(set(sizes) - set(recorded) - {MANIFEST})):
        raise MixedCheckpoint(
            f"{unlisted[0]} in {folder.name} was not saved with it: {MANIFEST} does not list it.\n"
            f"A run continues only from its own files: {folder / unlisted[0]}.\nMove it out of the folder."
        )
    return Contents(
        folder=folder, state=state, bytes_by_name=sizes, digests={name: file.digest for name, file in recorded.items()}
    )


def read_own(folder: Path) -> Checkpoint:
    """Read a step's folder as a DeepSpeed checkpoint, ignoring other files; assets come only from this folder."""
    try:
        found = read_deepspeed(folder, ReadOptions())
    finally:
        close_thread_files()
    return replace(found, assets={name: path for name, path in found.assets.items() if path.parent == folder})


def compare_states(contents: Contents) -> None:
    """Check that DeepSpeed's files have the step and ranks of ``trainer.json``.

    Raises ``MixedCheckpoint`` if they differ, and what ``read_deepspeed`` raises.
    """
    folder, state = contents.folder, contents.state
    checkpoint = read_own(folder)
    found, topology = checkpoint.progress, checkpoint.topology
    ranks = topology.world_size if state.zero_stage else state.world_size  # one file for all ranks
    dtype = checkpoint.parameters["model.embed_tokens.weight"].dtype
    said = (None if found is None else found.step, topology.zero_stage, ranks, dtype)
    if said != (state.step, state.zero_stage, state.world_size, state.dtype):
        raise MixedCheckpoint(
            f"{STATE} in {folder.name} belongs to another checkpoint than the other files.\n"
            f"It says step {state.step}, {_saved_as(folder)}; they say step {said[0]}, {said[2]} of ZeRO-{said[1]} in "
            f"{said[3]} ({folder})."
        )


def check_bytes(contents: Contents, name: str) -> None:
    """Read a whole file. Raises ``BadCheckpoint`` if it is not what was saved, or if its pickle is unsafe."""
    path = contents.folder / name
    if name in contents.digests and digest_file(path).digest != contents.digests[name]:
        raise DigestMismatch(
            f"{name} in {contents.folder.name} is damaged: its bytes are not those that were saved.\n"
            f"Expected the digest {contents.digests[name]} for {path}."
        )
    if name.endswith(".pt"):
        read_torch_archive(path, allow=STAND_INS)
        if name not in contents.digests:
            # Early versions recorded no digests: only the archive's CRC-32s can be checked.
            refuse_seals(path, archive_seals([path]), 1)


def share_of(contents: Contents, rank: int, world_size: int) -> list[str]:
    """The files that a rank checks: split evenly by bytes, preferably those that it will load."""
    loads, mine = [0] * world_size, []
    for name, nbytes in sorted(contents.bytes_by_name.items(), key=lambda item: (-item[1], item[0])):
        match, least = _RANK.search(name), min(loads)
        owner = int(match[1]) if match else 0
        chosen = owner if owner < world_size and loads[owner] == least else loads.index(least)
        loads[chosen] += nbytes
        if chosen == rank:
            mine.append(name)
    return mine


def problem_in(contents: Contents, names: list[str]) -> SmolconvError | None:
    """The first problem with these files, as an error to raise once all ranks know of it."""
    for name in names:
        try:
            check_bytes(contents, name)
        except SmolconvError as error:
            return error
        except OSError as error:
            return unreadable(contents.folder / name, error)
    return None


def unreadable(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{path.name} cannot be read: {error.strerror or error}.\nExpected a readable file: {path}.\n"
        "Check its permissions and the disk, or resume from an earlier checkpoint with --resume PATH."
    )


# --- the manifest ----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, step: int, source: str, files: Mapping[str, FileDigest]) -> None:
    """The ``smolconv_manifest.json`` of the folder."""
    import deepspeed
    import torch

    document = {
        "schema": SCHEMA,
        "tool": "smolconv",
        "versions": {"smolconv": __version__, "torch": str(torch.__version__), "deepspeed": deepspeed.__version__},
        "source": {"uri": source, "layout": "deepspeed", "revision": None},
        "step": step,
        "files": [{"path": name, "bytes": f.nbytes, "digest": f.digest} for name, f in sorted(files.items())],
        "tensors": [],
        "warnings": [],
    }
    write_text(folder / MANIFEST, json.dumps(document, indent=1) + "\n")


def _recorded(folder: Path, state: RunState) -> dict[str, FileDigest]:
    manifest = read_manifest(folder)
    assert manifest is not None
    files = {
        seal.path.relative_to(folder).as_posix(): FileDigest(nbytes=manifest.files[seal.path], digest=seal.digest)
        for seal in manifest.seals
    }
    needed, allowed = file_names(state)
    if manifest.step != state.step or not needed - {MANIFEST} <= set(files) <= needed | allowed:
        raise MixedCheckpoint(
            f"{MANIFEST} in {folder.name} belongs to another checkpoint than {STATE}.\n"
            f"Expected step {state.step} of {_saved_as(folder)}, found step {manifest.step!r:.60} "
            f"({folder / MANIFEST})."
        )
    return files


def _shown(text: str) -> str:
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
