"""Ticks that stop coming while the arm brakes: the controller has finished its trajectory by then, so the
next command starts from where the arm is. And a hold that takes time to brake never drives back.
"""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import PERIOD, Clock, commander_of, published, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.commander import Output
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind

Small = Callable[..., RobotContract]
LIMITS = ((-9.0, 9.0, 1.0, 2.0), (-9.0, 9.0, 1.0, 2.0))
STEP = 1.0 * 0.02  # at the velocity limit in one control period


class Followed:
    """A trajectory controller: it goes to each command, and along the last trajectory when none follows."""

    def __init__(self, small: Small, representation: str, deadline: float) -> None:
        contract = small(
            representation=representation, lookahead=0.1, limits=LIMITS, hold_deadline=deadline, cap=0.4
        )
        self.representation, self.clock = representation, Clock()
        self.commander, self.arm = commander_of(contract, clock=self.clock)
        self.ahead: np.ndarray | None = None
        self.sent = 0

    def chunk(self, speed: float) -> None:
        steps = np.tile([speed * 0.02, -speed * 0.02], (20, 1))
        delta = self.representation == "delta"
        submit(self.commander, steps if delta else self.arm.positions + np.cumsum(steps, axis=0))

    def judge(self, output: Output | None) -> None:
        if output is None or output.positions is None:
            return
        assert np.all(np.abs(output.positions - self.arm.positions) <= STEP * (1 + 1e-6)), "a jump"
        assert output.trajectory is not None
        self.arm.positions, self.ahead = output.positions, output.trajectory.positions[-1]
        self.sent += 1

    def tick(self, count: int = 1) -> Output:
        for _ in range(count):
            self.clock.now += PERIOD
            output = self.commander.tick()
            self.judge(output)
        return output

    def stall(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self.ahead is not None:
            self.arm.positions = self.ahead


@pytest.mark.parametrize("representation", ["absolute", "delta"])
@pytest.mark.parametrize("deadline", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("ticks", [21, 22, 24])
def test_a_stall_while_braking(small: Small, representation: str, deadline: float, ticks: int) -> None:
    robot = Followed(small, representation, deadline)
    robot.chunk(0.9)
    robot.tick(ticks)
    sent = robot.sent
    robot.stall(1.2)
    output = robot.tick()
    assert output.kind is CommandKind.HOLDING
    assert output.positions is not None
    np.testing.assert_allclose(output.positions, robot.arm.positions)
    assert robot.sent == sent + 1
    assert robot.tick(3).kind is CommandKind.STOPPED


@pytest.mark.parametrize("representation", ["absolute", "delta"])
@pytest.mark.parametrize("last", ["farewell", "pause"])
def test_the_last_word_after_a_stall_while_braking(small: Small, representation: str, last: str) -> None:
    robot = Followed(small, representation, 0.0)
    robot.chunk(0.9)
    robot.tick(22)
    robot.stall(1.0)
    if last == "farewell":
        robot.judge(robot.commander.farewell())
    else:
        robot.commander.pause(Reason.HELD, "stop", bounded=True)
        robot.tick()
    assert robot.sent == 23


def test_a_stall_while_braking_of_an_arm_that_nobody_sees(small: Small) -> None:
    robot = Followed(small, "absolute", 0.0)
    robot.chunk(0.9)
    robot.tick(22)
    robot.stall(1.0)
    robot.arm.error = IngestError(Reason.NO_MESSAGE, "joint_states", "gone")
    assert robot.tick().values is None
    assert robot.commander.farewell() is None


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("tick"), st.integers(1, 12)),
            st.tuples(st.just("chunk"), st.sampled_from([-0.9, 0.3, 0.9])),
            st.tuples(st.just("stall"), st.sampled_from([0.15, 0.5, 2.0])),
            st.tuples(st.sampled_from(["fault", "hold", "resume", "bump"]), st.just(0)),
        ),
        max_size=25,
    ),
    representation=st.sampled_from(["absolute", "delta"]),
    deadline=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
)
def test_no_command_is_further_than_a_step_from_the_arm(
    small: Small, events: list[tuple[str, float]], representation: str, deadline: float
) -> None:
    robot = Followed(small, representation, deadline)
    robot.chunk(0.9)
    robot.tick(8)
    for name, argument in events:
        if name == "tick":
            robot.tick(int(argument))
        elif name == "chunk":
            robot.chunk(argument)
        elif name == "stall":
            robot.stall(argument)
            robot.tick()
        elif name == "bump":
            robot.commander.timeline.bump_generation()
        elif name == "resume":
            robot.commander.resume()
        else:
            robot.commander.pause(Reason.HELD, name, bounded=name == "fault")
    robot.judge(robot.commander.farewell())


@pytest.mark.parametrize("representation", ["absolute", "delta"])
def test_a_hold_brakes_and_stays(small: Small, representation: str) -> None:
    robot = Followed(small, representation, 1.0)
    robot.chunk(0.9)
    before = robot.tick(19).positions
    farewell = robot.commander.farewell()
    assert before is not None
    assert farewell is not None
    assert farewell.trajectory is not None
    path = np.concatenate([before[None, :], farewell.trajectory.positions])
    steps = np.diff(path, axis=0) * np.array([1.0, -1.0])
    assert steps[0].min() > 0.0, "it was not moving"
    assert steps.min() >= 0.0, "it drives back"
    assert published(farewell).shape == (2,)
