"""Rows 1 to 13: what cameras and joint states can do. The robot is held until they are well again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fault_bench import HEALTHY, SLACK, FaultBench
from fault_table import Outcome

from flashrt_ros.core.reasons import Reason


@dataclass(frozen=True)
class Row:
    """options of the demo robot that cause it; reasons: codes of which /diagnostics must show one."""

    number: int
    cause: str
    options: dict[str, Any] = field(hash=False)
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        return f"{self.number:02d}-{self.cause.replace(' ', '-')}"


ROWS = (
    Row(1, "camera stops", {"wrist_camera.drop": 1.0}, (Reason.STALE_RECEIPT,)),
    Row(2, "camera stamp frozen while messages flow", {"wrist_camera.freeze_stamp": True},
        (Reason.STALE_STAMP,)),
    Row(4, "one camera late (skew)", {"base_camera.delay": 0.6}, (Reason.SKEW,)),
    Row(5, "image size changes", {"base_camera.width": 128}, (Reason.IMAGE_SIZE,)),
    Row(6, "image encoding changes", {"base_camera.encoding": "bgr8"}, (Reason.IMAGE_ENCODING,)),
    Row(7, "truncated JPEG", {"wrist_camera.truncate": 0.5}, (Reason.IMAGE_DECODE,)),
    Row(8, "joint states stop", {"joint_states.drop": 1.0}, (Reason.STALE_RECEIPT,)),
    Row(9, "joint missing", {"joint_states.missing": "elbow"}, (Reason.JOINT_MISSING,)),
    Row(10, "joint renamed", {"joint_states.rename": "elbow:elbow_2"}, (Reason.JOINT_MISSING,)),
    Row(12, "NaN in joint state", {"joint_states.nan": "elbow"}, (Reason.JOINT_NOT_FINITE,)),
    Row(13, "Inf in joint state", {"joint_states.inf": "elbow"}, (Reason.JOINT_NOT_FINITE,)),
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_stream_that_fails_holds_the_robot_until_it_is_well(bench: FaultBench, row: Row, passed) -> None:
    code, to_hold = held_until_well(bench, row)
    passed(Outcome(row.number, row.cause, code, to_hold, "by itself"))


def test_3_camera_clock_offset(bench: FaultBench, passed) -> None:
    """To either side: a clock ahead is noticed by its stamps from the future, one behind by their age."""
    cause = "camera clock ahead, then behind"
    ahead = held_until_well(bench, Row(3, cause, {"wrist_camera.stamp_offset": 5.0}, (Reason.CLOCK,)))
    behind = held_until_well(bench, Row(3, cause, {"wrist_camera.stamp_offset": -5.0}, (Reason.STALE_STAMP,)))
    code = f"{ahead[0]}, then {behind[0]}"
    passed(Outcome(3, cause, code, max(ahead[1], behind[1]), "by itself"))


def held_until_well(bench: FaultBench, row: Row) -> tuple[str, float]:
    """Code and time to hold of a row whose options are set and then healed."""
    before, begin = bench.counts(), time.monotonic()
    bench.set_parameters("/demo_robot", row.options)
    caused = time.monotonic()  # in force by now
    code = bench.wait_code(row.reasons, begin, before)
    to_hold = bench.wait_hold(caused)
    assert to_hold <= bench.watchdog + SLACK
    bench.check_cap(begin)
    healed = time.monotonic()
    bench.set_parameters("/demo_robot", {name: HEALTHY[name] for name in row.options})
    bench.wait_running(since=healed)
    return code, to_hold


def test_11_joints_reordered_simply_works(bench: FaultBench, passed) -> None:
    begin = time.monotonic()
    bench.set_robot(joint_states__reverse=True)
    caused = time.monotonic()
    bench.never_stops(caused, 2.0)
    # The sway begins at the state that the policy was shown: in another order it would begin elsewhere.
    home = {"shoulder_lift": -1.2, "elbow": 1.0}
    names = list(bench.contract.action.joints)
    for chunk in bench.chunks.since(caused):
        first = dict(zip(names, np.reshape(chunk.data, (chunk.horizon, chunk.dof))[0], strict=True))
        assert abs(first["gripper"]) <= 0.05
        assert all(np.sign(first[name]) == np.sign(value) for name, value in home.items())
    bench.check_cap(begin)
    passed(Outcome(11, "joints reordered", "none", None, "nothing to recover from"))
