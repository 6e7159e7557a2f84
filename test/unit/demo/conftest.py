import copy

import numpy as np
import pytest

from flashrt_ros.demo.recording import ChunkSeen, FrameSeen, Recording, RobotView
from flashrt_ros.demo.trajectory import Trajectory

MS = 1_000_000
START = 1_700_000_000_000 * MS


@pytest.fixture(scope="session")
def robot():
    return RobotView(
        joint_names=("pan", "lift", "gripper"),
        lower=np.array([-1.0, -1.0, 0.0]),
        upper=np.array([2.0, 1.0, 0.04]),
        velocity=np.array([1.0, 1.0, 0.1]),
        angular=np.array([True, True, False]),
        control_rate=50.0,
    )


@pytest.fixture
def recording(known_run):
    """A copy of `known_run` to change."""
    return copy.deepcopy(known_run)


@pytest.fixture(scope="session")
def known_run():
    """Ten seconds with known figures.

    Commands every 20 ms: pan rises by 0.1 rad/s, lift rests at 0.5 rad, the gripper at 2 cm. The arm follows
    exactly 0.01 rad (pan), 0.02 rad (lift) and 0.001 m (gripper) short of that. A chunk every 100 ms, 60 ms
    after its newest image, inference 40 ms. Cameras at 25 Hz.
    """
    kept = Recording()
    for index in range(501):
        time = START + index * 20 * MS
        times = np.array([time, time + 100 * MS])
        positions = np.array([[0.1 * at * 1e-9, 0.5, 0.02] for at in times - START])
        kept.commands.append((time, Trajectory(times, positions)))
    for index in range(1001):
        time = START + index * 10 * MS
        kept.joint_times.append(time)
        kept.joint_positions.append(np.array([0.001 * index - 0.01, 0.48, 0.019]))
        kept.add_arrival("joint_states", time + MS, time)
    for index in range(101):
        time = START + index * 100 * MS
        kept.chunks.append(ChunkSeen(time, time, index, 0.04, time - 60 * MS, "pick"))
    for index in range(251):
        for stream in ("base", "wrist"):
            kept.add_arrival(stream, START + (40 * index + 3) * MS, START + 40 * index * MS)
            if index % 50 == 0:
                image = np.full((24, 32, 3), 40 * (index // 50), np.uint8)
                kept.frames.append(FrameSeen(stream, START + 40 * index * MS, image))
    kept.statuses.append(
        {
            "state_name": "running",
            "message": "",
            "reason": 0,
            "control_jitter_p99": 0.0015,
            "stamp_to_publish_p50": 0.058,
            "stamp_to_publish_p99": -1.0,
        }
    )
    kept.robot = {"commands_rejected": "0", "last_rejection": ""}
    return kept
