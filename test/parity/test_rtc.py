"""Real-time chunking: guided against LeRobot's RTCProcessor (numbers stored by oracles/rtc_oracle.py),
trained against the float64 reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from parity_cases import Case
from parity_support import GOLDENS, REFERENCE_L2, config_of, loaded, model_of, relative_l2
from rtc_cases import FIELDS, MASKS, MODELS, SCHEDULES, RtcCase

from flashrt_runtime.models.flow import FlowPolicy, Guide, guided
from flashrt_runtime.parity.reference import ReferencePolicy
from flashrt_runtime.parity.stages import Inputs
from flashrt_runtime.processing.guidance import gains, prefix_weights

MAX_ABS = 1e-6  # of a synthetic velocity
MODEL_MAX_ABS = 5e-6


@cache
def golden(name: str) -> np.ndarray:
    with np.load(GOLDENS / "lerobot_rtc.npz") as stored:
        return stored[name]


def guide(case: RtcCase, frozen: int = 0) -> Guide:
    """As `GuidanceEncoder` makes it; LeRobot freezes nothing at the end."""
    target = np.zeros((case.horizon, case.width), np.float32)
    target[: case.plan] = case.target()[: case.horizon]
    end = min(case.end, case.plan)
    return Guide(
        torch.from_numpy(target),
        torch.from_numpy(prefix_weights(case.schedule, case.delay, end, case.horizon)),
        torch.arange(case.horizon) < frozen,
        torch.from_numpy(gains(case.steps, case.weight)),
        trained=False,
    )


class Field:
    """The loop under test over a synthetic velocity: no weights, so that only its own rounding counts."""

    fused_expert = None
    guide: Guide | None = None
    integrate = FlowPolicy.integrate
    guided_velocity = FlowPolicy.guided_velocity

    def __init__(self, case: RtcCase) -> None:
        self.matrix, self.bias = (torch.from_numpy(array) for array in case.field())
        self.config = type("Config", (), {"num_steps": case.steps})

    def begin_suffix(self) -> None:
        """Nothing to place."""

    def velocity(self, x: torch.Tensor, step: int, clean: torch.Tensor | None = None) -> torch.Tensor:
        time = 1.0 - step / self.config.num_steps
        return torch.tanh(x @ self.matrix + time * self.bias)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_lerobots(schedule):
    for (delay, end, total), theirs in zip(MASKS, golden(f"weights/{schedule}"), strict=True):
        ours = prefix_weights(schedule, delay, end, total)
        np.testing.assert_allclose(ours, theirs[:total], rtol=0, atol=2e-7, err_msg=f"{delay, end, total}")


@pytest.mark.parametrize("case", FIELDS, ids=lambda case: case.name)
def test_guided_integration_is_lerobots(case):
    x = torch.from_numpy(case.noise())
    field = Field(case)
    field.guide = guide(case)
    field.integrate(x)
    np.testing.assert_allclose(x.numpy(), golden(case.name), rtol=0, atol=MAX_ABS)


@pytest.mark.parametrize("case", FIELDS, ids=lambda case: case.name)
def test_guidance_does_something(case):
    """The comparison above can fail: without guidance the chunks differ, unless every weight is zero."""
    x = torch.from_numpy(case.noise())
    Field(case).integrate(x)
    difference = np.abs(x.numpy() - golden(case.name)).max()
    assert difference == 0.0 if not guide(case).weight.any() else difference > 0.05


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_guided_policies_are_lerobots(case, tmp_path):
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in case.model.inputs().items()}
    with loaded(case.model, tmp_path) as policy:
        model = model_of(policy)
        chunks = []
        for given in (guide(case), None, guide(case, frozen=case.delay)):
            with guided(model, given):
                chunks.append(model.sample_actions(**inputs).numpy())
    guided_chunk, plain, frozen = chunks
    theirs = golden(case.name)
    assert np.abs(guided_chunk - theirs).max() <= MODEL_MAX_ABS
    assert np.abs(plain - theirs).max() > 0.05
    np.testing.assert_array_equal(frozen[: case.delay], case.target()[: case.delay])
    np.testing.assert_array_equal(frozen[case.delay :], guided_chunk[case.delay :])


class PerTokenTime(ReferencePolicy):
    """The float64 reference with a flow time for each action: 0 for the first `delay`, which are the plan."""

    delay = 0

    def _embed_suffix(self, sample, time, state):
        rows = [super()._embed_suffix(sample, 0.0, state)] * self.delay
        rows += [super()._embed_suffix(sample, time, state)] * (len(sample) - self.delay)
        first = len(rows[0][0]) - len(sample)  # pi0's state token comes before the actions
        actions = [tokens[first + index] for index, (tokens, _) in enumerate(rows)]
        conditions = [condition for _, condition in rows]
        x = np.stack([*rows[0][0][:first], *actions])
        return x, None if conditions[0] is None else np.stack(conditions)

    def _expert_norm(self, x, key, condition):
        if condition is None:
            return super()._expert_norm(x, key, None)
        pairs = [
            super(PerTokenTime, self)._expert_norm(row[None], key, of)
            for row, of in zip(x, condition, strict=True)
        ]
        return np.concatenate([normed for normed, _ in pairs]), np.stack([gate for _, gate in pairs])

    def actions(self, inputs: Inputs, plan: np.ndarray) -> np.ndarray:
        """(horizon, action_dim): integrated with the first `delay` rows clean at every step."""
        embeddings, valid = self.embed_prefix(self.vision_tower(inputs.images), inputs)
        keys, values = self.prefix_cache(embeddings, valid)
        x, state = inputs.noise.astype(np.float64), inputs.state.astype(np.float64)
        for time in self.timesteps():
            x[: self.delay] = plan[: self.delay]
            x = x - self.velocity(x, time, state, keys, values, valid) / self.config.num_steps
        x[: self.delay] = plan[: self.delay]
        return x


@pytest.mark.parametrize("delay", [0, 1, 4, 10])
@pytest.mark.parametrize("name", ["pi05", "pi0"])
def test_trained_prefixes_equal_the_reference(name, delay, tmp_path):
    """Training-time real-time chunking (arXiv:2512.05964): clean tokens at time 0 among noisy ones."""
    case = Case(name, text=20, steps=4, seed=6)
    plan = RtcCase("linear", model=case).target()
    inputs = Inputs(**case.inputs())
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in inputs.arrays().items()}
    clean = Guide(
        torch.from_numpy(plan), torch.zeros(10), torch.arange(10) < delay, torch.zeros(4), trained=True
    )
    with loaded(case, tmp_path) as policy:
        model = model_of(policy)
        with guided(model, clean):
            ours = model.sample_actions(**tensors).numpy()
        plain = model.sample_actions(**tensors).numpy()
    reference = PerTokenTime(config_of(case), case.weights())
    reference.delay = delay
    assert relative_l2(ours, reference.actions(inputs, plan)) <= REFERENCE_L2
    if 0 < delay < 10:
        assert relative_l2(ours[delay:], plain[delay:]) > 0.01, "the prefix does not reach the other actions"
