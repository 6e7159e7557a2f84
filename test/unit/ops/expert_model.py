"""Models with the published expert at a few layers, for tests of what stands in for its loop."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashrt_runtime import models
from flashrt_runtime.config import GEMMA_300M, GemmaConfig, PolicyConfig, SiglipConfig
from flashrt_runtime.models import FlowPolicy, Pi05
from flashrt_runtime.models.flow import Guide, guided
from flashrt_runtime.quantization.calibration import Calibrator, estimate
from flashrt_runtime.quantization.fp8 import Fp8Linear, swap_linears

DEPTH, PREFIX = 3, 300


def config(horizon: int = 10, policy: str = "pi05") -> PolicyConfig:
    expert = GemmaConfig(**{**vars(GEMMA_300M), "depth": DEPTH})
    prefix = GemmaConfig(width=64, depth=DEPTH, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=256)
    vision = SiglipConfig(width=64, depth=1, mlp_dim=128, num_heads=4, image_size=224)
    return PolicyConfig(policy, vision, prefix, expert, vocab_size=512, horizon=horizon, prompt_capacity=200)


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


def float32_twin(model: FlowPolicy, policy: PolicyConfig, device: str) -> FlowPolicy:
    """The same model computing in float32, with the weights as the kernels see them."""
    twin = models.build(policy, 2, torch.float32)
    for name, _ in list(twin.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        if owner.startswith("conditioning"):
            continue  # gone from the model: its styles are copied
        module = model.get_submodule(owner)
        value = getattr(module, attribute).float()
        if isinstance(module, Fp8Linear) and attribute == "weight":
            value = value * module.weight_scale
        setattr(twin.get_submodule(owner), attribute, torch.nn.Parameter(value, requires_grad=False))
    if isinstance(model, Pi05):
        twin.prepare_conditioning = lambda _: None
        twin.styles, twin.clean_style = model.styles, model.clean_style
    twin.prepare(torch.device(device))
    twin.cache.k.copy_(model.cache.k)
    twin.cache.v.copy_(model.cache.v)
    return twin


def guide(horizon: int) -> Guide:
    """Random, with rows of weight zero and of weight one; three frozen."""
    weight = torch.rand(horizon, device="cuda")
    weight[::4], weight[1::4] = 0.0, 1.0
    frozen = torch.arange(horizon, device="cuda") < 3
    gains = torch.rand(10, device="cuda") * 2
    return Guide(torch.randn(horizon, 32, device="cuda"), weight, frozen, gains, trained=False)


def with_prefix(*policies: FlowPolicy, length: int = PREFIX) -> None:
    """As after a prefill of so many tokens."""
    for each in policies:
        each.cache.length = each.prefix_bound = length
        each.prefix_length.fill_(length)


def calibrate(model: FlowPolicy, noise: torch.Tensor, state: torch.Tensor | None = None) -> None:
    """Scales of what the expert reads in one integration; the prefix stays as long as it was."""
    calibrator = Calibrator(model)
    collector = calibrator.collector()
    length = int(model.prefix_length)
    with collector.observe():
        if state is not None:
            model.extend_prefix(state)
        model.integrate(noise.clone())
    with_prefix(model, length=length)
    calibrator.apply(estimate(collector, "mse", None)[0])


def check_guided(
    model: FlowPolicy, noise: torch.Tensor, given: Guide, attach: Callable[[], object]
) -> None:
    """Guided by the kernels that `attach` gives the model as by its loop; without weight as if not at all."""
    loop, kernels, plain, zero = (noise.clone() for _ in range(4))
    with guided(model, given):
        model.integrate(loop)
    attach()
    assert model.fused_expert is not None
    with guided(model, given):
        model.integrate(kernels)
    model.integrate(plain)
    error = ((kernels - loop).norm() / (loop - noise).norm()).item()
    assert error < 5e-2, f"relative error {error:.2e}"
    assert torch.equal(kernels[given.frozen], given.target[given.frozen])
    assert (kernels - plain).norm() > 0.2 * (plain - noise).norm()
    nothing = Guide(
        torch.full_like(given.target, float("nan")), torch.zeros_like(given.weight),
        torch.zeros_like(given.frozen), given.gains, trained=False,
    )  # fmt: skip
    with guided(model, nothing):
        model.integrate(zero)
    assert torch.equal(zero.view(torch.int32), plain.view(torch.int32))
