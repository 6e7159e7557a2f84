"""Rates that the large products and the attentions reach in a graph, beside ceilings measured in the same
run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from flashrt_runtime import ops
from flashrt_runtime.layers.kv_cache import Window

# (rows, out, in) at two views and a prompt of 48
PRODUCTS = {
    "vision qkv": (512, 3456, 1152),
    "vision out": (512, 1152, 1152),
    "vision fc1": (512, 4304, 1152),
    "vision fc2": (512, 1152, 4304),
    "prefix qkv": (560, 2560, 2048),
    "prefix out": (560, 2048, 2048),
    "prefix gate_up": (560, 32768, 2048),
    "prefix down": (560, 2048, 16384),
}
# products with what follows them in one kernel, where there is one; out is gate and up
FUSED = {"vision fc1 and gelu": (512, 4304, 1152), "prefix gate_up and geglu": (560, 32768, 2048)}
ROTATED_BYTES = 256 << 20  # weights of this many bytes take turns: they come from memory, not from L2


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s, bytes read plus written, and the 16-bit and 8-bit matrix rates in TFLOP/s."""
    source = torch.randn(1 << 30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    copy_ms = timing.summary(timing.replay_times(lambda: target.copy_(source), 20))["p50"]
    n = 8192
    a, b = source[: n * n].view(n, n), source[n * n : 2 * n * n].view(n, n)
    gemm_ms = timing.summary(timing.replay_times(lambda: a @ b, 20))["p50"]
    found = {"copy_tb_s": 2 * source.nbytes / copy_ms / 1e9, "bf16_tflop_s": 2 * n**3 / gemm_ms / 1e9}
    if torch.cuda.get_device_capability() >= ops.FP8_CAPABILITY:
        one = torch.ones((), device="cuda")
        x, w = (ops.quantise(each, one / 50) for each in (a, b))
        fp8_ms = timing.summary(
            timing.replay_times(lambda: ops.scaled_linear(x, w, one, one, None, torch.bfloat16), 20)
        )["p50"]
        found["fp8_tflop_s"] = 2 * n**3 / fp8_ms / 1e9
    return found


def _row(microseconds: float, flop: float, moved: float) -> dict[str, float]:
    return {"us": microseconds, "tflop_s": flop / microseconds / 1e6, "tb_s": moved / microseconds / 1e6}


def product(rows: int, n: int, k: int, precision: str) -> dict[str, float]:
    """One product, its weights rotated."""
    width = 1 if precision == "fp8" else 2
    copies = max(2, ROTATED_BYTES // (n * k * width))
    one = torch.ones((), device="cuda")
    x = torch.randn(rows, k, device="cuda").bfloat16()
    weights = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies)]
    if precision == "fp8":
        x = ops.quantise(x, one / 100)
        weights = [ops.quantise(weight, one / 100) for weight in weights]

        def work() -> None:
            for weight in weights:
                ops.scaled_linear(x, weight, one, one, None, torch.bfloat16)
    else:

        def work() -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

    us = timing.graph_time(work, 20) * 1e3 / copies
    return _row(us, 2 * rows * n * k, n * k * width + rows * (k * width + 2 * n))


def fused_product(rows: int, n: int, k: int, gated: bool) -> dict[str, float]:
    """One e4m3 product and its activation as e4m3, its weights rotated."""
    copies = max(2, ROTATED_BYTES // (n * k))
    one = torch.ones((), device="cuda")
    scales = one / 100, one / k**0.5
    operation = ops.linear_geglu if gated else ops.linear_gelu
    x = ops.quantise(torch.randn(rows, k, device="cuda"), one / 100)
    weights = [ops.quantise(torch.randn(n, k, device="cuda"), one / 100) for _ in range(copies)]

    def work() -> None:
        for weight in weights:
            operation(x, weight, *scales, None, scales[0], torch.bfloat16)

    us = timing.graph_time(work, 20) * 1e3 / copies
    return _row(us, 2 * rows * n * k, n * k + rows * (k + (n // 2 if gated else n)))


def attentions() -> dict[str, dict[str, float]]:
    """Attention of the vision tower at two views and of the prefix at 512 + 48 tokens of which 552 are
    valid.
    """
    qkv = torch.randn(2, 256, 3 * 1152, device="cuda").bfloat16()
    tokens, valid = 560, torch.tensor(552, dtype=torch.int32, device="cuda")
    q = torch.randn(tokens, 8, 256, device="cuda").bfloat16()
    k, v = torch.randn(2, tokens, 1, 256, device="cuda").bfloat16()
    window = Window.padded(tokens, valid)
    works: dict[str, tuple[Callable[[], object], float, float]] = {
        "vision attention": (
            lambda: ops.vision_attention(qkv, 16),
            2 * 16 * 4 * 256 * 256 * 72,
            qkv.nbytes * 4 / 3,
        ),
        "prefix attention": (
            lambda: ops.attention(q, k, v, window.unmasked),
            8 * 4 * tokens * tokens * 256,
            2 * q.nbytes + 2 * k.nbytes,
        ),
    }
    times = {}
    for name, (work, flop, moved) in works.items():
        us = timing.graph_time(lambda work=work: [work() for _ in range(20)], 20) * 1e3 / 20  # type: ignore[misc]
        times[name] = _row(us, flop, moved)
    return times


@torch.inference_mode()
def measure(precision: str) -> dict[str, Any]:
    """Ceilings, and microseconds, TFLOP/s and TB/s of each shape."""
    products = {name: product(*shape, precision) for name, shape in PRODUCTS.items()}
    if precision == "fp8":
        products |= {name: fused_product(*shape, "geglu" in name) for name, shape in FUSED.items()}
    return {"ceilings": ceilings(), "precision": precision} | products | attentions()
