"""Keys and values of every layer in one static buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    those with `valid` (keys,) bool are attended. `lengths` says the same cumulatively: (2,) int32 each, of
    queries and keys.
    """

    start: int
    tokens: int
    keys: int
    slots: Tensor | None = None
    valid: Tensor | None = None
    lengths: tuple[Tensor, Tensor] | None = None

    @classmethod
    def at(cls, start: int, tokens: int) -> Window:
        """Tokens written at `start`, attending to everything before them and to themselves."""
        return cls(start, tokens, start + tokens)

    @classmethod
    def behind(cls, prefix_length: Tensor, tokens: int, bound: int) -> Window:
        """The same with `start` = prefix_length, an int32 scalar on the device that is at most `bound`."""
        slots = prefix_length.long() + torch.arange(tokens, device=prefix_length.device)
        length = prefix_length + tokens
        valid = torch.arange(bound + tokens, device=prefix_length.device) < length
        return cls(0, tokens, bound + tokens, slots, valid, _cumulative(tokens, length))

    @classmethod
    def padded(cls, tokens: int, valid_tokens: Tensor) -> Window:
        """Tokens at slot 0 of which the first `valid_tokens` (int32 scalar) are attended, not the rest."""
        valid = torch.arange(tokens, device=valid_tokens.device) < valid_tokens
        return cls(0, tokens, tokens, None, valid, _cumulative(tokens, valid_tokens))

    @property
    def written(self) -> slice | Tensor:
        """Index of the written slots."""
        return slice(self.start, self.start + self.tokens) if self.slots is None else self.slots

    def rope(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of the rotary tables for the tokens' positions: (tokens, head_dim / 2) each."""
        cos, sin = tables
        return cos[self.written], sin[self.written]


def _cumulative(queries: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(0, queries) and (0, keys) as int32 tensors on the device."""
    zero = torch.zeros_like(keys)
    return torch.stack((zero, zero + queries)), torch.stack((zero, keys))
