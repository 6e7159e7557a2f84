"""Image and CompressedImage messages to (H, W, 3) uint8 RGB arrays, without ROS and without resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .contract_model import Crop
from .errors import IngestError
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
_MAX_PIXELS = 1 << 26  # 67 megapixels: beyond any robot camera, so the header is corrupt
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_from_message(
    message: Any,
    *,
    stream: str = "",
    crop: Crop | None = None,
    fallback_decoder: FallbackDecoder | None = None,
) -> RgbImage:
    """Decode an Image (has `encoding`) or a CompressedImage (has `format`) into (H, W, 3) uint8 RGB.

    rgb8 is a view of the message's buffer, never a copy, also with row padding (`step`) and a crop; treat
    it as read-only. bgr8, rgba8, bgra8 and mono8 are converted (alpha dropped). Other 8-bit encodings go to
    `fallback_decoder`; 16-bit, float and depth images are refused, as there is no one right way to 8 bits.
    Raises IngestError with IMAGE_ENCODING, IMAGE_SIZE or IMAGE_DECODE.
    """
    if hasattr(message, "encoding"):
        image = _raw(message, stream, fallback_decoder)
    else:
        image = _compressed(message, stream)
    return image if crop is None else crop_image(image, crop, stream)


def _bytes_of(message: Any, stream: str) -> NDArray[np.uint8]:
    """The message's data as uint8, zero-copy for array.array, bytes and uint8 arrays."""
    try:
        return np.frombuffer(message.data, dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        text = f"data is no buffer of bytes ({type(message.data).__name__}): {error}"
        raise IngestError(Reason.IMAGE_DECODE, stream, text) from error


def _raw(message: Any, stream: str, fallback_decoder: FallbackDecoder | None) -> RgbImage:
    encoding = str(message.encoding)
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = _bytes_of(message, stream)
    channels, conversion = _DIRECT.get(encoding, (0, None))
    if height < 1 or width < 1 or step < width * max(1, channels) or data.size != step * height:
        text = (
            f"{encoding} image of {width} x {height} pixels with step {step} and {data.size} bytes: "
            f"expected step >= {width * max(1, channels)} and step * height bytes"
        )
        raise IngestError(Reason.IMAGE_SIZE, stream, text)
    if not channels:
        return _exotic(message, encoding, (height, width), stream, fallback_decoder)
    pixels = data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    if conversion is None:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, conversion), dtype=np.uint8)


def _exotic(
    message: Any, encoding: str, size: tuple[int, int], stream: str, fallback_decoder: FallbackDecoder | None
) -> RgbImage:
    direct = ", ".join(_DIRECT)
    if "16" in encoding or "32" in encoding or "64" in encoding or not encoding:
        text = f"encoding {encoding!r} is not an 8-bit colour image: have the driver publish one of {direct}"
        raise IngestError(Reason.IMAGE_ENCODING, stream, text)
    if fallback_decoder is None:
        text = f"encoding {encoding!r} needs cv_bridge, which is not installed; or publish one of {direct}"
        raise IngestError(Reason.IMAGE_ENCODING, stream, text)
    try:
        image = np.asarray(fallback_decoder(message))
    except Exception as error:  # whatever the decoder raises: the message is at fault, the node goes on
        text = f"encoding {encoding!r} could not be converted to rgb8: {error}"
        raise IngestError(Reason.IMAGE_ENCODING, stream, text) from error
    if image.shape != (*size, 3) or image.dtype != np.uint8:
        came = f"{image.dtype} {image.shape}"
        text = f"encoding {encoding!r} was converted to {came}, expected uint8 {(*size, 3)}"
        raise IngestError(Reason.IMAGE_ENCODING, stream, text)
    return image


def _compressed(message: Any, stream: str) -> RgbImage:
    data = _bytes_of(message, stream)
    head, tail = data[:32].tobytes(), data[-4096:].tobytes().rstrip(b"\x00")
    if "compressedDepth" in str(message.format):
        raise IngestError(Reason.IMAGE_ENCODING, stream, "a depth image (compressedDepth) is no colour image")
    if head.startswith(_JPEG_START):
        complete, size = tail.endswith(_JPEG_END), _jpeg_size(data)
    elif head.startswith(_PNG_SIGNATURE):
        complete, size = data[-64:].tobytes().endswith(_PNG_END), _png_size(head, stream)
    else:
        text = f"format {message.format!r}, {data.size} bytes: expected JPEG or PNG data"
        raise IngestError(Reason.IMAGE_ENCODING if data.size else Reason.IMAGE_DECODE, stream, text)
    if not complete or size is None:
        text = f"compressed image of {data.size} bytes is truncated: its end marker is missing"
        raise IngestError(Reason.IMAGE_DECODE, stream, text)
    if not 0 < size[0] * size[1] <= _MAX_PIXELS:
        text = f"compressed image claims {size[0]} x {size[1]} pixels"
        raise IngestError(Reason.IMAGE_SIZE, stream, text)
    return _imdecode(data, stream)


def _imdecode(data: NDArray[np.uint8], stream: str) -> RgbImage:
    try:
        # An EXIF orientation is ignored, as training pipelines do.
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise IngestError(Reason.IMAGE_DECODE, stream, f"image cannot be decoded: {error}") from error
    if bgr is None:
        raise IngestError(Reason.IMAGE_DECODE, stream, f"image of {data.size} bytes cannot be decoded")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _png_size(head: bytes, stream: str) -> tuple[int, int] | None:
    """(width, height) from the IHDR chunk; 16 bits a channel are refused."""
    if len(head) < 26:
        return None
    if head[24] == 16:
        raise IngestError(Reason.IMAGE_ENCODING, stream, "16-bit PNG: have the driver publish 8-bit colour")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """(width, height) from the frame header; None when the segments end before one."""
    at = 2
    while at + 9 <= data.size and data[at] == 0xFF:
        marker = int(data[at + 1])
        if marker in _JPEG_FRAME_MARKERS:
            field = data[at + 5 : at + 9].tobytes()
            return int.from_bytes(field[2:], "big"), int.from_bytes(field[:2], "big")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4].tobytes(), "big")
    return None


def crop_image(image: RgbImage, crop: Crop, stream: str = "") -> RgbImage:
    """The rectangle as a view. Raises IngestError (IMAGE_SIZE) when the image does not contain it."""
    height, width = image.shape[:2]
    if crop.x + crop.width > width or crop.y + crop.height > height:
        text = f"image of {width} x {height} pixels is smaller than its crop {crop}"
        raise IngestError(Reason.IMAGE_SIZE, stream, text)
    return image[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
