"""One calibration: observations streamed through the model, scales put in force, the error measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

import numpy as np

from ..errors import ActionTokenError, CalibrationCancelledError, CalibrationError, OptionError
from ..inputs import ModelInputs
from .calibration import CalibrationReport, Calibrator, HeldOutError, estimate
from .compensation import Compensation, KeptSamples, check_memory, compensate
from .estimators import Estimator, resolve_estimator
from .projection_weights import ProjectionWeights, Rounding, resolve_rounding
from .runner import Runner
from .statistics import Collector

HELD_OUT_EVERY = 5
FEWEST_TO_CLIP = 4  # below it clipping what was seen costs more on what was not: docs/calibration.md


@dataclass(frozen=True)
class Request:
    """Checked options of `Policy.calibrate`."""

    estimator: Estimator
    percentile: float | None
    max_samples: int | None
    held_out: int
    source: str
    automatic: bool = False
    weights: Rounding | None = None

    @classmethod
    def checked(
        cls,
        percentile: float | None,
        estimator: str | None,
        max_samples: int | None,
        held_out: int,
        source: str,
        weights: str | None = None,
    ) -> Request:
        """Raises OptionError."""
        if max_samples is not None and (isinstance(max_samples, bool) or max_samples < 1):
            raise OptionError(f"max_samples must be 1 or more, or None for all; got {max_samples}")
        if isinstance(held_out, bool) or held_out < 0:
            raise OptionError(f"held_out must be 0 or more, got {held_out}")
        name, resolved = resolve_estimator(estimator, percentile)
        automatic = estimator is None and percentile is None
        rounding = resolve_rounding(weights)
        return cls(name, resolved, max_samples, held_out, source, automatic, rounding)

    def estimator_for(self, samples: int) -> tuple[Estimator, float | None]:
        """Estimator and percentile: by default nothing is clipped that a few samples alone do not tell."""
        if self.automatic and samples < FEWEST_TO_CLIP:
            return "max", 100.0
        return self.estimator, self.percentile

    def held_out_every(self, expected: int | None) -> int:
        """Of so many observations one is held out: spread over what was asked for, or over the fewer that are
        expected, of which no more than one in five is.
        """
        if self.max_samples is None or not self.held_out:
            return HELD_OUT_EVERY
        wanted = self.max_samples + self.held_out
        if expected is None or expected >= wanted:
            return max(2, wanted // self.held_out)
        return max(HELD_OUT_EVERY, expected // self.held_out)

    def shortage(self, samples: int, held_out: int) -> list[str]:
        """A warning where there were fewer observations than asked for."""
        if self.max_samples is None or samples + held_out >= self.max_samples + self.held_out:
            return []
        return [
            f"{samples + held_out} observations of the {self.max_samples} + {self.held_out} that were asked "
            f"for: {samples} calibrated on, {held_out} held out"
        ]


def calibrate(
    runner: Runner,
    calibrator: Calibrator,
    weights: ProjectionWeights,
    observations: Iterable[Mapping[str, Any]],
    request: Request,
    done: Callable[[CalibrationReport], None],
    progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> CalibrationReport:
    """`Policy.calibrate`: whatever it raises, the scales and weights in force before still are.

    One in five observations is held out until there are enough; with max_samples, one in so many that they
    are spread over the stream. `observations` may tell its length (operator.length_hint) where it is shorter.
    done: is given the report while the model is still held.
    """
    if request.weights == "compensated":
        with runner.watched():
            check_memory(weights)
    expected = length_hint(observations, -1)
    every = request.held_out_every(None if expected < 0 else expected)
    collector, kept = calibrator.collector(), KeptSamples()
    held_out: dict[int, ModelInputs] = {}
    position = 0
    for observation in _until(observations, should_stop):
        with runner.exclusive():  # not around the caller's iterator, which may be slow or call us
            inputs = runner.encode(observation)
            position += 1
            enough = request.max_samples is not None and collector.samples >= request.max_samples
            due = enough or position % every == 0
            if due and len(held_out) < request.held_out:
                held_out[position - 1] = _own(inputs)
            else:
                with collector.observe():
                    runner.eager(inputs)
                if request.weights == "compensated":
                    kept.add(collector.samples - 1, inputs)
        if progress is not None:
            progress(collector.samples)
        if collector.samples == request.max_samples and len(held_out) == request.held_out:
            break
    if not collector.samples:
        raise OptionError("calibrate: no observations were given")
    _stop_if_asked(should_stop)
    estimator, percentile = request.estimator_for(collector.samples)
    rounded = None
    if request.weights == "compensated":
        rounded = _rounded(runner, weights, kept, collector, estimator, should_stop)
    with runner.exclusive(), calibrator.restoring():  # what is in force is asked for while nobody changes it
        rounding = request.weights or weights.rounding
        new = None if rounded is None else rounded.weights
        if rounding == "nearest" and weights.rounding != "nearest":
            new = weights.nearest()
        with weights.changed(rounding, new):
            scales, warnings = estimate(collector, estimator, percentile)
            calibrator.apply(scales)
            error, uncompared = measure(runner, calibrator, held_out.values(), should_stop)
            report = CalibrationReport(
                samples=collector.samples,
                estimator=estimator,
                percentile=percentile,
                scales=scales,
                maxima=collector.maxima,
                held_out=tuple(held_out),
                outliers=None if estimator == "max" else collector.outliers(),
                warnings=(*request.shortage(collector.samples, len(held_out)), *warnings, *uncompared),
                held_out_error=error,
                source=request.source,
                rounding=rounding,
                gain=None if rounded is None else rounded.gain(),
            )
            done(report)
    return report


def _rounded(
    runner: Runner,
    weights: ProjectionWeights,
    kept: KeptSamples,
    collector: Collector,
    estimator: Estimator,
    should_stop: Callable[[], bool] | None,
) -> Compensation:
    """Outliers count as the estimator does."""
    left_out = np.zeros(collector.maxima.shape, bool) if estimator == "max" else collector.outliers()
    outliers = dict(zip(collector.names, left_out.T, strict=True))
    with runner.watched():
        return compensate(runner, weights, kept, outliers, lambda: _stop_if_asked(should_stop))


def measure(
    runner: Runner,
    calibrator: Calibrator,
    held_out: Iterable[ModelInputs],
    should_stop: Callable[[], bool] | None = None,
) -> tuple[HeldOutError | None, list[str]]:
    """fp8 as deployed against unquantised activations, with the same noise; the caller has the model.

    pi0fast: a held-out sample whose tokens are no chunk gives a warning, and no error.
    """
    pairs, warnings = [], []
    for index, inputs in enumerate(held_out):
        _stop_if_asked(should_stop)
        try:
            with calibrator.unquantised():
                reference = runner.reference(inputs)
            actions = runner.deployed(inputs)
        except ActionTokenError as error:
            warnings.append(f"held-out sample {index} was not compared: {error}")
            continue
        if not (np.isfinite(actions).all() and np.isfinite(reference).all()):
            because = f" ({runner.range_limit})" if runner.range_limit else ""
            raise CalibrationError(
                f"calibration: a held-out sample gives non-finite actions: nothing changed{because}"
            )
        pairs.append((actions[:, : runner.robot_actions], reference[:, : runner.robot_actions]))
    return HeldOutError.of(pairs), warnings


def _until(
    observations: Iterable[Mapping[str, Any]], should_stop: Callable[[], bool] | None
) -> Iterable[Mapping[str, Any]]:
    """The observations, asking before and after each is made whether to stop."""
    _stop_if_asked(should_stop)
    for observation in observations:
        _stop_if_asked(should_stop)
        yield observation


def _stop_if_asked(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise CalibrationCancelledError("calibration was cancelled: the scales in force stay")


def _own(inputs: ModelInputs) -> ModelInputs:
    """A copy: the caller may reuse its images."""
    return replace(inputs, views=[view.copy() for view in inputs.views])
