"""Makes the oracles' modules importable, and runs each golden case once for all tests of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE / "oracles"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from parity_cases import CASES  # noqa: E402
from parity_support import Run, run_ours  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def run(request, tmp_path_factory) -> Run:
    """One case through our policy, loaded by `load_model` from a checkpoint directory."""
    return run_ours(request.param, tmp_path_factory.mktemp("checkpoint"))
