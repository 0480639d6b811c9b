"""Reports on a folder of token files: lengths of documents, how they end, and how windows cut them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolconv.continual_pretraining.tokens.eos import ends_documents
from smolconv.continual_pretraining.tokens.files import TokenFile, TokenFolder
from smolconv.errors import CorruptFile, some_of

#: Limit of tokens read, split evenly over the files. Lengths come from the indexes and count every document.
SCANNED_TOKENS = 1 << 28
_CHUNK = 1 << 20

Int64s = NDArray[np.int64]


@dataclass(kw_only=True)
class _Scan:
    """Counts from the beginnings of files."""

    sequence_length: int
    tokens: int = 0
    highest: int = 0  #: id
    masked: int = 0  #: tokens that are not predicted
    windows: int = 0
    pieces: int = 0  #: of documents that begin within a window
    empty: int = 0  #: documents
    lengths: Counter[int] = field(default_factory=Counter)
    last_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, file: TokenFile, part: NDArray[Any], eos_token_id: int | None, *, told_apart: bool) -> None:
        row = self.sequence_length + 1
        self.tokens += len(part)
        for ends, previous in _ends(file, part, eos_token_id) if told_apart else ():
            some = np.diff(ends, prepend=previous)
            self.empty += int((some == 0).sum())
            _count(self.lengths, some)
            real = ends[(some > 0) & (ends <= len(part))]
            _count(self.last_tokens, part[real - 1])
            # A document that begins at a window's last token is only a label of that window.
            column = real[real < len(part) // row * row] % row
            self.pieces += int(((column > 0) & (column < self.sequence_length)).sum())
        self.windows += len(part) // row
        if file.has_loss:
            self.masked += int((file.losses[: len(part)] == 0).sum())
        for start in range(0, len(part), _CHUNK):
            self.highest = max(self.highest, int(part[start : start + _CHUNK].max()))


def report_tokens(
    path: Path, *, sequence_length: int, eos_token_id: int | None = None, documents: int = 3, tokenizer: Any = None
) -> dict[str, Any]:
    """The report as JSON types, ``schema`` 1. ``tokenizer`` is one of the tokenizers library.

    Documents are separated by the index or, in files without one, by ``eos_token_id``. Without either, the fields that
    need documents are null. ``problems`` lists sentences about what is allowed but rarely intended.

    Raises what ``TokenFolder.open`` does, and ``CorruptFile`` for a token outside the tokenizer's vocabulary.
    """
    vocab_size = None if tokenizer is None else tokenizer.get_vocab_size(with_added_tokens=True)
    # With one token per row any folder can be opened; windows of the requested length are counted below.
    folder = TokenFolder.open(path, 1, vocab_size=vocab_size)
    told_apart = all(file.documents is not None for file in folder.files) or eos_token_id is not None
    scan = _Scan(sequence_length=sequence_length)
    share = max(1, SCANNED_TOKENS // len(folder.files))
    for file in folder.files:
        scan.add(file, file.ids[:share], eos_token_id, told_apart=told_apart)
    if vocab_size is not None and scan.highest >= vocab_size:
        raise CorruptFile(
            f"{path}: token id {scan.highest} is outside the tokenizer's vocabulary of {vocab_size}.\n"
            f"The folder was tokenised with {folder.files[0].tokenizer or 'another tokenizer'}.\n"
            "Pass that tokenizer, or tokenise the text again."
        )
    windows = sum(file.tokens // (sequence_length + 1) for file in folder.files)
    end = eos_token_id if eos_token_id is not None else _most(scan.last_tokens)
    report = {
        "schema": 1,
        "folder": str(path),
        "files": [
            {"name": f.path.name, "tokens": f.tokens, "documents": f.documents, "loss_mask": f.has_loss}
            for f in folder.files
        ],
        "tokens": folder.tokens,
        "token_bytes": folder.token_size,
        "tokenizer": folder.files[0].tokenizer,
        "scanned_tokens": scan.tokens,
        "highest_id": scan.highest,
        "documents": sum(scan.lengths.values()) if told_apart else None,
        "empty_documents": scan.empty if told_apart else None,
        "lengths": _statistics(scan.lengths) if scan.lengths else None,
        "endings": [
            {"id": token, "token": None if tokenizer is None else tokenizer.id_to_token(token), "documents": count}
            for token, count in scan.last_tokens.most_common(5)
        ],
        "eos": None if end is None else {
            "id": end, "given": eos_token_id is not None, "documents_ending": (ending := scan.last_tokens[end]),
            "documents_seen": sum(scan.last_tokens.values()),
            "inside_documents": sum(_occurrences(file.ids[:share], end) for file in folder.files) - ending,
        },
        "sequence_length": sequence_length,
        "windows": windows,
        "tail_share": 1 - windows * (sequence_length + 1) / folder.tokens,
        "documents_per_window": 1 + scan.pieces / scan.windows if scan.windows and told_apart else None,
        "masked_share": scan.masked / scan.tokens if folder.has_loss else None,
        "first_documents": [_shown(ids, tokenizer) for ids in _first(folder, documents, eos_token_id)],
        "problems": [],
    }  # fmt: skip
    report["problems"] = _problems(report)
    return report


def eos_ends_documents(report: dict[str, Any]) -> bool:
    """Whether the EOS of a report, given or found, really ends documents."""
    eos = report["eos"]
    return eos is not None and ends_documents(eos["documents_ending"], eos["documents_seen"])


def _problems(report: dict[str, Any]) -> list[str]:
    found = []
    eos, windows = report["eos"], report["windows"]
    names = [file["name"] for file in report["files"]]
    if twice := next((pair for name in names if (pair := _task_twice(name, names))), None):
        found.append(
            f"{' and '.join(twice)} hold the same documents: datatrove deletes the first when it has written the "
            "second, so a task was stopped in between; run it again, or move one of them away"
        )
    if report["documents"] is None:
        bare = [file["name"] for file in report["files"] if file["documents"] is None]
        found.append(
            f"{some_of(bare)}: there is no .ds.index, so nothing says where documents end; name their EOS with --eos"
        )
    elif not eos_ends_documents(report):
        most = next(iter(report["endings"]), None)  # None if no document has tokens
        if eos and most and ends_documents(most["documents"], eos["documents_seen"]):
            found.append(
                f"{eos['documents_ending']} of {eos['documents_seen']} documents end in {eos['id']}; "
                f"{most['documents']} end in {most['id']}: set data.eos_token_id to that"
            )
        else:
            found.append(
                "documents do not end in a common token: they were tokenised without an EOS, so only "
                "data.boundaries: index separates them"
            )
    if report["empty_documents"]:
        found.append(f"{report['empty_documents']} documents are empty (equal entries of the index)")
    if eos_ends_documents(report) and eos["inside_documents"] > 0:
        found.append(
            f"{eos['id']} occurs {eos['inside_documents']} times within documents: "
            "boundaries by EOS and by index differ"
        )
    if windows == 0:
        found.append(f"not one window of {report['sequence_length']} tokens: windows do not cross files")
    return found


def _task_twice(name: str, names: Sequence[str]) -> tuple[str, str] | None:
    """The names of one task's documents before and after datatrove shuffled them, if both files are there."""
    task, found, rest = name.partition("_unshuffled.ds")
    if not found or rest:
        return None
    shuffled = re.compile(rf"{re.escape(task)}(_\d{{5}})?(_doc|_chunk)?_shuffled\.ds")
    return next(((name, other) for other in names if shuffled.fullmatch(other)), None)


def _ends(file: TokenFile, part: NDArray[Any], eos_token_id: int | None) -> Iterator[tuple[Int64s, int]]:
    """Yield the ends of documents in pieces, with the previous end first; by EOS only those within ``part``."""
    previous = 0
    if file.documents is not None:
        for start in range(0, file.documents, _CHUNK):
            ends = file.ends[start : start + _CHUNK].astype(np.int64)
            yield ends, previous
            previous = int(ends[-1])
        return
    for start in range(0, len(part), _CHUNK):
        ends = np.flatnonzero(part[start : start + _CHUNK] == eos_token_id) + start + 1
        if len(ends):
            yield ends, previous
            previous = int(ends[-1])


def _most(last_tokens: Counter[int]) -> int | None:
    """The token that more than half of the documents end in."""
    for token, count in last_tokens.most_common(1):
        if ends_documents(count, last_tokens.total()):
            return token
    return None


def _occurrences(ids: NDArray[Any], token: int) -> int:
    return sum(int((ids[start : start + _CHUNK] == token).sum()) for start in range(0, len(ids), _CHUNK))


def _count(counter: Counter[int], values: NDArray[Any]) -> None:
    for value, count in zip(*np.unique(values, return_counts=True)):
        counter[int(value)] += int(count)


def _statistics(lengths: Counter[int]) -> dict[str, Any]:
    """Lengths in tokens, EOS included. Percentiles are lengths that occur; histogram bins double in width."""
    values = np.array(sorted(lengths), np.int64)
    counts = np.array([lengths[int(value)] for value in values], np.int64)
    upto, total = np.cumsum(counts), int(counts.sum())

    def percentile(share: float) -> int:
        return int(values[np.searchsorted(upto, share * total)])

    edges = [0, *(1 << power for power in range(4, int(values[-1]).bit_length() + 1))]
    if edges[-1] <= values[-1]:
        edges.append(2 * max(edges[-1], 8))
    return {
        "min": int(values[0]),
        "median": percentile(0.5),
        "mean": float((values * counts).sum() / total),
        "p90": percentile(0.9),
        "p99": percentile(0.99),
        "max": int(values[-1]),
        "histogram": [
            {"from": low, "below": high, "documents": int(counts[(values >= low) & (values < high)].sum())}
            for low, high in itertools.pairwise(edges)
        ],
    }


def _first(folder: TokenFolder, count: int, eos_token_id: int | None) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = []
    for file in folder.files:
        if file.documents is None and eos_token_id is None:
            continue
        for ends, previous in _ends(file, file.ids[:SCANNED_TOKENS], eos_token_id):
            for end in ends[: count - len(found)]:
                found.append(file.ids[previous:end])
                previous = int(end)
            if len(found) == count:
                return found
    return found


def _shown(ids: NDArray[Any], tokenizer: Any) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokens": len(ids), "ids": ids.tolist()}
    return {"tokens": len(ids), "text": tokenizer.decode(ids.tolist(), skip_special_tokens=False)}
