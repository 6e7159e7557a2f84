"""What the flow-matching policies share: prefill once, then Euler steps of the action expert
(arXiv:2410.24164).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PolicyConfig
from ..layers.kv_cache import KVCache, Window
from ..layers.paligemma import PaliGemma
from ..layers.rope import rope_tables


class ExpertKernel(Protocol):
    """The whole integration as one kernel; see `engine.fused_expert`."""

    def ready(self) -> bool:
        """Whether it can stand in for the loop now."""
        ...

    def integrate(self, x: Tensor) -> None:
        """As `FlowPolicy.integrate`."""
        ...


class FlowPolicy(nn.Module, ABC):
    """A prefix over images and text, and an action expert that integrates a velocity field from t = 1 to 0.

    dtype is the compute type of the large weights; action input/output projections and x stay float32.
    Subclasses own the expert and its conditioning.
    """

    def __init__(self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool) -> None:
        super().__init__()
        self.config = config
        self.num_views = num_views
        self.dtype = dtype
        self.rope_bf16 = rope_bf16
        self.fused_expert: ExpertKernel | None = None
        self.paligemma = PaliGemma(config.vision, config.prefix, config.vocab_size, dtype)
        width = config.expert.width
        self.action_in = nn.Linear(config.action_dim, width, dtype=torch.float32)
        self.action_out = nn.Linear(width, config.action_dim, dtype=torch.float32)

    @property
    def prefix_capacity(self) -> int:
        """Slots for every view's tokens and a full prompt."""
        return self.num_views * self.config.vision.tokens + self.config.prompt_capacity

    def prepare(self, device: torch.device) -> None:
        """Allocate the static buffers and precompute what depends on nothing but the weights.

        Called once by the loader, after the weights are in place.
        """
        config = self.config
        slots = self.prefix_capacity + 1 + config.horizon
        self.rope = rope_tables(slots, config.expert.head_dim, device, self.rope_bf16)
        self.cache = KVCache(
            config.prefix.depth, slots, config.prefix.num_kv_heads, config.prefix.head_dim, self.dtype, device
        )
        self.prefix_length = torch.zeros((), dtype=torch.int32, device=device)
        self.prefix_bound = 0
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

    def prefill(self, images: Tensor, tokens: Tensor) -> None:
        """Fill the K/V cache from images: (views, 3, size, size) float32 and tokens: (text,) int64, all
        valid.
        """
        x = self.paligemma.embed(images, tokens)
        self.paligemma.fill_cache(x, self.rope, self.cache, Window.at(0, x.shape[0]))
        self.cache.length = self.prefix_bound = x.shape[0]
        self.prefix_length.fill_(x.shape[0])

    def prefill_padded(self, images: Tensor, tokens: Tensor) -> None:
        """`prefill` of tokens: (bucket,) int64 of which only the device knows how many are valid.

        `prefix_length` holds views * patches + valid tokens. Padding lies behind them and is attended by
        nothing.
        """
        x = self.paligemma.embed(images, tokens)
        self.paligemma.fill_cache(x, self.rope, self.cache, Window.padded(x.shape[0], self.prefix_length))
        self.cache.length, self.prefix_bound = None, x.shape[0]

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

    @torch.inference_mode()
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
        self.prefill(images[image_mask], tokens[token_mask])
        self.extend_prefix(state)
        x = noise.clone()
        self.integrate(x)
        return x
