"""Records the token folders' files with a checkpoint, and decides whether a run can continue with their present files.

A sample is a number, counted through a folder's files in reading order. Adding a file before others, or removing one,
shifts every sample after it: the run would train some rows twice and skip others.

A record is plain JSON: for each folder's path its files in reading order, ``{name: [tokens, ids, index, loss]}`` with
digests of the three files, null for a missing one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from smolconv.continual_pretraining.data.folders import open_folders, open_held_out, plain_path
from smolconv.continual_pretraining.data.position import Position, is_number_of, restarted_at, samples_of
from smolconv.continual_pretraining.recipe.schema import Data, Evaluation, Recipe
from smolconv.continual_pretraining.tokens.files import TokenFile, TokenFolder
from smolconv.errors import UsageError, counted, some_of
from smolconv.files import open_file, reading

FolderRecord = Mapping[str, Sequence[Any]]
TokenRecord = Mapping[str, FolderRecord]

#: Files up to this size are hashed completely, longer ones in four ranges: a folder may hold terabytes. An index holds
#: cumulative ends, so a document of another length changes everything after it.
_DIGESTED_BYTES = 1 << 18
_RANGES = 4
#: Files that are read in parallel: a shared file system is slow, but serves many requests at once.
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class DataPlace:
    """The position in the data at which a run continues."""

    position: Position | None  #: None: the data's beginning
    record: TokenRecord  #: of the present folders, and of those that are no longer read
    events: tuple[str, ...] = ()  #: changes, for the log


@dataclass(frozen=True, kw_only=True)
class _Change:
    """The difference between a folder and its record."""

    what: str
    moves: bool  #: samples have changed, beyond ``edits``
    lengthens: bool  #: files were added
    edits: bool  #: tokens differ within documents of unchanged length


def check_record(found: object) -> None:
    """Raise ``ValueError`` if it is not a record."""
    if not isinstance(found, dict) or not all(isinstance(files, dict) for files in found.values()):
        raise ValueError("token_files is not an object of folders with their files")
    for path, files in found.items():
        for name, file in files.items():
            whole = isinstance(file, list) and len(file) == 4 and is_number_of(file[0]) and isinstance(file[1], str)
            if not whole or not all(digest is None or isinstance(digest, str) for digest in file[2:]):
                raise ValueError(f"token_files has {file!r:.60} for {name!r:.60} in {path!r:.60}, expected its digests")


def record_of(folders: Mapping[str, TokenFolder]) -> dict[str, FolderRecord]:
    """The record by path. A few reads per file; raises what ``open_file`` does."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return {
            path: dict(zip([file.path.name for file in folder.files], threads.map(_record, folder.files)))
            for path, folder in folders.items()
        }


def place_in_data(
    recipe: Recipe, position: Position | None, recorded: TokenRecord, vocab_size: int, since: str
) -> DataPlace:
    """The place after ``position`` in the present folders; ``since`` names the step that was ``recorded``.

    A source continues if its samples have kept their numbers: files were added at the end within its first epoch, or
    tokens were edited within documents. Any other change raises ``UsageError``, or restarts the source with
    ``data.on_change: restart-source``. Raises what ``TokenFolder.open`` does, too.
    """
    data, evaluation = recipe.data, recipe.evaluation
    folders = open_folders(data, position, vocab_size)
    sources = () if evaluation is None else evaluation.sources
    held_out = {plain_path(source.path): open_held_out(source, data, vocab_size) for source in sources}
    now = record_of({**held_out, **folders})
    restarted: dict[str, int] = {}
    events, refused = list[str](), list[tuple[TokenFolder, str, int]]()
    for path, folder in folders.items():
        read = _samples_read(position, path, data.sequence_length)
        change = None if path not in recorded or read <= 0 else _change(recorded[path], now[path], data.loss_masks)
        if change is None:
            continue
        what, windows = change.what, _windows(recorded[path], data)
        if not change.moves and (read <= windows or not change.lengthens):
            events.append(
                f"data: {folder.name} changed since {since}: {what}. All samples keep their numbers, so it continues."
            )
            continue
        if not change.moves:
            what += f", after the first epoch of {counted(windows, 'sample')}: later epochs would shift"
        if data.on_change == "refuse":
            refused.append((folder, what, read))
            continue
        restarted[path] = read * data.sequence_length
        events.append(
            f"data: {folder.name} changed since {since}: {what}. It restarts from its first sample "
            f"(data.on_change: restart-source): the {read:,} rows that were read may be trained a second time."
        )
    if refused:
        raise _refusal(refused, since)
    if evaluation is not None:
        events += _incomparable(evaluation, held_out, recorded, now, data, since)
    if restarted:
        assert position is not None
        before = position.get("restarted", {})
        restarted = {path: tokens + before.get(path, 0) for path, tokens in restarted.items()}
        position = {**position, "restarted": {**before, **restarted}}
    return DataPlace(position=position, record={**recorded, **now}, events=tuple(events))


def _samples_read(position: Position | None, path: str, sequence_length: int) -> int:
    if position is None:
        return 0
    read = samples_of(position["stages"], path, sequence_length)
    return read - restarted_at(position, path, sequence_length)


def _refusal(refused: Sequence[tuple[TokenFolder, str, int]], since: str) -> UsageError:
    lines = [f"data: the files of {folder.name} changed since {since}: {what}." for folder, what, _ in refused]
    read = " and ".join(f"{counted(samples, 'sample')} of {folder.path}" for folder, _, samples in refused)
    return UsageError(
        "\n".join(lines) + f"\n{read} were read, counted through the files in order. Continuing would train some "
        "rows twice and skip others.\nRestore the files, and put new ones into another folder; "
        "or set data.on_change: restart-source. A changed source then restarts from its first sample, so "
        "rows that were read may be trained twice; the other sources continue."
    )


def _incomparable(
    evaluation: Evaluation, held_out: Mapping[str, TokenFolder], recorded: TokenRecord, now: TokenRecord, data: Data,
    since: str,
) -> Iterator[str]:  # fmt: skip
    for path, folder in held_out.items():
        change = None if path not in recorded else _change(recorded[path], now[path], data.loss_masks)
        longer = change is not None and not change.moves and not change.edits
        if change is None or (longer and evaluation.sequences <= _windows(recorded[path], data)):
            continue
        yield (
            f"evaluation: {folder.name} changed since {since}: {change.what}. "
            "Its losses can no longer be compared with earlier ones."
        )


def _change(before: FolderRecord, now: FolderRecord, loss_masks: bool) -> _Change | None:
    """None if nothing differs."""
    added, gone = [name for name in now if name not in before], [name for name in before if name not in now]
    kept = [name for name in now if name in before]
    other = [name for name in kept if not _same(before[name], now[name], loss_masks)]
    edited = [name for name in kept if name not in other and before[name][1] != now[name][1]]
    in_order = kept == [name for name in before if name in now]
    at_end = list(now)[: len(before)] == list(before)
    found = [
        f"{counted(len(names), 'file')} {how} ({some_of(names, more=True)})"
        for names, how in (
            (added, "at the end" if at_end else "added"), (gone, "gone"), (other, "with other content"),
            (edited, "with other tokens in documents of the same lengths"),
        ) if names
    ]  # fmt: skip
    if not in_order:
        found.append("another order of the files (data.file_seed)")
    elif added and not at_end and not gone and not other:
        found.append(f"read before {kept[list(now).index(added[0])]}")
    if not found:
        return None
    return _Change(what=", ".join(found), moves=bool(other) or not at_end, lengthens=bool(added), edits=bool(edited))


def _same(before: Sequence[Any], now: Sequence[Any], loss_masks: bool) -> bool:
    """Whether a file's documents have kept their positions: by its index, else by its tokens."""
    by_index = None not in (before[2], now[2])
    documents = before[2] == now[2] if by_index else before[1] == now[1]
    return before[0] == now[0] and documents and (not loss_masks or before[3] == now[3])


def _windows(files: FolderRecord, data: Data) -> int:
    return sum(file[0] // (data.sequence_length + 1) for file in files.values())


def _record(file: TokenFile) -> list[Any]:
    index = None if file.documents is None else file.companion("index")
    loss = file.companion("loss") if file.has_loss else None
    return [file.tokens, *(None if path is None else _digest(path) for path in (file.path, index, loss))]


def _digest(path: Path) -> str:
    """The digest of a file's size and of the ranges that are read."""
    descriptor = open_file(path)
    with reading(path), open(descriptor, "rb", buffering=0):
        size = os.fstat(descriptor).st_size
        hasher = xxhash.xxh3_64(str(size).encode())
        length = size if size <= _DIGESTED_BYTES else _DIGESTED_BYTES // _RANGES
        for number in range(1 if length == size else _RANGES):
            hasher.update(os.pread(descriptor, length, (size - length) * number // (_RANGES - 1)))
    return hasher.hexdigest()
