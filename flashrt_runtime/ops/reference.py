"""The operations in plain torch: the definition that every native kernel is tested against.

Normalisations compute in float32 and return the input's dtype, as openpi's JAX model does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's RMSNorm: x * rsqrt(mean(x^2) + eps) * (1 + weight).

    x: (..., width) floating; weight: (width,). Returns x's shape and dtype. arXiv:1910.07467.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm.

    x, residual: (..., width), same dtype; weight: (width,). Returns (rms_norm(x + residual), x + residual).
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def ada_rms_norm(x: Tensor, style: Tensor, eps: float) -> Tensor:
    """RMSNorm whose scale and shift come from the conditioning: norm(x) * (1 + scale) + shift.

    x: (..., width); style: (3, width) float32 rows scale, shift, gate (the gate is the next residual's).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + style[0]) + style[1]).to(x.dtype)


def gated_add_ada_rms_norm(
    x: Tensor, residual: Tensor, gate: Tensor, style: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gated residual add, then adaptive RMSNorm.

    x, residual: (..., width); gate: (width,) of the branch that made x; style: (3, width) of this norm.
    Returns (ada_rms_norm(total), total) with total = residual + gate * x.
    """
    total = (residual.float() + gate * x.float()).to(residual.dtype)
    return ada_rms_norm(total, style, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm in float32. x: (..., width); weight, bias: (width,). Returns x's dtype."""
    width = (x.shape[-1],)
    return F.layer_norm(x.float(), width, weight.float(), bias.float(), eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up for gate_up: (..., 2 * mlp_dim) holding gate, then up (arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate) * up


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on half-split pairs, in float32 (arXiv:2104.09864).

    x: (tokens, heads, head_dim); cos, sin: (tokens, head_dim / 2) float32. Returns x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def split_qkv_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, k_out: Tensor, v_out: Tensor
) -> Tensor:
    """Split a fused projection, rotate q and k, write k and v into the cache.

    qkv: (tokens, (num_heads + 2 * kv_heads) * head_dim); k_out, v_out: (tokens, kv_heads, head_dim),
    written in place. Returns q: (tokens, num_heads, head_dim).
    """
    tokens, kv_heads, head_dim = k_out.shape
    heads = qkv.view(tokens, num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    k_out.copy_(apply_rope(k, cos, sin))
    v_out.copy_(v)
    return apply_rope(q, cos, sin)


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Softmax attention of every query over all unmasked keys; scale 1/sqrt(head_dim).

    q: (queries, heads, head_dim); k, v: (keys, kv_heads, head_dim); key_mask: (keys,) bool, True = attend.
    Query heads that share a kv head are folded into one long query, so K and V are never repeated.
    Returns (queries, heads * head_dim).
    """
    queries, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    folded = q.view(queries, kv_heads, group, head_dim).permute(1, 0, 2, 3)
    folded = folded.reshape(1, kv_heads, queries * group, head_dim)
    out = F.scaled_dot_product_attention(
        folded, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), attn_mask=key_mask
    )
    out = out.view(kv_heads, queries, group, head_dim).permute(1, 0, 2, 3)
    return out.reshape(queries, heads * head_dim)


def vision_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Full attention within each view.

    qkv: (views, tokens, 3 * width) holding q, k, v. Returns (views, tokens, width).
    """
    views, tokens, triple = qkv.shape
    width = triple // 3
    q, k, v = qkv.view(views, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(views, tokens, width)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into flat patches in the order of a (channels, patch, patch) convolution kernel.

    images: (views, 3, size, size). Returns (views, (size / patch)^2, 3 * patch * patch).
    """
    return F.unfold(images, kernel_size=patch, stride=patch).transpose(1, 2)


def euler_step(x: Tensor, velocity: Tensor, dt: float) -> Tensor:
    """x + dt * velocity, in place in x's float32."""
    return x.add_(velocity, alpha=dt)
