"""What every checkpoint layout is turned into: one `Checkpoint`, opened by `reader.open_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
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
