"""A simulation that does not keep real time: the node goes on, and says so."""

from __future__ import annotations

import threading
import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from rosgraph_msgs.msg import Clock

from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.nodes.outputs import time_message


@pytest.mark.slow
def test_a_simulation_at_half_speed_is_told(rig, demo_robot, policy_node) -> None:
    publisher = rig.node.create_publisher(Clock, "/clock", 10)
    stop, begin = threading.Event(), time.monotonic_ns()

    def run() -> None:
        while not stop.wait(0.01):
            publisher.publish(Clock(clock=time_message(begin + (time.monotonic_ns() - begin) // 2)))

    clock = threading.Thread(target=run)
    clock.start()
    try:
        statuses = rig.collect(PolicyStatus, "/policy_node/status")
        diagnostics = rig.collect(DiagnosticArray, "/diagnostics")
        demo_robot({"use_sim_time": True})
        node = policy_node(use_sim_time=True)
        told = statuses.wait_for(
            lambda m: m.state == PolicyStatus.STATE_RUNNING and m.reason == Reason.CLOCK_RATE, timeout=60.0
        )
        assert "of real time" in told.message
        node.wait_for_line("of real time, commands and limits are timed by real time")
        since = time.monotonic()
        entry = diagnostics.wait_for(lambda m: m.status[0].name.endswith("policy"), since=since).status[0]
        values = {pair.key: pair.value for pair in entry.values}
        assert float(values["real_time_factor"]) == pytest.approx(0.5, abs=0.05)
        assert values["problems.clock_rate"] == "1"
    finally:
        stop.set()
        clock.join()
