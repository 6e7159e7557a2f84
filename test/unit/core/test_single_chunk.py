"""The chunk of ~/get_action_chunk: when its points are due, its velocities, and what it says of limits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashrt_ros.core.contract import OnViolation, RobotContract, load_contract
from flashrt_ros.core.errors import ChunkError, StartError
from flashrt_ros.core.limits import Limiter
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.single_chunk import single_chunk

PERIOD = 20_000_000
START = np.array([0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.02])


@pytest.fixture
def demo() -> RobotContract:
    return load_contract("demo_arm")


def test_an_action_in_reach_is_due_one_period_after_the_start(demo: RobotContract) -> None:
    actions = START + np.outer(np.arange(1, 6), [0.02, 0, 0, 0, 0, 0, 0])  # 1 rad/s, of 1.5
    chunk = single_chunk(actions, START, demo)
    assert chunk.note == ""
    assert chunk.points.offsets.tolist() == [PERIOD * i for i in range(1, 6)]
    np.testing.assert_allclose(chunk.points.positions, actions)
    np.testing.assert_allclose(chunk.points.velocities[:, 0], [1, 1, 1, 1, 0], atol=1e-9)
    assert not chunk.points.velocities[:, 1:].any()


def test_a_jump_goes_no_faster_than_the_limit_and_is_told(demo: RobotContract) -> None:
    """The first point too: a controller has its own due time to get there, not none at all."""
    chunk = single_chunk(np.tile(START + np.eye(7)[0] / 2, (50, 1)), START, demo)
    times = np.concatenate([[0], chunk.points.offsets]) / 1e9
    slopes = np.diff(np.vstack([START, chunk.points.positions]), axis=0) / np.diff(times)[:, None]
    limiter = Limiter(demo)
    assert np.abs(slopes).max() == pytest.approx(limiter.velocity[0], rel=1e-6)
    assert (np.abs(chunk.points.velocities) <= limiter.velocity).all()
    assert chunk.points.positions[-1, 0] == pytest.approx(0.5)
    # 0.5 rad at 1.5 rad/s takes 17 periods; the last of them arrives
    assert "limited: 16 of 50 actions" in chunk.note
    assert "joint shoulder_pan: velocity 25 is beyond the limit 1.5" in chunk.note


def test_a_later_violation_is_told_as_well(demo: RobotContract) -> None:
    actions = np.tile(START, (10, 1))
    actions[7, 6] = 0.5
    chunk = single_chunk(actions, START, demo)
    assert "limited: 1 of 10 actions" in chunk.note
    assert "joint gripper: position 0.5 is beyond the limit 0.04" in chunk.note


def test_one_action_is_a_chunk(demo: RobotContract) -> None:
    chunk = single_chunk(START[None, :] + 0.001, START, demo)
    assert chunk.points.offsets.tolist() == [PERIOD]
    assert not chunk.points.velocities.any()


def test_what_is_refused(demo: RobotContract) -> None:
    far = START[None, :] + np.eye(7)[0] / 2
    with pytest.raises(ChunkError, match=r"velocity .* is beyond the limit") as refused:
        single_chunk(far, START, replace(demo, on_violation=OnViolation.REJECT))
    assert refused.value.reason is Reason.LIMIT_VELOCITY
    with pytest.raises(ChunkError, match="nan"):
        single_chunk(far * np.nan, START, demo)
    with pytest.raises(StartError, match="move it inside"):
        single_chunk(far, START + 9, demo)


def test_velocities_are_kept_as_the_policy_means_them(
    tmp_path: Path, demo_text: str
) -> None:
    text = demo_text.replace("representation: absolute", "representation: velocity")
    kind = "std_msgs/msg/Float64MultiArray"
    path = tmp_path / "velocity.yaml"
    path.write_text(text.replace("trajectory_msgs/msg/JointTrajectory, lookahead: 0.1", kind))
    actions = np.tile([1.0, 0, 0, 0, 0, 0, 0.05], (3, 1))
    chunk = single_chunk(actions, START, load_contract(path))
    np.testing.assert_allclose(chunk.values, actions)
    np.testing.assert_allclose(chunk.points.positions[-1], START + np.array([0.06, 0, 0, 0, 0, 0, 0.003]))
