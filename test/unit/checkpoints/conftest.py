"""Random checkpoints to read, and to damage."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from flashrt_runtime.untrained import make_checkpoint

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pi0.5 checkpoint for LIBERO; read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_pi0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pi0 checkpoint for LIBERO; read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny_pi0"), policy="pi0")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of `tiny` that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
