"""Reads datatrove's token files, and turns their windows into rows to train on.

``X.ds`` holds token ids one after the other, little-endian, 2 or 4 bytes each, without a header. Optional companions:
``X.ds.index`` (uint64, the end of each document in tokens, exclusive), ``X.ds.metadata`` (``tokenizer|token size``,
token count, the count for people) and ``X.ds.loss`` (one byte per token; 0: not to be trained on). No file has a magic
number, so the files are checked against each other.

Window w of a file is its tokens ``[w(S + 1), (w + 1)(S + 1))``: S inputs and, shifted by one, S labels. The remainder
at the end of a file is never read. Shapes use: R rows, S sequence length.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smolconv.continual_pretraining.tokens.eos import ends_documents
from smolconv.errors import CorruptFile, MissingFile, MixedCheckpoint, SourceChanged, UsageError
from smolconv.files import MOST_NAME_BYTES, file_size, open_file, read_bytes, reading

IGNORED_LABEL = -100  #: the label that torch's cross entropy ignores
#: Rows are computed in blocks that fit a core's L2 cache.
_BLOCK_TOKENS = 1 << 15
#: Sample that is checked when a folder is opened: this many files, and the first tokens and document ends of each.
_SAMPLED_FILES, _SAMPLED_TOKENS, _SAMPLED_DOCUMENTS = 8, 1 << 16, 1024
#: Indexes with more documents than this in total are checked later, each file's at its first use.
_INDEX_CHECKED_AT_OPEN = 8 << 20
#: Without an index, this many tokens are searched for an EOS.
_SEARCHED_FOR_EOS = 1 << 26
#: Empty documents that an index may hold, beyond the number of tokens.
_EMPTY_DOCUMENTS = 1 << 20
_CHUNK = 1 << 20

Ids = NDArray[Any]  #: little-endian uint16 or uint32, as in the file
Int64s = NDArray[np.int64]


class Row(NamedTuple):
    """Where a row of a batch was read, for error messages."""

    source: str
    file: str  #: path
    window: int  #: number in the file; its first token is number ``window * (S + 1)``


_NO_ROW = Row("", "", 0)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to train on; all arrays are int64 ``[R, S]``."""

    input_ids: Int64s
    positions: Int64s  #: 0 where a document begins, and at the start of every row
    labels: Int64s  #: the next tokens; -100 where the next token is not predicted
    rows: tuple[Row, ...]  #: R rows; empty for a batch that only keeps ranks in step


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One ``.ds`` file and its companions, checked against each other. Arrays are memory-mapped on use."""

    path: Path
    token_size: int  #: bytes
    tokens: int
    tokenizer: str | None  #: the name in .ds.metadata, a label only
    documents: int | None  #: entries of the index; None without an index
    has_loss: bool

    @property
    def ids(self) -> Ids:
        return _mapped(self.path, f"<u{self.token_size}", self.tokens)

    @property
    def ends(self) -> NDArray[np.uint64]:
        """The index. Raises ``MissingFile`` if there is none, ``CorruptFile`` if it does not ascend."""
        return _mapped(self._checked_index, "<u8", self.documents or 0)

    @cached_property
    def _checked_index(self) -> Path:
        path = self.companion("index")
        if self.documents is None:
            raise MissingFile(
                f"{path} is not there.\nWith data.boundaries: index, every token file needs its index.\n"
                "Copy it from where the data was tokenised, or set data.boundaries: eos."
            )
        ends = _mapped(path, "<u8", self.documents)
        last = 0
        for start in range(0, len(ends), _CHUNK):
            chunk = ends[start : start + _CHUNK]
            before = np.empty_like(chunk)
            before[0], before[1:] = last, chunk[:-1]
            falls = np.flatnonzero(chunk < before)
            if len(falls):
                at = start + int(falls[0])
                raise CorruptFile(
                    f"{path}: document {at} ends at token {ends[at]}, before the previous document "
                    f"({before[falls[0]]}).\nThe ends of documents must ascend.\n{_TOKENISE_AGAIN}"
                )
            last = int(chunk[-1])
        return path

    @property
    def losses(self) -> NDArray[np.uint8]:
        """One byte per token: 0 where the token is not predicted."""
        assert self.has_loss
        return _mapped(self.companion("loss"), "u1", self.tokens)

    def companion(self, what: str) -> Path:
        """The path of the file's index, metadata or loss."""
        return _companion(self.path, what)


class TokenFolder:
    """A folder's windows, in the order of its files: sorted by name, or permuted as nanotron does with a seed."""

    def __init__(self, path: Path, sequence_length: int, files: Sequence[TokenFile], *, name: str) -> None:
        self.path, self.name, self.sequence_length, self.files = path, name, sequence_length, tuple(files)
        self.tokens = sum(file.tokens for file in files)
        counts = [file.documents for file in files]
        #: Entries of all indexes; None when a file has none.
        self.documents = None if None in counts else sum(count or 0 for count in counts)
        self.token_size = files[0].token_size
        self.has_loss = any(file.has_loss for file in files)
        ends = list(accumulate(file.tokens // (sequence_length + 1) for file in files))
        self.windows = ends[-1]
        self._ends = np.array(ends, dtype=np.int64)
        self._begins = np.array([0, *ends[:-1]], dtype=np.int64)

    @classmethod
    def open(
        cls,
        path: str | Path,
        sequence_length: int,
        *,
        name: str | None = None,
        file_seed: int | None = None,
        vocab_size: int | None = None,
        eos_token_id: int | None = None,
    ) -> TokenFolder:
        """List and check a folder. Like nanotron, it ignores subfolders.

        ``eos_token_id`` is compared with how documents end, by the index or by a search. ``vocab_size`` bounds the ids
        of a sample; other ids are checked when they are read. It also decides the token size if neither metadata nor
        index does.

        Raises ``MissingFile`` without token files, ``CorruptFile`` when a file contradicts its companions or the
        vocabulary, ``MixedCheckpoint`` when files come from different tokenizers, ``UsageError`` when the folder is
        too small for a window or its documents end in another token.
        """
        folder = Path(path)
        files = [_open_file(each, vocab_size) for each in _token_files(folder, str(path))]
        bare = next((file for file in files if file.tokenizer is None), None)
        full = next((file for file in files if file.tokenizer is not None), None)
        if bare is not None and full is not None:
            raise MixedCheckpoint(
                f"{folder}: {bare.path.name} has no .ds.metadata, unlike {full.path.name}.\n"
                "All files of a folder must come from one tokenizer. datatrove writes the metadata last, so the task "
                "that wrote this file may have stopped before.\n"
                "Run the task again, copy the metadata from where the file was written, or move the file away."
            )
        for file in files[1:]:
            for what, mine, other in (
                ("tokenizer", file.tokenizer, files[0].tokenizer),
                ("token size", file.token_size, files[0].token_size),
            ):
                if mine != other:
                    raise MixedCheckpoint(
                        f"{folder}: the {what} of {file.path.name} is {mine}, but that of {files[0].path.name} is "
                        f"{other}.\nAll files of a folder must come from one tokenizer.\n"
                        "Move the files of the other tokenizer to another folder, or tokenise them again."
                    )
        if file_seed is not None:
            files = [files[i] for i in np.random.default_rng(file_seed).permutation(len(files))]
        opened = cls(folder, sequence_length, files, name=name or folder.name)
        if opened.windows == 0:
            longest = max(file.tokens for file in files)
            raise UsageError(
                f"{folder} has {opened.tokens} tokens, at most {longest} in a file: not one window of "
                f"data.sequence_length {sequence_length}, which takes {sequence_length + 1}.\n"
                "Windows do not cross files. Set a shorter data.sequence_length, or join the files with datatrove's "
                "DocumentTokenizerMerger."
            )
        opened._check_sample(vocab_size, eos_token_id)
        return opened

    def places(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Each sample's file number and the window in that file; after the last sample it starts over."""
        windows = samples % self.windows
        file = self._ends.searchsorted(windows, side="right")
        return file, windows - self._begins[file]

    def describe(self, row: Row) -> str:
        """Describe a row of this folder: file, tokens and, with an index, documents."""
        file = next(file for file in self.files if str(file.path) == row.file)
        start = row.window * (self.sequence_length + 1)
        last = start + self.sequence_length
        text = f"{row.source}: {row.file}, tokens {start} to {last}"
        if file.documents is None:
            return text
        first, end = file.ends.searchsorted(np.array((start, last), dtype=file.ends.dtype), side="right")
        return f"{text}, documents {first} to {end}"

    def ends_in(self) -> int | None:
        """The token that documents end in, by the beginnings of files. None without an index or a common token."""
        counts: Counter[int] = Counter()
        for file in self.files[:_SAMPLED_FILES]:
            if file.documents is None:
                return None
            ends = file.ends[:_SAMPLED_DOCUMENTS].astype(np.int64)
            counts.update(file.ids[ends[np.diff(ends, prepend=0) > 0] - 1].tolist())
        token, count = next(iter(counts.most_common(1)), (None, 0))
        return token if ends_documents(count, sum(counts.values())) else None

    def _check_sample(self, vocab_size: int | None, eos_token_id: int | None) -> None:
        filled = [file for file in self.files if file.tokens]
        sampled = filled[:: -(-len(filled) // _SAMPLED_FILES)]
        if vocab_size is not None:
            for file in sampled:
                _check_ids(file.ids[:_SAMPLED_TOKENS], vocab_size, file, 0)
        indexed = [file for file in self.files if file.documents is not None]
        if sum(file.documents or 0 for file in indexed) <= _INDEX_CHECKED_AT_OPEN:
            for file in indexed:
                file.ends  # noqa: B018 - reading it checks it
        if eos_token_id is not None:
            self._check_eos(eos_token_id, [file for file in sampled if file.documents])

    def _check_eos(self, eos_token_id: int, indexed: Sequence[TokenFile]) -> None:
        if not indexed:
            searched = 0
            for file, start in ((each, at) for each in self.files for at in range(0, each.tokens, _CHUNK)):
                chunk = file.ids[start : start + _CHUNK]
                if (chunk == eos_token_id).any():
                    return
                searched += len(chunk)
                if searched >= _SEARCHED_FOR_EOS:
                    break
            raise UsageError(
                f"{self.path}: data.eos_token_id {eos_token_id} does not occur in {searched} tokens, and there is no "
                ".ds.index to tell where documents end.\nEvery document ends in the EOS of its tokenizer.\n"
                f"Set data.eos_token_id to that of {self.files[0].tokenizer or 'the tokenizer of this data'}, or "
                "tokenise the text again with an EOS."
            )
        found = []
        for file in indexed:
            ends = np.unique(file.ends[:_SAMPLED_DOCUMENTS])
            found.append(file.ids[ends[ends > 0].astype(np.int64) - 1])
        ids, counts = np.unique(np.concatenate(found), return_counts=True)
        total = int(counts.sum())
        right = int(counts[ids == eos_token_id].sum())
        most, count = int(ids[counts.argmax()]), int(counts.max())
        # When datatrove shuffles chunks, its index also holds chunk borders, most of which may lie within documents.
        chunked = all("chunk_shuffled" in file.path.name for file in indexed)
        if ends_documents(right, total) or (chunked and right == count):
            return
        what = f"{self.path}: {right} of {total} documents end in data.eos_token_id {eos_token_id} (by .ds.index)"
        if ends_documents(count, total):
            raise UsageError(
                f"{what}; {count} end in {most}.\nWith the wrong EOS, documents would not be separated.\n"
                f"Set data.eos_token_id={most} if that is the EOS of {self.files[0].tokenizer or 'the tokenizer'}."
            )
        raise UsageError(
            f"{what}, and in no other token either: the text was tokenised without an EOS, as datatrove does unless "
            "eos_token is given.\nWithout an EOS, only the index says where documents end.\n"
            "Set data.boundaries: index."
        )


class Wanted(NamedTuple):
    """Samples of one folder, and their rows in the batch. Both ``[n]``, ascending."""

    folder: TokenFolder
    rows: Int64s
    samples: Int64s


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """How windows become rows: where documents begin, and which tokens are predicted."""

    sequence_length: int
    boundaries: Literal["eos", "index"] = "eos"
    eos_token_id: int | None = None  #: for boundaries by EOS
    mask_documents: bool = True  #: restart positions at each document, and do not predict its first token
    loss_masks: bool = True  #: do not predict tokens that a .ds.loss marks with 0
    vocab_size: int | None = None

    def read(self, wanted: Sequence[Wanted], count: int) -> Batch:
        """Build the rows 0 to ``count`` - 1; each must be asked for exactly once.

        Raises ``CorruptFile`` when a token is outside the vocabulary.
        """
        length = self.sequence_length
        token_size = max(each.folder.token_size for each in wanted)
        raw = np.empty((count, length + 1), f"<u{token_size}")
        with_losses = self.loss_masks and any(each.folder.has_loss for each in wanted)
        losses = np.ones((count, length + 1), np.uint8) if with_losses else None
        rows: list[Row] = [_NO_ROW] * count
        files: dict[str, TokenFile] = {}
        begins: list[Int64s] = []
        for each in wanted:
            for row, file, window, windows in _runs(each):
                start, stop = window * (length + 1), (window + windows) * (length + 1)
                raw[row : row + windows] = file.ids[start:stop].reshape(windows, length + 1)
                if losses is not None and file.has_loss:
                    losses[row : row + windows] = file.losses[start:stop].reshape(windows, length + 1)
                if self.mask_documents and self.boundaries == "index":
                    begins.append(_ends_within(file.ends, start, stop) + (row * (length + 1) - start))
                source, path = each.folder.name, str(file.path)
                rows[row : row + windows] = [Row(source, path, window + i) for i in range(windows)]
                files[path] = file
        by_index = np.sort(np.concatenate(begins)) if begins else None
        # One allocation for all three arrays: separate ones would return to the system when freed, and fault in again.
        input_ids, positions, labels = np.empty((3, count, length), np.int64)
        batch = Batch(input_ids=input_ids, positions=positions, labels=labels, rows=tuple(rows))
        block = max(1, _BLOCK_TOKENS // (length + 1))
        for first in range(0, count, block):
            last = min(first + block, count)
            if self.vocab_size is not None and raw[first:last].max() >= self.vocab_size:
                row = first + int(np.argmax((raw[first:last] >= self.vocab_size).any(axis=1)))
                _check_ids(raw[row], self.vocab_size, files[rows[row].file], rows[row].window * (length + 1))
            self._finish(batch, first, last, raw, losses, by_index)
        return batch

    def _finish(
        self, batch: Batch, first: int, last: int, raw: Ids, losses: NDArray[np.uint8] | None, by_index: Int64s | None
    ) -> None:
        """Inputs, labels and positions of the rows ``[first, last)``."""
        length, tokens = self.sequence_length, raw[first:last]
        labels, positions = batch.labels[first:last], batch.positions[first:last]
        batch.input_ids[first:last] = tokens[:, :-1]
        labels[:] = tokens[:, 1:]
        if losses is not None:
            np.copyto(labels, IGNORED_LABEL, where=losses[first:last, 1:] == 0)
        if not self.mask_documents:
            positions[:] = np.arange(length)
            return
        # Where documents begin, in tokens from the block's first: rows of S + 1.
        if by_index is not None:
            offset = first * (length + 1)
            low, high = by_index.searchsorted((offset, last * (length + 1)))
            begins = by_index[low:high] - offset
        else:
            assert self.eos_token_id is not None
            begins = (tokens.reshape(-1) == self.eos_token_id).nonzero()[0] + 1
        rows, columns = np.divmod(begins, length + 1)
        # The same in inputs: rows of S. A document that begins at the last label belongs to the next row.
        begins = (begins - rows)[columns > 0]
        labels.reshape(-1)[begins - 1] = IGNORED_LABEL
        size = (last - first) * length
        borders = np.empty(len(begins) + last - first + 1, np.int64)
        borders[: len(begins)] = begins
        borders[len(begins) :] = np.arange(0, size + 1, length)
        borders.sort()  # some occur twice and make documents of length 0
        starts = borders[:-1]
        np.subtract(_numbers(size), starts.repeat(borders[1:] - starts), out=positions.reshape(-1))


def _runs(wanted: Wanted) -> Iterator[tuple[int, TokenFile, int, int]]:
    """Cut into runs of consecutive windows of one file and consecutive rows: first row, file, first window, count."""
    numbers, places = wanted.folder.places(wanted.samples)
    # Python integers: for the few rows of a step they are faster than a dozen numpy calls.
    files, windows, rows = numbers.tolist(), places.tolist(), wanted.rows.tolist()
    first = 0
    for end in range(1, len(rows) + 1):
        run = end - first
        if (
            end == len(rows)
            or files[end] != files[first]
            or windows[end] != windows[first] + run
            or rows[end] != rows[first] + run
        ):
            yield rows[first], wanted.folder.files[files[first]], windows[first], run
            first = end


def _ends_within(ends: NDArray[np.uint64], start: int, stop: int) -> Int64s:
    """The starts of documents in ``[start, stop)``, except the first document's."""
    # Bounds in the array's dtype: any other would make numpy convert the whole index to float64.
    low, high = ends.searchsorted(np.array((start, stop), dtype=ends.dtype))
    return ends[low:high].astype(np.int64)


_RANGE = np.arange(0)


def _numbers(count: int) -> Int64s:
    """0 to ``count`` - 1, cached."""
    global _RANGE  # noqa: PLW0603 - a cache; at worst two threads compute it twice
    numbers = _RANGE
    if len(numbers) < count:
        numbers = _RANGE = np.arange(max(count, 2 * _BLOCK_TOKENS))
    return numbers[:count]


# --- opening ---------------------------------------------------------------------------------------------------------

_TOKENISE_AGAIN = "Copy the file again from where it was written, or tokenise the text again."


def _token_files(folder: Path, given: str) -> list[Path]:
    if "://" in given:
        raise UsageError(f"{given} is not a local folder.\nToken files are memory-mapped.\nCopy the folder first.")
    if not os.path.isdir(folder):
        raise MissingFile(
            f"{folder!s:.200} is not a folder.\n"
            "A source of data is a folder of token files (*.ds) as datatrove writes them.\n"
            "Check the path in data.stages, or write the folder with smolconv tokenize."
        )
    with reading(folder):
        # macOS leaves a hidden ._NAME for each file that it copies.
        entries = [path for path in folder.iterdir() if path.name.endswith(".ds") and not path.name.startswith(".")]
        found = sorted(path for path in entries if not path.is_dir())
    if not found:
        below = next(iter(sorted(folder.glob("*/*.ds"))), None)
        raise MissingFile(
            f"{folder} holds no token files (*.ds).\n"
            + (f"Some are in {below.parent}, but subfolders are not read.\nName that folder." if below else "")
            + (
                ""
                if below
                else "A source of data is a folder that datatrove or smolconv tokenize wrote.\nCheck the path."
            )
        )
    return found


def _open_file(path: Path, vocab_size: int | None) -> TokenFile:
    size = file_size(path)
    said = _Metadata.read(_companion(path, "metadata"))
    token_size = said.token_size
    index = _companion(path, "index")
    documents = last = None
    if os.path.lexists(index):
        index_bytes = file_size(index)
        if index_bytes % 8:
            raise CorruptFile(f"{index} has {index_bytes} bytes.\nAn index has 8 bytes a document.\n{_TOKENISE_AGAIN}")
        documents = index_bytes // 8
        if documents > size + _EMPTY_DOCUMENTS:  # checked before mapping; a token has at least two bytes
            raise CorruptFile(
                f"{index} has {index_bytes} bytes for {documents:,} documents, but {path.name} has {size:,} bytes.\n"
                f"Every document has at least one token.\n{_TOKENISE_AGAIN}"
            )
        last = _last_end(index) if documents else 0
    if token_size is None:
        token_size = _guess_token_size(path, size, last, vocab_size)
    if size % token_size:
        raise CorruptFile(
            f"{path} has {size} bytes, which is not a multiple of its token size, {token_size} bytes.\n"
            f"The file is cut off, or has another token size.\n{_TOKENISE_AGAIN}"
        )
    tokens = size // token_size
    for where, count in ((_companion(path, "metadata"), said.tokens), (index, last)):
        if count is not None and count != tokens:
            what = "counts" if where is not index else "ends at"
            raise CorruptFile(
                f"{path} has {tokens} tokens of {token_size} bytes, but {where.name} {what} {count}.\n"
                f"The two must agree.\n{_TOKENISE_AGAIN}"
            )
    loss = _companion(path, "loss")
    has_loss = os.path.lexists(loss)
    if has_loss and file_size(loss) != tokens:
        raise CorruptFile(
            f"{loss} has {file_size(loss)} bytes, but {path.name} has {tokens} tokens.\n"
            f"A loss mask has one byte per token.\n{_TOKENISE_AGAIN}"
        )
    return TokenFile(
        path=path,
        token_size=token_size,
        tokens=tokens,
        tokenizer=said.tokenizer,
        documents=documents,
        has_loss=has_loss,
    )


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    """The fields of ``.ds.metadata``; None for those it does not have."""

    tokenizer: str | None = None
    token_size: int | None = None
    tokens: int | None = None

    @staticmethod
    def read(path: Path) -> _Metadata:
        """The lines of the metadata; empty without the file. Raises ``CorruptFile``."""
        if not os.path.lexists(path):
            return _Metadata()
        lines = read_bytes(path, MOST_NAME_BYTES).decode(errors="replace").splitlines()
        tokenizer, bar, size = (lines[0] if lines else "").rpartition("|")
        if not bar:
            tokenizer, size = size, ""
        if len(lines) < 2 or not re.fullmatch("[0-9]{1,18}", lines[1].strip()) or size not in ("", "2", "4"):
            raise CorruptFile(
                f"{path} begins with {lines[:2]!r:.200}.\n"
                "datatrove writes the tokenizer's name with a token size of 2 or 4 after a bar, then the count of "
                f"tokens.\n{_TOKENISE_AGAIN}"
            )
        return _Metadata(tokenizer=tokenizer, token_size=int(size) if size else None, tokens=int(lines[1]))


def _guess_token_size(path: Path, size: int, last: int | None, vocab_size: int | None) -> int:
    """The token size by the index or, without one, the size that gives ids within the vocabulary."""
    if last:
        return size // last if size in (2 * last, 4 * last) else 2
    if size % 4:
        return 2
    # Two 2-byte ids read as one 4-byte id exceed any vocabulary, unless every second id is close to 0.
    sample = _mapped(path, "<u4", size // 4)[:_SAMPLED_TOKENS]
    return 4 if len(sample) and sample.max() < (vocab_size or 1 << 20) else 2


def _check_ids(ids: Ids, vocab_size: int, file: TokenFile, start: int) -> None:
    beyond = np.flatnonzero(ids >= vocab_size)
    if len(beyond):
        raise CorruptFile(
            f"{file.path}: token {start + int(beyond[0])} is {ids[beyond[0]]}, but the model's vocabulary has "
            f"{vocab_size} entries.\nThe folder was tokenised with {file.tokenizer or 'another tokenizer'}.\n"
            "Tokenise the text with the model's own tokenizer."
        )


def _companion(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _last_end(index: Path) -> int:
    """The end of the last document, read without mapping the index, which is not checked yet."""
    with reading(index), open(open_file(index, noted=False), "rb", buffering=0) as file:
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(8), "little")


@lru_cache(maxsize=256)
def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """Map a file as a read-only array; an empty file, which cannot be mapped, gives an empty array.

    Only the latest maps are kept: each holds a file descriptor, and a folder may have more files than a process may
    open.
    """
    if count == 0:
        return np.empty(0, dtype)
    # A plain array over the map: slicing numpy's memmap class takes several times as long.
    try:
        with reading(path):
            return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray))
    except ValueError:
        raise SourceChanged(f"{path} is shorter than when it was opened.\n{_TOKENISE_AGAIN}") from None
