"""A model's static activation scales: in force or not, written in place, and what is told about them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import CalibrationError
from ..ops import E4M3_MAX
from .estimators import Estimator, estimate_scale
from .fp8 import Fp8Linear, fp8_linears, settle
from .projection_weights import Rounding
from .statistics import Collector, observing

CEILING = 20.0


@dataclass(frozen=True)
class HeldOutError:
    """How far fp8 actions are from those of the same weights with bfloat16 activations, over observations
    that were not calibrated on, in model space (normalised actions, the robot's dimensions).

    max_abs: largest difference; relative_rms: ‖difference‖ / ‖reference‖; cosine: of a chunk with its
    reference. Each is the worst sample's; per_sample has (max_abs, relative_rms, cosine) of every one.
    """

    max_abs: float
    relative_rms: float
    cosine: float
    per_sample: tuple[tuple[float, float, float], ...]

    @classmethod
    def of(cls, pairs: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> HeldOutError | None:
        """From (actions, reference actions) of each sample; None without any."""
        rows = tuple(action_error(actions, reference) for actions, reference in pairs)
        return cls.of_rows(rows) if rows else None

    @classmethod
    def of_rows(cls, rows: tuple[tuple[float, float, float], ...]) -> HeldOutError:
        """From the rows of `per_sample`, at least one."""
        worst, relative, cosines = zip(*rows, strict=True)
        return cls(max(worst), max(relative), min(cosines), rows)


@dataclass(frozen=True)
class RoundingGain:
    """What compensated rounding is worth on the observations that it was made from: the error behind a
    projection relative to its output, median over the projections, by nearest rounding and as it is now;
    left_nearest: how many projections kept their nearest values.
    """

    error_nearest: float
    error_compensated: float
    projections: int
    left_nearest: int

    def __str__(self) -> str:
        return (
            f"error behind a projection {self.error_nearest:.4f} by nearest rounding, "
            f"{self.error_compensated:.4f} now (median, on the calibration's observations); "
            f"{self.left_nearest} of {self.projections} projections left to nearest"
        )


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did.

    samples: observations the scales are from. scales: by projection. maxima: (samples, projections) largest
    magnitudes, projections in the order of `scales`. warnings: outliers and scales above the ceiling, with
    projection and samples (indices count the calibrated observations from 0). held_out_error: None when none
    was held out. held_out: which observations of the stream were, counted from 0. outliers: (samples,
    projections), what was left out; None where the estimator takes everything. rounding: of the weights in
    force; gain: what it is worth, where this calibration rounded them.
    """

    samples: int
    estimator: str
    percentile: float | None
    scales: Mapping[str, float]
    maxima: NDArray[np.float32] = field(repr=False)
    held_out: tuple[int, ...] = ()
    outliers: NDArray[np.bool_] | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    held_out_error: HeldOutError | None = None
    source: str = ""
    rounding: Rounding = "nearest"
    gain: RoundingGain | None = None


def action_error(
    actions: NDArray[np.float32], reference: NDArray[np.float32]
) -> tuple[float, float, float]:
    """(largest difference, relative rms, cosine) of two chunks of actions."""
    a, b = actions.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    norm = float(np.linalg.norm(b)) or 1.0
    cosine = float(a @ b) / (float(np.linalg.norm(a)) or 1.0) / norm
    return float(np.abs(a - b).max(initial=0.0)), float(np.linalg.norm(a - b)) / norm, cosine


class Calibrator:
    """The statically scaled projections of a model.

    Scales live on the device and are written in place, so a captured graph uses new ones from its next
    replay on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.linears: dict[str, Fp8Linear] = {
            name: linear for name, linear in fp8_linears(model).items() if linear.static
        }

    @property
    def calibrated(self) -> bool:
        """Whether scales are in force."""
        return any(linear.calibrated for linear in self.linears.values())

    def collector(self) -> Collector:
        """An empty collector of what these projections see."""
        return Collector(self.linears)

    def unquantised(self) -> AbstractContextManager[None]:
        """Within it projections take their input as it is: the reference of a held-out error."""
        return observing(self.linears)

    @contextmanager
    def assumed(self) -> Iterator[None]:
        """Within it, projections quantise their input by the scale they have, calibrated or not: for
        capturing.
        """
        before = {name: linear.calibrated for name, linear in self.linears.items()}
        for linear in self.linears.values():
            linear.calibrated = True
        try:
            yield
        finally:
            for name, linear in self.linears.items():
                linear.calibrated = before[name]

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Within it, scales may change; an exception brings back those that were in force."""
        before = [(float(each.activation_scale), each.calibrated) for each in self.linears.values()]
        try:
            yield
        except BaseException:
            with torch.inference_mode():
                for linear, (scale, calibrated) in zip(self.linears.values(), before, strict=True):
                    linear.activation_scale.fill_(scale)
                    linear.calibrated = calibrated
            settle(self.linears.values())
            raise

    def drop(self) -> None:
        """No scales are in force any more."""
        for linear in self.linears.values():
            linear.calibrated = False

    @torch.inference_mode()
    def apply(self, scales: Mapping[str, float]) -> None:
        """Put scales in force; raises CalibrationError unless there is a positive one for each projection."""
        if set(scales) != set(self.linears):
            raise CalibrationError(
                f"calibration: {len(set(scales) ^ set(self.linears))} projections without a scale or "
                "scales without a projection"
            )
        broken = [name for name, scale in scales.items() if not (math.isfinite(scale) and scale > 0)]
        if broken:
            raise CalibrationError(f"calibration: no usable scale for {broken[0]}: {scales[broken[0]]}")
        for name, linear in self.linears.items():
            linear.activation_scale.fill_(scales[name])
            linear.calibrated = True
        settle(self.linears.values())

    def scales(self) -> dict[str, float]:
        """Activation scale of every statically scaled projection, by name."""
        values = [linear.activation_scale for linear in self.linears.values()]
        return dict(zip(self.linears, torch.stack(values).tolist() if values else [], strict=True))


@torch.inference_mode()
def estimate(
    collector: Collector, estimator: Estimator, percentile: float | None
) -> tuple[dict[str, float], list[str]]:
    """Scales by projection, and warnings: outliers left out, and scales above the ceiling.

    Samples are pooled. `max` takes every sample; the others leave out, projection by projection, those that
    `statistics.outlying_samples` finds.
    """
    maxima = collector.maxima
    outliers = np.zeros(maxima.shape, bool) if estimator == "max" else collector.outliers()
    scales = {}
    for index, name in enumerate(collector.names):
        counts, peak = collector.histogram(index, ~outliers[:, index])
        scales[name] = estimate_scale(counts, peak, estimator, percentile)
    kept = np.where(outliers, np.float32(0), maxima)
    return scales, _outlier_warnings(collector, outliers) + check_scale_ceiling(scales, kept)


def _outlier_warnings(collector: Collector, outliers: NDArray[np.bool_]) -> list[str]:
    """One line for each sample that was left out anywhere."""
    names, smallest = collector.names, np.finfo(np.float32).tiny
    each = (collector.maxima, collector.rms)
    ratios = np.maximum(*(values / np.maximum(np.median(values, 0), smallest) for values in each))
    warnings = []
    for sample in np.flatnonzero(outliers.any(1)):
        where = np.flatnonzero(outliers[sample])
        worst = where[np.argmax(ratios[sample, where])]
        warnings.append(
            f"sample {sample} is an outlier in {len(where)} of {len(names)} projections and was left out "
            f"there: in {names[worst]} it is {ratios[sample, worst]:.1f} times as large as the median sample"
        )
    return warnings


def check_scale_ceiling(
    scales: Mapping[str, float], maxima: NDArray[np.float32] | None = None, ceiling: float = CEILING
) -> list[str]:
    """A warning for each projection whose scale is above `ceiling` times the median scale of the run.

    maxima: (samples, projections) in the order of `scales`; with it projections that nothing reached do not
    count, and a warning names the samples that reach half of the projection's largest magnitude, or, where
    those are most of them, says so.
    """
    columns = {name: None if maxima is None else maxima[:, i] for i, name in enumerate(scales)}
    reached = {name: scales[name] for name, column in columns.items() if column is None or column.any()}
    median = float(np.median(list(reached.values()))) if reached else 0.0
    warnings = []
    for name, scale in reached.items():
        if not scale > ceiling * median:
            continue
        text = (
            f"{name}: activation scale {scale:.4g} is {scale / median:.0f} times the median {median:.4g} "
            f"(largest magnitude {scale * E4M3_MAX:.4g})"
        )
        column = columns[name]
        warnings.append(text if column is None else f"{text}, from {_culprits(column)}")
    return warnings


def _culprits(maxima: NDArray[np.float32], named: int = 8) -> str:
    high = np.flatnonzero(maxima >= maxima.max() / 2)
    if len(high) > max(1, len(maxima) // 2):
        return f"{len(high)} of {len(maxima)} samples: the projection is like that"
    ordered = high[np.argsort(-maxima[high], kind="stable")]
    more = f" and {len(ordered) - named} more" if len(ordered) > named else ""
    return f"sample{'s' if len(ordered) > 1 else ''} {', '.join(map(str, ordered[:named]))}{more}"
