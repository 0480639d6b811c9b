"""Loss spikes: a loss far above the recent ones.

A rolling window gives a line, which the next loss is expected on, and a spread around it. The line goes through the
medians of the window's halves, and the spread is the median absolute deviation (MAD): means would be moved by the very
losses that are looked for. Without the line, the fast fall of a run's beginning would hide spikes.
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
#: In nats. Losses of a converged or memorised text hardly vary; 6 x 0.001 above them is no spike that anyone minds.
_LEAST_SIGMA = 1e-3


class SpikeDetector:
    """The last ``window_steps`` losses of a run. It says nothing before it has seen that many.

    Spikes stay out of the window, so that one does not hide the next. A loss that stays up for a quarter of the window
    is no spike but a new level, as after a change of the data: the window begins anew with it.
    """

    def __init__(self, recipe: Spikes) -> None:
        self._sigmas, self._size = recipe.sigmas, recipe.window_steps
        self._window: list[float] = []
        self._above: list[float] = []  # consecutive spikes

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` lies more than ``sigmas`` above what the window expects.

        A loss that is not finite is another matter.
        """
        if len(self._window) < self._size or not math.isfinite(loss):
            return False
        half = self._size // 2
        slope = (median(self._window[-half:]) - median(self._window[:half])) / (self._size - half)
        moved = [each + slope * (self._size - i) for i, each in enumerate(self._window)]  # along it, to the next step
        middle = median(moved)
        sigma = _SIGMA_PER_MAD * median(abs(each - middle) for each in moved)
        return loss > middle + self._sigmas * max(sigma, _LEAST_SIGMA)

    def observe(self, loss: float) -> None:
        """Take the loss of a step that is over, spike or not."""
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
        """Plain JSON, for checkpoints."""
        return {"losses": list(self._window), "spikes": list(self._above)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``; a recipe with a shorter window keeps the newest losses."""
        self._window = [float(each) for each in state["losses"]][-self._size :]
        self._above = [float(each) for each in state["spikes"]]


def check_spikes(state: object) -> None:
    """Raise ``ValueError`` with the field for what is no ``SpikeDetector.state()``."""
    for name in ("losses", "spikes"):
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, list) or not all(map(is_number, found)):
            raise ValueError(f"spikes.{name} is {found!r:.60}, expected a list of finite numbers")
