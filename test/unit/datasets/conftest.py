"""Datasets written once for all tests, or for one test to damage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests

from lerobot_files import WRITERS


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each layout once; not to be changed."""
    return {name: write(tmp_path_factory.mktemp("dataset")) for name, write in WRITERS.items()}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """A dataset of a layout, to be damaged."""
    return lambda name: WRITERS[name](tmp_path / "dataset")
