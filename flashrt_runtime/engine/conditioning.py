"""What differs between pi0's and pi0.5's expert, as the kernels take it: the norms' styles, and the way of
the actions into the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.gemma import GemmaLayer
from ..models import Pi0, Pi05


@dataclass(frozen=True)
class Conditioning:
    """All of it float32 on the device.

    norms: (steps or 1, 2 * depth + 1, 3 or 1, width), rows scale, shift, gate, or scale alone;
    project_in: weight (width, action_dim) and bias (steps or 1, width); mix: pi0's second projection of the
    actions, behind a silu: weight (width, width) and bias (width,).
    """

    norms: Tensor
    project_in: tuple[Tensor, Tensor]
    mix: tuple[Tensor, Tensor] | None = None

    @property
    def adaptive(self) -> bool:
        """Whether the norms have a shift and a gate, and follow the flow's time."""
        return self.norms.shape[2] == 3

    @classmethod
    def of(cls, model: Pi0 | Pi05) -> Conditioning:
        """That of a prepared model."""
        weight, bias = model.action_in.weight, model.action_in.bias
        if isinstance(model, Pi05):
            return cls(model.styles.contiguous(), (weight.contiguous(), bias.view(1, -1)))
        layers = [layer for layer in model.expert.layers if isinstance(layer, GemmaLayer)]
        norms = [norm for layer in layers for norm in (layer.input_norm, layer.post_norm)]
        scales = torch.stack([norm.weight.float() for norm in (*norms, model.expert.norm)])
        # action_in and the action's half of action_time_in are linear with nothing in between: one product
        biases = model.time_bias + F.linear(bias, model.action_half)
        return cls(
            scales.view(1, len(scales), 1, -1).contiguous(),
            ((model.action_half @ weight).contiguous(), biases.contiguous()),
            (model.action_time_out.weight, model.action_time_out.bias),
        )
