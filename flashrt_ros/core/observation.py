"""One synchronised observation as the policy takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Observation:
    """What `predict` is given, in physical units.

    images: view name -> (H, W, 3) uint8 RGB at camera resolution, possibly a view into the message's buffer.
    state: (state_dim,) float32 in the policy's units and order.
    stamps: stream name -> header stamp of the message used [ns, ROS time].
    newest_image_stamp: largest stamp among the image streams [ns, ROS time].
    absent: views of optional streams that had no fitting message, or one that was refused.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    stamps: Mapping[str, int]
    newest_image_stamp: int
    absent: tuple[str, ...] = ()

    @property
    def policy_images(self) -> dict[str, NDArray[np.uint8] | None]:
        """As `predict` takes them: None for an absent view, which is masked."""
        return {**self.images, **dict.fromkeys(self.absent)}
