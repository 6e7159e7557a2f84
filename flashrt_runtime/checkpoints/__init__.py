"""Checkpoints on disk: openpi safetensors, LeRobot, openpi Orbax; statistics and tokenizers."""

from __future__ import annotations

from .base import Checkpoint, FeatureStats, NormStats
from .reader import open_checkpoint
from .tokenizer import resolve_tokenizer

__all__ = [
    "Checkpoint",
    "FeatureStats",
    "NormStats",
    "open_checkpoint",
    "resolve_tokenizer",
]
