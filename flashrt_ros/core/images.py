"""Image and CompressedImage messages to (H, W, 3) uint8 RGB arrays, without ROS and without resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .compressed import check_compressed, decode_compressed
from .contract_model import ColourOrder, Crop
from .errors import DamagedImageError, IngestError
from .reasons import Reason

RgbImage = NDArray[np.uint8]
# Decodes a raw image message of an exotic encoding into (H, W, 3) uint8 RGB (cv_bridge's imgmsg_to_cv2).
FallbackDecoder = Callable[[Any], RgbImage]

# Encoding -> channels, and the colour conversion to RGB (None: already RGB, stays a view of the message).
_DIRECT: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}


def check_image(
    message: Any, *, stream: str = "", colour_order: ColourOrder = ColourOrder.DECLARED, exotic: bool = False
) -> None:
    """Everything about an image message that shows without decoding it, in microseconds.

    exotic: whether there is a decoder for 8-bit encodings outside the direct ones. Raises as
    image_from_message.
    """
    if hasattr(message, "encoding"):
        _check_raw(message, _bytes_of(message, stream), stream, colour_order, exotic)
    else:
        check_compressed(_bytes_of(message, stream), str(message.format), stream)


def image_from_message(
    message: Any,
    *,
    stream: str = "",
    crop: Crop | None = None,
    fallback_decoder: FallbackDecoder | None = None,
    colour_order: ColourOrder = ColourOrder.DECLARED,
) -> RgbImage:
    """Decode an Image (has `encoding`) or a CompressedImage (has `format`) into (H, W, 3) uint8 RGB.

    rgb8 is a view of the message's buffer, never a copy, also with row padding (`step`) and a crop; treat
    it as read-only. bgr8, rgba8, bgra8 and mono8 are converted in one pass (alpha dropped). Other 8-bit
    encodings go to `fallback_decoder`; 16-bit, float and depth images are refused, as there is no one right
    way to 8 bits. colour_order: what the channels are where the message's word is not to be trusted.
    Raises IngestError with IMAGE_ENCODING, IMAGE_SIZE or IMAGE_DECODE, DamagedImageError for what only
    decoding shows.
    """
    data = _bytes_of(message, stream)
    if hasattr(message, "encoding"):
        encoding = _check_raw(message, data, stream, colour_order, fallback_decoder is not None)
        image = _raw(message, data, encoding, stream, fallback_decoder)
    else:
        check_compressed(data, str(message.format), stream)
        image = decode_compressed(data, stream, bgr=colour_order is ColourOrder.BGR)
    return image if crop is None else crop_image(image, crop, stream)


def _bytes_of(message: Any, stream: str) -> NDArray[np.uint8]:
    """The message's data as uint8, zero-copy for array.array, bytes and uint8 arrays."""
    try:
        return np.frombuffer(message.data, dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        text = f"data is no buffer of bytes ({type(message.data).__name__}): {error}"
        raise IngestError(Reason.IMAGE_DECODE, stream, text) from error


def _check_raw(
    message: Any, data: NDArray[np.uint8], stream: str, colour_order: ColourOrder, exotic: bool
) -> str:
    """The encoding that the pixels are to be read as."""
    encoding = str(message.encoding)
    height, width, step = int(message.height), int(message.width), int(message.step)
    channels, _ = _DIRECT.get(encoding, (0, None))
    if height < 1 or width < 1 or step < width * max(1, channels) or data.size != step * height:
        text = (
            f"{encoding} image of {width} x {height} pixels with step {step} and {data.size} bytes: "
            f"expected step >= {width * max(1, channels)} and step * height bytes"
        )
        raise IngestError(Reason.IMAGE_SIZE, stream, text)
    if not channels:
        _check_exotic(encoding, stream, exotic)
    if colour_order is ColourOrder.DECLARED or channels < 3:
        return encoding
    return f"{colour_order}{'a' if channels == 4 else ''}8"


def _check_exotic(encoding: str, stream: str, exotic: bool) -> None:
    direct = ", ".join(_DIRECT)
    if "16" in encoding or "32" in encoding or "64" in encoding or not encoding:
        text = f"encoding {encoding!r} is not an 8-bit colour image: have the driver publish one of {direct}"
        raise IngestError(Reason.IMAGE_ENCODING, stream, text)
    if not exotic:
        text = f"encoding {encoding!r} needs cv_bridge, which is not installed; or publish one of {direct}"
        raise IngestError(Reason.IMAGE_ENCODING, stream, text)


def _raw(
    message: Any, data: NDArray[np.uint8], encoding: str, stream: str,
    fallback_decoder: FallbackDecoder | None,
) -> RgbImage:
    height, width, step = int(message.height), int(message.width), int(message.step)
    if encoding not in _DIRECT and fallback_decoder is not None:
        return _exotic(message, encoding, (height, width), stream, fallback_decoder)
    channels, conversion = _DIRECT[encoding]
    pixels = data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    if conversion is None:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, conversion), dtype=np.uint8)


def _exotic(
    message: Any, encoding: str, size: tuple[int, int], stream: str, fallback_decoder: FallbackDecoder
) -> RgbImage:
    try:
        image = np.asarray(fallback_decoder(message))
    except Exception as error:  # whatever the decoder raises: the message is at fault, the node goes on
        text = f"encoding {encoding!r} could not be converted to rgb8: {error}"
        raise DamagedImageError(Reason.IMAGE_ENCODING, stream, text) from error
    if image.shape != (*size, 3) or image.dtype != np.uint8:
        came = f"{image.dtype} {image.shape}"
        text = f"encoding {encoding!r} was converted to {came}, expected uint8 {(*size, 3)}"
        raise DamagedImageError(Reason.IMAGE_ENCODING, stream, text)
    return image


def crop_image(image: RgbImage, crop: Crop, stream: str = "") -> RgbImage:
    """The rectangle as a view. Raises IngestError (IMAGE_SIZE) when the image does not contain it."""
    height, width = image.shape[:2]
    if crop.x + crop.width > width or crop.y + crop.height > height:
        text = f"image of {width} x {height} pixels is smaller than its crop {crop}"
        raise IngestError(Reason.IMAGE_SIZE, stream, text)
    return image[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
