"""Histograms of magnitudes, estimators of a scale from them, and outliers among the samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashrt_runtime import ops
from flashrt_runtime.errors import CalibrationError, OptionError
from flashrt_runtime.layers.linear import Linear
from flashrt_runtime.quantization.calibration import Calibrator, check_scale_ceiling, estimate
from flashrt_runtime.quantization.estimators import (
    estimate_scale,
    resolve_estimator,
    rounding_errors,
)
from flashrt_runtime.quantization.fp8 import Fp8Linear
from flashrt_runtime.quantization.statistics import (
    BINS,
    Collector,
    bin_magnitudes,
    magnitude_counts,
    outlying_samples,
)

WIDTH = 64


def model(projections: int = 1) -> nn.ModuleDict:
    linears = {}
    for index in range(projections):
        linears[f"layer{index}"] = Fp8Linear(Linear(WIDTH, 8, bias=False), static=True)
        linears[f"layer{index}"].set_weight(torch.randn(8, WIDTH))
    return nn.ModuleDict(linears)


def collect(net: nn.ModuleDict, samples: list[Tensor]) -> Collector:
    """Every projection sees each sample, half of its rows at a time, as denoise steps would show them."""
    collector = Calibrator(net).collector()
    for sample in samples:
        with collector.observe():
            for half in sample.chunk(2):
                for linear in net.values():
                    linear(half)
    return collector


def activations(seed: int, rows: int = 512) -> Tensor:
    """Heavier tails than a normal distribution's, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    return (x * torch.exp(0.5 * torch.randn(rows, WIDTH, generator=generator))).bfloat16()


def test_a_bin_is_a_bfloat16_value() -> None:
    values = bin_magnitudes()
    assert torch.equal(values.bfloat16().float(), values)
    assert (values.diff() > 0).all()
    counts = magnitude_counts(values[1:])
    assert counts[0] == 0
    assert (counts[1:] == 1).all()
    assert len(counts) == BINS
    edges = magnitude_counts(torch.tensor([0.0, -0.0, 1e-30, -3.0, 1e30]))
    assert edges[0] == 3
    assert edges[-1] == 1
    assert values[edges.nonzero()[1]] == 3.0


def test_pooled_is_the_histogram_of_everything() -> None:
    samples = [activations(seed) for seed in range(6)]
    want = magnitude_counts(torch.cat(samples))
    for order in (samples, samples[::-1]):
        collector = collect(model(2), order)
        for index in range(2):
            counts, peak = collector.histogram(index, np.ones(6, bool))
            assert torch.equal(counts, want)
            assert peak == float(torch.cat(samples).abs().max())
    assert np.array_equal(collector.maxima[::-1, 0], [float(x.abs().max()) for x in samples])


def test_memory_does_not_grow_with_samples() -> None:
    """One histogram per half octave of sample maxima, however many samples there are."""
    collector = collect(model(), [activations(seed, rows=8) for seed in range(200)])
    assert collector.samples == 200
    assert len(collector._groups[0]) <= 20
    counts, _ = collector.histogram(0, np.ones(200, bool))
    assert int(counts.sum()) == 200 * 8 * WIDTH


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99])
def test_percentile_is_that_of_all_elements(percentile: float) -> None:
    x = activations(1)
    clip = float(np.quantile(x.float().abs().numpy(), percentile / 100, method="inverted_cdf"))
    got = estimate_scale(magnitude_counts(x), float(x.abs().max()), "percentile", percentile)
    assert got == pytest.approx(clip / ops.E4M3_MAX)


def test_mse_is_what_quantising_really_costs() -> None:
    """The error from the histogram is the error of the tensor, and no other clipping point has less."""
    x = torch.cat([activations(2), torch.tensor([[300.0] + [0.0] * (WIDTH - 1)]).bfloat16()])
    counts, peak = magnitude_counts(x), float(x.abs().max())
    scale = estimate_scale(counts, peak, "mse")

    def cost(s: float) -> float:
        scalar = torch.tensor(s)
        return float((ops.quantise(x, scalar).float() * scalar - x.float()).double().square().sum())

    scales = torch.tensor([scale, peak / ops.E4M3_MAX, scale * 1.1, scale / 3])
    assert rounding_errors(counts, scales).tolist() == pytest.approx([cost(float(s)) for s in scales])
    grid = [peak / ops.E4M3_MAX * 2 ** (-k / 8) for k in range(49)]
    assert cost(scale) == pytest.approx(min(map(cost, grid)))


def test_mse_clips_a_spike_that_costs_the_rest_more() -> None:
    """A magnitude thousands of times the others would push them below e4m3's smallest steps."""
    x = torch.cat([torch.full((200_000,), 1e-4), torch.tensor([8.0])])
    counts = magnitude_counts(x)
    assert estimate_scale(counts, 8.0, "max") == pytest.approx(8.0 / ops.E4M3_MAX)
    assert float(rounding_errors(counts, torch.tensor([estimate_scale(counts, 8.0, "mse")]))) <= float(
        rounding_errors(counts, torch.tensor([8.0 / ops.E4M3_MAX]))
    )


def test_nothing_seen_is_scale_one() -> None:
    for estimator in ("mse", "percentile", "max"):
        assert estimate_scale(magnitude_counts(torch.zeros(5)), 0.0, estimator, 99.0) == 1.0


def whole(x: Tensor) -> Tensor:
    return x * 30


def spike(x: Tensor) -> Tensor:
    x = x.clone()
    x[3, 7] = 40 * x.abs().max()
    return x


def three_times(x: Tensor) -> Tensor:
    return x * 3


@pytest.mark.parametrize("plant", [whole, spike, three_times])
@pytest.mark.parametrize("position", [0, 4, 7])
@pytest.mark.parametrize("options", [(None, None), (None, 99.9), ("percentile", 99.0)])
def test_one_outlier_in_eight_is_damped(
    plant: Callable[[Tensor], Tensor], position: int, options: tuple[str | None, float | None]
) -> None:
    samples = [activations(seed) for seed in range(8)]
    planted = [plant(x) if index == position else x for index, x in enumerate(samples)]
    chosen = resolve_estimator(*options)
    clean, _ = estimate(collect(model(), samples), *chosen)
    damped, warnings = estimate(collect(model(), planted), *chosen)
    assert damped["layer0"] == pytest.approx(clean["layer0"], rel=0.05)
    assert len(warnings) == 1
    assert f"sample {position} is an outlier in 1 of 1 projections" in warnings[0]
    assert "layer0" in warnings[0]


@pytest.mark.parametrize("plant", [whole, spike, three_times])
def test_percentile_100_shows_the_outlier(plant: Callable[[Tensor], Tensor]) -> None:
    samples = [activations(seed) for seed in range(8)]
    samples[5] = plant(samples[5])
    scales, _ = estimate(collect(model(), samples), *resolve_estimator(None, 100.0))
    assert scales["layer0"] == pytest.approx(float(samples[5].abs().max()) / ops.E4M3_MAX)


def test_outliers_are_a_minority_among_enough() -> None:
    def found(*values: float) -> list[int]:
        """Of samples of which the maximum alone varies, or the rms alone."""
        varies, same = np.array(values, np.float32), np.ones(len(values), np.float32)
        by_maximum, by_rms = outlying_samples(varies, same), outlying_samples(same, varies)
        assert np.array_equal(by_maximum, by_rms)
        return np.flatnonzero(by_maximum).tolist()

    assert found(1, 1.1, 30) == []  # too few to tell
    assert found(1, 1.1, 0.9, 30) == [3]
    assert found(1, 1.1, 0.9, 30, 1, 1, 1, 25) == [3, 7]
    assert found(1, 1.1, 30, 30, 1, 25) == []  # half of them: that is how the data are
    assert found(1, 2, 4, 8, 16, 32, 64, 128) == []  # a wide spread, not an outlier
    assert found(0, 0, 0, 0) == []


def test_scale_ceiling_names_projection_and_samples() -> None:
    scales = dict.fromkeys("abcde", 0.1) | {"f": 2.1}
    maxima = np.full((8, 6), 44.8, np.float32)
    maxima[:, 5] = 40.0
    maxima[[2, 6], 5] = [940.8, 500.0]
    (warning,) = check_scale_ceiling(scales, maxima)
    for text in ("f:", "21 times the median 0.1", "940.8", "samples 2, 6"):
        assert text in warning
    maxima[:, 5] = 900.0
    assert "8 of 8 samples: the projection is like that" in check_scale_ceiling(scales, maxima)[0]
    assert check_scale_ceiling(scales | {"f": 1.99}, maxima) == []
    assert len(check_scale_ceiling(scales | {"f": 2.01})) == 1


def test_a_spike_in_every_estimator_meets_the_ceiling() -> None:
    """With the plain maximum the outlier's projection is reported, with the sample that caused it."""
    net = model(5)
    collector = Calibrator(net).collector()
    for index in range(8):
        with collector.observe():
            for name, linear in net.items():
                x = activations(index)
                linear(x * 100 if name == "layer3" and index == 6 else x)
    _, warnings = estimate(collector, "max", 100.0)
    (warning,) = warnings
    assert warning.startswith("layer3:")
    assert warning.endswith("from sample 6")


def test_non_finite_activations_are_refused() -> None:
    net = model(2)
    collector = Calibrator(net).collector()
    x = activations(0)
    with collector.observe():
        net["layer0"](x)
        net["layer1"](x)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[0, 0] = bad
        error = pytest.raises(CalibrationError, match=r"sample 1 .*1 projections, first layer1")
        with error, collector.observe():
            net["layer0"](x)
            net["layer1"](broken)
    assert collector.samples == 1
    assert int(collector.histogram(1, np.ones(1, bool))[0].sum()) == x.numel()
    assert net["layer1"].observer is None


def test_estimator_options() -> None:
    assert resolve_estimator(None, None) == ("mse", None)
    assert resolve_estimator(None, 99.5) == ("percentile", 99.5)
    assert resolve_estimator(None, 100.0) == ("max", 100.0)
    assert resolve_estimator("percentile", None) == ("percentile", 99.9)
    assert resolve_estimator("max", None) == ("max", 100.0)
    wrong = (("mse", 99.0), ("max", 99.0), ("entropy", None), (None, 0.0), (None, 100.1))
    for estimator, percentile in wrong:
        with pytest.raises(OptionError):
            resolve_estimator(estimator, percentile)
