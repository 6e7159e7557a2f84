"""The real cv_bridge, where it is installed, for image encodings outside the direct path."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flashrt_ros.core.images import FallbackDecoder


def cv_bridge_decoder() -> FallbackDecoder | None:
    """A decoder of Image messages to (H, W, 3) uint8 RGB, or None where ROS 2's cv_bridge cannot be imported.

    The package of that name on PyPI is ROS 1 code, which ignores `step`: it is not used.
    """
    try:
        from cv_bridge import CvBridge
    except ImportError:
        return None
    if _major_version("cv_bridge") < 2:
        return None
    bridge = CvBridge()

    def decode(message: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.asarray(bridge.imgmsg_to_cv2(message, desired_encoding="rgb8"))

    return decode


def _major_version(distribution: str) -> int:
    """Major version of an installed distribution; a large one where it carries no metadata."""
    try:
        return int(metadata.version(distribution).split(".")[0])
    except (metadata.PackageNotFoundError, ValueError):
        return 1 << 30
