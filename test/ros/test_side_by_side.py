"""Two robots in one domain, each in its namespace: what concerns one does not reach the other."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np
import pytest
from ros_rig import wait_until
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.bringup import demo_nodes
from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.runner import node_command
from flashrt_ros.srv import SetPrompt

SIDES = ("left", "right")
STILL = 0.01  # summed motion of all joints that counts as standing [rad]


def travel(messages: list[Any]) -> float:
    positions = np.array([message.position for message in messages])
    return float(np.abs(np.diff(positions, axis=0)).sum()) if len(positions) > 1 else 0.0


@pytest.mark.slow
def test_two_namespaced_robots_do_not_mix(rig, checkpoint) -> None:
    joints = {side: rig.collect(JointState, f"/{side}/joint_states") for side in SIDES}
    chunks = {side: rig.collect(ActionChunk, f"/{side}/policy_node/action_chunk") for side in SIDES}
    statuses = {side: rig.collect(PolicyStatus, f"/{side}/policy_node/status") for side in SIDES}
    topics = {side: f"/{side}/arm_controller/joint_trajectory" for side in SIDES}
    commands = {side: rig.collect(JointTrajectory, topic) for side, topic in topics.items()}
    processes: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        given = {"checkpoint": str(checkpoint), "namespace": side, "prompt": f"wave to the {side}"}
        processes[side] = {
            spec.name: rig.start(node_command(spec), {**spec.env}) for spec in demo_nodes(given)
        }
    for side in SIDES:
        statuses[side].wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=120.0)
        assert rig.node.count_publishers(topics[side]) == 1
        assert rig.node.count_subscribers(topics[side]) == 2  # its robot, and this test
        assert len(rig.node.get_publishers_info_by_topic(f"/{side}/joint_states")) == 1
    names = [name for name, _ in rig.node.get_topic_names_and_types()]
    outside = [name for name in names if not name.startswith(("/left/", "/right/"))]
    assert set(outside) <= {"/diagnostics", "/parameter_events", "/rosout", "/clock"}

    begin = time.monotonic()
    for side in SIDES:
        wait_until(lambda side=side: travel(joints[side].since(begin)) > 0.3, 60.0, f"the {side} arm moves")
    answer = rig.call(SetPrompt, "/left/policy_node/set_prompt", prompt="something else", reset=False)
    assert answer.success
    chunks["left"].wait_for(lambda chunk: chunk.prompt == "something else", timeout=30.0)
    changed = time.monotonic()
    chunks["right"].wait_for(timeout=30.0, since=changed)
    assert {chunk.prompt for chunk in chunks["right"].messages} == {"wave to the right"}

    # The left node ends: its arm comes to rest, the right one goes on.
    node = processes["left"]["policy_node"]
    assert node.end(signal.SIGINT, timeout=20.0) == 0, node.output
    ended = time.monotonic() + 1.0
    wait_until(lambda: len(joints["left"].since(ended)) > 50, 30.0, "joint states of the left arm")
    assert travel(joints["left"].since(ended)) < STILL
    assert commands["left"].since(ended) == []
    wait_until(lambda: travel(joints["right"].since(ended)) > 0.3, 60.0, "the right arm goes on")
    # The left robot ends too: nothing that the right node says is about it.
    assert processes["left"]["demo_robot"].end() == 0
    gone = time.monotonic() + 1.0
    statuses["right"].wait_for(since=gone)
    wait_until(lambda: len(chunks["right"].since(gone)) >= 3, 30.0, "chunks of the right node")
    missing = {Reason.NO_MESSAGE, Reason.STALE_RECEIPT, Reason.STALE_STAMP}
    assert not [m for m in statuses["right"].since(gone) if m.reason in missing]


@pytest.mark.slow
def test_a_node_that_is_killed_is_respawned_and_drives_again(rig, checkpoint) -> None:
    """The runner as a user starts it; what kill -9 leaves to play is tested elsewhere."""
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    module = [sys.executable, "-P", "-m", "flashrt_ros.runner"]
    process = rig.start([*module, "demo", f"checkpoint:={checkpoint}", "respawn:=true"])
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=120.0)
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_node_of(int(pid), process.pid)]
    (pid,) = pids
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    process.wait_for_line("ended with status 137: in 2 s it is started again", timeout=10.0)
    statuses.wait_for(lambda m: m.state == PolicyStatus.STATE_RUNNING, timeout=120.0, since=killed + 2.0)
    assert process.end(timeout=30.0) == 0, process.output


def _is_node_of(pid: int, parent: int) -> bool:
    """Whether this is the policy node that `parent` started."""
    try:
        with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline", "rb") as line:
            return int(stat.read().rpartition(")")[2].split()[1]) == parent and b"policy_node" in line.read()
    except (OSError, IndexError, ValueError):
        return False
