"""What a policy has to do with its activation scales: the part of `Policy` that is about calibration."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import OptionError
from . import session
from .calibration import CalibrationReport
from .in_force import CalibrationInForce
from .projection_weights import Rounding
from .runner import Runner

logger = logging.getLogger(__name__)


class Calibrated(ABC):
    """Base of `Policy`, which has the model: scales are put in force, kept and dropped here."""

    _calibration: CalibrationInForce | None  # None: the precision has no scales, or the policy was closed

    @property
    @abstractmethod
    def precision(self) -> str:
        """fp32, bf16, fp16 or fp8."""

    @abstractmethod
    def _runner(self) -> Runner:
        """What a calibration needs of this policy."""

    @abstractmethod
    def _exclusive(self) -> AbstractContextManager[None]:
        """The model to itself; raises ClosedError once the policy is closed."""

    @abstractmethod
    def _check_open(self) -> object:
        """Raises ClosedError once the policy is closed."""

    @property
    def calibrated(self) -> bool:
        """Whether the scales this precision needs are in force: always, where it needs none."""
        return self._calibration is None or self._calibration.calibrated

    @property
    def rounding(self) -> Rounding | None:
        """How the weights in force were rounded, "nearest" or "compensated"; None: the precision has none."""
        return None if self._calibration is None else self._calibration.weights.rounding

    @property
    def weights_missing(self) -> str:
        """Why weights rounded to nearest are in force although the calibration, that of the cache, has
        compensated ones; empty where nothing is missing.
        """
        return "" if self._calibration is None else self._calibration.weights_missing

    @property
    def calibration_key(self) -> str:
        """Names the calibrations that fit: another checkpoint byte, configuration, precision, set of views,
        normalisation or library version has another. The first use reads the checkpoint's files, seconds
        for a large one. Raises OptionError (not fp8), CalibrationError (no files) or ClosedError.
        """
        return self._calibration_or_refuse().identity.key

    def calibrate(
        self,
        observations: Iterable[Mapping[str, Any]],
        percentile: float | None = None,
        max_samples: int | None = None,
        verbose: bool = False,
        *,
        estimator: str | None = None,
        source: str = "",
        progress: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        held_out: int = 0,
        weights: str | None = None,
    ) -> CalibrationReport:
        """Set the activation scales from what the model sees in `observations`; graphs stay valid.

        observations: mappings of predict's arguments: images, and where the policy needs them prompt,
        state, noise or seed; taken one by one and not kept. The magnitudes that a projection sees in every
        sample and denoise step are pooled, and its scale comes from them by an estimator: "mse" (default
        from four samples on) clips where rounding and clipping to e4m3 together cost least; "percentile"
        clips above that share of the magnitudes; "max" (default below four) clips nothing. percentile alone
        chooses the estimator: below 100 "percentile", 100 "max". All but "max" leave out a sample whose
        largest or rms magnitude is an outlier among at least four (an octave above the median or more, see
        `quantization.statistics.outlying_samples`): the report names it.

        max_samples: calibrate on at most this many. held_out: so many observations more are set aside, one
        in five or spread over max_samples (no more than one in five where `observations` tells that it is
        shorter, as a list does), and fp8 actions are compared with those of bfloat16 activations
        on them. source: kept with the calibration. progress: called with the number of samples so far.
        should_stop: asked between samples; true raises CalibrationCancelledError. verbose: log scales.

        weights: "compensated" also rounds the weights anew so that their errors cancel on these observations,
        of which up to 64 are kept for that (see `quantization.rounding`): they are read from the checkpoint
        again, and take up to a minute on an H100. "nearest": each weight to its nearest value. None: the
        weights in force stay.

        Raises OptionError (nothing to calibrate, no observations, contradicting options), CalibrationError
        (non-finite activations, too little GPU memory to round weights), DeviceLostError and what predict
        raises; whatever is raised, the scales and weights in force stay. Could they not be put back, every
        later call raises CalibrationError.
        """
        calibration = self._calibration_or_refuse()
        request = session.Request.checked(percentile, estimator, max_samples, held_out, source, weights)
        report = calibration.calibrate(self._runner(), observations, request, progress, should_stop)
        if verbose:
            for name, scale in report.scales.items():
                logger.info("%s: activation scale %.6g", name, scale)
        return report

    def recalibrate(self) -> None:
        """Drop the calibration in force: the next observation sets the scales again. Compensated weights go
        with it, and those rounded to nearest are read from the checkpoint.
        """
        calibration = self._calibration_or_refuse()
        with self._exclusive():
            calibration.drop()

    def save_calibration(self, path: Path | None = None) -> Path:
        """Keep the calibration in force in a file; None: in the cache, where load_model finds it.

        Returns the file. It appears complete or not at all. Compensated weights (2.7 GB for pi0.5) are kept
        beside it, in STEM.DIGEST.weights.safetensors, which the file names: move them together. Raises
        CalibrationError (nothing in force; a path that holds something else than a calibration, or cannot be
        written), OptionError (not fp8), ClosedError or OSError.
        """
        calibration = self._calibration_or_refuse()
        with self._exclusive():
            return calibration.save(path)

    def load_calibration(self, path: Path | None = None) -> None:
        """Put a saved calibration in force, from the next predict on; None: the one in the cache.

        Raises CalibrationNotFoundError, CalibrationMismatchError (of another checkpoint, configuration,
        precision, views, normalisation or version), CalibrationCorruptError, OptionError (not fp8) or
        ClosedError; the calibration in force then stays. Compensated weights that are missing, unreadable or
        damaged raise the same for a file that is named; for the one in the cache they are a warning, and
        those rounded to nearest take their place (`weights_missing`).
        """
        calibration = self._calibration_or_refuse()
        file, content, weights = calibration.read(path)
        with self._exclusive():
            calibration.put(content, weights)
        logger.info("activation scales from %s: %d samples, %s", file, content.samples, content.source)

    def _calibration_or_refuse(self) -> CalibrationInForce:
        self._check_open()
        if self._calibration is None:
            raise OptionError(
                f"precision {self.precision!r} has no activation scales: calibration is for fp8"
            )
        return self._calibration
