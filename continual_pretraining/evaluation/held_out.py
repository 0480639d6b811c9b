"""Measures how well a checkpoint predicts held-out token files: loss per document, perplexity, bits per byte.

Each document is evaluated alone. Its first token is given; all others are predicted once, including the EOS. A document
longer than the context is cut into stretches of that many predictions, and each stretch sees only itself.
Shapes use: D documents, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smolconv.continual_pretraining.tokens.files import TokenFile, TokenFolder
from smolconv.errors import CorruptFile, UsageError, counted
from smolconv.parsing import read_tokenizer
from smolconv.verification.forward import ForwardPass, Side, return_freed_memory

if TYPE_CHECKING:
    import torch

#: Limit for the documents that go through the model together; each block is loaded once for all of them.
_GROUP_TOKENS = 1 << 16
#: Limit of tokens in rows of equal length that are computed together.
_ROW_TOKENS = 1 << 13
#: Rows of the output matrix in memory at a time.
_VOCABULARY_ROWS = 2048
_NOBODY = -1  #: a target that is not predicted

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Span:
    """The position of a document: tokens ``[start, stop)`` of a file."""

    file: TokenFile
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The documents of a folder that have at least two tokens, or a sample of them."""

    name: str
    path: Path
    documents: Sequence[Span]
    of: int  #: all documents of the folder

    @property
    def tokens(self) -> int:
        """The number of predictions, without a loss mask."""
        return sum(span.stop - span.start - 1 for span in self.documents)


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """Losses of one checkpoint on one folder."""

    nll: NDArray[np.float64]  #: [D], nats, summed over a document's predictions
    tokens: NDArray[np.int64]  #: [D], predictions
    nbytes: int | None  #: UTF-8 bytes of the predicted tokens; None if the tokenizer does not give them

    def to_json(self) -> dict[str, Any]:
        total, tokens = float(self.nll.sum()), int(self.tokens.sum())
        mean = total / tokens if tokens else math.nan
        return {
            "documents": len(self.nll),
            "tokens": tokens,
            "bytes": self.nbytes,
            "nll": mean,
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "bits_per_byte": total / math.log(2) / self.nbytes if self.nbytes else None,
        }


def open_held_out(path: Path, *, eos: int | None, limit: int | None, seed: int) -> HeldOut:
    """The documents of a folder, by its index or else by ``eos``. ``limit`` draws that many at random.

    Raises as ``TokenFolder.open``, and ``UsageError`` if documents cannot be separated or none can be scored.
    """
    folder = TokenFolder.open(path, 1)
    if eos is None and any(file.documents is None for file in folder.files):
        raise UsageError(
            f"--held-out {path}: a token file has no .ds.index, so the ends of its documents are not known.\n"
            "Expected an index for each file, or the id of the token that ends documents.\nAdd --eos ID."
        )
    spans = [span for file in folder.files for span in _spans(file, eos)]
    if not spans:
        raise UsageError(f"--held-out {path}: no document has two tokens or more, so nothing can be predicted.")
    total = len(spans)
    if limit is not None and limit < total:
        chosen = np.random.default_rng(seed).choice(total, limit, replace=False)
        spans = [spans[index] for index in sorted(chosen.tolist())]
    return HeldOut(name=folder.name, path=Path(path), documents=spans, of=total)


def _spans(file: TokenFile, eos: int | None) -> Iterator[Span]:
    if file.documents is not None:
        ends = file.ends.astype(np.int64)
    else:
        ends = np.append(np.flatnonzero(file.ids == eos) + 1, file.tokens)
    starts = np.append(0, ends[:-1])
    for start, stop in zip(starts.tolist(), ends.tolist()):
        if stop - start >= 2:
            yield Span(file=file, start=start, stop=stop)


# --- bytes -----------------------------------------------------------------------------------------------------------


def token_bytes(tokenizer: Path, vocab_size: int) -> NDArray[np.int64] | None:
    """UTF-8 bytes of each token, [V]; special tokens have none. None for a tokenizer that is not byte-level."""
    loaded = read_tokenizer(tokenizer)
    if type(loaded.decoder).__name__ != "ByteLevel":
        return None
    found = np.zeros(vocab_size, np.int64)
    added = loaded.get_added_tokens_decoder()
    for token, index in loaded.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size:
            continue
        # A byte-level token has one character per byte.
        if index not in added:
            found[index] = len(token)
        elif not added[index].special:
            found[index] = len(token.encode("utf-8", "surrogatepass"))
    return found


# --- losses ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Stretch:
    """Inputs and targets of a part of a document."""

    document: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def score_held_out(
    side: Side, held_out: HeldOut, *, length: int, vocab_size: int, sizes: NDArray[np.int64] | None, progress: Progress,
) -> HeldOutScore:  # fmt: skip
    """The losses of all documents. ``sizes``: bytes per token, [V].

    ``progress`` counts predictions times blocks; ``work_of`` gives the total. Raises ``CorruptFile`` for tokens outside
    the vocabulary.
    """
    count = len(held_out.documents)
    nll, tokens, nbytes = np.zeros(count), np.zeros(count, np.int64), 0
    for group in _groups(_stretches(held_out, length, vocab_size)):
        losses = _losses(side, group, vocab_size, progress)
        for stretch, loss in zip(group, losses):
            predicted = stretch.targets != _NOBODY
            nll[stretch.document] += float(loss[predicted].sum())
            tokens[stretch.document] += int(predicted.sum())
            if sizes is not None:
                nbytes += int(sizes[stretch.targets[predicted]].sum())
    return HeldOutScore(nll=nll, tokens=tokens, nbytes=None if sizes is None else nbytes)


def work_of(held_out: HeldOut, blocks: int) -> int:
    """The total that ``progress`` reaches."""
    return held_out.tokens * (blocks + 1)


def _stretches(held_out: HeldOut, length: int, vocab_size: int) -> Iterator[_Stretch]:
    for number, span in enumerate(held_out.documents):
        ids = span.file.ids[span.start : span.stop].astype(np.int64)
        if (ids >= vocab_size).any():
            at = int(np.argmax(ids >= vocab_size))
            raise CorruptFile(
                f"{span.file.path}: token {span.start + at} is {ids[at]}, but the model's vocabulary has "
                f"{vocab_size} entries.\n"
                f"Expected tokens of the model's own tokenizer; these are of {span.file.tokenizer or 'another one'}.\n"
                "Tokenise the held-out text with this checkpoint's tokenizer: smolconv tokenize."
            )
        targets = ids[1:].copy()
        if span.file.has_loss:
            targets[span.file.losses[span.start + 1 : span.stop] == 0] = _NOBODY
        for start in range(0, len(targets), length):
            part = slice(start, start + length)
            yield _Stretch(document=number, inputs=ids[:-1][part], targets=targets[part])


def _groups(stretches: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    group: list[_Stretch] = []
    held = 0
    for stretch in stretches:
        if group and held + len(stretch.inputs) > _GROUP_TOKENS:
            yield group
            group, held = [], 0
        group.append(stretch)
        held += len(stretch.inputs)
    if group:
        yield group


def _losses(side: Side, group: Sequence[_Stretch], vocab_size: int, progress: Progress) -> list[NDArray[np.float64]]:
    """The loss of every target in nats, by stretch."""
    import torch

    rows = _rows_of_equal_length(group)
    runs = [_run(group, row) for row in rows]
    total = sum(len(stretch.inputs) for stretch in group)
    with torch.inference_mode():
        side.begin(runs)
        for layer in range(side.num_layers):
            side.advance(layer, runs)
            return_freed_memory()
            progress(total)
        side.finish(runs)
        hidden = torch.cat([run.hidden.flatten(0, 1) for run in runs])
        targets = torch.from_numpy(np.concatenate([group[index].targets for row in rows for index in row]))
        losses = _walk_vocabulary(side, hidden, targets, vocab_size).numpy()
    progress(total)
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(group)
    at = 0
    for index in (index for row in rows for index in row):
        found[index] = losses[at : at + len(group[index].inputs)]
        at += len(group[index].inputs)
    return found


def _rows_of_equal_length(group: Sequence[_Stretch]) -> list[list[int]]:
    """Indices of stretches with equal lengths, which need no padding together."""
    by_length: dict[int, list[int]] = {}
    for index, stretch in enumerate(group):
        by_length.setdefault(len(stretch.inputs), []).append(index)
    rows = []
    for size, indexes in by_length.items():
        most = max(1, _ROW_TOKENS // size)
        rows += [indexes[start : start + most] for start in range(0, len(indexes), most)]
    return rows


def _run(group: Sequence[_Stretch], row: Sequence[int]) -> ForwardPass:
    import torch

    tokens = torch.from_numpy(np.stack([group[index].inputs for index in row]))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return ForwardPass(tokens=tokens, positions=positions, attention="sdpa")


def _walk_vocabulary(side: Side, hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float64 [N]: the negative log-probability of each target, without all logits [N, V] at once."""
    import torch

    total = torch.full((len(targets),), -math.inf, dtype=torch.float64)
    target = torch.zeros(len(targets), dtype=torch.float64)
    for start in range(0, vocab_size, _VOCABULARY_ROWS):
        stop = min(start + _VOCABULARY_ROWS, vocab_size)
        weight = side.head_rows(start, stop).T
        for first in range(0, len(targets), _ROW_TOKENS):
            part = slice(first, first + _ROW_TOKENS)
            logits = (hidden[part] @ weight).float()
            total[part] = torch.logaddexp(total[part], logits.double().logsumexp(-1).cpu())
            here = ((targets[part] >= start) & (targets[part] < stop)).nonzero()[:, 0]
            if len(here):
                wanted = (targets[part][here] - start).to(logits.device)
                target[first + here] = logits[here.to(logits.device), wanted].double().cpu()
    return total - target


def described(held_out: HeldOut) -> str:
    """The documents used, of how many, as text."""
    return f"{counted(len(held_out.documents), 'document')} of {held_out.of:,}, {counted(held_out.tokens, 'token')}"
