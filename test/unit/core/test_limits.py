"""Limiter and trajectory points: examples, and that nothing beyond a limit ever comes out."""

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import ChunkError, ContractError, StartError
from flashrt_ros.core.limits import Limiter
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.trajectory import TrajectoryPoints, cut, trajectory_points

Small = Callable[..., RobotContract]
PERIOD = 20_000_000
DT = 0.02
# Two joints: [-1, 1] at 1 rad/s and [0, 0.5] at 2 rad/s, so 0.02 and 0.04 per control period.


def test_a_command_within_limits_passes_unchanged(small: Small) -> None:
    limited = Limiter(small()).apply([0.01, 0.13], [0.0, 0.1])
    assert limited.values.tolist() == limited.positions.tolist() == [0.01, 0.13]
    assert limited.violations == ()


def test_velocity_is_clamped_and_named(small: Small) -> None:
    limited = Limiter(small()).apply([0.5, 0.1], [0.0, 0.1])
    assert limited.values == pytest.approx([0.02, 0.1])
    assert limited.values[0] < 0.02
    (violation,) = limited.violations
    assert (violation.reason, violation.joint) == (Reason.LIMIT_VELOCITY, "shoulder_pan")
    assert (violation.value, violation.limit) == pytest.approx((25.0, 1.0))
    assert str(violation) == "joint shoulder_pan: velocity 25 is beyond the limit 1"


def test_position_is_clamped_and_named(small: Small) -> None:
    limited = Limiter(small()).apply([0.0, -0.01], [0.0, 0.02])
    assert limited.values.tolist() == [0.0, 0.0]
    (violation,) = limited.violations
    assert (violation.reason, violation.joint) == (Reason.LIMIT_POSITION, "shoulder_lift")
    assert violation.limit == 0.0


def test_delta_is_an_increment_on_the_position_before(small: Small) -> None:
    limiter = Limiter(small(representation="delta"))
    limited = limiter.apply([0.1, 0.03], [0.0, 0.49])
    assert limited.values == pytest.approx([0.02, 0.01])
    assert limited.positions == pytest.approx([0.02, 0.5])
    reasons = [violation.reason for violation in limited.violations]
    assert reasons == [Reason.LIMIT_POSITION, Reason.LIMIT_VELOCITY]


def test_velocity_commands_stop_at_the_position_limit(small: Small) -> None:
    limiter = Limiter(small(representation="velocity"))
    limited = limiter.apply([5.0, 1.0], [0.0, 0.495])
    assert limited.values == pytest.approx([1.0, 0.25])


def test_velocity_commands_from_outside_may_stand_or_return_but_not_leave(small: Small) -> None:
    limiter = Limiter(small(representation="velocity"))
    for wish, expected in ((0.0, 0.0), (1.0, 0.0), (-0.5, -0.5), (-9.0, -1.0)):
        assert limiter.apply([wish, 0.0], [1.5, 0.1]).values[0] == pytest.approx(expected)


def test_the_path_is_limited_one_point_after_the_other(small: Small) -> None:
    limiter = Limiter(small())
    values = np.array([[0.5, 0.1]] * 4)
    periods = np.array([PERIOD] * 4)
    limited = limiter.apply_path(values, [0.0, 0.1], periods)
    np.testing.assert_allclose(limited.values[:, 0], [0.02, 0.04, 0.06, 0.08], rtol=1e-6)
    assert len(limited.violations) == 1
    longer = limiter.apply_path(values[:1], [0.0, 0.1], np.array([PERIOD * 5]))
    assert longer.values[0, 0] == pytest.approx(0.1)


@settings(max_examples=300, deadline=None)
@given(
    representation=st.sampled_from(["absolute", "delta", "velocity"]), seed=st.integers(0, 2**31),
    count=st.integers(1, 40), spread=st.sampled_from([1e-3, 0.02, 0.3, 2.0, 1e308]),
)
def test_first_violation_is_that_of_a_walk_along_the_path(
    small: Small, representation: str, seed: int, count: int, spread: float
) -> None:
    """Row after row in plain Python, against the whole path at once."""
    limiter, rng = Limiter(small(representation=representation)), np.random.default_rng(seed)
    rows = rng.uniform(-1, 1, (count, 2)) * spread
    if rng.random() < 0.5:
        rows = np.cumsum(rows / 10, axis=0)
    start, periods = rng.uniform([-1, 0], [1, 0.5]), rng.integers(1, 4, count) * PERIOD
    expected: tuple[Reason, str] | None = None
    before = start.tolist()
    with np.errstate(over="ignore", invalid="ignore"):
        for row, period in zip(rows, periods / 1e9, strict=True):
            step = row * period if representation == "velocity" else row
            target = row if representation == "absolute" else np.array(before) + step
            found = []
            for joint, wish in enumerate(target):
                bounded = min(max(wish, limiter.lower[joint]), limiter.upper[joint])
                if abs(wish - bounded) > 1e-6 * max(1.0, abs(bounded)):
                    found.append((0, joint, Reason.LIMIT_POSITION))
                if abs(bounded - before[joint]) / period > limiter.velocity[joint] * (1 + 1e-6):
                    found.append((1, joint, Reason.LIMIT_VELOCITY))
            if found:
                _, joint, reason = min(found)
                expected = reason, limiter.names[joint]
                break
            before = target.tolist()
    violation = limiter.first_violation(rows, start, periods)
    assert (violation and (violation.reason, violation.joint)) == expected


def test_first_violation_looks_along_the_whole_path_without_clamping(small: Small) -> None:
    limiter = Limiter(small())
    periods = np.full(3, PERIOD)
    start = np.array([0.0, 0.1])
    good = np.array([[0.01, 0.1], [0.02, 0.1], [0.03, 0.1]])
    assert limiter.first_violation(good, start, periods) is None
    inside = good.copy()
    inside[2, 1] = 0.3
    violation = limiter.first_violation(inside, start, periods)
    assert violation is not None
    assert (violation.reason, violation.joint) == (Reason.LIMIT_VELOCITY, "shoulder_lift")
    seam = limiter.first_violation(good + np.array([0.5, 0.0]), start, periods)
    assert seam is not None
    assert seam.value == pytest.approx(25.5)


def test_start_just_outside_is_brought_back_in_one_step(small: Small) -> None:
    limiter = Limiter(small())
    start = limiter.check_start([1.015, -0.03])
    limited = limiter.apply([1.5, -0.2], start)
    assert limited.values == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(("measured", "text"), [
    ([1.03, 0.1], r"joint shoulder_pan is at 1.03, its limits are \[-1, 1\]: move it inside before starting"),
    ([0.0, -0.05], "joint shoulder_lift is at -0.05"),
])
def test_start_further_outside_is_refused(small: Small, measured: list[float], text: str) -> None:
    limiter = Limiter(small())
    for attempt in (limiter.check_start, lambda start: limiter.apply([0.0, 0.1], start)):
        with pytest.raises(StartError, match=text) as caught:
            attempt(measured)
        assert caught.value.reason is Reason.START_OUTSIDE_LIMITS
    Limiter(small(representation="velocity")).check_start(measured)


@pytest.mark.parametrize("measured", [[np.nan, 0.0], [0.0], [[0.0, 0.0]], [np.inf, 0.0]])
def test_start_must_be_finite_positions(small: Small, measured: list[float]) -> None:
    with pytest.raises(StartError, match="expected 2 finite joint positions") as caught:
        Limiter(small()).check_start(measured)
    assert caught.value.reason is Reason.JOINT_NOT_FINITE


@pytest.mark.parametrize("values", [[np.nan, 0.0], [np.inf, 0.0], [0.0]])
def test_values_that_are_not_finite_are_an_error_and_never_clamped(small: Small, values: list[float]) -> None:
    with pytest.raises(ChunkError):
        Limiter(small()).apply(values, [0.0, 0.1])


def test_every_action_joint_needs_limits(small: Small) -> None:
    contract = small()
    joints = {name: replace(joint, limits=None) for name, joint in contract.joints.items()}
    with pytest.raises(ContractError, match="every commanded joint needs limits"):
        Limiter(replace(contract, joints=MappingProxyType(joints)))


def test_check_chunk(small: Small) -> None:
    limiter = Limiter(small())
    assert limiter.check_chunk(np.zeros((3, 2), np.float32)).dtype == np.float64
    with pytest.raises(ChunkError, match=r"shape \(horizon, 2\), got \(3, 3\)"):
        limiter.check_chunk(np.zeros((3, 3)))


wild = st.one_of(
    st.floats(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0, -1.0, 1e308, -1e308]),
)
periods_of = st.lists(st.sampled_from([10**6, PERIOD, PERIOD * 3, 10**12]), min_size=1, max_size=8)


@settings(max_examples=400, deadline=None)
@given(
    representation=st.sampled_from(["absolute", "delta", "velocity"]), data=st.data(), periods=periods_of,
    lookahead=st.sampled_from([0.0, 0.1]),
    start=st.tuples(st.floats(-1.019, 1.019), st.floats(-0.039, 0.539)),
    low=st.floats(-2, 0.9), velocity=st.floats(1e-3, 100),
)
def test_nothing_that_comes_out_is_beyond_a_limit(
    small: Small, representation: str, data: st.DataObject, periods: list[int], lookahead: float,
    start: tuple[float, float], low: float, velocity: float,
) -> None:
    """Strictly: positions within [lower, upper], |change| <= velocity * time, whatever goes in."""
    limiter = Limiter(small(
        representation=representation, limits=((low, 1.0, velocity), (0.0, 0.5, 2.0)), lookahead=lookahead,
    ))
    from_measured = representation == "velocity" or (representation == "delta" and not lookahead)
    rows = data.draw(st.lists(st.tuples(wild, wild), min_size=len(periods), max_size=len(periods)))
    # How far each joint is beyond what one control period can bring back; the verge is left to rounding.
    excess = np.maximum(limiter.lower - start, start - limiter.upper) - limiter.velocity * DT
    assume((np.abs(excess) > 1e-6).all())
    if not from_measured and (excess > 0).any():
        with pytest.raises(StartError):
            limiter.apply_path(rows, start, np.array(periods))
        return
    limited = limiter.apply_path(rows, start, np.array(periods))
    seconds = np.array(periods)[:, None] / 1e9
    before = np.vstack([start, limited.positions[:-1]])
    if from_measured:
        speeds = limited.values if representation == "velocity" else limited.values / seconds
        assert np.all(np.abs(speeds) <= limiter.velocity)
        assert np.all(limited.positions <= np.maximum(limiter.upper, before))
        assert np.all(limited.positions >= np.minimum(limiter.lower, before))
        return
    assert np.all((limited.positions >= limiter.lower) & (limited.positions <= limiter.upper))
    changes = np.abs(limited.positions - before)[1:]
    assert np.all(changes <= (limiter.velocity * seconds)[1:])
    if periods[0] >= PERIOD:  # a start outside is judged by what one control period can bring back
        assert np.all(np.abs(limited.positions - before)[0] <= limiter.velocity * seconds[0])
    if representation == "absolute":
        np.testing.assert_array_equal(limited.values, limited.positions)
    else:
        np.testing.assert_allclose(limited.values, limited.positions - before, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    representation=st.sampled_from(["absolute", "delta", "velocity"]), seed=st.integers(0, 2**31),
    count=st.integers(1, 6),
)
def test_limiting_twice_changes_nothing(small: Small, representation: str, seed: int, count: int) -> None:
    limiter = Limiter(small(representation=representation))
    rng = np.random.default_rng(seed)
    periods = np.full(count, PERIOD)
    once = limiter.apply_path(rng.normal(size=(count, 2)), [0.0, 0.1], periods)
    twice = limiter.apply_path(once.values, [0.0, 0.1], periods)
    np.testing.assert_allclose(twice.values, once.values, atol=1e-9)
    assert twice.violations == ()


# Trajectory points.


def points_of(positions: list[float], **keywords: object) -> TrajectoryPoints:
    rows = np.array(positions)[:, None]
    offsets = np.arange(1, len(rows), dtype=np.int64) * PERIOD
    return trajectory_points(rows, offsets, action_period=PERIOD, **keywords)  # type: ignore[arg-type]


def test_velocities_of_a_straight_line_that_comes_to_rest() -> None:
    points = points_of([0.0, 0.02, 0.04, 0.06], previous=np.array([-0.02]), control_period=PERIOD)
    np.testing.assert_allclose(points.velocities[:, 0], [1.0, 1.0, 1.0, 0.0])
    assert points.offsets.tolist() == [0, PERIOD, 2 * PERIOD, 3 * PERIOD]
    assert points_of([0.0, 0.02, 0.04]).velocities[0, 0] == 0.0


def test_velocity_is_zero_where_the_direction_turns() -> None:
    points = points_of([0.0, 0.1, 0.0, 0.0, 0.1])
    assert points.velocities[:, 0].tolist() == [0.0] * 5


def test_velocity_is_the_harmonic_mean_of_its_neighbours() -> None:
    points = points_of([0.0, 0.02, 0.08])
    assert points.velocities[1, 0] == pytest.approx(2 / (1 / 1.0 + 1 / 3.0))


def test_a_command_without_a_future_is_followed_by_itself() -> None:
    points = points_of([0.3])
    assert points.positions[:, 0].tolist() == [0.3, 0.3]
    assert points.offsets.tolist() == [0, PERIOD]
    assert points.velocities[:, 0].tolist() == [0.0, 0.0]


def test_cut_comes_to_rest_at_its_end() -> None:
    points = points_of([0.0, 0.02, 0.04, 0.06])
    shorter = cut(points, 2 * PERIOD + 1)
    assert shorter.offsets.tolist() == [0, PERIOD, 2 * PERIOD]
    assert shorter.velocities[-1, 0] == 0.0
    assert points.velocities[2, 0] == pytest.approx(1.0)
    assert cut(points, 10 * PERIOD) is points
    assert len(cut(points, 0).offsets) == 2


@settings(max_examples=200, deadline=None)
@given(
    positions=st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    steps=st.lists(st.integers(10**6, 10**8), min_size=8, max_size=8), previous=st.none() | st.floats(-1, 1),
)
def test_the_spline_between_points_stays_between_them(
    positions: list[float], steps: list[int], previous: float | None
) -> None:
    """Cubic Hermite interpolation, as joint_trajectory_controller does it, does not overshoot."""
    rows, offsets = np.array(positions)[:, None], np.cumsum(steps[: len(positions) - 1])
    before = None if previous is None else np.array([previous])
    points = trajectory_points(rows, offsets, action_period=PERIOD, previous=before, control_period=PERIOD)
    assert np.all(points.velocities[-1] == 0)
    slopes = np.diff(points.positions[:, 0]) / (np.diff(points.offsets) / 1e9)
    arriving = [] if previous is None else [abs(positions[0] - previous) / DT]
    assert np.abs(points.velocities).max() <= max([*np.abs(slopes), *arriving]) * (1 + 1e-9)
    t = np.linspace(0, 1, 21)
    for i in range(len(positions) - 1):
        h = (points.offsets[i + 1] - points.offsets[i]) / 1e9
        p0, p1 = positions[i], positions[i + 1]
        v0, v1 = points.velocities[i, 0] * h, points.velocities[i + 1, 0] * h
        ease = 3 * t**2 - 2 * t**3
        curve = p0 * (1 - ease) + p1 * ease + v0 * (t**3 - 2 * t**2 + t) + v1 * (t**3 - t**2)
        assert curve.min() >= min(p0, p1) - 1e-9
        assert curve.max() <= max(p0, p1) + 1e-9


# Acceleration.

BRAKES = ((-1.0, 1.0, 1.0, 2.0), (0.0, 0.5, 2.0, 5.0))


def test_acceleration_is_clamped_and_named(small: Small) -> None:
    """2 rad/s² at 50 Hz: the speed may change by 0.04 rad/s a command."""
    limited = Limiter(small(limits=BRAKES)).apply([0.01, 0.1], [0.0, 0.1])
    assert limited.values == pytest.approx([0.0008, 0.1])
    (violation,) = limited.violations
    assert (violation.reason, violation.joint) == (Reason.LIMIT_ACCELERATION, "shoulder_pan")
    assert (violation.value, violation.limit) == pytest.approx((25.0, 2.0))
    assert str(violation) == "joint shoulder_pan: acceleration 25 is beyond the limit 2"
    moving = Limiter(small(limits=BRAKES)).apply([0.01, 0.1], [0.0, 0.1], np.array([0.5, 0.0]))
    assert moving.violations == ()
    assert moving.values[0] == 0.01


def test_a_joint_without_an_acceleration_limit_has_none(small: Small) -> None:
    limited = Limiter(small(limits=((-1.0, 1.0, 1.0), (0.0, 0.5, 2.0, 5.0)))).apply([0.02, 0.1], [0.0, 0.1])
    assert limited.values[0] == pytest.approx(0.02)


def test_a_joint_brakes_in_time_for_its_end(small: Small) -> None:
    limiter = Limiter(small(limits=BRAKES))
    position, speed, speeds = np.array([0.0, 0.1]), np.zeros(2), []
    for _ in range(400):
        limited = limiter.apply([5.0, 0.1], position, speed)
        speed, position = (limited.positions - position) / DT, limited.positions
        speeds.append(speed[0])
    assert position[0] == pytest.approx(1.0, abs=1e-6)
    assert max(speeds) == pytest.approx(0.98, abs=0.03)  # nearly its limit: not timid either
    assert np.abs(np.diff(speeds, prepend=0.0)).max() <= 2.0 * DT


def test_a_path_beyond_the_acceleration_limit_is_found_where_it_is(small: Small) -> None:
    limiter = Limiter(small(limits=BRAKES))
    speeds = np.array([[0.04, 0.0], [0.08, 0.0], [0.08, 0.0], [0.0, 0.0]])
    path = np.array([0.0, 0.1]) + np.cumsum(speeds * DT, axis=0)
    periods = np.full(4, PERIOD)
    violation = limiter.first_violation(path, np.array([0.0, 0.1]), periods)
    assert violation is not None
    assert (violation.reason, violation.value) == (Reason.LIMIT_ACCELERATION, pytest.approx(4.0))
    assert limiter.first_violation(path[:3], np.array([0.0, 0.1]), periods[:3]) is None


@settings(max_examples=300, deadline=None)
@given(
    representation=st.sampled_from(["absolute", "delta"]), data=st.data(),
    acceleration=st.floats(0.01, 200), velocity=st.floats(1e-2, 20), start=st.floats(-1, 1),
    ratio=st.integers(1, 5),
)
def test_no_acceleration_beyond_its_limit_ever_comes_out(
    small: Small, representation: str, data: st.DataObject, acceleration: float, velocity: float,
    start: float, ratio: int,
) -> None:
    """Strictly, together with position and velocity, over many commands: from rest the three never conflict.
    Each command comes with a coarser path of its own, as a trajectory does, whose rows keep them too."""
    limits = ((-1.0, 1.0, velocity, acceleration),)
    limiter = Limiter(small(representation=representation, limits=limits))
    wishes = data.draw(st.lists(st.tuples(wild, wild, wild), min_size=1, max_size=60))
    position, speed = np.array([start]), np.zeros(1)
    periods = np.array([PERIOD, ratio * PERIOD, ratio * PERIOD])
    for rows in wishes:
        limited = limiter.apply_path(np.array(rows)[:, None], position, periods, speed)
        seconds = periods[:, None] / 1e9
        speeds = np.diff(limited.positions, axis=0, prepend=position[None, :]) / seconds
        changes = np.abs(np.diff(speeds, axis=0, prepend=speed[None, :])) / seconds
        assert np.all((limited.positions >= -1.0) & (limited.positions <= 1.0))
        assert np.all(np.abs(speeds) <= velocity)
        assert np.all(changes <= acceleration)
        position, speed = limited.positions[0], speeds[0]
