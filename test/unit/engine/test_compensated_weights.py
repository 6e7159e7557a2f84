"""Weights exchanged under captured graphs and the fused expert's packed copies: as if loaded that way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt_runtime
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.policy import Policy

pytestmark = pytest.mark.gpu

STATE = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)


def observation(seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(2)]
    return {"images": images, "prompt": "open the drawer", "state": STATE, "seed": seed}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Policy]]:
    """Every policy runs the kernels that the first one chose: the cache remembers them."""
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))
    loaded: list[Policy] = []

    def load_policy(checkpoint: Path, calibration: Path | str) -> Policy:
        policy = flashrt_runtime.load_model(
            checkpoint, config="auto", hardware="any", precision="fp8", weight_cache=False, autotune=1,
            calibration=calibration,
        )  # fmt: skip
        loaded.append(policy)
        assert isinstance(policy._model, FlowPolicy)
        assert policy._model.fused_expert is not None, "its packed copies are not under test"
        return policy

    yield load_policy
    for policy in loaded:
        policy.close()


@pytest.mark.parametrize("name", ["pi05", "pi0"])
def test_exchanged_weights_answer_as_loaded_ones(
    load: Callable[..., Policy], make_wide: Callable[[Path, str], Path], tmp_path: Path, name: str
) -> None:
    checkpoint = make_wide(tmp_path / name, name)
    seen = [observation(seed) for seed in range(4)]
    compensated, nearest = (tmp_path / f"{each}.safetensors" for each in ("compensated", "nearest"))

    def answers(policy: Policy) -> bytes:
        return b"".join(policy.predict(**observation(seed)).tobytes() for seed in (10, 11))

    policy = load(checkpoint, "none")
    assert policy._engine is not None
    captures = policy._engine.captures
    policy.calibrate(seen, weights="compensated")
    rounded = answers(policy)
    policy.save_calibration(compensated)
    assert answers(load(checkpoint, compensated)) == rounded, "not those of the weights that were saved"
    policy.calibrate(seen, weights="nearest")
    plain = answers(policy)
    assert plain != rounded, "the exchange had no effect on what predict runs"
    policy.save_calibration(nearest)
    assert answers(load(checkpoint, nearest)) == plain
    policy.load_calibration(compensated)
    assert answers(policy) == rounded
    policy.recalibrate()
    assert answers(policy) == answers(load(checkpoint, "none")), "some of the weights are not the nearest"
    assert policy._engine.captures == captures, "something was captured again"
