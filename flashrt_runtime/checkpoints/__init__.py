"""Checkpoints on disk: openpi safetensors, LeRobot, openpi Orbax, random ones; statistics and tokenizers."""

from __future__ import annotations

from .base import Checkpoint, FeatureStats, NormStats
from .random import make_checkpoint
from .reader import open_checkpoint
from .tokenizer import resolve_tokenizer

__all__ = [
    "Checkpoint",
    "FeatureStats",
    "NormStats",
    "make_checkpoint",
    "open_checkpoint",
    "resolve_tokenizer",
]
