"""FP8 projections: e4m3 weights, and e4m3 activations by a static scale that calibration writes.

Weights have one scale each, amax / 448. Activations have one static scale per projection, valid for every
denoise step. The expert's qkv and gate_up read normed rows of a few tokens: their time is the weights', so
their activations stay in 16 bits (W8A16). One kernel departs from that: on Hopper the fused expert of 33 to
64 actions rounds these rows to e4m3 too, by a power of two of each row (native_kernels/expert_normed.cuh).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.linear import Linear

WEIGHT_ONLY = ("qkv", "gate_up")


class Fp8Linear(Linear):
    """A Linear of e4m3 weights (out, in).

    static: its activations are e4m3 of value / input_scale. Until calibrated, and while observing, it takes
    them in the compute dtype and computes with them as they are; `observer` is shown them.
    """

    weight: Tensor
    weight_scale: Tensor
    activation_scale: Tensor
    observer: Callable[[Tensor], None] | None

    def __init__(self, linear: Linear, *, static: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.static = static
        self.calibrated = False
        self.observing = False
        self.observer = None
        self.wide: Tensor | None = None
        self.weight = nn.Parameter(linear.weight.to(ops.E4M3), requires_grad=False)
        self.bias = linear.bias
        for name in ("weight_scale", "activation_scale"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=linear.weight.device))

    @property
    def input_scale(self) -> Tensor | None:
        """float32 scalar on the device, written in place by calibration; None for 16-bit input."""
        return self.activation_scale if self.static and self.calibrated and not self.observing else None

    def set_weight(self, weight: Tensor) -> None:
        """Quantise `weight`: (out, in) floating, on the device the layer is to live on."""
        wide = weight.float()
        scale = (wide.abs().amax() / ops.E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        self.set_quantised(ops.quantise(wide, scale), scale)

    def set_quantised(self, weight: Tensor, scale: Tensor) -> None:
        """Take a weight that is quantised already: (out, in) e4m3 and its float32 scalar."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = scale.reshape(())
        self.activation_scale = torch.ones_like(self.weight_scale)

    @torch.inference_mode()
    def overwrite(self, weight: Tensor) -> None:
        """Another rounding of the same weight, (out, in) e4m3 on any device, where the old one lies."""
        self.weight.copy_(weight)
        if self.wide is not None:
            self.wide.copy_(self.weight)

    def widen(self) -> None:
        """Keep the e4m3 weights in the compute dtype too (exact), for 16-bit products without a conversion
        each time; only where no kernel of ours reads the 8-bit ones.
        """
        self.wide = self.weight.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) of the compute dtype, or e4m3 by `input_scale`. Returns (..., out) of the compute
        dtype.
        """
        if self.observer is not None:
            self.observer(x)
        scale = self.input_scale
        if scale is None:
            weight = self.weight if self.wide is None else self.wide
            return ops.weight_only_linear(x, weight, self.weight_scale, self.bias)
        x = self._quantised(x, scale)
        return ops.scaled_linear(x, self.weight, scale, self.weight_scale, self.bias, self.dtype)

    def gelu(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """In one kernel where there is one for 8-bit input and output."""
        return self._in_one(ops.linear_gelu, super().gelu, x, scale)

    def geglu(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The same."""
        return self._in_one(ops.linear_geglu, super().geglu, x, scale)

    def _in_one(
        self,
        fused: Callable[..., Tensor],
        apart: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        scale: Tensor | None,
    ) -> Tensor:
        own = self.input_scale
        if self.observer is not None or own is None or scale is None:
            return apart(x, scale)
        x = self._quantised(x, own)
        return fused(x, self.weight, own, self.weight_scale, self.bias, scale, self.dtype)

    @staticmethod
    def _quantised(x: Tensor, scale: Tensor) -> Tensor:
        return x if x.dtype == ops.E4M3 else ops.quantise(x, scale)


def swap_linears(model: nn.Module) -> None:
    """Replace every `Linear` of `model` by an `Fp8Linear`, still to be given its weights.

    The float32 projections of actions, state, time and patches are no `Linear` of ours and stay.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and not isinstance(module, Fp8Linear):
            parent, _, attribute = name.rpartition(".")
            static = not (name.startswith("expert.") and attribute in WEIGHT_ONLY)
            setattr(model.get_submodule(parent), attribute, Fp8Linear(module, static=static))


def fp8_linears(model: nn.Module) -> dict[str, Fp8Linear]:
    """Every FP8 projection by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def scales_in_force(linears: Iterable[nn.Module]) -> bool:
    """Whether kernels may read the scales of these: calibrated where they are static, none observing."""
    quantised = [linear for linear in linears if isinstance(linear, Fp8Linear)]
    return all(
        not linear.observing and (not linear.static or linear.input_scale is not None) for linear in quantised
    )


def settle(linears: Iterable[Fp8Linear]) -> None:
    """Wait for what was written on the current stream: whoever gets the model next may use another one."""
    for device in {linear.weight.device for linear in linears}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
