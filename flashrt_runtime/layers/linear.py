"""The projection that precision swaps: plain here, 8-bit in `quantization.fp8`."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class Linear(nn.Linear):
    """A large projection of the compute dtype. What feeds it asks `input_scale` for its input's form."""

    @property
    def input_scale(self) -> Tensor | None:
        """float32 scalar when the input is to come as e4m3 of value / scale; None for the compute dtype."""
        return None

    def gelu(self, x: Tensor, reader: Linear) -> Tensor:
        """gelu(self(x)), as `reader` wants its input."""
        return ops.gelu(self(x), reader.input_scale)

    def geglu(self, x: Tensor, reader: Linear) -> Tensor:
        """gelu(gate) * up of self(x) = gate ‖ up, as `reader` wants its input."""
        return ops.geglu(self(x), reader.input_scale)
