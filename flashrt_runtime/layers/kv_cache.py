"""Keys and values of every layer in one static buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops


class KVCache:
    """K and V: (depth, capacity, kv_heads, head_dim) each, allocated once and written in place.

    `length` counts the prefix tokens that are valid; a suffix is written behind them and never advances it,
    so that each denoise step overwrites the last one's keys. None: only the device knows (captured graphs).
    """

    def __init__(
        self,
        depth: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.k = torch.zeros(depth, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.capacity = capacity
        self.length: int | None = 0


@dataclass(frozen=True)
class Window:
    """The slots one stack writes and reads.

    Known on the host: slots [start, start + tokens) are written, [0, keys) attended. Known on the device
    only: `slots` (tokens,) int64 are written where they are not [start, start + tokens), and of [0, keys)
    those that are `unmasked` are attended.
    """

    start: int
    tokens: int
    keys: int
    slots: Tensor | None = None
    unmasked: ops.Unmasked | None = None

    @classmethod
    def at(cls, start: int, tokens: int) -> Window:
        """Tokens written at `start`, attending to everything before them and to themselves."""
        return cls(start, tokens, start + tokens)

    @classmethod
    def behind(cls, prefix_length: Tensor, tokens: int, bound: int) -> Window:
        """The same with `start` = prefix_length, an int32 scalar on the device that is at most `bound`."""
        slots = prefix_length.long() + torch.arange(tokens, device=prefix_length.device)
        keys = bound + tokens
        return cls(0, tokens, keys, slots, ops.Unmasked(tokens, keys, prefix_length + tokens))

    @classmethod
    def padded(cls, tokens: int, valid_tokens: Tensor) -> Window:
        """Tokens at slot 0 of which the first `valid_tokens` (int32 scalar) are attended, not the rest."""
        return cls(0, tokens, tokens, None, ops.Unmasked(tokens, tokens, valid_tokens))

    @property
    def written(self) -> slice | Tensor:
        """Index of the written slots."""
        return slice(self.start, self.start + self.tokens) if self.slots is None else self.slots

    def rope(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of the rotary tables for the tokens' positions: (tokens, head_dim / 2) each."""
        cos, sin = tables
        return cos[self.written], sin[self.written]
