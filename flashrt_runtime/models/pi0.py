"""pi0: one state token before the actions, flow time mixed into each action token (arXiv:2410.24164)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PolicyConfig
from ..errors import ObservationError
from ..layers.gemma import GemmaStack
from ..layers.linear import Projection
from ..layers.rope import time_embedding
from .flow import FlowPolicy


class Pi0(FlowPolicy):
    """Prefix of views and text; expert of one state token and `horizon` action tokens.

    The state token sees the prefix and itself, never the actions or the time: its K and V are constant over
    the denoise steps, so it is run once and becomes the last slot of the prefix.
    """

    time_bias: Tensor
    clean_bias: Tensor

    def __init__(self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool) -> None:
        super().__init__(config, num_views, dtype, rope_bf16)
        width = config.expert.width
        self.expert = GemmaStack(config.expert, dtype, adaptive=False, final_norm=True)
        self.state_in = Projection(config.action_dim, width, dtype=torch.float32)
        self.action_time_in = Projection(2 * width, width, dtype=torch.float32)
        self.action_time_out = Projection(width, width, dtype=torch.float32)

    @torch.inference_mode()
    def prepare_conditioning(self, device: torch.device) -> None:
        """concat(action, time) @ W = action @ W_a + time @ W_t: the time half is computed here for every
        step.
        """
        width = self.config.expert.width
        self.action_half = self.action_time_in.weight[:, :width].contiguous()
        time_half, bias = self.action_time_in.weight[:, width:], self.action_time_in.bias
        embedded = torch.stack([time_embedding(time, width) for time in self.times()])
        self.time_bias = F.linear(embedded.to(device), time_half, bias)
        self.clean_bias = F.linear(time_embedding(0.0, width).to(device), time_half, bias)

    def extend_prefix(self, state: Tensor | None) -> None:
        """Run the state token through the expert and leave its K and V behind the prefix."""
        if state is None:
            raise ObservationError("pi0 needs the robot's state with every observation; none was given")
        fused = self.fused_expert
        if fused is not None and fused.ready():
            fused.fill_cache(state)
        else:
            token = self.state_in(state).to(self.dtype).unsqueeze(0)
            window = self.suffix_window(1)
            self.expert.fill_cache(token, window.rope(self.rope), self.cache, window)
        if self.cache.length is not None:
            self.cache.length += 1
        self.prefix_bound += 1
        self.prefix_length += 1

    def velocity(self, x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
        """One pass of the expert over the noisy actions; see `FlowPolicy.velocity`."""
        window, rope = self.suffix
        mixed = F.linear(self.action_in(x), self.action_half, self.time_bias[step])
        if clean is not None:
            mixed = mixed + torch.where(clean.unsqueeze(-1), self.clean_bias - self.time_bias[step], 0.0)
        tokens = self.action_time_out(F.silu(mixed)).to(self.dtype)
        hidden = self.expert(tokens, rope, self.cache, window)
        out: Tensor = self.action_out(hidden.float())
        return out
