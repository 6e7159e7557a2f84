"""A tiny checkpoint and observations for it; every test has a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt_runtime
from flashrt_runtime import Policy
from flashrt_runtime.quantization import compensation
from flashrt_runtime.untrained.random import make_checkpoint

STATE = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "pi05", size="tiny", preset="libero")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def load(tiny: Path) -> Iterator[Callable[..., Policy]]:
    """load_model on the CPU in fp8, of the tiny checkpoint unless another is given."""
    loaded: list[Policy] = []

    def load_policy(checkpoint: Path = tiny, **options: object) -> Policy:
        options = {"hardware": "cpu", "precision": "fp8", "num_steps": 2} | options
        loaded.append(flashrt_runtime.load_model(checkpoint, **options))
        return loaded[-1]

    yield load_policy
    for policy in loaded:
        policy.close()


@pytest.fixture
def observations() -> Callable[..., Iterator[dict[str, object]]]:
    def draw(count: int, first_seed: int = 0) -> Iterator[dict[str, object]]:
        for seed in range(first_seed, first_seed + count):
            rng = np.random.default_rng(seed)
            images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]
            yield {"images": images, "prompt": "pick up the block", "state": STATE, "seed": seed}

    return draw


@pytest.fixture
def compensated(load, observations, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Policy]:
    """A policy whose weights were rounded for four observations, by few runs of the expert."""
    monkeypatch.setattr(compensation, "FEWEST_RUNS", 4)

    def make() -> Policy:
        policy = load(num_steps=1)
        policy.calibrate(observations(4), weights="compensated", source="test")
        return policy

    return make
