"""JPEG and PNG data to (H, W, 3) uint8 RGB, strictly: what is damaged is refused rather than shown.

`check_compressed` sees what the container tells (kind, size, completeness) in microseconds; damage within the
data shows when it is decoded. JPEG has no checksum: libjpeg notices when the data ends too early or too late
and codes that do not exist, and long runs of zero bytes, which it would draw as grey, are looked for here.
What merely changes a coefficient's value cannot be told from a picture by any decoder. PNG is checked by its
checksums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from .errors import DamagedImageError, IngestError
from .reasons import Reason

RgbImage = NDArray[np.uint8]
Bytes = NDArray[np.uint8]

MAX_PIXELS = 1 << 26  # 67 megapixels: beyond any robot camera, so the header is corrupt
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_SEQUENTIAL = (0xC0, 0xC1)
HUFFMAN_TABLES, START_OF_SCAN = 0xC4, 0xDA
# Zero bytes that no picture has: the all-zero code is then a coefficient, and these are three blocks full.
ZERO_RUN = bytes(96)


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """size: (width, height). scan: where the compressed data begins. zeros_are_damage: the all-zero code is a
    coefficient in some table, so that no picture is a long run of zeros."""

    size: tuple[int, int]
    scan: int
    zeros_are_damage: bool


def check_compressed(data: Bytes, format: str, stream: str) -> None:
    """Raise IngestError (IMAGE_ENCODING, IMAGE_SIZE, IMAGE_DECODE) for what is no whole JPEG or PNG image."""
    head = data[:32].tobytes()
    if "compressedDepth" in format:
        raise IngestError(Reason.IMAGE_ENCODING, stream, "a depth image (compressedDepth) is no colour image")
    if head.startswith(JPEG_START):
        header = jpeg_header(data)
        complete = data[-4096:].tobytes().rstrip(b"\x00").endswith(JPEG_END)
        size = None if header is None else header.size
    elif head.startswith(PNG_SIGNATURE):
        complete, size = data[-64:].tobytes().endswith(PNG_END), _png_size(head, stream)
    else:
        text = f"format {format!r}, {data.size} bytes: expected JPEG or PNG data"
        raise IngestError(Reason.IMAGE_ENCODING if data.size else Reason.IMAGE_DECODE, stream, text)
    if not complete or size is None:
        text = f"compressed image of {data.size} bytes is truncated: its end marker is missing"
        raise IngestError(Reason.IMAGE_DECODE, stream, text)
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        text = f"compressed image claims {size[0]} x {size[1]} pixels"
        raise IngestError(Reason.IMAGE_SIZE, stream, text)


def decode_compressed(data: Bytes, stream: str, *, bgr: bool = False) -> RgbImage:
    """Decode data that passed `check_compressed`. An EXIF orientation is ignored, as in training pipelines.

    bgr: the driver mixed up red and blue before it compressed. Raises DamagedImageError.
    """
    if data[:3].tobytes() == JPEG_START:
        return _decode_jpeg(data, stream, "BGR" if bgr else "RGB")
    return _decode_png(data, stream, bgr)


def _decode_jpeg(data: Bytes, stream: str, colours: str) -> RgbImage:
    header = jpeg_header(data)
    if header is not None and header.zeros_are_damage:
        body = data[header.scan :].tobytes().rstrip(b"\x00")
        if (at := body.find(ZERO_RUN)) >= 0:
            text = f"JPEG is damaged: only zeros from byte {header.scan + at} on"
            raise DamagedImageError(Reason.IMAGE_DECODE, stream, text)
    try:
        image = simplejpeg.decode_jpeg(data, colours, strict=True)
    except (ValueError, MemoryError) as error:
        raise DamagedImageError(Reason.IMAGE_DECODE, stream, f"JPEG is damaged: {error}") from error
    if header is not None and image.shape[1::-1] != header.size:
        text = f"JPEG of {header.size} was decoded to {image.shape[1::-1]} pixels"
        raise DamagedImageError(Reason.IMAGE_DECODE, stream, text)
    return np.asarray(image, dtype=np.uint8)


def _decode_png(data: Bytes, stream: str, bgr: bool) -> RgbImage:
    try:
        image: Any = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        text = f"image cannot be decoded: {error}"
        raise DamagedImageError(Reason.IMAGE_DECODE, stream, text) from error
    if image is None:
        text = f"image of {data.size} bytes cannot be decoded"
        raise DamagedImageError(Reason.IMAGE_DECODE, stream, text)
    return np.asarray(image if bgr else cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _png_size(head: bytes, stream: str) -> tuple[int, int] | None:
    """(width, height) from the IHDR chunk; 16 bits a channel are refused."""
    if len(head) < 26:
        return None
    if head[24] == 16:
        raise IngestError(Reason.IMAGE_ENCODING, stream, "16-bit PNG: have the driver publish 8-bit colour")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def jpeg_header(data: Bytes) -> JpegHeader | None:
    """What the segments before the first scan say; None when they end before one or have no frame."""
    at, size = 2, None
    sequential = coefficients = False
    while at + 9 <= data.size and data[at] == 0xFF:
        marker = int(data[at + 1])
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4].tobytes(), "big")
        if marker in JPEG_FRAMES:
            field = data[at + 5 : at + 9].tobytes()
            size = int.from_bytes(field[2:], "big"), int.from_bytes(field[:2], "big")
            sequential = marker in JPEG_SEQUENTIAL  # other kinds bring tables with every scan
        elif marker == HUFFMAN_TABLES:
            coefficients = coefficients or _zeros_are_coefficients(data[at + 4 : end].tobytes())
        elif marker == START_OF_SCAN:
            return None if size is None else JpegHeader(size, end, sequential and coefficients)
        at = end
    return None


def _zeros_are_coefficients(tables: bytes) -> bool:
    """Whether the first code, which is all zeros, of any AC table here is other than the end of a block."""
    at = 0
    while at + 17 < len(tables):
        count = sum(tables[at + 1 : at + 17])
        if tables[at] >> 4 == 1 and tables[at + 17] != 0:
            return True
        at += 17 + count
    return False
