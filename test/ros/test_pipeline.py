"""The pipeline's threads, without transport: messages are pushed by the test, outputs collected by it.

The policy is a stand-in, for what the real one cannot be made to do: block, fail and answer nonsense.
"""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from pipeline_driver import PERIOD, Driver, StandInPolicy, running
from ros_rig import wait_until

from flashrt_ros.core.errors import PolicyMismatchError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.nodes.pipeline import guarded
from flashrt_ros.nodes.status import policy_status


def test_action_zero_is_due_when_its_chunk_says(driver: Driver) -> None:
    """Action i of a chunk goes out i control periods after the chunk's stamp."""
    driver.policy.behave = lambda prompt: time.sleep(0.05)
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 10, 30.0, "ten chunks")
    due = {placed.accepted.sequence: placed.due for placed in driver.chunks}
    known = [(out, stamp) for out, stamp in running(driver) if out.sequence in due]
    errors = [stamp - due[out.sequence] - out.index * PERIOD for out, stamp in known]
    assert len(errors) >= 20
    assert abs(np.median(errors)) < PERIOD / 10
    # Splicing by another count than the commands really sent would put chunks whole periods off.
    assert np.mean(np.abs(errors) < PERIOD / 2) > 0.8


def test_chunks_follow_one_another_by_what_was_sent_meanwhile(driver: Driver) -> None:
    driver.policy.behave = lambda prompt: time.sleep(0.07)
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 5, 30.0, "five chunks")
    first, *later = [placed.accepted for placed in driver.chunks]
    assert (first.consumed, first.start_index) == (0, 0)
    assert all(2 <= accepted.consumed <= 20 for accepted in later)
    indices = [(out.sequence, out.index) for out, _ in running(driver)]
    assert all(b[0] > a[0] or b[1] == a[1] + 1 for a, b in itertools.pairwise(indices))


def test_reset_drops_what_the_old_prompt_was_computed_for(driver: Driver) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block(prompt: str) -> None:
        if prompt == "old" and len(driver.chunks) >= 2:
            started.set()
            assert go_on.wait(20.0)

    driver.policy.behave = block
    driver.begin("old")
    assert started.wait(30.0)
    before = len(driver.chunks)
    driver.pipeline.set_prompt("new", reset=True)
    go_on.set()
    wait_until(lambda: len(driver.chunks) > before, 30.0, "a chunk for the new prompt")
    assert {placed.prediction.prompt for placed in driver.chunks[before:]} == {"new"}
    assert driver.pipeline.measured.dropped[Reason.OLD_GENERATION] == 1


def test_without_reset_the_chunk_in_work_is_still_used(driver: Driver) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block(prompt: str) -> None:
        if prompt == "old" and len(driver.chunks) >= 2:
            started.set()
            assert go_on.wait(20.0)

    driver.policy.behave = block
    driver.begin("old")
    assert started.wait(30.0)
    before = len(driver.chunks)
    driver.pipeline.set_prompt("new", reset=False)
    go_on.set()
    wait_until(lambda: len(driver.chunks) > before + 1, 30.0, "two more chunks")
    assert [placed.prediction.prompt for placed in driver.chunks[before : before + 2]] == ["old", "new"]
    assert not driver.pipeline.measured.dropped


def test_a_failing_policy_is_reported_and_tried_again(driver: Driver) -> None:
    def fail(prompt: str) -> None:
        if len(driver.policy.prompts) <= 3:
            raise RuntimeError("no luck")

    driver.policy.behave = fail
    driver.begin()
    wait_until(lambda: driver.chunks, 30.0, "a chunk after three failures")
    failures = [problem for problem in driver.problems if problem.reason is Reason.INFERENCE_ERROR]
    assert [str(problem) for problem in failures] == ["RuntimeError: no luck"] * 3
    wait_until(lambda: driver.pipeline.problem is None, 5.0, "the problem is over")


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        (np.full((50, 7), np.nan, np.float32), Reason.CHUNK_NOT_FINITE),
        (np.zeros((50, 6), np.float32), Reason.CHUNK_SHAPE),
        (np.zeros((0, 7), np.float32), Reason.CHUNK_SHAPE),
    ],
)
def test_unusable_actions_are_dropped_and_never_commanded(driver: Driver, actions, reason) -> None:
    driver.policy.behave = lambda prompt: actions
    driver.begin()
    wait_until(lambda: len(driver.problems) >= 3, 30.0, "three reports")
    assert driver.chunks == []
    assert all(output.values is None for output, _ in driver.commands)
    # With the wrong number of joints, actions do not even get as far as the timeline, which counts.
    assert (driver.pipeline.measured.dropped[reason] >= 1) == (actions.shape[1] == driver.contract.dof)
    # The first reports may be of streams.
    assert driver.problems[-1].reason is reason


def test_stop_during_inference_holds_at_once_and_drops_the_chunk(driver: Driver) -> None:
    started, go_on = threading.Event(), threading.Event()

    def block(prompt: str) -> None:
        if len(driver.chunks) >= 2:
            started.set()
            assert go_on.wait(20.0)

    driver.policy.behave = block
    driver.begin()
    assert started.wait(30.0)
    begin = time.monotonic()
    driver.pipeline.stop()
    assert time.monotonic() - begin < 5.0  # the inference goes on until go_on
    last, chunks, commands = driver.commands[-1][0], len(driver.chunks), len(driver.commands)
    assert last.kind is CommandKind.HOLDING
    assert (last.trajectory.positions == last.values).all()
    go_on.set()
    wait_until(lambda: driver.pipeline.worker.idle, 10.0, "the inference ends")
    assert (len(driver.chunks), len(driver.commands)) == (chunks, commands)


def test_stop_before_anything_was_commanded_says_nothing(driver: Driver) -> None:
    driver.begin(prompt="")
    wait_until(lambda: driver.problems, 10.0, "a report")
    driver.pipeline.stop()
    assert all(output.values is None for output, _ in driver.commands)


def test_the_worker_closes_the_policy_it_loaded(driver: Driver) -> None:
    driver.begin()
    driver.pipeline.close()
    assert driver.policy.closed_on == "inference"
    assert not driver.pipeline.worker.running
    driver.pipeline.close()  # again does no harm


def test_a_policy_that_does_not_fit_is_closed_and_refused(driver: Driver) -> None:
    misfit = StandInPolicy(driver.contract.action.joints, action_rate_hz=30.0)
    with pytest.raises(PolicyMismatchError, match="50 Hz"):
        driver.pipeline.load(lambda: misfit, "wave", lambda: True)
    assert misfit.closed_on == "inference"
    assert driver.pipeline.policy is None


def test_loading_can_be_given_up(driver: Driver) -> None:
    go_on = threading.Event()

    def slow() -> StandInPolicy:
        assert go_on.wait(20.0)
        return driver.policy

    with pytest.raises(InterruptedError):
        driver.pipeline.load(slow, "wave", lambda: False)
    go_on.set()
    driver.pipeline.close()
    assert not driver.pipeline.worker.running


def test_a_clock_that_jumps_back_is_followed_behind_a_fence(driver: Driver) -> None:
    """A bag that loops, or simulated time that starts again: frames of before are no measure of new ones."""
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 2, 30.0, "two chunks")
    before, generation = time.time_ns(), driver.pipeline.commander.timeline.generation
    driver.shift = -10_000_000_000
    wait_until(lambda: stamps(driver)[-1] < before - 5e9, 30.0, "a chunk of the new time")
    assert driver.chunks[-1].accepted.generation > generation
    assert Reason.CLOCK in {problem.reason for problem in driver.problems}
    wait_until(lambda: driver.pipeline.problem is None, 5.0, "the problem is over")


def stamps(driver: Driver) -> list[int]:
    return [placed.prediction.observation.newest_image_stamp for placed in list(driver.chunks)]


def test_a_policy_that_cannot_be_closed_keeps_no_thread(driver: Driver) -> None:
    """A stand-in whose close raises: the real policy gives no way to make it fail."""

    def fail() -> None:
        raise RuntimeError("cannot let go")

    driver.policy.close = fail
    driver.begin()
    driver.pipeline.close()
    assert not driver.pipeline.worker.running
    assert str(driver.problems[-1]) == "the policy could not be closed: RuntimeError: cannot let go"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_inference_thread_is_a_fault_and_close_does_not_wait_for_it(driver: Driver) -> None:
    """SystemExit in a stand-in policy is what ends the thread here: no Exception does."""

    def die(prompt: str) -> None:
        raise SystemExit

    driver.policy.behave = die
    driver.begin()
    wait_until(lambda: not driver.pipeline.worker.running, 30.0, "the end of the thread")
    report = policy_status(driver.pipeline, Time())
    assert (report.state, report.reason) == (PolicyStatus.STATE_FAULT, Reason.WORKER_STOPPED)
    assert "inference thread has died" in report.message
    driver.pipeline.close()
    assert str(driver.problems[-1]) == (
        "the policy could not be closed: RuntimeError: the inference thread has died"
    )


def test_no_command_follows_the_hold_of_a_stop(driver: Driver) -> None:
    """The control thread is kept inside a tick until after the stop."""
    inside, go_on = threading.Event(), threading.Event()
    tick = driver.pipeline.commander.tick

    def slow_tick():
        output = tick()
        if len(running(driver)) >= 5:
            inside.set()
            assert go_on.wait(20.0)
        return output

    driver.pipeline.commander.tick = slow_tick
    driver.begin()
    assert inside.wait(30.0)
    driver.pipeline.stop()
    commands = len(driver.commands)
    assert driver.commands[-1][0].kind is CommandKind.HOLDING
    assert driver.problems[-1].reason is Reason.CONTROL_ERROR
    assert "stuck" in str(driver.problems[-1])
    assert driver.pipeline.stuck.reason is Reason.CONTROL_ERROR, "it would send its old command yet"
    go_on.set()
    wait_until(lambda: not driver.pipeline.control.running, 10.0, "the end of the control thread")
    assert driver.pipeline.stuck is None
    assert len(driver.commands) == commands


def test_a_handler_that_raises_leaves_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Exception) -> None:
        raise RuntimeError("no logger")

    guarded(fail)(ValueError("the first error"))
    assert capsys.readouterr().err == (
        "flashrt_ros: ValueError not reported (RuntimeError: no logger): the first error\n"
    )


def test_a_failing_log_does_not_end_the_threads(driver: Driver) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no logger")

    driver.on_problem = fail
    driver.begin(prompt="")
    wait_until(lambda: driver.pipeline.problem, 10.0, "a problem")
    driver.pipeline.set_prompt("wave", reset=False)
    wait_until(lambda: driver.chunks, 30.0, "a chunk")
