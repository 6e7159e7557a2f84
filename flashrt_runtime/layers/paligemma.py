"""The prefix: camera views and prompt tokens through PaliGemma into a K/V cache (arXiv:2407.07726)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..config import GemmaConfig, SiglipConfig
from .gemma import GemmaStack
from .kv_cache import KVCache, Window
from .linear import Embedding
from .siglip import Siglip


class PaliGemma(nn.Module):
    """SigLIP, token embedding and the Gemma prefix stack; the last layer stops at its K and V.

    final_norm: the stack is also read behind its last layer, by whoever generates text with it.
    """

    def __init__(
        self,
        vision: SiglipConfig,
        prefix: GemmaConfig,
        vocab_size: int,
        dtype: torch.dtype,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.width = prefix.width
        self.vision = Siglip(vision, prefix.width, dtype)
        self.embedding = Embedding(vocab_size, prefix.width, dtype=dtype)
        self.stack = GemmaStack(prefix, dtype, adaptive=False, final_norm=final_norm)

    def embed_images(self, images: Tensor) -> Tensor:
        """images: (views, 3, size, size) float32, or their patches. Returns (views * patches, width)."""
        image_features: Tensor = self.vision(images).flatten(0, 1)
        return image_features

    def embed(self, image_features: Tensor, tokens: Tensor) -> Tensor:
        """image_features: of `embed_images`; tokens: (text,) int64. Returns (views * patches + text, width).

        Text embeddings are scaled by sqrt(width), image embeddings are not.
        """
        x: Tensor = image_features.new_empty(image_features.shape[0] + tokens.shape[0], self.width)
        ops.assign(x[: image_features.shape[0]], image_features)
        self.embed_text(tokens, x[image_features.shape[0] :])
        return x

    def embed_text(self, tokens: Tensor, out: Tensor) -> Tensor:
        """Scaled embeddings of tokens: (text,) int64, written to `out`: (text, width)."""
        return ops.embed_tokens(self.embedding.weight, tokens, math.sqrt(self.width), out)

    def fill_cache(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, window: Window) -> None:
        """Run the prefix stack over x: (tokens, width) and leave its K and V in the window's slots."""
        self.stack.fill_cache(x, window.rope(rope), cache, window)
