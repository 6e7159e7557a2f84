"""Messages that a robot's drivers should never send: real ROS messages, each with reasons to refuse it."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Header

from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import NS_PER_S

BASE, WRIST, JOINTS = "base_camera", "wrist_camera", "joint_states"
PIXELS = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PHOTO = cv2.GaussianBlur(np.random.default_rng(4).integers(0, 256, (96, 128, 3), dtype=np.uint8), (0, 0), 1)
JPEG = bytes(cv2.imencode(".jpg", PHOTO)[1].tobytes())
PNG = bytes(cv2.imencode(".png", PHOTO)[1].tobytes())
DEEP_PNG = bytes(cv2.imencode(".png", PHOTO.astype(np.uint16))[1].tobytes())


@dataclass(frozen=True)
class Malformed:
    """A message of `stream`; one of `reasons` is to be counted for it. deep: only decoding shows it."""

    stream: str
    message: Any
    reasons: frozenset[Reason]
    deep: bool = False


def header(nanoseconds: int) -> Header:
    seconds, rest = divmod(nanoseconds, NS_PER_S)
    return Header(stamp=Time(sec=seconds, nanosec=rest))


def good_messages(contract: RobotContract, now: int) -> dict[str, Any]:
    """One good message per stream of the demo arm, stamped `now` [ns, ROS time]."""
    names = list(contract.state.sources[0].joints)
    middle = [sum(_bounds(contract, name)) / 2 for name in names]
    return {
        BASE: _image(now),
        WRIST: CompressedImage(header=header(now), format="jpeg", data=array.array("B", JPEG)),
        JOINTS: JointState(header=header(now), name=names, position=array.array("d", middle)),
    }


def malformed(
    contract: RobotContract, rng: np.random.Generator, now: Callable[[], int]
) -> Iterator[Malformed]:
    """An endless mix over streams and kinds; `now` gives the stamp [ns, ROS time] of each."""
    while True:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        yield kind(contract, rng, now())


def _bounds(contract: RobotContract, name: str) -> tuple[float, float]:
    limits = contract.joints[name].limits
    assert limits is not None
    return limits.lower, limits.upper


def _image(now: int, **changes: Any) -> Image:
    fields = {
        "header": header(now), "height": 24, "width": 32, "step": 96, "encoding": "rgb8",
        "data": array.array("B", PIXELS.tobytes()),
    }
    return Image(**{**fields, **changes})


def bad_size(_: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    data = PIXELS.tobytes()
    changes: list[dict[str, Any]] = [
        {"height": int(rng.choice([0, 1, 23, 25, 2**16, 2**32 - 1]))},
        {"width": int(rng.choice([0, 33, 2**16, 2**32 - 1]))},
        {"step": int(rng.choice([0, 1, 95, 97, 192, 2**32 - 1]))},
        {"data": array.array("B", data[: int(rng.integers(0, len(data)))])},
        {"data": array.array("B", data + bytes(int(rng.integers(1, 500))))},
        {"height": 2**32 - 1, "width": 2**32 - 1, "step": 2**32 - 1},
    ]
    change = changes[int(rng.integers(len(changes)))]
    return Malformed(BASE, _image(now, **change), frozenset({Reason.IMAGE_SIZE}))


def bad_encoding(_: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    deep = ["mono16", "16UC1", "rgb16", "bgra16", "32FC1", "64FC3"]
    encoding = str(rng.choice([*deep, "", "RGB8", "rgb 8", "\u00e9", "yuv422"]))
    return Malformed(BASE, _image(now, encoding=encoding), frozenset({Reason.IMAGE_ENCODING}))


def more_channels_than_bytes(_: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    message = _image(now, encoding=str(rng.choice(["rgba8", "bgra8"])))
    return Malformed(BASE, message, frozenset({Reason.IMAGE_SIZE}))


def bad_container(_: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    whole = JPEG if rng.random() < 0.5 else PNG
    damaged = {Reason.IMAGE_DECODE, Reason.IMAGE_ENCODING}
    choices: list[tuple[bytes, str, set[Reason]]] = [
        (whole[: int(rng.integers(0, len(whole) - 13))], "jpeg", damaged),
        (b"", "jpeg", {Reason.IMAGE_DECODE}),
        (rng.bytes(int(rng.integers(1, 2000))), "jpeg", {Reason.IMAGE_ENCODING}),
        (b"RIFF\0\0\0\0WEBP" + rng.bytes(100), "webp", {Reason.IMAGE_ENCODING}),
        (DEEP_PNG, "png", {Reason.IMAGE_ENCODING}),
        (PNG, "16UC1; compressedDepth png", {Reason.IMAGE_ENCODING}),
        (_with_size(JPEG, 0xFFFF), "jpeg", {Reason.IMAGE_SIZE}),
        (_with_size(JPEG, 0), "jpeg", {Reason.IMAGE_SIZE}),
        (JPEG[:2] + JPEG[-2:], "jpeg", damaged),
    ]
    data, format, reasons = choices[int(rng.integers(len(choices)))]
    message = CompressedImage(header=header(now), format=format, data=array.array("B", data))
    return Malformed(WRIST, message, frozenset(reasons))


def _with_size(jpeg: bytes, size: int) -> bytes:
    changed, at = bytearray(jpeg), jpeg.index(b"\xff\xc0")
    changed[at + 5 : at + 9] = size.to_bytes(2, "big") * 2
    return bytes(changed)


def damaged_inside(_: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    if rng.random() < 0.5:
        at = int(rng.integers(700, len(JPEG) - 700))
        data, format = JPEG[:at] + bytes(600) + JPEG[at + 600 :], "jpeg"
    else:
        at = int(rng.integers(45, len(PNG) - 20))
        data, format = PNG[:at] + bytes([PNG[at] ^ 0x10]) + PNG[at + 1 :], "png"
    message = CompressedImage(header=header(now), format=format, data=array.array("B", data))
    return Malformed(WRIST, message, frozenset({Reason.IMAGE_DECODE}), deep=True)


def bad_joints(contract: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    message = good_messages(contract, now)[JOINTS]
    names, positions = list(message.name), list(message.position)
    at = int(rng.integers(len(names)))
    kind = int(rng.integers(8))
    reason = Reason.JOINT_MISSING
    if kind == 0:
        del names[at], positions[at]
    elif kind == 1:
        names[at] = str(rng.choice(["", names[at].upper(), f"{names[at]} ", "\u00fc", "x" * 1000]))
    elif kind == 2:
        names, positions = [], []
    elif kind == 3:
        names.append(names[at])
        positions.append(0.0)
        reason = Reason.JOINT_DUPLICATE
    elif kind == 4:
        positions = positions[: int(rng.integers(len(positions)))]
        reason = Reason.JOINT_FIELD
    elif kind == 5:
        positions += [0.0] * int(rng.integers(1, 50))
        reason = Reason.JOINT_FIELD
    else:
        positions[at] = float(rng.choice([np.nan, np.inf, -np.inf]))
        reason = Reason.JOINT_NOT_FINITE
    message.name, message.position = names, array.array("d", positions)
    return Malformed(JOINTS, message, frozenset({reason}))


def bad_stamp(contract: RobotContract, rng: np.random.Generator, now: int) -> Malformed:
    stream = str(rng.choice([BASE, WRIST, JOINTS]))
    message = good_messages(contract, now)[stream]
    future = bool(rng.random() < 0.5)
    seconds = now // NS_PER_S
    stamps = [(seconds + 5, 0), (2**31 - 1, 999_999_999), (seconds + 1, 2**32 - 1)] if future else [
        (0, 0), (-(2**31), 0), (-1, 2**32 - 1), (seconds - 5, 0),
    ]
    sec, nanosec = stamps[int(rng.integers(len(stamps)))]
    message.header.stamp.sec = sec
    message.header.stamp.nanosec = nanosec
    past = Reason.STALE_STAMP if sec or nanosec else Reason.STAMP_UNSET
    return Malformed(stream, message, frozenset({Reason.CLOCK if future else past}))


KINDS = (
    bad_size, bad_encoding, more_channels_than_bytes, bad_container, bad_container, damaged_inside,
    bad_joints, bad_joints, bad_stamp,
)
