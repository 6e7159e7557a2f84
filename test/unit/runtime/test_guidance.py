"""predict(rtc=...): what is frozen comes out as planned, nothing else is touched, bad guidance is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime import Guidance, Policy
from flashrt_runtime.errors import CheckpointError, ObservationError, OptionError
from flashrt_runtime.models.flow import Guide
from flashrt_runtime.ops import reference
from flashrt_runtime.processing.guidance import GuideArrays, gains, prefix_weights
from flashrt_runtime.untrained.linear_flow import make_linear_flow
from flashrt_runtime.untrained.random import make_checkpoint

PROMPT = "pick up the red block"
STATE = np.linspace(-0.3, 0.3, 7)
MAX_DELAY = 6
DELTA = (True,) * 6 + (False,)


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtc") / "tiny"
    made = make_checkpoint(folder, size="tiny", preset="demo_arm", policy=request.param)
    declare(made, MAX_DELAY)
    return made


def declare(checkpoint: Path, delay: object) -> None:
    file = checkpoint / "config.json"
    content = json.loads(file.read_text())
    content["flashrt"]["rtc_training_max_delay"] = delay
    file.write_text(json.dumps(content))


def load(checkpoint: Path, rtc: str = "guided", **options: object) -> Policy:
    return flashrt_runtime.load_model(
        checkpoint, config="auto", hardware="cpu", num_steps=4, rtc=rtc, **options  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Iterator[Policy]:
    loaded = load(checkpoint)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    """A policy whose velocity is a flow towards actions, as a trained one's: random weights are not."""
    loaded = load(make_linear_flow(tmp_path_factory.mktemp("rtc") / "flow", spread=0.3))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]


@pytest.fixture(scope="module")
def plan(policy: Policy, images: list[np.ndarray]) -> np.ndarray:
    """What is left of a chunk of other noise and another state."""
    return policy.predict(images, PROMPT, STATE * 0.5, seed=9)[5:]


def test_frozen_actions_come_out_as_planned(
    policy: Policy, images: list[np.ndarray], plan: np.ndarray
) -> None:
    guided = policy.predict(images, PROMPT, STATE, seed=1, rtc=Guidance(plan, delay=4, horizon=20))
    np.testing.assert_allclose(guided[:4], plan[:4], atol=2e-6)


@pytest.mark.parametrize(("schedule", "nearest", "farthest"), [
    ("zeros", (0.9, 1.1), (0.9, 1.1)), ("ones", (0.0, 0.05), (0.0, 0.05)),
    ("linear", (0.0, 0.1), (0.3, 0.95)), ("exp", (0.0, 0.15), (0.6, 1.0)),
])
def test_every_schedule_pulls_as_its_weights_say(
    flow: Policy, images: list[np.ndarray], schedule: str, nearest: tuple, farthest: tuple
) -> None:
    """What is left of the distance to the plan, right behind the frozen actions and before the horizon."""
    plan = flow.predict(images, PROMPT, STATE, seed=9)[5:]
    free = flow.predict(images, PROMPT, STATE, seed=1)
    guidance = Guidance(plan, delay=2, horizon=12, schedule=schedule)  # type: ignore[arg-type]
    guided = flow.predict(images, PROMPT, STATE, seed=1, rtc=guidance)
    before, after = (np.abs(actions[:20] - plan[:20]).mean(axis=1) for actions in (free, guided))
    left = after / before
    assert nearest[0] <= left[2] <= nearest[1], left
    assert farthest[0] <= left[11] <= farthest[1], left
    np.testing.assert_allclose(left[12:], 1.0, atol=0.05)


def test_the_flow_is_the_one_in_closed_form(flow: Policy, images: list[np.ndarray]) -> None:
    """Else the test above would test something else: actions move by `spread` times the noise."""
    assert flow._actions is not None
    noise = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    zero, one = (
        flow._actions.to_model(flow.predict(images, PROMPT, STATE, noise=n), STATE)
        for n in (np.zeros_like(noise), noise)
    )
    np.testing.assert_allclose(one - zero, 0.3 * noise[:, :7], atol=0.01)


def test_without_guidance_a_guided_policy_is_a_plain_one(
    checkpoint: Path, policy: Policy, images: list[np.ndarray]
) -> None:
    plain = load(checkpoint, "off")
    want = plain.predict(images, PROMPT, STATE, seed=1)
    plain.close()
    assert policy.predict(images, PROMPT, STATE, seed=1).tobytes() == want.tobytes()


def test_zero_weights_are_the_plain_flow_bit_for_bit(policy: Policy, images: list[np.ndarray]) -> None:
    """Also with a target that holds anything: what static buffers hold when there is nothing to guide."""
    model = policy._model
    assert model is not None
    inputs = policy._encode(images, PROMPT, STATE, seed=1)
    want = policy._run(model, inputs)
    none = GuideArrays.none(model.config)
    garbage = GuideArrays(np.full_like(none.target, np.nan), none.weight, none.frozen, none.gains + 3)
    for guide in (none, garbage):
        assert policy._run(model, inputs, guide).tobytes() == want.tobytes()


def test_a_correction_of_weight_zero_keeps_every_bit() -> None:
    velocity = torch.tensor([[-0.0, 0.0, 1e-45, -3.0, math.inf]])
    x, target = torch.full((1, 5), -0.0), torch.full((1, 5), math.nan)
    corrected = reference.guide_velocity(velocity, x, target, torch.zeros(1), torch.tensor(10.0), 1.0)
    assert corrected.numpy().tobytes() == velocity.numpy().tobytes()


def test_only_what_the_plan_covers_is_guided(policy: Policy) -> None:
    """No zero-padded prefix: zero in model space is the mean of the training data, not "nothing"."""
    arrays = policy._encode_guidance(Guidance(np.zeros((5, 7)), delay=2, schedule="ones"), STATE)
    assert arrays.weight.tolist() == [1.0] * 5 + [0.0] * 45
    assert arrays.frozen.tolist() == [True] * 2 + [False] * 48
    longer = policy._encode_guidance(Guidance(np.zeros((90, 7)), delay=2, schedule="ones"), STATE)
    assert longer.target.shape == (50, 32)
    assert longer.weight.all()


def test_an_empty_plan_and_an_omitted_delay_do_nothing_harmful(
    flow: Policy, images: list[np.ndarray]
) -> None:
    policy, plan = flow, flow.predict(images, PROMPT, STATE, seed=9)
    free = policy.predict(images, PROMPT, STATE, seed=1)
    empty = policy.predict(images, PROMPT, STATE, seed=1, rtc=Guidance(plan[:0]))
    assert empty.tobytes() == free.tobytes()
    guided = policy.predict(images, PROMPT, STATE, seed=1, rtc=Guidance(plan))
    assert np.abs(guided[:5] - plan[:5]).mean() < np.abs(free[:5] - plan[:5]).mean()


def test_differences_to_the_state_are_re_anchored(checkpoint: Path, images: list[np.ndarray]) -> None:
    """The same plan in the robot's units is another one in model space once the arm has moved; kept as it
    was, the chunk would jump by what the arm moved (the sawtooth)."""
    policy = load(checkpoint, delta_actions=DELTA)
    moved = STATE + 0.1
    plan = policy.predict(images, PROMPT, STATE, seed=9)
    guided = policy.predict(images, PROMPT, moved, seed=1, rtc=Guidance(plan, delay=5))
    np.testing.assert_allclose(guided[:5], plan[:5], atol=2e-6)
    assert policy._actions is not None
    kept = policy._actions.to_model(plan, STATE)
    model_space = np.zeros((50, 32), np.float32)
    model_space[:, :7] = kept
    again = Guidance(model_space, delay=5, model_space=True, anchor=STATE)
    np.testing.assert_allclose(
        policy.predict(images, PROMPT, moved, seed=1, rtc=again), guided, atol=2e-5
    )
    with pytest.raises(ObservationError, match="pass that state as anchor="):
        policy.predict(images, PROMPT, moved, seed=1, rtc=Guidance(model_space, model_space=True))
    naive = policy._actions.to_physical(model_space, moved.astype(np.float32))
    assert np.abs(naive[:5, :6] - plan[:5, :6]).min() > 0.09  # what the anchor saves us from
    policy.close()


def test_a_plan_in_model_space_keeps_the_models_own_width(policy: Policy) -> None:
    own = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    arrays = policy._encode_guidance(Guidance(own, model_space=True), None)
    np.testing.assert_array_equal(arrays.target, own)


def test_trained_mode_freezes_and_the_rest_knows(
    checkpoint: Path, images: list[np.ndarray], plan: np.ndarray
) -> None:
    trained = load(checkpoint, "trained")
    assert trained.spec.rtc_training_max_delay == MAX_DELAY
    free = trained.predict(images, PROMPT, STATE, seed=1)
    actions = trained.predict(images, PROMPT, STATE, seed=1, rtc=Guidance(plan, delay=3))
    np.testing.assert_allclose(actions[:3], plan[:3], atol=2e-6)
    assert np.abs(actions[3:] - free[3:]).max() > 1e-3
    beyond = plan.copy()
    beyond[3:] += 1.0  # of the plan, a trained policy sees the frozen part only
    again = trained.predict(images, PROMPT, STATE, seed=1, rtc=Guidance(beyond, delay=3))
    np.testing.assert_array_equal(again, actions)
    with pytest.raises(OptionError, match=r"delay=7, but the checkpoint was trained for up to 6"):
        trained.predict(images, PROMPT, STATE, seed=1, rtc=Guidance(plan, delay=7))
    trained.close()


def test_trained_mode_needs_a_checkpoint_that_declares_it(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "tiny", size="tiny", preset="demo_arm")
    with pytest.raises(OptionError, match="does not declare rtc_training_max_delay: use rtc='guided'"):
        load(made, "trained")
    with pytest.raises(OptionError, match="rtc is 'on': expected one of off, guided, trained"):
        load(made, "on")
    for wrong, match in ((0, "expected 1 to 49"), (50, "expected 1 to 49"), ("3", "expected an integer")):
        declare(made, wrong)
        with pytest.raises(CheckpointError, match=match):
            load(made)


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"delay": -1}, OptionError, "delay is -1"),
    ({"delay": 1.0}, OptionError, "delay is 1.0"),
    ({"delay": True}, OptionError, "delay is True"),
    ({"delay": 11}, OptionError, "delay=11, but only 10 actions of the plan"),
    ({"horizon": -2}, OptionError, "horizon is -2"),
    ({"schedule": "cosine"}, OptionError, "schedule is 'cosine': expected one of zeros, ones, linear, exp"),
    ({"max_weight": 0.0}, OptionError, "max_weight is 0.0"),
    ({"max_weight": math.nan}, OptionError, "max_weight is nan"),
    ({"plan": np.zeros((10, 6))}, ObservationError, r"plan: expected floats of shape \(n, 7\)"),
    ({"plan": np.zeros(7)}, ObservationError, r"plan: expected floats of shape \(n, 7\)"),
    ({"plan": np.zeros((10, 7), int)}, ObservationError, "plan: expected floats"),
    ({"plan": np.full((10, 7), np.nan)}, ObservationError, "not finite"),
    ({"model_space": True}, ObservationError, r"plan: expected floats of shape \(n, 32\)"),
])
def test_guidance_that_makes_no_sense_is_refused(
    policy: Policy, images: list[np.ndarray], changes: dict, error: type[Exception], match: str
) -> None:
    guidance = Guidance(**{"plan": np.zeros((10, 7)), **changes})
    with pytest.raises(error, match=match):
        policy.predict(images, PROMPT, STATE, seed=1, rtc=guidance)


def test_guidance_needs_a_policy_loaded_for_it(checkpoint: Path, images: list[np.ndarray]) -> None:
    plain = load(checkpoint, "off")
    with pytest.raises(OptionError, match="loaded without: use load_model"):
        plain.predict(images, PROMPT, STATE, rtc=Guidance(np.zeros((10, 7))))
    plain.close()


def test_weights_and_gains_by_hand() -> None:
    assert prefix_weights("linear", 2, 5, 7).tolist() == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert prefix_weights("zeros", 2, 5, 7).tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert prefix_weights("ones", 2, 5, 7).tolist() == [1, 1, 1, 1, 1, 0, 0]
    half = 0.5 * math.expm1(0.5) / (math.e - 1)
    assert prefix_weights("exp", 0, 1, 2).tolist() == pytest.approx([half, 0])
    assert prefix_weights("linear", 9, 3, 4).tolist() == [1, 1, 1, 0]
    # tau = 0, 1/2: (1/1) * (1/4 + 1/4) / (1/4) = 2
    assert gains(2, 10.0).tolist() == [10.0, 2.0]
    assert gains(2, 1.5).tolist() == [1.5, 1.5]


def test_guide_on_the_device_has_the_layout_of_the_arrays(policy: Policy) -> None:
    model = policy._model
    assert model is not None
    layout = GuideArrays.layout(model.config)
    for name, array in GuideArrays.none(model.config).arrays().items():
        dtype, shape = layout[name]
        assert (torch.from_numpy(array).dtype, array.shape) == (dtype, shape)
    assert set(layout) == {field for field in Guide.__dataclass_fields__ if field != "trained"}


def test_tokens_cannot_be_guided(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "fast", size="tiny", preset="libero", policy="pi0fast")
    with pytest.raises(OptionError, match="pi0fast generates tokens: use rtc='off'"):
        load(made, "guided")
