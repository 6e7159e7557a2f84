"""Images of a request: JPEG, PNG or raw pixels into (H, W, 3) uint8 RGB."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .refusals import invalid

FORMATS = ("JPEG", "PNG")
MODES = ("RGB", "L")


def from_base64(name: str, text: str) -> bytes:
    """The bytes of strict base64. Raises Refusal."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(
            f"{name}: not base64 ({error}): send the standard alphabet with padding, without line breaks or "
            "a data: prefix"
        ) from error


def decode_image(
    name: str, content: bytes, shape: Sequence[int] | None, max_pixels: int
) -> NDArray[np.uint8]:
    """Pixels of one image. shape: (H, W, 3) of raw pixels; None means a JPEG or PNG file. Raises Refusal."""
    return _compressed(name, content, max_pixels) if shape is None else _raw(name, content, shape, max_pixels)


def _raw(name: str, content: bytes, shape: Sequence[int], max_pixels: int) -> NDArray[np.uint8]:
    if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
        raise invalid(f"{name}: image_shape must be [height, width, 3], got {list(shape)}")
    height, width, _ = shape
    if height * width > max_pixels:
        raise invalid(f"{name}: {width}x{height} is more than the {max_pixels} pixels allowed")
    if len(content) != height * width * 3:
        raise invalid(
            f"{name}: image_shape {list(shape)} needs {height * width * 3} bytes of raw RGB pixels, got "
            f"{len(content)}; leave image_shape out for JPEG or PNG files"
        )
    return np.frombuffer(content, np.uint8).reshape(height, width, 3)


def _compressed(name: str, content: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Size and mode are read from the header before any pixel is decoded; a file cut short is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning of large images: ours is an error
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise invalid(f"{name}: {width}x{height} is more than the {max_pixels} pixels allowed")
                if image.mode not in MODES:
                    raise invalid(f"{name}: pixels of mode {image.mode}: expected 8-bit RGB or grey")
                return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except UnidentifiedImageError as error:
        raise invalid(
            f"{name}: neither a JPEG nor a PNG file ({len(content)} bytes); raw pixels need image_shape"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise invalid(f"{name}: damaged image: {error}") from error
