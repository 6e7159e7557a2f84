"""One expert layer visit by our kernels, as a chain in a CUDA graph: microseconds and bandwidth.

Weights rotate over `--layers` copies so that they come from memory and not from L2.
    python benchmarks/bench_expert_layer.py --rows 10 --prefix 560
"""

from __future__ import annotations

import argparse
import statistics

import torch

from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.ops import expert
from flashrt_runtime.ops.expert import Epilogue, PackedLinear
from flashrt_runtime.ops.expert_steps import ExpertBuffers, ExpertWeights, expert_steps

SHAPES = {"qkv": (2560, 1024), "out": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}


def random_linear(n: int, k: int, fp8: bool) -> PackedLinear:
    one = torch.ones((), device="cuda")
    weight = torch.randn(n * k, device="cuda") / k**0.5
    if fp8:
        return PackedLinear((weight * 100).to(torch.float8_e4m3fn), n, k, one / 100, one / 50)
    return PackedLinear(weight.bfloat16(), n, k)


def graph_time(work, repeats: int = 50) -> float:
    """Median milliseconds of a graph replay of `work`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    for _ in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def persistent(args, fp8: bool, rope, length, k, v) -> float:
    """Milliseconds of ten steps of the whole expert as one kernel."""
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    ones = torch.ones(args.layers, 4, device="cuda") / 100, torch.ones(args.layers, 2, device="cuda") / 50
    products = {
        name: torch.stack([random_linear(n, width, fp8).data for _ in range(args.layers)])
        for name, (n, width) in SHAPES.items()
    }
    weights = ExpertWeights(
        products,
        torch.randn(10, 2 * args.layers + 1, 3, 1024, device="cuda") * 0.1,
        torch.randn(10, args.layers, 2560 + 8192, device="cuda") * 0.1,
        (torch.randn(1024, 32, device="cuda") / 6, torch.randn(1, 1024, device="cuda")),
        (torch.randn(32, 1024, device="cuda") / 32, torch.randn(32, device="cuda")),
        ones[0] if fp8 else None,
        ones[1] if fp8 else None,
    )
    x = torch.randn(args.rows, 32, device="cuda")
    buffers = ExpertBuffers.allocate(args.rows, dtype, x.device)
    return graph_time(lambda: expert_steps(weights, buffers, x, 10, rope, length, k, v))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--prefix", type=int, default=560)
    parser.add_argument("--layers", type=int, default=18)
    args = parser.parse_args()
    rows = args.rows
    for fp8 in (True, False):
        layers = [{name: random_linear(*shape, fp8) for name, shape in SHAPES.items()} for _ in range(args.layers)]
        capacity = args.prefix + 64 + 64
        k, v = (torch.randn(args.layers, capacity, 1, 256, device="cuda").bfloat16() for _ in range(2))
        rope = rope_tables(capacity, 256, torch.device("cuda"))
        length = torch.tensor(args.prefix, dtype=torch.int32, device="cuda")
        norm = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")
        gate = torch.full((1024,), 0.1, device="cuda")
        scale = torch.ones((), device="cuda") / 50
        small = torch.float8_e4m3fn if fp8 else torch.bfloat16
        h = torch.randn(rows, 1024, device="cuda").bfloat16()
        q = torch.empty(rows, 8, 256, device="cuda", dtype=torch.bfloat16)
        a = torch.empty(rows, 2048, device="cuda", dtype=small)
        m = torch.empty(rows, 4096, device="cuda", dtype=small)
        wide = {"prefix_length": length, "heads": 8, "kv_heads": 1, "head_dim": 256, "rope": rope, "norm": norm}

        def qkv(i):
            expert.skinny_gemm(h, layers[i]["qkv"], Epilogue.ROPE, q, k_cache=k[i], v_cache=v[i], **wide)

        def attention(i):
            expert.expert_attention(q, k[i], v[i], length, a, scale if fp8 else None)

        def out(i):
            expert.skinny_gemm(a, layers[i]["out"], Epilogue.RESIDUAL, h, gate=gate)

        def gate_up(i):
            expert.skinny_gemm(h, layers[i]["gate_up"], Epilogue.GEGLU, m, norm=norm, out_scale=scale if fp8 else None)

        def down(i):
            expert.skinny_gemm(m, layers[i]["down"], Epilogue.RESIDUAL, h, gate=gate)

        parts = {"qkv": qkv, "attention": attention, "out": out, "gate_up": gate_up, "down": down}
        visits = 10 * args.layers

        def chain(functions):
            for index in range(visits):
                for function in functions:
                    function(index % args.layers)

        print(f"{'fp8' if fp8 else 'bf16'} rows {rows} prefix {args.prefix}: microseconds a visit")
        for name, function in parts.items():
            us = graph_time(lambda function=function: chain([function])) * 1e3 / visits
            size = SHAPES.get(name)
            rate = f"{size[0] * size[1] * (1 if fp8 else 2) / us / 1e6:6.2f} TB/s" if size else ""
            print(f"  {name:10s} {us:7.2f}  {rate}")
        us = graph_time(lambda: chain(parts.values())) * 1e3 / visits
        total = sum(n * k for n, k in SHAPES.values()) * (1 if fp8 else 2)
        print(f"  {'layer':10s} {us:7.2f}  {total / us / 1e6:6.2f} TB/s   ten steps {us * visits / 1e3:.3f} ms")
        us = persistent(args, fp8, rope, length, k, v) * 1e3 / visits
        print(f"  {'persistent':10s} {us:7.2f}  {total / us / 1e6:6.2f} TB/s   ten steps {us * visits / 1e3:.3f} ms")


if __name__ == "__main__":
    main()
