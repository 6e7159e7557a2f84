"""Action chunks: model space to the robot's units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.base import FeatureStats
from ..config import FamilyRules
from ..errors import ActionError, CheckpointError, ObservationError
from .normalize import Array, Normalizer


def refuse_non_finite(actions: NDArray[np.float32], hint: str | None = None) -> None:
    """Raise ActionError unless all actions are finite numbers; hint: what may be the cause, and a way out."""
    if not np.isfinite(actions).all():
        bad = int((~np.isfinite(actions)).sum())
        because = f"; {hint}" if hint else ""
        raise ActionError(f"{bad} of {actions.size} actions are not finite: the chunk was dropped{because}")


class ActionTransform:
    """Slices to the robot's width, undoes the normalisation without clipping, adds the state to delta
    dimensions."""

    def __init__(
        self, stats: FeatureStats, rules: FamilyRules, dof: int, delta_actions: Sequence[bool] | None = None
    ) -> None:
        """stats: of the actions, float64 (n,) with n >= dof; delta_actions: per dimension, whether the model
        predicts the difference to the state at the observation. Raises CheckpointError when they do not
        fit."""
        self.dof = dof
        self.normalizer = Normalizer(stats, rules.action_mode, rules, dof)
        mask = np.zeros(dof, dtype=bool) if delta_actions is None else np.asarray(delta_actions, dtype=bool)
        if mask.shape != (dof,):
            raise CheckpointError(
                f"delta_actions has {mask.shape[0]} entries, the robot has {dof} action dimensions"
            )
        self.delta = np.flatnonzero(mask)

    def to_physical(self, actions: NDArray[np.float32], state: Array | None = None) -> NDArray[np.float32]:
        """actions: (horizon, model width) in model space; state: the raw state of the observation, in the
        robot's units, needed by delta actions only. Returns (horizon, dof) float32 in the robot's units.

        Raises ObservationError when the shapes do not fit or a needed state is missing.
        """
        if actions.ndim != 2 or actions.shape[1] < self.dof:
            raise ObservationError(f"actions: expected shape (horizon, >= {self.dof}), got {actions.shape}")
        physical = self.normalizer.inverse(actions[:, : self.dof])
        if self.delta.size:
            physical[:, self.delta] += self._anchor(state).astype(physical.dtype)
        return physical.astype(np.float32)

    def to_model(self, actions: Array, state: Array | None = None) -> NDArray[np.float32]:
        """The way back, as in training: actions (n, dof) in the robot's units, delta dimensions relative to
        `state`. Returns (n, dof) float32. Raises as `to_physical`.
        """
        if actions.ndim != 2 or actions.shape[1] != self.dof:
            raise ObservationError(f"actions: expected shape (n, {self.dof}), got {actions.shape}")
        values = actions.astype(np.float64)
        if self.delta.size:
            values[:, self.delta] -= self._anchor(state)
        return self.normalizer.forward(values).astype(np.float32)

    def _anchor(self, state: Array | None) -> Array:
        """The state's dimensions that delta actions are differences to."""
        if state is None:
            raise ObservationError("this policy predicts differences to the state: pass state=")
        if state.shape[0] <= self.delta[-1]:
            raise ObservationError(
                f"state: {state.shape[0]} dimensions, but action {int(self.delta[-1])} is a difference "
                "to the state"
            )
        anchor: Array = state[self.delta]
        return anchor
