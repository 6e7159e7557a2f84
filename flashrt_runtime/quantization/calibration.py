"""Static activation scales from what the projections really see: a running maximum over samples and denoise
steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ActionError
from ..ops import E4M3_MAX
from .fp8 import Fp8Linear, fp8_linears


class Calibrator:
    """Observes a model's FP8 projections and writes their activation scales in place.

    scale = max |activation| / 448 over everything observed since `reset`: one scale per projection covers
    every denoise step. Scales live on the device, so a captured graph uses new ones from its next replay
    on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.linears: dict[str, Fp8Linear] = {
            name: linear for name, linear in fp8_linears(model).items() if linear.static
        }

    @property
    def calibrated(self) -> bool:
        """Whether scales are in force."""
        return any(linear.calibrated for linear in self.linears.values())

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Within it, projections take unquantised activations and record their largest magnitude."""
        for linear in self.linears.values():
            linear.observing = True
        try:
            yield
        finally:
            for linear in self.linears.values():
                linear.observing = False

    @contextmanager
    def assumed(self) -> Iterator[None]:
        """Within it, projections quantise their input by the scale they have, calibrated or not: for
        capturing.
        """
        before = {name: linear.calibrated for name, linear in self.linears.items()}
        for linear in self.linears.values():
            linear.calibrated = True
        try:
            yield
        finally:
            for name, linear in self.linears.items():
                linear.calibrated = before[name]

    def reset(self) -> None:
        """Forget what was observed; the scales in force stay."""
        for linear in self.linears.values():
            linear.amax.zero_()

    def drop(self) -> None:
        """No scales are in force any more."""
        for linear in self.linears.values():
            linear.calibrated = False

    @torch.inference_mode()
    def apply(self) -> None:
        """Write the scales. What nothing reached (the last prefix layer's unused half) keeps 1."""
        broken = [name for name, linear in self.linears.items() if not torch.isfinite(linear.amax)]
        if broken:
            raise ActionError(
                f"calibration: activations of {len(broken)} projections are not finite, first {broken[0]}: "
                "the scales in force stay"
            )
        for linear in self.linears.values():
            scale = linear.amax / E4M3_MAX
            linear.activation_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
            linear.calibrated = True

    def scales(self) -> dict[str, float]:
        """Activation scale of every statically scaled projection, by name."""
        return {name: float(linear.activation_scale) for name, linear in self.linears.items()}
