"""What a layout's reader is told and what it finds: between the steps of `reader` and each layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import NO_DECODING, DecodeConfig, FamilyRules
from .base import NormStats


@dataclass(frozen=True)
class Hints:
    """What the caller of `open_checkpoint` insists on; None leaves it to the files."""

    config: str = "auto"
    rules: Mapping[str, object] = field(default_factory=dict)
    action_horizon: int | None = None
    asset_id: str | None = None
    state_dim: int | None = None
    action_dim: int | None = None
    delta_actions: tuple[bool, ...] | None = None
    verify_weights: bool = True
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Facts:
    """What a layout's reader found out besides the tensors."""

    where: Path
    rules: FamilyRules
    horizon: int
    prompt_capacity: int
    num_steps: int
    dims: Mapping[str, object] | None = None
    declared: Mapping[str, int | None] = field(default_factory=dict)
    norm_stats: NormStats | None = None
    norm_stats_file: Path | None = None
    views: tuple[str, ...] | None = None
    empty_cameras: int = 0
    state_names: tuple[str, ...] | None = None
    action_names: tuple[str, ...] | None = None
    action_rate_hz: float | None = None
    action_representation: str | None = None
    state_dim: int | None = None
    action_dim: int | None = None
    delta_actions: tuple[bool, ...] | None = None
    rtc_training_max_delay: int | None = None
    tokenizer: Path | None = None
    untrained: bool = False
    notes: tuple[str, ...] = ()
    decode: DecodeConfig = NO_DECODING
