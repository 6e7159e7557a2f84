"""~/set_prompt: one test for each code. Those of ~/calibrate are in test_calibration.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from flashrt_ros.msg import PolicyStatus
from flashrt_ros.srv import SetPrompt

HERE = Path(__file__).resolve().parent


@pytest.fixture
def inactive(policy_node, rig):
    """A node that has its model but is not active."""
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    def start(**parameters):
        node = policy_node(autostart=False, **parameters)
        configure = Transition(id=Transition.TRANSITION_CONFIGURE)
        assert rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=configure).success
        return node

    return start


@pytest.fixture
def set_prompt(rig):
    def call(prompt: str, reset: bool = False):
        return rig.call(SetPrompt, "/policy_node/set_prompt", timeout=60.0, prompt=prompt, reset=reset)

    return call


def check(answer, code: int, *words: str) -> None:
    assert answer.code == code, answer.message
    assert answer.success == (code == 0)
    assert all(word in answer.message for word in words), answer.message
    assert bool(answer.message) == (code != 0)


def test_set_prompt_ok_empty_and_too_long(rig, inactive, set_prompt) -> None:
    """Refused prompts leave the prompt in force; three codes in one node, which takes seconds to start."""
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    codes = SetPrompt.Response
    inactive(prompt="wave")
    check(set_prompt(""), codes.CODE_EMPTY_PROMPT, "empty")
    check(set_prompt(" \t\n"), codes.CODE_EMPTY_PROMPT)
    check(set_prompt("pick up the block and " * 100), codes.CODE_PROMPT_TOO_LONG, "token")
    refused = time.monotonic()
    assert statuses.wait_for(timeout=5.0, since=refused).prompt == "wave"
    check(set_prompt("  open the gripper "), codes.CODE_OK)
    statuses.wait_for(lambda message: message.prompt == "open the gripper", timeout=5.0)


def test_set_prompt_reset_raises_the_generation(rig, inactive, set_prompt) -> None:
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    inactive(prompt="wave")
    before = statuses.wait_for(lambda message: message.prompt == "wave").generation
    check(set_prompt("open the gripper", reset=True), SetPrompt.Response.CODE_OK)
    after = statuses.wait_for(lambda message: message.prompt == "open the gripper").generation
    assert after == before + 1


def test_set_prompt_before_configure(policy_node, set_prompt) -> None:
    policy_node(autostart=False)
    check(set_prompt("wave"), SetPrompt.Response.CODE_NOT_CONFIGURED, "configure the node first")


def test_set_prompt_when_the_runtime_fails(inactive, set_prompt) -> None:
    """The real runtime gives no way to make set_prompt fail unexpectedly: a stand-in policy does it here."""
    inactive(command=[sys.executable, str(HERE / "stand_in_node.py")])
    answer = set_prompt("break down")
    check(answer, SetPrompt.Response.CODE_INTERNAL, "RuntimeError", "broken on purpose")
    check(set_prompt("wave"), SetPrompt.Response.CODE_OK)
