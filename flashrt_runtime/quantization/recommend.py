"""How many samples a calibration needs, judged by those it had."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.05
SHARE = 0.95  # of the projections
ORDERS = 32
FEWEST = 8


def recommended_samples(
    maxima: NDArray[np.float32], outliers: NDArray[np.bool_] | None = None
) -> tuple[int, bool]:
    """A number of samples, and whether the samples at hand settle it.

    maxima: (samples, projections) largest magnitudes; outliers: the same shape, not counted. The smallest
    power of two from 8 whose running maximum is, for 95 % of the projections and averaged over orders of the
    samples, within 5 % of that of all. One above half of the samples is not told apart from all of them:
    then twice as many are recommended, unsettled.
    """
    kept = maxima if outliers is None else np.where(outliers, np.float32(0), maxima)
    count = len(kept)
    reached = kept[:, kept.max(0, initial=0.0) > 0]
    if count < 2 * FEWEST or reached.size == 0:
        return max(2 * FEWEST, 2 * count), False
    number = FEWEST
    while number <= count // 2:
        if _missing(reached, number) <= TOLERANCE:
            return number, True
        number *= 2
    return 2 * count, False


def _missing(maxima: NDArray[np.float32], number: int) -> float:
    """By how much of the whole maximum `number` samples fall short, for the projection at SHARE."""
    random = np.random.default_rng(0)
    whole = maxima.max(0)
    short = [
        1 - maxima[random.permutation(len(maxima))[:number]].max(0) / whole for _ in range(ORDERS)
    ]
    return float(np.quantile(np.mean(short, 0), SHARE))
