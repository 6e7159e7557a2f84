"""Affine normalisation of one feature by its statistics; forward for states, inverse for actions.

Formulas of openpi `transforms.py` and LeRobot `normalize_processor.py`; they differ only in their epsilons
and in the precision they calculate in, both of which are `FamilyRules`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.base import FeatureStats
from ..checkpoints.stats import NEEDED
from ..config import FamilyRules, NormalizationMode
from ..errors import CheckpointError

Array = NDArray[np.floating[Any]]


class Normalizer:
    """x -> (x - offset) / scale with the mode's constants; no clipping in either direction.

    quantile, quantile10, min_max: [low, high] -> [-1, 1] with range = high - low (+ quantile_eps for
    quantiles), a range of exactly zero replaced by zero_range_eps. mean_std: (x - mean) / (std + std_eps),
    back with std_eps_inverse. identity, and a feature without statistics, change nothing. Calculates in
    float64 for openpi and in float32 for LeRobot, as they do.
    """

    def __init__(
        self, stats: FeatureStats, mode: NormalizationMode, rules: FamilyRules, width: int | None
    ) -> None:
        """width: leading dimensions to use (statistics may be padded); None takes all.

        Raises CheckpointError when the mode's statistics are missing, too narrow, or have a range of zero
        that no rule replaces.
        """
        self.mode = mode
        self.dtype = np.dtype(np.float64 if rules.family == "openpi" else np.float32)
        needed = NEEDED[mode]
        self.identity = needed is None or stats.width == 0
        self.offset: Array = np.zeros(0)
        self.scale: Array = self.offset
        self.scale_back: Array = self.offset
        if self.identity or needed is None:
            return
        first, second = (self._statistic(stats, name, width) for name in needed)
        if mode == "mean_std":
            self.offset = first
            self.scale = second + self.dtype.type(rules.std_eps)
            self.scale_back = second + self.dtype.type(rules.std_eps_inverse)
        else:
            span = second - first
            if mode != "min_max":
                span = span + self.dtype.type(rules.quantile_eps)
            span = np.where(span == 0, self.dtype.type(rules.zero_range_eps), span)
            self.offset = first
            self.scale = self.scale_back = span
        if (self.scale == 0).any():
            index = int(np.flatnonzero(self.scale == 0)[0])
            raise CheckpointError(
                f"{mode} statistics of dimension {index} have no range: set the rule zero_range_eps, "
                "quantile_eps or std_eps"
            )

    def _statistic(self, stats: FeatureStats, name: str, width: int | None) -> Array:
        value = getattr(stats, name)
        if value is None:
            raise CheckpointError(
                f"{self.mode} normalisation needs the statistic {name!r}, which the checkpoint lacks"
            )
        if width is not None and value.shape[0] < width:
            raise CheckpointError(
                f"statistic {name!r} has {value.shape[0]} dimensions, the robot has {width}"
            )
        array: Array = value[:width].astype(self.dtype)
        return array

    def forward(self, values: Array) -> Array:
        """Physical units to model space, in the family's precision; values: (..., width)."""
        x = values.astype(self.dtype)
        if self.identity:
            return x
        scaled = (x - self.offset) / self.scale
        return scaled if self.mode == "mean_std" else scaled * 2 - 1

    def inverse(self, values: Array) -> Array:
        """Model space to physical units, in the family's precision; values: (..., width)."""
        x = values.astype(self.dtype)
        if self.identity:
            return x
        if self.mode == "mean_std":
            return x * self.scale_back + self.offset
        return (x + 1) / 2 * self.scale_back + self.offset
