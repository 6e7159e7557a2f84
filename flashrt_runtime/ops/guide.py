"""Real-time chunking's correction of a velocity as one kernel; see native_kernels/guide_velocity.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def guide_velocity(
    velocity: Tensor, x: Tensor, target: Tensor, weight: Tensor, gain: Tensor, time: float
) -> Tensor:
    """See `reference.guide_velocity`. Raises ValueError for tensors that are not on the GPU or do not fit."""
    for name, tensor, shape in (
        ("velocity", velocity, velocity.shape),
        ("x", x, velocity.shape),
        ("target", target, velocity.shape),
        ("weight", weight, velocity.shape[:1]),
        ("gain", gain, ()),
    ):
        usable = tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device == velocity.device
        if velocity.ndim != 2 or not velocity.is_cuda or tensor.shape != shape or not usable:
            raise ValueError(
                f"guide_velocity: {name} must be a contiguous float32 CUDA tensor of shape {tuple(shape)}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    out = torch.empty_like(velocity)
    rows, width = velocity.shape
    native.launch(
        "guide_velocity", velocity.device, velocity, x, target, weight, gain, time, out, rows, width
    )
    return out
