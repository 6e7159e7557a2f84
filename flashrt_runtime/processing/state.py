"""The robot's state: physical units to model space, and the bins pi0.5 writes into its prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.base import FeatureStats
from ..config import FamilyRules
from ..errors import ObservationError
from .normalize import Array, Normalizer

BINS = 256
BIN_EDGES = np.linspace(-1, 1, BINS + 1)[:-1]


class StateTransform:
    """Normalises a robot's state by the checkpoint's statistics and rules."""

    def __init__(self, stats: FeatureStats, rules: FamilyRules, width: int | None) -> None:
        """stats: of the state, float64 (n,); width: the robot's state dimensions, None for as many as the
        statistics.

        Raises CheckpointError when the statistics do not fit.
        """
        self.normalizer = Normalizer(stats, rules.state_mode, rules, width)
        self.width = width if width is not None else (stats.width or None)
        self.binned = rules.state_in_prompt

    def normalize(self, state: Array) -> NDArray[np.float32]:
        """state: (width,) in the robot's units -> (width,) float32 in model space, not padded, not clipped.

        Raises ObservationError for another shape, or values that are not finite here or there.
        """
        values = np.asarray(state)
        if values.ndim != 1 or (self.width is not None and values.shape[0] != self.width):
            raise ObservationError(f"state: expected shape ({self.width},), got {values.shape}")
        _refuse_non_finite("state", values)
        exact = self.normalizer.forward(values)
        with np.errstate(over="ignore"):
            rounded = exact.astype(np.float32)
        _refuse_non_finite("state, normalised by the checkpoint's statistics", rounded)
        return _keep_bin(exact, rounded) if self.binned else rounded

    @staticmethod
    def pad(state: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
        """(n,) -> (dim,) float32, zeros appended: the width the model's state projection takes."""
        if state.shape[0] > dim:
            raise ObservationError(f"state: {state.shape[0]} dimensions do not fit the model's {dim}")
        padded = np.zeros(dim, np.float32)
        padded[: state.shape[0]] = state
        return padded


def _refuse_non_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise ObservationError(
            f"{name}: values at {np.flatnonzero(~np.isfinite(values)).tolist()} are not finite"
        )


def discretize(state: Array) -> NDArray[np.int64]:
    """Index of the bin of each value of a normalised state: 256 equal bins over [-1, 1).

    Below -1 gives -1, from 1 on 255: out-of-range values are not clamped to the first bin.
    """
    bins: NDArray[np.int64] = np.searchsorted(BIN_EDGES, state, side="right").astype(np.int64) - 1
    return bins


def _keep_bin(exact: Array, rounded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounding to float32 may lift a value onto the edge of the next bin; such a value is rounded down
    instead."""
    lifted = discretize(rounded) != discretize(exact)
    if not lifted.any():
        return rounded
    return np.where(lifted, np.nextafter(rounded, np.float32(-np.inf)), rounded).astype(np.float32)
