"""The expert's fused kernels: products of few rows with their norm, rotary embedding, GeGLU or residual.

Weights are packed once at load; native_kernels/skinny_gemm.cu says why so. But for `attention_scratch`
everything here enqueues work on the current stream and neither allocates nor synchronises.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from . import native
from .prefix import ADA, RMS

MAX_ROWS = 64
MAX_NORM_ROWS = 16  # a product that norms its rows itself
TILE_FEATURES = 8
BLOCK_BYTES = 64
E4M3_MAX = 448.0


class Epilogue(IntEnum):
    """What happens to the product; the values are those of native_kernels/expert.h."""

    STORE = 0
    RESIDUAL = 1
    GEGLU = 2
    ROPE = 3


@dataclass(frozen=True)
class PackedLinear:
    """A weight (n, k) in tiles of 8 features x 64 bytes, with its scales.

    data: (n * k,) bf16 or e4m3; weight_scale, input_scale: float32 scalars on the device, e4m3 only.
    """

    data: Tensor
    n: int
    k: int
    weight_scale: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def fp8(self) -> bool:
        """Whether the weights are e4m3."""
        return self.data.dtype == torch.float8_e4m3fn


def pack_tiles(weight: Tensor, order: Tensor | None = None) -> Tensor:
    """Weights (n, k) of 1- or 2-byte elements in the kernels' order; `order` permutes the features first."""
    if order is not None:
        weight = weight.view(torch.uint8 if weight.element_size() == 1 else torch.int16)[order].view(
            weight.dtype
        )
    n, k = weight.shape
    block = BLOCK_BYTES // weight.element_size()
    if n % TILE_FEATURES or k % block:
        raise ValueError(f"expected features in multiples of {TILE_FEATURES} and k of {block}, got {(n, k)}")
    raw = weight.view(torch.uint8 if weight.element_size() == 1 else torch.int16)
    tiles = raw.view(n // TILE_FEATURES, TILE_FEATURES, k // block, block).permute(0, 2, 1, 3)
    return tiles.reshape(-1).view(weight.dtype)


def pair_order(first: Tensor, second: Tensor) -> Tensor:
    """Feature order in which each tile of 8 from `first` is followed by its partner tile from `second`."""
    return torch.stack((first.view(-1, TILE_FEATURES), second.view(-1, TILE_FEATURES)), dim=1).reshape(-1)


def geglu_order(mlp_dim: int) -> Tensor:
    """Order of a fused (gate, up) projection of 2 * mlp_dim features: gate tile, up tile, ..."""
    return pair_order(torch.arange(mlp_dim), torch.arange(mlp_dim, 2 * mlp_dim))


def rope_order(heads: int, head_dim: int) -> Tensor:
    """Order of a fused (q, k, v) projection of `heads` heads in all: first half tile, second half tile,
    ..."""
    features = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return pair_order(features[:, 0].reshape(-1), features[:, 1].reshape(-1))


def skinny_gemm(
    x: Tensor,
    linear: PackedLinear,
    epilogue: Epilogue,
    out: Tensor,
    *,
    norm: tuple[Tensor, Tensor | None] | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    prefix_length: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    heads: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
) -> Tensor:
    """out = epilogue(norm(x) @ weight^T) for x: (rows <= 64, k); see native_kernels/expert.h for every field.

    norm: (scale, shift) float32 (k,), applied as x_hat * (1 + scale) + shift on up to 16 bf16 rows; without
    it x has the weights' type, or (GEGLU and ROPE) is fp16 beside e4m3 ones, as `norm_rows` leaves it.
    Returns `out`.
    """
    native.launch(
        "skinny_gemm",
        x.device,
        linear.fp8,
        linear.fp8 and x.dtype == torch.float16,
        int(epilogue),
        x.shape[0],
        linear.n,
        linear.k,
        x,
        linear.data,
        norm[0] if norm else None,
        norm[1] if norm else None,
        eps,
        linear.input_scale,
        linear.weight_scale,
        out_scale,
        bias,
        gate,
        out,
        rope[0] if rope else None,
        rope[1] if rope else None,
        prefix_length,
        k_cache,
        v_cache,
        heads,
        kv_heads,
        head_dim,
    )
    return out


def norm_rows(x: Tensor, norm: tuple[Tensor, Tensor | None], eps: float, out: Tensor) -> Tensor:
    """x_hat * (1 + scale) + shift of x: (rows, width) bf16, for products of more rows than they norm.

    norm: (scale, shift) float32 (width,); out: bf16, or the same rounded to bf16 as fp16. Returns `out`.
    """
    if x.dtype != torch.bfloat16 or out.dtype not in (torch.bfloat16, torch.float16) or out.shape != x.shape:
        raise ValueError(f"norm_rows: expected bf16 and the same in bf16 or fp16, got {x.dtype}, {out.dtype}")
    scale, shift = norm
    native.launch(
        "row_norm",
        x.device,
        RMS if shift is None else ADA,
        x,
        None,
        None,
        scale,
        shift,
        None,
        out,
        None,
        0,
        x.shape[0],
        x.shape[1],
        eps,
        native.DTYPE_CODES[x.dtype],
        out.dtype == torch.float16,
    )
    return out


def expert_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_length: Tensor,
    out: Tensor,
    out_scale: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Attention of q: (rows, heads, 256) bf16 over cache slots [0, prefix_length + rows).

    k_cache, v_cache: (slots, kv_heads, 256) bf16; prefix_length: int32 scalar on the device;
    out: (rows, heads * 256) bf16, or e4m3 with `out_scale`. scratch: None, in clusters of blocks, for compute
    capability 9.0 and enough shared memory; or `attention_scratch`, without them, one kv head. Returns `out`.
    """
    native.launch(
        "expert_attention",
        q.device,
        out.dtype == torch.float8_e4m3fn,
        q.shape[0],
        q.shape[1],
        k_cache.shape[1],
        q,
        k_cache,
        v_cache,
        prefix_length,
        k_cache.shape[0],
        out_scale,
        out,
        scratch,
    )
    return out


def attention_scratch(rows: int, heads: int, slots: int, device: torch.device) -> Tensor:
    """For `expert_attention` without clusters, of up to so many rows and slots, one call behind the other."""
    size = native.load().expert_attention_bytes(rows, heads, slots)
    return torch.zeros(size, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class StepGuide:
    """What `action_step` corrects a velocity by, as `reference.guide_velocity` does; all on the device.

    target: (rows, action_dim); weight: (rows,); gain: scalar; float32. time: of the flow.
    """

    target: Tensor
    weight: Tensor
    gain: Tensor
    time: float


def action_step(
    x: Tensor,
    following: Tensor,
    *,
    hidden: Tensor | None,
    norm: tuple[Tensor, Tensor | None] | None,
    eps: float,
    out: tuple[Tensor, Tensor],
    dt: float,
    project: tuple[Tensor, Tensor] | None,
    silu: bool = False,
    guide: StepGuide | None = None,
) -> None:
    """x += dt * (norm(hidden) @ out), then following = x @ project; either half may be left out.

    x: (rows, action_dim) float32, in place; following, hidden: (rows, width) bf16; out, project: (weight,
    bias) float32 of shapes (action_dim, width) and (width, action_dim); silu is applied to `following` (pi0);
    guide: corrects the velocity first.
    """
    native.launch(
        "action_step",
        x.device,
        x.shape[0],
        following.shape[1],
        x.shape[1],
        hidden,
        norm[0] if norm else None,
        norm[1] if norm else None,
        eps,
        out[0],
        out[1],
        dt,
        None if guide is None else guide.gain,
        None if guide is None else guide.weight,
        None if guide is None else guide.target,
        0.0 if guide is None else guide.time,
        x,
        project[0] if project else None,
        project[1] if project else None,
        silu,
        following,
    )
