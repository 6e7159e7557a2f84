"""The skinny kernels on one row of Gemma-2B's shapes, and a whole token through them against the layers."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from flashrt_runtime import models
from flashrt_runtime.checkpoints.architecture import parameter_shapes
from flashrt_runtime.checkpoints.presets import LIBERO
from flashrt_runtime.config import GEMMA_2B, PolicyConfig
from flashrt_runtime.engine import fused_decode
from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.models.pi0_fast import Pi0Fast
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.ops import expert, reference
from flashrt_runtime.ops.expert import Epilogue, PackedLinear
from flashrt_runtime.quantization.calibration import Calibrator
from flashrt_runtime.quantization.fp8 import fp8_linears, swap_linears
from flashrt_runtime.untrained.random import SIZES, random_config, weight_scale

pytestmark = pytest.mark.gpu

WIDTH, MLP, HEADS, HEAD_DIM = GEMMA_2B.width, GEMMA_2B.mlp_dim, 8, 256
ROWS = (1, 7, 16)
INPUT = 5.0 / expert.E4M3_MAX


def quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-expert.E4M3_MAX, expert.E4M3_MAX).to(torch.float8_e4m3fn)


class Product:
    """One e4m3 product: its packed weights, and inputs and weights as the tensor cores see them."""

    def __init__(self, n: int, k: int, rows: int, order: torch.Tensor | None = None) -> None:
        weight = torch.randn(n, k, device="cuda") / k**0.5
        scale = weight.abs().max() / expert.E4M3_MAX
        stored = quantise(weight, scale)
        self.weight = stored.float() * scale
        self.input_scale = torch.tensor(INPUT, device="cuda")
        data = expert.pack_tiles(stored, None if order is None else order.cuda())
        self.linear = PackedLinear(data, n, k, scale.reshape(()), self.input_scale)
        self.x = quantise(torch.randn(rows, k, device="cuda"), self.input_scale)
        self.exact = (self.x.float() * self.input_scale) @ self.weight.T


def close(out: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = (out.float() - want).norm() / want.norm()
    assert torch.isfinite(out.float()).all()
    assert error < tolerance, f"relative error {error:.2e}"


def distance(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("k", [WIDTH, MLP])
def test_residual(rows: int, k: int) -> None:
    product = Product(WIDTH, k, rows)
    residual = torch.randn(rows, WIDTH, device="cuda").bfloat16()
    want = residual.float() + product.exact
    close(expert.skinny_gemm(product.x, product.linear, Epilogue.RESIDUAL, residual), want, 4e-3)


@pytest.mark.parametrize("rows", ROWS)
def test_geglu(rows: int) -> None:
    product = Product(2 * MLP, WIDTH, rows, expert.geglu_order(MLP))
    scale = torch.tensor(8.0 / expert.E4M3_MAX, device="cuda")
    out = torch.empty(rows, MLP, device="cuda", dtype=torch.float8_e4m3fn)
    out.view(torch.uint8).fill_(0x7F)
    expert.skinny_gemm(product.x, product.linear, Epilogue.GEGLU, out, out_scale=scale)
    close(out.float() * scale, reference.geglu(product.exact).clamp(-8, 8), 3e-2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("start", [1, 560, 1000])
def test_rope(rows: int, start: int) -> None:
    product = Product((HEADS + 2) * HEAD_DIM, WIDTH, rows, expert.rope_order(HEADS + 2, HEAD_DIM))
    cos, sin = rope_tables(1100, HEAD_DIM, torch.device("cuda"))
    k, v = (torch.full((1100, 1, HEAD_DIM), float("nan"), device="cuda").bfloat16() for _ in range(2))
    q = torch.full((rows, HEADS, HEAD_DIM), float("nan"), device="cuda").bfloat16()
    expert.skinny_gemm(
        product.x, product.linear, Epilogue.ROPE, q, rope=(cos, sin),
        prefix_length=torch.tensor(start, dtype=torch.int32, device="cuda"), k_cache=k, v_cache=v,
        heads=HEADS, kv_heads=1, head_dim=HEAD_DIM,
    )  # fmt: skip
    angles = cos[start : start + rows], sin[start : start + rows]
    heads = product.exact.view(rows, HEADS + 2, HEAD_DIM)
    close(q, reference.apply_rope(heads[:, :HEADS], *angles), 6e-3)
    close(k[start : start + rows], reference.apply_rope(heads[:, HEADS : HEADS + 1], *angles), 6e-3)
    close(v[start : start + rows], heads[:, HEADS + 1 :], 6e-3)
    assert torch.cat((k[:start], k[start + rows :], v[:start], v[start + rows :])).isnan().all()


class Drawn:
    """Weights drawn on the GPU when they are asked for."""

    def __init__(self, config: PolicyConfig) -> None:
        self.shapes = parameter_shapes(config)

    def tensor(self, key: str) -> torch.Tensor:
        offset, scale = weight_scale(key, self.shapes[key], query_scale=4.0)
        generator = torch.Generator("cuda").manual_seed(zlib.crc32(key.encode()))
        return torch.randn(self.shapes[key], generator=generator, device="cuda") * float(scale) + offset


@pytest.fixture(scope="module")
def model() -> Pi0Fast:
    """Gemma-2B's widths in four layers, a small vision tower and vocabulary, in fp8."""
    stack, vision = replace(GEMMA_2B, depth=4), SIZES["tiny"].vision
    config = random_config("full", LIBERO, "pi0fast")
    config = replace(config, vision=vision, prefix=stack, expert=stack, vocab_size=4096)
    built = models.build(config, 2, torch.bfloat16)
    assert isinstance(built, Pi0Fast)
    swap_linears(built)
    load_weights(built, config, Drawn(config), torch.device("cuda"))
    built.eval()
    built.prepare(torch.device("cuda"))
    for linear in fp8_linears(built).values():
        linear.calibrated = True
        linear.activation_scale.fill_(INPUT)
    return built


def prefilled(model: Pi0Fast) -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    images = torch.rand(2, 3, 224, 224, generator=generator, device="cuda") * 2 - 1
    tokens = torch.randint(3, 4096, (40,), generator=generator, device="cuda")
    with torch.inference_mode():
        model.prefill(images, tokens)
        model.token.copy_(tokens[-1:])
        model.slot.copy_(model.prefix_length - 1)
        model.bound = model.prefix_bound - 1


@pytest.mark.parametrize("gap", [0, 1])
def test_a_token_through_the_kernels_equals_the_layers(model: Pi0Fast, gap: int) -> None:
    assert fused_decode.refusal(model, torch.device("cuda")) is None
    fused_decode.attach(model, torch.device("cuda"))
    fused, found = model.fused, {}
    assert fused is not None
    assert fused.ready()
    exact = Calibrator(model).unquantised()
    ways = (("exact", None, exact), ("layers", None, nullcontext()), ("kernels", fused, nullcontext()))
    for name, kernel, precision in ways:
        model.fused = kernel
        with precision, torch.inference_mode():
            prefilled(model)
            states = []
            for token in (7, 900, 7):
                states.append(model.hidden(gap).clone())
                model.token.fill_(token)
                model.slot += 1
                model.bound += 1
            end = int(model.slot)
            rows = model.cache.k[:, :end].clone(), model.cache.v[:, :end].clone()
        found[name] = [*states, *rows]
    # Behind the first product, a rounding to 16 bits now and then becomes one to 8: the two ways part, each
    # as far from unquantised activations as the other.
    new = slice(int(model.slot) - 3, int(model.slot))
    for cache in (3, 4):  # keys and values
        close(found["kernels"][cache][0, new], found["layers"][cache][0, new].float(), 6e-3)
    for at in range(3):
        # peaked attention makes 8 bits cost a quarter here; a wrong token costs all of it
        off = {name: distance(found[name][at], found["exact"][at]) for name in ("layers", "kernels")}
        assert 0.01 < off["kernels"] < 1.2 * off["layers"] + 0.01, off
        assert off["layers"] < 0.4, off
        assert distance(found["kernels"][at], found["layers"][at]) < 0.15
    changed = (found["kernels"][0].float() - found["kernels"][1].float()).norm()
    assert changed > 0.1 * found["kernels"][0].float().norm(), "another token, the same state: nothing tested"


def test_slots_beyond_the_kernels_share_run_through_the_layers(model: Pi0Fast) -> None:
    """The model-space entry may generate more tokens than a chunk has."""
    fused_decode.attach(model, torch.device("cuda"))
    assert model.fused is not None
    prefilled(model)
    calls = []
    kernel = model.fused.hidden
    model.fused.hidden = lambda x, gap: calls.append(model.bound) or kernel(x, gap)
    try:
        with torch.inference_mode():
            for bound in (model.fused.slots - 1, model.fused.slots):
                model.bound = bound
                model.slot.fill_(bound)
                assert torch.isfinite(model.hidden(0).float()).all()
    finally:
        del model.fused.hidden
    assert calls == [model.fused.slots - 1]


def test_an_observing_model_decodes_by_its_layers(model: Pi0Fast) -> None:
    fused_decode.attach(model, torch.device("cuda"))
    assert model.fused is not None
    linear = next(iter(fp8_linears(model.paligemma.stack).values()))
    linear.calibrated = False
    try:
        assert not model.fused.ready()
    finally:
        linear.calibrated = True
    assert np.isfinite(float(model.fused.hidden(torch.ones(1, WIDTH, device="cuda").bfloat16(), 0).sum()))


def test_other_weights_reach_the_kernels_in_place(model: Pi0Fast) -> None:
    """What a captured graph reads is what kernels packed anew would; the model's weights come back."""
    fused_decode.attach(model, torch.device("cuda"))
    assert isinstance(model.fused, fused_decode.FusedDecode)
    names = ("qkv", "out", "gate_up", "down")

    def packed(fused: fused_decode.FusedDecode) -> list[torch.Tensor]:
        return [getattr(layer, name).data.view(torch.uint8) for layer in fused.layers for name in names]

    linears = fp8_linears(model)
    originals = {name: linear.weight.clone() for name, linear in linears.items()}
    where = [each.data_ptr() for each in packed(model.fused)]
    before = [each.clone() for each in packed(model.fused)]
    for linear in linears.values():
        linear.overwrite(linear.weight.flip(0))
    model.weights_changed()
    after, fresh = packed(model.fused), packed(fused_decode.FusedDecode(model, torch.device("cuda")))
    assert [each.data_ptr() for each in after] == where
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for name, linear in linears.items():
        linear.overwrite(originals[name])
    model.weights_changed()
    assert all(torch.equal(a, b) for a, b in zip(packed(model.fused), before, strict=True))
