"""Position and velocity limits: the last line before a command is published.

Everything is judged in position space. With p the position commanded before and dt the time since,

    target = value (absolute) | p + value (delta) | p + value * dt (velocity)
    lower <= target <= upper,   |target - p| <= velocity limit * dt

What leaves here keeps both, whatever comes in. The one case where both cannot hold, a start outside the
position limits by more than one step, is refused (`check_start`). Velocity commands are judged from
measured positions, which may overshoot: then a joint outside its limits may stand or move back, never
further out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    """A joint's wish beyond a limit. LIMIT_POSITION: position [rad, m]; LIMIT_VELOCITY: speed [rad/s,
    m/s]."""

    reason: Reason
    joint: str
    value: float
    limit: float

    def __str__(self) -> str:
        what = "position" if self.reason is Reason.LIMIT_POSITION else "velocity"
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
    """Limits of a contract's action joints. Stateless: the caller keeps the position commanded last."""

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
        self._representation = contract.action.representation
        self._control_period = contract.rates.control_period

    def check_chunk(self, actions: ArrayLike) -> FloatArray:
        """(horizon, dof) float64; raises ChunkError for a wrong shape or any value that is not finite."""
        return check_chunk(actions, len(self.names))

    def check_start(self, measured: ArrayLike) -> FloatArray:
        """Measured joint positions (dof,) from which commands may start.

        Raises StartError (JOINT_NOT_FINITE, or START_OUTSIDE_LIMITS when a joint lies further outside its
        position limits than one control period at its velocity limit can bring back). Velocity commands may
        start anywhere.
        """
        start = np.array(measured, dtype=np.float64)
        if start.shape != self.lower.shape or not np.isfinite(start).all():
            text = f"expected {len(self.names)} finite joint positions, got {start.tolist()}"
            raise StartError(Reason.JOINT_NOT_FINITE, text)
        if self._representation is Representation.VELOCITY:
            return start
        reach = self._steps(np.array([self._control_period]))[0]
        for index in np.flatnonzero((start < self.lower - reach) | (start > self.upper + reach)):
            text = (
                f"joint {self.names[index]} is at {start[index]:.6g}, its limits are "
                f"[{self.lower[index]:.6g}, {self.upper[index]:.6g}]: move it inside before starting"
            )
            raise StartError(Reason.START_OUTSIDE_LIMITS, text)
        return start

    def apply(self, values: ArrayLike, previous: ArrayLike) -> Limited:
        """Limit one command (dof,) sent one control period after position `previous` (dof,) was commanded."""
        row = np.asarray(values, dtype=np.float64)[None, :]
        limited = self.apply_path(row, previous, np.array([self._control_period]))
        return Limited(limited.values[0], limited.positions[0], limited.violations)

    def apply_path(self, values: ArrayLike, previous: ArrayLike, periods: NDArray[np.int64]) -> Limited:
        """Limit commands (n, dof) one after the other.

        `previous`: position (dof,) before the first; `periods`: (n,) ns from each command's predecessor to
        it. Raises ChunkError for a wrong shape or values that are not finite, StartError as check_start does.
        """
        rows, start = self.check_chunk(values), self.check_start(previous)
        with np.errstate(over="ignore", invalid="ignore"):  # absurd wishes overflow and fail the test below
            targets = self._targets(rows, start, periods)
            if self._within(targets, start, self._steps(periods)):
                return Limited(rows, targets, ())
            violations = self._judge(targets[0], start, periods[0])
            return Limited(*self._clamp(rows, start, periods), violations)

    def first_violation(
        self, values: FloatArray, previous: FloatArray, periods: NDArray[np.int64]
    ) -> Violation | None:
        """The first wish beyond a limit anywhere along a path (arguments as for apply_path); nothing is
        clamped."""
        with np.errstate(over="ignore", invalid="ignore"):
            targets = self._targets(values, previous, periods)
            if self._within(targets, previous, self._steps(periods)):
                return None
            before = np.concatenate([previous[None, :], targets[:-1]])
            bounded, speed, outside, too_fast = self._excess(targets, before, periods[:, None])
            rows = np.flatnonzero((outside | too_fast).any(axis=1))
            if not len(rows):
                return None
            row = rows[0]
            return self._named(targets[row], bounded[row], speed[row], outside[row], too_fast[row])[0]

    def _steps(self, periods: NDArray[np.int64]) -> FloatArray:
        """Largest allowed change of position per row, (n, dof)."""
        steps: FloatArray = self.velocity * (periods[:, None] / NS_PER_S) * (1.0 - MARGIN)
        return steps

    def _targets(self, rows: FloatArray, start: FloatArray, periods: NDArray[np.int64]) -> FloatArray:
        if self._representation is Representation.ABSOLUTE:
            return rows
        if self._representation is Representation.VELOCITY:
            rows = rows * (periods[:, None] / NS_PER_S)
        targets: FloatArray = start + np.cumsum(rows, axis=0)
        return targets

    def _within(self, targets: FloatArray, start: FloatArray, steps: FloatArray) -> bool:
        changes = np.diff(targets, axis=0, prepend=start[None, :])
        inside = (targets >= self.lower) & (targets <= self.upper) & (np.abs(changes) <= steps)
        return bool(inside.all())

    def _clamp(
        self, rows: FloatArray, start: FloatArray, periods: NDArray[np.int64]
    ) -> tuple[FloatArray, FloatArray]:
        """Values and positions, each row limited from the position that the row before really reaches."""
        values, positions = np.empty_like(rows), np.empty_like(rows)
        for index, step in enumerate(self._steps(periods)):
            lower, upper = self.lower, self.upper
            if self._representation is Representation.VELOCITY:
                lower, upper = np.minimum(lower, start), np.maximum(upper, start)
            target = self._targets(rows[index : index + 1], start, periods[index : index + 1])[0]
            reached = np.clip(np.clip(target, start - step, start + step), lower, upper)
            if self._representation is Representation.ABSOLUTE:
                values[index] = reached
            elif self._representation is Representation.DELTA:
                values[index] = reached - start
            else:
                values[index] = (reached - start) / (periods[index] / NS_PER_S)
            positions[index] = start = reached
        return values, positions

    def _judge(self, target: FloatArray, start: FloatArray, period: np.int64) -> tuple[Violation, ...]:
        """Violations of one wish."""
        return self._named(target, *self._excess(target, start, period))

    def _excess(
        self, targets: FloatArray, before: FloatArray, periods: NDArray[np.int64] | np.int64
    ) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], NDArray[np.bool_]]:
        """Targets pulled to their bounds, the speeds to there, and where each is beyond its limit; one wish
        (dof,) or a path (n, dof)."""
        bounded = np.clip(targets, self.lower, self.upper)
        speed = np.abs(bounded - before) / (periods / NS_PER_S)
        slack = TOLERANCE * np.maximum(1.0, np.abs(bounded))
        return bounded, speed, np.abs(targets - bounded) > slack, speed > self.velocity * (1.0 + TOLERANCE)

    def _named(
        self, target: FloatArray, bounded: FloatArray, speed: FloatArray, outside: NDArray[np.bool_],
        too_fast: NDArray[np.bool_],
    ) -> tuple[Violation, ...]:
        def found(
            reason: Reason, where: NDArray[np.bool_], values: FloatArray, limits: FloatArray
        ) -> list[Violation]:
            picked = np.flatnonzero(where)
            return [Violation(reason, self.names[i], float(values[i]), float(limits[i])) for i in picked]

        return (
            *found(Reason.LIMIT_POSITION, outside, target, bounded),
            *found(Reason.LIMIT_VELOCITY, too_fast, speed, self.velocity),
        )
