"""Every shipped contract against the random checkpoint made for its robot, and once through: synthetic
messages to the policy's units, a policy's chunk to commands in the robot's."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flashrt_ros.core.commander import Commander
from flashrt_ros.core.contract import (
    JointMapping,
    OutputType,
    Representation,
    RobotContract,
    known_contracts,
    load_contract,
)
from flashrt_ros.core.errors import PolicyMismatchError
from flashrt_ros.core.ingest import Ingest, MeasuredPositions
from flashrt_ros.core.sync import Snapshot, Stamped, Synchroniser
from flashrt_ros.core.timeline import Accepted, CommandKind
from flashrt_runtime.checkpoints.presets import PRESETS, Preset, preset_named

ROOT = Path(__file__).resolve().parents[3]
REAL = ("aloha", "so101", "ur5e")
ROBOTS = {"demo_arm": "demo_arm", "libero_franka": "libero", **{name: name for name in REAL}}
PIXELS = np.random.default_rng(5).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def spec_of(preset: Preset, **changes: object) -> SimpleNamespace:
    """What the checkpoint that `flashrt make-checkpoint --preset` writes says of itself."""
    fields = {
        "views": preset.views, "state_dim": len(preset.state_names), "action_dim": len(preset.action_names),
        "state_names": preset.state_names, "action_names": preset.action_names,
        "action_rate_hz": preset.action_rate_hz, "action_representation": preset.action_representation,
        "checkpoint": preset.name,
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture(params=ROBOTS)
def contract(request: pytest.FixtureRequest) -> RobotContract:
    return load_contract(request.param)


@pytest.fixture
def preset(contract: RobotContract) -> Preset:
    return preset_named(ROBOTS[contract.robot])


def test_these_are_all_that_ship() -> None:
    assert known_contracts() == tuple(sorted(ROBOTS))
    assert set(ROBOTS.values()) == set(PRESETS)


def test_its_random_checkpoint_fits_and_another_robots_does_not(
    contract: RobotContract, preset: Preset
) -> None:
    contract.check_policy(spec_of(preset))
    for other in PRESETS.values():
        if other is not preset:
            with pytest.raises(PolicyMismatchError):
                contract.check_policy(spec_of(other))


def test_a_real_arm_is_dry_run_at_first(contract: RobotContract) -> None:
    path = ROOT / "config" / "robots" / "parameters" / f"{contract.robot}.yaml"
    assert path.is_file() == (contract.robot in REAL)
    if path.is_file():
        assert "dry_run: true" in path.read_text()


def images(contract: RobotContract) -> dict[str, SimpleNamespace]:
    import cv2

    jpeg = cv2.imencode(".png", PIXELS[..., ::-1])[1].tobytes()
    raw = SimpleNamespace(height=24, width=32, step=96, encoding="rgb8", data=PIXELS.tobytes())
    packed = SimpleNamespace(format="png", data=jpeg)
    return {
        stream.name: packed if "Compressed" in stream.type else raw for stream in contract.image_streams
    }


def robot_pose(contract: RobotContract, preset: Preset) -> dict[str, float]:
    """Joint values in the robot's units for the middle of the checkpoint's state statistics, by joint."""
    names = [name for source in contract.state.sources for name in source.joints]
    mapping = JointMapping([contract.joints[name] for name in names])
    pose = dict(zip(names, mapping.to_robot(preset.state_stats["mean"]), strict=True))
    by_message = {
        (stream, contract.joints[name].in_messages): pose[name] for stream, name in streams(contract)
    }
    for name in contract.action.joints:
        stream = contract.state.sources[0].stream
        pose.setdefault(name, by_message.get((stream, contract.joints[name].in_messages), 0.0))
    return {name: float(value) for name, value in pose.items()}


def streams(contract: RobotContract) -> list[tuple[str, str]]:
    return [(source.stream, name) for source in contract.state.sources for name in source.joints]


def joint_messages(contract: RobotContract, pose: dict[str, float]) -> dict[str, SimpleNamespace]:
    """One JointState per stream, as the robot's driver sends it: its own names, in an order of its own."""
    found: dict[str, dict[str, float]] = {}
    for stream, name in streams(contract):
        found.setdefault(stream, {})[contract.joints[name].in_messages] = pose[name]
    return {
        stream: SimpleNamespace(name=list(values)[::-1], position=list(values.values())[::-1], velocity=[])
        for stream, values in found.items()
    }


def test_an_observation_reaches_the_policy_in_its_own_units_and_order(
    contract: RobotContract, preset: Preset
) -> None:
    pose = robot_pose(contract, preset)
    payloads = {**images(contract), **joint_messages(contract, pose)}
    snapshot = Snapshot({name: Stamped(7, 7, payload) for name, payload in payloads.items()}, 0)
    observation = Ingest(contract).observe(snapshot)
    assert tuple(observation.images) == preset.views
    np.testing.assert_allclose(observation.state, preset.state_stats["mean"], rtol=1e-5, atol=1e-5)
    for image in observation.images.values():
        np.testing.assert_array_equal(image, PIXELS)


def test_a_chunk_reaches_the_robot_within_its_limits(contract: RobotContract, preset: Preset) -> None:
    pose, now = robot_pose(contract, preset), [10**12]
    synchroniser = Synchroniser(contract)
    for stream, message in joint_messages(contract, pose).items():
        synchroniser.push(stream, 0, now[0], message)
    measured = MeasuredPositions(contract, synchroniser)
    start = measured(now[0])
    np.testing.assert_allclose(start, [pose[name] for name in contract.action.joints])
    commander = Commander(contract, lambda: measured(now[0]), lambda: now[0])
    rng = np.random.default_rng(1)
    low, high = (np.array(preset.action_stats[key]) for key in ("q01", "q99"))
    actions = rng.uniform(low, high, (preset.horizon, len(low)))
    robot_actions = contract.actions_to_robot(actions)
    rates = contract.action.representation is not Representation.ABSOLUTE
    back = JointMapping(contract.action_joints).to_policy(robot_actions, rates=rates)
    np.testing.assert_allclose(back, actions, atol=1e-9)
    assert isinstance(commander.submit(robot_actions, commander.mark_observation()), Accepted)
    limiter, period, position = commander.limiter, contract.rates.control_period, start
    for _ in range(8):
        now[0] += period
        output = commander.tick()
        assert output.kind is CommandKind.RUNNING, output.message
        assert output.positions is not None
        assert np.all((output.positions >= limiter.lower) & (output.positions <= limiter.upper))
        assert np.all(np.abs(output.positions - position) <= limiter.velocity * period / 1e9)
        wants_points = any(spec.type is OutputType.JOINT_TRAJECTORY for spec in contract.outputs)
        assert (output.trajectory is not None) == wants_points
        position = output.positions
    assert np.abs(position - start).max() > 1e-4
