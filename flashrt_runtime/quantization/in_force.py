"""The calibration in force in a policy: made, dropped, saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibrationError, CalibrationNotFoundError
from ..models import PrefixPolicy
from . import artifact, session
from .artifact import Calibration, CalibrationIdentity
from .calibration import CalibrationReport, Calibrator, estimate
from .projection_weights import Originals, ProjectionWeights, WeightsFile, remove_replaced
from .runner import Runner

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
        report = session.calibrate(
            runner, self.calibrator, self.weights, observations, request, progress, should_stop
        )
        self._current = Calibration.of(report)
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
        """Without scales take them from the observation at hand, and say so. Its maxima: how much further
        others go, one cannot tell.
        """
        if self.calibrated:
            return
        logger.warning(
            "not calibrated: activation scales are those of this one observation; call calibrate()"
        )
        collector = self.calibrator.collector()
        with collector.observe():
            forward()
        scales, _ = estimate(collector, "max", 100.0)
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
        if path is None:
            target = self.identity.cached_file
        else:
            artifact.check_target(target := path.expanduser())
        replaced = _weights_named_by(target)
        kept = self.weights.write(target) if self._current.rounding == "compensated" else None
        self._current = replace(self._current, weights=kept)
        artifact.write(target, self._current, self.identity)
        remove_replaced(target, replaced, kept)
        logger.info("calibration saved as %s%s", target, f", its weights as {kept.name}" if kept else "")
        return target

    def read(self, path: Path | None) -> tuple[Path, Calibration, dict[str, torch.Tensor] | None]:
        """The file and what it holds, checked against this policy, and its compensated weights; nothing
        changes yet. Where those are not to be had, a warning says so, and the calibration is one of weights
        rounded to nearest.
        """
        source = self.identity.cached_file if path is None else path.expanduser()
        calibration = artifact.read(source, self.identity)
        weights = None if calibration.weights is None else self.weights.read(calibration.weights, source)
        if weights is None:
            calibration = replace(calibration, rounding="nearest", weights=None)
        return source, calibration, weights

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
    except (CalibrationNotFoundError, CalibrationError, OSError):
        return None
