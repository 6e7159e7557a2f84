"""Image messages to RGB: encodings, row padding, damaged data. Messages are stand-ins for ROS's."""

import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from flashrt_ros.core.contract import Crop
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.images import image_from_message
from flashrt_ros.core.reasons import Reason

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def raw(pixels: np.ndarray, encoding: str, padding: int = 0, wrap: Callable[[bytes], Any] | None = None,
        **changes: Any) -> SimpleNamespace:
    """sensor_msgs/Image of (H, W, C) pixels; each row followed by `padding` bytes of rubbish."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    padded = np.concatenate([rows, np.full((height, padding), 77, np.uint8)], axis=1)
    data = (wrap or (lambda data: array.array("B", data)))(padded.tobytes())
    fields = {"height": height, "width": width, "encoding": encoding, "step": padded.shape[1], "data": data}
    return SimpleNamespace(**{**fields, **changes})


def compressed(data: bytes, format: str = "jpeg") -> SimpleNamespace:
    return SimpleNamespace(format=format, data=array.array("B", data))


def encode(image: np.ndarray, suffix: str, *parameters: int) -> bytes:
    """JPEG or PNG of an RGB image."""
    done, buffer = cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image, parameters)
    assert done
    return bytes(buffer.tobytes())


def failure(message: Any, **keywords: Any) -> IngestError:
    with pytest.raises(IngestError) as caught:
        image_from_message(message, stream="camera", **keywords)
    assert caught.value.stream == "camera"
    assert str(caught.value).startswith("camera: ")
    return caught.value


ALPHA = RNG.integers(0, 256, (6, 5, 1), dtype=np.uint8)
GRAY = RGB[..., :1]


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize(("encoding", "pixels", "expected"), [
    ("rgb8", RGB, RGB),
    ("bgr8", RGB[..., ::-1], RGB),
    ("rgba8", np.concatenate([RGB, ALPHA], axis=2), RGB),
    ("bgra8", np.concatenate([RGB[..., ::-1], ALPHA], axis=2), RGB),
    ("mono8", GRAY, np.repeat(GRAY, 3, axis=2)),
])
def test_direct_encodings_with_and_without_row_padding(
    encoding: str, pixels: np.ndarray, expected: np.ndarray, padding: int
) -> None:
    image = image_from_message(raw(pixels, encoding, padding))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("wrap", [lambda d: array.array("B", d), bytes, memoryview, bytearray,
                                  lambda d: np.frombuffer(d, np.uint8)])
@pytest.mark.parametrize("padding", [0, 5])
def test_rgb8_is_a_view_of_the_message(wrap: Callable[[bytes], Any], padding: int) -> None:
    message = raw(RGB, "rgb8", padding, wrap)
    image = image_from_message(message, crop=Crop(1, 2, 3, 4))
    np.testing.assert_array_equal(image, RGB[2:6, 1:4])
    assert np.shares_memory(image, np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize("changes", [
    {"height": 7}, {"height": 5}, {"height": 0}, {"width": 0}, {"width": 6},
    {"step": 14}, {"step": 16}, {"step": 0},
    {"data": array.array("B")}, {"height": 2**32 - 1, "width": 2**32 - 1, "step": 2**32 - 1},
])
def test_sizes_that_do_not_agree_are_refused(changes: dict[str, Any]) -> None:
    error = failure(raw(RGB, "rgb8", **changes))
    assert error.reason is Reason.IMAGE_SIZE
    assert "step * height bytes" in error.message


@pytest.mark.parametrize("data", [[1, 2, 3], None, "text"])
def test_data_that_is_no_buffer_is_refused(data: Any) -> None:
    assert failure(raw(RGB, "rgb8", data=data)).reason is Reason.IMAGE_DECODE


DEEP = ["mono16", "16UC1", "rgb16", "bgra16", "bayer_rggb16", "32FC1", "64FC3", ""]


@pytest.mark.parametrize("encoding", DEEP)
def test_deep_encodings_are_refused_even_with_cv_bridge(encoding: str) -> None:
    error = failure(raw(RGB, encoding), fallback_decoder=lambda message: RGB)
    assert error.reason is Reason.IMAGE_ENCODING
    assert "have the driver publish one of rgb8, bgr8" in error.message


def test_exotic_encodings_go_to_the_fallback_decoder() -> None:
    message = raw(RGB[..., :2], "yuv422_yuy2")
    np.testing.assert_array_equal(image_from_message(message, fallback_decoder=lambda _: RGB), RGB)
    assert "needs cv_bridge, which is not installed" in failure(message).message

    def raising(_: Any) -> np.ndarray:
        raise RuntimeError("no such conversion")

    for decoder in (raising, lambda _: RGB[:2], lambda _: RGB.astype(np.float32), lambda _: None):
        assert failure(message, fallback_decoder=decoder).reason is Reason.IMAGE_ENCODING


def test_a_crop_larger_than_the_image_is_refused() -> None:
    assert failure(raw(RGB, "rgb8"), crop=Crop(3, 0, 3, 2)).reason is Reason.IMAGE_SIZE


SMOOTH = np.zeros((48, 64, 3), np.uint8)
SMOOTH[..., 0] = np.arange(64)[None, :] * 4
SMOOTH[..., 1] = np.arange(48)[:, None] * 5


def test_jpeg_and_png_come_back_as_rgb() -> None:
    data = encode(SMOOTH, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 98)
    jpeg = image_from_message(compressed(data, "rgb8; jpeg compressed bgr8"))
    assert np.abs(jpeg.astype(int) - SMOOTH).mean() < 3
    png = image_from_message(compressed(encode(SMOOTH, ".png"), "png"))
    np.testing.assert_array_equal(png, SMOOTH)
    gray = image_from_message(compressed(encode(SMOOTH[..., 0], ".png"), "png"))
    np.testing.assert_array_equal(gray, np.repeat(SMOOTH[..., :1], 3, axis=2))


def test_jpeg_with_zeros_behind_its_end_is_complete() -> None:
    data = encode(SMOOTH, ".jpg") + bytes(100)
    assert image_from_message(compressed(data)).shape == SMOOTH.shape


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_anywhere_is_refused(suffix: str) -> None:
    whole = encode(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8), suffix)
    for length in [*range(40), *range(40, len(whole), 37), len(whole) - 1]:
        assert failure(compressed(whole[:length])).reason in (Reason.IMAGE_DECODE, Reason.IMAGE_ENCODING)
    # A driver that sends its whole buffer pads with zeros: OpenCV would make a partly grey image of these.
    padded = failure(compressed(whole[: len(whole) // 2] + bytes(3000)))
    assert padded.reason is Reason.IMAGE_DECODE
    assert "truncated: its end marker is missing" in padded.message


def test_png_of_16_bits_is_refused() -> None:
    error = failure(compressed(encode(SMOOTH.astype(np.uint16), ".png"), "png"))
    assert error.reason is Reason.IMAGE_ENCODING
    assert "16-bit PNG" in error.message


@pytest.mark.parametrize(("data", "format", "reason"), [
    (b"", "jpeg", Reason.IMAGE_DECODE),
    (b"RIFF\x00\x00\x00\x00WEBP", "webp", Reason.IMAGE_ENCODING),
    (encode(SMOOTH, ".png"), "16UC1; compressedDepth png", Reason.IMAGE_ENCODING),
])
def test_other_compressed_data_is_refused(data: bytes, format: str, reason: Reason) -> None:
    assert failure(compressed(data, format)).reason is reason


def test_absurd_dimensions_are_refused_before_decoding() -> None:
    jpeg = bytearray(encode(SMOOTH, ".jpg"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert failure(compressed(bytes(jpeg))).reason is Reason.IMAGE_SIZE
    png = bytearray(encode(SMOOTH, ".png"))
    png[16:24] = b"\x00\x01\x00\x00\x00\x01\x00\x00"
    assert failure(compressed(bytes(png))).reason is Reason.IMAGE_SIZE


def test_the_orientation_tag_is_ignored() -> None:
    """EXIF orientation 6 would turn the picture on its side, unlike the frames the policy was trained on."""
    tag = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    tiff = b"II*\x00\x08\x00\x00\x00\x01\x00" + tag + bytes(4)
    exif = b"\xff\xe1" + (len(tiff) + 8).to_bytes(2, "big") + b"Exif\x00\x00" + tiff
    plain = encode(SMOOTH, ".jpg")
    tagged = plain[:2] + exif + plain[2:]
    turned = cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR)
    assert turned.shape == (64, 48, 3)
    assert image_from_message(compressed(tagged)).shape == (48, 64, 3)


def test_fuzzed_messages_give_an_image_or_a_reason() -> None:
    """1,500 messages with damaged fields and bytes: nothing but IngestError ever comes out."""
    rng = np.random.default_rng(7)
    encodings = ["rgb8", "bgr8", "rgba8", "mono8", "mono16", "yuv422", "8UC3", "", "\x00"]
    jpeg, png = encode(SMOOTH, ".jpg"), encode(SMOOTH, ".png")
    images = 0
    reasons: set[Reason] = set()
    for _ in range(1500):
        if rng.random() < 0.5:
            data = bytearray(jpeg if rng.random() < 0.5 else png)
            for _ in range(int(rng.integers(0, 6))):
                data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
            length = int(rng.integers(0, len(data) + 1)) if rng.random() < 0.3 else len(data)
            message = compressed(bytes(data[:length]))
        else:
            message = raw(RGB, str(rng.choice(encodings)), int(rng.integers(0, 4)))
            for name in ("height", "width", "step"):
                if rng.random() < 0.3:
                    setattr(message, name, int(rng.choice([0, 1, 4, 6, 15, 20, 2**31, 2**32 - 1])))
            if rng.random() < 0.3:
                message.data = message.data[: int(rng.integers(0, len(message.data)))]
        try:
            image = image_from_message(message, stream="camera")
        except IngestError as error:
            reasons.add(error.reason)
        else:
            images += 1
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert image.dtype == np.uint8
    assert reasons == {Reason.IMAGE_ENCODING, Reason.IMAGE_SIZE, Reason.IMAGE_DECODE}
    assert 100 < images < 1400
