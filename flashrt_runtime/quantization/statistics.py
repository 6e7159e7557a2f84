"""What an activation's magnitudes are distributed like, in fixed memory, for any number of samples.

A bin is one bfloat16 value, so that a histogram of bfloat16 activations is exact and needs no first pass
to find its range. Samples of like size share a histogram: a sample that turns out to be an outlier can be
left out at the end, although its activations are long gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from .fp8 import Fp8Linear

LOWEST_EXPONENT = -40  # smaller magnitudes count as zero
OCTAVES = 80
PER_OCTAVE = 128  # bfloat16 has 7 bits of mantissa
BINS = OCTAVES * PER_OCTAVE
_FIRST = (127 + LOWEST_EXPONENT) * PER_OCTAVE  # the upper 16 bits of float32 2**LOWEST_EXPONENT

GROUPS_PER_OCTAVE = 2
FEWEST_FOR_OUTLIERS = 4  # a majority needs company
OUTLIER_OCTAVES = 1.0
OUTLIER_DEVIATIONS = 4.0
OUTLIER_SHARE = 0.25  # more than this is how the data are, and no outlier


def magnitude_counts(x: Tensor) -> Tensor:
    """How often each magnitude occurs in x (any shape, floating): (BINS,) int64 on x's device.

    Magnitudes are truncated to bfloat16; those below 2**-40 count as zero, those above 2**40 as the largest.
    """
    bits = x.detach().reshape(-1).float().abs().view(torch.int32) >> 16
    return torch.bincount((bits - _FIRST).clamp_(0, BINS - 1), minlength=BINS)


def bin_magnitudes(device: torch.device | None = None) -> Tensor:
    """The magnitude that each bin stands for: (BINS,) float32, increasing from 0."""
    bits = torch.arange(_FIRST, _FIRST + BINS, dtype=torch.int32, device=device) << 16
    values = bits.view(torch.float32)
    values[0] = 0.0
    return values


def outlying_samples(maxima: NDArray[np.float32], rms: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which samples of one tensor are outliers, by their largest and their rms magnitudes, (samples,) each.

    With four samples or more: one whose maximum or rms lies an octave above the median sample's, or four
    standard deviations (from the median absolute deviation of the logarithms) where that is more; in half
    octaves, so that three times the median is found wherever it lies, and less than twice never. None at all
    when that were more than a quarter of them.
    """
    none = np.zeros(len(maxima), bool)
    if len(maxima) < FEWEST_FOR_OUTLIERS:
        return none
    outlying = none.copy()
    for values in (maxima, rms):
        logs = np.log2(np.maximum(values.astype(np.float64), 2.0**LOWEST_EXPONENT))
        median = float(np.median(logs))
        deviation = 1.4826 * float(np.median(np.abs(logs - median)))
        limit = median + max(OUTLIER_OCTAVES, OUTLIER_DEVIATIONS * deviation)
        outlying |= np.floor(logs * GROUPS_PER_OCTAVE) > math.floor(limit * GROUPS_PER_OCTAVE)
    return outlying if outlying.sum() <= OUTLIER_SHARE * len(maxima) else none


class Collector:
    """Collects the inputs of statically scaled projections, sample after sample.

    Memory does not depend on the number of samples, but for two floats per sample and projection: one
    histogram per projection for the sample under way, and one for each half octave of maximum and rms that
    samples were seen to have.
    """

    def __init__(self, linears: Mapping[str, Fp8Linear]) -> None:
        self.linears = dict(linears)
        self.names = tuple(self.linears)
        device = next(iter(self.linears.values())).activation_scale.device if self.linears else None
        self._counts = torch.zeros(len(self.names), BINS, dtype=torch.int64, device=device)
        self._peaks = torch.zeros(len(self.names), dtype=torch.float32, device=device)
        self._squares = bin_magnitudes(device).double().square()
        self._groups: list[dict[tuple[int, int], Tensor]] = [{} for _ in self.names]
        self._maxima: list[NDArray[np.float32]] = []
        self._rms: list[NDArray[np.float32]] = []

    @property
    def samples(self) -> int:
        """Samples collected so far."""
        return len(self._maxima)

    @property
    def maxima(self) -> NDArray[np.float32]:
        """Largest magnitude of every sample and projection: (samples, projections)."""
        return np.stack(self._maxima) if self._maxima else np.zeros((0, len(self.names)), np.float32)

    @property
    def rms(self) -> NDArray[np.float32]:
        """Root of the mean square of every sample and projection: (samples, projections)."""
        return np.stack(self._rms) if self._rms else np.zeros((0, len(self.names)), np.float32)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """One sample: within it projections take unquantised activations and count them, all denoise steps
        together. A sample that fails or holds non-finite activations (CalibrationError) is not counted.
        """
        with torch.inference_mode():
            self._counts.zero_()
            self._peaks.zero_()
        with observing(self.linears, lambda index: partial(self._add, index)):
            yield
        self._finish()

    @torch.inference_mode()
    def _add(self, index: int, x: Tensor) -> None:
        self._counts[index] += magnitude_counts(x)
        self._peaks[index] = torch.maximum(self._peaks[index], x.abs().amax().float())

    @torch.inference_mode()
    def _finish(self) -> None:
        peaks = self._peaks.cpu().numpy().copy()  # on the CPU it would be the buffer itself
        broken = [name for name, peak in zip(self.names, peaks, strict=True) if not math.isfinite(peak)]
        if broken:
            raise CalibrationError(
                f"calibration: sample {self.samples} has non-finite activations in {len(broken)} "
                f"projections, first {broken[0]}: the scales in force stay; check the sample's images and "
                "state, and the checkpoint with `flashrt info --verify`"
            )
        rms = self._sample_rms()
        for index, group in enumerate(zip(_groups(peaks), _groups(rms), strict=True)):
            pooled = self._groups[index].setdefault(group, torch.zeros_like(self._counts[index]))
            pooled += self._counts[index]
        self._maxima.append(peaks)
        self._rms.append(rms)

    def _sample_rms(self) -> NDArray[np.float32]:
        total = self._counts.sum(1).clamp_min(1)
        mean_square = torch.stack([counts @ self._squares for counts in self._counts.double()]) / total
        result: NDArray[np.float32] = mean_square.sqrt().float().cpu().numpy()
        return result

    def outliers(self) -> NDArray[np.bool_]:
        """Which samples are outliers in which projection: (samples, projections)."""
        maxima, rms = self.maxima, self.rms
        columns = [outlying_samples(maxima[:, index], rms[:, index]) for index in range(len(self.names))]
        return np.stack(columns, 1) if columns else np.zeros(maxima.shape, bool)

    @torch.inference_mode()
    def histogram(self, index: int, keep: NDArray[np.bool_]) -> tuple[Tensor, float]:
        """Counts pooled over the samples to keep, (BINS,) int64, and their largest magnitude.

        keep: (samples,); the same for samples of the same half octaves, as `~outliers()` is.
        """
        maxima, rms = self.maxima[keep, index], self.rms[keep, index]
        pooled = torch.zeros_like(self._counts[index])
        for group in set(zip(_groups(maxima), _groups(rms), strict=True)):
            pooled += self._groups[index][group]
        return pooled, float(maxima.max(initial=0.0))


@contextmanager
def observing(
    linears: Mapping[str, Fp8Linear], observer: Callable[[int], Callable[[Tensor], None] | None] | None = None
) -> Iterator[None]:
    """Within it projections take their input unquantised; observer: per projection, what is shown it, if
    anything is.
    """
    for index, linear in enumerate(linears.values()):
        linear.observing = True
        linear.observer = None if observer is None else observer(index)
    try:
        yield
    finally:
        for linear in linears.values():
            linear.observing = False
            linear.observer = None


def _groups(magnitudes: NDArray[np.float32]) -> list[int]:
    logs = np.log2(np.maximum(magnitudes.astype(np.float64), 2.0**LOWEST_EXPONENT))
    return [math.floor(value) for value in logs * GROUPS_PER_OCTAVE]
