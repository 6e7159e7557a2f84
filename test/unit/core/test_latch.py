"""Which problems latch."""

import pytest

from flashrt_ros.core.latch import FaultLatch
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason


def problem(reason: Reason) -> Problem:
    return Problem(reason, "", reason.text)


AT_ONCE = [Reason.LIMIT_POSITION, Reason.CONTROL_ERROR, Reason.COMMAND_CONFLICT]


@pytest.mark.parametrize("reason", AT_ONCE)
def test_latches_at_once(reason: Reason) -> None:
    latch = FaultLatch()
    fault = latch.note(problem(reason))
    assert fault is not None
    assert latch.fault == fault
    assert fault.reason is reason
    assert "~/reset_fault" in fault.message


REPEATED = [
    Reason.INFERENCE_ERROR, Reason.CHUNK_NOT_FINITE, Reason.CHUNK_SHAPE, Reason.OUT_OF_MEMORY,
    Reason.NO_STOP_TOKEN, Reason.ACTION_TOKENS,
]


def test_failures_in_a_row_latch_whatever_their_kinds() -> None:
    latch = FaultLatch(max_failures=4)
    assert [latch.note(problem(reason)) for reason in REPEATED[:3]] == [None] * 3
    fault = latch.note(problem(REPEATED[3]))
    assert fault is not None
    assert "4 failed inferences in a row" in fault.message


@pytest.mark.parametrize("reason", REPEATED)
def test_a_good_chunk_ends_the_row(reason: Reason) -> None:
    latch = FaultLatch(max_failures=2)
    for _ in range(5):
        assert latch.note(problem(reason)) is None
        latch.chunk_accepted()
    assert latch.fault is None


def test_a_lost_gpu_latches_for_good() -> None:
    latch = FaultLatch()
    fault = latch.note(problem(Reason.DEVICE_LOST))
    assert fault is not None
    assert latch.fault == fault == problem(Reason.DEVICE_LOST), "no advice to reset it"
    assert latch.for_good
    assert latch.unseen is None
    assert latch.reset() is None
    assert latch.note(problem(Reason.DEVICE_LOST)) is None
    assert latch.fault == fault


@pytest.mark.parametrize("other", [*AT_ONCE, Reason.INFERENCE_ERROR])
@pytest.mark.parametrize("first", ["lost", "other"])
def test_beside_a_lost_gpu_a_fault_that_waits_for_somebody_is_kept(first: str, other: Reason) -> None:
    """Whichever came first: the next process must not drive on as if nothing had been."""
    latch = FaultLatch(max_failures=1)
    reasons = (Reason.DEVICE_LOST, other) if first == "lost" else (other, Reason.DEVICE_LOST)
    noted = [latch.note(problem(reason)) for reason in reasons]
    fault = latch.fault
    assert None not in noted
    assert noted[1] == fault
    assert fault is not None
    assert latch.unseen is not None
    assert (fault.reason, latch.unseen.reason) == (Reason.DEVICE_LOST, other)
    assert fault.message.startswith(Reason.DEVICE_LOST.text)
    assert f"see to {other.name} ({other.text}" in fault.message
    assert "~/reset_fault" not in fault.message
    assert latch.reset() is None
    assert latch.note(problem(Reason.COMMAND_CONFLICT)) is None
    assert latch.note(problem(Reason.DEVICE_LOST)) is None
    assert (latch.fault, latch.unseen is None) == (fault, False)


def test_everything_else_ends_by_itself() -> None:
    latch = FaultLatch(max_failures=1)
    latching = {*REPEATED, *AT_ONCE, Reason.DEVICE_LOST}
    for reason in set(Reason) - latching:
        for _ in range(20):
            assert latch.note(problem(reason)) is None, reason


def test_the_first_fault_stays_until_reset() -> None:
    latch = FaultLatch(max_failures=1)
    first = latch.note(problem(Reason.COMMAND_CONFLICT))
    assert latch.note(problem(Reason.INFERENCE_ERROR)) is None
    latch.chunk_accepted()
    assert latch.fault == first
    assert latch.reset() == first
    assert (latch.fault, latch.failures, latch.reset()) == (None, 0, None)
    assert latch.note(problem(Reason.INFERENCE_ERROR)) is not None
