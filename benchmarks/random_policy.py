"""An untrained policy of the published dimensions whose weights are drawn on the GPU: no 7 GB file is
written.

The distribution is that of `flashrt make-checkpoint`; the numbers come from the GPU's generator, so they
differ.
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from flashrt_runtime.checkpoints.architecture import parameter_shapes
from flashrt_runtime.checkpoints.base import Checkpoint, FeatureStats, NormStats
from flashrt_runtime.checkpoints.presets import LIBERO
from flashrt_runtime.checkpoints.rules import openpi_rules
from flashrt_runtime.checkpoints.tokenizer import train_tokenizer
from flashrt_runtime.config import PolicyConfig
from flashrt_runtime.untrained.random import SIZES, random_config, storage_dtype, weight_scale
from flashrt_runtime.untrained.scripted import write_processor


class RandomStore:
    """Draws each tensor when it is asked for; the same key and seed give the same tensor."""

    files: tuple[Path, ...] = ()

    def __init__(
        self, config: PolicyConfig, device: torch.device, seed: int, dtype: torch.dtype, query_scale: float
    ) -> None:
        self.known = parameter_shapes(config)
        self.query_scale = query_scale
        self.device, self.seed, self.dtype = device, seed, dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.known)

    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: storage_dtype(key, self.dtype) for key in self.known}

    def tensor(self, key: str) -> torch.Tensor:
        shape = self.known[key]
        offset, scale = weight_scale(key, shape, self.query_scale)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(key.encode()) + self.seed)
        values = torch.randn(shape, generator=generator, device=self.device).mul_(float(scale)).add_(offset)
        return values.to(storage_dtype(key, self.dtype))

    def close(self) -> None:
        pass


def random_checkpoint(
    policy: str,
    views: int,
    chunk: int,
    steps: int,
    device: torch.device,
    size: str = "full",
    seed: int = 0,
    query_scale: float = 4.0,
) -> Checkpoint:
    """A checkpoint as `open_checkpoint` returns it, its robot that of the LIBERO preset, state in pi05's
    prompt.
    """
    from dataclasses import replace

    preset = LIBERO
    config = replace(random_config(size, preset, policy, steps), horizon=chunk)
    dtype = torch.bfloat16 if size == "full" else torch.float32
    store = RandomStore(config, device, seed, dtype, query_scale)
    stats = (
        FeatureStats(**{name: np.array(values) for name, values in part.items()})
        for part in (preset.state_stats, preset.action_stats)
    )
    folder = Path(tempfile.mkdtemp(prefix=f"random-{size}-{policy}-"))
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer(SIZES[size].tokenizer_vocab))
    if policy == "pi0fast":
        write_processor(folder / "fast", config, seed)
    return Checkpoint(
        path=folder,
        layout="openpi-pytorch",
        config=config,
        rules=openpi_rules(policy, policy != "pi0"),
        store=store,
        stored_keys={key: key for key in store.known},
        norm_stats=NormStats(*stats),
        views=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")[:views],
        state_dim=len(preset.state_names),
        action_dim=len(preset.action_names),
        tokenizer=tokenizer,
    )
