"""Real-time chunking in the node: seams close, the delay is what is consumed, the service conditions too.

The policy is the real one over a checkpoint whose flow is known in closed form: random weights are no flow
towards anything, and no guidance could be seen on them.
"""

from __future__ import annotations

import array
import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from pipeline_driver import Driver
from ros_rig import wait_until
from sensor_msgs.msg import Image, JointState

import flashrt_runtime
from flashrt_ros.core.contract import RobotContract, RtcMode, RtcSpec, load_contract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import stamp_to_ns
from flashrt_ros.msg import ActionChunk
from flashrt_ros.srv import GetActionChunk
from flashrt_runtime.untrained.linear_flow import make_linear_flow

CODES = GetActionChunk.Response
HOME = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.02]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_linear_flow(tmp_path_factory.mktemp("rtc") / "flow", spread=0.2)


class Seeded:
    """The real policy with the n-th seed for the n-th chunk; waits as a larger model would."""

    def __init__(self, path: Path, rtc: str, wait: float = 0.0) -> None:
        self._policy = flashrt_runtime.load_model(path, hardware="cpu", num_steps=4, rtc=rtc)
        self._wait = wait
        self.spec, self.precision, self.count = self._policy.spec, "fp32", 0
        self.guidance: list = []
        self.set_prompt, self.close = self._policy.set_prompt, self._policy.close

    def predict(self, images, prompt, state, *, seed=None, rtc=None):
        self.count += 1
        self.guidance.append(rtc)
        return self._policy.predict(images, prompt, state, seed=self.count, rtc=rtc)


def contract_with(mode: RtcMode, **changes) -> RobotContract:
    """The demo arm without blending, so that a seam shows as it is."""
    demo = load_contract("demo_arm")
    rtc = RtcSpec(mode=mode, **changes)
    return replace(demo, timeline=replace(demo.timeline, blend_steps=0, rtc=rtc))


def drive(flow: Path, mode: RtcMode, chunks: int = 14, declared: int | None = None) -> tuple[Driver, Seeded]:
    driver = Driver(contract_with(mode))
    policy = Seeded(flow, "guided" if mode is RtcMode.GUIDED else "off")
    if declared is not None:
        policy.spec = replace(policy.spec, rtc_training_max_delay=declared)
    driver.policy = policy  # type: ignore[assignment]
    try:
        driver.begin()
        wait_until(lambda: len(driver.chunks) >= chunks, 60.0, f"{chunks} chunks")
    finally:
        driver.close()
    return driver, policy


def test_guided_chunks_go_on_where_the_last_one_is(flow: Path) -> None:
    """On the same seeds, a seam jumps by a fraction of what it does without; the first two are not compared,
    as no delay is known before."""
    jumps = {}
    for mode in (RtcMode.OFF, RtcMode.GUIDED):
        driver, policy = drive(flow, mode)
        placed = [chunk.accepted for chunk in driver.chunks]
        jumps[mode] = np.array([accepted.jump for accepted in placed[3:]])
        if mode is RtcMode.OFF:
            assert policy.guidance == [None] * len(policy.guidance)
            continue
        assert policy.guidance[0] is None, "there is nothing to go on from"
        second, *later = policy.guidance[1 : len(placed)]
        assert second.delay == 0, "no delay is known yet; that must not be an error"
        assert all(guidance.plan.shape[1] == 7 for guidance in later)
        for guidance, chunk, accepted in zip(later, driver.chunks[2:], placed[2:], strict=False):
            frozen, actions = chunk.prediction.frozen, chunk.prediction.actions
            assert frozen == guidance.delay >= 1
            np.testing.assert_allclose(actions[:frozen], guidance.plan[:frozen], atol=1e-5)
            assert accepted.jump < 1e-4 or accepted.consumed >= frozen
    off, guided = jumps[RtcMode.OFF], jumps[RtcMode.GUIDED]
    assert np.median(off) > 0.01
    assert np.median(guided) < 0.2 * np.median(off)


def test_the_delay_is_what_was_consumed(flow: Path) -> None:
    driver, policy = drive(flow, RtcMode.GUIDED)
    consumed = [chunk.accepted.consumed for chunk in driver.chunks]
    assert consumed[0] == 0
    assert 1 <= driver.pipeline.runner.guide.delay <= max(1, *consumed)
    assert policy.guidance[-1].delay <= max(1, *consumed)


def test_more_consumed_than_trained_for_is_said_and_blended(flow: Path) -> None:
    """The checkpoint is one that knows no frozen actions: only what the node asks for is looked at."""
    driver = Driver(contract_with(RtcMode.TRAINED))
    policy = Seeded(flow, "off")
    policy.spec = replace(policy.spec, rtc_training_max_delay=1)
    asked: list = []
    inner = policy.predict

    def slow(images, prompt, state, *, seed=None, rtc=None):
        asked.append(rtc)
        time.sleep(0.08)  # four control periods
        return inner(images, prompt, state, seed=seed)

    policy.predict = slow  # type: ignore[method-assign]
    driver.policy = policy  # type: ignore[assignment]
    try:
        driver.begin()
        wait_until(lambda: len(driver.chunks) >= 5, 60.0, "five chunks")
    finally:
        driver.close()
    assert {guidance.delay for guidance in asked if guidance is not None} <= {0, 1}
    said = [problem for problem in driver.problems if problem.reason is Reason.RTC_DELAY]
    assert "the checkpoint was trained for 1: the seam is blended" in str(said[0])


def seams(chunks: list[ActionChunk], actions: int) -> list[float]:
    """By how much each chunk differs from the one before in its first actions, at the times they are due."""
    found = []
    for old, new in itertools.pairwise(chunks):
        a, b = (np.array(chunk.data).reshape(chunk.horizon, chunk.dof) for chunk in (old, new))
        behind = stamp_to_ns(new.header.stamp) - stamp_to_ns(old.header.stamp)
        offset = round(behind / 1e9 / new.step_period)
        found.append(float(np.abs(b[:actions] - a[offset : offset + actions]).max()))
    return found


@pytest.mark.slow
def test_seams_of_the_demo_robot(rig, demo_robot, policy_node, flow: Path) -> None:
    """Processes, DDS and the simulated arm; the same noise in both runs."""
    demo_robot()
    medians = {}
    for mode in ("off", "guided"):
        received = rig.collect(ActionChunk, "/policy_node/action_chunk")
        node = policy_node(**{
            "checkpoint": str(flow), "seed": 7, "num_steps": 4, "rtc.mode": mode, "rtc.horizon": 20,
            "timeline.blend_steps": 0,
        })
        wait_until(lambda received=received: len(received.messages) >= 20, 60.0, "twenty chunks")
        medians[mode] = float(np.median(seams(received.messages[3:20], 1)))
        node.end()
    print(f"median |dq| at a seam [rad]: {medians}")
    assert medians["off"] > 0.01
    assert medians["guided"] < 0.2 * medians["off"], medians


@pytest.mark.slow
def test_the_service_goes_on_from_the_chunk_that_is_sent_back(rig, policy_node, flow: Path) -> None:
    contract = load_contract("demo_arm")
    policy_node(autostart=False, checkpoint=str(flow), **{"rtc.mode": "guided"})
    configure = Transition(id=Transition.TRANSITION_CONFIGURE)
    assert rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=configure).success
    pixels = np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image(height=48, width=64, step=192, encoding="rgb8", data=array.array("B", pixels.tobytes()))
    observation = {
        "images": [image, image], "image_names": list(contract.views), "prompt": "wave",
        "robot_state": JointState(name=list(contract.action.joints), position=array.array("d", HOME)),
    }

    def ask(**changes):
        return rig.call(GetActionChunk, "/policy_node/get_action_chunk", **{**observation, **changes})

    def rows(answer) -> np.ndarray:
        return np.array(answer.policy_action_chunk).reshape(-1, answer.policy_action_dim)

    first = ask()
    assert (first.status, first.policy_action_dim, len(rows(first))) == (CODES.CODE_OK, 7, 50)
    rest = array.array("f", rows(first)[10:].astype(np.float32).reshape(-1))
    free, guided = ask(), ask(previous_action_chunk=rest, frozen_prefix_steps=4, guidance_horizon=20)
    assert guided.status == CODES.CODE_OK, guided.message
    np.testing.assert_allclose(rows(guided)[:4], rows(first)[10:14], atol=1e-5)
    near, far = (np.abs(rows(answer)[4:8] - rows(first)[14:18]).mean() for answer in (guided, free))
    assert near < 0.5 * far
    bad = ask(previous_action_chunk=rest, frozen_prefix_steps=45)
    assert bad.status == CODES.CODE_BAD_REQUEST
    assert "only 40 actions of the plan" in bad.message
    assert ask(previous_action_chunk=rest[:5]).status == CODES.CODE_BAD_REQUEST
