"""Hold, resume and the fault latch in a running pipeline, without transport."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from pipeline_driver import HOME, Driver, running
from ros_rig import wait_until

from flashrt_ros.core.contract import OnViolation, load_contract
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.nodes import safety
from flashrt_ros.nodes.status import policy_status


def report(driver: Driver) -> PolicyStatus:
    return policy_status(driver.pipeline, Time())


def since(driver: Driver, count: int) -> list:
    return [output for output, _ in driver.commands[count:]]


def test_hold_repeats_the_last_command_until_resume(driver: Driver) -> None:
    driver.begin()
    wait_until(lambda: len(running(driver)) >= 10, 30.0, "ten commands")
    driver.pipeline.hold()
    wait_until(lambda: driver.commands[-1][0].reason is Reason.HELD, 5.0, "the hold")
    first = next(i for i, (out, _) in enumerate(driver.commands) if out.reason is Reason.HELD)
    chunks, inferences = len(driver.chunks), len(driver.policy.prompts)
    # Longer than the hold deadline of one second: this hold was asked for and does not end by itself.
    wait_until(lambda: len(driver.commands) >= first + 75, 30.0, "a second and a half of hold")
    held, before = since(driver, first), driver.commands[first - 1][0]
    assert all(output.kind is CommandKind.HOLDING for output in held)
    assert all((output.values == before.values).all() for output in held)
    assert len(driver.chunks) == chunks
    assert len(driver.policy.prompts) <= inferences + 1  # one may have been on its way
    assert (report(driver).state, report(driver).reason) == (PolicyStatus.STATE_HOLDING, Reason.HELD)

    driver.pipeline.resume()
    wait_until(lambda: driver.commands[-1][0].kind is CommandKind.RUNNING, 10.0, "it goes on")
    assert len(driver.chunks) > chunks
    assert report(driver).state == PolicyStatus.STATE_RUNNING


def test_a_chunk_computed_while_the_hold_came_is_not_played(driver: Driver) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block(prompt: str) -> None:
        if len(driver.chunks) == 2:
            started.set()
            assert go_on.wait(20.0)

    driver.policy.behave = block
    driver.begin()
    assert started.wait(30.0)
    driver.pipeline.hold()
    driver.pipeline.resume()  # at once: only the fence can tell the old chunk from a new one
    go_on.set()
    wait_until(lambda: len(driver.chunks) >= 3, 30.0, "another chunk")
    assert driver.pipeline.measured.dropped[Reason.OLD_GENERATION] == 1


def test_hold_before_anything_was_commanded_stays_silent(driver: Driver) -> None:
    driver.begin(prompt="")
    driver.pipeline.hold()
    wait_until(lambda: len(driver.commands) >= 5, 10.0, "five ticks")
    assert all(output.values is None for output, _ in driver.commands)
    assert (report(driver).state, report(driver).reason) == (PolicyStatus.STATE_WAITING, Reason.HELD)


def breakable(driver: Driver) -> threading.Event:
    """While it is set, every inference fails."""
    broken = threading.Event()

    def fail(prompt: str) -> None:
        if broken.is_set():
            raise RuntimeError("no luck")

    driver.policy.behave = fail
    return broken


def test_failures_in_a_row_latch_and_reset_goes_on(driver: Driver) -> None:
    broken = breakable(driver)
    driver.drive()
    broken.set()
    wait_until(lambda: driver.pipeline.fault, 10.0, "the fault")
    assert driver.pipeline.latch.failures == 10
    wait_until(lambda: driver.commands[-1][0].values is None, 10.0, "silence after the hold deadline")
    kinds = [output.kind for output, _ in driver.commands]
    assert kinds.count(CommandKind.HOLDING) > 40  # a second at 50 Hz
    message = report(driver)
    assert (message.state, message.reason) == (PolicyStatus.STATE_FAULT, Reason.INFERENCE_ERROR)
    assert "10 failed inferences in a row" in message.message
    assert "~/reset_fault" in message.message
    tried = len(driver.policy.prompts)
    broken.clear()
    assert driver.pipeline.resume() == driver.pipeline.fault
    wait_until(lambda: len(driver.commands) >= len(kinds) + 10, 10.0, "ten ticks")
    assert driver.commands[-1][0].values is None, "resume does not reset a fault"
    assert len(driver.policy.prompts) == tried, "nothing is computed in fault"

    driver.pipeline.reset_fault()
    wait_until(lambda: driver.commands[-1][0].kind is CommandKind.RUNNING, 10.0, "it goes on")
    assert report(driver).state == PolicyStatus.STATE_RUNNING


def test_fewer_failures_than_that_latch_nothing(driver: Driver) -> None:
    driver.policy.behave = lambda prompt: (
        np.full((50, 7), np.nan) if len(driver.policy.prompts) % 10 else None  # nine of ten are bad
    )
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 3, 30.0, "three chunks")
    assert driver.pipeline.fault is None
    assert driver.pipeline.measured.dropped[Reason.CHUNK_NOT_FINITE] >= 18


def test_a_reset_ends_a_row_of_failures_before_it_latches(driver: Driver) -> None:
    """One failure that was on its way when the fault was reset must not latch again at once."""
    broken = breakable(driver)
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 2, 30.0, "two chunks")
    driver.pipeline.latch.max_failures = 10_000
    broken.set()
    wait_until(lambda: driver.pipeline.latch.failures >= 20, 30.0, "twenty failures")
    driver.pipeline.latch.max_failures = 15
    driver.pipeline.reset_fault()
    broken.clear()
    before = len(driver.chunks)
    wait_until(lambda: len(driver.chunks) > before, 10.0, "it goes on")
    assert driver.pipeline.fault is None


@pytest.fixture
def rejecting():
    made = Driver(replace(load_contract("demo_arm"), on_violation=OnViolation.REJECT))
    yield made
    made.close()


def beyond() -> np.ndarray:
    """A chunk that opens the gripper slowly, and past its limit within the open-loop cap."""
    actions = np.tile(HOME, (50, 1))
    actions[:, 6] += np.linspace(0.0, 0.07, 50)
    return actions.astype(np.float32)


def test_a_position_outside_the_limits_latches_at_once_when_rejected(rejecting: Driver) -> None:
    rejecting.begin()
    wait_until(lambda: len(running(rejecting)) >= 5, 30.0, "five commands")
    rejecting.policy.behave = lambda prompt: beyond()
    wait_until(lambda: rejecting.pipeline.fault, 10.0, "the fault")
    assert rejecting.pipeline.fault.reason is Reason.LIMIT_POSITION
    assert "gripper" in str(rejecting.pipeline.fault)
    wait_until(lambda: rejecting.commands[-1][0].kind is not CommandKind.RUNNING, 5.0, "a hold")
    sent = [output.values for output, _ in rejecting.commands if output.values is not None]
    assert max(values[6] for values in sent) <= 0.04


def test_a_position_refused_when_it_is_due_latches_as_well(rejecting: Driver) -> None:
    """The limit becomes narrower under a chunk that was accepted; no other comes meanwhile."""
    go_on = threading.Event()

    def block(prompt: str) -> None:
        if rejecting.chunks:
            assert go_on.wait(20.0)

    rejecting.policy.behave = block
    rejecting.begin()
    pipeline = rejecting.pipeline
    try:
        wait_until(lambda: len(running(rejecting)) >= 5, 30.0, "five commands")
        pipeline.commander.limiter.upper[0] = rejecting.commands[-1][0].values[0]
        wait_until(lambda: pipeline.fault, 10.0, "the fault")
    finally:
        go_on.set()
    assert pipeline.fault.reason is Reason.LIMIT_POSITION
    assert "when it was due" in str(pipeline.fault)
    assert pipeline.measured.problems[Reason.LIMIT_POSITION] == 1
    wait_until(lambda: rejecting.commands[-1][0].values is None, 10.0, "silence after the hold deadline")


def test_a_position_outside_the_limits_is_clamped_otherwise(driver: Driver) -> None:
    driver.policy.behave = lambda prompt: (time.sleep(0.6), beyond())[1]
    driver.begin()
    wait_until(lambda: driver.pipeline.measured.violations[Reason.LIMIT_POSITION] >= 3, 30.0, "clamped")
    assert driver.pipeline.fault is None


def test_an_error_on_the_control_thread_latches(driver: Driver) -> None:
    driver.drive()
    tick, failed = driver.pipeline.commander.tick, []

    def fail_once():
        if not failed:
            failed.append(1)
            raise RuntimeError("arithmetic")
        return tick()

    driver.pipeline.commander.tick = fail_once
    wait_until(lambda: driver.pipeline.fault, 10.0, "the fault")
    assert driver.pipeline.fault.reason is Reason.CONTROL_ERROR
    wait_until(lambda: driver.commands[-1][0].kind is CommandKind.HOLDING, 5.0, "a hold")


def test_a_fault_outlives_deactivation_and_a_hold_does_not(driver: Driver) -> None:
    driver.begin()
    driver.pipeline.hold()
    driver.pipeline.raise_fault(Problem(Reason.COMMAND_CONFLICT, "", "someone else"))
    driver.pipeline.stop()
    assert report(driver).state == PolicyStatus.STATE_FAULT
    driver.pipeline.reset_fault()
    assert report(driver).state == PolicyStatus.STATE_INACTIVE
    driver.commands.clear()
    driver.pipeline.start()
    wait_until(lambda: running(driver), 10.0, "it runs")


def test_a_refused_resume_changes_nothing(driver: Driver) -> None:
    driver.drive()
    driver.pipeline.hold()
    driver.pipeline.raise_fault(Problem(Reason.COMMAND_CONFLICT, "", "someone else"))
    assert "someone else" in safety._resume(driver.pipeline)
    assert driver.pipeline.held
    driver.pipeline.reset_fault()
    count = len(driver.commands)
    wait_until(lambda: len(driver.commands) >= count + 20, 10.0, "twenty ticks")
    assert {output.reason for output in since(driver, count + 1)} == {Reason.HELD}
    assert {output.kind for output in since(driver, count + 1)} == {CommandKind.HOLDING}
    assert safety._resume(driver.pipeline) == ""
    wait_until(lambda: driver.commands[-1][0].kind is CommandKind.RUNNING, 10.0, "it goes on")


def test_no_service_prolongs_the_hold_of_a_fault(driver: Driver) -> None:
    driver.drive()
    driver.pipeline.raise_fault(Problem(Reason.COMMAND_CONFLICT, "", "someone else"))
    end = time.monotonic() + 10.0
    while driver.commands[-1][0].values is not None and time.monotonic() < end:
        assert safety._resume(driver.pipeline)
        assert not safety._hold(driver.pipeline)
        time.sleep(0.05)
    assert driver.commands[-1][0].kind is CommandKind.STOPPED
    holding = [output for output, _ in driver.commands if output.kind is CommandKind.HOLDING]
    assert len(holding) <= 51  # the deadline of one second at 50 Hz


def test_a_new_episode_drops_what_plays_and_forgets_camera_formats(driver: Driver) -> None:
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 3, 30.0, "three chunks")
    generation = driver.pipeline.commander.timeline.generation
    driver.pipeline.new_episode()
    begin, before = time.monotonic(), len(driver.chunks)
    wait_until(lambda: len(driver.chunks) >= before + 2, 30.0, "two more chunks")
    assert time.monotonic() - begin < 10.0
    assert driver.chunks[-1].accepted.generation == generation + 1


def test_limits_and_timeline_change_while_running(driver: Driver) -> None:
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 2, 30.0, "two chunks")
    contract = driver.contract
    changed = replace(contract, timeline=replace(contract.timeline, open_loop_cap=200_000_000))
    driver.pipeline.adopt_limits(changed, max_failures=3)
    driver.policy.behave = lambda prompt: time.sleep(0.5)
    count = len(driver.commands)
    wait_until(lambda: any(out.kind is CommandKind.HOLDING for out in since(driver, count)), 10.0, "a hold")
    assert all(output.index < 10 for output in since(driver, count))  # 0.2 s at 50 Hz
    assert driver.pipeline.latch.max_failures == 3
