from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashrt_runtime.ops import native

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests


@pytest.fixture
def poisoned() -> None:
    """What torch.empty hands out is full of NaN: an output that was not written shows."""
    # Not a skip: on a machine with a GPU the kernels have to be there.
    assert native.unavailable_reason() is None
    poison = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del poison
