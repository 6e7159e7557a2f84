"""A robot that is left running: random faults and prompt changes, and nothing wears out.

`make soak` runs it for MINUTES=30; one minute is part of the fast tests, where it may meet other load.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from fault_bench import HEALTHY, FaultBench
from ros_rig import wait_until

from flashrt_ros.core.timeline import STALL_PERIODS
from flashrt_ros.core.timing import stamp_to_ns
from flashrt_ros.srv import SetPrompt

MINUTES = float(os.environ.get("FLASHRT_SOAK_MINUTES", "1"))
MINUTE, SHORT_WARM_UP = 60.0, 10.0  # [s]
LOADED = 0.005  # share of commands that may be late where other programs want the processors too
GROWTH = 0.02  # of resident memory
LATE = 1.5  # control periods between two commands that count as a missed deadline
STREAM_FAULTS = (
    {"wrist_camera.drop": 1.0}, {"wrist_camera.freeze_stamp": True}, {"base_camera.stamp_offset": 5.0},
    {"base_camera.width": 128}, {"base_camera.encoding": "bgr8"}, {"wrist_camera.truncate": 0.5},
    {"joint_states.drop": 1.0}, {"joint_states.missing": "elbow"}, {"joint_states.nan": "elbow"},
    {"wrist_camera.drop": 0.5}, {"joint_states.reverse": True},
)
POLICY_FAULTS = ("nan", "inf", "raise", "seam", "velocity")
PROMPTS = ("wave", "stack the blocks", "open the gripper", "point at the red block")


@dataclass
class Process:
    """What a process holds of the system."""

    memory: int  # resident [bytes]
    threads: int
    handles: int

    @classmethod
    def of(cls, pid: int) -> Process:
        root = Path(f"/proc/{pid}")
        pages = int((root / "statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(list((root / "task").iterdir())),
                   len(list((root / "fd").iterdir())))


@dataclass
class Tally:
    """What happened, for the line at the end."""

    healthy: float = 0.0  # [s]
    commands: int = 0
    faults: int = 0
    prompts: int = 0
    holds: int = 0
    longest: float = 0.0  # between two commands of a healthy time [control periods]
    late: list[float] = field(default_factory=list)


def soak(bench: FaultBench, seconds: float, seed: int = 0) -> Tally:
    """Fault and health in turns until `seconds` are over; fails when health does not come back."""
    rng, tally, end = random.Random(seed), Tally(), time.monotonic() + seconds
    while time.monotonic() < end:
        with _fault(bench, rng, tally):
            _sleep(rng.uniform(0.1, 1.5))
        bench.wait_running()
        _be_healthy(bench, rng, tally)
    return tally


@contextlib.contextmanager
def _fault(bench: FaultBench, rng: random.Random, tally: Tally) -> Iterator[None]:
    kind = rng.choice(("stream", "stream", "policy", "hold"))
    if kind == "stream":
        options = rng.choice(STREAM_FAULTS)
        bench.set_parameters("/demo_robot", options)
        yield
        bench.set_parameters("/demo_robot", {name: HEALTHY[name] for name in options})
    elif kind == "policy":
        bench.order(rng.choice(POLICY_FAULTS), rng.choice((1, 3, -1)), sleep=rng.choice((0.0, 0.0, 0.3)))
        yield
        bench.order()
        bench.call("reset_fault")
    else:
        assert bench.call("hold").success
        yield
        assert bench.call("resume").success
        tally.holds += 1
    tally.faults += 1


def _be_healthy(bench: FaultBench, rng: random.Random, tally: Tally) -> None:
    """Some undisturbed seconds with prompt changes: commands must come at every period."""
    begin = time.monotonic()
    for _ in range(rng.randint(1, 4)):
        prompt = rng.choice(PROMPTS)
        answer = bench.rig.call(SetPrompt, "/policy_node/set_prompt", prompt=prompt, reset=False)
        assert answer.success, answer.message
        tally.prompts += 1
        _sleep(rng.uniform(0.2, 0.8))
    period = bench.contract.rates.control_period
    stamps = [stamp_to_ns(command.header.stamp) for command in bench.commands.since(begin)]
    gaps = np.diff(stamps) / period
    tally.healthy += time.monotonic() - begin
    tally.commands += len(stamps)
    tally.longest = max([tally.longest, *gaps])
    tally.late += [gap for gap in gaps if gap > LATE]
    for collector in (bench.commands, bench.statuses, bench.reports, bench.chunks):
        collector.forget(time.monotonic() - 2.0)  # or this process would be the one that grows


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 1.0, "time to pass")


def check(bench: FaultBench, seconds: float, warm_up: float, late: float) -> None:
    """Soak, compare the node with how it was after `warm_up`, and end it. late: share of commands that may
    be."""
    soak(bench, warm_up, seed=1)
    before = Process.of(bench.node.pid)
    missed = int(bench.counts()["control_ticks_missed"])
    tally = soak(bench, seconds, seed=2)
    after = Process.of(bench.node.pid)
    growth = after.memory / before.memory - 1.0
    wait_until(lambda: bench.counts(), 5.0, "a report")
    missed = int(bench.counts()["control_ticks_missed"]) - missed
    print(
        f"\nsoak: {seconds:.0f} s after {warm_up:.0f} s of warm-up; {tally.faults} faults, "
        f"{tally.prompts} prompts, {tally.holds} holds; {tally.commands} commands in {tally.healthy:.0f} "
        f"healthy seconds, longest gap {tally.longest:.2f} periods, {len(tally.late)} late; "
        f"{missed} ticks missed in all; memory {before.memory >> 20} -> {after.memory >> 20} MiB "
        f"({100 * growth:+.2f} %), {before.threads} -> {after.threads} threads, "
        f"{before.handles} -> {after.handles} handles"
    )
    assert len(tally.late) <= late * tally.commands
    assert tally.longest < STALL_PERIODS, "a gap that the node itself calls a stall"
    assert growth <= GROWTH
    assert (after.threads, after.handles) == (before.threads, before.handles)
    assert bench.node.end() == 0, bench.node.output
    assert "Traceback" not in bench.node.output


def test_soak_for_a_minute(bench: FaultBench) -> None:
    """Memory still settles after this warm-up, by 0.1 to 0.9 % within the minute: the 2 % are for leaks, such
    as of one observation in five."""
    check(bench, MINUTE, SHORT_WARM_UP, LOADED)


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 * 1.5 + 300)
def test_soak_for_minutes(bench: FaultBench) -> None:
    check(bench, MINUTES * 60.0, warm_up=60.0, late=0.0)
