"""Position, velocity and acceleration limits: the last line before a command is published.

Everything is judged in position space. With p the position commanded before and dt the time since,

    target = value (absolute) | p + value (delta) | p + value * dt (velocity)
    lower <= target <= upper,   |target - p| <= velocity limit * dt

and for joints with an acceleration limit, with v the speed commanded before, |(target - p) / dt - v| <=
acceleration limit * dt, and slow enough to stop before the position limit (see braking.py).

What leaves here keeps them, whatever comes in. The one case where they cannot hold, a start outside the
position limits by more than one step, is refused (`check_start`). Velocities, and increments that leave as
such (no output is a trajectory), lead from where the robot really is, so they are judged from measured
positions, which may overshoot: then a joint outside its limits may stand or move back, never further out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .braking import speed_bounds
from .chunk import check_chunk
from .contract_model import FloatArray, Representation, RobotContract
from .errors import ContractError, StartError
from .reasons import Reason
from .timing import NS_PER_S

# Steps stay this much (relative) inside the velocity limit, so that rounding never carries one over it.
MARGIN = 1e-7
# A wish is called a violation when it is beyond a limit by more than this (relative to the limit or 1).
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Violation:
    """A joint's wish beyond a limit. LIMIT_POSITION: position [rad, m]; LIMIT_VELOCITY: speed [rad/s, m/s];
    LIMIT_ACCELERATION: change of speed per second [rad/s², m/s²]."""

    reason: Reason
    joint: str
    value: float
    limit: float

    def __str__(self) -> str:
        what = self.reason.name.removeprefix("LIMIT_").lower()
        return f"joint {self.joint}: {what} {self.value:.6g} is beyond the limit {self.limit:.6g}"


class Limited(NamedTuple):
    """A path after limiting.

    values: as given in, within limits, same shape and representation. positions: the positions they lead to.
    violations: of the first row only; later rows are judged again when they are due.
    """

    values: FloatArray
    positions: FloatArray
    violations: tuple[Violation, ...]


class Limiter:
    """Limits of a contract's action joints. Stateless: the caller keeps position and speed commanded last."""

    def __init__(self, contract: RobotContract) -> None:
        """Raises ContractError when an action joint has no limits."""
        limits = [joint.limits for joint in contract.action_joints if joint.limits is not None]
        if len(limits) != contract.dof:
            problem = contract.source.problem(("action", "joints"), "every commanded joint needs limits")
            raise ContractError([problem])
        self.names = contract.action.joints
        self.lower = np.array([limit.lower for limit in limits])
        self.upper = np.array([limit.upper for limit in limits])
        self.velocity = np.array([limit.velocity for limit in limits])
        self.acceleration = np.array([limit.acceleration or np.inf for limit in limits])
        self.bounds_acceleration = bool(np.isfinite(self.acceleration).any())
        self._representation = contract.action.representation
        increments = self._representation is Representation.DELTA and not contract.trajectory_lookahead
        self.from_measured = self._representation is Representation.VELOCITY or increments
        self._control_period = contract.rates.control_period

    def check_chunk(self, actions: ArrayLike) -> FloatArray:
        """(horizon, dof) float64; raises ChunkError for a wrong shape or any value that is not finite."""
        return check_chunk(actions, len(self.names))

    def check_start(self, measured: ArrayLike) -> FloatArray:
        """Measured joint positions (dof,) from which commands may start.

        Raises StartError (JOINT_NOT_FINITE, or START_OUTSIDE_LIMITS when a joint lies further outside its
        position limits than one control period at its velocity limit can bring back). Commands judged from
        measured positions may start anywhere.
        """
        start = np.array(measured, dtype=np.float64)
        if start.shape != self.lower.shape or not np.isfinite(start).all():
            text = f"expected {len(self.names)} finite joint positions, got {start.tolist()}"
            raise StartError(Reason.JOINT_NOT_FINITE, text)
        if self.from_measured:
            return start
        reach = self._steps(np.array([self._control_period]))[0]
        for index in np.flatnonzero((start < self.lower - reach) | (start > self.upper + reach)):
            text = (
                f"joint {self.names[index]} is at {start[index]:.6g}, its limits are "
                f"[{self.lower[index]:.6g}, {self.upper[index]:.6g}]: move it inside before starting"
            )
            raise StartError(Reason.START_OUTSIDE_LIMITS, text)
        return start

    def apply(
        self, values: ArrayLike, previous: ArrayLike, speed: FloatArray | None = None
    ) -> Limited:
        """Limit one command (dof,) sent one control period after position `previous` (dof,) was commanded."""
        row = np.asarray(values, dtype=np.float64)[None, :]
        limited = self.apply_path(row, previous, np.array([self._control_period]), speed)
        return Limited(limited.values[0], limited.positions[0], limited.violations)

    def apply_path(
        self, values: ArrayLike, previous: ArrayLike, periods: NDArray[np.int64],
        speed: FloatArray | None = None, standing: bool = False,
    ) -> Limited:
        """Limit commands (n, dof) one after the other.

        `previous`: position (dof,) before the first; `periods`: (n,) ns from each command's predecessor to
        it; `speed`: (dof,) commanded up to there, None at rest. standing: a hold at `previous`; where braking
        takes time each command stays where the one before got to, and none drives back. Raises ChunkError for
        a wrong shape or values that are not finite, StartError as check_start does.
        """
        rows, start = self.check_chunk(values), self.check_start(previous)
        with np.errstate(over="ignore", invalid="ignore"):  # absurd wishes overflow and fail the test below
            targets = self._targets(rows, start, periods)
            speed = np.zeros_like(start) if speed is None else speed
            if self._within(targets, start, periods, speed):
                return Limited(rows, targets, ())
            violations = self._judge(targets[:1], start, periods[:1], speed)
            return Limited(*self._clamp(rows, start, periods, speed, standing), violations)

    def first_violation(
        self, values: FloatArray, previous: FloatArray, periods: NDArray[np.int64],
        speed: FloatArray | None = None,
    ) -> Violation | None:
        """The first wish beyond a limit anywhere along a path (arguments as for apply_path); nothing is
        clamped."""
        with np.errstate(over="ignore", invalid="ignore"):
            targets = self._targets(values, previous, periods)
            speed = np.zeros_like(previous) if speed is None else speed
            if self._within(targets, previous, periods, speed):
                return None
            violations = self._judge(targets, previous, periods, speed)
            return violations[0] if violations else None

    def _steps(self, periods: NDArray[np.int64]) -> FloatArray:
        """Largest allowed change of position per row, (n, dof)."""
        steps: FloatArray = self.velocity * (periods[:, None] / NS_PER_S) * (1.0 - MARGIN)
        return steps

    def _bounds(self, before: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Positions allowed after `before` (…, dof)."""
        if not self.from_measured:
            return self.lower, self.upper
        return np.minimum(self.lower, before), np.maximum(self.upper, before)

    def _targets(self, rows: FloatArray, start: FloatArray, periods: NDArray[np.int64]) -> FloatArray:
        if self._representation is Representation.ABSOLUTE:
            return rows
        if self._representation is Representation.VELOCITY:
            rows = rows * (periods[:, None] / NS_PER_S)
        targets: FloatArray = start + np.cumsum(rows, axis=0)
        return targets

    def _within(
        self, targets: FloatArray, start: FloatArray, periods: NDArray[np.int64], speed: FloatArray
    ) -> bool:
        before = np.concatenate([start[None, :], targets[:-1]])
        changes, (lower, upper) = targets - before, self._bounds(before)
        inside = (targets >= lower) & (targets <= upper) & (np.abs(changes) <= self._steps(periods))
        if not inside.all() or not self.bounds_acceleration:
            return bool(inside.all())
        seconds = periods[:, None] / NS_PER_S
        speeds = changes / seconds
        earlier = np.concatenate([speed[None, :], speeds[:-1]])
        low, high = speed_bounds(earlier, before - lower, upper - before, self.acceleration, seconds, MARGIN)
        return bool(((speeds >= low) & (speeds <= high)).all())

    def _clamp(
        self, rows: FloatArray, start: FloatArray, periods: NDArray[np.int64], speed: FloatArray,
        standing: bool,
    ) -> tuple[FloatArray, FloatArray]:
        """Values and positions, each row limited from the position that the row before really reaches."""
        values, positions = np.empty_like(rows), np.empty_like(rows)
        for index, step in enumerate(self._steps(periods)):
            seconds = float(periods[index]) / NS_PER_S
            lower, upper = self._bounds(start)
            target = self._targets(rows[index : index + 1], start, periods[index : index + 1])[0]
            target = start if standing else target
            target = np.clip(target, start - step, start + step)
            if self.bounds_acceleration:
                bounds = speed_bounds(speed, start - lower, upper - start, self.acceleration, seconds, MARGIN)
                target = np.clip(target, start + bounds[0] * seconds, start + bounds[1] * seconds)
            reached = np.clip(target, lower, upper)
            speed = (reached - start) / seconds
            if self._representation is Representation.ABSOLUTE:
                values[index] = reached
            elif self._representation is Representation.DELTA:
                values[index] = reached - start
            else:
                values[index] = speed
            positions[index] = start = reached
        return values, positions

    def _judge(
        self, targets: FloatArray, start: FloatArray, periods: NDArray[np.int64], speed: FloatArray
    ) -> tuple[Violation, ...]:
        """Violations of the first wish (n, dof) that has any."""
        before, seconds = np.concatenate([start[None, :], targets[:-1]]), periods[:, None] / NS_PER_S
        bounded = np.clip(targets, *self._bounds(before))
        slack = TOLERANCE * np.maximum(1.0, np.abs(bounded))
        speeds = (bounded - before) / seconds
        earlier = np.concatenate([speed[None, :], speeds[:-1]])
        accelerations = np.abs(speeds - earlier) / seconds
        beyond = (
            np.abs(targets - bounded) > slack,
            np.abs(speeds) > self.velocity * (1.0 + TOLERANCE),
            accelerations > self.acceleration * (1.0 + TOLERANCE),
        )
        rows = np.flatnonzero(np.any(beyond, axis=(0, 2)))
        if not len(rows):
            return ()
        row = rows[0]
        limits = np.clip(targets[row], self.lower, self.upper)
        return (
            *self._named(Reason.LIMIT_POSITION, beyond[0][row], targets[row], limits),
            *self._named(Reason.LIMIT_VELOCITY, beyond[1][row], np.abs(speeds[row]), self.velocity),
            *self._named(Reason.LIMIT_ACCELERATION, beyond[2][row], accelerations[row], self.acceleration),
        )

    def _named(
        self, reason: Reason, where: NDArray[np.bool_], values: FloatArray, limits: FloatArray
    ) -> list[Violation]:
        picked = np.flatnonzero(where)
        return [Violation(reason, self.names[i], float(values[i]), float(limits[i])) for i in picked]
