"""The patch projection's weights in two parts of 16 bits: as good as the 32 bits that they are made of."""

from __future__ import annotations

import pytest
import torch

from flashrt_runtime import ops
from flashrt_runtime.ops import levels, reference


@pytest.mark.parametrize("size", [1e-30, 0.02, 300.0])
def test_parts_add_up_to_the_projection(size: float) -> None:
    weight, bias, position = torch.randn(48, 27) * size, torch.randn(48) * size, torch.randn(5, 48) * size
    weights = ops.LevelWeights.of(weight, bias, position)
    pixels = torch.randint(0, 256, (2, 5, 27))
    taken = torch.zeros(2, 5, levels.padded(27), dtype=torch.float64)
    taken[..., :27] = pixels - 128
    high, low = weights.split.double().view(2, 48, -1)
    got = taken @ (high + low).T * weights.factor + weights.table.double()
    want = reference.embed_patches(
        pixels.double() / 255 * 2 - 1, weight.double(), bias.double(), position.double(), torch.float64
    )
    assert torch.isfinite(weights.split).all()
    assert (got - want).norm() / want.norm() < 2e-7


def test_weights_of_nothing() -> None:
    weights = ops.LevelWeights.of(torch.zeros(16, 27), torch.ones(16), torch.zeros(3, 16))
    assert not weights.split.any()
    assert torch.equal(weights.table, torch.ones(3, 16))
    assert levels.padded(588) == 592


def test_a_build_for_small_gpus_takes_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a Hopper, whose matrix unit its kernels leave alone."""

    class Weight:
        is_cuda, shape, device = True, (1152, 588), torch.device("cuda")

    monkeypatch.setattr(levels.native, "available", lambda: True)
    for capability, served in (((9, 0), True), (levels.native.SMALL_CAPABILITY, False)):
        monkeypatch.setattr(levels.native, "capability", lambda _, found=capability: found)
        assert levels.served(Weight(), torch.bfloat16) is served  # type: ignore[arg-type]
