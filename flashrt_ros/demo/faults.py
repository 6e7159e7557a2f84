"""Faults to inject into the demo robot's streams: dropped, delayed, mis-stamped and malformed messages.

No ROS import. Options are plain dataclasses, so that the node can offer each field as a run-time parameter
`<stream>.<field>`; a `FaultGate` per stream turns them into what is sent and when. Times are int nanoseconds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

RAW_ENCODINGS = ("rgb8", "bgr8", "rgba8", "bgra8", "mono8", "mono16")
COMPRESSED_ENCODINGS = ("jpeg", "png")


@dataclass(frozen=True)
class StreamFaults:
    """Faults any stream can have; the defaults are a healthy stream."""

    drop: float = 0.0  # fraction of messages not sent, 0..1; 1 silences the stream
    delay: float = 0.0  # sent this much later, with the stamp they had [s]
    freeze_stamp: bool = False  # every message carries the stamp of the moment this was set
    stamp_offset: float = 0.0  # added to every stamp, as by a camera clock that is off [s]

    def check(self, joint_names: Sequence[str] = ()) -> None:
        """Raises ValueError, naming the option, for a value out of range."""
        if not 0.0 <= self.drop <= 1.0:
            raise ValueError(f"drop must lie in 0..1, got {self.drop}")
        if not 0.0 <= self.delay <= 10.0:
            raise ValueError(f"delay must lie in 0..10 s, got {self.delay}")


@dataclass(frozen=True)
class CameraFaults(StreamFaults):
    """Faults of a camera stream."""

    truncate: float = 1.0  # fraction of the image bytes that is sent, 0..1

    def check(self, joint_names: Sequence[str] = ()) -> None:
        """Raises ValueError, naming the option, for a value out of range."""
        super().check(joint_names)
        if not 0.0 <= self.truncate <= 1.0:
            raise ValueError(f"truncate must lie in 0..1, got {self.truncate}")


@dataclass(frozen=True)
class JointFaults(StreamFaults):
    """Faults of the joint state stream; each names one joint, empty for none."""

    missing: str = ""  # joint left out
    rename: str = ""  # "joint:new_name"
    reverse: bool = False  # joints sent in reverse order
    nan: str = ""  # joint whose position is NaN
    inf: str = ""  # joint whose position is infinite

    def check(self, joint_names: Sequence[str] = ()) -> None:
        """Raises ValueError, naming the option, for a value out of range or a joint the robot lacks."""
        super().check(joint_names)
        renamed, colon, new_name = self.rename.partition(":")
        if self.rename and not (colon and new_name):
            raise ValueError(f"rename must read 'joint:new_name', got '{self.rename}'")
        for option, joint in (
            ("missing", self.missing),
            ("rename", renamed),
            ("nan", self.nan),
            ("inf", self.inf),
        ):
            if joint and joint not in joint_names:
                raise ValueError(f"{option} names joint '{joint}': the robot has {', '.join(joint_names)}")

    def apply(
        self, names: Sequence[str], *columns: NDArray[np.float64]
    ) -> tuple[list[str], list[NDArray[np.float64]]]:
        """Names and columns (each (dof,), the first one positions) as this faulty robot reports them."""
        kept = [index for index, name in enumerate(names) if name != self.missing]
        if self.reverse:
            kept.reverse()
        old, _, new = self.rename.partition(":")
        sent = [new if self.rename and names[index] == old else names[index] for index in kept]
        values = [column[kept] for column in columns]
        for joint, value in ((self.nan, np.nan), (self.inf, np.inf)):
            if joint:
                values[0][[names[index] == joint for index in kept]] = value
        return sent, values


class FaultGate[T]:
    """Decides for one stream which messages are sent, with which stamp and when. One thread uses it.

    faults may be replaced at any time from another thread. The seed makes partial drops repeatable.
    """

    def __init__(self, faults: StreamFaults, seed: int = 0) -> None:
        self.faults = faults
        self._random = random.Random(seed)
        self._frozen: int | None = None
        self._waiting: deque[tuple[int, T]] = deque()

    def stamp(self, time: int) -> int | None:
        """Header stamp for a message taken at `time` [ns]; None when this one is dropped."""
        faults = self.faults
        self._frozen = (self._frozen or time) if faults.freeze_stamp else None
        if faults.drop >= 1.0 or (faults.drop > 0.0 and self._random.random() < faults.drop):
            return None
        return (self._frozen or time) + round(faults.stamp_offset * 1e9)

    def send(self, now: int, message: T | None = None) -> list[T]:
        """Messages to publish at `now` [ns], oldest first, after accepting `message` (None: nothing new)."""
        if message is not None:
            self._waiting.append((now + round(self.faults.delay * 1e9), message))
        ready = []
        while self._waiting and self._waiting[0][0] <= now:
            ready.append(self._waiting.popleft()[1])
        return ready


def encode_raw(image: NDArray[np.uint8], encoding: str) -> tuple[NDArray[np.uint8], int]:
    """RGB image (H, W, 3) as the bytes of a sensor_msgs/Image, flat uint8, and its row length `step` [bytes].

    Raises ValueError for an encoding outside RAW_ENCODINGS.
    """
    if encoding == "rgb8":
        pixels: NDArray[Any] = image
    elif encoding in ("bgr8", "rgba8", "bgra8", "mono8"):
        code = {
            "bgr8": cv2.COLOR_RGB2BGR,
            "rgba8": cv2.COLOR_RGB2RGBA,
            "bgra8": cv2.COLOR_RGB2BGRA,
            "mono8": cv2.COLOR_RGB2GRAY,
        }[encoding]
        pixels = cv2.cvtColor(image, code)
    elif encoding == "mono16":
        pixels = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype("<u2") * 257).view(np.uint8)
    else:
        raise ValueError(f"encoding must be one of {', '.join(RAW_ENCODINGS)}, got '{encoding}'")
    flat = np.ascontiguousarray(pixels).reshape(image.shape[0], -1)
    return flat.reshape(-1), flat.shape[1]


def encode_compressed(image: NDArray[np.uint8], encoding: str, jpeg_quality: int = 90) -> NDArray[np.uint8]:
    """RGB image (H, W, 3) as JPEG or PNG file bytes, flat uint8. Raises ValueError for another encoding."""
    if encoding not in COMPRESSED_ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(COMPRESSED_ENCODINGS)}, got '{encoding}'")
    options = [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality] if encoding == "jpeg" else []
    done, data = cv2.imencode("." + encoding, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape} as {encoding}")
    flat: NDArray[np.uint8] = data.reshape(-1)
    return flat
