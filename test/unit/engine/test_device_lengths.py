"""A padded prompt whose length only the device knows, as graphs run it, against the exact one; on the CPU."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from flashrt_runtime import models
from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.engine.engine import prompt_buckets
from flashrt_runtime.engine.staging import Staging
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.parity.stages import random_inputs
from flashrt_runtime.untrained.random import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FlowPolicy:
    path = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), size="tiny", policy=request.param)
    with open_checkpoint(path, config="auto") as opened:
        config = opened.config.with_steps(2)
        built = models.build(config, 2, torch.float32)
        load_weights(built, config, opened, CPU)
    built.eval()
    built.prepare(CPU)
    return built


@torch.inference_mode()
def test_padding_changes_nothing(model: FlowPolicy) -> None:
    inputs = random_inputs(model.config, views=2, tokens=23, seed=5)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.arrays().items()}
    want = model.sample_actions(**tensors)
    exact = model.cache.k[:, : int(model.prefix_length)].clone()
    for bucket in (23, 31, 48):
        model.cache.k.fill_(7.0)  # what an earlier, longer prompt left behind
        model.cache.v.fill_(7.0)
        tokens = torch.zeros(bucket, dtype=torch.int64)
        tokens[:23] = tensors["tokens"]
        model.prefix_length.fill_(2 * model.config.vision.tokens + 23)
        model.prefill_padded(model.paligemma.embed_images(tensors["images"]), tokens)
        model.extend_prefix(tensors["state"])
        x = tensors["noise"].clone()
        model.integrate(x)
        torch.testing.assert_close(x, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.cache.k[:, : exact.shape[1]], exact, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_unmasked_padding_would_show(model: FlowPolicy) -> None:
    """The comparison above can fail: a prefix that counts the padding gives other actions."""
    inputs = random_inputs(model.config, views=2, tokens=23, seed=5)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.arrays().items()}
    want = model.sample_actions(**tensors)
    tokens = torch.zeros(48, dtype=torch.int64)
    tokens[:23] = tensors["tokens"]
    model.prefix_length.fill_(2 * model.config.vision.tokens + 48)
    model.prefill_padded(model.paligemma.embed_images(tensors["images"]), tokens)
    model.extend_prefix(tensors["state"])
    x = tensors["noise"].clone()
    model.integrate(x)
    assert (x - want).abs().max() > 1e-3


def test_buckets_hold_every_length() -> None:
    assert prompt_buckets(200) == (48, 64, 96, 128, 200)
    assert prompt_buckets(48) == (48,)
    assert prompt_buckets(64) == (48, 64)


def test_staging_is_one_block() -> None:
    generator = torch.Generator().manual_seed(0)
    staging = Staging(2, 200, 32, (10, 32), torch.zeros(10, 32), 10_000, CPU)
    images = [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()
        for shape in ((20, 30, 3), (7, 11, 3))
    ]
    tokens = torch.arange(5).numpy()
    state, noise = torch.randn(32).numpy(), torch.randn(10, 32).numpy()
    staging.write(999, torch.full((200,), 9).numpy(), state, noise)
    staging.upload_images(staging.write_images(images))
    staging.write(517, tokens, state, noise)
    staging.upload()
    assert int(staging.prefix_length) == 517
    assert staging.tokens.tolist() == [0, 1, 2, 3, 4, *[0] * 195]
    assert torch.equal(staging.noise, torch.from_numpy(noise))
    assert torch.equal(staging.state, torch.from_numpy(state))
    for (offset, height, width), image in zip(staging.views.tolist(), images, strict=True):
        bytes_ = staging.frames[offset : offset + height * width * 3]
        assert torch.equal(bytes_.view(height, width, 3), torch.from_numpy(image))


def test_staging_copies_padded_and_cropped_images_once() -> None:
    """Straight from the camera message's buffer into the block: no image-sized array in between."""
    message = np.random.default_rng(0).integers(0, 256, (480, 2000), dtype=np.uint8)
    padded = message[:, :1920].reshape(480, 640, 3)
    assert np.shares_memory(padded, message)
    images = [padded, padded[40:440, 100:500]]
    staging = Staging(2, 8, 32, (10, 32), torch.zeros(10, 32), 640 * 480 * 3 + 400 * 400 * 3, CPU)
    staging.write_images(images)
    tracemalloc.start()
    try:
        count = staging.write_images(images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    staging.upload_images(count)
    staging.upload()
    for (offset, height, width), image in zip(staging.views.tolist(), images, strict=True):
        frame = staging.frames[offset : offset + height * width * 3].view(height, width, 3)
        assert np.array_equal(frame.numpy(), image)


def test_staging_holds_further_inputs_before_the_frames() -> None:
    """What real-time chunking adds; without it nothing is laid out or copied."""
    extra = {"weight": (torch.float32, (10,)), "frozen": (torch.bool, (10,))}
    output = torch.zeros(10, 32)
    plain, staging = (Staging(1, 8, 32, (10, 32), output, 100, CPU, given) for given in (None, extra))
    assert plain.extra == {}
    values = {"weight": torch.rand(10).numpy(), "frozen": (torch.arange(10) < 3).numpy()}
    image, tokens = torch.zeros(2, 3, 3, dtype=torch.uint8).numpy() + 7, torch.arange(5).numpy()
    noise = torch.randn(10, 32).numpy()
    staging.write(9, tokens, None, noise, values)
    staging.upload_images(staging.write_images([image]))
    staging.upload()
    assert torch.equal(staging.noise, torch.from_numpy(noise))
    assert staging.frames[: image.size].eq(7).all()
    for name, array in values.items():
        assert torch.equal(staging.extra[name], torch.from_numpy(array))
