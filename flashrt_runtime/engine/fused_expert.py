"""The denoise steps of pi0's and pi0.5's action expert as one kernel, in place of the model's own loop.

The model stays the definition: this holds packed copies of its expert's weights and gives the same actions,
by test. It serves the published 300M expert in bf16 and fp8, chunks of up to 64 actions, on GPUs that can
hold the kernel's whole grid; elsewhere the model's loop runs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import GEMMA_300M
from ..layers.gemma import GemmaLayer
from ..layers.linear import Linear
from ..layers.norms import EPS
from ..models import FlowPolicy, Pi0, Pi05
from ..models.flow import Guide
from ..ops import expert_steps as steps_op
from ..ops import native
from ..ops.expert_steps import PRODUCTS, ExpertBuffers, ExpertWeights
from ..quantization.fp8 import Fp8Linear, fp8_linears

logger = logging.getLogger(__name__)

MAX_ACTIONS = steps_op.MAX_ROWS
CAPABILITY = (9, 0)
# the whole grid does not fit this device at once
GRID_REFUSALS = ("cudaErrorNotSupported", "cudaErrorCooperativeLaunchTooLarge")


def refusal(model: FlowPolicy, device: torch.device) -> str | None:
    """Why the kernel cannot serve this model on this device, in one line; None when it can."""
    config = model.config
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it needs compute capability 9.0 or newer"
    if not native.available():
        return f"no native kernels: {native.unavailable_reason()}"
    if not isinstance(model, Pi0 | Pi05):
        return f"it serves pi0 and pi05, not {config.policy}"
    if replace(config.expert, depth=GEMMA_300M.depth) != GEMMA_300M:
        return "it serves the published expert's widths only"
    if model.dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {model.dtype}"
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
        self.weights = ExpertWeights(
            packed,
            **_conditioning(model, layers, self.linears),
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
        if not self.fp8:
            return True
        observing = any(_fp8(linear).observing for linears in self.linears.values() for linear in linears)
        scaled = (linear for name in ("out", "down") for linear in self.linears[name])
        return not observing and all(linear.input_scale is not None for linear in scaled)

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


def attach(model: FlowPolicy, device: torch.device) -> None:
    """Give the model the fused expert where it can be had, and say in the log why where not."""
    reason = refusal(model, device)
    if reason is None:
        assert isinstance(model, Pi0 | Pi05)
        fused = FusedExpert(model, device)
        try:
            fused.integrate(torch.zeros(model.config.horizon, model.config.action_dim, device=device))
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            if not any(refused in str(error) for refused in GRID_REFUSALS):
                raise
            reason = str(error)
        else:
            model.fused_expert = fused
    if reason is not None:
        logger.warning("expert by the model's own, slower loop: for the fused kernel, %s", reason)
        for linear in fp8_linears(model).values():
            if not linear.static:
                linear.widen()


def _conditioning(
    model: Pi0 | Pi05, layers: list[GemmaLayer], linears: dict[str, list[Linear]]
) -> dict[str, Any]:
    """What differs between the policies: the norms' styles, and the way of the actions into the expert."""
    weight, bias = model.action_in.weight, model.action_in.bias
    if isinstance(model, Pi05):
        styles = model.styles.contiguous()
        return {
            "norms": styles,
            "shift_products": _shift_products(styles, linears),
            "project_in": (weight.contiguous(), bias.view(1, -1)),
        }
    norms = [norm for layer in layers for norm in (layer.input_norm, layer.post_norm)]
    scales = torch.stack([norm.weight.float() for norm in (*norms, model.expert.norm)])
    # action_in and the action's half of action_time_in are linear with nothing in between: one product
    biases = model.time_bias + F.linear(bias, model.action_half)
    out = model.action_time_out
    return {
        "norms": scales.view(1, -1, 1, steps_op.WIDTH).contiguous(),
        "shift_products": None,
        "project_in": ((model.action_half @ weight).contiguous(), biases.contiguous()),
        "mix": (steps_op.pack_mix(out.weight), out.bias),
    }


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
