"""One chunk for whoever asked: within the contract's limits, from where the robot is, as a trajectory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .contract_model import FloatArray, OnViolation, RobotContract
from .errors import ChunkError
from .limits import TOLERANCE, Limiter
from .trajectory import TrajectoryPoints, trajectory_points


@dataclass(frozen=True)
class SingleChunk:
    """points: (n, dof), point i due (i + 1) * action period after the start, which is the measured pose at
    rest; positions are where the actions lead to. values: (n, dof) as the policy means them, robot units.
    note: what the limits changed, "" for nothing."""

    points: TrajectoryPoints
    values: FloatArray
    note: str


def single_chunk(actions: ArrayLike, measured: ArrayLike, contract: RobotContract) -> SingleChunk:
    """`actions` (n, dof) of the policy in robot units, limited from the `measured` joints (dof,).

    Raises ChunkError (CHUNK_SHAPE, CHUNK_NOT_FINITE; LIMIT_* where the contract rejects violations),
    StartError as Limiter.check_start does.
    """
    limiter, period = Limiter(contract), contract.action.period
    rows = limiter.check_chunk(actions)
    start = limiter.check_start(measured)
    periods = np.full(len(rows), period, dtype=np.int64)
    violation = limiter.first_violation(rows, start, periods)
    if violation is not None and contract.on_violation is OnViolation.REJECT:
        raise ChunkError(violation.reason, str(violation))
    limited = limiter.apply_path(rows, start, periods)
    changed = np.abs(limited.values - rows) > TOLERANCE * np.maximum(1.0, np.abs(rows))
    note = ""
    if count := int(changed.any(axis=1).sum()):
        why = violation or "a joint could not stop before its position limit"
        note = f"limited: {count} of {len(rows)} actions are not the policy's; {why}"
    # Limits were judged with each action reached one period after the one before, the first after the start.
    path = trajectory_points(
        np.concatenate([start[None, :], limited.positions]), np.cumsum(periods), action_period=period
    )
    points = TrajectoryPoints(path.offsets[1:], path.positions[1:], path.velocities[1:])
    return SingleChunk(points, limited.values, note)
