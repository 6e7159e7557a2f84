"""All denoise steps of the action expert as one kernel; see native_kernels/expert_steps.cu."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .expert import geglu_order, pack_tiles, rope_order

CHUNK_BYTES = 16384
# kExpertBarrierWords and kExpertMaxRows of native_kernels/expert.h
BARRIER_WORDS = 2
MAX_ROWS = 64
WIDE_ROWS = 32  # with e4m3 weights, the most whose normed rows are 16 bits on Hopper
BLOCKS = 128  # kBlocks of native_kernels/expert_stream.cuh: all of them on the GPU at once
TILE_BLOCK_BYTES = 512
PRODUCTS = ("qkv", "out", "gate_up", "down")
WIDTH, MLP, HEADS, HEAD_DIM = 1024, 4096, 8, 256
# tiles of 8 features that share an epilogue
UNIT_TILES = {"qkv": 2, "out": 1, "gate_up": 2, "down": 1}
# e4m3: of as many tiles one half of k, so many blocks of 64, behind the other
HALVED = {"qkv": (2, 8), "gate_up": (4, 8)}
SHAPES = {"qkv": (2560, WIDTH), "out": (WIDTH, 2048), "gate_up": (2 * MLP, WIDTH), "down": (WIDTH, MLP)}


def pack_chunks(weight: Tensor, product: str) -> Tensor:
    """Weights (n, k) of one product, bf16 or e4m3, as the kernel streams them: (n * k,)."""
    if tuple(weight.shape) != SHAPES[product]:
        raise ValueError(f"{product}: expected weights of shape {SHAPES[product]}, got {tuple(weight.shape)}")
    orders = {"qkv": rope_order(HEADS + 2, HEAD_DIM), "gate_up": geglu_order(MLP)}
    order = orders[product].to(weight.device) if product in orders else None
    fp8 = weight.dtype == torch.float8_e4m3fn
    tiles = UNIT_TILES[product]
    tiles, blocks = HALVED.get(product, (tiles, 0)) if fp8 else (tiles, 0)
    blocks = blocks or CHUNK_BYTES // TILE_BLOCK_BYTES // tiles
    k_blocks = weight.shape[1] * weight.element_size() // 64
    raw = pack_tiles(weight, order).view(torch.uint8)
    raw = raw.view(-1, tiles, k_blocks // blocks, blocks, TILE_BLOCK_BYTES).permute(0, 2, 1, 3, 4)
    return (swizzle(raw) if fp8 else raw).reshape(-1).view(weight.dtype)


def swizzle(raw: Tensor) -> Tensor:
    """Tiles of 8 rows of 64 bytes (..., 512) in the 64-byte swizzle of Hopper's matrix unit: of row r, the
    piece of 16 bytes that was c lies at c ^ (r // 2).
    """
    row, piece = torch.arange(8, device=raw.device).view(8, 1), torch.arange(4, device=raw.device)
    order = (row * 4 + (piece ^ (row // 2))).view(-1)
    return raw.reshape(*raw.shape[:-1], 32, 16)[..., order, :].reshape(raw.shape)


def shift_products(norms: Tensor, qkv: Tensor, gate_up: Tensor) -> Tensor:
    """What the norms' shifts add to the products behind them: (steps, layers, 10752) float32.

    norms: (steps, 2 * layers + 1, 3, 1024) float32; qkv: (layers, 2560, 1024) and gate_up:
    (layers, 8192, 1024), the weights as the kernel sees them (dequantised), any float dtype.
    """
    shift = norms[:, :-1, 1]
    parts = [
        torch.stack(
            [shift[:, 2 * layer + offset] @ weight[layer].float().T for layer in range(weight.shape[0])],
            dim=1,
        )
        for offset, weight in enumerate((qkv, gate_up))
    ]
    return torch.cat(parts, dim=2).contiguous()


def pack_mix(weight: Tensor) -> Tensor:
    """pi0's action_time_out weight (1024, 1024) as the kernel streams it: (1024 * 1024,) bf16."""
    if tuple(weight.shape) != (WIDTH, WIDTH):
        raise ValueError(f"mix: expected weights of shape {(WIDTH, WIDTH)}, got {tuple(weight.shape)}")
    return pack_tiles(weight.bfloat16())


@dataclass
class ExpertBuffers:
    """Scratch of one expert: allocated once, written by the kernel, whatever it held before."""

    exchange: Tensor
    barrier: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> ExpertBuffers:
        """rows: actions of a chunk, 1 to 64."""
        return cls(
            exchange=torch.empty(native.load().expert_exchange_bytes(rows), dtype=torch.uint8, device=device),
            barrier=torch.zeros(BARRIER_WORDS, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Guidance:
    """Pull of each Euler step towards known actions: x += D + gain[k] / n * weight * (target - x - t_k n D).

    D is the step without it, n the number of steps, t_k = 1 - k / n. gain: (steps,) float32; weight,
    target: (rows, action_dim) float32; all on the device and read when the kernel runs.
    """

    gain: Tensor
    weight: Tensor
    target: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Weights and conditioning of the whole expert on the device.

    products: packed, (layers, n * k) each; weight_scale: (layers, 4) and input_scale: (layers, 2)
    float32, e4m3 only;
    norms: (steps or 1, 2 * layers + 1, 3 or 1, 1024) float32, rows scale, shift, gate, or scale alone;
    shift_products: (steps, layers, 2560 + 8192) float32, the shifts times W_qkv and W_gate_up; with
    three rows only;
    project_in, project_out: (weight, bias) float32, the bias of project_in (steps or 1, 1024);
    mix: pi0's second projection of the actions, behind a silu: `pack_mix` and a float32 bias (1024,).
    """

    products: dict[str, Tensor]
    norms: Tensor
    shift_products: Tensor | None
    project_in: tuple[Tensor, Tensor]
    project_out: tuple[Tensor, Tensor]
    weight_scale: Tensor | None = None
    input_scale: Tensor | None = None
    mix: tuple[Tensor, Tensor] | None = None


def expert_steps(
    weights: ExpertWeights,
    buffers: ExpertBuffers,
    x: Tensor,
    steps: int,
    rope: tuple[Tensor, Tensor],
    prefix_length: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float = 1e-6,
    guidance: Guidance | None = None,
    fill: bool = False,
    unpaired: bool = False,
) -> None:
    """Integrate x over all denoise steps, as one kernel on the current stream.

    x: (rows, action_dim) float32, noise in, actions out; rope: (cos, sin) float32 (positions, 128);
    prefix_length: int32 scalar on the device; k_cache, v_cache: bf16 (layers, capacity, 1, 256), read up to
    prefix_length (the keys and values of the actions stay in `buffers`). fill: a single step that leaves the
    keys and values of the rows in the caches, behind the prefix, and x as it is. unpaired: what runs where
    the device cannot hold all pairs of blocks at once, for tests of that. Raises RuntimeError where the
    device cannot run the kernel (cudaErrorNotSupported), ValueError where the norms are neither of one step
    nor of all, or the buffers are of fewer rows.
    """
    norms = weights.norms
    if norms.shape[0] not in (1, steps):
        raise ValueError(
            f"norms: expected the conditioning of 1 or of all {steps} steps, got {norms.shape[0]}: "
            "compute it for the steps that are to be run"
        )
    shifts = weights.shift_products
    if shifts is not None and shifts.shape[0] != steps:
        raise ValueError(
            f"shift_products: expected those of all {steps} steps, got {shifts.shape[0]}: compute them for "
            "the steps that are to be run"
        )
    needed = native.load().expert_exchange_bytes(x.shape[0])
    if buffers.exchange.numel() < needed:
        raise ValueError(
            f"buffers: expected an exchange of at least {needed} bytes for {x.shape[0]} rows, "
            f"got {buffers.exchange.numel()}: allocate ExpertBuffers for as many rows"
        )
    adaptive = norms.shape[2] == 3
    step_stride = norms.stride(0) if norms.shape[0] > 1 else 0
    base, row = norms.data_ptr(), norms.stride(2) * norms.element_size()
    in_bias = weights.project_in[1]
    products = weights.products
    native.launch(
        "expert_steps",
        x.device,
        products["qkv"].dtype == torch.float8_e4m3fn,
        fill,
        unpaired,
        x.shape[0],
        products["qkv"].shape[0],
        steps,
        x.shape[1],
        *(products[name].data_ptr() for name in PRODUCTS),
        0 if weights.weight_scale is None else weights.weight_scale.data_ptr(),
        0 if weights.input_scale is None else weights.input_scale.data_ptr(),
        base,
        base + row if adaptive else 0,
        base + 2 * row if adaptive else 0,
        step_stride,
        norms.stride(1),
        0 if weights.shift_products is None else weights.shift_products.data_ptr(),
        eps,
        rope[0].data_ptr(),
        rope[1].data_ptr(),
        prefix_length.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.shape[1],
        x.data_ptr(),
        weights.project_in[0].data_ptr(),
        in_bias.data_ptr(),
        in_bias.stride(0) if in_bias.shape[0] > 1 else 0,
        weights.project_out[0].data_ptr(),
        weights.project_out[1].data_ptr(),
        *((0, 0) if weights.mix is None else (tensor.data_ptr() for tensor in weights.mix)),
        0 if guidance is None else guidance.gain.data_ptr(),
        0 if guidance is None else guidance.weight.data_ptr(),
        0 if guidance is None else guidance.target.data_ptr(),
        buffers.exchange.data_ptr(),
        buffers.barrier.data_ptr(),
    )
