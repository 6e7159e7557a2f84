"""Images: both resize rules against independent implementations, padding, range, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt_runtime.errors import ObservationError, OptionError
from flashrt_runtime.processing.images import fitted_size, prepare_image

SHAPES = [(480, 640), (640, 480), (256, 256), (720, 1280), (100, 150), (37, 91), (224, 224), (333, 217)]


def picture(height, width):
    """Smooth gradients, an edge and noise: something for every filter to get wrong."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * x / width, 255 * y / height, 255 * (x > y)], axis=-1)
    image += np.random.default_rng(height).normal(0, 20, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def levels(tensor):
    """[-1, 1] back to 0..255, (H, W, 3)."""
    return ((tensor + 1) / 2 * 255).permute(1, 2, 0).numpy()


def bilinear(image, height, width):
    """Four-tap bilinear at half-pixel centres, float64, no antialiasing: written out from the definition."""
    rows = np.maximum((np.arange(height) + 0.5) * image.shape[0] / height - 0.5, 0)
    columns = np.maximum((np.arange(width) + 0.5) * image.shape[1] / width - 0.5, 0)
    top, left = rows.astype(int), columns.astype(int)
    bottom, right = np.minimum(top + 1, image.shape[0] - 1), np.minimum(left + 1, image.shape[1] - 1)
    down, across = (rows - top)[:, None, None], (columns - left)[None, :, None]
    pixels = image.astype(np.float64)
    upper = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across
    lower = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    return upper * (1 - down) + lower * down


def padded(resized, size=224):
    """Centred on black."""
    canvas = np.zeros((size, size, 3), resized.dtype)
    top, left = (size - resized.shape[0]) // 2, (size - resized.shape[1]) // 2
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return canvas


@pytest.mark.parametrize("shape", SHAPES)
def test_openpis_resize_is_pillows(shape):
    pillow = pytest.importorskip("PIL.Image")
    image = picture(*shape)
    height, width = fitted_size(*shape, 224)
    resized = np.asarray(pillow.fromarray(image).resize((width, height), pillow.Resampling.BILINEAR))
    difference = np.abs(levels(prepare_image(image, 224, "antialias_uint8")) - padded(resized))
    assert difference.max() < 1.01
    assert (difference > 0.5).mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_lerobots_resize_is_plain_bilinear(shape):
    image = picture(*shape)
    expected = padded(bilinear(image, *fitted_size(*shape, 224)))
    assert np.abs(levels(prepare_image(image, 224, "bilinear_float")) - expected).max() < 0.01


def test_the_two_rules_differ():
    """Antialiasing matters where an image shrinks."""
    image = picture(480, 640)
    first, second = (prepare_image(image, 224, rule) for rule in ("antialias_uint8", "bilinear_float"))
    assert float((first - second).abs().max()) > 0.1


@pytest.mark.parametrize("rule", ["antialias_uint8", "bilinear_float"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_is_model_input(shape, rule):
    tensor = prepare_image(picture(*shape), 224, rule)
    assert tensor.shape == (3, 224, 224)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert -1 <= float(tensor.min()) <= float(tensor.max()) <= 1


@pytest.mark.parametrize("rule", ["antialias_uint8", "bilinear_float"])
def test_black_bars_are_minus_one_and_centred(rule):
    tensor = prepare_image(np.full((100, 201, 3), 255, np.uint8), 224, rule)
    lit = (tensor > 0).all(dim=0).any(dim=1).nonzero().flatten()
    height = fitted_size(100, 201, 224)[0]
    assert (lit[0].item(), len(lit)) == ((224 - height) // 2, height)
    assert float(tensor[:, 0].max()) == -1


@pytest.mark.parametrize("rule", ["antialias_uint8", "bilinear_float"])
def test_an_image_of_the_models_size_is_not_resampled(rule):
    image = picture(224, 224)
    expected = image.astype(np.float32) / 255 * 2 - 1
    np.testing.assert_allclose(prepare_image(image, 224, rule).permute(1, 2, 0).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("rule", ["antialias_uint8", "bilinear_float"])
def test_channels_stay_in_order(rule):
    red = np.zeros((50, 60, 3), np.uint8)
    red[..., 0] = 255
    tensor = prepare_image(red, 56, rule)
    assert float(tensor[0].max()) == 1
    assert float(tensor[1:].max()) == -1


@pytest.mark.parametrize("rule", ["antialias_uint8", "bilinear_float"])
def test_the_caller_keeps_its_image(rule):
    """Read-only memory (a ROS message) and strided views (a crop) are fine, and nothing is written."""
    whole = picture(240, 320)
    view = whole[10:200:2, 20:300]
    contiguous = np.ascontiguousarray(view)
    contiguous.flags.writeable = False
    before = contiguous.copy()
    assert torch.equal(prepare_image(view, 224, rule), prepare_image(contiguous, 224, rule))
    np.testing.assert_array_equal(contiguous, before)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        [[[0, 0, 0]]],
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(ObservationError, match=r"expected uint8 \(H, W, 3\) RGB"):
        prepare_image(image, 224, "antialias_uint8")


def test_degenerate_images_are_refused():
    with pytest.raises(ObservationError, match="too narrow"):
        prepare_image(np.zeros((2, 1000, 3), np.uint8), 224, "antialias_uint8")
    with pytest.raises(ObservationError):
        prepare_image(np.zeros((0, 10, 3), np.uint8), 224, "antialias_uint8")


def test_unknown_rule():
    with pytest.raises(OptionError, match="antialias_uint8, bilinear_float"):
        prepare_image(np.zeros((4, 4, 3), np.uint8), 224, "nearest")  # type: ignore[arg-type]
