"""pi0.5: state in the prompt, flow time in the expert's adaptive norms (arXiv:2504.16054)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PolicyConfig
from ..layers.gemma import GemmaStack
from ..layers.linear import Projection
from ..layers.rope import time_embedding
from .flow import FlowPolicy


class TimeConditioning(nn.Module):
    """adaRMS styles of every norm as a function of the flow time alone; float32 throughout."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.mlp_in = Projection(width, width, dtype=torch.float32)
        self.mlp_out = Projection(width, width, dtype=torch.float32)
        self.dense = nn.ModuleList(
            Projection(width, 3 * width, dtype=torch.float32) for _ in range(2 * depth + 1)
        )

    def forward(self, time: float) -> Tensor:
        """Styles at `time` in [0, 1]: (2 * depth + 1, 3, width), rows scale, shift, gate."""
        embedded = time_embedding(time, self.width).to(self.mlp_in.weight.device)
        condition = F.silu(self.mlp_out(F.silu(self.mlp_in(embedded))))
        return torch.stack([dense(condition).view(3, self.width) for dense in self.dense])


class Pi05(FlowPolicy):
    """Prefix of views and text (with discretised state); expert of `horizon` action tokens."""

    styles: Tensor
    clean_style: Tensor

    def __init__(self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool) -> None:
        super().__init__(config, num_views, dtype, rope_bf16)
        self.expert = GemmaStack(config.expert, dtype, adaptive=True, final_norm=True)
        self.conditioning: TimeConditioning | None = TimeConditioning(
            config.expert.width, config.expert.depth
        )

    @torch.inference_mode()
    def prepare_conditioning(self, device: torch.device) -> None:
        """The schedule is fixed, so all styles are computed here and their weights (0.4 GB) freed."""
        assert self.conditioning is not None
        styles = torch.stack([self.conditioning(time) for time in self.times()])
        self.styles = styles.to(device)
        self.clean_style = self.conditioning(0.0).to(device)
        self.conditioning = None

    def velocity(self, x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
        """One pass of the expert over the noisy actions; see `FlowPolicy.velocity`."""
        window, rope = self.suffix
        tokens = self.action_in(x).to(self.dtype)
        styles = self.styles[step]
        if clean is not None:  # a style for each row
            styles = torch.where(clean.unsqueeze(-1), self.clean_style.unsqueeze(2), styles.unsqueeze(2))
        hidden = self.expert.forward_adaptive(tokens, rope, self.cache, window, styles)
        out: Tensor = self.action_out(hidden.float())
        return out
