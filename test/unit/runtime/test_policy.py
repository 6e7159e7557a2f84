"""The contract of `load_model` and of the policy it returns, on a small checkpoint from disk."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime import Policy
from flashrt_runtime.errors import (
    ActionError,
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    HardwareError,
    NotSupportedYetError,
    ObservationError,
    OptionError,
    PromptError,
    PromptTooLongError,
)
from flashrt_runtime.models import FlowPolicy

PROMPT = "pick up the red block"
VIEWS = ("base_0_rgb", "left_wrist_0_rgb")


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(2)]


STATE = np.zeros(7)


def test_actions_in_the_robots_units(policy: Policy, images: list[np.ndarray]) -> None:
    actions = policy.predict(images, PROMPT, STATE, seed=1)
    assert actions.shape == (50, 7)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()
    assert policy.spec.views == VIEWS
    assert (policy.spec.state_dim, policy.spec.action_dim) == (7, 7)
    assert policy.spec.action_representation == "absolute"


def test_a_seed_is_the_noise_it_draws(policy: Policy, images: list[np.ndarray]) -> None:
    first, again = (policy.predict(images, PROMPT, STATE, seed=3) for _ in range(2))
    other = policy.predict(images, PROMPT, STATE, seed=4)
    noise = torch.randn((50, 32), generator=torch.Generator().manual_seed(3)).numpy()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, policy.predict(images, PROMPT, STATE, noise=noise))
    assert not np.array_equal(first, other)
    assert not np.array_equal(policy.predict(images, state=STATE), policy.predict(images, state=STATE))


def test_images_by_name_and_by_alias(policy: Policy, images: list[np.ndarray]) -> None:
    want = policy.predict(images, PROMPT, STATE, seed=1)
    by_name = dict(zip(reversed(VIEWS), reversed(images), strict=True))
    np.testing.assert_array_equal(policy.predict(by_name, PROMPT, STATE, seed=1), want)
    by_alias = {"image": images[0], "wrist_image": images[1]}
    np.testing.assert_array_equal(policy.predict(by_alias, PROMPT, STATE, seed=1), want)
    swapped = policy.predict(images[::-1], PROMPT, STATE, seed=1)
    assert not np.array_equal(swapped, want)


def test_an_absent_view_is_masked_when_said_so(policy: Policy, images: list[np.ndarray]) -> None:
    assert policy.spec.optional_views == VIEWS
    by_name: dict[str, np.ndarray | None] = dict(zip(VIEWS, images, strict=True))
    both = policy.predict(by_name, PROMPT, STATE, seed=1)
    base = policy.predict({**by_name, VIEWS[1]: None}, PROMPT, STATE, seed=1)
    wrist = policy.predict({**by_name, VIEWS[0]: None}, PROMPT, STATE, seed=1)
    assert not np.array_equal(base, both)
    assert not np.array_equal(base, wrist)
    # What was there does not matter: it is masked, neither black nor the last frame.
    policy.predict({**by_name, VIEWS[1]: images[1] // 2}, PROMPT, STATE, seed=1)
    np.testing.assert_array_equal(policy.predict({**by_name, VIEWS[1]: None}, PROMPT, STATE, seed=1), base)
    black = policy.predict({**by_name, VIEWS[1]: np.zeros_like(images[1])}, PROMPT, STATE, seed=1)
    assert not np.array_equal(black, base)
    with pytest.raises(ObservationError, match="no image of base_0_rgb, left_wrist_0_rgb"):
        policy.predict(dict.fromkeys(VIEWS), PROMPT, STATE)
    with pytest.raises(ObservationError, match="expected images for the views"):
        policy.predict({VIEWS[0]: images[0]}, PROMPT, STATE)


def test_a_masked_view_is_the_models_own_mask(policy: Policy, images: list[np.ndarray]) -> None:
    """The same through the model alone, whose masking is compared with other implementations elsewhere."""
    from flashrt_runtime.processing.images import prepare_image

    noise = np.random.default_rng(2).standard_normal((50, 32)).astype(np.float32)
    inputs = policy._encode([*images], PROMPT, STATE, noise)
    pixels = np.stack([prepare_image(image, 224, "antialias_uint8").numpy() for image in images])
    with_mask = policy.sample_actions(
        pixels, np.array([True, False]), inputs.tokens, np.ones(len(inputs.tokens), bool), None, noise
    )
    assert policy._actions is not None
    want = policy._actions.to_physical(with_mask, np.asarray(STATE, np.float32))
    got = policy.predict({VIEWS[0]: images[0], VIEWS[1]: None}, PROMPT, STATE, noise=noise)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_prompt_is_kept_and_changes_actions(policy: Policy, images: list[np.ndarray]) -> None:
    policy.set_prompt("open the drawer")
    assert policy.prompt == "open the drawer"
    kept = policy.predict(images, state=STATE, seed=1)
    np.testing.assert_array_equal(policy.predict(images, "open the drawer", STATE, seed=1), kept)
    assert not np.array_equal(policy.predict(images, PROMPT, STATE, seed=1), kept)
    assert policy.prompt == PROMPT


def test_a_refused_prompt_leaves_the_one_in_force(policy: Policy, images: list[np.ndarray]) -> None:
    policy.set_prompt(PROMPT)
    with pytest.raises(PromptTooLongError, match="200"):
        policy.set_prompt("again and " * 300)
    with pytest.raises(PromptTooLongError):
        policy.predict(images, "again and " * 300, STATE)
    with pytest.raises(PromptError):
        policy.set_prompt("  ")
    assert policy.prompt == PROMPT


def test_a_prompt_set_meanwhile_waits_for_the_next(policy: Policy, images: list[np.ndarray]) -> None:
    policy.set_prompt(PROMPT)
    want = policy.predict(images, PROMPT, STATE, seed=1)
    results: list[np.ndarray] = []
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            policy.set_prompt("open the drawer")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        results += [policy.predict(images, PROMPT, STATE, seed=1) for _ in range(5)]
    finally:
        stop.set()
        changer.join()
    for result in results:
        np.testing.assert_array_equal(result, want)


BAD_IMAGES = {
    "one image": (lambda a: a[:1], "expected 2 images"),
    "three images": (lambda a: [*a, a[0]], "got 3"),
    "unknown name": (lambda a: {"base_0_rgb": a[0], "top": a[1]}, "top"),
    "float": (lambda a: [a[0].astype(np.float32), a[1]], "uint8"),
    "grey": (lambda a: [a[0][..., 0], a[1]], r"\(H, W, 3\)"),
    "empty": (lambda a: [a[0][:0], a[1]], r"\(H, W, 3\)"),
    "too narrow": (lambda a: [np.zeros((1, 400, 3), np.uint8), a[1]], "too narrow"),
    "none": (lambda a: [None, a[1]], "NoneType"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_do_not_fit(policy: Policy, images: list[np.ndarray], case: str) -> None:
    change, message = BAD_IMAGES[case]
    with pytest.raises(ObservationError, match=message):
        policy.predict(change(images), PROMPT, STATE)


@pytest.mark.parametrize(
    ("state", "message"),
    [(None, "pass state="), (np.zeros(6), r"\(7,\)"), (np.full(7, np.nan), "not finite")],
)
def test_states_that_do_not_fit(
    policy: Policy, images: list[np.ndarray], state: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ObservationError, match=message):
        policy.predict(images, PROMPT, state)


def test_noise_that_does_not_fit(policy: Policy, images: list[np.ndarray]) -> None:
    noise = np.zeros((50, 32), np.float32)
    with pytest.raises(OptionError, match="noise= and seed="):
        policy.predict(images, PROMPT, STATE, noise=noise, seed=1)
    with pytest.raises(ObservationError, match=r"\(50, 32\)"):
        policy.predict(images, PROMPT, STATE, noise=noise[:10])
    with pytest.raises(ObservationError, match="not finite"):
        policy.predict(images, PROMPT, STATE, noise=noise * np.nan)


def test_model_space_entry_refuses_what_the_model_cannot_index(policy: Policy) -> None:
    images, mask = np.zeros((2, 3, 224, 224), np.float32), np.ones(2, bool)
    noise = np.zeros((50, 32), np.float32)
    for tokens in (np.array([10**6]), np.array([-1]), np.ones((1, 3), np.int64)):
        with pytest.raises(ObservationError, match="tokens"):
            policy.sample_actions(images, mask, tokens, np.ones(tokens.shape, bool), None, noise)


def test_nothing_to_calibrate(policy: Policy) -> None:
    with pytest.raises(OptionError, match="fp32"):
        policy.calibrate([])


def test_actions_that_are_not_finite(
    checkpoint: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = flashrt_runtime.load_model(checkpoint, hardware="cpu", num_steps=1)
    assert isinstance(policy._model, FlowPolicy)
    with torch.inference_mode():
        policy._model.action_out.bias[3] = torch.nan
    with pytest.raises(ActionError, match=r"^50 of 1600 actions are not finite: the chunk was dropped$"):
        policy.predict(images, PROMPT, STATE)
    monkeypatch.setattr(FlowPolicy, "range_limit", "load with expert='chain'")
    with pytest.raises(ActionError, match=r"dropped; load with expert='chain'$"):
        policy.predict(images, PROMPT, STATE)
    policy.close()


def test_closed(checkpoint: Path, images: list[np.ndarray]) -> None:
    policy = flashrt_runtime.load_model(checkpoint, hardware="cpu", num_steps=1)
    policy.close()
    policy.close()
    with pytest.raises(ClosedError):
        policy.predict(images, PROMPT, STATE)
    with pytest.raises(ClosedError):
        policy.set_prompt(PROMPT)


def test_loading_leaves_the_global_random_state_alone(checkpoint: Path) -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    flashrt_runtime.load_model(checkpoint, hardware="cpu", num_steps=1).close()
    assert torch.equal(torch.rand(3), want)


NO_NVFP4 = r"'nvfp4' is not supported yet: use fp32, bf16, fp16, fp8$"
BAD_OPTIONS = {
    "views 0": ({"num_views": 0}, OptionError, "from 1 to 3"),
    "views 4": ({"num_views": 4}, OptionError, "from 1 to 3"),
    "more views than trained": ({"num_views": 3}, CheckpointError, "base_0_rgb, left_wrist_0_rgb"),
    "steps": ({"num_steps": 101}, OptionError, "from 1 to 100"),
    "autotune": ({"autotune": 2.5}, OptionError, "autotune"),
    "precision": ({"precision": "fp7"}, OptionError, r"'fp7': expected one of fp32, bf16, fp16, fp8$"),
    "contradiction": ({"precision": "fp32", "use_fp8": True}, OptionError, "fp8"),
    "both flags": ({"use_fp8": True, "use_fp16": True}, OptionError, "contradict"),
    "fp16 on the CPU": ({"precision": "fp16"}, HardwareError, "GPU"),
    "nvfp4": ({"precision": "nvfp4"}, NotSupportedYetError, NO_NVFP4),
    "nvfp4 by its flag": ({"use_fp4": True}, NotSupportedYetError, NO_NVFP4),
    "later option": ({"vision_pool_factor": 2}, NotSupportedYetError, "vision_pool_factor"),
    "decode steps": ({"decode_graph_steps": 40}, OptionError, "decode_graph_steps"),
    "decode graph": ({"decode_cuda_graph": True}, OptionError, "pi0fast"),
    "config": ({"config": "pi9"}, OptionError, r"'pi9': expected one of auto, pi05, pi0, pi0fast$"),
    "later config": ({"config": "groot"}, NotSupportedYetError, "groot"),
    "other architecture": ({"config": "pi0"}, CheckpointError, "pi0"),
    "hardware": ({"hardware": "tpu"}, OptionError, "tpu"),
    "framework": ({"framework": "caffe"}, OptionError, "caffe"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_are_refused(checkpoint: Path, case: str) -> None:
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        flashrt_runtime.load_model(checkpoint, **{"hardware": "cpu", **options})


def test_neutral_values_of_later_options(checkpoint: Path) -> None:
    neutral = {"use_awq": False, "use_p1_split_gu": False, "vision_pool_factor": 1, "cache_frames": 1}
    policy = flashrt_runtime.load_model(
        checkpoint, hardware="cpu", use_fp8=False, autotune=True, num_steps=1, **neutral
    )
    assert policy.precision == "fp32"
    policy.close()


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        flashrt_runtime.load_model(tmp_path / "nowhere", hardware="cpu")
