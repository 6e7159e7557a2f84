"""What the flow-matching policies share: prefill once, then Euler steps of the action expert
(arXiv:2410.24164).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import PolicyConfig
from ..layers.kv_cache import Window
from ..layers.linear import Projection
from .prefix import PrefixPolicy


class ExpertKernel(Protocol):
    """The whole integration by kernels of its own: one, `engine.fused_expert`, or `engine.expert_chain`."""

    def ready(self) -> bool:
        """Whether it can stand in for the loop now."""
        ...

    def integrate(self, x: Tensor, guide: Guide | None = None) -> None:
        """As `FlowPolicy.integrate`, but for trained guides; the frozen rows are left as they come out."""
        ...

    def fill_cache(self, state: Tensor) -> None:
        """What `FlowPolicy.extend_prefix` leaves in the cache for a state (action_dim,), but the length."""
        ...

    def repack(self) -> None:
        """Copies of the model's weights are made again, where they lie."""
        ...

    @property
    def range_limit(self) -> str | None:
        """See `PrefixPolicy.range_limit`."""
        ...


@dataclass(frozen=True)
class Guide:
    """Real-time chunking on the device; see `processing.guidance.GuideArrays`.

    trained: the frozen rows are clean inputs of the network, instead of the end of a correction. All zeros
    leave the flow as it is without, bit for bit.
    """

    target: Tensor
    weight: Tensor
    frozen: Tensor
    gains: Tensor
    trained: bool

    def overwrite(self, x: Tensor) -> None:
        """Put the target in the frozen rows of x, in place."""
        x.copy_(torch.where(self.frozen.unsqueeze(-1), self.target, x))


class FlowPolicy(PrefixPolicy):
    """A prefix over images and text, and an action expert that integrates a velocity field from t = 1 to 0.

    dtype is the compute type of the large weights; action input/output projections and x stay float32.
    Subclasses own the expert and its conditioning.
    """

    def __init__(self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool) -> None:
        super().__init__(config, num_views, dtype, rope_bf16)
        self.fused_expert: ExpertKernel | None = None
        self.accumulate_time = False
        self.guide: Guide | None = None  # what an integration has to go on from; see `guided`
        width = config.expert.width
        self.action_in = Projection(config.action_dim, width, dtype=torch.float32)
        self.action_out = Projection(width, config.action_dim, dtype=torch.float32)

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

    def times(self) -> list[float]:
        """The flow's time at each denoise step: 1, 1 - 1/N, ..., 1/N."""
        steps = self.config.num_steps
        if self.accumulate_time:
            added: list[float] = np.cumsum([1.0] + [-1.0 / steps] * (steps - 1), dtype=np.float32).tolist()
            return added
        return [1.0 - step / steps for step in range(steps)]

    @abstractmethod
    def prepare_conditioning(self, device: torch.device) -> None:
        """Precompute the conditioning of every denoise step."""

    def extend_prefix(self, state: Tensor | None) -> None:
        """Append what the expert sees as constant over the denoise steps (pi0's state token); default
        nothing.
        """

    @abstractmethod
    def velocity(self, x: Tensor, step: int, clean: Tensor | None = None) -> Tensor:
        """v(x, t = 1 - step / num_steps): (horizon, action_dim) float32 in and out; after `begin_suffix`.

        clean: (horizon,) bool, rows of x that are at t = 0 already.
        """

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
        ops.assign(out, noise)
        self.integrate(out)

    def weights_changed(self) -> None:
        """The fused expert has packed copies."""
        if self.fused_expert is not None:
            self.fused_expert.repack()

    @property
    def range_limit(self) -> str | None:
        """That of the kernels that integrate."""
        return None if self.fused_expert is None else self.fused_expert.range_limit

    def release(self) -> None:
        """The fused expert refers back to the model."""
        self.fused_expert = None

    def integrate(self, x: Tensor) -> None:
        """Integrate dx/dt = v from t = 1 to 0 with num_steps Euler steps, in place.

        x: (horizon, action_dim) float32. Reads the prefix from `cache` and its length from `prefix_length`
        (int32 scalar on the device). Follows `guide`; the fused expert has one flow time for all rows, so it
        cannot follow a trained one.
        """
        guide, fused = self.guide, self.fused_expert
        trained = guide is not None and guide.trained
        if fused is not None and fused.ready() and not trained:
            fused.integrate(x, guide)
        else:
            self.begin_suffix()
            for step in range(self.config.num_steps):
                ops.euler_step(x, self.guided_velocity(x, step, guide), -1.0 / self.config.num_steps)
        if guide is not None:
            guide.overwrite(x)

    def guided_velocity(self, x: Tensor, step: int, guide: Guide | None) -> Tensor:
        """`velocity`, corrected so that the flow ends near the guide's target."""
        if guide is None:
            return self.velocity(x, step)
        if guide.trained:
            guide.overwrite(x)
            return self.velocity(x, step, guide.frozen)
        time = 1.0 - step / self.config.num_steps
        velocity = self.velocity(x, step)
        return ops.guide_velocity(velocity, x, guide.target, guide.weight, guide.gains[step], time)

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


@contextmanager
def guided(model: PrefixPolicy, guide: Guide | None) -> Iterator[None]:
    """Within, what `model` integrates goes on from `guide`; None changes nothing."""
    if guide is None:
        yield
        return
    assert isinstance(model, FlowPolicy)
    model.guide = guide
    try:
        yield
    finally:
        model.guide = None
