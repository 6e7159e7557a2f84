"""The life cycle as a lifecycle manager drives it, and what the node commands in each state."""

from __future__ import annotations

import time

import numpy as np
import pytest
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from ros_rig import wait_until
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.msg import ActionChunk, PolicyStatus


@pytest.fixture
def change(rig):
    """change(Transition.…) asks for a transition and returns whether it succeeded."""

    def ask(transition: int) -> bool:
        request = Transition(id=transition)
        return rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=request).success

    return ask


@pytest.fixture
def state(rig):
    return lambda: rig.call(GetState, "/policy_node/get_state").current_state.id


def test_configure_activate_deactivate_cleanup_and_again(rig, demo_robot, policy_node, change, state) -> None:
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    node = policy_node(autostart=False)
    generations = []
    for _ in range(2):
        statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_UNCONFIGURED)
        assert change(Transition.TRANSITION_CONFIGURE)
        assert state() == State.PRIMARY_STATE_INACTIVE
        begin = time.monotonic()
        statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_INACTIVE, since=begin)
        assert commands.since(begin) == []

        for _ in range(2):
            begin = time.monotonic()
            assert change(Transition.TRANSITION_ACTIVATE)
            commands.wait_for(since=begin)
            generations.append(chunks.wait_for(since=begin).generation)
            assert change(Transition.TRANSITION_DEACTIVATE)
            check_hold_and_silence(rig, commands, statuses)

        assert change(Transition.TRANSITION_CLEANUP)
        assert state() == State.PRIMARY_STATE_UNCONFIGURED
        statuses.wait_for(lambda m: m.state == PolicyStatus.STATE_UNCONFIGURED, since=time.monotonic())
        assert rig.node.count_publishers("/arm_controller/joint_trajectory") == 0
    assert generations[0] < generations[1]
    assert generations[2] < generations[3]
    assert change(Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
    assert node.end() == 0, node.output
    assert "Traceback" not in node.output


def check_hold_and_silence(rig, commands, statuses) -> None:
    """The last command keeps the arm where the one before had it, and none follows."""
    inactive = time.monotonic()
    # Two reports of "inactive" are half a second apart: twenty-five commands that did not come.
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_INACTIVE, since=inactive)
    silent_from = time.monotonic()
    wait_until(lambda: len(statuses.since(silent_from)) >= 2, 10.0, "two more status reports")
    assert commands.since(silent_from) == []
    before, last = commands.messages[-2:]
    held = np.array([point.positions for point in last.points])
    assert (held == np.array(before.points[0].positions)).all()
    assert not np.any([point.velocities for point in last.points[1:]])


def test_activate_before_configure_is_refused(policy_node, change, state) -> None:
    policy_node(autostart=False)
    assert not change(Transition.TRANSITION_ACTIVATE)
    assert state() == State.PRIMARY_STATE_UNCONFIGURED


def test_a_failed_configure_can_be_repeated(rig, policy_node, change, state, tmp_path) -> None:
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    node = policy_node(autostart=False, checkpoint=str(tmp_path / "nothing"))
    for _ in range(2):
        assert not change(Transition.TRANSITION_CONFIGURE)
        assert state() == State.PRIMARY_STATE_UNCONFIGURED
    report = statuses.wait_for(lambda message: message.reason != 0)
    assert report.state == PolicyStatus.STATE_UNCONFIGURED
    assert str(tmp_path / "nothing") in report.message
    assert node.end() == 0, node.output
