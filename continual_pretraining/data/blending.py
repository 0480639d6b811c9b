"""Which source each sample of a stage comes from, as nanotron decides it, without a list of all of them.

nanotron (``build_blending_indices``, taken from Megatron) gives sample i to the source that lags most behind its share:
the largest ``weight * max(i, 1) - samples so far``, in float64, the first of equals. Each choice depends on all before
it, and nanotron keeps the whole list: 10 bytes a sample. Here it is a stream whose state is one count a source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Lanes are runs of samples that are computed side by side; one numpy call then chooses for all lanes.
_LANES = 256
_LANE_SAMPLES = 256


class Blend:
    """An endless stream of source numbers, at the place that its counts say.

    ``weights`` are shares of any sum, normalised as nanotron does. ``counts`` are the samples that each source has
    given so far in this stage; without them the stream begins.
    """

    def __init__(self, weights: Sequence[float], counts: Sequence[int] | None = None) -> None:
        shares = np.array(weights, dtype=np.float64)
        assert len(shares) and (shares > 0).all(), f"weights must be positive: {weights}"
        # numpy's sum, which pairs up from the eighth source on, is what nanotron divides by.
        self._shares = shares / shares.sum()
        self._counts = np.array(counts if counts is not None else [0] * len(shares), dtype=np.int64)
        assert len(self._counts) == len(shares)
        self._ahead = np.empty(0, np.int16)  #: choices that are made but not taken
        self._ahead_counts = self._counts.astype(np.float64)  #: after them

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples that each source has given so far."""
        return tuple(self._counts.tolist())

    def take(self, samples: int) -> NDArray[np.int16]:
        """The sources of the next samples."""
        if len(self._shares) == 1:
            self._counts += samples
            return np.zeros(samples, np.int16)
        parts = [self._ahead[:samples]]
        self._ahead = self._ahead[samples:]
        missing = samples - len(parts[0])
        while missing > 0:
            chosen, self._ahead_counts = _choose(self._shares, self._ahead_counts)
            parts.append(chosen[:missing])
            self._ahead = chosen[missing:]
            missing -= len(parts[-1])
        taken = np.concatenate(parts)
        self._counts += np.bincount(taken, minlength=len(self._shares))
        return taken

    def skip(self, samples: int) -> None:
        """Go on without looking at the choices. Costs as much time as ``take``, and no memory."""
        while samples > 0:
            samples -= len(self.take(min(samples, _LANES * _LANE_SAMPLES)))


def _choose(shares: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """The sources of the next ``_LANES * _LANE_SAMPLES`` samples, and the counts after them.

    Lanes start from guessed counts. A lane stands once the one before it stands and ends in the counts that it was
    started from; others are computed again from there. The first lane stands at once, so every round adds at least one,
    and what is returned is exactly the sequential result. Shares pull the counts together again after a wrong start, so
    that a few rounds are enough.
    """
    begins = counts.sum() + _LANE_SAMPLES * np.arange(_LANES, dtype=np.float64)
    starts = _rounded(shares, begins)
    starts[0] = counts
    ends = np.empty_like(starts)
    chosen = np.empty((_LANES, _LANE_SAMPLES), np.int16)
    wrong = np.arange(_LANES)
    while len(wrong):
        chosen[wrong], ends[wrong] = _run(shares, starts[wrong], begins[wrong])
        wrong = 1 + np.flatnonzero((ends[:-1] != starts[1:]).any(axis=1))
        starts[wrong] = ends[wrong - 1]
    return chosen.reshape(-1), ends[-1].copy()


def _run(
    shares: NDArray[np.float64], starts: NDArray[np.float64], begins: NDArray[np.float64]
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Choose for all lanes, sample by sample: ``[lanes, samples]``, and the counts after them, ``[lanes, sources]``."""
    counts = starts.copy()
    flat = counts.reshape(-1)
    offsets = np.arange(len(counts)) * len(shares)
    chosen = np.empty((_LANE_SAMPLES, len(counts)), np.int16)
    lag = np.empty_like(counts)
    for sample in range(_LANE_SAMPLES):
        np.multiply(np.maximum(begins + sample, 1.0)[:, None], shares, out=lag)
        np.subtract(lag, counts, out=lag)
        best = lag.argmax(axis=1)
        chosen[sample] = best
        flat[best + offsets] += 1
    return chosen.T, counts


def _rounded(shares: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Whole counts that add up to the totals and are close to the shares, ``[totals, sources]``."""
    exact = totals[:, None] * shares
    counts = np.floor(exact)
    missing = totals - counts.sum(axis=1)
    order = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return np.asarray(counts + (order < missing[:, None]), dtype=np.float64)
