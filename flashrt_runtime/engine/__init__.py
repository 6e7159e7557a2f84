"""Static buffers and captured CUDA graphs: the whole forward as one launch, for any prompt and state."""

from .engine import Engine

__all__ = ["Engine"]
