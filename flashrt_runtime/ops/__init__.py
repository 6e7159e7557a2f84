"""Operations with two implementations: torch (`reference`, any device) and CUDA (`native`, `prefix`).

Layers call this module. Each operation takes the native kernel when the tensors are on a GPU that has it,
and the torch definition otherwise; the two agree by test, to the rounding of the dtype. Where a library's
kernel may be faster at some shapes, `variants` has what was measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import guide, levels, native, prefix, products, reference, variants
from .levels import LevelWeights, embed_levels
from .reference import (
    E4M3,
    E4M3_MAX,
    apply_rope,
    assign,
    embed_patches,
    euler_step,
    patchify,
    weight_only_linear,
)
from .unmasked import Unmasked

__all__ = [
    "E4M3",
    "E4M3_MAX",
    "LevelWeights",
    "Unmasked",
    "ada_rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rope",
    "assign",
    "attention",
    "embed_levels",
    "embed_patches",
    "embed_tokens",
    "euler_step",
    "gated_add_ada_rms_norm",
    "geglu",
    "gelu",
    "guide_velocity",
    "layer_norm",
    "levels_served",
    "linear_geglu",
    "linear_gelu",
    "patchify",
    "quantise",
    "rms_norm",
    "scaled_linear",
    "split_qkv_rope",
    "vision_attention",
    "weight_only_linear",
]

FP8_CAPABILITY = (8, 9)
SCALE_ALIGNMENT = 16


def _native(x: Tensor) -> bool:
    return x.is_cuda and native.available()


def _named(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"


def _one_of(
    served: bool,
    device: torch.device,
    operation: str,
    own: Callable[[], Tensor],
    library: Callable[[], Tensor],
) -> Tensor:
    """By our kernel where it serves and was not measured to be the slower one, else by the library's."""
    return variants.of(device).run(operation, {"own": own, "library": library}) if served else library()


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 of x / scale; see `reference.quantise`."""
    return prefix.quantise(x, scale) if _native(x) else reference.quantise(x, scale)


def aligned(scale: Tensor) -> Tensor:
    """The scalar on a 16-byte address, as cuBLASLt wants its scales: itself, or a copy of what it holds now.

    Columns of a table that a fused kernel reads lie between such addresses. A captured graph copies anew at
    each replay, so what calibration writes arrives.
    """
    return scale if scale.data_ptr() % SCALE_ALIGNMENT == 0 else scale.clone()


def _library_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scaled_linear` by the library, which takes sizes in multiples of 16, or by its definition."""
    n, k = weight.shape
    capable = x.is_cuda and torch.cuda.get_device_capability(x.device) >= FP8_CAPABILITY
    if not capable or n % 16 != 0 or k % 16 != 0:
        return reference.scaled_linear(x, weight, x_scale, weight_scale, bias, dtype)
    rows = x.reshape(-1, k)
    scales = aligned(x_scale), aligned(weight_scale)
    out = torch._scaled_mm(rows, weight.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    return out.view(*x.shape[:-1], n)


def scaled_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Product of e4m3 operands; see `reference.scaled_linear`."""

    def own() -> Tensor:
        return products.linear(x, weight, x_scale, weight_scale, bias, None)

    def library() -> Tensor:
        return _library_linear(x, weight, x_scale, weight_scale, bias, dtype)

    served = products.plain_served(x, weight, bias, dtype)
    return _one_of(served, x.device, f"linear {_named(x)} by {_named(weight)}", own, library)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """RMSNorm; see `reference.rms_norm`."""
    if _native(x):
        return prefix.norm(x, None, weight, None, eps, scale)[0]
    return reference.rms_norm(x, weight, eps, scale)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm; see `reference.add_rms_norm`."""
    if _native(x):
        return prefix.norm(x, residual, weight, None, eps, scale)
    return reference.add_rms_norm(x, residual, weight, eps, scale)


def ada_rms_norm(x: Tensor, style: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """Adaptive RMSNorm; see `reference.ada_rms_norm`."""
    if _native(x):
        return prefix.ada_norm(x, None, None, style, eps, scale)[0]
    return reference.ada_rms_norm(x, style, eps, scale)


def gated_add_ada_rms_norm(
    x: Tensor, residual: Tensor, gate: Tensor, style: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated residual add, then adaptive RMSNorm; see `reference.gated_add_ada_rms_norm`."""
    if _native(x):
        return prefix.ada_norm(x, residual, gate, style, eps, scale)
    return reference.gated_add_ada_rms_norm(x, residual, gate, style, eps, scale)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """LayerNorm; see `reference.layer_norm`."""
    if _native(x):
        return prefix.norm(x, None, weight, bias, eps, scale)[0]
    return reference.layer_norm(x, weight, bias, eps, scale)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual add, then LayerNorm; see `reference.add_layer_norm`."""
    if _native(x):
        return prefix.norm(x, residual, weight, bias, eps, scale)
    return reference.add_layer_norm(x, residual, weight, bias, eps, scale)


def gelu(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """GELU; see `reference.gelu`."""
    return prefix.gelu(x, scale) if _native(x) else reference.gelu(x, scale)


def geglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """gelu(gate) * up; see `reference.geglu`."""
    return prefix.geglu(gate_up, scale) if _native(gate_up) else reference.geglu(gate_up, scale)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`gelu` of a product of e4m3 operands; see `reference.linear_gelu`.

    In two kernels the product is rounded to `dtype` between them, in one it is not.
    """

    def own() -> Tensor:
        return products.linear(x, weight, x_scale, weight_scale, bias, scale)

    def library() -> Tensor:
        return gelu(_library_linear(x, weight, x_scale, weight_scale, bias, dtype), scale)

    served = products.gelu_served(x, weight, bias)
    return _one_of(served, x.device, f"linear_gelu {_named(x)} by {_named(weight)}", own, library)


def linear_geglu(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`geglu` of a product of e4m3 operands; see `reference.linear_geglu`. Rounded as `linear_gelu`."""

    def own() -> Tensor:
        return products.linear_geglu(x, weight, x_scale, weight_scale, scale)

    def library() -> Tensor:
        return geglu(_library_linear(x, weight, x_scale, weight_scale, bias, dtype), scale)

    served = bias is None and products.served(x, weight, halves=2)
    return _one_of(served, x.device, f"linear_geglu {_named(x)} by {_named(weight)}", own, library)


levels_served = levels.served


def split_qkv_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: slice | Tensor,
) -> Tensor:
    """Split, rotate, write the cache; see `reference.split_qkv_rope`."""
    if _native(qkv):
        return prefix.split_qkv_rope(qkv, cos, sin, num_heads, k_cache, v_cache, slots)
    return reference.split_qkv_rope(qkv, cos, sin, num_heads, k_cache, v_cache, slots)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unmasked: Unmasked | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Attention of every query over all unmasked keys, by default all; see `reference.attention`.

    Our kernel serves Gemma's heads on Hopper; elsewhere the library's variable-length kernel, with no bias to
    read, takes half the masked one's time.
    """

    def own() -> Tensor:
        return prefix.attention(q, k, v, None if unmasked is None else unmasked.count, scale)

    def library() -> Tensor:
        if unmasked is None or not q.is_cuda or q.dtype == torch.float32:
            out = reference.attention(q, k, v, None if unmasked is None else unmasked.mask)
        else:
            limits = q.shape[0], k.shape[0]
            flash = torch.ops.aten._flash_attention_forward
            out = flash(q, k, v, *unmasked.lengths, *limits, 0.0, False, False)[0].flatten(1)
        return out if scale is None else quantise(out, scale)

    served = _native(q) and prefix.attention_supported(q, k)
    operation = f"attention {_named(q)} keys {k.shape[0]} {'e4m3' if scale is not None else ''}"
    return _one_of(served, q.device, operation, own, library)


def vision_attention(qkv: Tensor, num_heads: int, scale: Tensor | None = None) -> Tensor:
    """Attention within each view; see `reference.vision_attention`."""

    def own() -> Tensor:
        return prefix.vision_attention(qkv, num_heads, scale)

    def library() -> Tensor:
        out = reference.vision_attention(qkv, num_heads)
        return out if scale is None else quantise(out, scale)

    served = _native(qkv) and prefix.vision_attention_supported(qkv, num_heads)
    operation = f"vision_attention {_named(qkv)} {'e4m3' if scale is not None else ''}"
    return _one_of(served, qkv.device, operation, own, library)


def guide_velocity(
    velocity: Tensor, x: Tensor, target: Tensor, weight: Tensor, gain: Tensor, time: float
) -> Tensor:
    """The velocity, corrected towards a target; see `reference.guide_velocity`."""
    if _native(velocity):
        return guide.guide_velocity(velocity, x, target, weight, gain, time)
    return reference.guide_velocity(velocity, x, target, weight, gain, time)


def embed_tokens(table: Tensor, ids: Tensor, factor: float, out: Tensor) -> Tensor:
    """out = factor * table[ids], in place; see `prefix.embed_tokens`."""
    if _native(table):
        return prefix.embed_tokens(table, ids, factor, out)
    return out.copy_(reference.embed_tokens(table, ids, factor))
