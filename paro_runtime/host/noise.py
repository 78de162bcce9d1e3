"""A model's noise scale in time, which is what the host's schedules spread their steps over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HALVINGS = 24
"""Times the time is halved in search of a sigma: far finer than any schedule."""


def time_gone(model_sampling: Any) -> Callable[[float], float] | None:
    """Share of the model's time, 0 to 1, that is over when the noise has fallen to a sigma: the inverse of the host's
    `percent_to_sigma`. None for a model sampling without one."""
    to_sigma = getattr(model_sampling, "percent_to_sigma", None)
    if to_sigma is None:
        return None

    def share(sigma: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if float(to_sigma(middle)) > sigma:
                low = middle
            else:
                high = middle
        return high

    return share
