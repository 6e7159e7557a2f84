"""What becomes of an observation that is not what it should be: one error of ours, and nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime import Policy, ops
from flashrt_runtime.datasets.views import match_views
from flashrt_runtime.errors import DatasetError, ObservationError, OptionError, PromptError
from flashrt_runtime.untrained import make_checkpoint

STATE = np.zeros(7)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(count)]


def with_views(checkpoint: Path, views: tuple[str, ...]) -> Policy:
    file = checkpoint / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["flashrt"]["views"] = list(views)
    file.write_text(json.dumps(content), encoding="utf-8")
    return flashrt_runtime.load_model(checkpoint, hardware="cpu", num_steps=1, num_views=len(views))


@pytest.mark.parametrize(
    "views",
    [
        ("wrist_image", "image"), ("top", "image"), ("wrist_image_right", "image", "wrist_image"),
        ("image", "image2", "wrist_image"), ("image", "wrist_image"),
    ],
)  # fmt: skip
def test_a_view_s_own_name_wins_over_an_alias(views: tuple[str, ...], tmp_path: Path) -> None:
    """Cameras that change places move a robot wrongly, and no error says so."""
    loaded = with_views(make_checkpoint(tmp_path / "tiny", size="tiny", preset="demo_arm"), views)
    assert loaded.spec.views == views
    images = pictures(len(views))
    by_name = dict(zip(views, images, strict=True))
    for given in (by_name, dict(reversed(by_name.items()))):
        ordered = loaded._encode.ordered_views(given)
        assert [id(image) for image in ordered] == [id(image) for image in images]
    seen = loaded._encode.ordered_views({**by_name, views[0]: None})
    assert [id(image) for image in seen] == [id(image) for image in images[1:]]
    loaded.close()


def test_two_names_of_one_view_are_refused(policy: Policy) -> None:
    first, second = pictures(2)
    with pytest.raises(ObservationError, match="expected images for the views"):
        policy.predict({"base_0_rgb": first, "image": second}, "wave", STATE)


@pytest.mark.parametrize(
    ("cameras", "views"),
    [
        (("image", "wrist_image"), ("base_0_rgb", "image")),
        (("image", "wrist_image"), ("wrist_image_right", "image")),
    ],
)
def test_a_camera_is_one_view_of_a_dataset(cameras: tuple[str, ...], views: tuple[str, ...]) -> None:
    with pytest.raises(DatasetError, match=f"no camera for the views {views[0]}"):
        match_views(cameras, views)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"seed": 1.5}, OptionError, "expected an integer"),
        ({"seed": True}, OptionError, "expected an integer"),
        ({"seed": 1 << 64}, OptionError, "2\\*\\*64"),
        ({"seed": -1}, OptionError, "from 0"),
        ({"state": ["a"] * 7}, ObservationError, "real numbers"),
        ({"state": [[1.0], [2.0, 3.0]]}, ObservationError, "real numbers"),
        ({"state": np.zeros(7, complex)}, ObservationError, "complex"),
        ({"state": torch.zeros(7, requires_grad=True)}, ObservationError, "Tensor"),
        ({"state": torch.zeros(7, dtype=torch.bfloat16)}, ObservationError, "Tensor"),
        ({"state": np.full(7, 1e300)}, ObservationError, "not finite"),
        ({"noise": np.full((50, 32), 1e300)}, ObservationError, "not finite"),
        ({"noise": np.zeros((50, 32), complex)}, ObservationError, "complex"),
        ({"images": None}, ObservationError, "2 images in the order"),
        ({"images": 5}, ObservationError, "2 images in the order"),
        ({"images": np.zeros(())}, ObservationError, "2 images in the order"),
        ({"prompt": "\ud800"}, PromptError, "cannot be tokenised"),
    ],
)
def test_each_mistake_has_one_error(
    policy: Policy, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    right = {"images": pictures(2), "prompt": "wave", "state": STATE}
    want = policy.predict(**right, seed=7)
    with pytest.raises(error, match=words):
        policy.predict(**{**right, **fields})
    np.testing.assert_array_equal(policy.predict(**right, seed=7), want)


def test_numpy_s_integers_are_seeds(policy: Policy) -> None:
    right = {"images": pictures(2), "prompt": "wave", "state": STATE}
    want = policy.predict(**right, seed=3)
    np.testing.assert_array_equal(policy.predict(**right, seed=np.int64(3)), want)


def test_a_state_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    """It is finite in the robot's units, and not in the model's."""
    folder = make_checkpoint(tmp_path / "pi0", size="tiny", preset="demo_arm", policy="pi0")
    loaded = flashrt_runtime.load_model(folder, hardware="cpu", num_steps=1, config="auto")
    with pytest.raises(ObservationError, match="normalised"):
        loaded.predict(pictures(2), "wave", np.full(7, 3e38), seed=1)
    loaded.close()


@torch.inference_mode()
def test_what_a_broken_chunk_leaves_does_not_reach_the_next(policy: Policy) -> None:
    """In the padded form that graphs capture, here eager in float32: masked slots may hold anything."""
    model = policy._model
    assert model is not None
    size = model.config.vision.image_size
    features = model.paligemma.embed_images(torch.zeros(2, 3, size, size))
    noise = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))

    def padded(length: int, start: torch.Tensor) -> torch.Tensor:
        tokens = torch.zeros(64, dtype=torch.int64)
        tokens[:length] = torch.arange(5, 5 + length)
        ops.assign(model.prefix_length, torch.tensor(features.shape[0] + length, dtype=torch.int32))
        model.prefill_padded(features, tokens)
        out = model.new_output(torch.device("cpu"))
        model.generate(None, start, out)
        return out

    want, broken = padded(50, noise), noise.clone()
    broken[0, 0] = float("inf")
    assert not padded(60, broken).isfinite().all()
    assert torch.equal(padded(50, noise), want)
