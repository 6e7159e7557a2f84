"""msgpack with NumPy arrays as openpi's client writes them: data only, no objects, nothing executed."""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from .refusals import Refusal

PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
MAX_DIMENSIONS = 8


def pack(content: object) -> bytes:
    """Arrays and NumPy scalars become maps of their bytes, dtype and shape. Raises TypeError for others."""
    packed: bytes = msgpack.packb(content, default=_pack_array)
    return packed


def _pack_array(value: object) -> object:
    if isinstance(value, np.ndarray) and PLAIN_DTYPE.fullmatch(value.dtype.str):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic) and PLAIN_DTYPE.fullmatch(value.dtype.str):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot be sent: {type(value).__name__}")


def unpack(content: bytes) -> Any:
    """The content of one message; arrays are read-only views of its bytes. Raises Refusal (400)."""
    try:
        return msgpack.unpackb(content, object_hook=_unpack_array, strict_map_key=False)
    except Refusal:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise malformed(str(error) or type(error).__name__) from error


def malformed(reason: str) -> Refusal:
    """400: the bytes are not a message at all."""
    return Refusal(400, "malformed_message", f"not a msgpack message with NumPy arrays: {reason}")


def _unpack_array(entry: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entry:
        return _array(entry)
    if b"__npgeneric__" in entry:
        value = entry.get(b"data")
        if not isinstance(value, (bool, int, float)):
            raise malformed(f"a NumPy scalar holds {type(value).__name__}")
        try:
            return _dtype(entry).type(value)
        except OverflowError as error:
            raise malformed(f"NumPy scalar: {error}") from error
    return entry


def _dtype(entry: dict[Any, Any]) -> np.dtype[Any]:
    name = entry.get(b"dtype")
    if not isinstance(name, str) or not PLAIN_DTYPE.fullmatch(name):
        raise malformed(f"dtype {name!r:.40}: expected a boolean, integer or float type")
    return np.dtype(name)


def _array(entry: dict[Any, Any]) -> np.ndarray[Any, Any]:
    data, shape, dtype = entry.get(b"data"), entry.get(b"shape"), _dtype(entry)
    if not isinstance(data, bytes):
        raise malformed(f"an array's data is {type(data).__name__}, expected bytes")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_DIMENSIONS
        or not all(isinstance(size, int) and size >= 0 for size in shape)
    ):
        raise malformed(f"an array's shape is {shape!r:.60}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise malformed(f"{len(data)} bytes do not fill an array of {dtype} {list(shape)}")
    return np.frombuffer(data, dtype).reshape(shape)
