"""SigLIP So400m/14 vision tower and PaliGemma's projection into the language model (arXiv:2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PATCH_SIZE, SiglipConfig
from .linear import Linear, Projection
from .norms import LayerNorm


class SiglipLayer(nn.Module):
    """Pre-norm transformer block with biases and tanh GELU."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = LayerNorm(config.width)
        self.qkv = Linear(config.width, 3 * config.width, dtype=dtype)
        self.out = Linear(config.width, config.width, dtype=dtype)
        self.norm2 = LayerNorm(config.width)
        self.fc1 = Linear(config.width, config.mlp_dim, dtype=dtype)
        self.fc2 = Linear(config.mlp_dim, config.width, dtype=dtype)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, branch: (views, tokens, width). Returns (residual, the MLP's output still to be added)."""
        normed, x = self.norm1(x, branch, self.qkv.input_scale)
        attended = ops.vision_attention(self.qkv(normed), self.num_heads, self.out.input_scale)
        normed, x = self.norm2(x, self.out(attended), self.fc1.input_scale)
        return x, self.fc2(self.fc1.gelu(normed, self.fc2.input_scale))


class Siglip(nn.Module):
    """Images to tokens of the language model's width; patch and position embeddings stay float32."""

    position: Tensor

    def __init__(self, config: SiglipConfig, out_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.patch = Projection(3 * PATCH_SIZE * PATCH_SIZE, config.width, dtype=torch.float32)
        self.position = nn.Parameter(
            torch.empty(config.tokens, config.width, dtype=torch.float32), requires_grad=False
        )
        self.layers = nn.ModuleList(SiglipLayer(config, dtype) for _ in range(config.depth))
        self.norm = LayerNorm(config.width)
        self.levels: ops.LevelWeights | None = None
        self.project = Linear(config.width, out_width, dtype=dtype)

    def prepare(self) -> None:
        """With the weights in place: also take pixels as whole numbers where there is a kernel for them."""
        weight, bias = self.patch.weight, self.patch.bias
        if ops.levels_served(weight, self.dtype):
            self.levels = ops.LevelWeights.of(weight, bias, self.position)

    def embed(self, images: Tensor) -> Tensor:
        """Patch and position embeddings: (views, tokens, width) of the compute dtype."""
        if images.dtype == torch.float16:
            assert self.levels is not None, "no kernel takes levels here"
            return ops.embed_levels(images, self.levels)
        patches = images if images.ndim == 3 else ops.patchify(images, PATCH_SIZE)
        return ops.embed_patches(patches, self.patch.weight, self.patch.bias, self.position, self.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """images: (views, 3, size, size) float32 in [-1, 1], or already cut into (views, tokens, 3 * 14 *
        14), or, with `levels`, those as whole numbers in float16, see `ops.embed_levels`.

        Returns (views, tokens, out_width).
        """
        x = self.embed(images)
        branch: Tensor | None = None
        for layer in self.layers:
            x, branch = layer(x, branch)
        out: Tensor = self.project(self.norm(x, branch)[0])
        return out
