"""Exceptions of the runtime: one type per kind of failure.

Every message names what was expected, what came and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class FlashRTError(Exception):
    """Base of everything this package raises on purpose."""


class CheckpointError(FlashRTError, ValueError):
    """A checkpoint's files are not what their layout promises (the message names file and key)."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint at the given path (the message lists what was looked for)."""


class TokenizerNotFoundError(FlashRTError, FileNotFoundError):
    """No SentencePiece model found (the message is the command that fetches it)."""


class ObservationError(FlashRTError, ValueError):
    """Images, state or noise given to the policy do not fit its specification."""


class PromptError(FlashRTError, ValueError):
    """No prompt, or one that cannot be tokenised."""


class PromptTooLongError(PromptError):
    """The prompt has more tokens than the policy's fixed capacity."""


class OptionError(FlashRTError, ValueError):
    """An unknown option value, or options that contradict each other."""


class NotSupportedYetError(FlashRTError, NotImplementedError):
    """A documented option whose implementation has not landed yet."""


class HardwareError(FlashRTError, RuntimeError):
    """The requested device or precision is not available on this machine."""


class DeviceLostError(FlashRTError, RuntimeError):
    """The GPU is lost to this process, every later use of it fails (see `device_loss`): start it again."""


class ActionError(FlashRTError, RuntimeError):
    """The model produced actions that cannot be used (non-finite)."""


class CalibrationError(FlashRTError, RuntimeError):
    """Activation scales cannot be had (non-finite activations, nowhere to keep them)."""


class CalibrationNotFoundError(CalibrationError, FileNotFoundError):
    """No calibration at the given path, or none in the cache for this checkpoint."""


class CalibrationMismatchError(CalibrationError):
    """A calibration of another checkpoint, configuration, precision, normalisation or version."""


class CalibrationCorruptError(CalibrationError):
    """A calibration file that is damaged, or is none."""


class CalibrationCancelledError(CalibrationError):
    """A calibration was told to stop; the scales that were in force still are."""


class DatasetError(FlashRTError, ValueError):
    """A dataset's files are not what their layout promises, or hold nothing that was asked for."""


class ActionTokenError(ActionError):
    """Generated tokens that are no action chunk. `tokens`: all of them, as generated."""

    def __init__(self, message: str, tokens: Sequence[int]) -> None:
        self.tokens = tuple(int(token) for token in tokens)
        super().__init__(f"{message}; the {len(self.tokens)} tokens: {list(self.tokens)}")


class NoStopError(ActionTokenError):
    """The generated tokens reached their limit without a stop token."""


class ClosedError(FlashRTError, RuntimeError):
    """The policy was used after `close()`."""


class ReentryError(FlashRTError, RuntimeError):
    """The policy was called by the thread that is inside a call of it."""


class ParityError(FlashRTError, RuntimeError):
    """The other implementation is not installed, or its run failed (the message says how to go on)."""
