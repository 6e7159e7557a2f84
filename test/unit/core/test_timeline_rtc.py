"""What real-time chunking needs of the timeline: the plan at an observation, seams that go on, delays."""

from collections.abc import Callable

import numpy as np
import pytest

from flashrt_ros.core.chunk import at_action_rate, at_control_rate
from flashrt_ros.core.contract import Representation, RobotContract
from flashrt_ros.core.delay import DelayEstimate
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import Accepted, Command, CommandKind, Dropped, ObservationMark, Timeline

PERIOD = 20_000_000
ABSOLUTE, DELTA, VELOCITY = Representation.ABSOLUTE, Representation.DELTA, Representation.VELOCITY


def timeline(
    representation: Representation = ABSOLUTE, *, ratio: int = 1, cap: int = 10, blend_steps: int = 4,
    hold: int = 10, dof: int = 1,
) -> Timeline:
    control = PERIOD // ratio
    return Timeline(
        dof, representation, PERIOD, control, cap * PERIOD, blend_steps, hold * control, clock=lambda: 0
    )


def ramp(start: float, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.float64)[:, None]


def accepted(outcome: Accepted | Dropped) -> Accepted:
    assert isinstance(outcome, Accepted), outcome
    return outcome


def value(command: Command) -> float:
    assert command.values is not None
    return float(command.values[0])


def values(line: Timeline, ticks: int) -> list[float]:
    return [value(line.tick()) for _ in range(ticks)]


def test_the_plan_is_what_would_be_played_and_reaches_past_the_cap() -> None:
    line = timeline(cap=6)
    assert line.plan(line.mark_observation()).shape == (0, 1)
    line.submit(ramp(0, 20), line.mark_observation())
    values(line, 2)
    assert line.plan(line.mark_observation())[:, 0].tolist() == list(range(2, 20))
    values(line, 4)
    assert line.tick().kind is CommandKind.HOLDING
    assert len(line.plan(line.mark_observation())) == 0  # a hold is no plan: nothing to go on with


def test_the_plan_has_no_hole_where_the_cap_was_lowered(small: Callable[..., RobotContract]) -> None:
    line = Timeline.from_contract(small(cap=0.2), clock=lambda: 0)
    line.submit(np.tile(ramp(0, 20), (1, 2)), line.mark_observation())
    values(line, 2)
    line.adopt_limits(small(cap=0.1))
    assert line.plan(line.mark_observation())[:, 0].tolist() == list(range(2, 20))
    assert values(line, 3) == [2, 3, 4]
    assert line.tick().kind is CommandKind.HOLDING


def test_the_plan_is_the_blended_one() -> None:
    line = timeline(blend_steps=3)
    line.submit(np.zeros((10, 1)), line.mark_observation())
    line.tick()
    line.submit(np.ones((10, 1)), line.mark_observation())
    plan = line.plan(line.mark_observation())[:, 0]
    np.testing.assert_allclose(plan[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(values(line, 4), plan[:4])


@pytest.mark.parametrize("representation", [ABSOLUTE, DELTA, VELOCITY])
def test_the_plan_is_indexed_by_due_time_in_the_middle_of_an_action(representation: Representation) -> None:
    """Its rows are due when the new chunk's actions are, not when the old one's were."""
    line = timeline(representation, ratio=4, cap=20)
    line.submit(ramp(0, 8), line.mark_observation())
    values(line, 2)
    plan = line.plan(line.mark_observation())[:, 0]
    sent = np.array(values(line, 24))
    actions = sent.reshape(-1, 4)
    expected = {ABSOLUTE: actions[:, 0], DELTA: actions.sum(axis=1), VELOCITY: actions.mean(axis=1)}[
        representation
    ]
    np.testing.assert_allclose(plan[:6], expected)


@pytest.mark.parametrize("representation", [ABSOLUTE, DELTA, VELOCITY])
@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_action_rate_takes_back_control_rate(representation: Representation, ratio: int) -> None:
    actions = np.random.default_rng(ratio).normal(size=(7, 3))
    path = at_control_rate(actions, ratio, representation)
    np.testing.assert_allclose(at_action_rate(path, ratio, representation), actions)


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_chunk_that_keeps_the_plan_is_not_blended_with_it_as_well(ratio: int) -> None:
    """Frozen up to the splice, the commands go on as planned; then they are the new chunk's own."""
    line = timeline(ratio=ratio, cap=20)
    line.submit(ramp(0, 20), line.mark_observation())
    values(line, 3 * ratio)
    mark = line.mark_observation()
    delay = 3
    ticks = (delay - 1) * ratio + 1
    assert values(line, ticks) == (3 + np.arange(ticks) / ratio).tolist()
    chunk = ramp(3, 20)
    chunk[delay:] += 0.5  # where it is free it wants something else
    outcome = accepted(line.submit(chunk, mark, frozen=delay))
    assert (outcome.consumed, outcome.blended) == (ticks, False)
    got = values(line, ratio + 1)
    np.testing.assert_allclose(got[ratio - 1], 6.5)
    assert outcome.jump == pytest.approx(0.5 / ratio)


def test_a_chunk_later_than_its_frozen_part_is_blended() -> None:
    line = timeline(cap=20)
    line.submit(np.zeros((20, 1)), line.mark_observation())
    line.tick()
    mark = line.mark_observation()
    values(line, 4)
    chunk = np.ones((20, 1))
    chunk[:3] = line.plan(mark)[:3]
    assert accepted(line.submit(chunk, mark, frozen=3)).blended
    np.testing.assert_allclose(values(line, 5), [0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_plan_that_was_dropped_meanwhile_is_blended_with_the_hold() -> None:
    line = timeline(cap=20)
    line.submit(ramp(0, 20), line.mark_observation())
    values(line, 2)
    mark = line.mark_observation()
    line.tick()
    line.refuse(Reason.LIMIT_VELOCITY)
    assert value(line.tick()) == 1.0
    assert accepted(line.submit(ramp(2, 20), mark, frozen=5)).blended


def test_a_plan_of_a_chunk_replaced_meanwhile_is_blended() -> None:
    line = timeline(cap=20)
    line.submit(ramp(0, 20), line.mark_observation())
    line.tick()
    first, second = line.mark_observation(), line.mark_observation()
    accepted(line.submit(ramp(100, 20), first))
    assert accepted(line.submit(ramp(1, 20), second, frozen=5)).blended


def test_starved_while_frozen_it_goes_on_where_the_plan_ended() -> None:
    line = timeline(cap=4, hold=10)
    line.submit(ramp(0, 20), line.mark_observation())
    values(line, 2)
    mark = line.mark_observation()
    values(line, 2)
    assert [line.tick().kind for _ in range(3)] == [CommandKind.HOLDING] * 3
    outcome = accepted(line.submit(line.plan(mark), mark, frozen=5))
    assert (outcome.start_index, outcome.blended) == (2, False)
    assert values(line, 2) == [4, 5]


def test_without_a_frozen_part_a_chunk_is_blended() -> None:
    line = timeline()
    line.submit(ramp(0, 10), line.mark_observation())
    line.tick()
    assert accepted(line.submit(ramp(1, 10), line.mark_observation(), frozen=0)).blended


@pytest.mark.parametrize("representation", [ABSOLUTE, DELTA, VELOCITY])
def test_a_seam_is_measured_against_what_would_have_been_sent(representation: Representation) -> None:
    line = timeline(representation, blend_steps=0, cap=5)
    assert accepted(line.submit(ramp(0, 10), line.mark_observation())).jump == 0.0
    values(line, 3)
    assert accepted(line.submit(np.full((10, 1), 4.5), line.mark_observation())).jump == 1.5
    values(line, 6)
    held = 4.5 if representation is ABSOLUTE else 0.0
    assert accepted(line.submit(np.full((10, 1), 5.0), line.mark_observation())).jump == 5.0 - held


def test_a_delta_chunk_has_no_sawtooth_where_it_is_re_anchored() -> None:
    """Each chunk holds differences to the state at its observation. What is kept of the last one is in
    absolute terms, so that a new anchor does not move it; differences kept as they are would jump by as much
    as the arm moved.
    """
    line = timeline(cap=20)
    line.submit(0.02 * ramp(0, 20), line.mark_observation())
    arm = value([line.tick() for _ in range(5)][-1])
    mark = line.mark_observation()
    differences = line.plan(mark) - arm
    chunk = differences + arm  # a model that goes on exactly as planned
    values(line, 2)
    outcome = accepted(line.submit(chunk, mark, frozen=2))
    assert outcome.jump < 1e-12
    np.testing.assert_allclose(np.diff(values(line, 5)), 0.02)


# The delay estimate

def mark_of(sequence: int) -> ObservationMark:
    return ObservationMark(sent=0, generation=0, serial=1, sequence=sequence, index=0, taken=0)


def chunk_of(consumed: int) -> Accepted:
    return Accepted(sequence=1, generation=0, consumed=consumed, start_index=consumed, blended=False)


def test_no_delay_is_known_before_the_second_chunk() -> None:
    estimate = DelayEstimate(1)
    assert estimate.actions == 0
    estimate.add(mark_of(0), chunk_of(0))
    assert estimate.actions == 0
    estimate.add(mark_of(1), chunk_of(3))
    assert estimate.actions == 3


def test_the_first_inference_never_enters_it() -> None:
    """A cold start of seconds: the robot waits, nothing is consumed, and nothing played at its mark."""
    line, estimate = timeline(cap=50, hold=1000), DelayEstimate(1)
    mark = line.mark_observation()
    for _ in range(500):
        line.tick()
    estimate.add(mark, accepted(line.submit(ramp(0, 50), mark)))
    for _ in range(5):
        mark = line.mark_observation()
        values(line, 2)
        estimate.add(mark, accepted(line.submit(ramp(0, 50), mark)))
    assert estimate.actions == 2


def test_a_slow_inference_is_forgotten() -> None:
    estimate = DelayEstimate(1)
    estimate.add(mark_of(1), chunk_of(40))
    assert estimate.actions == 40
    for _ in range(9):
        estimate.add(mark_of(1), chunk_of(2))
    assert estimate.actions == 2  # one in ten may be late
    for _ in range(20):
        estimate.add(mark_of(1), chunk_of(3))
    estimate.add(mark_of(1), chunk_of(40))
    assert estimate.actions == 3
    estimate.clear()
    assert estimate.actions == 0


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_what_it_freezes_is_enough_for_the_seam(ratio: int) -> None:
    """A delay counted in ticks becomes actions such that the timeline goes on without a blend."""
    for consumed in range(3 * ratio + 2):
        line, estimate = timeline(ratio=ratio, cap=20), DelayEstimate(ratio)
        line.submit(ramp(0, 20), line.mark_observation())
        line.tick()
        mark = line.mark_observation()
        values(line, consumed)
        estimate.add(mark, chunk_of(consumed))
        outcome = accepted(line.submit(line.plan(mark), mark, frozen=estimate.actions))
        assert not outcome.blended
        assert outcome.jump < 1e-9


@pytest.mark.parametrize("arguments", [(0,), (1, 0), (1, 5, 0.0), (1, 5, 1.5)])
def test_estimates_that_make_no_sense_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="expected ratio"):
        DelayEstimate(*arguments)
