"""The loop, end to end, in real processes: cameras and joints in, chunks out, an arm that moves."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from ros_rig import wait_until
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.timing import stamp_to_ns
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.nodes.policy_node import DIAGNOSTICS_PERIOD, STATUS_PERIOD
from flashrt_ros.srv import SetPrompt

TRAVEL = 0.3  # summed motion of all joints that counts as moving [rad]
TRACKING = 0.1  # [rad]


@pytest.fixture
def contract():
    return load_contract("demo_arm")


def test_chunks_arrive_and_the_arm_moves_as_commanded(rig, demo_robot, policy_node, contract) -> None:
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    joints = rig.collect(JointState, "/joint_states")
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    robot, node = demo_robot(), policy_node(prompt="wave")

    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING)
    begin = time.monotonic()
    wait_until(lambda: travel(joints.since(begin)) > TRAVEL, 30.0, f"the arm moves by {TRAVEL} rad")
    wait_until(lambda: len(chunks.since(begin)) >= 5, 30.0, "five chunks")
    wait_until(lambda: len(commands.since(begin)) >= 100, 30.0, "a hundred commands")
    check_chunks(chunks.since(begin), contract)
    check_commands(commands.since(begin), contract)
    check_tracking(commands.since(begin), joints.since(begin), contract)

    answer = rig.call(SetPrompt, "/policy_node/set_prompt", prompt="open the gripper", reset=False)
    assert (answer.success, answer.code) == (True, SetPrompt.Response.CODE_OK)
    answered = time.monotonic()
    assert "wave" in {chunk.prompt for chunk in chunks.since(begin)}
    chunks.wait_for(lambda chunk: chunk.prompt == "open the gripper", timeout=5.0, since=answered)
    changed = time.monotonic()
    chunks.wait_for(timeout=5.0, since=changed)
    assert {chunk.prompt for chunk in chunks.since(changed)} == {"open the gripper"}
    status = statuses.wait_for(lambda message: message.prompt == "open the gripper", timeout=5.0)
    assert status.state == PolicyStatus.STATE_RUNNING

    assert node.end() == 0, node.output
    assert "Traceback" not in node.output
    assert robot.end() == 0, robot.output


def travel(messages) -> float:
    positions = np.array([message.position for message in messages])
    return float(np.abs(np.diff(positions, axis=0)).sum()) if len(positions) > 1 else 0.0


def check_chunks(chunks, contract) -> None:
    for chunk in chunks:
        assert tuple(chunk.joint_names) == contract.action.joints
        assert (chunk.horizon, chunk.dof, len(chunk.data)) == (50, 7, 350)
        assert np.isfinite(chunk.data).all()
        assert chunk.step_period == pytest.approx(0.02)
        assert chunk.representation == ActionChunk.REPRESENTATION_ABSOLUTE
        assert chunk.inference_time > 0.0
        assert set(chunk.observation_streams) == set(contract.streams)
        observed = [stamp_to_ns(stamp) for stamp in chunk.observation_stamps]
        assert max(observed) - min(observed) <= contract.sync.max_skew
        # Action 0 was due when the observation was taken, give or take the age the contract allows it.
        assert abs(stamp_to_ns(chunk.header.stamp) - max(observed)) < 0.5e9
    sequences = [chunk.sequence for chunk in chunks]
    assert sequences == list(range(sequences[0], sequences[0] + len(chunks)))
    dues = [stamp_to_ns(chunk.header.stamp) for chunk in chunks]
    assert dues == sorted(dues)


def check_commands(commands, contract) -> None:
    limits = [joint.limits for joint in contract.action_joints]
    lower, upper = np.array([(limit.lower, limit.upper) for limit in limits]).T
    fastest = np.array([limit.velocity for limit in limits])
    previous = None
    for command in commands:
        assert tuple(command.joint_names) == contract.action.joints
        times = np.array([stamp_to_ns(point.time_from_start) for point in command.points])
        positions = np.array([point.positions for point in command.points])
        velocities = np.array([point.velocities for point in command.points])
        assert times[0] == 0
        assert 0 < times[-1] <= 100_000_000  # the contract's lookahead
        assert (np.diff(times) == 20_000_000).all()
        assert (positions >= lower).all()
        assert (positions <= upper).all()
        assert (np.abs(np.diff(positions, axis=0)) <= fastest * 0.02 * (1 + 1e-6)).all()
        assert (velocities[-1] == 0.0).all()
        if previous is not None:
            assert (np.abs(positions[0] - previous) <= fastest * 0.02 * (1 + 1e-6)).all()
        previous = positions[0]


def check_tracking(commands, joints, contract) -> None:
    """Measured positions against what was commanded for their time, by name; the controller lags a little."""
    due = np.array([stamp_to_ns(command.header.stamp) for command in commands])
    wanted = np.array([command.points[0].positions for command in commands])
    names = joints[0].name
    columns = [names.index(name) for name in contract.action.joints]
    stamps = np.array([stamp_to_ns(message.header.stamp) for message in joints])
    inside = (stamps >= due[0]) & (stamps <= due[-1])
    measured = np.array([message.position for message in joints])[inside][:, columns]
    expected = np.array([np.interp(stamps[inside], due, column) for column in wanted.T]).T
    rms = float(np.sqrt(np.mean((measured - expected) ** 2)))
    assert rms < TRACKING, f"tracking error {rms:.3f} rad"
    # Standing still would not do: the arm must be nearer to its commands than to where it began.
    assert rms < float(np.sqrt(np.mean((expected - expected[0]) ** 2)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_node_with_a_hold(rig, demo_robot, policy_node, number: int) -> None:
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    demo_robot()
    node = policy_node()
    commands.wait_for(timeout=60.0)
    assert node.end(number, timeout=5.0) == 0, node.output
    assert "Traceback" not in node.output
    last = commands.messages[-1]
    positions = np.array([point.positions for point in last.points])
    assert (positions == positions[0]).all(), "the last command must be a hold"
    assert not np.any([point.velocities for point in last.points[1:]])


def test_dry_run_computes_chunks_and_commands_nothing(rig, demo_robot, policy_node) -> None:
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    demo_robot()
    policy_node(dry_run=True)
    chunks.wait_for(lambda chunk: chunk.sequence >= 3)
    assert commands.messages == []


def test_namespaced_node_and_robot_find_each_other(rig, demo_robot, policy_node) -> None:
    chunks = rig.collect(ActionChunk, "/left/policy_node/action_chunk")
    elsewhere = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    commands = rig.collect(JointTrajectory, "/left/arm_controller/joint_trajectory")
    demo_robot(namespace="left")
    policy_node(namespace="left")
    chunks.wait_for()
    commands.wait_for()
    assert elsewhere.messages == []


def test_diagnostics_tell_the_same_story(rig, demo_robot, policy_node) -> None:
    """At their period from the first one on, although the node loaded its checkpoint before it spun."""
    reports = rig.collect(DiagnosticArray, "/diagnostics")
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    policy_node(seed=3)

    def ours(report: DiagnosticArray) -> bool:
        return report.status[0].name == "/policy_node: policy"

    def running(report: DiagnosticArray) -> bool:
        values = {item.key: item.value for item in report.status[0].values}
        return ours(report) and values["state"] == "running"

    entry = reports.wait_for(running).status[0]
    assert entry.level in (DiagnosticStatus.OK, DiagnosticStatus.WARN)
    assert entry.hardware_id == "demo_arm"
    values = {item.key: item.value for item in entry.values}
    assert values["prompt"] == "wave"
    assert float(values["base_camera.rate_hz"]) > 0.0

    def received() -> dict[float, list[float]]:
        diagnostics = [moment for moment, report in reports.entries if ours(report)]
        return {DIAGNOSTICS_PERIOD: diagnostics, STATUS_PERIOD: [moment for moment, _ in statuses.entries]}

    wait_until(lambda: min(map(len, received().values())) >= 4, 10.0, "four of each report")
    for period, moments in received().items():
        gaps = np.diff(moments[:4])
        assert (gaps > 0.3 * period).all(), gaps
        assert (gaps < 1.7 * period).all(), gaps
