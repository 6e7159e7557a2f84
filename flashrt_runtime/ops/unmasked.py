"""Which keys count where only the device knows how many."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Unmasked:
    """The first `count` of `keys` keys, for `queries` queries that all see the same ones.

    count: int32 scalar on the device. The other forms of it are read by some kernels and not by others: each
    is made when it is first asked for.
    """

    def __init__(self, queries: int, keys: int, count: Tensor) -> None:
        self.queries, self.keys, self.count = queries, keys, count

    @cached_property
    def mask(self) -> Tensor:
        """(keys,) bool, True = attend."""
        return torch.arange(self.keys, device=self.count.device) < self.count

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Cumulative lengths of queries and of unmasked keys: (2,) int32 each."""
        zero = torch.zeros_like(self.count)
        return torch.stack((zero, zero + self.queries)), torch.stack((zero, self.count))
