"""What the demo's observer saw, and the figures computed from it. No ROS import; times: int nanoseconds."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .trajectory import LIMIT_TOLERANCE, Trajectory

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RobotView:
    """What the figures need to know of the robot contract.

    joint_names: commanded joints; lower, upper [rad, m], velocity [rad/s, m/s]: their limits (dof,), infinite
    where there is none; angular: (dof,) bool, False for prismatic joints; control_rate [Hz].
    """

    joint_names: tuple[str, ...]
    lower: FloatArray
    upper: FloatArray
    velocity: FloatArray
    angular: NDArray[np.bool_]
    control_rate: float

    @classmethod
    def from_contract(cls, contract: Any) -> RobotView:
        """View of a `flashrt_ros.core.contract.RobotContract`."""
        joints = contract.action_joints
        limits = [joint.limits for joint in joints]
        return cls(
            joint_names=tuple(joint.name for joint in joints),
            lower=np.array([limit.lower if limit else -np.inf for limit in limits]),
            upper=np.array([limit.upper if limit else np.inf for limit in limits]),
            velocity=np.array([limit.velocity if limit else np.inf for limit in limits]),
            angular=np.array([joint.unit != "m" for joint in joints]),
            control_rate=1e9 / contract.rates.control_period,
        )


@dataclass(frozen=True)
class ChunkSeen:
    """One ActionChunk: when it was published, when its action 0 is due, what it was made from."""

    published: int
    due: int
    sequence: int
    inference_time: float  # [s]
    newest_image_stamp: int | None  # None: the chunk names no camera
    prompt: str


@dataclass(frozen=True)
class FrameSeen:
    """One camera image kept for the contact sheet: RGB (H, W, 3) uint8."""

    stream: str
    stamp: int
    image: NDArray[np.uint8]


@dataclass
class Recording:
    """Everything the observer kept, in order of arrival."""

    arrivals: dict[str, list[int]] = field(default_factory=dict)  # stream -> receipt times
    stamps: dict[str, list[int]] = field(default_factory=dict)  # stream -> header stamps
    joint_times: list[int] = field(default_factory=list)
    joint_positions: list[FloatArray] = field(default_factory=list)
    commands: list[tuple[int, Trajectory]] = field(default_factory=list)  # (published, what was commanded)
    bad_commands: list[str] = field(default_factory=list)  # commands no controller would take, in words
    chunks: list[ChunkSeen] = field(default_factory=list)
    frames: list[FrameSeen] = field(default_factory=list)
    statuses: list[dict[str, Any]] = field(default_factory=list)  # PolicyStatus fields by name
    robot: dict[str, str] = field(default_factory=dict)  # the demo robot's last diagnostics

    def add_arrival(self, stream: str, receipt: int, stamp: int) -> None:
        """Note a message of a stream."""
        self.arrivals.setdefault(stream, []).append(receipt)
        self.stamps.setdefault(stream, []).append(stamp)

    def rate(self, stream: str, now: int, window: float = 2.0) -> float:
        """Messages of a stream per second over the last `window` seconds."""
        times = self.arrivals.get(stream, [])
        return recent_rate(times, now, window)

    def age(self, stream: str, now: int) -> float | None:
        """Seconds since the newest header stamp of a stream; None when none came."""
        stamps = self.stamps.get(stream)
        return (now - stamps[-1]) * 1e-9 if stamps else None

    def commanded_at(self, time: int) -> FloatArray | None:
        """Positions (dof,) asked for at `time` by the newest command published by then; None without."""
        index = bisect.bisect_right(self.commands, time, key=lambda command: command[0])
        return self.commands[index - 1][1].sample(time) if index else None


def recent_rate(times: Sequence[int], now: int, window: float) -> float:
    """Events per second over the last `window` seconds, from sorted times [ns]; 0 for fewer than two."""
    first = bisect.bisect_left(times, now - round(window * 1e9))
    count = len(times) - first
    if count < 2 or times[-1] <= times[first]:
        return 0.0
    return (count - 1) * 1e9 / (times[-1] - times[first])


def mean_rate(times: Sequence[int]) -> float:
    """Intervals per second between the first and the last of sorted times [ns]; 0 for fewer than two."""
    if len(times) < 2 or times[-1] <= times[0]:
        return 0.0
    return (len(times) - 1) * 1e9 / (times[-1] - times[0])


def commanded_series(recording: Recording) -> FloatArray:
    """(n, dof): what was commanded at each joint state's stamp; NaN before the first command."""
    dof = len(recording.joint_positions[0]) if recording.joint_positions else 0
    rows = [recording.commanded_at(time) for time in recording.joint_times]
    return np.array([np.full(dof, np.nan) if row is None else row for row in rows]).reshape(-1, dof)


def position_violations(recording: Recording, robot: RobotView) -> int:
    """Commands with a point outside the contract's position limits."""
    return sum(
        bool(
            np.any(command.positions < robot.lower - LIMIT_TOLERANCE)
            or np.any(command.positions > robot.upper + LIMIT_TOLERANCE)
        )
        for _, command in recording.commands
    )


def velocity_violations(recording: Recording, robot: RobotView, tolerance: float = 0.01) -> int:
    """Steps from one command's first point to the next one's that need more than the velocity limits."""
    due = np.array([command.times[0] for _, command in recording.commands])
    first = np.array([command.positions[0] for _, command in recording.commands])
    if len(due) < 2:
        return 0
    # A tick that comes early makes its step no faster: commands are meant to be followed at the nominal rate.
    seconds = np.maximum(np.diff(due)[:, None] * 1e-9, 1.0 / robot.control_rate)
    allowed = robot.velocity * (1 + tolerance) * seconds + LIMIT_TOLERANCE
    return int(np.sum(np.any(np.abs(np.diff(first, axis=0)) > allowed, axis=1)))


def percentile(values: Sequence[float] | FloatArray, percent: float) -> float | None:
    """Percentile, None of nothing."""
    return float(np.percentile(values, percent)) if len(values) else None


def latencies(recording: Recording) -> tuple[FloatArray, FloatArray]:
    """(inference times, newest camera stamp -> chunk published) [s]; the latter where a camera is named."""
    inference = [chunk.inference_time for chunk in recording.chunks]
    stamps = [(chunk.published, chunk.newest_image_stamp) for chunk in recording.chunks]
    whole = [(published - stamp) * 1e-9 for published, stamp in stamps if stamp is not None]
    return np.array(inference), np.array(whole)


def summarise(recording: Recording, robot: RobotView) -> dict[str, Any]:
    """The figures of summary.json; None where nothing was seen. How each is made: `report.MEANINGS`."""
    command_times = [published for published, _ in recording.commands]
    intervals = np.diff(command_times) * 1e-9
    after_first_chunk = [
        time for time in command_times if recording.chunks and time >= recording.chunks[0].published
    ]
    gaps = np.diff(after_first_chunk) * 1e-9
    inference, whole = latencies(recording)
    sequences = [chunk.sequence for chunk in recording.chunks]
    status = recording.statuses[-1] if recording.statuses else {}
    return {
        "duration_s": _rounded(duration(recording), 3),
        "chunks": len(recording.chunks),
        "chunks_per_s": _rounded(mean_rate([chunk.published for chunk in recording.chunks]), 3),
        "chunks_not_seen": sequences[-1] - sequences[0] + 1 - len(sequences) if sequences else 0,
        "control_commands": len(command_times),
        "control_rate_hz": _rounded(mean_rate(command_times), 3),
        "control_rate_target_hz": _rounded(robot.control_rate, 3),
        "control_jitter_p99_ms": _milliseconds(status.get("control_jitter_p99")),
        "observed_control_jitter_p99_ms": _milliseconds(
            percentile(np.abs(intervals - 1.0 / robot.control_rate), 99)
        ),
        "control_gap_max_ms": _milliseconds(float(gaps.max()) if len(gaps) else None),
        "limit_violations": position_violations(recording, robot),
        "velocity_limit_violations": velocity_violations(recording, robot),
        "invalid_commands": len(recording.bad_commands),
        **motion_figures(recording, robot),
        "stamp_to_publish_p50_ms": _milliseconds(percentile(whole, 50)),
        "stamp_to_publish_p99_ms": _milliseconds(percentile(whole, 99)),
        "node_stamp_to_publish_p50_ms": _milliseconds(status.get("stamp_to_publish_p50")),
        "node_stamp_to_publish_p99_ms": _milliseconds(status.get("stamp_to_publish_p99")),
        "inference_p50_ms": _milliseconds(percentile(inference, 50)),
        "inference_p95_ms": _milliseconds(percentile(inference, 95)),
        "inference_p99_ms": _milliseconds(percentile(inference, 99)),
        "stream_rates_hz": {
            name: _rounded(mean_rate(times), 2) for name, times in sorted(recording.arrivals.items())
        },
        "robot_diagnostics": dict(recording.robot),
    }


def duration(recording: Recording) -> float:
    """Seconds from the first chunk to the last thing seen; 0 without a chunk."""
    if not recording.chunks:
        return 0.0
    last = [recording.chunks[-1].published, *recording.joint_times[-1:]]
    last += [published for published, _ in recording.commands[-1:]]
    return (max(last) - recording.chunks[0].published) * 1e-9


def motion_figures(recording: Recording, robot: RobotView) -> dict[str, float | None]:
    """How far the arm moved and how closely it followed; revolute joints only, the gripper has its own."""
    measured = np.array(recording.joint_positions).reshape(-1, len(robot.joint_names))
    error = commanded_series(recording) - measured if len(measured) else measured
    error = error[~np.isnan(error).any(axis=1)]
    revolute = error[:, robot.angular]
    prismatic = error[:, ~robot.angular]
    travel = np.abs(np.diff(measured[:, robot.angular], axis=0)).sum()
    return {
        "joint_travel_rad": _rounded(float(travel), 4),
        "tracking_rms_rad": _rounded(float(np.sqrt(np.mean(revolute**2))), 5) if revolute.size else None,
        "tracking_max_rad": _rounded(float(np.abs(revolute).max()), 5) if revolute.size else None,
        "gripper_tracking_rms_m": _rounded(float(np.sqrt(np.mean(prismatic**2))), 6)
        if prismatic.size
        else None,
    }


def joint_error(recording: Recording, robot: RobotView, window: float = 1.0) -> float | None:
    """RMS of commanded minus measured [rad] over the last `window` seconds, revolute joints."""
    times = recording.joint_times
    if not times:
        return None
    first = bisect.bisect_left(times, times[-1] - round(window * 1e9))
    pairs = zip(times[first:], recording.joint_positions[first:], strict=False)
    errors = [
        command - measured
        for time, measured in pairs
        if (command := recording.commanded_at(time)) is not None
    ]
    return float(np.sqrt(np.mean(np.array(errors)[:, robot.angular] ** 2))) if errors else None


def _milliseconds(seconds: float | None) -> float | None:
    # The policy node reports what it has not measured yet as NaN or a negative number.
    if seconds is None or not np.isfinite(seconds) or seconds < 0:
        return None
    return round(1e3 * float(seconds), 3)


def _rounded(value: float, digits: int) -> float:
    return round(float(value), digits)


def statuses_reason(statuses: Sequence[Mapping[str, Any]]) -> str:
    """What the policy node last said about itself, in words; empty when it never spoke."""
    if not statuses:
        return ""
    last = statuses[-1]
    return f"{last['state_name']}: {last['message'] or 'no reason given'} (code {last['reason']})"


def still_missing(recording: Recording) -> str:
    """What has not been seen yet of all that the demo needs, in words; empty when it is running."""
    needed = {
        "joint state": recording.joint_times,
        "action chunk": recording.chunks,
        "command": recording.commands,
    }
    return ", no ".join(name for name, seen in needed.items() if not seen)
