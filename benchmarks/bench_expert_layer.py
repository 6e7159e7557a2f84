"""One expert layer visit by our kernels in a CUDA graph: microseconds and weight bandwidth.

Ten steps over `--layers` layers, so that the weights come from memory and not from L2; each kernel alone
(parts: attention without clusters), the five in a chain, and the persistent kernel that runs all steps.
    python -m benchmarks.bench_expert_layer --rows 10 --prefix 560
    python -m benchmarks.bench_expert_layer --rows 10 50 --prefix 560 816 --persistent
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import graph_time
from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.ops import expert
from flashrt_runtime.ops.expert import Epilogue, PackedLinear
from flashrt_runtime.ops.expert_steps import SHAPES, ExpertBuffers, ExpertWeights, expert_steps

STEPS = 10
WEIGHTS = sum(n * k for n, k in SHAPES.values())


def random_data(n: int, k: int, fp8: bool) -> Tensor:
    """Packed weights of one product: (n * k,)."""
    weight = torch.randn(n * k, device="cuda") / k**0.5
    return (weight * 100).to(torch.float8_e4m3fn) if fp8 else weight.bfloat16()


class Rig:
    """Random weights, cache and scratch of one precision."""

    def __init__(self, rows: int, prefix: int, layers: int, fp8: bool) -> None:
        self.layers, self.fp8 = layers, fp8
        self.data = {
            name: torch.stack([random_data(n, k, fp8) for _ in range(layers)])
            for name, (n, k) in SHAPES.items()
        }
        self.norm = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")
        self.gate = torch.full((1024,), 0.1, device="cuda")
        self.scale = torch.ones((), device="cuda") / 50
        self.dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        self.resize(rows, prefix)

    def resize(self, rows: int, prefix: int) -> None:
        """The same weights for another number of actions and of keys."""
        self.rows, self.prefix, capacity = rows, prefix, prefix + 128
        self.k, self.v = (
            torch.randn(self.layers, capacity, 1, 256, device="cuda").bfloat16() for _ in range(2)
        )
        self.rope = rope_tables(capacity, 256, torch.device("cuda"))
        self.length = torch.tensor(prefix, dtype=torch.int32, device="cuda")
        self.h = torch.randn(rows, 1024, device="cuda").bfloat16()
        self.q = torch.empty(rows, 8, 256, device="cuda", dtype=torch.bfloat16)
        self.attended = torch.empty(rows, 2048, device="cuda", dtype=self.dtype)
        self.hidden = torch.empty(rows, 4096, device="cuda", dtype=self.dtype)
        wide = torch.float16 if self.fp8 else torch.bfloat16
        self.normed = torch.empty(rows, 1024, device="cuda", dtype=wide)
        self.scratch = expert.attention_scratch(rows, 8, capacity, self.h.device)

    def linear(self, name: str, layer: int) -> PackedLinear:
        """One product's weights, with scales where they are e4m3."""
        scale = self.scale if self.fp8 else None
        return PackedLinear(self.data[name][layer], *SHAPES[name], scale, scale)

    def input(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What a product reads and norms: more rows than it can are normed by a kernel of its own."""
        if self.rows <= expert.MAX_NORM_ROWS:
            return self.h, self.norm
        return expert.norm_rows(self.h, self.norm, 1e-6, self.normed), None

    def qkv(self, i: int) -> None:
        """Norm, projection, rotary embedding, cache write."""
        x, norm = self.input()
        expert.skinny_gemm(
            x, self.linear("qkv", i), Epilogue.ROPE, self.q, norm=norm, rope=self.rope,
            prefix_length=self.length, k_cache=self.k[i], v_cache=self.v[i], heads=8, kv_heads=1,
            head_dim=256,
        )  # fmt: skip

    def attention(self, i: int) -> None:
        """Ten rows a head over the cache."""
        scale = self.scale if self.fp8 else None
        expert.expert_attention(self.q, self.k[i], self.v[i], self.length, self.attended, scale)

    def parts(self, i: int) -> None:
        """The same without clusters."""
        scale = self.scale if self.fp8 else None
        k, v = self.k[i], self.v[i]
        expert.expert_attention(self.q, k, v, self.length, self.attended, scale, self.scratch)

    def out(self, i: int) -> None:
        """Projection and gated residual."""
        expert.skinny_gemm(self.attended, self.linear("out", i), Epilogue.RESIDUAL, self.h, gate=self.gate)

    def gate_up(self, i: int) -> None:
        """Norm, projection, GeGLU."""
        x, norm = self.input()
        expert.skinny_gemm(
            x, self.linear("gate_up", i), Epilogue.GEGLU, self.hidden, norm=norm,
            out_scale=self.scale if self.fp8 else None,
        )  # fmt: skip

    def down(self, i: int) -> None:
        """Projection and gated residual."""
        expert.skinny_gemm(self.hidden, self.linear("down", i), Epilogue.RESIDUAL, self.h, gate=self.gate)

    def persistent(self) -> Callable[[], None]:
        """All steps as one kernel."""
        ones, draw = torch.ones(self.layers, 4, device="cuda") / 100, torch.randn
        weights = ExpertWeights(
            self.data,
            draw(STEPS, 2 * self.layers + 1, 3, 1024, device="cuda") * 0.1,
            draw(STEPS, self.layers, 2560 + 8192, device="cuda") * 0.1,
            (draw(1024, 32, device="cuda") / 6, draw(1, 1024, device="cuda")),
            (draw(32, 1024, device="cuda") / 32, draw(32, device="cuda")),
            ones if self.fp8 else None,
            ones[:, :2].contiguous() if self.fp8 else None,
        )
        x = draw(self.rows, 32, device="cuda")
        buffers = ExpertBuffers.allocate(self.rows, x.device)
        return lambda: expert_steps(weights, buffers, x, STEPS, self.rope, self.length, self.k, self.v)


def report(rig: Rig, name: str, work: Callable[[], None], weights: int) -> None:
    """Print microseconds a layer visit and the rate at which weights were read."""
    visits = STEPS * rig.layers
    us = graph_time(work) * 1e3 / visits
    rate = f"{weights * (1 if rig.fp8 else 2) / us / 1e6:6.2f} TB/s" if weights else 11 * " "
    print(f"  {name:10s} {us:7.2f}  {rate}   ten steps {us * visits / 1e3:6.3f} ms")


def compare(rig: Rig) -> None:
    """Each kernel alone, the five in a chain, and the persistent kernel."""
    names = ("qkv", "attention", "out", "gate_up", "down")
    parts = {name: getattr(rig, name) for name in names}

    def chain(functions: Sequence[Callable[[int], None]]) -> None:
        for visit in range(STEPS * rig.layers):
            for function in functions:
                function(visit % rig.layers)

    print(f"{rig.dtype} rows {rig.rows} prefix {rig.prefix}: microseconds a layer visit")
    for name, part in parts.items():
        n, k = SHAPES.get(name, (0, 0))
        report(rig, name, lambda part=part: chain([part]), n * k)  # type: ignore[misc]
    report(rig, "parts", lambda: chain([rig.parts]), 0)
    report(rig, "chain", lambda: chain(list(parts.values())), WEIGHTS)
    report(rig, "persistent", rig.persistent(), WEIGHTS)


def main() -> None:
    """Measure both precisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10])
    parser.add_argument("--prefix", type=int, nargs="+", default=[560])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--persistent", action="store_true", help="the persistent kernel alone")
    args = parser.parse_args()
    for fp8 in (True, False):
        rig = Rig(args.rows[0], args.prefix[0], args.layers, fp8)
        for rows in args.rows:
            for prefix in args.prefix:
                rig.resize(rows, prefix)
                if args.persistent:
                    us = graph_time(rig.persistent()) * 1e3 / (STEPS * args.layers)
                    print(f"{rig.dtype} rows {rows} prefix {prefix}: {us:6.2f} microseconds a layer visit")
                else:
                    compare(rig)


if __name__ == "__main__":
    main()
