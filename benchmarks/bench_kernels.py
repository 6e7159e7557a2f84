"""Every kernel of ours alone, in a CUDA graph: microseconds a call and the bandwidth that it reaches.

Operands take turns over more memory than L2 holds, so that a call's bytes come from memory; inside a policy
activations mostly come from L2. Shapes are those of Pi0.5 at two views, of its expert at ten actions, and of
one token of Pi0-FAST.
    python -m benchmarks.bench_kernels --out docs/gpu/kernels.md
"""

from __future__ import annotations

import argparse
import datetime
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.bench_expert_layer import STEPS, Rig
from benchmarks.bench_policy import commit
from benchmarks.rates import ROTATED_BYTES, ceilings
from benchmarks.timing import graph_time
from flashrt_runtime import ops
from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.ops import expert, native, prefix, products
from flashrt_runtime.ops.expert import Epilogue, PackedLinear
from flashrt_runtime.ops.expert_steps import SHAPES

TOKENS, PATCHES, WIDTH, VISION = 560, 512, 2048, 1152
MOST_SETS = 200


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: `make` draws operands and returns the call on them; `moved`: its bytes."""

    kernel: str
    shape: str
    moved: int
    make: Callable[[], Callable[[], object]]
    calls: int = 1  # of the kernel in one call of ours

    def microseconds(self) -> float:
        """A call's time, its operands rotated."""
        # several calls go over the layers of one set already
        sets = max(1, min(MOST_SETS, ROTATED_BYTES // self.moved + 1)) if self.calls == 1 else 1
        works = [self.make() for _ in range(sets)]

        def work() -> None:
            for each in works:
                each()

        return graph_time(work, 20) * 1e3 / (sets * self.calls)


@functools.cache
def rig(rows: int, fp8: bool) -> Rig:
    return Rig(rows, TOKENS, 18, fp8)


def over_layers(work: Callable[[int], None]) -> Callable[[], None]:
    """One call of ours: the kernel on every layer."""

    def run() -> None:
        for layer in range(18):
            work(layer)

    return run


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def e4m3(*shape: int) -> Tensor:
    return ops.quantise(randn(*shape), scale())


def scale() -> Tensor:
    return torch.full((), 0.01, device="cuda")


def elementwise() -> Iterator[Case]:
    """Norms, activations, rotary embedding, images and text."""
    x, v = TOKENS * WIDTH, PATCHES * VISION

    def rms() -> Callable[[], object]:
        a, b, w, s = randn(TOKENS, WIDTH), randn(TOKENS, WIDTH), torch.randn(WIDTH, device="cuda"), scale()
        return lambda: ops.add_rms_norm(a, b, w, 1e-6, s)

    def layer() -> Callable[[], object]:
        a, b, s = randn(PATCHES, VISION), randn(PATCHES, VISION), scale()
        w, c = torch.randn(2, VISION, device="cuda")
        return lambda: ops.add_layer_norm(a, b, w, c, 1e-6, s)

    def own_norm() -> Callable[[], object]:
        a, b, w = randn(TOKENS, WIDTH), randn(TOKENS, WIDTH), torch.randn(WIDTH, device="cuda")
        return lambda: native.add_rms_norm(a, b, w, 1e-6)

    def ada() -> Callable[[], object]:
        a, b, s = randn(50, 1024), randn(50, 1024), scale()
        styles = torch.randn(2, 3, 1024, device="cuda")
        return lambda: ops.gated_add_ada_rms_norm(a, b, styles[0, 2], styles[1], 1e-6, s)

    yield Case("row_norm: gated add, adaRMS, e4m3", "50 x 1024", 7 * 50 * 1024 + 12 * 1024, ada)
    yield Case("row_norm: add, RMSNorm, e4m3", f"{TOKENS} x {WIDTH}", 7 * x, rms)
    yield Case("row_norm: add, LayerNorm, e4m3", f"{PATCHES} x {VISION}", 7 * v, layer)
    yield Case("add_rms_norm: bf16", f"{TOKENS} x {WIDTH}", 8 * x, own_norm)
    activations = (
        ("quantise", ops.quantise, TOKENS, WIDTH, 3 * x),
        ("GELU, e4m3", ops.gelu, PATCHES, 4304, 3 * PATCHES * 4304),
        ("GeGLU, e4m3", ops.geglu, TOKENS, 2 * 16384, 5 * TOKENS * 16384),
    )
    for name, operation, rows, width, moved in activations:

        def activation(
            operation: Callable[..., Tensor] = operation, rows: int = rows, width: int = width
        ) -> Callable[[], object]:
            a, s = randn(rows, width), scale()
            return lambda: operation(a, s)

        yield Case(f"activation: {name}", f"{rows} x {width}", moved, activation)

    def rope() -> Callable[[], object]:
        qkv, k, v = randn(TOKENS, 2560), randn(TOKENS, 1, 256), randn(TOKENS, 1, 256)
        cos, sin = rope_tables(TOKENS, 256, torch.device("cuda"))
        return lambda: ops.split_qkv_rope(qkv, cos, sin, 8, k, v, slice(0, TOKENS))

    def patches() -> Callable[[], object]:
        frames = torch.randint(0, 256, (2 * 480 * 640 * 3,), dtype=torch.uint8, device="cuda")
        views = torch.tensor([[0, 480, 640], [480 * 640 * 3, 480, 640]], device="cuda")
        return lambda: prefix.camera_patches(frames, views, 224, 14, True)

    def text() -> Callable[[], object]:
        table, ids, out = randn(2048, WIDTH), torch.randint(0, 2048, (48,), device="cuda"), randn(48, WIDTH)
        return lambda: ops.embed_tokens(table, ids, 45.0, out)

    def guide() -> Callable[[], object]:
        four = [torch.randn(50, 32, device="cuda") for _ in range(3)]
        weight, gain = torch.rand(50, device="cuda"), torch.ones((), device="cuda")
        return lambda: ops.guide_velocity(four[0], four[1], four[2], weight, gain, 0.5)

    yield Case("qkv_rope: split, rotate, cache", f"{TOKENS} x 2560", 4 * TOKENS * 2560, rope)
    patch_bytes = 2 * (480 * 640 * 3 + 256 * 588 * 4)
    yield Case("camera_patches: resize, normalise, cut", "2 x 480 x 640", patch_bytes, patches)
    yield Case("embed_tokens", f"48 x {WIDTH}", 4 * 48 * WIDTH, text)
    yield Case("guide_velocity", "50 x 32", 4 * 4 * 50 * 32, guide)


def large() -> Iterator[Case]:
    """Attentions and products of many rows, on Hopper."""

    def attention() -> Callable[[], object]:
        q, k, v, s = randn(TOKENS, 8, 256), randn(TOKENS, 1, 256), randn(TOKENS, 1, 256), scale()
        valid = torch.tensor(552, dtype=torch.int32, device="cuda")
        return lambda: prefix.attention(q, k, v, valid, s)

    def vision() -> Callable[[], object]:
        qkv, s = randn(2, 256, 3 * VISION), scale()
        return lambda: prefix.vision_attention(qkv, 16, s)

    def gate_up(tokens: int) -> Callable[[], object]:
        x, w, s = e4m3(tokens, WIDTH), e4m3(2 * 16384, WIDTH), scale()
        return lambda: products.linear_geglu(x, w, s, s, s)

    def linear(width: int, depth: int, gelu: bool) -> Callable[[], object]:
        x, w, b, s = e4m3(PATCHES, depth), e4m3(width, depth), randn(width), scale()
        return lambda: products.linear(x, w, s, s, b, s if gelu else None)

    def embed() -> Callable[[], object]:
        shapes = (VISION, 588), (VISION,), (256, VISION)
        weights = ops.LevelWeights.of(*(torch.randn(*shape, device="cuda") for shape in shapes))
        levels = torch.randint(-128, 128, (2, 256, weights.split.shape[1]), device="cuda").half()
        return lambda: ops.embed_levels(levels, weights)

    kv = 4 * TOKENS * 256
    yield Case("prefix_attention, e4m3", f"{TOKENS} x 8 heads", 3 * TOKENS * WIDTH + kv, attention)
    yield Case("vision_attention, e4m3", "2 views, 16 heads", 7 * PATCHES * VISION, vision)
    for tokens in (304, TOKENS, 816):  # of one, two and three views
        moved = 2 * 16384 * WIDTH + tokens * (WIDTH + 16384)
        make = functools.partial(gate_up, tokens)
        yield Case("geglu_product, e4m3", f"{tokens} x 32768 x {WIDTH}", moved, make)
    for name, width, depth, gelu in (
        ("GELU, e4m3", 4304, VISION, True),
        ("bf16", VISION, VISION, False),
        ("bf16", 3 * VISION, VISION, False),
        ("bf16, k by two blocks", VISION, 4304, False),
    ):
        moved = width * depth + PATCHES * (depth + width * (1 if gelu else 2))
        make = functools.partial(linear, width, depth, gelu)
        yield Case(f"linear_product: {name}", f"{PATCHES} x {width} x {depth}", moved, make)
    moved = 2 * 2 * VISION * 592 + 4 * 256 * VISION + 2 * PATCHES * (592 + VISION)
    yield Case("patch_product: fp16 by two parts", f"{PATCHES} x {VISION} x 588", moved, embed)


def skinny() -> Iterator[Case]:
    """Products of few rows, one after the other over the layers of an expert, and of Gemma-2B's one row."""
    for fp8 in (True, False):
        name, width = ("e4m3", 1) if fp8 else ("bf16", 2)
        for part in ("qkv", "out", "gate_up", "down"):
            for rows in (1, 10, 64) if part in ("out", "down") else (1, 10):
                n, k = SHAPES[part]

                def chain(part: str = part, rows: int = rows, fp8: bool = fp8) -> Callable[[], object]:
                    return over_layers(getattr(rig(rows, fp8), part))

                yield Case(f"skinny_gemm: {part}, {name}", f"{rows} x {n} x {k}", n * k * width, chain, 18)
    for n, k in ((2560, WIDTH), (2 * 16384, WIDTH), (WIDTH, 16384)):

        def decode(n: int = n, k: int = k) -> Callable[[], object]:
            linear = PackedLinear(e4m3(n * k), n, k, scale(), scale())
            x, out = e4m3(1, k), torch.empty(1, n, device="cuda", dtype=torch.bfloat16)
            return lambda: expert.skinny_gemm(x, linear, Epilogue.STORE, out)

        yield Case("skinny_gemm: one token, e4m3", f"1 x {n} x {k}", n * k, decode)


def whole_expert() -> Iterator[Case]:
    """What is bound by latency: a step's attention, its ends, and all steps as one kernel."""
    weights = sum(n * k for n, k in SHAPES.values())

    def attention() -> Callable[[], object]:
        return over_layers(rig(10, True).attention)

    def step() -> Callable[[], object]:
        x, hidden, out = torch.randn(10, 32, device="cuda"), randn(10, 1024), randn(10, 1024)
        w_in, w_out, b_in, b_out = (torch.randn(s, device="cuda") for s in ((1024, 32), (32, 1024), 1024, 32))
        norm = torch.zeros(1024, device="cuda"), None
        return lambda: expert.action_step(
            x, out, hidden=hidden, norm=norm, eps=1e-6, out=(w_out, b_out), dt=-0.1, project=(w_in, b_in)
        )

    def parts() -> Callable[[], object]:
        return over_layers(rig(10, True).parts)

    for name, make in (("expert_attention", attention), ("expert_attention without clusters", parts)):
        yield Case(f"{name}, e4m3", f"10 x 8 heads, {TOKENS} keys", 4 * TOKENS * 256, make, 18)
    yield Case("action_step", "10 x 32 x 1024", 2 * 4 * 32 * 1024, step)
    for rows in (10, 50):
        for fp8 in (True, False):

            def steps(rows: int = rows, fp8: bool = fp8) -> Callable[[], object]:
                return rig(rows, fp8).persistent()

            name = f"expert_steps: a layer visit, {'e4m3' if fp8 else 'bf16'}"
            # the one set of weights is larger than L2: nothing to rotate
            yield Case(name, f"{rows} actions", weights * (1 if fp8 else 2), steps, 18 * STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="of the measured sources, where they are no checkout")
    parser.add_argument("--out", type=Path, help="Markdown to write")
    args = parser.parse_args()
    copy = ceilings()["copy_tb_s"]
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today().isoformat()}, "
        f"commit {args.commit or commit()}. Operands from memory; floor: the bytes at the {copy:.2f} TB/s of "
        "a large copy.",
        "",
        "| kernel | shape | us | MB | TB/s | floor us |",
        "|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for case in (*elementwise(), *large(), *skinny(), *whole_expert()):
            us, mb = case.microseconds(), case.moved / 1e6
            lines.append(
                f"| {case.kernel} | {case.shape} | {us:.2f} | {mb:.2f} | {mb / us:.2f} | {mb / copy:.2f} |"
            )
            print(lines[-1], flush=True)
            torch.cuda.empty_cache()
    lines += ["", f"- `{report.command('bench_kernels')}`"]
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
