"""Residual add + RMSNorm: our kernel and the torch definition, microseconds a call in a CUDA graph.

Buffers rotate over more memory than the L2 holds, so that the floor is the memory's bandwidth.
    python benchmarks/bench_add_rms_norm.py --bandwidth 4.8e12
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from flashrt_runtime.ops import native, reference

SHAPES = ((10, 1024), (50, 1024), (968, 2048), (16384, 2048))
EPS = 1e-6


def microseconds(call: Callable[[int], object], calls: int, repeats: int = 20) -> float:
    """Median time of one of `calls` consecutive calls, replayed as one graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bandwidth", type=float, default=4.8e12, help="bytes/s of the memory, for the floor"
    )
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "bfloat16, weight float32")
    for rows, width in SHAPES:
        moved = 4 * rows * width * 2 + 4 * width
        sets = max(1, min(200, int(256e6 / moved)))
        x, residual, out, total = (torch.randn(sets, rows, width, device="cuda").bfloat16() for _ in range(4))
        weight = torch.randn(width, device="cuda")

        def ours(i: int, x=x, residual=residual, out=out, total=total, weight=weight) -> object:
            i %= len(x)
            return native.add_rms_norm(x[i], residual[i], weight, EPS, out=out[i], residual_out=total[i])

        def torch_definition(i: int, x=x, residual=residual, weight=weight) -> object:
            i %= len(x)
            return reference.add_rms_norm(x[i], residual[i], weight, EPS)

        calls = 200 if rows < 10_000 else 20
        kernel = microseconds(ours, calls)
        definition = microseconds(torch_definition, calls)
        print(
            f"{rows:6d} x {width}: kernel {kernel:7.2f} us, {moved / kernel / 1e6:5.2f} TB/s, "
            f"floor {moved / args.bandwidth * 1e6:6.2f} us; torch {definition:7.2f} us"
        )


if __name__ == "__main__":
    main()
