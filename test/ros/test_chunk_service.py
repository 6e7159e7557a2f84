"""~/get_action_chunk: over the real policy where it answers, over a stand-in where it has to be slow."""

from __future__ import annotations

import array
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from ros_rig import wait_until
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import stamp_to_ns
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.srv import GetActionChunk, SetPrompt

HERE = Path(__file__).resolve().parent
CODES = GetActionChunk.Response
HOME = [0.0, -1.2, 1.0, -0.5, 0.0, 0.0, 0.02]


@pytest.fixture
def contract():
    return load_contract("demo_arm")


@pytest.fixture
def observation(contract):
    """Fields of a request that is complete; the images are 64 x 48 and say little."""
    pixels = np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image(height=48, width=64, step=192, encoding="rgb8", data=array.array("B", pixels.tobytes()))
    state = JointState(name=list(contract.action.joints), position=array.array("d", HOME))
    return {
        "images": [image, image], "image_names": list(contract.views), "robot_state": state, "prompt": "wave",
    }


@pytest.fixture
def configured(rig, policy_node):
    """A configured node, not active."""

    def start(**parameters):
        node = policy_node(autostart=False, **parameters)
        configure = Transition(id=Transition.TRANSITION_CONFIGURE)
        assert rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=configure).success
        return node

    return start


@pytest.fixture
def ask(rig):
    return lambda **fields: rig.call(GetActionChunk, "/policy_node/get_action_chunk", **fields)


@pytest.mark.slow
def test_a_chunk_for_an_observation_and_what_is_refused(configured, ask, observation, contract) -> None:
    """All in one node, which takes seconds to start."""
    configured(prompt="")
    answer = ask(**observation)
    assert answer.status == CODES.CODE_OK
    assert tuple(answer.chunk.joint_names) == contract.action.joints
    assert answer.native_control_period == pytest.approx(0.02)
    due = [stamp_to_ns(point.time_from_start) for point in answer.chunk.points]
    assert due == [20_000_000 * index for index in range(1, 51)]
    positions = np.array([point.positions for point in answer.chunk.points])
    limits = [joint.limits for joint in contract.action_joints]
    speed = np.array([limit.velocity for limit in limits]) * (1 + 1e-6)
    # As a controller drives it: from where the robot is, at time 0, to each point when that is due.
    slopes = np.diff(positions, axis=0, prepend=[HOME]) / np.diff(due, prepend=0)[:, None] * 1e9
    assert (np.abs(slopes) <= speed).all()
    velocities = np.array([point.velocities for point in answer.chunk.points])
    assert velocities.shape == positions.shape
    assert (np.abs(velocities) <= speed).all()
    assert not velocities[-1].any()
    # HOME is not where the random policy wants to be: the first action is out of reach.
    assert "limited: " in answer.message
    assert "beyond the limit" in answer.message
    assert (positions >= [limit.lower for limit in limits]).all()
    assert (positions <= [limit.upper for limit in limits]).all()
    assert answer.inference_time > 0.0

    names = {**observation, "image_names": list(load_contract("demo_arm").streams)[:2]}
    assert ask(**names).status == CODES.CODE_OK, "streams' names do as well as views'"

    def refused(code: int, *words: str, **changes) -> None:
        answer = ask(**{**observation, **changes})
        assert answer.status == code, answer.message
        assert all(word in answer.message for word in words), answer.message
        assert not answer.chunk.points

    refused(CODES.CODE_BAD_PROMPT, "no prompt", prompt=" ")
    refused(CODES.CODE_BAD_PROMPT, "token", prompt="pick up the block and " * 100)
    refused(CODES.CODE_BAD_IMAGES, "no image for view", images=observation["images"][:1],
            image_names=[contract.views[0]])
    refused(CODES.CODE_BAD_IMAGES, "2 images, but 1", image_names=[contract.views[0]])
    refused(CODES.CODE_BAD_IMAGES, "two images", image_names=[contract.views[0]] * 2)
    refused(CODES.CODE_BAD_IMAGES, "'front'", image_names=["front", contract.views[0]])
    refused(CODES.CODE_BAD_IMAGES, images=[Image(height=4, width=4, encoding="rgb8"), Image()])
    state = observation["robot_state"]
    fewer = JointState(name=state.name[1:], position=state.position[1:])
    refused(CODES.CODE_BAD_STATE, "shoulder_pan", robot_state=fewer)
    bad = JointState(name=state.name, position=array.array("d", [np.nan, *HOME[1:]]))
    refused(CODES.CODE_BAD_STATE, "nan", robot_state=bad)
    outside = JointState(name=state.name, position=array.array("d", [*HOME[:6], 0.5]))
    refused(CODES.CODE_BAD_STATE, "gripper", robot_state=outside)
    refused(CODES.CODE_BAD_REQUEST, "previous_action_chunk", frozen_prefix_steps=3)
    previous = array.array("f", [0.0] * 32)
    refused(CODES.CODE_BAD_REQUEST, "new episode", previous_action_chunk=previous, new_episode=True)


@pytest.mark.slow
def test_before_configure(policy_node, ask, observation) -> None:
    policy_node(autostart=False)
    assert ask(**observation).status == CODES.CODE_NOT_CONFIGURED


@pytest.mark.slow
def test_other_services_answer_while_a_chunk_is_computed(rig, configured, ask, observation) -> None:
    """The stand-in policy takes two seconds for the prompt "think slowly"."""
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    configured(command=[sys.executable, str(HERE / "stand_in_node.py")])
    slow = rig.request(
        GetActionChunk, "/policy_node/get_action_chunk", **{**observation, "prompt": "think slowly"}
    )
    begin = time.monotonic()
    assert rig.call(SetPrompt, "/policy_node/set_prompt", prompt="dance").success
    assert rig.call(Trigger, "/policy_node/reset").success
    second = rig.node.create_client(GetActionChunk, "/policy_node/get_action_chunk")
    wait_until(second.service_is_ready, 10.0, "the service for a second client")
    busy = second.call_async(GetActionChunk.Request(**observation))
    wait_until(busy.done, 10.0, "the answer to the second request")
    assert busy.result().status == CODES.CODE_BUSY
    assert time.monotonic() - begin < 1.5
    statuses.wait_for(lambda message: message.prompt == "dance", timeout=1.0)
    assert not slow.done()
    wait_until(slow.done, 10.0, "the answer to the first")
    assert slow.result().status == CODES.CODE_OK, slow.result().message
    lost = ask(**{**observation, "prompt": "lose the GPU"})
    assert lost.status == CODES.CODE_INFERENCE
    assert "start it again" in lost.message
    statuses.wait_for(lambda message: message.reason == Reason.DEVICE_LOST, timeout=5.0)


@pytest.mark.slow
def test_while_driving_only_when_held(rig, demo_robot, policy_node, ask, observation) -> None:
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    demo_robot()
    policy_node()
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=60.0)
    answer = ask(**observation)
    assert answer.status == CODES.CODE_ACTIVE
    assert "~/hold" in answer.message
    assert rig.call(Trigger, "/policy_node/hold").success
    assert ask(**observation).status == CODES.CODE_OK
    assert rig.call(Trigger, "/policy_node/resume").success
    resumed = time.monotonic()
    statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, since=resumed)
