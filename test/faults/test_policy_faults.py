"""Rows 14 to 22 and 30 to 33: what the policy, its prompts and its services can do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fault_bench import QUIET, SLACK, FaultBench, entry_of, moving
from fault_table import NOT_COMMANDING, Outcome
from lifecycle_msgs.msg import Transition
from ros_rig import wait_until

from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import stamp_to_ns
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.srv import Calibrate, SetPrompt


@dataclass(frozen=True)
class Row:
    """fault: see fault_node; rejects: whether violations of limits are rejected, not clamped."""

    number: int
    cause: str
    fault: str
    reasons: tuple[Reason, ...]
    latched: bool
    rejects: bool = False
    sleep: float = 0.0

    def __str__(self) -> str:
        return f"{self.number:02d}-{self.cause.replace(' ', '-')}"


LATE = (Reason.STARVED, Reason.HOLD_DEADLINE, Reason.CHUNK_LATE)
ROWS = (
    Row(14, "NaN in a chunk", "nan", (Reason.CHUNK_NOT_FINITE,), latched=True),
    Row(15, "Inf in a chunk", "inf", (Reason.CHUNK_NOT_FINITE,), latched=True),
    Row(16, "position limit", "position", (Reason.LIMIT_POSITION,), latched=True, rejects=True),
    Row(17, "velocity limit inside a chunk", "velocity", (Reason.LIMIT_VELOCITY,), False, rejects=True),
    Row(18, "velocity limit at the seam", "seam", (Reason.LIMIT_VELOCITY,), False, rejects=True),
    Row(20, "runtime raises ten times", "raise", (Reason.INFERENCE_ERROR,), latched=True),
    Row(21, "inference 5x over budget", "none", LATE, latched=False, sleep=2.5),
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_policy_that_fails_holds_the_robot(bench: FaultBench, row: Row, passed) -> None:
    """Until the policy is well again; where it latches, until the fault is reset after that."""
    if row.rejects:
        bench.set_parameters("/policy_node", {"limits.on_violation": "reject"})
        bench.wait_running()
    before, begin = bench.counts(), time.monotonic()
    count = 10 if row.number == 20 else -1
    bench.order(row.fault, count, sleep=row.sleep)
    code = bench.wait_code(row.reasons, begin, before)
    to_hold = bench.wait_hold(begin)
    assert to_hold <= bench.watchdog + SLACK
    bench.check_cap(begin)
    if row.latched:
        bench.wait_state(PolicyStatus.STATE_FAULT, begin)
    healed = time.monotonic()
    bench.order()
    if row.latched:
        wait_until(lambda: time.monotonic() > healed + 1.0, 2.0, "a second to go by")
        assert not [m for m in bench.statuses.since(healed) if m.state != PolicyStatus.STATE_FAULT]
        assert not any(map(moving, bench.commands.since(healed)))
        assert bench.call("reset_fault").success
    bench.wait_running(since=healed)
    recovered = "after ~/reset_fault" if row.latched else "by itself"
    passed(Outcome(row.number, row.cause, code, to_hold, recovered))


def test_19_runtime_raises_once(bench: FaultBench, passed) -> None:
    before, begin = bench.counts(), time.monotonic()
    bench.order("raise", 1)
    bench.never_stops(begin, 1.5)
    code = bench.wait_code((Reason.INFERENCE_ERROR,), begin, before)
    bench.check_cap(begin)
    passed(Outcome(19, "runtime raises once", code, None, "by itself"))


def test_22_slow_first_inference(bench: FaultBench, passed) -> None:
    """Nothing is commanded while it takes; its chunk starts at action 0, and no later one is thought late."""
    assert bench.change(Transition.TRANSITION_DEACTIVATE)
    wait_until(lambda: time.monotonic() - bench.last_motion(0.0) > QUIET, 10.0, "stillness")
    bench.order("none", 1, sleep=1.2)
    before, begin = bench.counts(), time.monotonic()
    assert bench.change(Transition.TRANSITION_ACTIVATE)
    code = bench.wait_code((Reason.NO_CHUNK,), begin, before)
    first = bench.chunks.wait_for(since=begin)
    command = bench.commands.wait_for(since=begin)
    apart = stamp_to_ns(command.header.stamp) - stamp_to_ns(first.header.stamp)
    assert abs(apart) <= 20_000_000, "its first action was not the first"
    observed = max(map(stamp_to_ns, first.observation_stamps))
    assert stamp_to_ns(command.header.stamp) - observed > 1.2e9, "commanded before its chunk was there"
    bench.wait_running(since=begin)
    later = bench.chunks.wait_for(lambda chunk: chunk.sequence >= first.sequence + 3, since=begin)
    assert stamp_to_ns(later.header.stamp) - max(map(stamp_to_ns, later.observation_stamps)) < 0.3e9
    passed(Outcome(22, "slow first inference", code, NOT_COMMANDING, "by itself"))


def set_prompt(bench: FaultBench, prompt: str) -> Any:
    return bench.rig.call(SetPrompt, "/policy_node/set_prompt", prompt=prompt, reset=False)


def test_30_set_prompt_during_inference(bench: FaultBench, passed) -> None:
    bench.order("none", -1, sleep=0.25)
    wait_until(lambda: len(bench.chunks.messages) > 3, 10.0, "chunks")
    mark = time.monotonic()
    bench.chunks.wait_for(since=mark)  # the next inference begins within a frame, for a quarter of a second
    placed = time.monotonic()
    wait_until(lambda: time.monotonic() > placed + 0.1, 1.0, "the next inference to be on its way")
    begin = time.monotonic()
    assert set_prompt(bench, "open the gripper").success
    assert time.monotonic() - begin < 0.2, "the answer waited for the inference"
    new = bench.chunks.wait_for(lambda chunk: chunk.prompt == "open the gripper", timeout=5.0, since=begin)
    in_work = bench.chunks.since(begin)[0]
    assert in_work.prompt == "wave", "the one in work is used"
    assert new.generation == in_work.generation, "a prompt change does not flush"
    bench.never_stops(begin, 1.5)
    bench.check_cap(begin)
    assert set_prompt(bench, "wave").success
    passed(Outcome(30, "set_prompt during inference", "none", None, "nothing to recover from"))


def test_31_prompt_too_long(bench: FaultBench, passed) -> None:
    before, begin = bench.counts(), time.monotonic()
    answer = set_prompt(bench, "pick up the block and " * 100)
    assert (answer.success, answer.code) == (False, SetPrompt.Response.CODE_PROMPT_TOO_LONG)
    assert "token" in answer.message
    bench.never_stops(begin, 1.5)
    code = bench.wait_code((Reason.PROMPT_INVALID,), begin, before)
    assert {chunk.prompt for chunk in bench.chunks.since(begin)} == {"wave"}
    passed(Outcome(31, "prompt too long", code, None, "the prompt in force stays"))


def test_32_calibrate_while_active(bench: FaultBench, passed) -> None:
    before, begin = bench.counts(), time.monotonic()
    answer = bench.rig.call(Calibrate, "/policy_node/calibrate", source="live")
    assert (answer.success, answer.code) == (False, Calibrate.Response.CODE_ACTIVE)
    assert answer.reason == Reason.CALIBRATION_REFUSED
    assert "deactivate" in answer.message
    bench.never_stops(begin, 1.5)
    code = bench.wait_code((Reason.CALIBRATION_REFUSED,), begin, before)
    passed(Outcome(32, "calibrate while active", code, None, "nothing to recover from"))


def test_33_deactivate_during_inference(bench: FaultBench, passed) -> None:
    bench.order("none", 1, sleep=1.0)
    mark = time.monotonic()
    wait_until(lambda: time.monotonic() > mark + 0.2, 1.0, "the long inference to be on its way")
    begin = time.monotonic()
    assert bench.change(Transition.TRANSITION_DEACTIVATE)
    assert time.monotonic() - begin < 0.5, "deactivation waited for the inference"
    to_hold = bench.wait_hold(begin)
    assert to_hold <= SLACK
    last = bench.commands.messages[-1]
    assert not moving(last), "the last word is a hold"
    assert not np.any([point.velocities for point in last.points[1:]])
    chunks = len(bench.chunks.messages)
    wait_until(lambda: time.monotonic() > begin + 1.5, 3.0, "the inference to end")
    assert len(bench.chunks.messages) == chunks, "its chunk was dropped"
    assert bench.commands.messages[-1] is last
    report = bench.wait_state(PolicyStatus.STATE_INACTIVE, begin)
    assert report.reason == Reason.OK
    bench.reports.wait_for(lambda entry: entry_of(entry).get("state") == "inactive", timeout=5.0, since=begin)
    activated = time.monotonic()
    assert bench.change(Transition.TRANSITION_ACTIVATE)
    bench.wait_running(since=activated)
    passed(Outcome(33, "deactivate during inference", "inactive (state)", to_hold, "by activating"))
