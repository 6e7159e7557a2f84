"""The calibration in force in a policy: made, dropped, saved and loaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibrationError
from ..models import PrefixPolicy
from . import artifact, session
from .artifact import Calibration, CalibrationIdentity
from .calibration import CalibrationReport, Calibrator, estimate
from .projection_weights import Originals, ProjectionWeights
from .runner import Runner
from .weights_file import WeightsFile

logger = logging.getLogger(__name__)


class CalibrationInForce:
    """Not thread-safe but for what takes a `Runner`: the policy that owns it takes one call at a time.

    identify: gives the policy's identity; asked for once, when it is needed. originals: the checkpoint's
    weights, see `ProjectionWeights`.
    """

    def __init__(
        self, model: PrefixPolicy, identify: Callable[[], CalibrationIdentity], originals: Originals
    ) -> None:
        self.calibrator = Calibrator(model)
        self.weights = ProjectionWeights(model, originals)
        self._identify = identify
        self._identity: CalibrationIdentity | None = None
        self._current: Calibration | None = None

    @property
    def identity(self) -> CalibrationIdentity:
        """Of the policy; raises CalibrationError where it has none."""
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    @property
    def weights_missing(self) -> str:
        """Why the nearest weights are in force where the calibration has others; empty: it has its own."""
        return "" if self._current is None else self._current.weights_missing

    @property
    def calibrated(self) -> bool:
        """Whether scales are in force."""
        return self.calibrator.calibrated

    def calibrate(
        self,
        runner: Runner,
        observations: Iterable[Mapping[str, Any]],
        request: session.Request,
        progress: Callable[[int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> CalibrationReport:
        """`Policy.calibrate`."""

        def done(report: CalibrationReport) -> None:
            self._current = Calibration.of(report)

        report = session.calibrate(
            runner, self.calibrator, self.weights, observations, request, done, progress, should_stop
        )
        logger.info(
            "activation scales of %d projections from %d observations by %s",
            len(report.scales),
            report.samples,
            report.estimator,
        )
        for warning in report.warnings:
            logger.warning("calibration: %s", warning)
        return report

    def from_first(self, forward: Callable[[], torch.Tensor]) -> None:
        """Take the scales from the observation at hand, as there are none, and say so. Its maxima: how much
        further others go, one cannot tell.
        """
        logger.warning(
            "not calibrated: activation scales are those of this one observation; call calibrate()"
        )
        collector = self.calibrator.collector()
        with collector.observe():
            forward()
        scales, _ = estimate(collector, "max", 100.0)
        with self.calibrator.restoring():  # an interrupt leaves all of them or none
            self.calibrator.apply(scales)
        report = CalibrationReport(
            1, "max", 100.0, scales, collector.maxima, source="the first observation"
        )  # weights are nearest where no calibration is in force
        self._current = Calibration.of(report)

    def drop(self) -> None:
        """`Policy.recalibrate`."""
        rounded = None if self.weights.rounding == "nearest" else self.weights.nearest()
        with self.weights.changed("nearest", rounded):
            self.calibrator.drop()
        self._current = None

    def save(self, path: Path | None) -> Path:
        """`Policy.save_calibration`."""
        if self._current is None or not self.calibrated:
            raise CalibrationError("no calibration is in force, so there is none to save: call calibrate()")
        identity = self.identity
        target = identity.cached_file if path is None else path.expanduser()
        if path is not None:
            artifact.check_target(target)
        replaced = _weights_named_by(target)
        kept, new = self.weights.write(target) if self._current.rounding == "compensated" else (None, False)
        current = replace(self._current, weights=kept)
        try:
            artifact.write(target, current, identity)
        except BaseException:
            if kept is not None and new and _weights_named_by(target) != kept:  # an interrupt may come late
                kept.beside(target).unlink(missing_ok=True)
            raise
        self._current = current
        if replaced is not None and replaced != kept:
            _remove(target, replaced)
        logger.info("calibration saved as %s%s", target, f", its weights as {kept.name}" if kept else "")
        return target

    def read(self, path: Path | None) -> tuple[Path, Calibration, dict[str, torch.Tensor] | None]:
        """The file and what it holds, checked against this policy, and its compensated weights; nothing
        changes yet. path: None for the cache's, whose weights may be missing: a warning says so, and the
        calibration is one of weights rounded to nearest. A file that is named has them or is refused.
        """
        source = self.identity.cached_file if path is None else path.expanduser()
        calibration = artifact.read(source, self.identity)
        if calibration.weights is None:
            return source, replace(calibration, rounding="nearest"), None
        try:
            return source, calibration, self.weights.read(calibration.weights, source)
        except CalibrationError as error:
            if path is not None:
                raise
            logger.warning(
                "%s. Weights rounded to nearest take their place, which follow the checkpoint less closely",
                error,
            )
            # the error was measured with the weights that are missing
            without = replace(calibration, rounding="nearest", weights=None, held_out_error=None)
            return source, replace(without, weights_missing=str(error)), None

    def put(self, calibration: Calibration, weights: dict[str, torch.Tensor] | None = None) -> None:
        """What was read is in force from now on; the model must be held."""
        if weights is None and self.weights.rounding != "nearest":
            weights = self.weights.nearest()
        with self.calibrator.restoring(), self.weights.changed(
            calibration.rounding, weights, calibration.weights
        ):
            self.calibrator.apply(calibration.scales)
        self._current = calibration


def _weights_named_by(path: Path) -> WeightsFile | None:
    """By the calibration that stands there, if one does."""
    try:
        return artifact.read(path).weights
    except (CalibrationError, OSError):
        return None


def _remove(calibration: Path, replaced: WeightsFile) -> None:
    """Delete the weights of a calibration that another has replaced: gigabytes that nothing names now. What
    is not ours, not readable or not what its name says stays.
    """
    ours = replaced == WeightsFile.of(calibration, replaced.digest)
    with contextlib.suppress(OSError):
        if ours and not artifact.named_by_others(calibration, replaced) and replaced.is_whole(calibration):
            replaced.beside(calibration).unlink()
