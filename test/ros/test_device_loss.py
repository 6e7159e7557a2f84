"""A GPU that is lost to the node: held for good, and a process that ends where it may be started again.

The loss is simulated by a policy that says what the runtime says then.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from pipeline_driver import Driver
from ros_rig import wait_until
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.bringup import PACKAGE
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.nodes import safety
from flashrt_ros.srv import GetActionChunk, SetPrompt
from flashrt_runtime.errors import DeviceLostError

STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_node.py"))]
LOST, FAULT = int(Reason.DEVICE_LOST), PolicyStatus.STATE_FAULT


def lose(driver: Driver) -> None:
    def trap(prompt: str) -> None:
        raise DeviceLostError("the GPU is lost: start the process again")

    driver.policy.behave = trap


def test_it_latches_at_once_and_nothing_resets_it(driver: Driver) -> None:
    driver.drive()
    lose(driver)
    wait_until(lambda: driver.pipeline.fault, 10.0, "the fault")
    tried = len(driver.policy.prompts)
    assert driver.pipeline.fault.reason is Reason.DEVICE_LOST
    refusal = safety._reset_fault(driver.pipeline, None)
    assert "cannot help" in refusal
    assert "start the process again" in refusal
    assert "nothing was changed" in safety._resume(driver.pipeline)
    driver.pipeline.reset_fault()
    wait_until(lambda: driver.commands[-1][0].values is None, 10.0, "silence after the hold deadline")
    assert driver.commands[-1][0].reason is Reason.DEVICE_LOST
    assert CommandKind.HOLDING in {output.kind for output, _ in driver.commands}
    assert len(driver.policy.prompts) == tried, "the policy is not asked again"


def test_a_node_ends_once_the_arm_stands_and_that_was_reported(driver: Driver) -> None:
    ending = safety.Ending()
    driver.drive()
    assert not ending.due(driver.pipeline)
    lose(driver)
    wait_until(lambda: driver.pipeline.fault, 10.0, "the fault")
    begin = time.monotonic()
    assert not ending.due(driver.pipeline)
    wait_until(lambda: ending.due(driver.pipeline), 10.0, "the end")
    assert time.monotonic() - begin >= safety.LAST_REPORTS
    assert driver.commands[-1][0].kind is not CommandKind.RUNNING


@pytest.mark.parametrize("how", ["held", "deactivated"])
def test_a_node_that_was_held_or_deactivated_does_not_end(
    driver: Driver, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is started in its place would drive the robot."""
    monkeypatch.setattr(safety, "LAST_REPORTS", 0.0)
    ending = safety.Ending()
    driver.drive()
    lose(driver)
    wait_until(lambda: driver.pipeline.fault, 10.0, "the fault")
    wait_until(lambda: not driver.pipeline.commander.moving, 5.0, "a hold")
    assert ending.due(driver.pipeline)
    driver.pipeline.hold() if how == "held" else driver.pipeline.stop()
    assert not ending.due(driver.pipeline)


@pytest.mark.parametrize("first", ["lost", "other"])
def test_nor_one_with_another_fault_that_waits_for_somebody(
    driver: Driver, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said by who hits it: an inference that was under way, or ~/get_action_chunk."""
    monkeypatch.setattr(safety, "LAST_REPORTS", 0.0)
    ending = safety.Ending()
    driver.drive()
    other = Problem(Reason.CONTROL_ERROR, "", "control: ValueError: the elbow")
    problems = [other, Problem(Reason.DEVICE_LOST, "", "the GPU is lost: start the process again")]
    for problem in problems if first == "other" else reversed(problems):
        driver.pipeline.raise_fault(problem)
    wait_until(lambda: not driver.pipeline.commander.moving, 5.0, "a hold")
    assert driver.pipeline.fault.reason is Reason.DEVICE_LOST
    assert not ending.due(driver.pipeline)
    refusal = safety._reset_fault(driver.pipeline, None)
    assert "start the process again" in refusal
    assert "see to CONTROL_ERROR (control: ValueError: the elbow)" in refusal


def call(rig, name: str):
    return rig.call(Trigger, f"/policy_node/{name}")


def test_a_node_that_starts_itself_holds_says_why_and_ends(rig, demo_robot, policy_node) -> None:
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory", 200)
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    node = policy_node(command=STAND_IN)
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=60.0)
    begin = time.monotonic()
    assert rig.call(SetPrompt, "/policy_node/set_prompt", prompt="lose the GPU", reset=False).success
    report = statuses.wait_for(lambda message: message.state == FAULT, since=begin)
    assert report.reason == LOST
    assert "unspecified launch failure" in report.message
    assert "start it again" in report.message
    answer = call(rig, "reset_fault")
    assert not answer.success
    assert "start it again" in answer.message
    assert node.wait(timeout=10.0) == os.EX_TEMPFAIL, node.output
    assert time.monotonic() - begin >= safety.LAST_REPORTS
    assert f"ends with status {os.EX_TEMPFAIL}: the GPU is lost" in node.output
    assert "Traceback" not in node.output
    last = np.array([point.positions for point in commands.messages[-1].points])
    assert (last == last[0]).all(), "the last word is a hold"


@pytest.mark.slow
def test_a_node_in_another_fault_stays_when_a_request_finds_the_gpu_lost(
    rig, demo_robot, policy_node
) -> None:
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    node = policy_node(command=STAND_IN)
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=60.0)
    other = rig.node.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 10)
    statuses.wait_for(lambda message: message.reason == Reason.COMMAND_CONFLICT, timeout=10.0)
    rig.node.destroy_publisher(other)
    state = rig.collect(JointState, "/joint_states").wait_for()
    images = [Image(height=4, width=4, encoding="rgb8", step=12, data=bytes(48)) for _ in range(2)]
    answer = rig.call(
        GetActionChunk, "/policy_node/get_action_chunk", timeout=30.0, images=images,
        image_names=["base_0_rgb", "left_wrist_0_rgb"], robot_state=state, prompt="lose the GPU",
    )
    assert answer.status == GetActionChunk.Response.CODE_INFERENCE, answer.message
    later = time.monotonic() + 2 * safety.LAST_REPORTS
    report = statuses.wait_for(lambda message: message.reason == LOST, since=later)
    assert "start it again, but first somebody is to see to COMMAND_CONFLICT (another node" in report.message
    assert node.running
    assert node.end(signal.SIGINT) == 0, node.output


def test_a_node_that_loses_it_in_loading_ends_with_the_same_status(policy_node) -> None:
    node = policy_node(command=STAND_IN, prompt="load without the GPU")
    assert node.wait(timeout=60.0) == os.EX_TEMPFAIL, node.output
    assert "cannot configure: the GPU is lost to this process" in node.output


CANNOT_BE_TAKEN_DOWN = """
import sys
from rclpy.lifecycle import LifecycleNode
from flashrt_ros.nodes.running import run

class Node(LifecycleNode):
    exit_status = int(sys.argv[1])
    def destroy_node(self):
        super().destroy_node()
        raise RuntimeError("not taken down")

print("started")
sys.exit(run(lambda stopping: Node("broken")))
"""


@pytest.mark.slow
def test_a_node_that_cannot_be_taken_down_ends_with_its_status_all_the_same(rig) -> None:
    node = rig.start([sys.executable, "-c", CANNOT_BE_TAKEN_DOWN, str(os.EX_TEMPFAIL)])
    assert node.wait(timeout=20.0) == os.EX_TEMPFAIL, node.output
    assert "RuntimeError: not taken down" in node.output
    other = rig.start([sys.executable, "-c", CANNOT_BE_TAKEN_DOWN, "0"])
    other.wait_for_line("started", timeout=20.0)
    time.sleep(1.0)
    assert other.end(signal.SIGINT) == 1, other.output


@pytest.mark.slow
def test_a_node_that_is_managed_stays_and_refuses(rig, demo_robot, policy_node) -> None:
    """What manages its life cycle is to decide: state and diagnostics say why, until the process is ended."""
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    node = policy_node(command=STAND_IN, autostart=False)

    def change(transition: int) -> bool:
        request = Transition(id=transition)
        return rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=request).success

    assert change(Transition.TRANSITION_CONFIGURE)
    assert change(Transition.TRANSITION_ACTIVATE)
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING)
    assert rig.call(SetPrompt, "/policy_node/set_prompt", prompt="lose the GPU", reset=False).success
    statuses.wait_for(lambda message: message.state == FAULT)
    later = time.monotonic() + 2 * safety.LAST_REPORTS
    statuses.wait_for(lambda message: (message.state, message.reason) == (FAULT, LOST), since=later)
    assert node.running
    assert change(Transition.TRANSITION_DEACTIVATE)
    assert not change(Transition.TRANSITION_ACTIVATE)
    node.wait_for_line("cannot activate: the GPU is lost", timeout=5.0)
    assert not call(rig, "reset_fault").success
    assert node.end(signal.SIGINT) == 0, node.output


@pytest.mark.slow
def test_the_node_that_is_respawned_drives(rig, demo_robot, checkpoint: Path, tmp_path: Path) -> None:
    """The runner as a user starts it, with the stand-in's node in the place of the package's own."""
    node = tmp_path / "lib" / PACKAGE / "policy_node"
    node.parent.mkdir(parents=True)
    node.write_text(f'#!/bin/sh\nexec {STAND_IN[0]} {STAND_IN[1]} "$@"\n')
    node.chmod(0o755)
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    command = [sys.executable, "-P", "-m", "flashrt_ros.runner", "pi05", f"checkpoint:={checkpoint}"]
    process = rig.start(
        [*command, "robot:=demo_arm", "prompt:=wave", "respawn:=true"],
        {"AMENT_PREFIX_PATH": f"{tmp_path}:{rig.env['AMENT_PREFIX_PATH']}"},
    )
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=60.0)
    assert rig.call(SetPrompt, "/policy_node/set_prompt", prompt="lose the GPU", reset=False).success
    process.wait_for_line(f"ended with status {os.EX_TEMPFAIL}: in 2 s it is started again", timeout=10.0)
    ended = time.monotonic()
    statuses.wait_for(lambda m: m.state == PolicyStatus.STATE_RUNNING, timeout=60.0, since=ended)
    assert process.end(timeout=30.0) == 0, process.output
