"""Projections and tables without values of their own: a checkpoint fills them.

`Linear` is the projection that precision swaps: plain here, 8-bit in `quantization.fp8`.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class Projection(nn.Linear):
    """A projection that keeps its own dtype whatever the precision."""

    def reset_parameters(self) -> None:
        """Draw nothing: torch's own way on the meta device imports its compiler, seconds."""


class Embedding(nn.Embedding):
    """A table of rows."""

    def reset_parameters(self) -> None:
        """Draw nothing, as `Projection`."""


class Linear(Projection):
    """A large projection of the compute dtype. What feeds it asks `input_scale` for its input's form."""

    @property
    def input_scale(self) -> Tensor | None:
        """float32 scalar when the input is to come as e4m3 of value / scale; None for the compute dtype."""
        return None

    def gelu(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """gelu(self(x)), as e4m3 of value / scale where a scale is given."""
        return ops.gelu(self(x), scale)

    def geglu(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """gelu(gate) * up of self(x) = gate ‖ up, as e4m3 of value / scale where a scale is given."""
        return ops.geglu(self(x), scale)
