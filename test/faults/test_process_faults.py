"""Rows 34 to 38: signals, a clock that jumps back, and someone else who commands the robot."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from fault_bench import SLACK, FaultBench, moving
from fault_table import Outcome
from ros_rig import wait_until
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import stamp_to_ns, to_s
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.nodes.outputs import time_message
from flashrt_ros.nodes.policy_node import GUARD_PERIOD


@pytest.mark.parametrize("number", [34, 35], ids=["34-SIGINT", "35-SIGTERM"])
def test_a_signal_ends_with_a_hold(bench: FaultBench, number: int, passed) -> None:
    name = {34: "SIGINT", 35: "SIGTERM"}[number]
    begin = time.monotonic()
    assert bench.node.end(signal.Signals[name], timeout=10.0) == 0, bench.node.output
    to_hold = bench.wait_hold(begin)
    assert to_hold <= SLACK
    assert not moving(bench.commands.messages[-1]), "the last word is a hold"
    bench.check_cap(begin)
    bench.ready()
    passed(Outcome(number, name, "exit status 0", to_hold, "by starting the node"))


def test_36_kill_9(bench: FaultBench, passed) -> None:
    """No hold can be sent: what was sent last ends by itself, at rest, within the open-loop cap."""
    joints = bench.rig.collect(JointState, "/joint_states", 50)
    joints.wait_for()
    begin = time.monotonic()
    bench.node.send_signal(signal.SIGKILL)
    bench.node.wait()
    last = bench.commands.messages[-1]
    reach = to_s(stamp_to_ns(last.points[-1].time_from_start))
    assert reach <= to_s(bench.contract.timeline.open_loop_cap)
    assert not np.any(last.points[-1].velocities), "it ends at rest"
    wait_until(lambda: time.monotonic() > begin + 2.0, 3.0, "the arm to come to rest")
    rest = joints.since(begin + 1.5)
    drift = np.ptp([message.position for message in rest], axis=0).max()
    assert drift < 0.01, f"the arm still moves by {drift:.3f} rad"
    to_hold = bench.last_motion(begin) - begin + reach
    assert to_hold <= to_s(bench.contract.timeline.open_loop_cap) + SLACK
    bench.rig.forget(bench.node)
    bench.ready()
    passed(Outcome(36, "kill -9", "none: the process is gone", to_hold, "by starting the node"))


def test_a_lost_gpu_ends_the_process_with_a_hold(bench: FaultBench) -> None:
    """No row of the matrix; simulated, as the runtime says it. The next process has the GPU, and drives."""
    before, begin = bench.counts(), time.monotonic()
    bench.order("lost", -1)
    bench.wait_code((Reason.DEVICE_LOST,), begin, before)
    bench.wait_state(PolicyStatus.STATE_FAULT, begin)
    assert bench.node.wait(timeout=10.0) == os.EX_TEMPFAIL, bench.node.output
    assert bench.wait_hold(begin) <= bench.watchdog + SLACK
    assert not moving(bench.commands.messages[-1]), "the last word is a hold"
    bench.check_cap(begin)
    bench.rig.forget(bench.node)
    bench.order()
    bench.ready()


SIM = "/sim/policy_node"


class SimClock:
    """/clock at 100 Hz, from a thread of its own."""

    def __init__(self, node) -> None:
        self.shift = 0  # [ns]
        self._publisher = node.create_publisher(Clock, "/clock", 10)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self._publisher.publish(Clock(clock=time_message(time.monotonic_ns() + self.shift)))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_37_clock_jumps_back(bench: FaultBench, passed) -> None:
    """As when a bag loops: both nodes take their time from /clock, in a namespace of their own."""
    statuses = bench.rig.collect(PolicyStatus, f"{SIM}/status")
    commands = bench.rig.collect(JointTrajectory, "/sim/arm_controller/joint_trajectory", 200)
    clock = SimClock(bench.rig.node)
    robot = bench.start_robot("sim", use_sim_time=True)
    node = bench.start_node("sim", use_sim_time=True)
    try:
        running = PolicyStatus.STATE_RUNNING
        before = statuses.wait_for(lambda message: message.state == running, timeout=60.0)
        commands.wait_for(moving)
        counts, begin = bench.counts(SIM), time.monotonic()
        clock.shift -= 5_000_000_000
        after = statuses.wait_for(
            lambda m: m.state == running and m.generation > before.generation, timeout=20.0, since=begin
        )
        assert after.generation > before.generation, "what was computed before the jump is fenced off"
        node.wait_for_line("stamps jumped back")
        code = bench.wait_code((Reason.CLOCK,), begin, counts, SIM)
        entries = [(received, command) for received, command in commands.entries if received > begin]
        held = [received for received, command in entries if not moving(command)]
        assert held, "the old chunk may not play on: held until the first of after the jump"
        early = [received for received, command in entries if moving(command) and received < held[0]]
        to_hold = (early[-1] if early else begin) - begin
        assert to_hold <= bench.watchdog + SLACK
    finally:
        for process in (node, robot):
            bench.rig.forget(process)
        clock.stop()
    passed(Outcome(37, "/clock jumps back (bag loop)", code, to_hold, "by itself"))


def test_38_second_publisher_on_the_command_topic(bench: FaultBench, passed) -> None:
    before, begin = bench.counts(), time.monotonic()
    other = bench.rig.node.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 10)
    try:
        code = bench.wait_code((Reason.COMMAND_CONFLICT,), begin, before)
        to_hold = bench.wait_hold(begin)
        # Looked for every GUARD_PERIOD, once DDS has discovered it; the next tick holds.
        assert to_hold <= 2 * GUARD_PERIOD + to_s(bench.contract.rates.control_period) + SLACK
        bench.check_cap(begin)
        report = bench.wait_state(PolicyStatus.STATE_FAULT, begin)
        assert "/test_observer" in report.message
        assert not bench.call("reset_fault").success, "the other one is still there"
    finally:
        bench.rig.node.destroy_publisher(other)
    wait_until(lambda: bench.call("reset_fault").success, 10.0, "the reset, once the other one is gone")
    bench.wait_running()
    passed(Outcome(38, "second publisher on the command topic", code, to_hold, "after ~/reset_fault"))
