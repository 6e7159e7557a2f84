"""The vision tower's and the prefix's fused kernels; every operation here has its definition in `reference`.

Inputs are CUDA tensors, contiguous, of float32, float16 or bfloat16; a `scale` (float32 scalar on the
device) asks for e4m3 output. Everything only enqueues work on the current stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import levels, native
from .native import DTYPE_CODES
from .reference import E4M3

IDENTITY, GELU, GEGLU = range(3)
RMS, LAYER, ADA = range(3)
ATTENTION_DIM = 256
VISION_DIM, VISION_TOKENS = 72, 256


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """RMSNorm, or LayerNorm with `bias`, of x or of x + residual. Returns (normed, x or x + residual)."""
    _check("norm", x, weight=weight, bias=bias, scale=scale)
    width = x.shape[-1]
    if weight.shape != (width,) or (bias is not None and bias.shape != (width,)):
        raise ValueError(f"norm: weight and bias must be ({width},), got {tuple(weight.shape)}")
    return _row_norm(RMS if bias is None else LAYER, x, residual, None, weight, bias, 0, eps, scale)


def ada_norm(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, style: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Adaptive RMSNorm of x or of residual + gate * x. Returns (normed, x or residual + gate * x).

    style: (3, width) or (3, *x.shape) float32 rows scale, shift, gate; gate: a row of such a style, given
    with the residual. One style for all rows is read ahead of the kernel in front, which must not have
    written it. Raises ValueError for anything else.
    """
    factor, shift = style[0], style[1]
    _check("ada_norm", x, scale=scale, style=factor, shift=shift, gate=gate)
    rows = factor.shape
    fits = len(style) == 3 and rows in (x.shape[-1:], x.shape) and (gate is None or gate.shape == rows)
    if not fits or (gate is None) != (residual is None):
        raise ValueError(
            f"ada_norm: for x {tuple(x.shape)} expected a style of 3 rows, ({x.shape[-1]},) or as x, and "
            f"with the residual a gate like a row; got {tuple(style.shape)} and "
            f"{None if gate is None else tuple(gate.shape)}"
        )
    stride = x.shape[-1] if rows == x.shape and x.ndim > 1 else 0
    return _row_norm(ADA, x, residual, gate, factor, shift, stride, eps, scale)


def _row_norm(
    kind: int,
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    eps: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"norm: residual must be {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)}")
    residual = None if residual is None else residual.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype if scale is None else E4M3, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    native.launch(
        "row_norm", x.device, kind, x, residual, gate, weight, bias, scale, out,
        None if residual is None else total, stride, x.numel() // width, width, eps, DTYPE_CODES[x.dtype],
        False,
    )
    return out, total


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """See `reference.quantise`."""
    return _activation(IDENTITY, x, x.shape[-1], scale)


def gelu(x: Tensor, scale: Tensor | None) -> Tensor:
    """See `reference.gelu`."""
    return _activation(GELU, x, x.shape[-1], scale)


def geglu(gate_up: Tensor, scale: Tensor | None) -> Tensor:
    """See `reference.geglu`."""
    return _activation(GEGLU, gate_up, gate_up.shape[-1] // 2, scale)


def _activation(kind: int, x: Tensor, width: int, scale: Tensor | None) -> Tensor:
    x = x.contiguous()
    _check("activation", x, scale=scale)
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype if scale is None else E4M3, device=x.device)
    rows = out.numel() // width
    native.launch("activation", x.device, kind, x, out, scale, rows, width, DTYPE_CODES[x.dtype])
    return out


def split_qkv_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: slice | Tensor,
) -> Tensor:
    """See `reference.split_qkv_rope`."""
    _check("split_qkv_rope", qkv, cos=cos, sin=sin)
    capacity, kv_heads, head_dim = k_cache.shape
    tokens = qkv.shape[0]
    device_slots = slots if isinstance(slots, Tensor) else None
    start = slots.start if isinstance(slots, slice) else 0
    fits = qkv.shape[1] == (num_heads + 2 * kv_heads) * head_dim and cos.shape == (tokens, head_dim // 2)
    same = k_cache.dtype == v_cache.dtype == qkv.dtype and k_cache.is_contiguous() and v_cache.is_contiguous()
    if not fits or not same or (device_slots is None and start + tokens > capacity):
        raise ValueError(
            f"split_qkv_rope: qkv {tuple(qkv.shape)} {qkv.dtype}, tables {tuple(cos.shape)} and cache "
            f"{tuple(k_cache.shape)} {k_cache.dtype} do not fit together at slot {start}"
        )
    if device_slots is not None and (device_slots.dtype != torch.int64 or device_slots.shape != (tokens,)):
        raise ValueError(f"split_qkv_rope: slots must be ({tokens},) int64, got {tuple(device_slots.shape)}")
    q = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    native.launch(
        "qkv_rope", qkv.device, qkv, cos, sin, device_slots, start, q, k_cache, v_cache, capacity, tokens,
        num_heads, kv_heads, head_dim, DTYPE_CODES[qkv.dtype],
    )
    return q


def attention_supported(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` serves these shapes on this GPU: Gemma's heads in bfloat16, on Hopper."""
    return (
        q.dtype == k.dtype == torch.bfloat16
        and q.shape[2] == ATTENTION_DIM
        and k.shape[1] == 1
        and native.capability(q.device) == (9, 0)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: Tensor | None) -> Tensor:
    """See `reference.attention`, where the first `valid` keys (int32 scalar on the device) are unmasked."""
    queries, heads, head_dim = q.shape
    q = q.contiguous()
    _check_attention(q, k, v)
    out = torch.empty(queries, heads * head_dim, dtype=q.dtype if scale is None else E4M3, device=q.device)
    native.launch("prefix_attention", q.device, q, k, v, valid, scale, out, queries * heads, k.shape[0])
    return out


def vision_attention_supported(qkv: Tensor, num_heads: int) -> bool:
    """Whether `vision_attention` serves these shapes on this GPU: SigLIP's in bfloat16, on Hopper."""
    return (
        qkv.dtype == torch.bfloat16
        and qkv.shape[1:] == (VISION_TOKENS, 3 * num_heads * VISION_DIM)
        and native.capability(qkv.device) == (9, 0)
    )


def vision_attention(qkv: Tensor, num_heads: int, scale: Tensor | None) -> Tensor:
    """See `reference.vision_attention`; qkv: (views, 256, 3 * num_heads * 72) bfloat16."""
    qkv = qkv.contiguous()
    _check("vision_attention", qkv, scale=scale)
    if not vision_attention_supported(qkv, num_heads):
        raise ValueError(
            f"vision_attention: {num_heads} heads of {tuple(qkv.shape)} {qkv.dtype} are not served"
        )
    views, tokens, triple = qkv.shape
    dtype = qkv.dtype if scale is None else E4M3
    out = torch.empty(views, tokens, triple // 3, dtype=dtype, device=qkv.device)
    native.launch("vision_attention", qkv.device, qkv, scale, out, views, num_heads)
    return out


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or k.shape[1:] != (1, q.shape[2]) or q.shape[2] != ATTENTION_DIM:
        raise ValueError(
            f"attention: expected q (queries, heads, {ATTENTION_DIM}) and k, v (keys, 1, {ATTENTION_DIM}), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != torch.bfloat16 or tensor.device != q.device or not tensor.is_contiguous():
            raise ValueError(
                f"attention: {name} must be contiguous bfloat16 on {q.device}, got {tensor.dtype}"
            )


def camera_patches(
    frames: Tensor, views: Tensor, size: int, patch: int, antialias: bool, as_levels: bool = False
) -> Tensor:
    """Resize with padding, scale to [-1, 1] and cut into patches; `processing.images` and
    `reference.patchify`.

    frames: uint8 bytes on the device; views: (count, 3) int64 on the device, rows (byte offset, height,
    width) of RGB images. Returns (count, (size / patch)^2, 3 * patch^2) float32; as_levels, which needs
    `antialias`: float16 as `levels.embed_levels` takes it.
    """
    if frames.dtype != torch.uint8 or views.dtype != torch.int64 or views.ndim != 2 or views.shape[1] != 3:
        raise ValueError(
            f"camera_patches: expected uint8 bytes and (count, 3) int64, got {tuple(views.shape)}"
        )
    count, depth = views.shape[0], 3 * patch * patch
    dtype = torch.float16 if as_levels else torch.float32
    width = levels.padded(depth) if as_levels else depth
    out = torch.empty(count, (size // patch) ** 2, width, dtype=dtype, device=frames.device)
    native.launch(
        "camera_patches", frames.device, frames, views, out, count, size, patch, antialias, as_levels
    )
    return out


def embed_tokens(table: Tensor, ids: Tensor, factor: float, out: Tensor) -> Tensor:
    """out = factor * table[ids], in place; out: (tokens, width) as the table; ids: (tokens,) int64."""
    if out.shape != (ids.shape[0], table.shape[1]) or out.dtype != table.dtype or not out.is_contiguous():
        raise ValueError(f"embed_tokens: out must be {(ids.shape[0], table.shape[1])} {table.dtype}")
    if ids.dtype != torch.int64 or not table.is_contiguous():
        raise ValueError("embed_tokens: expected int64 ids and a contiguous table")
    native.launch(
        "embed_tokens", table.device, table, ids, out, ids.shape[0], table.shape[0], table.shape[1], factor,
        DTYPE_CODES[table.dtype],
    )
    return out


def _check(operation: str, x: Tensor, **float32: Tensor | None) -> None:
    """Refuse what a kernel reading raw pointers would read or write out of bounds."""
    if not x.is_cuda or x.dtype not in DTYPE_CODES or not x.is_contiguous() or x.ndim < 1:
        layout = "" if x.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{operation}: expected a contiguous CUDA tensor of float32, float16 or bfloat16; got "
            f"{tuple(x.shape)} {x.dtype} on {x.device}{layout}"
        )
    for name, tensor in float32.items():
        if tensor is not None and (
            tensor.dtype != torch.float32 or tensor.device != x.device or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{operation}: {name} must be contiguous float32 on {x.device}, got {tensor.dtype}"
            )
