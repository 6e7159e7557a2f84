"""What the flow-matching policies share: prefill once, then Euler steps of the action expert
(arXiv:2410.24164).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PolicyConfig
from ..layers.kv_cache import Window
from .prefix import PrefixPolicy


class ExpertKernel(Protocol):
    """The whole integration as one kernel; see `engine.fused_expert`."""

    def ready(self) -> bool:
        """Whether it can stand in for the loop now."""
        ...

    def integrate(self, x: Tensor) -> None:
        """As `FlowPolicy.integrate`."""
        ...


class FlowPolicy(PrefixPolicy):
    """A prefix over images and text, and an action expert that integrates a velocity field from t = 1 to 0.

    dtype is the compute type of the large weights; action input/output projections and x stay float32.
    Subclasses own the expert and its conditioning.
    """

    def __init__(self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool) -> None:
        super().__init__(config, num_views, dtype, rope_bf16)
        self.fused_expert: ExpertKernel | None = None
        width = config.expert.width
        self.action_in = nn.Linear(config.action_dim, width, dtype=torch.float32)
        self.action_out = nn.Linear(width, config.action_dim, dtype=torch.float32)

    @property
    def suffix_capacity(self) -> int:
        """pi0's state token and the actions."""
        return 1 + self.config.horizon

    @property
    def noise_shape(self) -> tuple[int, int]:
        """The flow's start: (horizon, action_dim)."""
        return self.config.horizon, self.config.action_dim

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """N(0, 1)."""
        return torch.randn(self.noise_shape, generator=generator, dtype=torch.float32)

    def new_output(self, device: torch.device) -> Tensor:
        """Actions: (horizon, action_dim) float32."""
        return torch.zeros(self.noise_shape, dtype=torch.float32, device=device)

    def prepare(self, device: torch.device) -> None:
        """As `PrefixPolicy.prepare`, and the conditioning of every denoise step."""
        super().prepare(device)
        self.prepare_conditioning(device)

    @abstractmethod
    def prepare_conditioning(self, device: torch.device) -> None:
        """Precompute the conditioning of every denoise step."""

    def extend_prefix(self, state: Tensor | None) -> None:
        """Append what the expert sees as constant over the denoise steps (pi0's state token); default
        nothing.
        """

    @abstractmethod
    def velocity(self, x: Tensor, step: int) -> Tensor:
        """v(x, t = 1 - step / num_steps): (horizon, action_dim) float32 in and out; after `begin_suffix`."""

    def suffix_window(self, tokens: int) -> Window:
        """Where `tokens` go right behind the valid prefix, wherever that is known."""
        if self.cache.length is not None:
            return Window.at(self.cache.length, tokens)
        return Window.behind(self.prefix_length, tokens, self.prefix_bound)

    def begin_suffix(self) -> None:
        """Place the action tokens; `suffix` is then (window, rotary tables) of every denoise step."""
        window = self.suffix_window(self.config.horizon)
        self.suffix = window, window.rope(self.rope)

    def generate(self, state: Tensor | None, noise: Tensor, out: Tensor) -> None:
        """Actions from noise, both (horizon, action_dim) float32; see `PrefixPolicy.generate`."""
        self.extend_prefix(state)
        out.copy_(noise)
        self.integrate(out)

    def release(self) -> None:
        """The fused expert refers back to the model."""
        self.fused_expert = None

    def integrate(self, x: Tensor) -> None:
        """Integrate dx/dt = v from t = 1 to 0 with num_steps Euler steps, in place.

        x: (horizon, action_dim) float32. Reads the prefix from `cache` and its length from `prefix_length`
        (int32 scalar on the device).
        """
        if self.fused_expert is not None and self.fused_expert.ready():
            self.fused_expert.integrate(x)
            return
        self.begin_suffix()
        for step in range(self.config.num_steps):
            ops.euler_step(x, self.velocity(x, step), -1.0 / self.config.num_steps)

    def sample_actions(
        self,
        images: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None,
        noise: Tensor,
    ) -> Tensor:
        """Actions at t = 0 from noise at t = 1; one observation, any number of valid views and tokens.

        images: (views, 3, size, size) float32 in [-1, 1]; image_mask: (views,) bool; tokens: (text,) int64;
        token_mask: (text,) bool; state: (action_dim,) float32 normalised and padded (pi0 only);
        noise: (horizon, action_dim) float32. Returns (horizon, action_dim) float32 in model space.
        Positions count valid tokens only, so masked views and padded text are dropped: exact, and cheaper.
        """
        return self.sample(images, image_mask, tokens, token_mask, state, noise)
