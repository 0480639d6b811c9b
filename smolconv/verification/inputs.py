"""The tokens of a comparison: from the shipped text, the user's text or ids, perhaps packed documents."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolconv.errors import CorruptFile, NotInstalled, UsageError, counted, pip_install
from smolconv.files import file_size, read_bytes
from smolconv.parsing import read_tokenizer, tokenizing

_SEED = 20240711
#: Size limit of a text, from which a few thousand tokens are taken.
_MOST_TEXT_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One row of tokens, perhaps of several documents."""

    tokens: NDArray[np.int64]  #: [1, T]
    where: str  #: for people
    spans: tuple[tuple[int, int], ...]  #: where each document begins and ends

    @property
    def documents(self) -> int:
        return len(self.spans)

    @property
    def positions(self) -> NDArray[np.int64]:
        """[1, T]; every document begins at 0."""
        return np.concatenate([np.arange(stop - start) for start, stop in self.spans])[None, :]

    @property
    def targets(self) -> NDArray[np.int64]:
        """[1, T]: the next token; -1 at a document's end, where none is to be predicted."""
        following = np.append(self.tokens[0, 1:], -1)
        following[[stop - 1 for _, stop in self.spans]] = -1
        return following[None, :]


def choose_rows(
    *,
    vocab_size: int,
    max_positions: int,
    tokenizer: Path | None,
    text: Path | None = None,
    tokens: Path | None = None,
    length: int = 2048,
    documents: int = 1,
) -> Rows:
    """Ids from ``tokens``, else text through the tokenizer, else random ids; ``where`` of the result says which.

    Random ids also replace the shipped text if the tokenizer does not fit the vocabulary, or cannot be read.
    Raises ``UsageError`` for ids beyond the vocabulary and for options that do not fit.
    """
    length = max(2, min(length, max_positions))
    if tokens is not None:
        ids, where = _loaded(tokens, length), str(tokens)
    elif text is not None:
        if tokenizer is None:
            raise UsageError("--text needs a tokenizer.json in A or B; give ids with --tokens FILE.npy instead.")
        ids, where = _encoded(_read(text), tokenizer)[:length], str(text)
    else:
        ids, where = _of_our_own(vocab_size, tokenizer, length)
    if len(ids) < 2:
        raise UsageError(f"{where} gives {counted(len(ids), 'token')}; expected at least 2.")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise UsageError(f"{where} gives token {int(wrong[0])}, but the smaller vocabulary has {vocab_size} entries.")
    if not 1 <= documents <= len(ids):
        raise UsageError(f"--documents {documents}: a row of {len(ids)} tokens can hold 1 to {len(ids)}.")
    return Rows(tokens=ids[None, :], where=where, spans=_spans(len(ids), documents))


def _of_our_own(vocab_size: int, tokenizer: Path | None, length: int) -> tuple[NDArray[np.int64], str]:
    why = "neither side has a tokenizer"
    if tokenizer is not None:
        try:
            ids = _encoded(shipped_text(), tokenizer)
        except CorruptFile as error:
            why = str(error).partition("\n")[0].rstrip(".")  # models can be compared without it
        else:
            # Another vocabulary may need more text than there is: then the text repeats.
            ids = np.resize(ids, length) if len(ids) else ids
            if (ids < vocab_size).all():
                return ids, "the text that ships with smolconv"
            why = f"the tokenizer gives token {ids.max()}, but the smaller vocabulary has {vocab_size} entries"
    return np.random.default_rng(_SEED).integers(0, vocab_size, length), f"random tokens, since {why}"


def shipped_text() -> str:
    return (files("smolconv.verification") / "prompts.txt").read_text(encoding="utf-8")


def _spans(length: int, documents: int) -> tuple[tuple[int, int], ...]:
    """Documents of different lengths, the first the shortest."""
    weights = np.arange(1, documents + 1, dtype=np.float64)
    ends = np.floor(np.cumsum(weights) / weights.sum() * length).astype(int)
    ends = np.maximum(ends, np.arange(1, documents + 1))  # none is empty
    ends[-1] = length
    return tuple(zip([0, *map(int, ends[:-1])], map(int, ends)))


def _loaded(path: Path, most: int) -> NDArray[np.int64]:
    nbytes = file_size(path)
    try:
        # Mapped, because a header may declare more than fits in memory. Empty arrays cannot be mapped.
        ids = np.load(path, allow_pickle=False, mmap_mode="r" if nbytes > 128 else None)
    except Exception as error:  # numpy evaluates the header as an expression, which fails in many ways
        raise CorruptFile(f"--tokens {path} is not a .npy file of token ids ({error!s:.200}).") from None
    if not isinstance(ids, np.ndarray):
        raise CorruptFile(f"--tokens {path} is an .npz archive; expected a .npy file of token ids.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"--tokens {path} holds {ids.dtype}; token ids are integers.")
    flat: NDArray[np.int64] = ids.reshape(-1)[:most].astype(np.int64)
    return flat


def _read(path: Path) -> str:
    try:
        return read_bytes(path, _MOST_TEXT_BYTES).decode()
    except UnicodeDecodeError:
        raise UsageError(f"--text {path} is not UTF-8 text.") from None


def _encoded(content: str, tokenizer: Path) -> NDArray[np.int64]:
    try:
        loaded = read_tokenizer(tokenizer)
    except ImportError:
        raise NotInstalled(f"reading text needs tokenizers: {pip_install(['tokenizers'])}.") from None
    with tokenizing(tokenizer):
        return np.array(loaded.encode(content).ids, np.int64)
