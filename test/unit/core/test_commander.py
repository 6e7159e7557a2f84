"""Timeline and limiter together: what is published for arbitrary chunks, every representation, both modes."""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import PERIOD, Clock, commander_of, constant, published, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.commander import Commander, Output
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import Accepted, CommandKind, Dropped

Small = Callable[..., RobotContract]


def test_silent_until_a_chunk_comes(small: Small) -> None:
    commander, _ = commander_of(small())
    output = commander.tick()
    assert output.kind is CommandKind.WAITING
    assert (output.values, output.trajectory, output.reason) == (None, None, Reason.NO_CHUNK)
    assert commander.farewell() is None


def test_first_command_is_limited_from_the_measured_position(small: Small) -> None:
    commander, _ = commander_of(small(), 0.3, 0.1)
    submit(commander, constant(-0.5, 0.1))
    outputs = [commander.tick() for _ in range(3)]
    np.testing.assert_allclose([published(output)[0] for output in outputs], [0.28, 0.26, 0.24], atol=1e-6)
    assert [violation.joint for violation in outputs[0].violations] == ["shoulder_pan"]
    assert outputs[0].reason is Reason.OK


def test_trajectory_carries_the_command_and_its_limited_future(small: Small) -> None:
    commander, _ = commander_of(small())
    submit(commander, constant(0.5, 0.1))
    trajectory = commander.tick().trajectory
    assert trajectory is not None
    np.testing.assert_allclose(trajectory.positions[:, 0], 0.02 * np.arange(1, 7), atol=1e-6)
    assert trajectory.offsets.tolist() == [PERIOD * i for i in range(6)]
    np.testing.assert_allclose(trajectory.velocities[:-1, 0], 1.0, atol=1e-6)
    assert not trajectory.velocities[-1].any()


def test_hold_repeats_what_was_sent_not_what_was_wished(small: Small) -> None:
    commander, _ = commander_of(small(cap=0.04))
    submit(commander, constant(0.9, 0.1))
    sent = [published(commander.tick()) for _ in range(2)]
    held = commander.tick()
    assert held.kind is CommandKind.HOLDING
    assert held.reason is Reason.STARVED
    assert held.message == Reason.STARVED.text
    np.testing.assert_array_equal(published(held), sent[-1])
    assert held.trajectory is not None
    np.testing.assert_allclose(held.trajectory.positions, np.tile(sent[-1], (3, 1)))


def test_after_a_stop_it_starts_again_from_where_the_arm_is(small: Small) -> None:
    commander, arm = commander_of(small(cap=0.02, hold_deadline=0.02))
    submit(commander, constant(0.01, 0.1))
    kinds = [commander.tick().kind for _ in range(3)]
    assert kinds == [CommandKind.RUNNING, CommandKind.HOLDING, CommandKind.STOPPED]
    stopped = commander.tick()
    assert (stopped.kind, stopped.reason, stopped.values) == (CommandKind.STOPPED, Reason.HOLD_DEADLINE, None)
    arm.positions = np.array([-0.8, 0.4])  # moved by hand meanwhile
    submit(commander, constant(0.01, 0.1))
    np.testing.assert_allclose(published(commander.tick()), [-0.78, 0.36], atol=1e-6)


def test_no_start_without_a_measured_position_and_nothing_is_consumed(small: Small) -> None:
    commander, arm = commander_of(small())
    arm.error = IngestError(Reason.STALE_RECEIPT, "joint_states", "joint positions are 3.000 s old")
    submit(commander, constant(0.01, 0.1))
    output = commander.tick()
    assert (output.kind, output.reason) == (CommandKind.WAITING, Reason.STALE_RECEIPT)
    assert output.message == "joint_states: joint positions are 3.000 s old"
    arm.error = None
    assert commander.tick().index == 0


def test_a_chunk_that_waits_for_a_measured_position_expires(small: Small) -> None:
    clock = Clock()
    commander, arm = commander_of(small(cap=0.5), clock=clock)
    arm.error = IngestError(Reason.STALE_RECEIPT, "joint_states", "joint positions are 3.000 s old")
    submit(commander, constant(0.01, 0.1))
    reasons = []
    for _ in range(30):
        reasons.append(commander.tick().reason)
        clock.advance(0.02)
    assert reasons[0] is Reason.STALE_RECEIPT
    assert reasons[-1] is Reason.CHUNK_LATE
    arm.error = None
    output = commander.tick()
    assert (output.kind, output.reason, output.values) == (CommandKind.WAITING, Reason.CHUNK_LATE, None)
    submit(commander, constant(0.01, 0.1))
    assert commander.tick().index == 0


def test_no_start_from_far_outside_the_limits(small: Small) -> None:
    commander, arm = commander_of(small(), 1.2, 0.1)
    submit(commander, constant(0.01, 0.1))
    output = commander.tick()
    assert (output.kind, output.values) == (CommandKind.WAITING, None)
    assert output.reason is Reason.START_OUTSIDE_LIMITS
    assert "joint shoulder_pan is at 1.2" in output.message
    arm.positions[0] = 0.0
    assert commander.tick().kind is CommandKind.RUNNING


def test_reject_drops_a_chunk_that_breaks_a_limit_inside_or_at_its_seam(small: Small) -> None:
    commander, _ = commander_of(small(on_violation="reject", blend_steps=0))
    assert isinstance(submit(commander, constant(0.01, 0.1)), Accepted)
    first = published(commander.tick())
    jump = submit(commander, constant(0.4, 0.1))
    inside = constant(0.01, 0.1)
    inside[7, 1] = 0.6
    outside = submit(commander, inside)
    assert isinstance(jump, Dropped)
    assert isinstance(outside, Dropped)
    assert jump.reason is Reason.LIMIT_VELOCITY
    assert "joint shoulder_pan" in jump.message
    assert outside.reason is Reason.LIMIT_POSITION
    np.testing.assert_array_equal(published(commander.tick()), first)


def test_reject_judges_the_first_chunk_from_the_measured_position(small: Small) -> None:
    commander, arm = commander_of(small(on_violation="reject"))
    dropped = submit(commander, constant(0.3, 0.1))
    assert isinstance(dropped, Dropped)
    assert dropped.reason is Reason.LIMIT_VELOCITY
    arm.error = IngestError(Reason.NO_MESSAGE, "joint_states", "no joint positions yet")
    unmeasured = submit(commander, constant(0.0, 0.1))
    assert isinstance(unmeasured, Dropped)
    assert unmeasured.reason is Reason.NO_MESSAGE


def test_reject_at_the_tick_holds_or_waits_and_says_why(small: Small) -> None:
    """The arm moved between the chunk's admission and its first command."""
    commander, arm = commander_of(small(on_violation="reject", hold_deadline=1.0))
    assert isinstance(submit(commander, constant(0.0, 0.1)), Accepted)
    arm.positions[0] = 0.5
    output = commander.tick()
    assert (output.kind, output.reason, output.values) == (CommandKind.WAITING, Reason.LIMIT_VELOCITY, None)
    assert output.violations
    assert output.refused
    assert commander.tick().kind is CommandKind.WAITING
    assert isinstance(submit(commander, constant(0.5, 0.1)), Accepted)
    running = commander.tick()
    assert (running.kind, running.refused) == (CommandKind.RUNNING, False)


def test_reject_at_the_tick_tells_once_that_a_chunk_was_refused(small: Small) -> None:
    """The limits become narrower under a chunk that plays."""
    commander, _ = commander_of(small(on_violation="reject"))
    submit(commander, np.column_stack([0.01 * np.arange(1, 21), np.full(20, 0.1)]))
    sent = [published(commander.tick())[0] for _ in range(3)][-1]
    commander.adopt_limits(small(on_violation="reject", limits=((-1.0, 0.035, 1.0), (0.0, 0.5, 2.0))))
    outputs = [commander.tick() for _ in range(3)]
    assert [output.refused for output in outputs] == [True, False, False]
    for output in outputs:
        assert (output.kind, output.reason) == (CommandKind.HOLDING, Reason.LIMIT_POSITION)
        assert published(output)[0] == sent


def test_bumped_generation_holds_reset_forgets(small: Small) -> None:
    commander, _ = commander_of(small())
    submit(commander, constant(0.01, 0.1))
    sent = published(commander.tick())
    commander.timeline.bump_generation()
    held = commander.tick()
    assert (held.kind, held.reason, held.generation) == (CommandKind.HOLDING, Reason.NO_CHUNK, 1)
    np.testing.assert_array_equal(published(held), sent)
    farewell = commander.farewell()
    assert farewell is not None
    np.testing.assert_array_equal(published(farewell), sent)
    assert commander.reset() == 2
    assert commander.farewell() is None
    assert commander.tick().kind is CommandKind.WAITING


def test_a_chunk_that_is_not_finite_changes_nothing(small: Small) -> None:
    commander, _ = commander_of(small())
    submit(commander, constant(0.01, 0.1))
    commander.tick()
    bad = constant(0.01, 0.1)
    bad[19, 0] = np.nan
    dropped = submit(commander, bad)
    assert isinstance(dropped, Dropped)
    assert dropped.reason is Reason.CHUNK_NOT_FINITE
    assert commander.tick().index == 1


def test_delta_commands_integrate_into_a_trajectory(small: Small) -> None:
    commander, _ = commander_of(small(representation="delta", blend_steps=0, hold_deadline=1.0))
    submit(commander, constant(0.01, -0.002, count=3))
    outputs = [commander.tick() for _ in range(4)]
    np.testing.assert_allclose(
        [output.trajectory.positions[0] for output in outputs if output.trajectory is not None],
        [[0.01, 0.098], [0.02, 0.096], [0.03, 0.094], [0.03, 0.094]],
    )
    assert published(outputs[3]).tolist() == [0.0, 0.0]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ticks"), st.integers(1, 12)),
        st.tuples(st.just("chunk"), st.integers(0, 2**31)),
        st.tuples(st.just("mark"), st.just(0)),
        st.tuples(st.just("late"), st.integers(0, 2**31)),
        st.tuples(st.just("bump"), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 2**31)),
        st.tuples(st.just("blind"), st.integers(0, 1)),
    ),
    max_size=30,
)
SCENARIO = {
    "events": EVENTS, "representation": st.sampled_from(["absolute", "delta", "velocity"]),
    "on_violation": st.sampled_from(["clamp", "reject"]), "ratio": st.integers(1, 3),
    "spread": st.sampled_from([0.01, 0.05, 1.0, 1e9, 1e308]), "blend_steps": st.integers(0, 5),
}


def drive(
    contract: RobotContract, events: list[tuple[str, int]], spread: float, representation: str
) -> int:
    """Play a scenario, check every published command; returns how many there were."""
    commander, arm = commander_of(contract, 0.0, 0.1)
    mark = commander.mark_observation()
    period = contract.rates.control_period / 1e9
    before: np.ndarray | None = None
    count = 0
    for name, argument in events:
        rng = np.random.default_rng(argument)
        if name == "chunk":
            submit(commander, rng.uniform(-1, 1, (12, 2)) * spread)
        elif name == "late":
            commander.submit(rng.uniform(-1, 1, (12, 2)) * spread, mark)
        elif name == "mark":
            mark = commander.mark_observation()
        elif name == "bump":
            commander.timeline.bump_generation()
        elif name == "move":
            arm.positions = rng.uniform([-1.3, -0.2], [1.3, 0.7])
        elif name == "blind":
            arm.error = IngestError(Reason.NO_MESSAGE, "joint_states", "gone") if argument else None
        else:
            for _ in range(argument):
                measured = arm.positions.copy()
                before = check_output(commander, commander.tick(), before, measured, period, representation)
                count += before is not None
    return count


def check_output(
    commander: Commander, output: Output, before: np.ndarray | None, measured: np.ndarray, period: float,
    representation: str,
) -> np.ndarray | None:
    """Every rule on one output; returns the position it leads to, None after silence."""
    limiter = commander.limiter
    if output.values is None:
        assert output.kind in (CommandKind.WAITING, CommandKind.STOPPED)
        assert output.trajectory is None
        return None
    assert np.isfinite(output.values).all()
    if output.kind is CommandKind.HOLDING and representation != "absolute":
        assert not output.values.any()
    if representation == "velocity":
        assert np.all(np.abs(output.values) <= limiter.velocity)
        return measured
    start = measured if before is None else before
    here = output.values if representation == "absolute" else None
    if output.trajectory is not None:
        positions = output.trajectory.positions
        here = positions[0] if here is None else here
        np.testing.assert_array_equal(here, positions[0])
        assert np.all((positions >= limiter.lower) & (positions <= limiter.upper))
        seconds = np.diff(output.trajectory.offsets)[:, None] / 1e9
        assert np.all(np.abs(np.diff(positions, axis=0)) <= limiter.velocity * seconds)
        assert np.all(np.abs(output.trajectory.velocities) <= limiter.velocity)
        assert not output.trajectory.velocities[-1].any()
        assert np.all(np.diff(output.trajectory.offsets) > 0)
    assert here is not None
    assert np.all((here >= limiter.lower) & (here <= limiter.upper))
    assert np.all(np.abs(here - start) <= limiter.velocity * period)
    if output.kind is CommandKind.HOLDING and before is not None:
        np.testing.assert_array_equal(here, before)
    return here


@settings(max_examples=200, deadline=None)
@given(**SCENARIO)
def test_nothing_published_is_ever_beyond_a_limit(
    small: Small, events: list[tuple[str, int]], representation: str, on_violation: str, ratio: int,
    spread: float, blend_steps: int,
) -> None:
    contract = small(
        representation=representation, on_violation=on_violation, blend_steps=blend_steps,
        control_period=PERIOD // ratio, lookahead=0 if representation == "velocity" else 0.1,
    )
    drive(contract, events, spread, representation)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None)
@given(**SCENARIO)
def test_thousands_of_scenarios_within_limits(
    small: Small, events: list[tuple[str, int]], representation: str, on_violation: str, ratio: int,
    spread: float, blend_steps: int,
) -> None:
    contract = small(
        representation=representation, on_violation=on_violation, blend_steps=blend_steps,
        control_period=PERIOD // ratio, lookahead=0 if representation == "velocity" else 0.1,
    )
    drive(contract, events, spread, representation)


def test_the_scenarios_do_publish(small: Small) -> None:
    """The property above is not vacuous."""
    events = [("chunk", 1), ("ticks", 5), ("mark", 0), ("ticks", 2), ("late", 2), ("ticks", 30)]
    assert drive(small(), events, 0.05, "absolute") > 12


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), representation=st.sampled_from(["absolute", "delta"]),
    blend_steps=st.sampled_from([0, 4]), ratio=st.sampled_from([1, 2]), acceleration=st.floats(0.1, 50),
)
def test_no_acceleration_beyond_its_limit_from_start_to_farewell(
    small: Small, seed: int, representation: str, blend_steps: int, ratio: int, acceleration: float
) -> None:
    """Random chunks, starvation, a pause and a stop: what goes out speeds up and brakes within the limit."""
    limits = ((-1.0, 1.0, 1.0, acceleration), (0.0, 0.5, 2.0))
    period = PERIOD // ratio
    contract = small(
        representation=representation, limits=limits, blend_steps=blend_steps, control_period=period,
        hold_deadline=2.0,
    )
    rng, clock = np.random.default_rng(seed), Clock()
    commander, _ = commander_of(contract, clock=clock)
    position, speed, outputs, limiter = np.array([0.0, 0.1]), np.zeros(2), 0, commander.limiter

    def check(output: Output) -> None:
        nonlocal position, speed, outputs
        if output.values is None:
            return
        assert output.positions is not None
        new = (output.positions - position) / (period / 1e9)
        assert abs(new[0] - speed[0]) / (period / 1e9) <= acceleration
        assert np.all((output.positions >= limiter.lower) & (output.positions <= limiter.upper))
        if output.kind is CommandKind.HOLDING:
            assert Reason.LIMIT_ACCELERATION not in [violation.reason for violation in output.violations]
        position, speed, outputs = output.positions, new, outputs + 1

    spread = 1.0 if representation == "absolute" else 0.05
    for _ in range(6):
        submit(commander, rng.uniform(-spread, spread, (20, 2)))
        for _ in range(int(rng.integers(1, 40))):
            clock.now += period
            check(commander.tick())
        if rng.random() < 0.3:
            commander.pause(Reason.HELD, "test", bounded=False)
            for _ in range(int(rng.integers(1, 20))):
                clock.now += period
                check(commander.tick())
            commander.resume()
    if (farewell := commander.farewell()) is not None:
        check(farewell)
    assert outputs > 6


def test_a_hold_brakes_and_then_stays(small: Small) -> None:
    commander, _ = commander_of(small(limits=((-1.0, 1.0, 1.0, 2.0), (0.0, 0.5, 2.0)), hold_deadline=2.0))
    submit(commander, np.column_stack([0.0004 * np.cumsum(range(1, 21)), np.full(20, 0.1)]))
    moving = [published(commander.tick())[0] for _ in range(20)]
    holding = [published(commander.tick())[0] for _ in range(40)]
    assert holding[0] > moving[-1]
    assert np.all(np.diff(holding) >= 0)
    assert holding[-1] == holding[-10]
