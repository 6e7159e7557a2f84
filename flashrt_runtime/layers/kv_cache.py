"""Keys and values of every layer in one static buffer."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """K and V: (depth, capacity, kv_heads, head_dim) each, allocated once and written in place.

    `length` counts the prefix tokens that are valid; a suffix is written behind them and never advances it,
    so that each denoise step overwrites the last one's keys.
    """

    def __init__(
        self, depth: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k = torch.zeros(depth, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.capacity = capacity
        self.length = 0

    def slots(self, layer: int, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the slots [start, start + tokens) of a layer, to be written in place."""
        return self.k[layer, start : start + tokens], self.v[layer, start : start + tokens]

    def filled(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's first `end` slots."""
        return self.k[layer, :end], self.v[layer, :end]
