"""Tests whether one checkpoint is better than another, by a bootstrap of paired differences over documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)  #: percentiles


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A checkpoint's metric minus another's, over the same documents or samples."""

    checkpoint: str
    against: str
    on: str  #: a task, or a held-out source
    metric: str
    difference: float
    interval: tuple[float, float] | None  #: 95 %; None for fewer than two documents
    verdict: str  #: better, worse, or no difference shown
    documents: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    *, checkpoint: str, against: str, on: str, metric: str, difference: NDArray[np.float64],
    weights: NDArray[np.int64] | None = None, higher_is_better: bool, seed: int,
) -> Comparison:  # fmt: skip
    """``difference``: summed differences per document, [D]; ``weights``: tokens per document, or 1."""
    counts = np.ones(len(difference)) if weights is None else weights.astype(np.float64)
    mean = float(difference.sum() / counts.sum()) if counts.sum() else float("nan")
    interval = _interval(difference, counts, seed)
    verdict = "no difference shown"
    if interval is not None and (interval[0] > 0 or interval[1] < 0):
        verdict = "better" if (interval[0] > 0) == higher_is_better else "worse"
    return Comparison(
        checkpoint=checkpoint, against=against, on=on, metric=metric, difference=mean, interval=interval,
        verdict=verdict, documents=len(difference),
    )  # fmt: skip


def _interval(difference: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> tuple[float, float] | None:
    """The interval of the mean per token: documents are drawn with all their tokens."""
    size = len(difference)
    if size < 2 or not np.isfinite(difference).all():
        return None
    random = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = random.integers(0, size, size)
        total = counts[drawn].sum()
        means[index] = difference[drawn].sum() / total if total else 0.0
    low, high = np.percentile(means, _INTERVAL)
    return float(low), float(high)
