"""The vision tower's patch projection on pixels that are whole numbers, on Hopper's matrix unit; its
definition is `reference.embed_patches`.

Levels are pixels less 128: float16 holds them exactly, and a float32 weight to 22 bits in two parts, so that
products in 16 bits are as good as those in 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native

ZERO_LEVEL, LARGEST = 128.0, 255.0
ALIGNMENT = 16  # of the width; of a row's bytes, too
HIGHEST_EXPONENT = 14  # of the largest weight's high part, in float16


def padded(depth: int) -> int:
    """Elements of a row of levels: `depth` and zeros."""
    return -(-depth * 2 // ALIGNMENT) * ALIGNMENT // 2


@dataclass(frozen=True)
class LevelWeights:
    """split: (2 * width, padded) float16, the high parts of all weights, then the low ones; `factor` times
    their sum is what a level is multiplied by. table: (tokens, width) float32, what is added.
    """

    split: Tensor
    table: Tensor
    factor: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, position: Tensor) -> LevelWeights:
        """Of a projection of pixels in [-1, 1], p = level * 2 / 255 + 1 / 255.

        weight: (width, depth), bias: (width,), position: (tokens, width), all float32.
        """
        width, depth = weight.shape
        wide = weight.double() * (2.0 / LARGEST)
        largest = float(wide.abs().amax())
        scale = 2.0 ** (HIGHEST_EXPONENT - math.frexp(largest)[1]) if largest > 0.0 else 1.0
        split = torch.zeros(2, width, padded(depth), dtype=torch.float16, device=weight.device)
        split[0, :, :depth] = wide * scale
        split[1, :, :depth] = wide * scale - split[0, :, :depth].double()
        offset = bias.double() + weight.double().sum(1) * ((2.0 * ZERO_LEVEL - LARGEST) / LARGEST)
        table = (position.double() + offset).float()
        return cls(split.flatten(0, 1), table, 1.0 / scale)


def served(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `embed_levels` serves this projection on its GPU."""
    return (
        weight.is_cuda
        and native.available()
        and dtype == torch.bfloat16
        and weight.shape[0] % ALIGNMENT == 0
        and native.capability(weight.device) == (9, 0)
    )


def embed_levels(levels: Tensor, weights: LevelWeights) -> Tensor:
    """Projection and position of patches, rounded to bfloat16 once.

    levels: (views, tokens, padded) float16, of `prefix.camera_patches`. Returns (views, tokens, width).
    """
    tokens, width = weights.table.shape
    depth = weights.split.shape[1]
    if levels.dtype != torch.float16 or levels.shape[1:] != (tokens, depth) or not levels.is_contiguous():
        raise ValueError(
            f"embed_levels: expected contiguous float16 (views, {tokens}, {depth}), got {levels.dtype} "
            f"{tuple(levels.shape)}"
        )
    out = torch.empty(*levels.shape[:2], width, dtype=torch.bfloat16, device=levels.device)
    native.launch(
        "patch_product", levels.device, levels, weights.split, weights.table, weights.factor, out,
        levels.shape[0] * tokens, width, depth, tokens,
    )
    return out
