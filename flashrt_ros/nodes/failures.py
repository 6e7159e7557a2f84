"""Which reason code an error of the runtime, of the core or of a parameter has."""

from __future__ import annotations

from flashrt_ros.core.errors import CoreError
from flashrt_ros.core.parameters import ParameterError
from flashrt_ros.core.reasons import Reason
from flashrt_runtime import errors

# First match wins: subclasses before their bases.
_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (errors.PromptError, Reason.PROMPT_INVALID),
    (errors.NoStopError, Reason.NO_STOP_TOKEN),
    (errors.ActionTokenError, Reason.ACTION_TOKENS),
    (errors.ActionError, Reason.CHUNK_NOT_FINITE),
    (errors.DatasetError, Reason.DATASET_INVALID),
    (errors.CalibrationMismatchError, Reason.CALIBRATION_MISMATCH),
    (errors.CalibrationCorruptError, Reason.CALIBRATION_CORRUPT),
    (errors.CalibrationNotFoundError, Reason.CALIBRATION_MISSING),
    (errors.CalibrationCancelledError, Reason.CALIBRATION_CANCELLED),
    (errors.CalibrationError, Reason.CALIBRATION_FAILED),
    (errors.CheckpointError, Reason.CHECKPOINT_INVALID),
    (errors.TokenizerNotFoundError, Reason.CHECKPOINT_INVALID),
    (errors.DeviceLostError, Reason.DEVICE_LOST),
    (errors.OptionError, Reason.PARAMETER_INVALID),
    (errors.NotSupportedYetError, Reason.PARAMETER_INVALID),
    (errors.HardwareError, Reason.PARAMETER_INVALID),
    (ParameterError, Reason.PARAMETER_INVALID),
)

# Errors raised on purpose: their message says everything, a traceback would only bury it.
EXPECTED = (errors.FlashRTError, CoreError, ParameterError)


def reason_of(error: Exception, otherwise: Reason) -> Reason:
    """The reason an error carries itself, or that of its kind; `otherwise` for any other."""
    own = getattr(error, "reason", None)
    if isinstance(own, Reason):
        return own
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported
        return Reason.OUT_OF_MEMORY
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), otherwise)


def describe(error: BaseException) -> str:
    """The error in words; the type is added where the message may not speak for itself."""
    text = getattr(error, "message", "") or str(error)
    return text if isinstance(error, EXPECTED) else f"{type(error).__name__}: {text}"
