"""JPEG and PNG: the same pixels as OpenCV's, and damage refused, in the middle too."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from flashrt_ros.core.compressed import jpeg_header
from flashrt_ros.core.contract import ColourOrder
from flashrt_ros.core.errors import DamagedImageError, IngestError
from flashrt_ros.core.images import check_image, image_from_message
from flashrt_ros.core.reasons import Reason

ROOT = Path(__file__).resolve().parents[3]
PHOTO = cv2.resize(cv2.imread(str(ROOT / "docs" / "images" / "demo_cameras.png")), (320, 240))


def jpeg(image: np.ndarray = PHOTO, *parameters: int) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90, *parameters])[1].tobytes())


def message(data: bytes, format: str = "jpeg") -> SimpleNamespace:
    return SimpleNamespace(format=format, data=data)


def scan_of(data: bytes) -> int:
    header = jpeg_header(np.frombuffer(data, np.uint8))
    assert header is not None
    return header.scan


@pytest.mark.parametrize("parameters", [
    (), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_OPTIMIZE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
])
def test_pixels_are_those_that_opencv_decodes(parameters: tuple[int, ...]) -> None:
    data = jpeg(PHOTO, *parameters)
    want = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    got = image_from_message(message(data))
    # Progressive images are smoothed between scans by one of the two.
    assert np.abs(got.astype(int) - want).max() <= 1


def test_a_grey_jpeg_is_grey_in_rgb() -> None:
    image = image_from_message(message(jpeg(PHOTO[..., 0])))
    assert image.shape == (240, 320, 3)
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_red_and_blue_that_the_driver_mixed_up(suffix: str) -> None:
    data = bytes(cv2.imencode(suffix, PHOTO)[1].tobytes())
    right = image_from_message(message(data))
    mixed = image_from_message(message(data), colour_order=ColourOrder.BGR)
    np.testing.assert_array_equal(mixed, right[..., ::-1])
    np.testing.assert_array_equal(image_from_message(message(data), colour_order=ColourOrder.RGB), right)


@pytest.mark.parametrize("kind", ["lost", "zeros", "noise"])
@pytest.mark.parametrize("size", [512, 1472, 4096])  # packets of USB and UDP, and a page
def test_damage_in_the_middle_is_refused(size: int, kind: str) -> None:
    """Start and end marker are there: OpenCV shows stripes and grey, and says nothing."""
    data, rng = jpeg(), np.random.default_rng(size)
    for at in rng.integers(scan_of(data), len(data) - size - 2, 25):
        middle = {"lost": b"", "zeros": bytes(size), "noise": rng.bytes(size)}[kind]
        damaged = data[:at] + middle + data[at + size :]
        assert damaged.endswith(b"\xff\xd9")
        assert cv2.imdecode(np.frombuffer(damaged, np.uint8), cv2.IMREAD_COLOR) is not None
        check_image(message(damaged))  # nothing to be seen from outside
        with pytest.raises(DamagedImageError, match="damaged") as caught:
            image_from_message(message(damaged), stream="camera")
        assert (caught.value.reason, caught.value.stream) == (Reason.IMAGE_DECODE, "camera")


@pytest.mark.parametrize("parameters", [
    (), (cv2.IMWRITE_JPEG_OPTIMIZE, 1), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_is_not_taken_for_damage(level: int, parameters: tuple[int, ...]) -> None:
    """A lens cap: with optimised codes the whole picture may be a run of zeros."""
    flat = np.full((480, 640, 3), level, np.uint8)
    image = image_from_message(message(jpeg(flat, *parameters)))
    assert np.abs(image.astype(int) - level).max() <= 1


def test_damage_of_png_is_found_by_its_checksums() -> None:
    data, rng = bytes(cv2.imencode(".png", PHOTO[:60, :80])[1].tobytes()), np.random.default_rng(1)
    for at in rng.integers(41, len(data) - 13, 40):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(IngestError):
            image_from_message(message(bytes(damaged), "png"))


def test_truncation_shows_without_decoding() -> None:
    with pytest.raises(IngestError, match="truncated: its end marker is missing") as caught:
        check_image(message(jpeg()[:-500]))
    assert not isinstance(caught.value, DamagedImageError)
