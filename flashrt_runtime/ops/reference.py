"""The operations in plain torch: the definition that every native kernel is tested against.

Normalisations compute in float32 and return the input's dtype, as openpi's JAX model does. Where a `scale`
(float32 scalar) is given, the result is quantised instead: e4m3 of value / scale, as the projection that
reads it wants it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 of x / scale, saturating; NaN stays NaN. scale: float32 scalar."""
    return (x.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def store(value: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Round a result once: to `dtype`, or to e4m3 where a scale is given."""
    return value.to(dtype) if scale is None else quantise(value, scale)


def scaled_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x @ weight^T * (x_scale * weight_scale) + bias of e4m3 operands, accumulated in float32.

    x: (..., k) and weight: (n, k) e4m3; scales: float32 scalars; bias: (n,). Returns (..., n) of `dtype`.
    """
    out = F.linear(x.float(), weight.float()) * (x_scale * weight_scale)
    return (out if bias is None else out + bias.float()).to(dtype)


def weight_only_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ (weight * weight_scale)^T + bias with weight: (n, k) e4m3 and x in 16 or 32 bits, whose dtype
    returns.

    e4m3 values are exact in every dtype of x, so the scale is applied after the product.
    """
    out = F.linear(x, weight.to(x.dtype)).float() * weight_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """Gemma's RMSNorm: x * rsqrt(mean(x^2) + eps) * (1 + weight).

    x: (..., width) floating; weight: (width,). Returns x's shape and dtype. arXiv:1910.07467.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return store(normed * (1.0 + weight.float()), x.dtype, scale)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm.

    x, residual: (..., width), same dtype; weight: (width,). Returns (rms_norm(x + residual), x + residual).
    """
    total = x + residual
    return rms_norm(total, weight, eps, scale), total


def ada_rms_norm(x: Tensor, style: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """RMSNorm whose scale and shift come from the conditioning: norm(x) * (1 + scale) + shift.

    x: (tokens, width); style: (3, width) float32 rows scale, shift, gate (the gate is the next residual's),
    or (3, tokens, width), one for each token.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return store(normed * (1.0 + style[0]) + style[1], x.dtype, scale)


def gated_add_ada_rms_norm(
    x: Tensor, residual: Tensor, gate: Tensor, style: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated residual add, then adaptive RMSNorm.

    x, residual: (tokens, width); gate: of the branch that made x, as a row of its style; style: of this norm.
    Returns (ada_rms_norm(total), total) with total = residual + gate * x.
    """
    total = (residual.float() + gate * x.float()).to(residual.dtype)
    return ada_rms_norm(total, style, eps, scale), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """LayerNorm in float32. x: (..., width); weight, bias: (width,). Returns x's dtype."""
    width = (x.shape[-1],)
    return store(F.layer_norm(x.float(), width, weight.float(), bias.float(), eps), x.dtype, scale)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual add, then LayerNorm. Returns (layer_norm(residual + x), residual + x)."""
    total = residual + x
    return layer_norm(total, weight, bias, eps, scale), total


def gelu(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """GELU, tanh form (arXiv:1606.08415)."""
    return (
        F.gelu(x, approximate="tanh")
        if scale is None
        else quantise(F.gelu(x.float(), approximate="tanh"), scale)
    )


def geglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """gelu(gate) * up for gate_up: (..., 2 * mlp_dim) holding gate, then up (arXiv:2002.05202)."""
    gate, up = (gate_up if scale is None else gate_up.float()).chunk(2, dim=-1)
    return store(gelu(gate) * up, gate_up.dtype, scale)


def linear_gelu(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: Tensor
) -> Tensor:
    """gelu(scaled_linear(...)) as e4m3 of value / scale, rounded once."""
    return gelu(scaled_linear(x, weight, x_scale, weight_scale, bias, torch.float32), scale)


def linear_geglu(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: Tensor
) -> Tensor:
    """geglu(scaled_linear(...)) as e4m3 of value / scale, rounded once. weight: (2 * mlp_dim, k) e4m3."""
    return geglu(scaled_linear(x, weight, x_scale, weight_scale, bias, torch.float32), scale)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on half-split pairs, in float32 (arXiv:2104.09864).

    x: (tokens, heads, head_dim); cos, sin: (tokens, head_dim / 2) float32. Returns x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def split_qkv_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: slice | Tensor,
) -> Tensor:
    """Split a fused projection, rotate q and k, write k and v into `slots` of the cache.

    qkv: (tokens, (num_heads + 2 * kv_heads) * head_dim); k_cache, v_cache: (capacity, kv_heads, head_dim),
    written in place; slots: a slice of `tokens` slots, or (tokens,) int64. Returns q: (tokens, num_heads,
    head_dim).
    """
    kv_heads, head_dim = k_cache.shape[1:]
    heads = qkv.view(-1, num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    k_cache[slots] = apply_rope(k, cos, sin)
    v_cache[slots] = v
    return apply_rope(q, cos, sin)


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
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
    mask = None if key_mask is None else key_mask.view(1, 1, 1, -1)
    if key_mask is not None:  # a slot that is not attended may hold what a broken chunk left: 0 * NaN is NaN
        k, v = (torch.where(key_mask.view(-1, 1, 1), each, torch.zeros_like(each[:1])) for each in (k, v))
    out = F.scaled_dot_product_attention(
        folded, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), attn_mask=mask
    )
    out = out.view(kv_heads, queries, group, head_dim).permute(1, 0, 2, 3)
    return store(out.reshape(queries, heads * head_dim), q.dtype, scale)


def vision_attention(qkv: Tensor, num_heads: int, scale: Tensor | None = None) -> Tensor:
    """Full attention within each view.

    qkv: (views, tokens, 3 * width) holding q, k, v. Returns (views, tokens, width).
    """
    views, tokens, triple = qkv.shape
    width = triple // 3
    q, k, v = qkv.view(views, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return store(out.transpose(1, 2).reshape(views, tokens, width), qkv.dtype, scale)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into flat patches in the order of a (channels, patch, patch) convolution kernel.

    images: (views, 3, size, size). Returns (views, (size / patch)^2, 3 * patch * patch).
    """
    return F.unfold(images, kernel_size=patch, stride=patch).transpose(1, 2)


def embed_patches(
    patches: Tensor, weight: Tensor, bias: Tensor, position: Tensor, dtype: torch.dtype
) -> Tensor:
    """Projection of patches in [-1, 1] and their positions' embedding, rounded to `dtype` once.

    patches: (views, tokens, depth); weight: (width, depth); bias: (width,); position: (tokens, width); all
    float32. Returns (views, tokens, width).
    """
    return (F.linear(patches, weight, bias) + position).to(dtype)


def guide_velocity(
    velocity: Tensor, x: Tensor, target: Tensor, weight: Tensor, gain: Tensor, time: float
) -> Tensor:
    """The velocity at `time`, corrected towards a target at t = 0 (arXiv:2506.07339 with the identity for the
    denoiser's Jacobian): v - gain * weight * (target - (x - time * v)).

    velocity, x, target: (rows, action_dim) float32; weight: (rows,) float32; gain: float32 scalar. Rows of
    weight zero stay as they are, bit for bit, whatever x and the target hold.
    """
    rows = weight.unsqueeze(-1)
    error = (target - (x - time * velocity)) * rows
    return torch.where(rows != 0, velocity - gain * error, velocity)


def euler_step(x: Tensor, velocity: Tensor, dt: float) -> Tensor:
    """x + dt * velocity, in place in x's float32."""
    return x.add_(velocity, alpha=dt)


def embed_tokens(table: Tensor, ids: Tensor, factor: float) -> Tensor:
    """factor * table[ids]: (tokens, width) of the table's dtype, rounded once."""
    return F.embedding(ids, table) * factor


def assign(target: Tensor, source: Tensor) -> Tensor:
    """target = source, bit for bit, as a kernel and not a copy: a graph of nothing but kernels in a row is
    launched in a fraction of the time.
    """
    return torch.mul(source, 1, out=target)
