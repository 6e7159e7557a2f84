"""Streams that do not come, or not as the contract says: the status names them, and nothing is commanded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from ros_rig import wait_until
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import PolicyStatus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def commands(rig):
    return rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")


@pytest.fixture
def statuses(rig):
    return rig.collect(PolicyStatus, "/policy_node/status")


@pytest.fixture
def set_robot(rig):
    """set_robot("base_camera.drop", 1.0) changes a parameter of the running robot."""

    def change(name: str, value: float) -> None:
        setting = Parameter(
            name=name, value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)
        )
        results = rig.call(SetParameters, "/demo_robot/set_parameters", parameters=[setting]).results
        assert results[0].successful, results[0].reason

    return change


@pytest.mark.parametrize("camera", ["base_camera", "wrist_camera"])
def test_a_camera_that_never_publishes(rig, demo_robot, policy_node, commands, statuses, camera: str) -> None:
    reports = rig.collect(DiagnosticArray, "/diagnostics")
    demo_robot({f"{camera}.drop": 1.0})
    policy_node()
    others = [name for name in ("base_camera", "wrist_camera", "joint_states") if name != camera]

    def blames_it(message: PolicyStatus) -> bool:
        ages = dict(zip(message.stream_names, message.stream_ages, strict=True))
        return (
            message.reason == Reason.NO_MESSAGE
            and message.message.startswith(f"{camera}: ")
            and all(ages[name] >= 0.0 for name in others)
        )

    report = statuses.wait_for(blames_it, timeout=60.0)
    assert report.state == PolicyStatus.STATE_WAITING
    ages = dict(zip(report.stream_names, report.stream_ages, strict=True))
    assert ages[camera] == -1.0
    assert commands.messages == []
    warning = reports.wait_for(lambda report: camera in report.status[0].message).status[0]
    assert warning.level == DiagnosticStatus.WARN


def test_a_joint_that_never_comes(demo_robot, policy_node, commands, statuses, tmp_path: Path) -> None:
    contract = tmp_path / "robot.yaml"
    shipped = (ROOT / "config/robots/demo_arm.yaml").read_text()
    # The policy's name of the joint stays, or the checkpoint would not fit.
    entry = "{name: wrist_3,       unit: rad,"
    assert entry in shipped
    contract.write_text(
        shipped.replace(entry, "{name: wrist_4, policy_name: wrist_3, unit: rad,").replace(
            "wrist_3, gripper]", "wrist_4, gripper]"
        )
    )
    demo_robot()
    policy_node(robot=str(contract))
    report = statuses.wait_for(lambda message: message.reason == Reason.JOINT_MISSING, timeout=60.0)
    assert report.state == PolicyStatus.STATE_WAITING
    assert report.message.startswith("joint_states: joint wrist_4 is not in the message")
    wait_until(lambda: len(statuses.messages) > 4, 20.0, "status reports")
    assert commands.messages == []


def test_a_camera_that_stops_holds_the_arm_and_resumes(
    demo_robot, policy_node, commands, statuses, set_robot
) -> None:
    demo_robot()
    policy_node()
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=60.0)
    set_robot("wrist_camera.drop", 1.0)
    stopped = time.monotonic()
    report = statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_STOPPED, since=stopped)
    assert report.reason == Reason.STALE_RECEIPT
    assert report.message.startswith("wrist_camera: ")
    silent_from = time.monotonic()
    wait_until(lambda: len(statuses.since(silent_from)) >= 2, 10.0, "status reports")
    assert commands.since(silent_from) == []
    set_robot("wrist_camera.drop", 0.0)
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, since=silent_from)
    commands.wait_for(since=silent_from)


def test_without_a_prompt_nothing_is_commanded(demo_robot, policy_node, commands, statuses) -> None:
    demo_robot()
    policy_node(prompt="")
    report = statuses.wait_for(lambda message: message.reason == Reason.PROMPT_INVALID, timeout=60.0)
    assert report.state == PolicyStatus.STATE_WAITING
    assert "~/set_prompt" in report.message
    assert commands.messages == []
