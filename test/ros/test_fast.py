"""pi0-FAST on the node: the arm moves by decoded tokens; tokens that are no chunk hold it, with a code."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from pipeline_driver import Driver
from ros_rig import wait_until
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.nodes.status import policy_status
from flashrt_runtime.errors import ActionTokenError, NoStopError


@pytest.fixture(scope="module")
def fast(checkpoint_maker: Callable[..., Path]) -> Path:
    """A random Pi0-FAST for the demo arm, whose output head writes example chunks."""
    return checkpoint_maker("--policy", "pi0fast")


@pytest.mark.slow
def test_the_arm_moves_by_decoded_tokens(rig, demo_robot, policy_node: Callable, fast: Path) -> None:
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    joints = rig.collect(JointState, "/joint_states")
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    robot, node = demo_robot(), policy_node(checkpoint=str(fast), config="pi0fast")
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING)
    begin = time.monotonic()
    wait_until(lambda: len(chunks.since(begin)) >= 5, 30.0, "five chunks")
    for chunk in chunks.since(begin):
        assert (chunk.horizon, chunk.dof) == (50, 7)
        assert np.isfinite(chunk.data).all()
        assert np.ptp(np.reshape(chunk.data, (50, 7)), axis=0).max() > 0.01

    def moved() -> float:
        positions = np.array([message.position for message in joints.since(begin)])
        return float(np.abs(np.diff(positions, axis=0)).sum()) if len(positions) > 1 else 0.0

    wait_until(lambda: moved() > 0.1, 30.0, "the arm moves by a tenth of a radian")
    assert node.end() == 0, node.output
    assert robot.end() == 0, robot.output


@pytest.mark.slow
def test_no_stop_is_a_code_and_nothing_is_commanded(
    rig, demo_robot, policy_node: Callable, fast: Path
) -> None:
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    node = policy_node(checkpoint=str(fast), config="pi0fast", decode_graph_steps=5)
    status = statuses.wait_for(lambda message: message.reason == Reason.NO_STOP_TOKEN)
    assert "no stop among the 5 tokens" in status.message
    fault = statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_FAULT)
    assert fault.reason == Reason.NO_STOP_TOKEN
    assert not chunks.since(0.0)
    assert not commands.since(0.0)
    assert node.end() == 0, node.output


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NoStopError("no stop among the 80 tokens of a chunk", range(80)), Reason.NO_STOP_TOKEN),
        (ActionTokenError("the FAST tokens hold 12 coefficients", range(9)), Reason.ACTION_TOKENS),
    ],
    ids=["no stop", "no chunk"],
)
def test_a_running_arm_is_held(driver: Driver, error: Exception, reason: Reason) -> None:
    """The policy is a stand-in: what a trained one would have to do to fail cannot be had."""
    broken = threading.Event()

    def fail(_prompt: str) -> None:
        if broken.is_set():
            raise error

    driver.policy.behave = fail
    driver.drive()
    assert not driver.pipeline.fault
    broken.set()
    wait_until(lambda: driver.commands[-1][0].kind is CommandKind.HOLDING, 10.0, "the hold")
    wait_until(lambda: driver.pipeline.fault, 10.0, "the fault")
    message = policy_status(driver.pipeline, Time())
    assert (message.state, message.reason) == (PolicyStatus.STATE_FAULT, reason)
    assert str(error)[:20] in message.message
