"""From limited positions to the points of a JointTrajectory: times, positions, velocities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .contract_model import FloatArray
from .timing import NS_PER_S


@dataclass(frozen=True, slots=True)
class TrajectoryPoints:
    """What the points of a JointTrajectory hold.

    offsets: (n,) ns from the header stamp, first 0, rising. positions: (n, dof) [rad, m].
    velocities: (n, dof) [rad/s, m/s], the last row zero.
    n >= 2, so that the last point still lies in the future when it is sent.
    """

    offsets: NDArray[np.int64]
    positions: FloatArray
    velocities: FloatArray


def trajectory_points(
    positions: FloatArray,
    offsets: NDArray[np.int64],
    *,
    action_period: int,
    previous: FloatArray | None = None,
    control_period: int | None = None,
) -> TrajectoryPoints:
    """Points through `positions` (n, dof), the first due now, row i + 1 due `offsets[i]` ns later.

    Velocities are finite differences, limited to keep cubic interpolation between points monotone: zero
    where the direction turns, else the weighted harmonic mean of the slopes on both sides (Fritsch and
    Butland 1984). So no velocity exceeds its neighbouring slopes, and a spline through the points never
    leaves the positions' range. `previous`, commanded `control_period` ns before now, gives the slope into
    the first point; without it the arm is taken to be at rest. The last velocity is zero: the arm comes to
    a stop if nothing follows. A command without a future is followed by itself one action period later, or
    a controller would find the trajectory past.
    """
    if len(positions) == 1:
        positions = np.repeat(positions, 2, axis=0)
        offsets = np.array([action_period], dtype=np.int64)
    times = np.concatenate([[0], offsets]).astype(np.int64)
    steps = np.diff(times) / NS_PER_S
    slopes = np.diff(positions, axis=0) / steps[:, None]
    velocities = np.zeros_like(positions)
    velocities[1:-1] = _monotone_slope(slopes[:-1], slopes[1:], steps[:-1], steps[1:])
    if previous is not None and control_period is not None:
        step = np.array([control_period / NS_PER_S])
        arriving = (positions[:1] - previous) / step
        velocities[:1] = _monotone_slope(arriving, slopes[:1], step, steps[:1])
    return TrajectoryPoints(times, positions, velocities)


def cut(points: TrajectoryPoints, lookahead: int) -> TrajectoryPoints:
    """The points due within `lookahead` ns (at least two), coming to rest at the last of them."""
    count = max(2, int(np.searchsorted(points.offsets, lookahead, side="right")))
    if count >= len(points.offsets):
        return points
    velocities = points.velocities[:count].copy()
    velocities[-1] = 0.0
    return TrajectoryPoints(points.offsets[:count], points.positions[:count], velocities)


def _monotone_slope(
    left: FloatArray, right: FloatArray, left_step: FloatArray, right_step: FloatArray
) -> FloatArray:
    """Slope (n, dof) at points with slopes `left`, `right` over `left_step`, `right_step` (n,) seconds."""
    weight_left = (2.0 * right_step + left_step)[:, None]
    weight_right = (right_step + 2.0 * left_step)[:, None]
    same = np.sign(left) * np.sign(right) > 0
    with np.errstate(over="ignore"):  # a slope next to zero gives a mean of zero
        mean = (weight_left + weight_right) / (
            weight_left / np.where(same, left, 1.0) + weight_right / np.where(same, right, 1.0)
        )
    result: FloatArray = np.where(same, mean, 0.0)
    return result
