"""Executing `trajectory_msgs/JointTrajectory` commands as ros2_control's joint_trajectory_controller does.

No ROS import: messages are duck-typed (`header.stamp`, `joint_names`, `points`). Times are int nanoseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt_ros.core.timing import stamp_to_ns

# A limit that went through float32 or a text file may come back this much larger [rad, m].
LIMIT_TOLERANCE = 1e-6


class CommandError(ValueError):
    """A trajectory command that cannot be executed; the message says what came and what was expected."""


@dataclass(frozen=True)
class Trajectory:
    """Positions due at absolute times.

    times: (n,) int64, strictly increasing [ns]. positions: (n, dof) [rad, m].
    velocities: (n, dof) [rad/s, m/s], or None where the command carried none.
    """

    times: NDArray[np.int64]
    positions: NDArray[np.float64]
    velocities: NDArray[np.float64] | None = None

    def sample(
        self, time: int, start_time: int | None = None, start: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Commanded positions (dof,) at `time` [ns].

        Between two points: linear, or cubic Hermite where they carry velocities. After the last: that one.
        Before the first: linear from `start`, commanded at `start_time`; without it, the first point.
        """
        times, positions = self.times, self.positions
        if time >= times[-1]:
            return np.array(positions[-1])
        index = int(np.searchsorted(times, time, side="right"))
        if index == 0:
            if start is None or start_time is None or time <= start_time:
                return np.array(positions[0] if start is None else start)
            fraction = (time - start_time) / float(times[0] - start_time)
            return np.asarray(start + fraction * (positions[0] - start))
        span = float(times[index] - times[index - 1])
        fraction = (time - int(times[index - 1])) / span
        before, after = positions[index - 1], positions[index]
        if self.velocities is None:
            return np.asarray(before + fraction * (after - before))
        seconds = span * 1e-9
        s2, s3 = fraction**2, fraction**3
        return np.asarray(
            (2 * s3 - 3 * s2 + 1) * before
            + (s3 - 2 * s2 + fraction) * seconds * self.velocities[index - 1]
            + (3 * s2 - 2 * s3) * after
            + (s3 - s2) * seconds * self.velocities[index]
        )


def trajectory_from_message(message: Any, joint_names: Sequence[str], receipt: int) -> Trajectory:
    """Trajectory of a JointTrajectory message, its columns in the order of `joint_names`.

    A zero header stamp means: starts at `receipt` [ns]. Raises CommandError for no points, other joints,
    wrong widths, times that do not increase (as joint_trajectory_controller does) and values not finite.
    """
    if not message.points:
        raise CommandError("trajectory without points: at least one is needed")
    names = list(message.joint_names)
    if sorted(names) != sorted(joint_names):
        raise CommandError(f"trajectory for joints {names}: expected exactly {list(joint_names)}")
    columns = [names.index(name) for name in joint_names]
    start = stamp_to_ns(message.header.stamp) or receipt
    times = np.array([start + stamp_to_ns(point.time_from_start) for point in message.points], dtype=np.int64)
    if np.any(np.diff(times) <= 0):
        raise CommandError("trajectory whose time_from_start does not increase strictly from point to point")
    positions = _columns(message.points, "positions", columns)
    assert positions is not None
    return Trajectory(times, positions, _columns(message.points, "velocities", columns))


def _columns(points: Sequence[Any], field: str, columns: list[int]) -> NDArray[np.float64] | None:
    rows = [getattr(point, field) for point in points]
    if field == "velocities" and not any(len(row) for row in rows):
        return None
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            raise CommandError(f"point {index} has {len(row)} {field}: expected {len(columns)}")
    values = np.array(rows, dtype=np.float64)[:, columns]
    if not np.all(np.isfinite(values)):
        index = int(np.argwhere(~np.isfinite(values))[0][0])
        raise CommandError(f"point {index} has {field} that are not finite")
    return values


@dataclass
class CommandCounts:
    """What became of the commands received. A message beyond limits is executed clamped and counted once."""

    received: int = 0
    rejected: int = 0
    limit_violations: int = 0
    last_rejection: str = ""
    last_violation: str = ""


class TrajectoryExecutor:
    """The newest trajectory, sampled at any time and clamped to the joint limits. Thread-safe.

    joint_names: order of every vector here. lower, upper, initial: (dof,) [rad, m].
    """

    def __init__(
        self,
        joint_names: Sequence[str],
        lower: NDArray[np.float64],
        upper: NDArray[np.float64],
        initial: NDArray[np.float64],
    ) -> None:
        self.joint_names = tuple(joint_names)
        self._lower, self._upper = lower, upper
        self._lock = threading.Lock()
        self._trajectory: Trajectory | None = None
        self._start_time = 0
        self._start = initial.astype(np.float64)
        self._last = self._start.copy()
        self._counts = CommandCounts()

    def command(self, message: Any, now: int) -> None:
        """Replace the running trajectory, as of `now` [ns]. Raises CommandError when it is rejected."""
        try:
            trajectory = trajectory_from_message(message, self.joint_names, now)
            if trajectory.times[-1] <= now:
                late = (now - int(trajectory.times[-1])) * 1e-6
                raise CommandError(f"trajectory that ended {late:.1f} ms in the past")
        except CommandError as error:
            with self._lock:
                self._counts.received += 1
                self._counts.rejected += 1
                self._counts.last_rejection = str(error)
            raise
        violation = describe_violation(trajectory.positions, self.joint_names, self._lower, self._upper)
        with self._lock:
            self._counts.received += 1
            if violation:
                self._counts.limit_violations += 1
                self._counts.last_violation = violation
            self._start_time, self._start = now, self._last
            self._trajectory = trajectory

    def sample(self, now: int) -> NDArray[np.float64]:
        """Positions (dof,) to hold at `now` [ns], within limits; the initial ones until a command came."""
        with self._lock:
            if self._trajectory is not None:
                wanted = self._trajectory.sample(now, self._start_time, self._start)
                self._last = np.clip(wanted, self._lower, self._upper)
            return self._last.copy()

    def counts(self) -> CommandCounts:
        """A copy of the counters."""
        with self._lock:
            return CommandCounts(**vars(self._counts))


def describe_violation(
    positions: NDArray[np.float64],
    joint_names: Sequence[str],
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
) -> str:
    """Which joint of positions (n, dof) leaves [lower, upper] furthest, in words; empty when none does."""
    excess = np.maximum(lower - positions, positions - upper)
    row, column = divmod(int(np.argmax(excess)), excess.shape[1])
    if excess[row, column] <= LIMIT_TOLERANCE:
        return ""
    return (
        f"{joint_names[column]} commanded to {positions[row, column]:.4f}, "
        f"outside [{lower[column]:.4f}, {upper[column]:.4f}]"
    )
