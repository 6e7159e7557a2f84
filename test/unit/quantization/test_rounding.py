"""Error-compensating rounding: on the grid, never worse than nearest, and better where inputs correlate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashrt_runtime.errors import CalibrationError
from flashrt_runtime.ops import E4M3, E4M3_MAX
from flashrt_runtime.quantization.fp8 import Fp8Linear
from flashrt_runtime.quantization.rounding import (
    BLOCK,
    Rounder,
    SecondMoments,
    feedback,
    nearest,
    output_error,
    rounding_memory,
    within_memory,
)

WIDE = 2 * BLOCK + 44  # two whole blocks and a part of one
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weight_and_scale(rows: int = 48, width: int = WIDE, device: str = "cpu") -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    return weight, weight.abs().amax() / E4M3_MAX


def correlated(rows: int, width: int = WIDE, seed: int = 1) -> Tensor:
    """Inputs of a fixed mixture of 24 causes and a little of their own, magnitudes that differ by column."""
    fixed = torch.Generator().manual_seed(7)
    mixture = torch.randn(24, width, generator=fixed)
    size = torch.exp(torch.randn(width, generator=fixed))
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, 24, generator=generator)
    return (causes @ mixture + 0.1 * torch.randn(rows, width, generator=generator)) * size


def moments_of(x: Tensor) -> Tensor:
    return x.T @ x / x.shape[0]


def linear(width: int) -> Fp8Linear:
    return Fp8Linear(torch.nn.Linear(width, 4), static=True)


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
def test_the_error_behind_correlated_inputs_falls(device: str) -> None:
    """To less than a third, on inputs of the same kind that it has not seen."""
    weight, scale = weight_and_scale(device=device)
    rounder = Rounder()
    rounded = rounder(weight, scale, moments_of(correlated(2000)).to(device))
    assert rounded.dtype == E4M3
    assert rounded.shape == weight.shape
    assert rounded.is_contiguous()
    unseen = correlated(500, seed=2).to(device)
    errors = [
        ((each.float() * scale - weight) @ unseen.T).norm() / (weight @ unseen.T).norm()
        for each in (rounded, nearest(weight, scale))
    ]
    assert errors[0] < errors[1] / 3
    again = rounder(weight, scale, moments_of(correlated(2000)).to(device))
    assert torch.equal(bits(rounded), bits(again)), "not the same twice"


@pytest.mark.gpu
def test_the_gpu_rounds_as_the_cpu() -> None:
    """But for sums in another order, which now and then tip a value over."""
    weight, scale = weight_and_scale()
    moments = moments_of(correlated(2000))
    want = Rounder()(weight, scale, moments)
    got = Rounder()(weight.cuda(), scale.cuda(), moments.cuda()).cpu()
    assert (bits(got) != bits(want)).float().mean() < 0.5
    errors = [output_error(weight, each, scale, moments) for each in (got, want)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_each_column_takes_up_what_those_before_it_left() -> None:
    """Against the definition: column by column in double precision, no blocks, by the inverse of H."""
    weight, scale = weight_and_scale(8, 40)
    moments = moments_of(correlated(200, 40))
    got = Rounder(0.1)(weight, scale, moments)
    order = moments.diagonal().argsort(descending=True, stable=True)
    damped = moments.double() + 0.1 * moments.diagonal().double().mean() * torch.eye(40)
    left = (weight.double() / scale)[:, order]
    want = torch.empty_like(left)
    remaining = damped[order][:, order]
    for column in range(40):
        value = left[:, column].float().clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).double()
        want[:, order[column]] = value
        inverse = remaining.inverse()  # of what is not rounded yet: the first column is due
        left[:, column:] -= (left[:, column] - value)[:, None] * inverse[0] / inverse[0, 0]
        remaining = remaining[1:, 1:]
    assert (got.double() == want).float().mean() > 0.98, "more than sums in another order explain"


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight, scale = weight_and_scale()
    diagonal = torch.diag(torch.rand(WIDE, generator=torch.Generator().manual_seed(3)) + 0.1)
    assert torch.equal(bits(Rounder()(weight, scale, diagonal)), bits(nearest(weight, scale)))


@pytest.mark.parametrize("device", DEVICES)
def test_few_samples_and_dead_inputs(device: str) -> None:
    """Singular moments: fewer rows than columns, and inputs that are always zero."""
    weight, scale = weight_and_scale(device=device)
    x = correlated(20)
    x[:, ::3] = 0
    moments = moments_of(x).to(device)
    rounded = Rounder()(weight, scale, moments)
    assert torch.isfinite(rounded.float()).all()
    plain = nearest(weight, scale)
    assert torch.equal(bits(rounded)[:, ::3], bits(plain)[:, ::3]), "what nothing reads was changed"
    assert output_error(weight, rounded, scale, moments) < 0.5 * output_error(weight, plain, scale, moments)


def test_nothing_seen_is_nearest_and_nonsense_is_refused() -> None:
    weight, scale = weight_and_scale()
    nothing = torch.zeros(WIDE, WIDE)
    assert torch.equal(bits(Rounder()(weight, scale, nothing)), bits(nearest(weight, scale)))
    assert output_error(weight, nearest(weight, scale), scale, nothing) == 0.0
    broken = moments_of(correlated(20))
    broken[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.3\.out: .* not finite"):
        Rounder()(weight, scale, broken, "layers.3.out")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(512, 8192), (8192, 1024)])
def test_it_takes_no_more_memory_than_it_says(size: tuple[int, int]) -> None:
    """Beside the weight and the moments, after a first time in which libraries allocate their workspaces."""
    rows, width = size
    weight = torch.randn(rows, width, device="cuda")
    x = torch.randn(256, width, device="cuda")
    moments, scale, rounder = x.T @ x / 256, weight.abs().amax() / E4M3_MAX, Rounder()
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rounded = rounder(weight, scale, moments)
        peak = torch.cuda.max_memory_allocated() - before
        del rounded
    assert peak <= rounding_memory(rows, width)


def test_factor() -> None:
    moments = moments_of(correlated(2000))
    order = torch.arange(WIDE)
    upper = feedback(moments, order, 0.1)
    shuffled = torch.randperm(WIDE, generator=torch.Generator().manual_seed(5))
    assert torch.equal(feedback(moments, shuffled, 0.1), feedback(moments[shuffled][:, shuffled], order, 0.1))
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(), torch.ones(WIDE))
    damped = moments + 0.1 * moments.diagonal().mean() * torch.eye(WIDE)
    inverse = torch.linalg.inv(upper.double())
    middle = inverse @ damped.double() @ inverse.T
    torch.testing.assert_close(middle, torch.diag(middle.diagonal()), atol=1e-2, rtol=0)
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.9]))
    assert feedback(indefinite, torch.arange(3), 0.1) is not None, "not damped more"
    assert feedback(torch.diag(torch.tensor([1.0, 1.0, -2.0])), torch.arange(3), 0.1) is None


def test_moments_of_what_passes() -> None:
    linears = {name: linear(width) for name, width in (("a", 6), ("b", 8))}
    moments = SecondMoments(linears)
    x = torch.randn(3, 5, 6)
    moments.add("a", x[:1])
    moments.add("a", x[1:].bfloat16())
    rows = torch.cat((x[:1], x[1:].bfloat16().float())).reshape(-1, 6)
    torch.testing.assert_close(moments.take("a"), rows.T @ rows / 15)
    assert not moments.take("b").any()


def test_groups_keep_within_memory() -> None:
    widths = {"a": 10, "b": 10, "c": 40, "d": 10}
    linears = {name: linear(width) for name, width in widths.items()}
    assert [list(group) for group in within_memory(linears, 900)] == [["a", "b"], ["c"], ["d"]]
    assert [list(group) for group in within_memory(linears, 1 << 20)] == [["a", "b", "c", "d"]]
    assert list(within_memory({}, 100)) == []
