"""Loss spikes: a loss far above the recent ones.

A line fitted to a rolling window predicts the next loss, with a spread around it. The line goes through the medians of
the window's halves, and the spread is the median absolute deviation (MAD), because spikes themselves would shift means.
Without the line, the fast fall of the loss at a run's beginning would hide spikes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from smolconv.continual_pretraining.recipe.schema import Spikes
from smolconv.layouts.documents import is_number

#: Standard deviations of a normal distribution in one MAD: 1 / Phi^-1(3/4).
_SIGMA_PER_MAD = 1.4826
#: In nats. Losses of converged or memorised text hardly vary; 6 x 0.001 above them is not worth reporting.
_LEAST_SIGMA = 1e-3


class SpikeDetector:
    """Holds the last ``window_steps`` losses of a run, and reports no spike before it has that many.

    Spikes stay out of the window, so that one does not hide the next. A loss that stays high for a quarter of the
    window is a new level, not a spike, as after a change of data: the window then restarts from those losses.
    """

    def __init__(self, recipe: Spikes) -> None:
        self._sigmas, self._size = recipe.sigmas, recipe.window_steps
        self._window: list[float] = []
        self._above: list[float] = []  # consecutive spikes

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` is more than ``sigmas`` above the window's prediction.

        False for a loss that is not finite; the caller handles that case.
        """
        if len(self._window) < self._size or not math.isfinite(loss):
            return False
        half = self._size // 2
        slope = (median(self._window[-half:]) - median(self._window[:half])) / (self._size - half)
        moved = [each + slope * (self._size - i) for i, each in enumerate(self._window)]  # to the next step
        middle = median(moved)
        sigma = _SIGMA_PER_MAD * median(abs(each - middle) for each in moved)
        return loss > middle + self._sigmas * max(sigma, _LEAST_SIGMA)

    def observe(self, loss: float) -> None:
        """Add the loss of a finished step, spike or not."""
        if not math.isfinite(loss):
            return
        if self.is_spike(loss):
            self._above.append(loss)
            if len(self._above) >= self._size // 4:
                self._window, self._above = self._above, []
            return
        self._above = []
        self._window = [*self._window, loss][-self._size :]

    def state(self) -> dict[str, Any]:
        """The state as plain JSON, for checkpoints."""
        return {"losses": list(self._window), "spikes": list(self._above)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``; a recipe with a shorter window keeps the newest losses."""
        self._window = [float(each) for each in state["losses"]][-self._size :]
        self._above = [float(each) for each in state["spikes"]]


def check_spikes(state: object) -> None:
    """Raise ``ValueError`` with the field if ``state`` is not a ``SpikeDetector.state()``."""
    for name in ("losses", "spikes"):
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, list) or not all(map(is_number, found)):
            raise ValueError(f"spikes.{name} is {found!r:.60}, expected a list of finite numbers")
