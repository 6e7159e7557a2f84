"""Checkpoints nobody trained: random, scripted, or known in closed form; for tests, demos and benchmarks."""

from __future__ import annotations

from .random import make_checkpoint

__all__ = ["make_checkpoint"]
