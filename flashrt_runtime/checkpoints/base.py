"""What every checkpoint layout is turned into: one `Checkpoint`, opened by `open_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import FamilyRules, PolicyConfig

Layout = Literal["openpi-pytorch", "lerobot", "openpi-orbax"]


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of one feature over the training data, in physical units: float64 arrays (n,) or None."""

    mean: NDArray[np.float64] | None = None
    std: NDArray[np.float64] | None = None
    q01: NDArray[np.float64] | None = None
    q99: NDArray[np.float64] | None = None
    min: NDArray[np.float64] | None = None
    max: NDArray[np.float64] | None = None
    q10: NDArray[np.float64] | None = None
    q90: NDArray[np.float64] | None = None

    @property
    def width(self) -> int:
        """Number of dimensions; 0 when there is no statistic at all."""
        return max((value.shape[0] for value in self.arrays().values()), default=0)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The statistics that are present, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class NormStats:
    """Statistics of the robot's state and of its actions; None where the checkpoint has none."""

    state: FeatureStats | None = None
    actions: FeatureStats | None = None


class TensorStore(Protocol):
    """Named tensors on disk, read lazily."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by stored name."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """Storage dtype of every tensor, by stored name."""
        ...

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, memory-mapped where the format allows it."""
        ...

    def close(self) -> None:
        """Release the files; tensors handed out stay valid."""
        ...


@dataclass
class Checkpoint:
    """An opened checkpoint: configuration, rules and statistics read and checked, weights still on disk.

    Keys are openpi's PyTorch names without LeRobot's "model." prefix; the token embedding is always
    `paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight`, whatever name it is stored
    under.
    """

    path: Path
    layout: Layout
    config: PolicyConfig
    rules: FamilyRules
    store: TensorStore
    stored_keys: Mapping[str, str]
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

    def keys(self) -> tuple[str, ...]:
        """Canonical names of the policy's tensors."""
        return tuple(self.stored_keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self.store.shapes()[self.stored_keys[key]]

    def dtype(self, key: str) -> torch.dtype:
        """Storage dtype of one tensor, without reading it."""
        return self.store.dtypes()[self.stored_keys[key]]

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor in its storage dtype, memory-mapped from the file (treat it as read-only)."""
        return self.store.tensor(self.stored_keys[key])

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.store.files)

    def close(self) -> None:
        """Release the weight files."""
        self.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(
    path: str | Path,
    framework: str = "torch",
    config: str = "auto",
    *,
    rules: Mapping[str, object] | None = None,
    action_horizon: int | None = None,
    asset_id: str | None = None,
    state_dim: int | None = None,
    action_dim: int | None = None,
    delta_actions: Sequence[bool] | None = None,
    verify_weights: bool = True,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint directory: find its layout, read its configuration and statistics, check every
    tensor.

    path: an openpi PyTorch directory (model.safetensors, assets/), a LeRobot policy directory (config.json
    with a `type`), an openpi Orbax directory (params/), or, as a str, a hub id "owner/name" where
    `huggingface_hub` is installed and there is no such directory. ./owner/name is a path and no id.
    framework: "torch" reads safetensors, "jax" reads Orbax.
    config: "pi05", "pi0" or "pi0fast" insists on that policy; "auto" takes what the tensors say.
    rules: overrides of single `FamilyRules` fields, e.g. {"state_in_prompt": False}.
    action_horizon, state_dim, action_dim, delta_actions: facts that openpi's layout does not record; each
    overrides what the files say.
    asset_id: which folder of assets/ holds the statistics, when there are several.
    verify_weights: read every tensor once and refuse non-finite ones (memory bandwidth of the mapped file,
    about 0.05 s/GB from a warm page cache); without it only names, shapes and statistics are checked.
    cache_dir: where converted Orbax weights are kept; default $FLASHRT_CACHE_DIR or ~/.cache/flash_rt.

    Nothing is allocated on any device. Raises CheckpointNotFoundError, CheckpointError, OptionError or
    NotSupportedYetError; messages name the file and the key.
    """
    from .reader import Hints, read_checkpoint

    hints = Hints(
        config="pi0fast" if config == "pi0_fast" else config,
        rules=dict(rules or {}),
        action_horizon=action_horizon,
        asset_id=asset_id,
        state_dim=state_dim,
        action_dim=action_dim,
        delta_actions=None if delta_actions is None else tuple(bool(flag) for flag in delta_actions),
        verify_weights=verify_weights,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    return read_checkpoint(path, framework, hints)
