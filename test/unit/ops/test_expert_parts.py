"""What the blocks of a head send each other as e4m3, of more than 32 rows."""

from __future__ import annotations

import pytest
import torch
from test_expert_steps import (
    LAYERS,
    PART_HEADROOM,
    SPLITS,
    STEPS,
    RandomExpert,
    check,
    key_shares,
    launches,
    random_cache,
    sent,
)

from flashrt_runtime.ops.expert import E4M3_MAX

pytestmark = pytest.mark.hopper


@pytest.mark.parametrize(("prefix", "rows"), [(560, 50), (0, 33), (9, 50), (1211, 64), (131, 49)])
def test_every_key_is_one_block_s(prefix: int, rows: int) -> None:
    shares = key_shares(prefix, rows)
    assert sorted(key for share in shares for key in share) == list(range(prefix + rows))
    assert max(map(len, shares)) <= -(-(prefix + rows) // SPLITS)


def test_what_a_part_loses() -> None:
    """1/16 of its value at most, of one in eight twice that; it saturates at 16 times the scale's range."""
    part = torch.randn(8, 50, 256)
    scale = torch.tensor(1 / E4M3_MAX)
    lost = ((sent(part, scale) - part) / part).abs()[part.abs() > 0.01]
    assert 0.06 < lost.max() < 1 / 8
    assert (lost > 1 / 16 + 1e-6).float().mean() < 1 / 8
    assert sent(part * 1e3, scale).abs().max() == PART_HEADROOM


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [33, 50])
def test_parts_beyond_the_scale_saturate(rows: int) -> None:
    """As the attended rows do; it never becomes NaN."""
    expert = RandomExpert(LAYERS, STEPS, True, True)
    expert.input_scale[:, 0] /= 64
    check(expert, rows, 300, 4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("column", range(16))
def test_values_of_nan_reach_each_row(column: int) -> None:
    """Also where the value has a bit that says something else."""
    expert = RandomExpert(1, 1, True, True)
    noise, cache = torch.randn(50, 32, device="cuda"), random_cache(1, 100)
    cache[1][0, 7, 0, 32 + column] = float("nan")
    assert launches(expert, noise, cache, 100).isnan().all()
