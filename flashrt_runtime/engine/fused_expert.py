"""The denoise steps of pi0's and pi0.5's action expert as one kernel, in place of the model's own loop.

The model stays the definition: this holds packed copies of its expert's weights and gives the same actions,
by test. It serves the published 300M expert in bf16 and fp8, chunks of up to 64 actions, on GPUs that can
hold the kernel's whole grid; elsewhere see `expert_ways`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import GEMMA_300M, PolicyConfig
from ..layers.gemma import GemmaLayer
from ..layers.linear import Linear
from ..layers.norms import EPS
from ..models import FlowPolicy, Pi0, Pi05
from ..models.flow import Guide
from ..ops import expert_steps as steps_op
from ..ops.expert_steps import PRODUCTS, ExpertBuffers, ExpertWeights
from ..quantization.fp8 import Fp8Linear, scales_in_force
from .conditioning import Conditioning
from .gpu import Gpu
from .probing import attach_expert

MAX_ACTIONS = steps_op.MAX_ROWS
CAPABILITY = (9, 0)
SHARED_BYTES = 128 << 10  # of a multiprocessor, at the least; how much for which keys, the launcher knows


def refusal(config: PolicyConfig, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    """Why the kernel cannot serve such a model on this GPU, in one line; None when it can, as far as is known
    before its launch.
    """
    if gpu is None:
        return "it needs a GPU"
    if gpu.capability < CAPABILITY:
        return f"it needs compute capability 9.0 or newer, not {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.multiprocessors < steps_op.BLOCKS:
        return f"it needs {steps_op.BLOCKS} multiprocessors, not {gpu.multiprocessors}"
    if gpu.shared_bytes < SHARED_BYTES:
        need, found = SHARED_BYTES >> 10, gpu.shared_bytes >> 10
        return f"it needs {need} KB of shared memory a multiprocessor, not {found}"
    if gpu.no_kernels is not None:
        return f"no native kernels: {gpu.no_kernels}"
    if config.policy not in ("pi0", "pi05"):
        return f"it serves pi0 and pi05, not {config.policy}"
    if replace(config.expert, depth=GEMMA_300M.depth) != GEMMA_300M:
        return "it serves the published expert's widths only"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {dtype}"
    if config.horizon > MAX_ACTIONS:
        return f"it serves chunks of up to {MAX_ACTIONS} actions, not {config.horizon}"
    return None


class FusedExpert:
    """Packed weights, conditioning and scratch of one model's expert."""

    def __init__(self, model: Pi0 | Pi05, device: torch.device) -> None:
        self.model = model
        layers = [layer for layer in model.expert.layers if isinstance(layer, GemmaLayer)]
        self.linears = {name: [_linear(layer, name) for layer in layers] for name in PRODUCTS}
        packed = {
            name: torch.stack([steps_op.pack_chunks(linear.weight, name) for linear in linears])
            for name, linears in self.linears.items()
        }
        self.fp8 = isinstance(self.linears["qkv"][0], Fp8Linear)
        weight_scale = input_scale = None
        if self.fp8:
            scales = [
                [_fp8(linears[i]).weight_scale for linears in self.linears.values()]
                for i in range(len(layers))
            ]
            weight_scale = torch.stack([torch.stack(row) for row in scales]).float().contiguous()
            input_scale = self._share_input_scales(len(layers), device)
        conditioning = Conditioning.of(model)
        mix, norms = conditioning.mix, conditioning.norms
        self.weights = ExpertWeights(
            packed,
            norms,
            _shift_products(norms, self.linears) if conditioning.adaptive else None,
            conditioning.project_in,
            mix=None if mix is None else (steps_op.pack_mix(mix[0]), mix[1]),
            project_out=(model.action_out.weight.contiguous(), model.action_out.bias),
            weight_scale=weight_scale,
            input_scale=input_scale,
        )
        self.state_weights = _of_state(model, self.weights) if isinstance(model, Pi0) else None
        self.buffers = ExpertBuffers.allocate(model.config.horizon, device)

    def _share_input_scales(self, layers: int, device: torch.device) -> Tensor:
        """One table of the activation scales of out and down; the linears' scalars become views of it,
        so that calibration writes what the kernel reads.
        """
        table = torch.ones(layers, 2, dtype=torch.float32, device=device)
        for column, name in enumerate(("out", "down")):
            for layer, linear in enumerate(self.linears[name]):
                table[layer, column] = _fp8(linear).activation_scale
                _fp8(linear).activation_scale = table[layer, column]
        return table

    @torch.inference_mode()
    def repack(self) -> None:
        """The linears' weights as they are now, in the buffers that captured graphs read."""
        for name, linears in self.linears.items():
            for layer, linear in enumerate(linears):
                self.weights.products[name][layer].copy_(steps_op.pack_chunks(linear.weight, name))
        if self.weights.shift_products is not None:
            self.weights.shift_products.copy_(_shift_products(self.weights.norms, self.linears))

    def ready(self) -> bool:
        """Whether activation scales are in force; until then, and while observing, the model's loop runs."""
        return scales_in_force(linear for linears in self.linears.values() for linear in linears)

    @property
    def range_limit(self) -> str | None:
        """See `PrefixPolicy.range_limit`: e4m3 rows become NaN where they outgrow their power of two."""
        rows = self.model.config.horizon
        if not self.fp8 or rows <= steps_op.WIDE_ROWS:
            return None
        return (
            f"it may be the fp8 kernel for chunks of {rows} actions, which holds rows in 8 bits and gives up "
            "one that changes too much from layer to layer: load with expert='chain' (16 bits) or "
            "precision='bf16'"
        )

    def integrate(self, x: Tensor, guide: Guide | None = None) -> None:
        """`FlowPolicy.integrate` for x: (horizon, action_dim) float32, in place; see `ExpertKernel`."""
        model = self.model
        guidance = None
        if guide is not None:
            weight = guide.weight.unsqueeze(-1).expand_as(x).contiguous()
            guidance = steps_op.Guidance(guide.gains, weight, guide.target)
        self._launch(self.weights, x, model.config.num_steps, guidance=guidance)

    def fill_cache(self, state: Tensor) -> None:
        """Keys and values of pi0's state token into the cache, behind the prefix: one step of one row.

        state: (action_dim,) float32, normalised and padded. What follows the last layer's keys is computed
        and used by nothing: a part of one layer visit in eighteen.
        """
        assert self.state_weights is not None
        self._launch(self.state_weights, state.view(1, -1), 1, fill=True)

    def _launch(
        self,
        weights: ExpertWeights,
        x: Tensor,
        steps: int,
        guidance: steps_op.Guidance | None = None,
        fill: bool = False,
    ) -> None:
        model = self.model
        steps_op.expert_steps(
            weights,
            self.buffers,
            x,
            steps,
            model.rope,
            model.prefix_length,
            model.cache.k,
            model.cache.v,
            EPS,
            guidance,
            fill,
        )


def attach(model: FlowPolicy, device: torch.device) -> str | None:
    """Give the model the fused expert where it can be had; else the reason why not, in one line."""
    return attach_expert(model, device, refusal, FusedExpert)


def _of_state(model: Pi0, weights: ExpertWeights) -> ExpertWeights:
    """The same layers behind the state's projection, which knows no time."""
    projection = model.state_in
    return replace(
        weights, project_in=(projection.weight.contiguous(), projection.bias.view(1, -1)), mix=None
    )


def _shift_products(styles: Tensor, linears: dict[str, list[Linear]]) -> Tensor:
    qkv, gate_up = (torch.stack([*map(_dense, linears[name])]) for name in ("qkv", "gate_up"))
    return steps_op.shift_products(styles, qkv, gate_up)


def _linear(layer: GemmaLayer, name: str) -> Linear:
    linear = getattr(layer, name)
    assert isinstance(linear, Linear)
    return linear


def _fp8(linear: Linear) -> Fp8Linear:
    assert isinstance(linear, Fp8Linear)
    return linear


def _dense(linear: Linear) -> Tensor:
    """The weight as it multiplies: bf16, or float32 of the dequantised e4m3."""
    if isinstance(linear, Fp8Linear):
        return linear.weight.float() * linear.weight_scale
    return linear.weight
