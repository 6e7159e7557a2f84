"""What comes before silence: a hold, and for velocities zero, whatever the deadlines and the events."""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import PERIOD, Clock, commander_of, constant, published, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind

Small = Callable[..., RobotContract]
RUNNING, HOLDING, STOPPED = CommandKind.RUNNING, CommandKind.HOLDING, CommandKind.STOPPED
REPRESENTATIONS = pytest.mark.parametrize("representation", ["absolute", "delta", "velocity"])


def contract_of(small: Small, representation: str, **more: object) -> RobotContract:
    lookahead = 0.0 if representation == "velocity" else 0.1
    return small(representation=representation, lookahead=lookahead, **more)


@REPRESENTATIONS
def test_a_deadline_of_zero_leaves_one_hold_when_actions_run_out(small: Small, representation: str) -> None:
    commander, _ = commander_of(contract_of(small, representation, cap=0.04, hold_deadline=0.0))
    submit(commander, constant(0.01, 0.1))
    outputs = [commander.tick() for _ in range(5)]
    assert [output.kind for output in outputs] == [RUNNING, RUNNING, HOLDING, STOPPED, STOPPED]
    if representation == "velocity":
        assert not published(outputs[2]).any()


@REPRESENTATIONS
def test_a_deadline_of_zero_leaves_one_hold_when_a_fault_comes(small: Small, representation: str) -> None:
    """By the tick after the fault its bound is over."""
    clock = Clock()
    commander, _ = commander_of(contract_of(small, representation, hold_deadline=0.0), clock=clock)
    submit(commander, constant(0.01, 0.1))
    commander.tick()
    commander.pause(Reason.INFERENCE_ERROR, "broken", bounded=True)
    outputs = []
    for _ in range(3):
        clock.advance(0.02)
        outputs.append(commander.tick())
    assert [output.kind for output in outputs] == [HOLDING, STOPPED, STOPPED]
    assert {output.reason for output in outputs} == {Reason.INFERENCE_ERROR}
    if representation == "velocity":
        assert not published(outputs[0]).any()


def test_velocities_brake_past_the_deadline(small: Small) -> None:
    limits = ((-9.0, 9.0, 1.0, 2.0), (-9.0, 9.0, 2.0, 100.0))
    commander, _ = commander_of(contract_of(small, "velocity", limits=limits, cap=0.5, hold_deadline=0.04))
    submit(commander, constant(0.39, 0.1, count=25))
    outputs = [commander.tick() for _ in range(50)]
    velocities = [published(output)[0] for output in outputs if output.values is not None]
    assert velocities[24] == pytest.approx(0.39)
    np.testing.assert_allclose(np.diff(velocities[24:-1]), -0.04, atol=1e-6)  # 2 rad/s² at 50 Hz
    assert velocities[-1] == 0.0
    assert len(velocities) == 35
    assert [outputs[27].reason, outputs[35].kind] == [Reason.HOLD_DEADLINE, STOPPED]


@pytest.mark.parametrize("representation", ["absolute", "delta"])
@pytest.mark.parametrize("end", ["starved", "fault"])
def test_positions_brake_past_the_deadline(small: Small, representation: str, end: str) -> None:
    clock = Clock()
    limits = ((-1.0, 1.0, 1.0, 2.0), (0.0, 0.5, 2.0))
    contract = contract_of(small, representation, limits=limits, hold_deadline=0.02)
    commander, _ = commander_of(contract, clock=clock)
    steps = np.column_stack([0.0004 * np.arange(1, 21), np.zeros(20)])  # up to 0.4 rad/s
    positions = np.array([0.0, 0.1]) + np.cumsum(steps, axis=0)
    submit(commander, steps if representation == "delta" else positions)
    reached = [0.0]
    for tick in range(60):
        if end == "fault" and tick == 15:
            commander.pause(Reason.INFERENCE_ERROR, "broken", bounded=True)
        clock.now += PERIOD
        output = commander.tick()
        if output.positions is not None:
            reached.append(output.positions[0])
    speeds = np.diff(reached, prepend=0.0) / 0.02
    assert np.all(np.abs(np.diff(speeds)) <= 2.0 * 0.02)
    assert speeds.max() > 0.25
    assert speeds[-1] == 0.0
    assert output.kind is STOPPED


def test_the_farewell_of_a_braking_arm_is_zero(small: Small) -> None:
    limits = ((-9.0, 9.0, 1.0, 2.0), (-9.0, 9.0, 2.0))
    commander, _ = commander_of(contract_of(small, "velocity", limits=limits, cap=0.5, hold_deadline=0.0))
    submit(commander, constant(0.4, 0.1, count=25))
    assert published([commander.tick() for _ in range(28)][-1])[0] > 0.2
    farewell = commander.farewell()
    assert farewell is not None
    assert not published(farewell).any()


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ticks"), st.integers(1, 15)),
        st.tuples(st.just("chunk"), st.integers(0, 2**31)),
        st.tuples(st.sampled_from(["bump", "fault", "hold", "resume", "farewell"]), st.just(0)),
        st.tuples(st.just("blind"), st.integers(0, 1)),
        st.tuples(st.just("stall"), st.integers(0, 1)),
    ),
    max_size=30,
)


class Watched:
    """A commander of velocities whose arm follows; every output is judged by what came before it."""

    def __init__(self, contract: RobotContract) -> None:
        self.clock = Clock()
        self.commander, self.arm = commander_of(contract, clock=self.clock)
        self.acceleration = self.commander.limiter.acceleration
        self.last: np.ndarray | None = None  # sent last, None after silence
        self.stalled = False
        self.sent = 0

    def tick(self) -> None:
        self.clock.now += PERIOD
        self.judge(self.commander.tick().values)
        self.stalled = False

    def judge(self, values: np.ndarray | None) -> None:
        if values is None:
            assert self.last is None or not self.last.any(), "silence after a velocity"
        else:
            self.sent += 1
            before = np.zeros(2) if self.last is None else self.last
            if not self.stalled:
                assert np.all(np.abs(values - before) <= self.acceleration * 0.02)
            self.arm.positions = self.arm.positions + 0.02 * values
        self.last = values

    def play(self, name: str, argument: int) -> None:
        if name == "ticks":
            for _ in range(argument):
                self.tick()
        elif name == "chunk":
            rng = np.random.default_rng(argument)
            submit(self.commander, np.clip(np.cumsum(rng.normal(size=(12, 2)) * 0.03, axis=0), -1, 1))
        elif name == "bump":
            self.commander.timeline.bump_generation()
        elif name in ("fault", "hold"):
            self.commander.pause(Reason.HELD, name, bounded=name == "fault")
        elif name == "resume":
            self.commander.resume()
        elif name == "blind":
            self.arm.error = IngestError(Reason.NO_MESSAGE, "joint_states", "gone") if argument else None
        elif name == "stall":
            self.clock.advance(0.5)
            self.stalled = True
        else:
            self.stop()

    def stop(self) -> None:
        """As a node does: the last word, then a fresh start."""
        farewell = self.commander.farewell()
        if farewell is None:
            assert self.last is None or not self.last.any(), "stopped without a word"
        else:
            assert not published(farewell).any()
        self.commander.reset()
        self.last = None


SCENARIO = {
    "events": EVENTS, "deadline": st.sampled_from([0.0, 0.01, 0.02, 0.1]),
    "acceleration": st.sampled_from([None, 2.0, 30.0]), "on_violation": st.sampled_from(["clamp", "reject"]),
}


def watched(
    small: Small, events: list[tuple[str, int]], deadline: float, acceleration: float | None,
    on_violation: str,
) -> Watched:
    limits = ((-1.0, 1.0, 1.0, acceleration), (-0.5, 0.5, 2.0, acceleration))
    it = Watched(contract_of(
        small, "velocity", limits=limits, cap=0.2, hold_deadline=deadline, on_violation=on_violation
    ))
    for name, argument in [("chunk", 0), ("ticks", 6), *events]:
        it.play(name, argument)
    it.stop()
    return it


@settings(max_examples=150, deadline=None)
@given(**SCENARIO)
def test_silence_never_follows_a_velocity(
    small: Small, events: list[tuple[str, int]], deadline: float, acceleration: float | None,
    on_violation: str,
) -> None:
    watched(small, events, deadline, acceleration, on_violation)


def test_the_scenarios_do_move(small: Small) -> None:
    """The property above is not vacuous."""
    events = [("fault", 0), ("ticks", 15), ("resume", 0), ("chunk", 2), ("ticks", 15)]
    assert watched(small, events, 0.0, 2.0, "clamp").sent > 16
