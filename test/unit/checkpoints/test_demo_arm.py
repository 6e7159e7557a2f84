"""The untrained policy of the demo: what it answers is near home, smooth and hardly noise."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt_runtime.checkpoints.presets import DEMO_ARM, DEMO_HOME
from flashrt_runtime.loading import load_model
from flashrt_runtime.untrained import make_checkpoint

RAD = slice(0, 6)
GRIPPER = 6


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    loaded = load_model(make_checkpoint(tmp_path_factory.mktemp("demo"), preset="demo_arm"), hardware="cpu")
    yield loaded
    loaded.close()


def scene(index):
    """Blocks of colour: pictures that differ as views of a table do."""
    coarse = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((28, 28, 1), np.uint8))


def chunk(policy, index=0, prompt="pick up the red block", seed=0, shift=0.0):
    state = np.array(DEMO_HOME, np.float32) + np.float32(shift) * np.array(
        [1, 1, 1, 1, 1, 1, 0.02], np.float32
    )
    return policy.predict([scene(index), scene(index + 100)], prompt, state, seed=seed)


def test_actions_stay_around_home(policy):
    chunks = np.stack([chunk(policy, index, shift=0.1 * index) for index in range(6)])
    away = np.abs(chunks - DEMO_HOME)
    assert away[..., RAD].max() < 1.5
    assert np.median(away[..., RAD]) > 0.01


def test_a_chunk_is_smooth(policy):
    """Joint speed within a chunk, at its rate of 50 Hz, stays below the demo arm's limits."""
    speed = np.abs(np.diff(chunk(policy), axis=0)) * DEMO_ARM.action_rate_hz
    assert speed[:, RAD].max() < 2.0
    assert speed[:, GRIPPER].max() < 0.1


def test_the_flows_noise_is_a_small_part(policy):
    """Spread by noise alone against spread by what is seen."""
    by_noise = np.std([chunk(policy, seed=seed) for seed in range(4)], axis=0).mean(axis=0)
    by_scene = np.std([chunk(policy, index) for index in range(4)], axis=0).mean(axis=0)
    assert (by_noise / by_scene < 0.1).all()


@pytest.mark.parametrize(
    "other",
    [{"index": 1}, {"prompt": "close the drawer"}, {"shift": 0.2}],
    ids=lambda other: next(iter(other)),
)
def test_everything_that_is_given_matters(policy, other):
    difference = np.abs(chunk(policy, **other) - chunk(policy))[:, RAD]
    assert difference.mean() > 1e-4


@pytest.mark.parametrize(("size", "policy_name", "seed"), [("tiny", "pi05", 5), ("tiny", "pi0", 0)])
def test_other_draws_stay_closer(size, policy_name, seed, tmp_path):
    """Not looked at one by one, so their travel is small."""
    path = make_checkpoint(tmp_path, size=size, preset="demo_arm", policy=policy_name, seed=seed)
    loaded = load_model(path, config=policy_name, hardware="cpu")
    away = np.abs(np.stack([chunk(loaded, index) for index in range(4)]) - DEMO_HOME)
    loaded.close()
    assert away[..., RAD].max() < 1.0
    assert away[..., GRIPPER].max() < 0.04
