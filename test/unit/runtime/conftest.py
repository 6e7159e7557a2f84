"""A small checkpoint from disk, and the policy that is loaded from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt_runtime
from flashrt_runtime import Policy
from flashrt_runtime.untrained import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy") / "tiny", size="tiny", preset="demo_arm")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Iterator[Policy]:
    loaded = flashrt_runtime.load_model(checkpoint, hardware="cpu", num_steps=2)
    yield loaded
    loaded.close()
