"""What the node's messages hold; built and read in this process, without any transport."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.clock import Clock
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.commander import Output
from flashrt_ros.core.contract import Qos, Stamp, known_contracts, load_contract
from flashrt_ros.core.problem import NONE, Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.core.trajectory import TrajectoryPoints
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.nodes import status
from flashrt_ros.nodes.exotic_images import cv_bridge_decoder
from flashrt_ros.nodes.outputs import Command, chunk_message, time_message, trajectory_message
from flashrt_ros.nodes.pipeline import Pipeline
from flashrt_ros.nodes.streams import qos_profile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def contract():
    return load_contract("demo_arm")


@pytest.fixture
def pipeline(contract):
    """A real pipeline, with no policy and nobody listening."""
    made = Pipeline(
        contract,
        Clock(),
        publish_command=lambda *_: None,
        publish_chunk=lambda _: None,
        on_problem=lambda _: None,
    )
    yield made
    made.close()


def test_time_message_keeps_every_nanosecond() -> None:
    assert time_message(1_234_567_890_987_654_321) == Time(sec=1_234_567_890, nanosec=987_654_321)


def test_trajectory_message_survives_the_wire(contract) -> None:
    rng = np.random.default_rng(0)
    offsets = np.array([0, 20_000_000, 1_040_000_000])
    points = TrajectoryPoints(offsets, rng.normal(size=(3, 7)), rng.normal(size=(3, 7)))
    sent = trajectory_message(points, contract.action.joints, 5_000_000_007)
    came = deserialize_message(serialize_message(sent), JointTrajectory)
    assert (came.header.stamp.sec, came.header.stamp.nanosec) == (5, 7)
    assert tuple(came.joint_names) == contract.action.joints
    times = [(point.time_from_start.sec, point.time_from_start.nanosec) for point in came.points]
    assert times == [(0, 0), (0, 20_000_000), (1, 40_000_000)]
    assert np.array_equal([point.positions for point in came.points], points.positions)
    assert np.array_equal([point.velocities for point in came.points], points.velocities)


def commanded(contract) -> tuple[Output, np.ndarray]:
    """A tick's output that commands 0, 1, 2, … for the action's joints."""
    values = np.arange(float(contract.dof))
    points = TrajectoryPoints(
        np.array([0, 20_000_000]), np.stack([values, values + 0.5]), np.zeros((2, contract.dof))
    )
    has_points = contract.trajectory_lookahead > 0
    output = Output(CommandKind.RUNNING, Reason.OK, "", values, points if has_points else None, (), 1, 0, 0)
    return output, values


@pytest.mark.parametrize("robot", known_contracts())
def test_each_controller_gets_its_own_joints_by_the_robots_names(robot: str) -> None:
    contract = load_contract(robot)
    output, values = commanded(contract)
    by_name = dict(zip(contract.action.joints, values, strict=True))
    reached = []
    for spec in contract.outputs:
        message = Command(spec, contract).message(output, 3_000_000_005)
        joints = spec.joints or contract.action.joints
        wanted = [by_name[name] for name in joints]
        reached += joints
        if isinstance(message, Float64MultiArray):
            assert list(message.data) == wanted
            continue
        assert message.joint_names == [contract.joints[name].in_messages for name in joints]
        assert list(message.points[0].positions) == wanted
        assert list(message.points[1].positions) == [value + 0.5 for value in wanted]
        assert len(message.points[0].velocities) == len(joints)
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 5)
        at_once = Command(replace(spec, stamp=Stamp.ZERO), contract).message(output, 3_000_000_005)
        assert (at_once.header.stamp.sec, at_once.header.stamp.nanosec) == (0, 0)
    assert sorted(reached) == sorted(contract.action.joints)
    silence = replace(output, values=None, trajectory=None)
    assert [Command(spec, contract).message(silence, 0) for spec in contract.outputs] == [None] * len(
        contract.outputs
    )


def test_both_arms_of_aloha_have_the_same_names_on_their_own_topics() -> None:
    contract = load_contract("aloha")
    output, _ = commanded(contract)
    left, right = (Command(spec, contract).message(output, 0) for spec in contract.outputs)
    assert left.joint_names == right.joint_names
    assert left.points[0].positions[0] == 0.0
    assert right.points[0].positions[0] == 7.0
    assert contract.shares_message_names
    assert not load_contract("ur5e").shares_message_names


def test_chunk_message_survives_the_wire(contract) -> None:
    actions = np.random.default_rng(1).normal(size=(50, 7))
    sent = chunk_message(
        actions,
        contract,
        due=3_000_000_001,
        prompt="wave",
        sequence=9,
        generation=2,
        stamps={"base_camera": 10, "joint_states": 20},
        inference_time=0.04,
    )
    came = deserialize_message(serialize_message(sent), ActionChunk)
    assert np.array_equal(np.reshape(came.data, (came.horizon, came.dof)), actions)
    assert (came.sequence, came.generation, came.prompt, came.step_period) == (9, 2, "wave", 0.02)
    assert came.observation_streams == ["base_camera", "joint_states"]
    assert [stamp.nanosec for stamp in came.observation_stamps] == [10, 20]
    assert came.representation == ActionChunk.REPRESENTATION_ABSOLUTE


def test_actions_that_are_a_view_of_another_array(contract) -> None:
    wide = np.arange(100.0).reshape(10, 10)
    message = chunk_message(
        wide[::2, :7], contract, due=0, prompt="", sequence=1, generation=0, stamps={}, inference_time=0.0
    )
    assert np.array_equal(np.reshape(message.data, (5, 7)), wide[::2, :7])


@pytest.mark.parametrize("reliability", ["reliable", "best_effort"])
def test_quality_of_service_is_the_contracts(reliability: str) -> None:
    profile = qos_profile(Qos(reliability, "transient_local", 7))
    assert profile.reliability == ReliabilityPolicy[reliability.upper()]
    assert profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert profile.depth == 7


def test_status_before_configure_and_after_a_failed_one() -> None:
    message = status.policy_status(None, Time())
    assert (message.state, message.reason, message.message) == (PolicyStatus.STATE_UNCONFIGURED, 0, "")
    problem = Problem(Reason.CHECKPOINT_INVALID, "", "no such directory")
    message = status.policy_status(None, Time(), problem)
    assert (message.reason, message.message) == (int(Reason.CHECKPOINT_INVALID), "no such directory")
    report = status.diagnostics(None, message, "node", "")
    assert report.status[0].level == DiagnosticStatus.ERROR
    assert report.status[0].message == "unconfigured: no such directory"


def test_status_of_a_configured_node_names_its_streams(pipeline, contract) -> None:
    message = status.policy_status(pipeline, Time())
    assert message.state == PolicyStatus.STATE_INACTIVE
    assert message.stream_names == list(contract.streams)
    assert list(message.stream_ages) == [-1.0] * 3
    assert math.isnan(message.inference_p50)
    assert serialize_message(message)
    report = status.diagnostics(pipeline, message, "node", "demo_arm")
    assert report.status[0].level == DiagnosticStatus.OK
    assert serialize_message(report)


def test_the_cause_is_reported_before_its_consequence(pipeline) -> None:
    missing = Problem(Reason.NO_MESSAGE, "base_camera", "no message yet")
    assert status.current_problem(pipeline, 0) == NONE
    pipeline.output = pipeline.commander.tick()
    assert status.current_problem(pipeline, 0).reason == Reason.NO_CHUNK
    pipeline.problem = missing
    assert status.current_problem(pipeline, 0) == missing


def test_without_cv_bridge_there_is_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv_bridge", None)
    assert cv_bridge_decoder() is None


@pytest.mark.parametrize(("version", "used"), [("4.1.0", True), ("1.13.0.post0", False)])
def test_cv_bridge_of_ros_2_is_used_and_that_of_pypi_is_not(
    monkeypatch: pytest.MonkeyPatch, version: str, used: bool
) -> None:
    """cv_bridge has no wheel: a stand-in module shows when the real one would be asked, and for what."""

    class CvBridge:
        def imgmsg_to_cv2(self, message, desired_encoding):
            assert desired_encoding == "rgb8"
            return np.full((message.height, message.width, 3), 7, np.uint8)

    module = ModuleType("cv_bridge")
    module.CvBridge = CvBridge
    monkeypatch.setitem(sys.modules, "cv_bridge", module)
    monkeypatch.setattr("flashrt_ros.nodes.exotic_images.metadata.version", lambda _: version)
    decode = cv_bridge_decoder()
    assert (decode is not None) == used
    if decode is not None:
        assert decode(SimpleNamespace(height=2, width=3)).tolist() == [[[7] * 3] * 3] * 2


def test_every_parameter_of_the_shipped_file_exists() -> None:
    import yaml

    from flashrt_ros.core.parameters import PARAMETERS

    shipped = yaml.safe_load((ROOT / "config/pi05.yaml").read_text())["/**/policy_node"]["ros__parameters"]
    known = {spec.name: spec for spec in PARAMETERS}
    assert set(shipped) == set(known) - {"checkpoint", "robot", "autostart"}
    assert {name: known[name].default for name in shipped} == shipped
