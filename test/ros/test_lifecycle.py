"""The life cycle as a lifecycle manager drives it, and what the node commands in each state."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import GetParameters, SetParameters
from ros_rig import wait_until
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.bringup import pi05_nodes
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.runner import node_command

HERE = Path(__file__).resolve().parent


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


@pytest.mark.parametrize("autostart", [True, False])
def test_a_signal_while_the_checkpoint_loads(rig, policy_node, autostart: bool) -> None:
    """A real checkpoint that loads for seconds would take gigabytes: a stand-in policy does it here."""
    command = [sys.executable, str(HERE / "stand_in_node.py")]
    node = policy_node(command=command, prompt="load slowly", autostart=autostart)
    if not autostart:
        configure = Transition(id=Transition.TRANSITION_CONFIGURE)
        rig.request(ChangeState, "/policy_node/change_state", timeout=60.0, transition=configure)
    node.wait_for_line("loading")
    node.send_signal(signal.SIGINT)
    assert node.wait(10.0) == 0, node.output
    assert "asked to stop while the checkpoint was being loaded" in node.output


def test_parameters_come_from_the_file_and_launch_arguments_win(rig, checkpoint, tmp_path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("/**/policy_node: {ros__parameters: {seed: 5, prompt: of the file, num_steps: 3}}\n")
    arguments = {"checkpoint": str(checkpoint), "namespace": "left", "params_file": str(own)}
    spec = pi05_nodes({**arguments, "prompt": "given"})[0]
    rig.start(node_command(spec), spec.env)
    names = ["seed", "num_steps", "prompt", "checkpoint", "autostart"]
    answer = rig.call(GetParameters, "/left/policy_node/get_parameters", timeout=60.0, names=names)
    seed, steps, prompt, path, autostart = answer.values
    assert (seed.integer_value, steps.integer_value, prompt.string_value) == (5, 3, "given")
    assert (path.string_value, autostart.bool_value) == (str(checkpoint), True)


def test_parameters_change_only_while_unconfigured(rig, policy_node, change) -> None:
    policy_node(autostart=False)

    def set_seed(value: int):
        number = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
        fields = {"timeout": 60.0, "parameters": [Parameter(name="seed", value=number)]}
        return rig.call(SetParameters, "/policy_node/set_parameters", **fields).results[0]

    def seed() -> int:
        answer = rig.call(GetParameters, "/policy_node/get_parameters", names=["seed"])
        return answer.values[0].integer_value

    assert set_seed(3).successful
    assert change(Transition.TRANSITION_CONFIGURE)
    refused = set_seed(4)
    assert not refused.successful
    assert refused.reason == "seed: read at configure: deactivate and clean up first"
    assert seed() == 3
    assert change(Transition.TRANSITION_CLEANUP)
    assert set_seed(5).successful
    assert seed() == 5


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
