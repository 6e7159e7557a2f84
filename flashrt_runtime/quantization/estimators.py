"""From a histogram of magnitudes to the static scale of an e4m3 activation."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import OptionError
from ..ops import E4M3, E4M3_MAX
from .statistics import bin_magnitudes

Estimator = Literal["mse", "percentile", "max"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
DEFAULT_ESTIMATOR: Estimator = "mse"
DEFAULT_PERCENTILE = 99.9

CLIP_STEPS_PER_OCTAVE = 8
CLIP_OCTAVES = 6


def resolve_estimator(estimator: str | None, percentile: float | None) -> tuple[Estimator, float | None]:
    """Estimator and percentile from what was asked for; raises OptionError for a contradiction."""
    if percentile is not None and not 0.0 < percentile <= 100.0:
        raise OptionError(f"percentile must be above 0 and at most 100, got {percentile!r}")
    if estimator is None:
        if percentile is None:
            return DEFAULT_ESTIMATOR, None
        return ("max", 100.0) if percentile == 100.0 else ("percentile", float(percentile))
    if estimator == "mse":
        if percentile is not None:
            raise OptionError(f"estimator 'mse' takes no percentile, got {percentile!r}: drop one of the two")
        return "mse", None
    if estimator == "max":
        if percentile not in (None, 100.0):
            raise OptionError(f"estimator 'max' is percentile 100, got {percentile!r}: drop one of the two")
        return "max", 100.0
    if estimator == "percentile":
        return "percentile", DEFAULT_PERCENTILE if percentile is None else float(percentile)
    raise OptionError(f"unknown estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")


def estimate_scale(
    counts: Tensor, peak: float, estimator: Estimator, percentile: float | None = None
) -> float:
    """The scale s of q = e4m3(x / s) for magnitudes with these counts, (BINS,) int64; peak: the largest.

    max: peak / 448, nothing is clipped. percentile: the smallest magnitude that this share of all elements
    does not exceed, / 448 (the maximum's where that is zero). mse: of the clipping points
    peak * 2**(-k/8), k = 0 … 48, the one with the smallest sum of squared rounding and clipping errors.
    1 where nothing but zeros was seen.
    """
    if not peak > 0.0:
        return 1.0
    if estimator == "max":
        return _scale(peak)
    if estimator == "percentile":
        assert percentile is not None
        return _scale(min(_percentile(counts, percentile), peak) or peak)
    clips = peak * 2.0 ** (-torch.arange(CLIP_OCTAVES * CLIP_STEPS_PER_OCTAVE + 1) / CLIP_STEPS_PER_OCTAVE)
    best = int(rounding_errors(counts, clips / E4M3_MAX).argmin())
    return _scale(float(clips[best]))


def rounding_errors(counts: Tensor, scales: Tensor) -> Tensor:
    """Sum of squared differences between the counted magnitudes and their e4m3 values by each scale.

    counts: (BINS,) int64; scales: (n,) float32. Returns (n,) float64 on the host.
    """
    seen = counts.nonzero().squeeze(1)
    values = bin_magnitudes(counts.device)[seen]
    scales = scales.to(counts.device, torch.float32).unsqueeze(1)
    stored = (values * scales.reciprocal()).clamp(max=E4M3_MAX).to(E4M3).float() * scales
    return ((stored - values).double().square() * counts[seen]).sum(1).cpu()


def _percentile(counts: Tensor, percentile: float) -> float:
    below = counts.cumsum(0)
    wanted = max(1, math.ceil(int(below[-1]) * percentile / 100))
    index = int(torch.searchsorted(below, wanted))
    return float(bin_magnitudes(counts.device)[index])


def _scale(clip: float) -> float:
    """clip / 448 as a float32, never denormal."""
    return max(float(torch.tensor(clip, dtype=torch.float32) / E4M3_MAX), torch.finfo(torch.float32).tiny)
