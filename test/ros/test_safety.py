"""Other publishers of commands, prompts by topic, metrics, and parameters of a running node."""

from __future__ import annotations

import math
import time

import pytest
import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from pipeline_driver import StandInPolicy
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros_rig import nodes_here, wait_until
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import ActionChunk, LatencyMetrics, PolicyStatus
from flashrt_ros.nodes.policy_node import PolicyNode

COMMANDS = "/arm_controller/joint_trajectory"
SUCCESS = TransitionCallbackReturn.SUCCESS
RUNNING = PolicyStatus.STATE_RUNNING


@pytest.fixture
def statuses(rig):
    return rig.collect(PolicyStatus, "/policy_node/status")


@pytest.fixture
def change(rig):
    def ask(transition: int) -> bool:
        request = Transition(id=transition)
        return rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=request).success

    return ask


@pytest.fixture
def set_parameter(rig):
    def ask(name: str, value):
        kinds = {bool: ("BOOL", "bool"), int: ("INTEGER", "integer"), float: ("DOUBLE", "double")}
        kind, field = kinds.get(type(value), ("STRING", "string"))
        number = getattr(ParameterType, f"PARAMETER_{kind}")
        setting = Parameter(name=name, value=ParameterValue(type=number, **{f"{field}_value": value}))
        return rig.call(SetParameters, "/policy_node/set_parameters", parameters=[setting]).results[0]

    return ask


@pytest.mark.slow
def test_another_publisher_of_commands_is_refused_noticed_or_allowed(
    rig, demo_robot, policy_node, statuses, change, set_parameter
) -> None:
    demo_robot()
    other = rig.node.create_publisher(JointTrajectory, COMMANDS, 10)
    node = policy_node(autostart=False)
    assert change(Transition.TRANSITION_CONFIGURE)
    assert rig.node.count_publishers(COMMANDS) == 1, "an inactive node has no publisher of commands"
    assert not change(Transition.TRANSITION_ACTIVATE)
    report = statuses.wait_for(lambda message: message.reason == Reason.COMMAND_CONFLICT, timeout=5.0)
    assert report.state == PolicyStatus.STATE_INACTIVE
    assert "/test_observer on /arm_controller/joint_trajectory" in report.message
    rig.node.destroy_publisher(other)
    wait_until(lambda: change(Transition.TRANSITION_ACTIVATE), 10.0, "activation without the other")
    statuses.wait_for(lambda message: message.state == RUNNING)

    other = rig.node.create_publisher(JointTrajectory, COMMANDS, 10)
    report = statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_FAULT, timeout=10.0)
    assert report.reason == Reason.COMMAND_CONFLICT
    refused = rig.call(Trigger, "/policy_node/reset_fault")
    assert not refused.success
    assert "still there" in refused.message
    assert not rig.call(Trigger, "/policy_node/resume").success
    assert set_parameter("allow_other_publishers", True).successful
    begin = time.monotonic()
    assert rig.call(Trigger, "/policy_node/reset_fault").success
    statuses.wait_for(lambda message: message.state == RUNNING, since=begin)
    assert set_parameter("allow_other_publishers", False).successful
    statuses.wait_for(lambda m: m.state == PolicyStatus.STATE_FAULT, since=time.monotonic(), timeout=10.0)

    assert change(Transition.TRANSITION_DEACTIVATE)
    assert not change(Transition.TRANSITION_ACTIVATE), "a latched fault outlives deactivation"
    rig.node.destroy_publisher(other)
    wait_until(lambda: rig.call(Trigger, "/policy_node/reset_fault").success, 10.0, "the reset")
    assert change(Transition.TRANSITION_ACTIVATE)
    assert node.end() == 0, node.output


@pytest.fixture
def make_node(rig):
    """make_node("name", parameter=…) -> a configured policy node in this process, over a stand-in policy."""
    with nodes_here(rig) as (context, made):

        def make(name: str, **parameters) -> PolicyNode:
            values = {"checkpoint": "stand-in", "robot": "demo_arm", "prompt": "wave", **parameters}
            made.append(
                PolicyNode(
                    lambda _, contract: StandInPolicy(contract.action.joints), context=context,
                    parameter_overrides=[rclpy.Parameter(key, value=value) for key, value in values.items()],
                    cli_args=["--ros-args", "-r", f"__node:={name}"],
                )
            )
            assert made[-1].trigger_configure() == SUCCESS
            return made[-1]

        yield make


def test_only_an_active_node_that_commands_is_a_publisher_of_commands(make_node) -> None:
    live = make_node("live")
    assert live.count_publishers(COMMANDS) == 0
    assert live.trigger_activate() == SUCCESS
    assert live.count_publishers(COMMANDS) == 1

    standby, dry = make_node("standby"), make_node("dry", dry_run=True)
    assert dry.trigger_activate() == SUCCESS
    assert live.count_publishers(COMMANDS) == 1
    live._guard_commands()
    assert live.report().state != PolicyStatus.STATE_FAULT, live.report().message
    assert standby.trigger_activate() == TransitionCallbackReturn.FAILURE
    assert standby.report().reason == Reason.COMMAND_CONFLICT
    assert "/live on" in standby.report().message

    assert live.trigger_deactivate() == SUCCESS
    assert live.count_publishers(COMMANDS) == 0
    assert standby.trigger_activate() == SUCCESS
    assert live.trigger_activate() == TransitionCallbackReturn.FAILURE
    assert standby.count_publishers(COMMANDS) == 1


@pytest.mark.slow
def test_the_prompt_topic_counts_even_if_it_spoke_first(rig, demo_robot, policy_node, statuses) -> None:
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    prompts = rig.node.create_publisher(String, "/policy_node/prompt", latched)
    prompts.publish(String(data="stack the blocks"))
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    demo_robot()
    node = policy_node(prompt="")
    chunks.wait_for(lambda chunk: chunk.prompt == "stack the blocks", timeout=60.0)
    prompts.publish(String(data=" "))
    node.wait_for_line("~/prompt: refused")
    prompts.publish(String(data="wave"))
    chunks.wait_for(lambda chunk: chunk.prompt == "wave")


@pytest.mark.slow
def test_metrics_and_parameters_of_a_running_node(
    rig, demo_robot, policy_node, statuses, set_parameter
) -> None:
    reports = rig.collect(LatencyMetrics, "/policy_node/metrics")
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    demo_robot()
    policy_node()
    statuses.wait_for(lambda message: message.state == RUNNING, timeout=60.0)
    filled = reports.wait_for(lambda report: report.seam_velocity.count >= 5)
    names = [name for name in filled.get_fields_and_field_types() if name not in ("header", "window")]
    assert len(names) == 10
    for name in names:
        summary = getattr(filled, name)
        assert 0 < summary.count <= filled.window, name
        assert math.isfinite(summary.p50), name
        assert summary.p50 <= summary.p95 <= summary.p99 <= summary.max, name
    assert filled.inference.p50 < filled.stamp_to_publish.p50
    assert filled.decode.p50 > 0.0

    assert set_parameter("rates.inference", 4.0).successful
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() - begin > 1.0, 2.0, "a second to go by")
    count = len(chunks.since(begin))
    assert 2 <= count <= 7, "four chunks a second"
    refused = set_parameter("timeline.open_loop_cap", 0.05)
    assert not refused.successful
    assert "longer than open_loop_cap" in refused.reason
    refused = set_parameter("checkpoint", "elsewhere")
    assert "read at configure" in refused.reason
    assert not set_parameter("limits.velocity_scale", 3.0).successful
    assert set_parameter("limits.on_violation", "reject").successful
    answer = set_parameter("limits.on_violation", "ignore")
    assert "expected one of" in answer.reason


@pytest.mark.slow
def test_services_without_a_policy(rig, policy_node) -> None:
    policy_node(autostart=False)
    for name in ("hold", "resume", "reset", "reset_fault"):
        answer = rig.call(Trigger, f"/policy_node/{name}")
        assert not answer.success
        assert "configure the node first" in answer.message
