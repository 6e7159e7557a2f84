"""The persistent expert kernel against the torch definition of its layers, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.ops import expert_steps as steps_op
from flashrt_runtime.ops import reference
from flashrt_runtime.ops.expert import E4M3_MAX
from flashrt_runtime.ops.expert_steps import PRODUCTS, SHAPES, ExpertBuffers, ExpertWeights

EPS = 1e-6


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_packing_is_a_permutation(product: str, dtype: torch.dtype) -> None:
    n, k = SHAPES[product]
    weight = torch.randint(0, 120, (n, k), dtype=torch.uint8)
    weight = weight.view(dtype) if dtype == torch.float8_e4m3fn else weight.bfloat16()
    packed = steps_op.pack_chunks(weight, product)
    assert torch.equal(packed.float().sort().values, weight.float().view(-1).sort().values)


def quantised(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class RandomExpert:
    """An expert of random weights: packed for the kernel, and as the float32 values that the kernel sees."""

    def __init__(self, layers: int, steps: int, fp8: bool, adaptive: bool) -> None:
        self.layers, self.steps, self.fp8, self.adaptive = layers, steps, fp8, adaptive
        self.dense: dict[str, torch.Tensor] = {}
        packed: dict[str, torch.Tensor] = {}
        scales = torch.ones(layers, 4, device="cuda")
        for index, (name, (n, k)) in enumerate(SHAPES.items()):
            weight = torch.randn(layers, n, k, device="cuda") / k**0.5 * (2 if name == "qkv" else 1)
            if fp8:
                scales[:, index] = weight.abs().amax((1, 2)) / E4M3_MAX
                stored = quantised(weight, scales[:, index, None, None])
                self.dense[name] = stored.float() * scales[:, index, None, None]
            else:
                stored = weight.bfloat16()
                self.dense[name] = stored.float()
            packed[name] = torch.stack([steps_op.pack_chunks(layer, name) for layer in stored])
        self.input_scale = torch.full((layers, 2), 4.0 / E4M3_MAX, device="cuda")
        rows = 3 if adaptive else 1
        norms = torch.randn(steps if adaptive else 1, 2 * layers + 1, rows, 1024, device="cuda") * 0.3
        project_in = torch.randn(1024, 32, device="cuda") / 6, torch.randn(1, 1024, device="cuda")
        project_out = torch.randn(32, 1024, device="cuda") / 32, torch.randn(32, device="cuda")
        shifts = (
            steps_op.shift_products(norms, self.dense["qkv"], self.dense["gate_up"]) if adaptive else None
        )
        self.weights = ExpertWeights(
            packed,
            norms,
            shifts,
            project_in,
            project_out,
            scales if fp8 else None,
            self.input_scale if fp8 else None,
        )

    def seen(self, x: torch.Tensor, layer: int, product: int) -> torch.Tensor:
        """An activation as the tensor cores see it."""
        x = x.bfloat16().float()
        if not self.fp8:
            return x
        scale = self.input_scale[layer, product]
        return quantised(x, scale).float() * scale

    def norm(self, h: torch.Tensor, step: int, index: int) -> torch.Tensor:
        style = self.weights.norms[step if self.adaptive else 0, index]
        if self.adaptive:
            return reference.ada_rms_norm(h, style, EPS)
        return reference.rms_norm(h, style[0], EPS)

    def gate(self, step: int, index: int) -> torch.Tensor | float:
        return self.weights.norms[step, index, 2] if self.adaptive else 1.0

    def integrate(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int) -> torch.Tensor:
        """The same steps in float32 torch, activations rounded where the kernel rounds them."""
        cos, sin = rope_tables(k.shape[1], 256, x.device)
        rows = x.shape[0]
        angles = cos[prefix : prefix + rows], sin[prefix : prefix + rows]
        k, v, x = k.float(), v.float(), x.clone()
        (w_in, b_in), (w_out, b_out) = self.weights.project_in, self.weights.project_out
        for step in range(self.steps):
            h = F.linear(x, w_in, b_in[0]).bfloat16()
            for layer in range(self.layers):
                dense = {name: self.dense[name][layer] for name in PRODUCTS}
                normed = self.norm(h, step, 2 * layer).float()
                qkv = (normed @ dense["qkv"].T).view(rows, 10, 256)
                q, suffix = reference.apply_rope(qkv[:, :8], *angles), slice(prefix, prefix + rows)
                k[layer, suffix] = reference.apply_rope(qkv[:, 8:9], *angles).bfloat16().float()
                v[layer, suffix] = qkv[:, 9:].bfloat16().float()
                q = q.bfloat16().float().transpose(0, 1)
                keys, values = k[layer, : prefix + rows, 0], v[layer, : prefix + rows, 0]
                attended = (q @ keys.T / 16).softmax(-1) @ values
                attended = self.seen(attended.transpose(0, 1).reshape(rows, -1), layer, 0)
                h = (h.float() + self.gate(step, 2 * layer) * (attended @ dense["out"].T)).bfloat16()
                normed = self.norm(h, step, 2 * layer + 1).float()
                hidden = self.seen(reference.geglu(normed @ dense["gate_up"].T), layer, 1)
                h = (h.float() + self.gate(step, 2 * layer + 1) * (hidden @ dense["down"].T)).bfloat16()
            x -= F.linear(self.norm(h, step, 2 * self.layers).float(), w_out, b_out) / self.steps
        return x


@pytest.mark.gpu
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("rows", "prefix"), [(10, 560), (1, 1), (16, 700), (50, 560), (33, 130), (64, 300)])
def test_expert_steps(rows: int, prefix: int, fp8: bool, adaptive: bool) -> None:
    layers, steps, capacity = 3, 2, 780
    expert = RandomExpert(layers, steps, fp8, adaptive)
    k, v = (torch.randn(layers, capacity, 1, 256, device="cuda").bfloat16() for _ in range(2))
    k[:, prefix:], v[:, prefix:] = float("nan"), float("nan")
    noise = torch.randn(rows, 32, device="cuda")
    want = expert.integrate(noise, k, v, prefix)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    buffers = ExpertBuffers.allocate(rows, dtype, noise.device)
    length = torch.tensor(prefix, dtype=torch.int32, device="cuda")
    rope = rope_tables(capacity, 256, noise.device)
    outputs = []
    for _ in range(3):
        for name in ("h", "scaled", "squares", "q", "attended", "hidden", "inboxes"):
            getattr(buffers, name).view(torch.uint8).fill_(0x7F)
        x = noise.clone()
        steps_op.expert_steps(expert.weights, buffers, x, steps, rope, length, k, v)
        outputs.append(x)
    torch.cuda.synchronize()
    assert not buffers.barrier.any()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    moved = want - noise
    error = ((outputs[0] - want).norm() / moved.norm()).item()
    assert error < (4e-2 if fp8 else 1.5e-2), f"relative error {error:.2e}"
    assert k[:, prefix + rows :].isnan().all()
