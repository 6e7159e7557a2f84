"""The guidance kernel against its torch definition: fresh random inputs, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from flashrt_runtime.ops import guide, native, reference


def inputs(rows: int, width: int, device: str) -> tuple[torch.Tensor, ...]:
    velocity, x, target = torch.randn(3, rows, width, device=device)
    weight = torch.rand(rows, device=device)
    weight[::3] = 0.0
    return velocity, x, target, weight, torch.rand((), device=device) * 10


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 10, 16, 50, 64])
@pytest.mark.parametrize("width", [1, 7, 32])
def test_kernel_equals_the_definition(rows: int, width: int) -> None:
    assert native.unavailable_reason() is None
    # what torch.empty hands out is full of NaN: an output that was not written shows
    poison = [torch.full((rows, width), float("nan"), device="cuda") for _ in range(4)]
    del poison
    velocity, x, target, weight, gain = inputs(rows, width, "cuda")
    target[::3], x[::3] = float("nan"), float("inf")  # rows without weight read neither
    kept = velocity.clone()
    got = guide.guide_velocity(velocity, x, target, weight, gain, 0.7)
    want = reference.guide_velocity(velocity, x, target, weight, gain, 0.7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[::3].view(torch.int32), velocity[::3].view(torch.int32))
    assert torch.equal(velocity, kept)


def test_the_definition_by_hand() -> None:
    one = torch.ones(1, 1)
    # the flow would end at 1 - 0.5 * 2 = 0 and is to end at 3: v - 4 * 0.5 * 3
    corrected = reference.guide_velocity(2 * one, one, 3 * one, 0.5 * one[0], torch.tensor(4.0), 0.5)
    assert corrected.item() == 2.0 - 4.0 * 0.5 * 3.0


@pytest.mark.parametrize("broken", range(5))
def test_other_tensors_are_refused_before_any_launch(broken: int) -> None:
    arguments = list(inputs(4, 3, "cpu"))
    arguments[broken] = arguments[broken].double()
    with pytest.raises(ValueError, match="must be a contiguous float32 CUDA tensor"):
        guide.guide_velocity(*arguments, 0.5)  # type: ignore[arg-type]
