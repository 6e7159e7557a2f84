"""E4m3 rows of the persistent expert, of more than 32: what grows, shrinks, saturates or is no number."""

from __future__ import annotations

import pytest
import torch
from test_expert_steps import LAYERS, STEPS, RandomExpert, check, launches, random_cache

from flashrt_runtime.ops import expert_steps as steps_op

pytestmark = pytest.mark.hopper


def jump(rows: int, factor: float) -> tuple[RandomExpert, torch.Tensor, steps_op.Guidance]:
    """An expert whose first step is the guide's pull alone: all actions times `factor`."""
    expert = RandomExpert(LAYERS, STEPS, True, True)
    expert.weights.project_in[1].zero_()
    expert.weights.project_out[1].zero_()
    expert.weights.norms[0, -1, 0], expert.weights.norms[0, -1, 1] = -1.0, 0.0  # no velocity
    noise = torch.randn(rows, 32, device="cuda") / factor**0.5
    gain = torch.tensor([float(STEPS), 0.0], device="cuda")
    return expert, noise, steps_op.Guidance(gain, torch.ones_like(noise), noise * factor)


@pytest.mark.gpu
@pytest.mark.parametrize(("factor", "tolerance"), [(2.0**6, 4e-2), (2.0**-3, 0.15)])
@pytest.mark.parametrize("rows", [33, 50])
def test_rows_that_grow_and_shrink_between_steps(rows: int, factor: float, tolerance: float) -> None:
    expert, noise, guidance = jump(rows, factor)
    check(expert, rows, 300, tolerance, guidance, noise=noise, start=guidance.target)
    assert any(factor / 2 < growth < factor * 2 for growth in expert.growth)


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "gate"), [(2, 250.0), (3, 350.0)])
def test_rows_that_grow_between_norms(norm: int, gate: float) -> None:
    expert = RandomExpert(LAYERS, STEPS, True, True)
    expert.weights.norms[:, norm, 2] *= gate
    check(expert, 50, 300, 7e-2)
    assert max(expert.growth) > 2**5


@pytest.mark.gpu
def test_a_column_of_large_scale() -> None:
    expert = RandomExpert(LAYERS, STEPS, True, True)
    expert.weights.norms[:, 1, 0, 7] = 50.0
    check(expert, 50, 101, 4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [2, 3])
def test_rows_that_outgrow_e4m3_are_nan(norm: int) -> None:
    """Never the largest value in their place; 16-bit rows hold them."""
    expert = RandomExpert(LAYERS, STEPS, True, True)
    expert.weights.norms[:, norm, 2] *= 2.0**13
    for rows, lost in ((50, True), (32, False)):
        noise, cache = torch.randn(rows, 32, device="cuda"), random_cache(LAYERS, 100)
        nan = launches(expert, noise, cache, 100).isnan()
        assert nan.all() if lost else not nan.any()


@pytest.mark.gpu
def test_rows_that_shrink_too_far_are_nan() -> None:
    for rows, lost in ((50, True), (32, False)):
        expert, noise, guidance = jump(rows, 2.0**-6)
        nan = launches(expert, noise, random_cache(LAYERS, 100), 100, guidance).isnan()
        assert nan.all() if lost else not nan.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "lost"), [(111.0, False), (111.25, True)])
def test_the_largest_that_e4m3_holds(scale: float, lost: bool) -> None:
    """One value is all of a row: 32 times the rms, of which the power makes 1/8."""
    expert = RandomExpert(LAYERS, 1, True, True)
    weight, bias = expert.weights.project_in
    weight.zero_(), bias.zero_()
    bias[0, 9] = 32.0
    expert.weights.norms[0, 0, 0, 9] = scale
    noise, cache = torch.randn(50, 32, device="cuda"), random_cache(LAYERS, 100)
    nan = launches(expert, noise, cache, 100).isnan()
    assert nan.all() if lost else not nan.any()


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["x", "weights"])
def test_nan_stays_nan(where: str) -> None:
    expert = RandomExpert(LAYERS, STEPS, True, True)
    noise, cache = torch.randn(50, 32, device="cuda"), random_cache(LAYERS, 101)
    if where == "x":
        noise[3, 7] = float("nan")
    else:
        expert.weights.norms[0, 0, 0, 9] = float("nan")
    assert launches(expert, noise, cache, 101).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("head", [0, 7])
@pytest.mark.parametrize("column", [0, 1, 2, 3, 128, 131])
def test_nan_in_a_query_alone(head: int, column: int) -> None:
    """A query's first column of four carries a mark, which must not make a number of it."""
    expert = RandomExpert(LAYERS, STEPS, True, True)
    assert expert.weights.shift_products is not None
    expert.weights.shift_products[0, 0, head * 256 + column] = float("nan")
    noise, cache = torch.randn(50, 32, device="cuda"), random_cache(LAYERS, 101)
    assert launches(expert, noise, cache, 101).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [45, 50])
def test_rows_of_all_sizes(rows: int) -> None:
    """Each row has a power of two of its own, also those that the other block of a pair finishes.

    Small rows move by up to 0.2, as where all are small; by another's power they would be 4 times that.
    """
    expert, noise = RandomExpert(LAYERS, STEPS, True, True), torch.randn(rows, 32, device="cuda")
    expert.weights.project_in[1].zero_()
    noise *= 2.0 ** (torch.arange(rows, device="cuda") * 5 % 6)[:, None] / 4
    check(expert, rows, 100, 0.2, noise=noise)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [48, 50])
def test_rows_of_zeros(rows: int) -> None:
    expert, noise = RandomExpert(LAYERS, STEPS, True, True), torch.randn(rows, 32, device="cuda")
    expert.weights.project_in[1].zero_()
    noise[3:20] = 0.0
    check(expert, rows, 100, 0.2, noise=noise)  # of one row up to 0.3
