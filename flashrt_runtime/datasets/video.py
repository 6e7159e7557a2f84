"""One frame of a video file, by seeking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError


def read_frame(path: Path, seconds: float, tolerance: float) -> NDArray[np.uint8]:
    """The frame shown at `seconds` from the video's start: (H, W, 3) uint8 RGB.

    Decodes from the key frame before it. Raises DatasetError where there is no such file, or no frame within
    `tolerance` seconds.
    """
    try:
        import av
    except ImportError as error:
        raise DatasetError(
            f"{path}: reading videos needs PyAV: pip install 'flashrt-runtime[datasets]'"
        ) from error
    if not path.is_file():
        raise DatasetError(f"{path}: no such video")
    best, distance = None, float("inf")
    try:
        with av.open(str(path)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise DatasetError(f"{path}: holds no video")
            container.seek(max(0, int(seconds / (stream.time_base or 1))), stream=stream)
            for frame in container.decode(stream):
                away = frame.time - seconds
                if abs(away) < distance:
                    best, distance = frame, abs(away)
                elif away > 0:
                    break
    except av.FFmpegError as error:
        raise DatasetError(f"{path}: cannot be decoded: {error}") from error
    if best is None or distance > tolerance:
        nearest = "there is none" if best is None else f"the nearest is {distance:.3f} s away"
        raise DatasetError(f"{path}: no frame at {seconds:.3f} s: {nearest}")
    return best.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
