"""What every policy here starts with: a prefix over images and text, left behind as K and V."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import PolicyConfig
from ..layers.kv_cache import KVCache, Window
from ..layers.paligemma import PaliGemma
from ..layers.rope import rope_tables


class PrefixPolicy(nn.Module, ABC):
    """PaliGemma over views and text, and something that generates from its K/V cache.

    dtype is the compute type of the large weights. The engine captures `paligemma.embed_images`,
    and `prefill_padded` and `generate`.
    """

    def __init__(
        self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool, *, head: bool = False
    ) -> None:
        """head: the language model's own output is read, so that it needs its final norm."""
        super().__init__()
        self.config = config
        self.num_views = num_views
        self.dtype = dtype
        self.rope_bf16 = rope_bf16
        self.paligemma = PaliGemma(config.vision, config.prefix, config.vocab_size, dtype, final_norm=head)

    @property
    def prefix_capacity(self) -> int:
        """Slots for every view's tokens and a full prompt."""
        return self.num_views * self.config.vision.tokens + self.config.prompt_capacity

    @property
    @abstractmethod
    def suffix_capacity(self) -> int:
        """Slots for what is generated behind the prefix."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int]:
        """Shape of `generate`'s float32 noise."""

    @abstractmethod
    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Fresh noise of `noise_shape` on the generator's device."""

    @abstractmethod
    def new_output(self, device: torch.device) -> Tensor:
        """An empty result of `generate`."""

    @abstractmethod
    def generate(self, state: Tensor | None, noise: Tensor, out: Tensor) -> None:
        """From the filled cache to `out`, in place; reads the prefix's length on the device."""

    def repeat(self, noise: Tensor, out: Tensor) -> None:
        """One more step behind `generate`, where there are `repeats`."""

    def repeats(self, out: Tensor) -> int:
        """How often `repeat` may follow `generate`."""
        return 0

    @property
    def range_limit(self) -> str | None:
        """What of the kernels alone can make actions NaN, and the way round it; None: nothing."""
        return None

    def done(self) -> Tensor | None:
        """A bool scalar on the device that ends the repeats; None where there are none."""
        return None

    @torch.inference_mode()
    def sample(
        self,
        images: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None,
        noise: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """One observation through `prefill`, `generate` and `repeat`: any number of valid views and tokens.

        images: (views, 3, size, size) float32 in [-1, 1]; image_mask: (views,) bool; tokens: (text,) int64;
        token_mask: (text,) bool; state: (action_dim,) float32 normalised and padded (pi0 only);
        noise: `noise_shape` float32. Returns `new_output`, or `out`, filled.
        Positions count valid tokens only, so masked views and padded text are dropped: exact, and cheaper.
        """
        self.prefill(images[image_mask], tokens[token_mask])
        out = self.new_output(images.device) if out is None else out
        self.generate(state, noise, out)
        done = self.done()
        for _ in range(self.repeats(out)):
            if done is not None and bool(done):
                break
            self.repeat(noise, out)
        return out

    def prepare(self, device: torch.device) -> None:
        """Allocate the static buffers and precompute what depends on nothing but the weights.

        Called once by the loader, after the weights are in place.
        """
        prefix = self.config.prefix
        slots = self.prefix_capacity + self.suffix_capacity
        self.paligemma.vision.prepare()
        self.rope = rope_tables(slots + 1, prefix.head_dim, device, self.rope_bf16)
        self.cache = KVCache(prefix.depth, slots, prefix.num_kv_heads, prefix.head_dim, self.dtype, device)
        self.prefix_length = torch.zeros((), dtype=torch.int32, device=device)
        self.prefix_bound = 0

    def prefill(self, images: Tensor, tokens: Tensor) -> None:
        """Fill the K/V cache from images: (views, 3, size, size) float32 and tokens: (text,) int64, all
        valid.
        """
        x = self.paligemma.embed(self.paligemma.embed_images(images), tokens)
        self.paligemma.fill_cache(x, self.rope, self.cache, Window.at(0, x.shape[0]))
        self.cache.length = self.prefix_bound = x.shape[0]
        self.prefix_length.fill_(x.shape[0])

    def prefill_padded(self, image_features: Tensor, tokens: Tensor) -> None:
        """`prefill` of tokens: (bucket,) int64 of which only the device knows how many are valid.

        image_features: of `paligemma.embed_images`, (views * patches, width).
        `prefix_length` holds views * patches + valid tokens. Padding lies behind them and is attended by
        nothing.
        """
        x = self.paligemma.embed(image_features, tokens)
        self.paligemma.fill_cache(x, self.rope, self.cache, Window.padded(x.shape[0], self.prefix_length))
        self.cache.length, self.prefix_bound = None, x.shape[0]

    def weights_changed(self) -> None:
        """Projections hold other weights: copies that were made of them are made again, in place."""

    def release(self) -> None:
        """Drop what refers back to the model, so that its memory can be freed."""
