"""Operations with two implementations: torch (`reference`, any device) and CUDA (`native`).

Layers call this module. Each operation takes the native kernel when the tensors are on a GPU that has it,
and the torch definition otherwise; the two agree by test, so the choice never changes what is computed.
"""

from __future__ import annotations

from torch import Tensor

from . import native, reference
from .reference import (
    ada_rms_norm,
    apply_rope,
    attention,
    euler_step,
    gated_add_ada_rms_norm,
    geglu,
    gelu,
    layer_norm,
    patchify,
    rms_norm,
    split_qkv_rope,
    vision_attention,
)

__all__ = [
    "ada_rms_norm",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "euler_step",
    "gated_add_ada_rms_norm",
    "geglu",
    "gelu",
    "layer_norm",
    "patchify",
    "rms_norm",
    "split_qkv_rope",
    "vision_attention",
]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm; see `reference.add_rms_norm`."""
    if x.is_cuda and native.available():
        return native.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)
