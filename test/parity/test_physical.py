"""From pixels, joint values and a sentence to the robot's actions, against an independent pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from parity_support import MAX_ABS
from physical import model_image, spread
from physical_support import check_physical, expected, observation, predict, robot, write_robot_checkpoint

from flashrt_runtime.processing.images import prepare_image

POLICIES = ("pi05", "pi0")


@pytest.mark.parametrize("policy", POLICIES)
def test_predict_equals_the_independent_pipeline(policy, tmp_path):
    write_robot_checkpoint(policy, tmp_path)
    check_physical(policy, predict(policy, tmp_path, observation()))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_observation_reaches_beyond_the_statistics(policy):
    """Else clipping and clamping would go unseen."""
    stats = robot()
    middle = stats.actions["mean"] if policy == "pi0" else (stats.actions["q01"] + stats.actions["q99"]) / 2
    beyond = np.abs(expected(policy) - middle) / spread(stats.actions, policy) > 1 + 100 * MAX_ABS[policy]
    assert beyond.mean() > 0.05
    state = (observation().state - stats.state["q01"]) / (stats.state["q99"] - stats.state["q01"])
    assert state.min() < 0
    assert state.max() > 1


@pytest.mark.parametrize("shape", [(480, 640), (720, 1280), (224, 224), (100, 37), (61, 448)])
def test_resampled_images_are_within_one_level_of_pillow(shape):
    """Two implementations of the same antialiased filter round differently by at most one level of 255."""
    image = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = prepare_image(image, 224, "antialias_uint8").numpy()
    assert np.abs(ours - model_image(image, 224)).max() <= 2 / 255 + 1e-6
