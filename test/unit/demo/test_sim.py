import os
import subprocess
import sys

import numpy as np
import pytest

from flashrt_ros.demo.sim import CAMERAS, ArmSim, CameraRenderer

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper")


@pytest.fixture
def sim():
    return ArmSim()


def can_render():
    return os.environ["MUJOCO_GL"] != "disable"


def run(sim, path, seconds):
    """Step along `path(t) -> targets`; (targets, measured) at every step."""
    commanded, measured = [], []
    for _ in range(round(seconds / sim.timestep)):
        target = path(sim.time)
        sim.step(target)
        commanded.append(target)
        measured.append(sim.joints().positions)
    return np.array(commanded), np.array(measured)


def test_joints_and_home(sim):
    assert sim.joint_names == JOINTS
    np.testing.assert_array_equal(sim.joints().positions, sim.home)
    assert np.all(sim.home > sim.lower)
    assert np.all(sim.home < sim.upper)


def test_stays_at_home_against_gravity(sim):
    _, measured = run(sim, lambda _: sim.home, 2.0)
    assert np.abs(measured - sim.home).max() < 1e-3


def test_follows_a_gentle_command_closely(sim):
    amplitude = np.array([0.4] * 6 + [0.01])

    def path(time):
        return sim.home + amplitude * np.sin(2 * np.pi * 0.4 * time)  # up to 1 rad/s

    commanded, measured = run(sim, path, 12.0)
    error = (commanded - measured)[:, :6]
    assert np.sqrt(np.mean(error**2)) < 0.03
    assert np.abs(np.diff(measured[:, :6], axis=0)).sum() > 0.5


@pytest.mark.parametrize("sign", [-1, 1])
def test_commands_beyond_limits_end_at_the_limit(sim, sign):
    limit = np.where(sign > 0, sim.upper, sim.lower)[[0, 5, 6]]

    def outwards(time):
        return sim.home + sign * np.array([1.5, 0, 0, 0, 0, 1.5, 0.02]) * time

    _, measured = run(sim, outwards, 3.5)
    reached = measured[:, [0, 5, 6]]
    assert np.all(sign * (reached - limit) < [0.03, 0.03, 0.003])
    np.testing.assert_allclose(reached[-1], limit, atol=0.01)


def test_gripper_opens_and_closes_with_both_fingers(sim):
    for opening in (0.04, 0.0):
        target = np.append(sim.home[:6], opening)
        run(sim, lambda _, target=target: target, 1.0)
        assert sim.joints().positions[6] == pytest.approx(opening, abs=2e-3)
        fingers = [sim.state()[sim.model.joint(name).qposadr[0]] for name in ("gripper", "gripper_mirror")]
        assert fingers[0] == pytest.approx(fingers[1], abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_physics_stays_stable_under_random_commands(sim, seed):
    generator = np.random.default_rng(seed)
    target = sim.home

    def path(time):
        nonlocal target
        if round(time / sim.timestep) % 20 == 0:
            target = generator.uniform(sim.lower, sim.upper)  # jumps of 6 rad, into table and blocks
        return target

    _, measured = run(sim, path, 20.0)
    assert np.all(np.isfinite(measured))
    assert np.abs(sim.joints().velocities[:6]).max() < 60.0


def test_blocks_stay_where_they_are_while_nothing_touches_them(sim):
    before = sim.state()
    run(sim, lambda _: sim.home, 3.0)
    blocks = slice(0, 28)
    assert np.abs(sim.state()[blocks] - before[blocks]).max() < 2e-3


def test_reset_is_repeatable(sim):
    start = sim.state()
    path = lambda time: sim.home + 0.3 * np.sin(3 * time) * (sim.upper > 1)  # noqa: E731
    _, first = run(sim, path, 1.0)
    sim.reset()
    np.testing.assert_array_equal(sim.state(), start)
    _, second = run(sim, path, 1.0)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("bad", [np.zeros(6), np.full(7, np.nan)])
def test_targets_of_the_wrong_kind_are_refused(sim, bad):
    with pytest.raises(ValueError, match="7 finite numbers"):
        sim.step(bad)


@pytest.mark.skipif(not can_render(), reason="no libEGL or libOSMesa on this machine")
class TestCameras:
    def test_frames_have_the_size_asked_for_and_show_something(self, sim):
        for width, height in ((224, 224), (320, 240)):
            with CameraRenderer(sim.model, width, height) as renderer:
                for camera in CAMERAS:
                    image = renderer.render(sim.state(), camera)
                    assert image.shape == (height, width, 3)
                    assert image.dtype == np.uint8
                    assert image.std() > 20

    def test_base_camera_shows_the_coloured_blocks(self, sim):
        with CameraRenderer(sim.model, 320, 240) as renderer:
            pixels = renderer.render(sim.state(), "base_camera").reshape(-1, 3).astype(int)
        red, green, blue = pixels.T
        assert np.sum((red > 2 * green) & (red > 2 * blue) & (red > 80)) > 40
        assert np.sum((green > 1.5 * red) & (green > 1.3 * blue)) > 40
        assert np.sum((red > 120) & (green > 100) & (blue < 80)) > 40

    def test_both_cameras_see_the_arm_move(self, sim):
        with CameraRenderer(sim.model, 224, 224) as renderer:
            before = [renderer.render(sim.state(), camera).astype(int) for camera in CAMERAS]
            again = [renderer.render(sim.state(), camera).astype(int) for camera in CAMERAS]
            target = sim.home + np.array([0.3, 0.1, -0.1, 0.1, 0.1, 0.2, 0.0])
            run(sim, lambda _: target, 1.5)
            after = [renderer.render(sim.state(), camera).astype(int) for camera in CAMERAS]
        for first, second, moved in zip(before, again, after, strict=True):
            np.testing.assert_array_equal(first, second)
            assert np.mean(np.abs(first - moved).max(axis=2) > 25) > 0.02

    def test_rendering_leaves_the_physics_alone(self, sim):
        state = sim.state()
        with CameraRenderer(sim.model, 64, 64) as renderer:
            moved = state.copy()
            moved[-8:] = 0.0
            renderer.render(moved, "base_camera")
        np.testing.assert_array_equal(sim.state(), state)


def test_without_opengl_physics_work_and_rendering_says_what_to_install():
    code = (
        "from flashrt_ros.demo.sim import ArmSim, CameraRenderer, RenderError\n"
        "sim = ArmSim()\n"
        "sim.step(sim.home)\n"
        "try:\n    CameraRenderer(sim.model, 64, 64)\n"
        "except RenderError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "disable", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MUJOCO_GL=disable" in done.stdout
    assert "install libegl1" in done.stdout


def test_contract_limits_lie_within_the_robots_own(sim):
    yaml = pytest.importorskip("yaml")
    from pathlib import Path

    path = Path(__file__).parents[3] / "config" / "robots" / "demo_arm.yaml"
    joints = yaml.safe_load(path.read_text())["joints"]
    assert tuple(joint["name"] for joint in joints) == sim.joint_names
    for joint, lower, upper in zip(joints, sim.lower, sim.upper, strict=True):
        low, high = joint["limits"]["position"]
        assert lower <= low < high <= upper, joint["name"]
