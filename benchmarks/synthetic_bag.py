"""Writes a rosbag2 for any robot contract without ROS or a robot: moving patterns, joints on sine waves."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from flashrt_ros.core.contract import RobotContract, StreamSpec, StreamType

MS = 1_000_000
START = 1_760_000_000_000 * MS  # of the recorder's clock [ns]
TRANSPORT = 2 * MS  # from a header stamp to the recorder [ns]
FRAMES = 16  # different images of a camera; then they repeat
STORE = get_typestore(Stores.ROS2_JAZZY)

# (stream, index, stamp, recorder's time, serialised message) -> the same, changed, or None to leave it out.
Entry = tuple[str, int, int, int, bytes]
Change = Callable[[Entry], Entry | None]


def stamped(data: bytes, stamp: int) -> bytes:
    """A serialised message with another header stamp [ns]."""
    return data[:4] + struct.pack("<iI", stamp // 10**9, stamp % 10**9) + data[12:]


def pattern(size: tuple[int, int], index: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 RGB: noise over gradients, and a block that moves with `index`."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3), dtype=np.uint8)
    image = noise + np.linspace(0, 120, width, dtype=np.uint8)[None, :, None]
    left = (index * width // FRAMES) % width
    image[height // 4 : height // 2, left : left + width // 8] = (250, 30 + 10 * seed, 20)
    return image


def message_of(type_name: str, **fields: Any) -> bytes:
    """Serialise a standard message whose header is filled in by `stamped`."""
    kinds = STORE.types
    time = kinds["builtin_interfaces/msg/Time"](sec=0, nanosec=0)
    header = kinds["std_msgs/msg/Header"](stamp=time, frame_id="frame")
    return bytes(STORE.serialize_cdr(kinds[type_name](header=header, **fields), type_name))


def image_message(pixels: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> bytes:
    """A raw Image of RGB pixels in this encoding, with `padding` bytes after each row."""
    code = {"bgr8": cv2.COLOR_RGB2BGR, "rgba8": cv2.COLOR_RGB2RGBA, "mono8": cv2.COLOR_RGB2GRAY}.get(encoding)
    encoded = pixels if code is None else cv2.cvtColor(pixels, code)
    height, width = encoded.shape[:2]
    rows = encoded.reshape(height, -1)
    data = np.pad(rows, ((0, 0), (0, padding))).ravel()
    return message_of(
        StreamType.IMAGE, height=height, width=width, encoding=encoding, is_bigendian=0,
        step=rows.shape[1] + padding, data=data,
    )


def compressed_message(pixels: np.ndarray, suffix: str = ".jpg") -> bytes:
    """A CompressedImage of RGB pixels."""
    _, data = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return message_of(StreamType.COMPRESSED_IMAGE, format=f"rgb8; {suffix[1:]} compressed bgr8", data=data)


def joint_message(names: tuple[str, ...], values: np.ndarray) -> bytes:
    """A JointState with positions and velocities."""
    return message_of(
        StreamType.JOINT_STATE, name=list(names), position=np.asarray(values, float),
        velocity=np.asarray(values, float) / 10, effort=np.zeros(0),
    )


def write_bag(
    path: Path,
    contract: RobotContract,
    seconds: float,
    *,
    storage: str = "mcap",
    compression: str = "",
    size: tuple[int, int] = (64, 48),
    camera_rate: float = 30.0,
    joint_rate: float = 100.0,
    encoding: str = "rgb8",
    padding: int = 0,
    start: int = START,
    change: Change = lambda entry: entry,
    extra: Callable[[Writer], None] = lambda writer: None,
) -> Path:
    """Write the bag and return its path. compression: "", file, message or storage (mcap only)."""
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    if compression:
        writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    with writer:
        connections = {
            stream.name: writer.add_connection(f"/{stream.topic}", stream.type.value, typestore=STORE)
            for stream in contract.streams.values()
        }
        entries = [
            _camera(stream, seconds, camera_rate, size, encoding, padding, start + phase * MS)
            if stream.is_image
            else _joints(contract, stream, seconds, joint_rate, start)
            for phase, stream in enumerate(contract.streams.values(), start=1)  # no two at the same time
        ]
        for entry in heapq.merge(*entries, key=lambda item: item[3]):
            changed = change(entry)
            if changed is not None:
                name, _, stamp, time, data = changed
                writer.write(connections[name], time, stamped(data, stamp))
        extra(writer)
    return path


def _camera(
    stream: StreamSpec, seconds: float, rate: float, size: tuple[int, int], encoding: str, padding: int,
    start: int,
) -> Iterator[Entry]:
    seed = sum(map(ord, stream.name)) % 7
    images = [pattern(size, index, seed) for index in range(FRAMES)]
    raw = stream.type is StreamType.IMAGE
    frames = [image_message(item, encoding, padding) if raw else compressed_message(item) for item in images]
    for index in range(int(seconds * rate)):
        stamp = start + round(index * 1e9 / rate)
        yield stream.name, index, stamp, stamp + TRANSPORT, frames[index % FRAMES]


def _joints(
    contract: RobotContract, stream: StreamSpec, seconds: float, rate: float, start: int
) -> Iterator[Entry]:
    names = tuple(contract.joints)[::-1]  # not the contract's order: joints are found by name
    for index in range(int(seconds * rate)):
        stamp = start + round(index * 1e9 / rate)
        values = joint_values(len(names), index / rate)
        yield stream.name, index, stamp, stamp + TRANSPORT, joint_message(names, values)


def joint_values(count: int, seconds: float) -> np.ndarray:
    """Positions (count,) at a time [s]."""
    phase = np.arange(count)
    return 0.02 + 0.015 * np.sin(2 * np.pi * (0.2 * seconds + phase / max(1, count)))
