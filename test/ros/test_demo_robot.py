"""The simulated robot alone, in a real process: rates, commands followed, limits, faults on demand."""

from __future__ import annotations

import signal
import time

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Duration
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from ros_rig import wait_until
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from flashrt_ros.core.timing import stamp_to_ns

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper"]
HOME = np.array([0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.02])
COMMANDS = "/arm_controller/joint_trajectory"


class Robot:
    """The process with everything it publishes."""

    def __init__(self, rig, process) -> None:
        self._rig, self.process = rig, process
        self.base = rig.collect(Image, "/base_camera/image_raw")
        self.wrist = rig.collect(CompressedImage, "/wrist_camera/image_raw/compressed")
        self.joints = rig.collect(JointState, "/joint_states")
        self._reports = rig.collect(DiagnosticArray, "/diagnostics")
        self._commands = rig.node.create_publisher(JointTrajectory, COMMANDS, 10)
        self.base.wait_for()
        self.joints.wait_for()
        wait_until(self._commands.get_subscription_count, 10.0, "the robot listens to commands")

    def set(self, name: str, value) -> None:
        """Set a parameter that the robot must accept."""
        result = self.try_to_set(name, value)
        assert result.successful, result.reason

    def try_to_set(self, name: str, value):
        kinds = {bool: "bool", int: "integer", float: "double", str: "string"}
        kind = kinds[type(value)]
        content = ParameterValue(
            type=getattr(ParameterType, f"PARAMETER_{kind.upper()}"), **{f"{kind}_value": value}
        )
        answer = self._rig.call(
            SetParameters, "/demo_robot/set_parameters", parameters=[Parameter(name=name, value=content)]
        )
        return answer.results[0]

    def command(self, *positions: np.ndarray, seconds: float = 1.0, names: list[str] = JOINTS) -> None:
        """One trajectory from now on, its points evenly spread over `seconds`."""
        message = JointTrajectory(joint_names=names)
        message.header.stamp = self._rig.node.get_clock().now().to_msg()
        for index, point in enumerate(positions, 1):
            due = round(1e9 * seconds * index / len(positions))
            start = Duration(sec=due // 10**9, nanosec=due % 10**9)
            message.points.append(
                JointTrajectoryPoint(positions=[float(value) for value in point], time_from_start=start)
            )
        self._commands.publish(message)

    def report(self, key: str, value: str) -> None:
        """Wait until the robot's diagnostics say so."""

        def says(message: DiagnosticArray) -> bool:
            return any(
                item.key == key and item.value == value for status in message.status for item in status.values
            )

        self._reports.wait_for(says, timeout=10.0)


@pytest.fixture
def robot(rig, demo_robot) -> Robot:
    return Robot(rig, demo_robot())


def last_received(stream) -> float:
    """When the newest message came [s, monotonic]: no message has come since then."""
    low, high = 0.0, time.monotonic()
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if stream.since(middle) else (low, middle)
    return high


def measured_rate(messages) -> float:
    """Median of the header stamps' intervals: neither a late receiver nor a busy machine matters."""
    stamps = [stamp_to_ns(message.header.stamp) for message in messages]
    return 1e9 / float(np.median(np.diff(stamps)))


def test_streams_have_their_rates_and_content(robot) -> None:
    wait_until(lambda: len(robot.joints.messages) > 150 and len(robot.wrist.messages) > 40, 30.0, "messages")
    assert measured_rate(robot.base.messages) == pytest.approx(30.0, rel=0.1)
    assert measured_rate(robot.wrist.messages) == pytest.approx(30.0, rel=0.1)
    assert measured_rate(robot.joints.messages) == pytest.approx(100.0, rel=0.1)

    image = robot.base.messages[-1]
    assert (image.width, image.height, image.encoding, image.step) == (96, 96, "rgb8", 288)
    pixels = np.frombuffer(image.data, np.uint8).reshape(96, 96, 3)
    assert pixels.std() > 20
    decoded = cv2.imdecode(np.frombuffer(robot.wrist.messages[-1].data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (96, 96, 3)
    assert decoded.std() > 20
    state = robot.joints.messages[-1]
    assert list(state.name) == JOINTS
    np.testing.assert_allclose(state.position, HOME, atol=0.01)
    assert len(state.velocity) == len(state.effort) == len(JOINTS)

    now = time.time_ns()
    for message in (robot.base.messages[-1], state):
        assert abs(now - stamp_to_ns(message.header.stamp)) < 5e9
    robot.report("commands_received", "0")


def test_follows_a_trajectory_and_holds_its_end(robot) -> None:
    target = HOME + np.array([0.4, 0.2, -0.2, 0.3, -0.3, 0.4, 0.01])
    middle = (HOME + target) / 2
    before = np.frombuffer(robot.base.messages[-1].data, np.uint8).astype(int)
    robot.command(middle, target, seconds=1.0)
    robot.joints.wait_for(lambda state: np.allclose(state.position, target, atol=0.01), timeout=10.0)
    reached = time.monotonic()
    wait_until(lambda: len(robot.joints.since(reached)) > 50, 10.0, "joint states after the end")
    np.testing.assert_allclose(robot.joints.messages[-1].position, target, atol=0.01)
    robot.base.wait_for(
        lambda image: np.mean(np.abs(np.frombuffer(image.data, np.uint8).astype(int) - before) > 25) > 0.01,
        since=reached,
    )
    robot.report("commands_received", "1")
    robot.report("limit_violations", "0")


def test_commands_beyond_limits_are_clamped_and_counted(robot) -> None:
    far = HOME.copy()
    far[5] = 5.0
    robot.command(far, seconds=2.0)
    robot.report("limit_violations", "1")
    robot.joints.wait_for(lambda state: state.position[5] > 3.05, timeout=10.0)
    reached = time.monotonic()
    wait_until(lambda: len(robot.joints.since(reached)) > 100, 10.0, "joint states at the limit")
    assert max(state.position[5] for state in robot.joints.messages) < 3.15
    robot.process.wait_for_line("wrist_3 commanded to 5.0000")


def test_commands_a_controller_would_refuse_move_nothing(robot) -> None:
    away = HOME + 0.3
    robot.command(away, names=[*JOINTS[:-1], "thumb"])
    robot.command(np.full(7, np.nan))
    robot.command()
    robot.command(away, seconds=-1.0)  # ended in the past
    robot.report("commands_rejected", "4")
    np.testing.assert_allclose(robot.joints.messages[-1].position, HOME, atol=0.01)
    robot.process.wait_for_line("thumb")


def test_streams_can_be_silenced_and_come_back(robot) -> None:
    streams = {"base_camera": robot.base, "wrist_camera": robot.wrist, "joint_states": robot.joints}
    for name, stream in streams.items():
        others = [other for other in streams.values() if other is not stream]
        robot.set(f"{name}.drop", 1.0)

        def silent(stream=stream, others=others) -> bool:
            """Nothing of this stream since the others have sent as many as in 0.3 s."""
            return all(len(other.since(last_received(stream))) > 9 for other in others)

        wait_until(silent, 10.0, f"{name} is silent while the others go on")
        robot.set(f"{name}.drop", 0.0)
        stream.wait_for(since=time.monotonic(), timeout=5.0)


def test_stamps_can_be_frozen_shifted_and_late(robot) -> None:
    robot.set("base_camera.freeze_stamp", True)
    frozen = robot.base.wait_for(since=time.monotonic() + 0.2)
    begin = time.monotonic()
    wait_until(lambda: len(robot.base.since(begin)) > 5, 10.0, "images with a frozen stamp")
    stamps = {stamp_to_ns(message.header.stamp) for message in robot.base.since(begin)}
    assert stamps == {stamp_to_ns(frozen.header.stamp)}
    robot.set("base_camera.freeze_stamp", False)

    robot.set("wrist_camera.stamp_offset", -30.0)
    robot.wrist.wait_for(
        lambda m: -31e9 < stamp_to_ns(m.header.stamp) - time.time_ns() < -29e9, since=time.monotonic()
    )
    robot.set("wrist_camera.stamp_offset", 0.0)

    robot.set("joint_states.delay", 0.5)
    late = robot.joints.wait_for(since=time.monotonic() + 0.6)
    age = time.time_ns() - stamp_to_ns(late.header.stamp)
    assert age > 0.49e9


def test_images_can_change_size_and_encoding_and_be_cut(robot) -> None:
    robot.set("base_camera.width", 128)
    image = robot.base.wait_for(lambda m: m.width == 128, timeout=10.0)
    assert (image.height, image.step, len(image.data)) == (96, 384, 96 * 384)
    for encoding, channels in (("bgr8", 3), ("mono8", 1), ("mono16", 2)):
        robot.set("base_camera.encoding", encoding)
        image = robot.base.wait_for(lambda m: m.encoding == encoding, timeout=10.0)  # noqa: B023
        assert len(image.data) == 96 * 128 * channels
    robot.set("wrist_camera.encoding", "png")
    image = robot.wrist.wait_for(lambda m: m.format == "png", timeout=10.0)
    assert bytes(image.data[:4]) == b"\x89PNG"
    robot.set("wrist_camera.encoding", "jpeg")
    robot.set("wrist_camera.truncate", 0.5)
    cut = time.monotonic()
    robot.wrist.wait_for(lambda m: m.format == "jpeg" and bytes(m.data[-2:]) != b"\xff\xd9", since=cut)


def test_joint_states_can_lack_rename_reorder_and_spoil_joints(robot) -> None:
    robot.set("joint_states.missing", "elbow")
    state = robot.joints.wait_for(lambda m: len(m.name) == 6)
    assert "elbow" not in state.name
    assert len(state.position) == 6
    robot.set("joint_states.missing", "")
    robot.set("joint_states.rename", "elbow:knee")
    robot.joints.wait_for(lambda m: list(m.name)[2] == "knee")
    robot.set("joint_states.rename", "")
    robot.set("joint_states.reverse", True)
    state = robot.joints.wait_for(lambda m: list(m.name) == JOINTS[::-1])
    np.testing.assert_allclose(state.position[::-1], HOME, atol=0.01)
    robot.set("joint_states.reverse", False)
    robot.set("joint_states.nan", "wrist_1")
    robot.joints.wait_for(lambda m: list(m.name) == JOINTS and np.isnan(m.position[3]))
    robot.set("joint_states.nan", "")
    robot.set("joint_states.inf", "wrist_1")
    robot.joints.wait_for(lambda m: np.isinf(m.position[3]))
    robot.set("joint_states.inf", "")
    robot.joints.wait_for(lambda m: np.isfinite(m.position).all(), since=time.monotonic())


def test_wrong_options_are_refused_with_the_reason(robot) -> None:
    for name, value, words in (
        ("base_camera.drop", 2.0, "base_camera.drop must lie in 0..1, got 2.0"),
        ("base_camera.encoding", "yuv", "base_camera.encoding must be one of rgb8"),
        ("wrist_camera.encoding", "rgb8", "wrist_camera.encoding must be one of jpeg, png"),
        ("wrist_camera.width", 5000, "wrist_camera.size must lie in"),
        ("joint_states.nan", "knee", "names joint 'knee'"),
        ("camera_rate", 10.0, "read at start only"),
    ):
        result = robot.try_to_set(name, value)
        assert not result.successful, name
        assert words in result.reason


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_at_once_and_cleanly(robot, number) -> None:
    begin = time.monotonic()
    assert robot.process.end(number, timeout=5.0) == 0, robot.process.output
    assert time.monotonic() - begin < 2.0
    assert "Traceback" not in robot.process.output


def test_a_wrong_option_at_start_ends_it_with_the_reason(rig, demo_robot) -> None:
    process = demo_robot({"base_camera.encoding": "yuv"})
    assert process.wait() == 2, process.output
    assert "base_camera.encoding must be one of rgb8" in process.output
    assert "Traceback" not in process.output
