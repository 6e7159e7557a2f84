"""How many samples are recommended, from maxima whose distribution is known."""

from __future__ import annotations

import numpy as np

from flashrt_runtime.quantization.recommend import recommended_samples


def test_alike_samples_need_few() -> None:
    maxima = np.random.default_rng(0).uniform(0.99, 1.0, (64, 50)).astype(np.float32)
    assert recommended_samples(maxima) == (8, True)


def test_rare_scenes_need_many() -> None:
    """One sample in eight is half as large again: eight samples often miss it, many do not."""
    maxima = np.ones((128, 50), np.float32)
    maxima[::8] = 1.5
    number, settled = recommended_samples(maxima)
    assert settled
    assert 16 <= number <= 64


def test_an_endless_spread_is_not_settled() -> None:
    maxima = np.exp(np.random.default_rng(0).standard_normal((64, 50))).astype(np.float32)
    assert recommended_samples(maxima) == (128, False)


def test_outliers_and_what_nothing_reached_do_not_count() -> None:
    maxima = np.ones((64, 50), np.float32)
    maxima[:, 7] = 0
    maxima[5, :] = 100
    outliers = np.zeros(maxima.shape, bool)
    outliers[5, :] = True
    assert recommended_samples(maxima, outliers) == (8, True)
    assert recommended_samples(maxima)[1] is False


def test_too_few_to_tell() -> None:
    assert recommended_samples(np.ones((3, 5), np.float32)) == (16, False)
    assert recommended_samples(np.zeros((64, 5), np.float32)) == (128, False)
