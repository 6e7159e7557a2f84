"""The whole life cycle a hundred times in one process: nothing is left behind by any round."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from trajectory_msgs.msg import JointTrajectory

ROUNDS, WARM_UP = 100, 30
GROWTH = 0.02  # of resident memory, from the round after the warm-up to the last
CYCLE = (
    Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE, Transition.TRANSITION_DEACTIVATE,
    Transition.TRANSITION_CLEANUP,
)


def held(pid: int) -> tuple[int, int, int]:
    """Resident bytes, threads and file handles of a process."""
    root = Path(f"/proc/{pid}")
    pages = int((root / "statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE")
    return memory, len(list((root / "task").iterdir())), len(list((root / "fd").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_rounds_leave_nothing_behind(rig, demo_robot, policy_node) -> None:
    """With the robot there, so that every tenth round commands it."""
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    demo_robot()
    node = policy_node(autostart=False)
    before = None
    for number in range(ROUNDS):
        for transition in CYCLE:
            begin = time.monotonic()
            request = Transition(id=transition)
            answer = rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=request)
            assert answer.success, f"round {number}, transition {transition}: {node.output}"
            if transition == Transition.TRANSITION_ACTIVATE and number % 10 == 0:
                commands.wait_for(since=begin)
        commands.forget(time.monotonic())
        if number == WARM_UP - 1:
            before = held(node.pid)
    assert before is not None
    after = held(node.pid)
    growth = after[0] / before[0] - 1.0
    print(f"\n{ROUNDS} rounds: {before} -> {after}, memory {100 * growth:+.2f} %")
    assert growth <= GROWTH
    assert after[1:] == before[1:], "threads or handles were left behind"
    assert node.end() == 0, node.output
    assert "Traceback" not in node.output
