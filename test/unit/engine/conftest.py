"""A checkpoint of the published widths and few layers, whose shapes the kernels made for them serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from flashrt_runtime.config import GEMMA_2B, GEMMA_300M, SIGLIP_SO400M
from flashrt_runtime.untrained import random

WIDE = replace(
    random.SIZES["full"],
    vision=replace(SIGLIP_SO400M, depth=2),
    prefix=replace(GEMMA_2B, depth=3),
    expert=replace(GEMMA_300M, depth=3),
    vocab_size=1024,
)


MakeWide = Callable[[Path, str], Path]


@pytest.fixture(scope="session")
def make_wide() -> MakeWide:
    """(folder, policy) -> a checkpoint as `make_checkpoint`'s; about 0.8 GB."""

    def make(folder: Path, policy: str) -> Path:
        with mock.patch.dict(random.SIZES, wide=WIDE):
            return random.make_checkpoint(folder, size="wide", policy=policy)

    return make
