"""The calibration in force in a policy: made, dropped, saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from . import artifact, session
from .artifact import Calibration, CalibrationIdentity
from .calibration import CalibrationReport, Calibrator, estimate

logger = logging.getLogger(__name__)


class CalibrationInForce:
    """Not thread-safe but for what takes a `Runner`: the policy that owns it takes one call at a time.

    identify: gives the policy's identity; asked for once, when it is needed.
    """

    def __init__(self, model: nn.Module, identify: Callable[[], CalibrationIdentity]) -> None:
        self.calibrator = Calibrator(model)
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
        runner: session.Runner,
        observations: Iterable[Mapping[str, Any]],
        request: session.Request,
        progress: Callable[[int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> CalibrationReport:
        """`Policy.calibrate`."""
        report = session.calibrate(runner, self.calibrator, observations, request, progress, should_stop)
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
        )
        self._current = Calibration.of(report)

    def drop(self) -> None:
        """`Policy.recalibrate`."""
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
        artifact.write(target, self._current, self.identity)
        logger.info("calibration saved as %s", target)
        return target

    def read(self, path: Path | None) -> tuple[Path, Calibration]:
        """The file and what it holds, checked against this policy; nothing changes yet."""
        source = self.identity.cached_file if path is None else path.expanduser()
        return source, artifact.read(source, self.identity)

    def put(self, calibration: Calibration) -> None:
        """Scales that were read are in force from now on; the model must be held."""
        with self.calibrator.restoring():
            self.calibrator.apply(calibration.scales)
        self._current = calibration
