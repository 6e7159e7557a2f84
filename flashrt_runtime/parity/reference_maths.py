"""The equations of SigLIP, Gemma and the flow-matching expert in float64 NumPy, one function per equation.

Written from the papers and the published weights' conventions, to read and to compare with; nothing here
is shared with the torch model it checks. Every array is float64 unless a docstring says otherwise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

RMS_EPS = 1e-6
LAYER_NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
MIN_PERIOD = 4e-3
MAX_PERIOD = 4.0


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + b with W (out, in)."""
    out = x @ weight.T
    return out if bias is None else out + bias


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """(x - mean) / sqrt(var + 1e-6) * w + b over the last axis (arXiv:1607.06450)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    normed: Array = centred / np.sqrt(variance + LAYER_NORM_EPS)
    return normed * weight + bias


def rms_unit(x: Array) -> Array:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis (arXiv:1910.07467, without its gain)."""
    normed: Array = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + RMS_EPS)
    return normed


def rms_norm(x: Array, weight: Array) -> Array:
    """Gemma's RMSNorm: the stored weight is the gain's distance from one."""
    return rms_unit(x) * (1.0 + weight)


def adaptive_rms_norm(x: Array, condition: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """adaRMS (arXiv:2504.16054): gain, offset and residual gate from a condition vector.

    x (n, d), condition (c,), weight (3 d, c), bias (3 d,) in the order scale, shift, gate.
    Returns (rms(x) (1 + scale) + shift, gate).
    """
    scale, shift, gate = np.split(linear(condition, weight, bias), 3)
    return rms_unit(x) * (1.0 + scale) + shift, gate


def gelu_tanh(x: Array) -> Array:
    """GELU by its tanh approximation (arXiv:1606.08415, section 2)."""
    bent: Array = np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1.0 + bent)


def silu(x: Array) -> Array:
    """x sigmoid(x), written so that exp never overflows."""
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis; entries of -inf get weight zero."""
    shifted: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: Array = shifted.sum(axis=-1, keepdims=True)
    return shifted / total


def attention(query: Array, key: Array, value: Array, visible: Mask) -> Array:
    """Scaled dot-product attention with shared key/value heads (arXiv:1706.03762, arXiv:2305.13245).

    query (n, heads, d); key, value (m, kv_heads, d); visible (n, m), true where row n may look at column m.
    Returns (n, heads * d).
    """
    rows, heads, dim = query.shape
    group = heads // key.shape[1]
    out = np.empty_like(query)
    for head in range(heads):
        shared = head // group
        logits = query[:, head] @ key[:, shared].T / np.sqrt(dim)
        out[:, head] = softmax(np.where(visible, logits, -np.inf)) @ value[:, shared]
    return out.reshape(rows, heads * dim)


def rope_angles(positions: Array, head_dim: int, *, bf16: bool = False, fp32: bool = False) -> Array:
    """position * 10000^(-2 i / head_dim), i = 0 .. head_dim/2 - 1: (n, head_dim/2) (arXiv:2104.09864).

    bf16 rounds the frequencies as models do whose buffers were cast to bfloat16 together with the weights;
    fp32 rounds frequencies and angles to float32.
    """
    frequencies = ROPE_BASE ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if bf16:
        frequencies = to_bfloat16(frequencies)
    if fp32:
        frequencies = to_float32(frequencies)
    angles = positions[:, None] * frequencies
    return to_float32(angles) if fp32 else angles


def rope(x: Array, angles: Array) -> Array:
    """Rotate the pairs (i, i + d/2) of every head by angle i. x (n, heads, d), angles (n, d/2)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def timestep_embedding(time: float, width: int) -> Array:
    """sin ‖ cos of 2 pi t / period, periods log-spaced over [4e-3, 4] (arXiv:2410.24164, appendix B)."""
    fraction = np.linspace(0.0, 1.0, width // 2)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = 2.0 * np.pi * time / period
    return np.concatenate([np.sin(angle), np.cos(angle)])


def patches(images: Array, size: int) -> Array:
    """Cut (views, 3, H, W) into (views, H/size * W/size, 3 * size * size), row by row, channel first.

    A strided convolution is a product of these rows with its flattened kernel. Pixels beyond the last whole
    patch are not used, as in a convolution without padding.
    """
    views, channels, height, width = images.shape
    rows, columns = height // size, width // size
    cut = images[:, :, : rows * size, : columns * size].reshape(views, channels, rows, size, columns, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(views, rows * columns, channels * size * size)


def to_float32(x: Array) -> Array:
    """Round to the nearest float32."""
    return x.astype(np.float32).astype(np.float64)


def to_bfloat16(x: Array) -> Array:
    """Round to the nearest bfloat16 (ties to even) by way of float32; finite input only."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return rounded.view(np.float32).astype(np.float64)
