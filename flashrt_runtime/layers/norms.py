"""Normalisations that take the residual add with them, so that a fused kernel can serve both.

All of them return (normed, residual): a block's output is added where the next norm reads it. `scale`, the
`input_scale` of the projection that reads the normed rows, makes them e4m3 of value / scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops

EPS = 1e-6


class RMSNorm(nn.Module):
    """Gemma's RMSNorm with weight stored as w and applied as 1 + w; weight float32."""

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)

    def forward(
        self, residual: Tensor, branch: Tensor | None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """residual: (tokens, width); branch: the same shape, or None for the first norm of a stack."""
        if branch is None:
            return ops.rms_norm(residual, self.weight, EPS, scale), residual
        return ops.add_rms_norm(branch, residual, self.weight, EPS, scale)


class LayerNorm(nn.Module):
    """SigLIP's LayerNorm, eps 1e-6, float32 weights."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)

    def forward(
        self, residual: Tensor, branch: Tensor | None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """residual: (views, tokens, width); branch: the same shape, or None for the first norm."""
        if branch is None:
            return ops.layer_norm(residual, self.weight, self.bias, EPS, scale), residual
        return ops.add_layer_norm(branch, residual, self.weight, self.bias, EPS, scale)


def ada_rms_norm(
    residual: Tensor, branch: Tensor | None, gate: Tensor | None, style: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adaptive RMSNorm with a gated residual add (pi0.5's conditioning on the flow time).

    residual, branch: (tokens, width); gate: (width,), the gate of the style under which `branch` was
    computed; style: (3, width) float32 rows scale, shift, gate, or (3, tokens, width), one for each token
    (then the gate is too). Returns (normed, residual).
    """
    if branch is None or gate is None:
        return ops.ada_rms_norm(residual, style, EPS, scale), residual
    return ops.gated_add_ada_rms_norm(branch, residual, gate, style, EPS, scale)
