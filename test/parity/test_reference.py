"""The float64 reference itself: against LeRobot, its settings both ways, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_cases import CASES, Case
from parity_support import TorchWeights, config_of, golden_of, relative_l2

from flashrt_runtime import models
from flashrt_runtime.errors import ObservationError
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.parity import reference_maths as maths
from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.reference import ReferencePolicy
from flashrt_runtime.parity.stages import Inputs, random_inputs

POLICIES = ("pi05", "pi0")
LONG = {policy: Case(policy, views=3, text=40, pad=8, steps=10, seed=1) for policy in POLICIES}


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_equals_lerobot(case):
    stages = ReferencePolicy(config_of(case), case.weights()).run(Inputs(**case.inputs()))
    stored, rows = golden_of(case), case.kept_rows()
    assert relative_l2(stages.actions, stored["actions"]) <= 3e-6
    assert relative_l2(stages.velocities[0], stored["velocity"]) <= 5e-6
    assert relative_l2(stages.prefix_embeddings[rows], stored["prefix_embeddings"]) <= 1e-6
    assert relative_l2(stages.keys[:, rows], stored["keys"]) <= 3e-6
    assert relative_l2(stages.values[:, rows], stored["values"]) <= 3e-6


def actions_of(case: Case, **settings) -> np.ndarray:
    """The reference's actions."""
    return ReferencePolicy(config_of(case), case.weights(), **settings).run(Inputs(**case.inputs())).actions


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rounded", [False, True])
def test_rope_frequencies_both_ways(policy, rounded):
    """The setting for checkpoints fine-tuned in torch bfloat16 does the same in model and reference."""
    case = LONG[policy]
    model = models.build(config_of(case), case.views, torch.float32, rounded)
    load_weights(model, config_of(case), TorchWeights(case.weights()), torch.device("cpu"))
    model.prepare(torch.device("cpu"))
    ours = capture(model, Inputs(**case.inputs())).actions
    assert relative_l2(ours, actions_of(case, rope_bf16=rounded)) <= 2e-6
    assert relative_l2(ours, actions_of(case, rope_bf16=not rounded)) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_float32_angles_are_a_rounding_and_nothing_else(policy):
    difference = relative_l2(actions_of(LONG[policy], angles_fp32=False), actions_of(LONG[policy]))
    assert 1e-8 < difference < 1e-5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("accumulated", [False, True])
def test_flow_time_both_ways(policy, accumulated):
    """openpi's float32 sum and LeRobot's rounded fraction do the same in model and reference."""
    case = LONG[policy]
    model = models.build(config_of(case), case.views, torch.float32, accumulate_time=accumulated)
    load_weights(model, config_of(case), TorchWeights(case.weights()), torch.device("cpu"))
    model.prepare(torch.device("cpu"))
    ours = capture(model, Inputs(**case.inputs())).actions
    same, other = (
        relative_l2(ours, actions_of(case, accumulate_time=way)) for way in (accumulated, not accumulated)
    )
    assert same <= 2e-6
    assert other > same


@pytest.mark.parametrize("policy", POLICIES)
def test_accumulated_time_differs_by_rounding(policy):
    difference = relative_l2(actions_of(LONG[policy], accumulate_time=True), actions_of(LONG[policy]))
    assert 1e-7 < difference < 2e-4


def test_masked_positions_change_nothing():
    """Padding and absent views may hold anything."""
    case = Case("pi05", views=2, masked=(1,), text=9, pad=4)
    inputs = Inputs(**case.inputs())
    images, tokens = inputs.images.copy(), inputs.tokens.copy()
    images[1] = 0.3
    tokens[9:] = 7
    model = ReferencePolicy(config_of(case), case.weights())
    plain, changed = model.run(inputs), model.run(replace(inputs, images=images, tokens=tokens))
    np.testing.assert_array_equal(plain.actions, changed.actions)


def test_attention_by_hand():
    """One query looking at two of three keys, two heads sharing one key head."""
    query = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    key = np.array([[[1.0, 1.0]], [[0.0, 3.0]], [[50.0, 50.0]]])
    value = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[9.0, 9.0]]])
    out = maths.attention(query, key, value, np.array([[True, True, False]]))
    first = 1 / (1 + np.exp((0 - 1) / np.sqrt(2)))
    second = 1 / (1 + np.exp((6 - 2) / np.sqrt(2)))
    np.testing.assert_allclose(out, [[first, 1 - first, second, 1 - second]])


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    generator = np.random.default_rng(3)
    query, key = generator.standard_normal((2, 1, 1, 8))

    def score(at: float, other: float) -> float:
        angles = [maths.rope_angles(np.array([position]), 8) for position in (at, other)]
        return float((maths.rope(query, angles[0]) * maths.rope(key, angles[1])).sum())

    assert score(3, 1) == pytest.approx(score(103, 101))
    assert score(3, 1) != pytest.approx(score(4, 1))
    assert score(5, 5) == pytest.approx(float((query * key).sum()))


def test_bfloat16_rounding_equals_torch():
    values = np.random.default_rng(4).standard_normal(1000) * 10.0 ** np.arange(-5, 5).repeat(100)
    torch_rounded = torch.from_numpy(values.astype(np.float32)).bfloat16().double().numpy()
    np.testing.assert_array_equal(maths.to_bfloat16(values), torch_rounded)


def test_inputs_that_do_not_fit_are_refused():
    case = Case("pi05")
    model = ReferencePolicy(config_of(case), case.weights())
    inputs = Inputs(**case.inputs())
    wrong = {
        "noise": inputs.noise[:-1],
        "images": inputs.images[..., :-1],
        "state": inputs.state[:7],
        "token_mask": inputs.token_mask[:-1],
        "tokens": np.where(inputs.token_mask, 512, 0),
    }
    for name, value in wrong.items():
        with pytest.raises(ObservationError, match=name):
            model.run(replace(inputs, **{name: value}))
    nothing = {name: np.zeros_like(getattr(inputs, name)) for name in ("image_mask", "token_mask")}
    with pytest.raises(ObservationError, match="nothing to attend to"):
        model.run(replace(inputs, **nothing))


def test_random_inputs_follow_their_seed():
    config = config_of(Case("pi0"))
    first, again, other = (random_inputs(config, 2, 9, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.noise, again.noise)
    assert not np.array_equal(first.noise, other.noise)
    first.check(config)
