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
    check_policy,
    known_contracts,
    load_contract,
)
from flashrt_ros.core.errors import PolicyMismatchError
from flashrt_ros.core.ingest import Ingest, JointReader, MeasuredPositions
from flashrt_ros.core.sync import Snapshot, Stamped, Synchroniser
from flashrt_ros.core.timeline import Accepted, CommandKind
from flashrt_runtime.checkpoints.presets import PRESETS, Preset, preset_named
from flashrt_runtime.serving import layouts

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
    check_policy(contract, spec_of(preset))
    for other in PRESETS.values():
        if other is not preset:
            with pytest.raises(PolicyMismatchError):
                check_policy(contract, spec_of(other))


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
        for stream, message in joint_messages(contract, pose).items():
            synchroniser.push(stream, now[0], now[0], message)
        output = commander.tick()
        assert output.kind is CommandKind.RUNNING, output.message
        assert output.positions is not None
        assert np.all((output.positions >= limiter.lower) & (output.positions <= limiter.upper))
        assert np.all(np.abs(output.positions - position) <= limiter.velocity * period / 1e9)
        wants_points = any(spec.type is OutputType.JOINT_TRAJECTORY for spec in contract.outputs)
        assert (output.trajectory is not None) == wants_points
        # This arm stands still, which only commands judged from the measured position follow.
        position = start if limiter.from_measured else output.positions
    assert np.abs(output.positions - start).max() > 1e-4


ARM = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6]
# By robot: a state in robot units and what the policy is told; a policy's action and where the robot goes.
# Written out, since a round trip through a wrong sign, unit or offset comes back unharmed.
NUMBERS = {
    "demo_arm": (
        [*ARM, 0.04], [*ARM, 0.04],
        [*ARM, 0.01], [*ARM, 0.01],
    ),
    "so101": (
        [1.5707963, -0.7853982, 0.5235988, -1.0471976, 3.1415927, 1.74], [90, -45, 30, -60, 180, 100],
        [90, -45, 30, -60, 180, 0], [1.5707963, -0.7853982, 0.5235988, -1.0471976, 3.1415927, -0.17],
    ),
    "ur5e": (
        [*ARM, 0.8], [*ARM, 1.0],
        [*ARM, 0.25], [*ARM, 0.2],
    ),
    "libero_franka": (
        [0.1, -0.2, 0.3, 1.5, -0.5, 0.25, 0.04, -0.04], [0.1, -0.2, 0.3, 1.5, -0.5, 0.25, 0.04, -0.04],
        [1, -1, 0.5, 1, -1, 0.5, 1], [0.05, -0.05, 0.025, 0.5, -0.5, 0.25, -0.02],
    ),
    "aloha": (
        [0.1, -0.96, 1.16, -0.4, 0.5, -0.6, 1.6296, 0.1, -0.96, 1.16, -0.4, 0.5, -0.6, 0.5476],
        [0.1, 0.96, -1.16, -0.4, 0.5, -0.6, 1.0, 0.1, 0.96, -1.16, -0.4, 0.5, -0.6, 0.0],
        [0.1, 0.96, -1.16, -0.4, 0.5, -0.6, 0.5, 0.1, 0.96, -1.16, -0.4, 0.5, -0.6, -1.0],
        [0.1, -0.96, 1.16, -0.4, 0.5, -0.6, 1.0476, 0.1, -0.96, 1.16, -0.4, 0.5, -0.6, -0.4524],
    ),
}


def test_a_state_and_an_action_by_the_numbers(contract: RobotContract) -> None:
    state, told, action, commanded = NUMBERS[contract.robot]
    names = [name for _, name in streams(contract)]
    payloads = joint_messages(contract, dict(zip(names, state, strict=True)))
    np.testing.assert_allclose(JointReader(contract).state(payloads), told, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(contract.actions_to_robot([action])[0], commanded, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        contract.actions_to_policy(np.array([commanded])), [action], rtol=1e-6, atol=1e-5
    )


def test_aloha_is_mapped_as_openpis_own_server_maps_it() -> None:
    """By layout aloha of the server: grippers in fractions of the finger's travel there, in rad here."""
    contract = load_contract("aloha")
    grippers, others = layouts.ALOHA_GRIPPERS, [i for i in range(14) if i not in layouts.ALOHA_GRIPPERS]
    actions = np.random.default_rng(2).uniform(-1.0, 1.0, (5, 14))
    ours, theirs = contract.actions_to_robot(actions), layouts.policy_to_aloha(actions.astype(np.float32))
    travel = layouts.COMMAND_OPEN - layouts.COMMAND_CLOSED
    np.testing.assert_allclose(ours[:, others], theirs[:, others], rtol=1e-6)
    np.testing.assert_allclose(
        ours[:, grippers], layouts.COMMAND_CLOSED + travel * theirs[:, grippers], rtol=1e-5, atol=1e-6
    )
    for limits in (contract.joints[f"{side}_gripper"].limits for side in ("left", "right")):
        assert limits is not None
        assert (limits.lower, limits.upper) == (layouts.COMMAND_CLOSED, layouts.COMMAND_OPEN)

    pose = np.random.default_rng(3).uniform(-0.5, 1.4, 14)
    angle = pose[grippers]
    finger = layouts.HORN_M * np.sin(angle) + np.sqrt(layouts.ARM_M**2 - (layouts.HORN_M * np.cos(angle))**2)
    robot = pose.copy()
    span = layouts.FINGER_OPEN_M - layouts.FINGER_CLOSED_M
    robot[grippers] = (finger - layouts.FINGER_CLOSED_M) / span
    names = [name for _, name in streams(contract)]
    payloads = joint_messages(contract, dict(zip(names, pose, strict=True)))
    np.testing.assert_allclose(
        JointReader(contract).state(payloads), layouts.aloha_to_policy(robot.astype(np.float32)),
        rtol=1e-4, atol=1e-5,
    )
