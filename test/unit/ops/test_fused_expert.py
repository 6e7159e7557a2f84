"""The fused expert inside a model: the same actions as the model's own loop."""

from __future__ import annotations

import pytest
import torch

from flashrt_runtime import models
from flashrt_runtime.config import GEMMA_300M, GemmaConfig, PolicyConfig, SiglipConfig
from flashrt_runtime.engine import fused_expert
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.quantization.calibration import Calibrator, estimate
from flashrt_runtime.quantization.fp8 import Fp8Linear, swap_linears

DEPTH, PREFIX = 3, 300


def config(horizon: int = 10) -> PolicyConfig:
    expert = GemmaConfig(**{**vars(GEMMA_300M), "depth": DEPTH})
    prefix = GemmaConfig(width=64, depth=DEPTH, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=256)
    vision = SiglipConfig(width=64, depth=1, mlp_dim=128, num_heads=4, image_size=224)
    return PolicyConfig("pi05", vision, prefix, expert, vocab_size=512, horizon=horizon, prompt_capacity=200)


def random_model(policy: PolicyConfig, fp8: bool, device: str) -> FlowPolicy:
    model = models.build(policy, 2, torch.bfloat16)
    if fp8:
        swap_linears(model)
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        scale = 0.3 if "dense" in name or parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        value = torch.randn(parameter.shape, device=device) * scale
        module = model.get_submodule(owner)
        if isinstance(module, Fp8Linear) and attribute == "weight":
            module.set_weight(value)
        else:
            setattr(module, attribute, torch.nn.Parameter(value.to(parameter.dtype), requires_grad=False))
    model.prepare(torch.device(device))
    return model


def test_refused_without_gpu() -> None:
    model = models.build(config(), 2, torch.bfloat16)
    assert fused_expert.refusal(model, torch.device("cpu")) == "it needs a GPU"


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("horizon", [1, 10, 16])
def test_same_actions_as_the_loop(fp8: bool, horizon: int) -> None:
    model = random_model(config(horizon), fp8, "cuda")
    for cache in (model.cache.k, model.cache.v):
        cache.normal_()
    model.cache.length = model.prefix_bound = PREFIX
    model.prefix_length.fill_(PREFIX)
    noise = torch.randn(horizon, 32, device="cuda")
    if fp8:
        calibrator = Calibrator(model)
        collector = calibrator.collector()
        with collector.observe():
            model.integrate(noise.clone())
        calibrator.apply(estimate(collector, "mse", None)[0])
    loop, fused = noise.clone(), noise.clone()
    model.integrate(loop)
    fused_expert.attach(model, torch.device("cuda"))
    assert model.fused_expert is not None
    assert model.fused_expert.ready()
    model.integrate(fused)
    error = (fused - loop).norm() / (loop - noise).norm()
    assert error < (3e-2 if fp8 else 1e-2), f"relative error {error:.2e}"


@pytest.mark.gpu
@torch.inference_mode()
def test_calibration_reaches_the_kernel() -> None:
    model = random_model(config(), True, "cuda")
    fused_expert.attach(model, torch.device("cuda"))
    assert isinstance(model.fused_expert, fused_expert.FusedExpert)
    assert not model.fused_expert.ready()
    calibrator = Calibrator(model)
    model.cache.length = model.prefix_bound = PREFIX
    model.prefix_length.fill_(PREFIX)
    collector = calibrator.collector()
    with collector.observe():
        model.integrate(torch.randn(10, 32, device="cuda"))
    calibrator.apply(estimate(collector, "mse", None)[0])
    assert model.fused_expert.ready()
    table = model.fused_expert.weights.input_scale
    assert table is not None
    first = model.expert.layers[0].out.activation_scale
    assert table[0, 0] == first
    assert first.data_ptr() == table.data_ptr()
