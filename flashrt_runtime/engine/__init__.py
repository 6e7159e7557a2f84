"""Static buffers and captured CUDA graphs: the forward as two launches, for any prompt and state."""

from .engine import Engine

__all__ = ["Engine"]
