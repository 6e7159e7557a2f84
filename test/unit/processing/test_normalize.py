"""States in, actions out: each family's formula, both directions, no clipping, exact bins."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrt_runtime.checkpoints.base import FeatureStats
from flashrt_runtime.checkpoints.rules import lerobot_rules, openpi_rules, override_rules
from flashrt_runtime.errors import CheckpointError, ObservationError, OptionError
from flashrt_runtime.processing.actions import ActionTransform
from flashrt_runtime.processing.normalize import Normalizer
from flashrt_runtime.processing.state import BIN_EDGES, StateTransform, discretize

RNG = np.random.default_rng(0)
WIDTH = 5
STATS = FeatureStats(
    mean=RNG.normal(size=WIDTH),
    std=RNG.uniform(0.1, 1, WIDTH),
    q01=RNG.uniform(-1.5, -0.5, WIDTH),
    q99=RNG.uniform(0.5, 1.5, WIDTH),
    min=np.full(WIDTH, -2.0),
    max=np.full(WIDTH, 2.5),
    q10=RNG.uniform(-0.5, -0.2, WIDTH),
    q90=RNG.uniform(0.2, 0.5, WIDTH),
)
VALUES = RNG.uniform(-4, 4, (200, WIDTH)).astype(np.float32)


def formula(rules, mode, x, inverse):
    """The published formula in exact order, in float64."""
    x = x.astype(np.float64)
    if mode == "identity":
        return x
    if mode == "mean_std":
        if inverse:
            return x * (STATS.std + rules.std_eps_inverse) + STATS.mean
        return (x - STATS.mean) / (STATS.std + rules.std_eps)
    low, high = {
        "quantile": (STATS.q01, STATS.q99),
        "quantile10": (STATS.q10, STATS.q90),
        "min_max": (STATS.min, STATS.max),
    }[mode]
    span = high - low + (0.0 if mode == "min_max" else rules.quantile_eps)
    return (x + 1) / 2 * span + low if inverse else (x - low) / span * 2 - 1


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("mode", ["quantile", "quantile10", "mean_std", "min_max", "identity"])
@pytest.mark.parametrize(
    "rules", [openpi_rules("pi05"), lerobot_rules("pi05")], ids=lambda rules: rules.family
)
def test_formulas(rules, mode, inverse):
    normalizer = Normalizer(STATS, mode, rules, None)
    found = (normalizer.inverse if inverse else normalizer.forward)(VALUES)
    expected = formula(rules, mode, VALUES, inverse)
    assert np.abs(expected).max() > 1.5  # values beyond the statistics: clipping would show
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 if rules.family == "openpi" else 1e-5)


@pytest.mark.parametrize(
    ("name", "mode", "value"),
    [("quantile_eps", "quantile", 1e-2), ("std_eps", "mean_std", 1e-2)],
)
def test_epsilons_matter_going_in(name, mode, value):
    rules = openpi_rules("pi05")
    changed = Normalizer(STATS, mode, replace(rules, **{name: value}), None).forward(VALUES)
    assert np.abs(changed - Normalizer(STATS, mode, rules, None).forward(VALUES)).max() > 1e-3


def test_epsilon_coming_back_is_its_own():
    rules = replace(openpi_rules("pi0"), std_eps_inverse=0.1)
    plain = Normalizer(STATS, "mean_std", openpi_rules("pi0"), None)
    changed = Normalizer(STATS, "mean_std", rules, None)
    np.testing.assert_array_equal(changed.forward(VALUES), plain.forward(VALUES))
    np.testing.assert_allclose(
        changed.inverse(VALUES) - plain.inverse(VALUES), (0.1 - 1e-6) * VALUES, atol=1e-9
    )


@pytest.mark.parametrize("mode", ["quantile", "min_max"])
def test_a_range_of_zero(mode):
    """LeRobot replaces it, openpi's quantiles never have it, and a rule set that divides by it is refused."""
    flat = FeatureStats(q01=np.zeros(1), q99=np.zeros(1), min=np.zeros(1), max=np.zeros(1))
    assert np.isfinite(Normalizer(flat, mode, lerobot_rules("pi05"), None).forward(np.zeros((1, 1)))).all()
    if mode == "quantile":
        assert Normalizer(flat, mode, openpi_rules("pi05"), None).forward(np.zeros((1, 1))) == -1
    broken = replace(openpi_rules("pi05"), quantile_eps=0.0)
    with pytest.raises(CheckpointError, match="dimension 0 have no range"):
        Normalizer(flat, mode, broken, None)


def test_missing_and_narrow_statistics():
    with pytest.raises(CheckpointError, match="needs the statistic 'q01'"):
        Normalizer(FeatureStats(mean=np.zeros(3), std=np.ones(3)), "quantile", openpi_rules("pi05"), None)
    with pytest.raises(CheckpointError, match="has 5 dimensions, the robot has 6"):
        Normalizer(STATS, "quantile", openpi_rules("pi05"), 6)


def test_a_feature_without_statistics_is_left_alone():
    """As LeRobot's public base checkpoint, whose normaliser is empty."""
    np.testing.assert_array_equal(
        Normalizer(FeatureStats(), "quantile", lerobot_rules("pi05"), None).forward(VALUES), VALUES
    )


def test_padded_statistics_are_cut_to_the_robot():
    transform = StateTransform(STATS, openpi_rules("pi05"), 3)
    whole = StateTransform(STATS, openpi_rules("pi05"), None)
    state = VALUES[0]
    np.testing.assert_array_equal(transform.normalize(state[:3]), whole.normalize(state)[:3])


def test_bins_are_256_over_the_open_range():
    values = np.array([-5, -1.000001, -1, -0.999, 0, 1 - 1 / 128 - 1e-6, 1 - 1 / 128, 0.999, 1, 7])
    np.testing.assert_array_equal(discretize(values), [-1, -1, 0, 0, 128, 254, 255, 255, 255, 255])
    assert len(BIN_EDGES) == 256


@given(st.lists(st.floats(-1.2, 1.2), min_size=1, max_size=8))
def test_bins_by_exact_arithmetic(values):
    exact = [min(255, (Fraction(value) + 1) * 128 // 1) if value >= -1 else -1 for value in values]
    assert discretize(np.array(values)).tolist() == [int(index) for index in exact]


@given(st.integers(-1, 256), st.sampled_from([-1, 0, 1]), st.integers(0, WIDTH - 1))
def test_float32_keeps_the_bin_of_the_exact_value(edge, nudge, joint):
    """States whose normalised value lies within a rounding error of an edge."""
    rules = openpi_rules("pi05")
    span = STATS.q99[joint] - STATS.q01[joint] + rules.quantile_eps
    value = STATS.q01[joint] + edge / 256 * span
    value = np.nextafter(value, nudge * np.inf) if nudge else value
    state = np.zeros(WIDTH)
    state[joint] = value
    exact = formula(rules, "quantile", state, inverse=False)
    rounded = StateTransform(STATS, rules, None).normalize(state)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(discretize(rounded), discretize(exact))
    np.testing.assert_allclose(rounded, exact, atol=2e-7)


@pytest.mark.parametrize("state", [np.zeros(4), np.zeros(6), np.zeros((1, 5)), np.float32(1)])
def test_states_of_another_shape(state):
    with pytest.raises(ObservationError, match=r"state: expected shape \(5,\)"):
        StateTransform(STATS, openpi_rules("pi05"), None).normalize(state)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite(value):
    with pytest.raises(ObservationError, match=r"values at \[2\] are not finite"):
        StateTransform(STATS, openpi_rules("pi05"), None).normalize(np.array([0, 0, value, 0, 0]))


def test_padding_is_zeros_at_the_end():
    padded = StateTransform.pad(np.arange(1, 4, dtype=np.float32), 6)
    assert padded.dtype == np.float32
    np.testing.assert_array_equal(padded, [1, 2, 3, 0, 0, 0])
    with pytest.raises(ObservationError, match="do not fit"):
        StateTransform.pad(np.zeros(7, np.float32), 6)


def model_actions(horizon=4, width=32):
    return np.random.default_rng(1).normal(0, 2, (horizon, width)).astype(np.float32)


def test_actions_are_sliced_and_unclipped():
    actions = model_actions()
    transform = ActionTransform(STATS, openpi_rules("pi05"), 4)
    found = transform.to_physical(actions)
    expected = formula(openpi_rules("pi05"), "quantile", np.c_[actions[:, :4], actions[:, :1]], inverse=True)[
        :, :4
    ]
    assert found.dtype == np.float32
    assert found.shape == (4, 4)
    assert (np.abs(actions[:, :4]) > 1).any()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_deltas_are_added_to_the_state_after_unnormalising():
    actions, state = model_actions(), np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    plain = ActionTransform(STATS, openpi_rules("pi05"), 4).to_physical(actions)
    delta = ActionTransform(STATS, openpi_rules("pi05"), 4, (True, False, True, False))
    np.testing.assert_allclose(delta.to_physical(actions, state) - plain, [[10, 0, 30, 0]] * 4, atol=1e-5)


def test_deltas_need_a_state_that_reaches():
    transform = ActionTransform(STATS, openpi_rules("pi05"), 4, (False, False, False, True))
    with pytest.raises(ObservationError, match="pass state="):
        transform.to_physical(model_actions())
    with pytest.raises(ObservationError, match="3 dimensions, but action 3"):
        transform.to_physical(model_actions(), np.zeros(3))
    with pytest.raises(CheckpointError, match="2 entries, the robot has 4"):
        ActionTransform(STATS, openpi_rules("pi05"), 4, (True, False))


@pytest.mark.parametrize("shape", [(32,), (2, 3), (1, 2, 32)])
def test_actions_of_another_shape(shape):
    with pytest.raises(ObservationError, match="actions: expected shape"):
        ActionTransform(STATS, openpi_rules("pi05"), 4).to_physical(np.zeros(shape, np.float32))


def test_rules_can_be_overridden_one_by_one():
    rules = openpi_rules("pi05")
    changed = override_rules(rules, {"resize": "bilinear_float", "quantile_eps": 0, "state_in_prompt": False})
    assert (changed.resize, changed.quantile_eps, changed.state_in_prompt) == ("bilinear_float", 0, False)
    assert replace(changed, resize=rules.resize, quantile_eps=1e-6, state_in_prompt=True) == rules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 1.0}, "unknown rule 'epsilon': expected one of family"),
        ({"resize": "nearest"}, "expected one of 'antialias_uint8'"),
        ({"state_mode": "z"}, "'mean_std'"),
        ({"state_in_prompt": "yes"}, "expected a bool"),
        ({"std_eps": True}, "expected a float"),
    ],
)
def test_unknown_rules_and_values(changes, message):
    with pytest.raises(OptionError, match=message):
        override_rules(openpi_rules("pi05"), changes)


def test_every_rule_that_differs_by_family_is_named():
    """The list that documentation and `flashrt info` show."""
    ours, theirs = openpi_rules("pi05"), lerobot_rules("pi05")
    differing = {name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)}
    eps = {"quantile_eps", "std_eps", "std_eps_inverse", "zero_range_eps"}
    assert differing == {"family", "resize", "accumulate_time"} | eps
    pi0 = {
        name
        for name in vars(ours)
        if getattr(openpi_rules("pi0"), name) != getattr(lerobot_rules("pi0"), name)
    }
    assert pi0 == differing | {"clean_underscores"}
