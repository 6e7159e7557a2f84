"""Camera images to the model's input: resize with padding, [-1, 1], channels first."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ObservationError, OptionError

ResizeRule = Literal["antialias_uint8", "bilinear_float"]


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of an image scaled to fit size x size, aspect kept, rounded down by both families."""
    ratio = max(width / size, height / size)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(pixels: Tensor, size: int, resize: ResizeRule) -> Tensor:
    """Scale to fit size x size and centre on black; pixels: (3, H, W).

    antialias_uint8 (openpi): uint8 in and out, bilinear with antialiasing, within 1 of 255 levels of
    Pillow's. bilinear_float (LeRobot): float32 levels in and out, bilinear without antialiasing.
    """
    height, width = pixels.shape[1:]
    target = fitted_size(height, width, size)
    if 0 in target:
        raise ObservationError(
            f"an image of {width}x{height} pixels is too narrow to be scaled to {size}x{size}"
        )
    scaled = pixels.unsqueeze(0)
    if target != (height, width):
        antialias = resize == "antialias_uint8"
        scaled = F.interpolate(scaled, target, mode="bilinear", align_corners=False, antialias=antialias)
    if target == (size, size):
        return scaled[0]
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    padded = scaled.new_zeros(3, size, size)
    padded[:, top : top + target[0], left : left + target[1]] = scaled[0]
    return padded


def prepare_image(
    image: NDArray[np.uint8], size: int, resize: ResizeRule, device: torch.device | str = "cpu"
) -> Tensor:
    """image: (H, W, 3) uint8 RGB of any size -> (3, size, size) float32 in [-1, 1] on `device`.

    Scaled on the CPU, so that every device sees the same pixels. Raises ObservationError for another dtype or
    shape and OptionError for an unknown rule.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ObservationError(f"image: expected uint8 (H, W, 3) RGB, got {found}")
    if resize not in get_args(ResizeRule):
        raise OptionError(
            f"unknown resize rule {resize!r}: expected one of {', '.join(get_args(ResizeRule))}"
        )
    # torch wants writable memory even to read it
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    if resize == "bilinear_float":
        pixels = pixels.to(torch.float32)
    # openpi's bytes cross to the device, a quarter of what floats would be
    levels = resize_with_pad(pixels, size, resize).to(device)
    scaled = levels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    # interpolated floats overshoot by a rounding error
    return scaled.div_(255.0).clamp_(0.0, 1.0).mul_(2.0).sub_(1.0)
