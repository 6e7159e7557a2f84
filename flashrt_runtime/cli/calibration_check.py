"""`flashrt info --calibration`: whether a calibration belongs to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint
from ..errors import CalibrationError, CalibrationNotFoundError
from ..quantization import artifact
from ..spec import DEFAULT_VIEWS


def check_calibration(checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    """What a file is, and where it differs from the checkpoint; no differences: it belongs. Compensated
    weights that are missing, unreadable or damaged are one.

    Precision, number of views and denoise steps are a load's choice: the file's own count. Raises
    CalibrationNotFoundError, CalibrationCorruptError or CalibrationMismatchError (another format).
    """
    stored = artifact.stored_identity(file)
    content = artifact.read(file)
    chosen: Any = stored.get("model")
    steps = chosen.get("num_steps") if isinstance(chosen, Mapping) else None
    if isinstance(steps, int):
        checkpoint.config = checkpoint.config.with_steps(steps)
    views = (checkpoint.views or DEFAULT_VIEWS)[: len(stored.get("views", ()))]
    identity = artifact.identity_of(checkpoint, views, str(stored.get("precision")))
    error = content.held_out_error
    weights, problem = _weights(content, file)
    differences = [*identity.differences(stored), *([problem] if problem else [])]
    return {
        "file": str(file),
        "belongs": not differences,
        "differences": differences,
        "key": identity.key,
        "checkpoint digest": identity.checkpoint,
        "file's checkpoint digest": stored.get("checkpoint"),
        "precision": stored.get("precision"),
        "views": stored.get("views"),
        "samples": content.samples,
        "estimator": content.estimator,
        "percentile": content.percentile,
        "source": content.source,
        "date": content.date,
        "library version": stored.get("version"),
        "projections": len(content.scales),
        "weights": weights,
        "held-out max-abs": None if error is None else error.max_abs,
        "held-out relative rms": None if error is None else error.relative_rms,
        "held-out cosine": None if error is None else error.cosine,
        "warnings": list(content.warnings),
    }


def _weights(content: artifact.Calibration, file: Path) -> tuple[str, str]:
    """How the weights that go with it are rounded and where they are, and what is wrong with them."""
    if content.weights is None:
        return content.rounding, ""
    named = f"{content.rounding}, {content.weights.name}"
    try:
        content.weights.check(file)
    except CalibrationNotFoundError as error:
        return f"{named} (MISSING beside the file)", str(error)
    except CalibrationError as error:
        return f"{named} (NOT USABLE)", str(error)
    return named, ""
