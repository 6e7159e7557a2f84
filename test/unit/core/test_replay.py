"""Predicted against recorded actions: figures that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.synthetic_bag import MS, START, STORE, message_of, stamped, write_bag
from flashrt_ros.core.bag_source import BagSource
from flashrt_ros.core.contract import OutputSpec, OutputType, Representation, RobotContract
from flashrt_ros.core.errors import BagError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.replay import replay

TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
ARRAY = "std_msgs/msg/Float64MultiArray"
HORIZON, PERIOD = 10, 0.02


def commanded(seconds: float) -> np.ndarray:
    """What the robot was told in these bags, (7,): a straight line for each joint."""
    return np.linspace(0.1, 0.7, 7) * (0.2 + 0.1 * seconds)


def trajectory(names: tuple[str, ...], begin: float, points: int, every: float = PERIOD) -> bytes:
    types, none = STORE.types, np.zeros(0)
    duration = types["builtin_interfaces/msg/Duration"]
    rows = [
        types["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=commanded(begin + index * every)[::-1].copy(), velocities=none, accelerations=none,
            effort=none, time_from_start=duration(sec=0, nanosec=round(index * every * 1e9)),
        )
        for index in range(points)
    ]
    return message_of(TRAJECTORY, joint_names=list(names)[::-1], points=rows)


def array_message(values: np.ndarray) -> bytes:
    layout = STORE.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    return bytes(STORE.serialize_cdr(STORE.types[ARRAY](layout=layout, data=values), ARRAY))


@pytest.fixture
def bag(tmp_path: Path, demo: RobotContract) -> Callable[..., Path]:
    """bag({topic: (type, [(seconds, message)])}): four seconds of the demo arm with these commands."""

    def write(topics: dict[str, tuple[str, list[tuple[float, bytes]]]]) -> Path:
        def extra(writer: Any) -> None:
            for topic, (kind, messages) in topics.items():
                connection = writer.add_connection(topic, kind, typestore=STORE)
                for seconds, data in messages:
                    writer.write(connection, START + round(seconds * 1e9), data)

        return write_bag(tmp_path / "bag", demo, 4.0, extra=extra)

    return write


@pytest.fixture
def per_tick(demo: RobotContract) -> dict[str, tuple[str, list[tuple[float, bytes]]]]:
    """A command at every tick, with a lookahead of five points, as the node sends them."""
    ticks = [index * PERIOD for index in range(200)]
    messages = [
        (tick, stamped(trajectory(demo.action.joints, tick, 6), START + round(tick * 1e9))) for tick in ticks
    ]
    return {"/arm_controller/joint_trajectory": (TRAJECTORY, messages)}


def oracle(offset: float = 0.0) -> Callable[[Any], np.ndarray]:
    """Predicts what was commanded from the camera's stamp on, and `offset` more."""

    def predict(observation: Any) -> np.ndarray:
        begin = (observation.stamps["joint_states"] - START) / 1e9
        rows = [commanded(begin + index * PERIOD) + offset for index in range(HORIZON)]
        return np.array(rows, dtype=np.float32)

    return predict


def test_a_perfect_policy_and_one_that_is_off(bag, demo, per_tick) -> None:
    with BagSource(bag(per_tick), demo) as source:
        perfect = replay(source, demo, oracle(), HORIZON, 20)
        off = replay(source, demo, oracle(0.25), HORIZON, 20)
    assert len(perfect.times) == 20
    assert perfect.compared > 180
    # The joint state is up to 12 ms older than the moment: 0.07 rad/s at most.
    assert max(error.largest for error in perfect.joint_errors()) < 0.012 * 0.07 + 1e-6
    for error, joint in zip(off.joint_errors(), demo.action_joints, strict=True):
        assert (error.joint, error.unit) == (joint.name, joint.unit)
        for figure in (error.mean, error.rms, error.largest, error.first):
            assert figure == pytest.approx(0.25, abs=1e-3)
    slope = np.linspace(0.1, 0.7, 7) * 0.1
    still = [error.still for error in off.joint_errors()]
    np.testing.assert_allclose(still, slope * PERIOD * (HORIZON - 1) / 2, rtol=0.05)
    np.testing.assert_allclose(off.error_by_offset(), 0.25, atol=1e-3)
    assert off.offsets[-1] == pytest.approx(0.18)


@pytest.mark.parametrize("stamp", [True, False], ids=["stamped", "stamp 0"])
def test_whole_chunks_are_followed_until_the_next_begins(bag, demo, stamp) -> None:
    """As a teleoperation may send them: a second of points, every half second."""
    messages = []
    for begin in np.arange(0.0, 4.0, 0.5):
        data = trajectory(demo.action.joints, begin, 51)
        messages.append((begin, stamped(data, START + round(begin * 1e9)) if stamp else data))
    with BagSource(bag({"/arm_controller/joint_trajectory": (TRAJECTORY, messages)}), demo) as source:
        result = replay(source, demo, oracle(), HORIZON, 16)
    assert result.compared == 16 * HORIZON
    assert max(error.largest for error in result.joint_errors()) < 1e-3


def test_increments_are_summed_from_the_recorded_position(bag, demo, per_tick) -> None:
    delta = replace(demo, action=replace(demo.action, representation=Representation.DELTA))
    slope = np.linspace(0.1, 0.7, 7) * 0.1 * PERIOD

    def predict(_: Any) -> np.ndarray:
        rows = np.tile(slope, (HORIZON, 1))
        rows[0] = 0.0
        return rows.astype(np.float32)

    with BagSource(bag(per_tick), delta) as source:
        result = replay(source, delta, predict, HORIZON, 8)
    assert max(error.largest for error in result.joint_errors()) < 1e-4


def test_outputs_for_a_part_of_the_joints(bag, demo) -> None:
    """Two controllers, one of them not recorded: its joint has no figures, the others have."""
    arm, gripper = demo.action.joints[:6], demo.action.joints[6:]
    contract = replace(demo, outputs=(
        OutputSpec("arm/commands", OutputType.FLOAT64_MULTI_ARRAY, 0, arm[::-1]),
        OutputSpec("gripper/commands", OutputType.FLOAT64_MULTI_ARRAY, 0, gripper),
    ))
    times = [index * PERIOD for index in range(200)]
    ticks = [(time, array_message(commanded(time)[:6][::-1].copy())) for time in times]
    with BagSource(bag({"/arm/commands": (ARRAY, ticks)}), contract) as source:
        result = replay(source, contract, oracle(), HORIZON, 8)
    *known, unknown = result.joint_errors()
    assert max(error.largest for error in known) < 1e-3
    assert all(np.isnan([unknown.mean, unknown.rms, unknown.largest, unknown.first, unknown.still]))


def test_nothing_to_compare_with(bag, demo) -> None:
    source = BagSource(bag({}), demo)
    with source, pytest.raises(BagError, match="expected /arm_controller") as caught:
        replay(source, demo, oracle(), HORIZON, 4)
    assert caught.value.reason is Reason.BAG_TOPIC_MISSING


def test_commands_of_another_type(bag, demo) -> None:
    path = bag({"/arm_controller/joint_trajectory": (ARRAY, [(1.0, array_message(np.zeros(7)))])})
    with BagSource(path, demo) as source, pytest.raises(BagError, match="expects trajectory_msgs") as caught:
        replay(source, demo, oracle(), HORIZON, 4)
    assert caught.value.reason is Reason.BAG_TOPIC_TYPE


@pytest.mark.parametrize(
    ("count", "words"), [(5, "has 5 values, expected 7"), (7, "within the reach of any chunk")]
)
def test_commands_of_no_use(bag, demo, count: int, words: str) -> None:
    contract = replace(demo, outputs=(OutputSpec("commands", OutputType.FLOAT64_MULTI_ARRAY, 0),))
    path = bag({"/commands": (ARRAY, [(2.0, array_message(np.zeros(count)))])})
    with BagSource(path, contract) as source, pytest.raises(BagError, match=words):
        replay(source, contract, oracle(), HORIZON, 4)


def test_commands_without_a_joint(bag, demo) -> None:
    data = trajectory(("a", "b", "c", "d", "e", "f", "g"), 1.0, 6)
    path = bag({"/arm_controller/joint_trajectory": (TRAJECTORY, [(1.0, data)])})
    with BagSource(path, demo) as source, pytest.raises(BagError, match="lacks joint shoulder_pan"):
        replay(source, demo, oracle(), HORIZON, 4)


def test_a_pause_of_the_commands_is_not_bridged(bag, demo, per_tick) -> None:
    kind, messages = per_tick["/arm_controller/joint_trajectory"]
    paused = [(tick, data) for tick, data in messages if not 1.0 < tick < 3.0]
    with BagSource(bag({"/arm_controller/joint_trajectory": (kind, paused)}), demo) as source:
        result = replay(source, demo, oracle(), HORIZON, 20)
    seconds = (result.times - START) / (1000 * MS)
    inside = (seconds > 1.15) & (seconds < 2.75)
    assert inside.sum() > 5
    assert np.isnan(result.recorded[inside]).all()
    assert np.isfinite(result.recorded[seconds < 0.8]).all()
