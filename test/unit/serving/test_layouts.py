"""openpi's observation layouts: which key is which view, and ALOHA's convention of joints and grippers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashrt_runtime.errors import OptionError
from flashrt_runtime.serving.layouts import (
    LAYOUTS,
    aloha_to_policy,
    check_layout,
    layout_of,
    policy_to_aloha,
)
from flashrt_runtime.serving.refusals import Refusal
from flashrt_runtime.spec import DEFAULT_VIEWS

PIXELS = {name: np.full((3, 8, 8), value, np.uint8) for value, name in enumerate(
    ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"))}  # fmt: skip
ALOHA = {"images": PIXELS, "state": np.arange(14) / 20, "prompt": "fold"}


@pytest.fixture(scope="module")
def spec(policy):
    """Of an ALOHA policy with three cameras."""
    return replace(policy.spec, views=DEFAULT_VIEWS, state_dim=14, action_dim=14)


def test_alohas_cameras_and_state(spec):
    layout = LAYOUTS["aloha_sim"]
    images = layout.read_images(ALOHA, spec, {})
    assert {view: int(image[0, 0, 0]) for view, image in images.items()} == {
        "base_0_rgb": 0,
        "left_wrist_0_rgb": 2,
        "right_wrist_0_rgb": 3,
    }
    assert images["base_0_rgb"].shape == (8, 8, 3)
    np.testing.assert_array_equal(layout.read_state(ALOHA), np.float32(np.arange(14) / 20))


def test_the_real_alohas_state_is_converted(spec):
    """Against the slider crank the other way round: the finger's place from an angle."""
    angle = np.array([0.9, 1.2])  # rad
    # the finger's place at that angle: the far crossing of horn and arm
    finger = 0.022 * np.sin(angle) + np.sqrt(0.036**2 - (0.022 * np.cos(angle)) ** 2)
    state = np.arange(14) / 20
    state[[6, 13]] = (finger - 0.01844) / (0.05800 - 0.01844)
    converted = LAYOUTS["aloha"].read_state({"images": PIXELS, "state": state})
    np.testing.assert_allclose(converted[[6, 13]], (angle - 0.5476) / (1.6296 - 0.5476), rtol=1e-5)
    joints = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    signs = np.array([1, -1, -1, 1, 1, 1, 1, -1, -1, 1, 1, 1])
    np.testing.assert_allclose(converted[joints], state[joints] * signs, rtol=1e-6)


def test_alohas_actions_are_converted_back():
    actions = np.zeros((2, 14), np.float32)
    actions[:, 1] = 0.5
    actions[:, [6, 13]] = [[0.0, 1.0], [0.5, 0.25]]
    commands = policy_to_aloha(actions)
    assert commands[0, 1] == -0.5
    angle = actions[:, [6, 13]] + 0.5476
    np.testing.assert_allclose(commands[:, [6, 13]], (angle + 0.6213) / (1.4910 + 0.6213), rtol=1e-6)
    assert actions[0, 1] == 0.5, "the policy's own actions are left alone"


def test_a_finger_beyond_its_travel_stays_finite():
    state = np.zeros(14, np.float32)
    for value in (-5.0, -0.4661, 0.0, 1.0, 50.0):
        state[[6, 13]] = value
        assert np.isfinite(aloha_to_policy(state)).all()


def test_alohas_convention_is_never_guessed(spec):
    with pytest.raises(Refusal, match="--layout aloha or --layout aloha_sim"):
        layout_of(ALOHA, "auto")
    assert layout_of(ALOHA, "aloha_sim") is LAYOUTS["aloha_sim"]


def test_layouts_are_known_by_their_keys():
    assert layout_of({"observation/image": 0}, "auto") is LAYOUTS["libero"]
    assert layout_of({"observation": {"image": 0}}, "auto") is LAYOUTS["libero"]
    assert layout_of({"observation/exterior_image_1_left": 0}, "auto") is LAYOUTS["droid"]
    assert layout_of({"images": {"base_0_rgb": 0}, "state": 0}, "auto") is None
    assert layout_of({"observation/image": 0}, "native") is None


def test_a_layout_that_does_not_fit_is_refused_at_the_start(spec):
    with pytest.raises(OptionError, match="unknown layout 'franka'"):
        check_layout("franka", spec, {})
    with pytest.raises(OptionError, match="a state of 8 values, the policy one of 14"):
        check_layout("libero", spec, {})
    with pytest.raises(OptionError, match="no camera for right_wrist_0_rgb"):
        check_layout("libero", replace(spec, state_dim=8), {})
    with pytest.raises(OptionError, match="converts 14 actions, the policy gives 7"):
        check_layout("aloha", replace(spec, action_dim=7), {})
    check_layout("aloha", spec, {})
    check_layout("libero", replace(spec, state_dim=8, views=DEFAULT_VIEWS[:2]), {})


def test_views_with_names_of_their_own_need_a_camera_each(spec):
    own = replace(spec, views=("image", "image2"), state_dim=8)
    with pytest.raises(OptionError, match="no camera for image, image2"):
        check_layout("libero", own, {})
    cameras = {"image": "observation/image", "image2": "observation/wrist_image"}
    check_layout("libero", own, cameras)
    with pytest.raises(OptionError, match="--camera wrist"):
        check_layout("libero", own, {"wrist": "observation/image"})
    observation = {
        "observation/image": np.full((8, 8, 3), 1, np.uint8),
        "observation/wrist_image": np.full((8, 8, 3), 2, np.uint8),
    }
    images = LAYOUTS["libero"].read_images(observation, own, cameras)
    assert (images["image"].max(), images["image2"].max()) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.zeros(13)}, "layout aloha_sim has 14 values, got 13"),
        ({"state": np.full(14, np.inf)}, "are not finite"),
        ({"state": None}, "expected a list of numbers"),
    ],
)
def test_a_wrong_state(changes, message):
    with pytest.raises(Refusal, match=message):
        LAYOUTS["aloha_sim"].read_state(ALOHA | changes)


def test_a_missing_camera(spec):
    without = ALOHA | {"images": {"cam_high": PIXELS["cam_high"]}}
    with pytest.raises(Refusal, match="no 'images/cam_left_wrist' in the observation"):
        LAYOUTS["aloha_sim"].read_images(without, spec, {})
