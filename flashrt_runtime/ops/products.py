"""Products of e4m3 operands on Hopper's matrix unit, with what follows them in the same kernel; every
operation here has its definition in `reference`.

x: (..., depth) e4m3; weight: (width, depth) e4m3; scales: float32 scalars on the device. Everything only
enqueues work on the current stream. Weights must not be written by the kernel just in front.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .reference import E4M3

ALIGNMENT = 16  # of the widths: a row starts where a tensor copy may
# A plain product may be faster by ours than by the library's where it takes one round over the
# multiprocessors. What is deeper than shared memory holds at once is split over two blocks, and where even
# those go round for long (the prefix's down, 16384) the library is ahead at every number of rows.
SHALLOW_DEPTH, DEEPEST = 9 * 128, 8192
SHALLOW_TILE, DEEP_TILE = (128, 208), (128, 144)
DEEP_SPLITS = 2


def served(x: Tensor, weight: Tensor, halves: int = 1) -> bool:
    """Whether these kernels serve the operands on this GPU: e4m3, contiguous, on Hopper.

    halves: 2 for a weight of gate and up.
    """
    n, depth = weight.shape
    return (
        x.is_cuda
        and x.dtype == weight.dtype == E4M3
        and x.shape[-1] == depth
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.numel() > 0
        and n % (halves * ALIGNMENT) == 0
        and depth % ALIGNMENT == 0
        and x.data_ptr() % ALIGNMENT == weight.data_ptr() % ALIGNMENT == 0
        and native.available()
        and _multiprocessors(x.device) > 0
    )


def plain_served(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `linear` without a scale serves the operands, and perhaps faster than the library does."""
    if dtype != torch.bfloat16 or not _bias_served(bias, weight) or not served(x, weight):
        return False
    width, depth = weight.shape
    (tile_rows, tile_columns), splits = (
        (SHALLOW_TILE, 1) if depth <= SHALLOW_DEPTH else (DEEP_TILE, DEEP_SPLITS)
    )
    tiles = -(-x.numel() // (depth * tile_rows)) * -(-width // tile_columns)
    return depth <= DEEPEST and tiles * splits <= _multiprocessors(x.device)


def gelu_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` with a scale serves the operands."""
    return _bias_served(bias, weight) and served(x, weight)


def linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """`reference.scaled_linear` in bfloat16, or with a scale `reference.linear_gelu`; bias: (width,)
    bfloat16.
    """
    _check("linear", x, weight, 1, x_scale=x_scale, weight_scale=weight_scale, scale=scale)
    if not _bias_served(bias, weight):
        raise ValueError(f"linear: bias must be contiguous ({weight.shape[0]},) bfloat16 on {x.device}")
    width, depth = weight.shape
    dtype = torch.bfloat16 if scale is None else E4M3
    out = torch.empty(*x.shape[:-1], width, dtype=dtype, device=x.device)
    native.launch(
        "linear_product", x.device, x, weight, bias, x_scale, weight_scale, scale, out, x.numel() // depth,
        width, depth,
    )
    return out


def linear_geglu(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, scale: Tensor
) -> Tensor:
    """See `reference.linear_geglu`."""
    _check("linear_geglu", x, weight, 2, x_scale=x_scale, weight_scale=weight_scale, scale=scale)
    width, depth = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty(*x.shape[:-1], width, dtype=E4M3, device=x.device)
    native.launch(
        "geglu_product", x.device, x, weight, x_scale, weight_scale, scale, out, x.numel() // depth, width,
        depth,
    )
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a Hopper GPU; 0 of another one."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return count if native.capability(device) == (9, 0) else 0


def _bias_served(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or (
        bias.dtype == torch.bfloat16
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
        and bias.device == weight.device
        and bias.data_ptr() % ALIGNMENT == 0
    )


def _check(operation: str, x: Tensor, weight: Tensor, halves: int, **scales: Tensor | None) -> None:
    """Refuse what a kernel reading raw pointers would read or write out of bounds."""
    if not served(x, weight, halves) or weight.device != x.device:
        raise ValueError(
            f"{operation}: x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} are "
            f"not served: contiguous e4m3 on a Hopper GPU, widths in multiples of {ALIGNMENT}"
        )
    for name, scale in scales.items():
        if scale is not None and (
            scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != x.device
        ):
            raise ValueError(f"{operation}: {name} must be one float32 on {x.device}, got {scale.dtype}")
