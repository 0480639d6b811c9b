"""Chooses the source of each sample of a stage as nanotron does, without a list of all samples.

nanotron (``build_blending_indices``, taken from Megatron) takes sample i from the source that is furthest behind its
share: the largest ``weight * max(i, 1) - samples so far``, in float64, the first of equals. Each choice depends on all
earlier ones, and nanotron keeps the whole list: 10 bytes per sample. Here it is a stream with one count per source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Lanes are runs of samples that are computed in parallel: one numpy call chooses for all lanes.
_LANES = 256
_LANE_SAMPLES = 256


class Blend:
    """An endless stream of source numbers, which can start at any point.

    ``weights`` may have any sum; they are normalised as in nanotron. ``counts``: samples taken from each source so far
    in this stage; without them the stream starts at the beginning.
    """

    def __init__(self, weights: Sequence[float], counts: Sequence[int] | None = None) -> None:
        shares = np.array(weights, dtype=np.float64)
        assert len(shares) and (shares > 0).all(), f"weights must be positive: {weights}"
        # nanotron divides by numpy's sum, which adds pairwise from eight sources on.
        self._shares = shares / shares.sum()
        self._counts = np.array(counts if counts is not None else [0] * len(shares), dtype=np.int64)
        assert len(self._counts) == len(shares)
        self._ahead = np.empty(0, np.int16)  #: choices computed but not taken yet
        self._ahead_counts = self._counts.astype(np.float64)  #: counts after them

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples taken from each source so far."""
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
        """Advance without returning the choices. Takes as much time as ``take``, but no memory."""
        while samples > 0:
            samples -= len(self.take(min(samples, _LANES * _LANE_SAMPLES)))


def _choose(shares: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """The sources of the next ``_LANES * _LANE_SAMPLES`` samples, and the counts after them.

    Lanes start from guessed counts. A lane is final once the lane before it is final and ends with the counts that
    this lane started from; other lanes are computed again from there. The first lane is final at once, so every round
    adds at least one, and the result is exactly the sequential one. A few rounds are enough, because shares pull the
    counts together after a wrong start.
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
