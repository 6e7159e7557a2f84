import threading
from types import SimpleNamespace

import numpy as np
import pytest

from flashrt_ros.demo.trajectory import CommandError, TrajectoryExecutor, trajectory_from_message

MS = 1_000_000
NAMES = ("pan", "lift")
START = 1_700_000_000_000 * MS  # a stamp as large as real ones


def stamp(nanoseconds):
    return SimpleNamespace(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def trajectory(names, start, times, positions, velocities=None):
    """What is read of a JointTrajectory. start, times: int nanoseconds; a row per time."""
    points = [
        SimpleNamespace(
            time_from_start=stamp(time),
            positions=list(row),
            velocities=list(velocities[index]) if velocities is not None else [],
        )
        for index, (time, row) in enumerate(zip(times, positions, strict=True))
    ]
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp(start)), joint_names=list(names), points=points)


@pytest.fixture
def executor():
    return TrajectoryExecutor(NAMES, np.array([-1.0, -2.0]), np.array([1.0, 0.5]), np.array([0.1, -0.5]))


def test_holds_the_initial_position_until_a_command_comes(executor):
    np.testing.assert_array_equal(executor.sample(START), [0.1, -0.5])


def test_interpolates_linearly_between_due_times_and_holds_the_last(executor):
    command = trajectory(NAMES, START, [0, 100 * MS, 200 * MS], [[0, 0], [0.4, -1], [0.2, -2]])
    executor.command(command, START)
    np.testing.assert_allclose(executor.sample(START + 50 * MS), [0.2, -0.5])
    np.testing.assert_allclose(executor.sample(START + 150 * MS), [0.3, -1.5])
    np.testing.assert_allclose(executor.sample(START + 9000 * MS), [0.2, -2])


def test_points_already_past_are_not_replayed(executor):
    command = trajectory(NAMES, START, [0, 100 * MS, 200 * MS], [[0, 0], [0.4, -1], [0.2, -2]])
    executor.command(command, START + 150 * MS)
    np.testing.assert_allclose(executor.sample(START + 150 * MS), [0.3, -1.5])


def test_moves_from_the_running_command_to_a_first_point_in_the_future(executor):
    executor.command(trajectory(NAMES, START, [0, 100 * MS], [[0, 0], [1, 0]]), START)
    executor.sample(START + 50 * MS)
    executor.command(trajectory(NAMES, START + 150 * MS, [0, 50 * MS], [[0.1, 0], [0.1, 0]]), START + 50 * MS)
    np.testing.assert_allclose(executor.sample(START + 100 * MS), [0.3, 0])


def test_velocities_make_the_path_cubic():
    names, quarter = ("pan",), 25 * MS
    command = trajectory(names, START, [0, 100 * MS], [[0.0], [1.0]], [[0.0], [0.0]])
    path = trajectory_from_message(command, names, START)
    # 3 s^2 - 2 s^3 at s = 1/4 and 3/4
    np.testing.assert_allclose(path.sample(START + quarter), [0.15625])
    np.testing.assert_allclose(path.sample(START + 3 * quarter), [0.84375])


def test_cubic_path_follows_the_given_velocities():
    command = trajectory(("pan",), START, [0, 100 * MS], [[0.0], [0.1]], [[1.0], [1.0]])
    path = trajectory_from_message(command, ("pan",), START)
    np.testing.assert_allclose(path.sample(START + 30 * MS), [0.03])


def test_joints_are_matched_by_name(executor):
    executor.command(trajectory(("lift", "pan"), START, [100 * MS], [[-1.5, 0.25]]), START)
    np.testing.assert_allclose(executor.sample(START + 100 * MS), [0.25, -1.5])


def test_a_zero_stamp_starts_at_receipt(executor):
    executor.command(trajectory(NAMES, 0, [100 * MS], [[0.2, 0.0]]), START)
    np.testing.assert_allclose(executor.sample(START + 50 * MS), [0.15, -0.25])


def test_beyond_limits_is_clamped_and_counted_once_a_message(executor):
    far = trajectory(NAMES, START, [10 * MS, 20 * MS], [[3.0, 0.0], [4.0, -7.0]])
    executor.command(far, START)
    np.testing.assert_array_equal(executor.sample(START + 20 * MS), [1.0, -2.0])
    counts = executor.counts()
    assert (counts.received, counts.rejected, counts.limit_violations) == (1, 0, 1)
    assert counts.last_violation == "lift commanded to -7.0000, outside [-2.0000, 0.5000]"


def test_the_limit_itself_is_no_violation_even_after_float32(executor):
    upper = float(np.float32(0.5)) + 5e-7
    executor.command(trajectory(NAMES, START, [10 * MS], [[1.0, upper]]), START)
    assert executor.counts().limit_violations == 0
    assert executor.sample(START + 10 * MS)[1] == 0.5


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (trajectory(NAMES, START, [], []), "without points"),
        (trajectory(("pan",), START, [10 * MS], [[0.0]]), "expected exactly"),
        (trajectory(("pan", "knee"), START, [10 * MS], [[0.0, 0.0]]), "knee"),
        (trajectory(("pan", "pan"), START, [10 * MS], [[0.0, 0.0]]), "expected exactly"),
        (trajectory(NAMES, START, [10 * MS], [[0.0, float("nan")]]), "not finite"),
        (trajectory(NAMES, START, [10 * MS], [[0.0, 0.0]], [[0.0, float("inf")]]), "not finite"),
        (trajectory(NAMES, START, [10 * MS], [[0.0]]), "1 positions: expected 2"),
        (trajectory(NAMES, START, [20 * MS, 10 * MS], [[0, 0], [0, 0]]), "increase"),
        (trajectory(NAMES, START - 500 * MS, [0, 100 * MS], [[1, 0], [1, 0]]), "400.0 ms in the past"),
    ],
)
def test_what_a_controller_would_reject_changes_nothing(executor, command, words):
    executor.command(trajectory(NAMES, START, [0, 100 * MS], [[0, 0], [0.4, -1]]), START)
    with pytest.raises(CommandError, match=words):
        executor.command(command, START)
    np.testing.assert_allclose(executor.sample(START + 50 * MS), [0.2, -0.5])
    counts = executor.counts()
    assert (counts.received, counts.rejected) == (2, 1)
    assert words in counts.last_rejection


def test_commands_and_samples_from_two_threads(executor):
    failures = []

    def send():
        for index in range(500):
            start = START + index * MS
            executor.command(trajectory(NAMES, start, [10 * MS], [[index / 500, 0.0]]), start)

    def read():
        for index in range(2000):
            value = executor.sample(START + index * MS // 4)
            if not (np.all(np.isfinite(value)) and value.shape == (2,)):
                failures.append(value)

    threads = [threading.Thread(target=target) for target in (send, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not failures
    assert executor.counts().received == 500
