"""Normalisation statistics: openpi's norm_stats.json, and the checks that every source of statistics
passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..config import NormalizationMode
from ..errors import CheckpointError
from .base import FeatureStats, NormStats

STATISTICS = tuple(entry.name for entry in fields(FeatureStats))

# What each mode divides by; identity needs nothing.
NEEDED: dict[NormalizationMode, tuple[str, str] | None] = {
    "quantile": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "identity": None,
}


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises CheckpointError naming file, line and column when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: not JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def feature_stats(values: Mapping[str, object], where: str) -> FeatureStats:
    """Check one feature's statistics: one-dimensional, finite, all of one width, ranges not negative.

    Raises CheckpointError naming `where` and the statistic.
    """
    arrays: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
    for name in STATISTICS:
        if values.get(name) is None:
            continue
        try:
            array = np.asarray(values[name], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}.{name}: expected a list of numbers ({error})") from error
        if array.ndim != 1:
            raise CheckpointError(f"{where}.{name}: expected one dimension, found shape {array.shape}")
        if not np.isfinite(array).all():
            index = int(np.flatnonzero(~np.isfinite(array))[0])
            raise CheckpointError(f"{where}.{name}[{index}] is {array[index]}: statistics must be finite")
        arrays[name] = array
    widths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(widths.values())) > 1:
        raise CheckpointError(f"{where}: statistics of different widths: {widths}")
    for low, high in (("q01", "q99"), ("q10", "q90"), ("min", "max")):
        if low in arrays and high in arrays and (arrays[low] > arrays[high]).any():
            index = int(np.flatnonzero(arrays[low] > arrays[high])[0])
            raise CheckpointError(
                f"{where}: {low}[{index}] = {arrays[low][index]} > {high} = {arrays[high][index]}"
            )
    if "std" in arrays and (arrays["std"] < 0).any():
        raise CheckpointError(f"{where}.std: a standard deviation is negative")
    return FeatureStats(**arrays)


def read_norm_stats(path: Path) -> NormStats:
    """openpi's norm_stats.json: {"norm_stats": {"state"|"actions": {mean, std, q01, q99}}}."""
    content = read_json_object(path)
    groups = content.get("norm_stats")
    if not isinstance(groups, dict):
        raise CheckpointError(f"{path}: expected an object under 'norm_stats', found {type(groups).__name__}")
    found: dict[str, FeatureStats | None] = {"state": None, "actions": None}
    for name in found:
        if name not in groups:
            continue
        if not isinstance(groups[name], dict):
            raise CheckpointError(f"{path}: norm_stats.{name}: expected an object")
        found[name] = feature_stats(groups[name], f"{path}: norm_stats.{name}")
    if found["state"] is None and found["actions"] is None:
        raise CheckpointError(f"{path}: norm_stats holds neither 'state' nor 'actions', but {sorted(groups)}")
    return NormStats(**found)


def check_mode(stats: FeatureStats | None, mode: NormalizationMode, where: str) -> None:
    """The statistics a normalisation mode needs must be there (a feature without any is left as it is)."""
    needed = NEEDED[mode]
    if stats is None or stats.width == 0 or needed is None:
        return
    missing = [name for name in needed if getattr(stats, name) is None]
    if missing:
        raise CheckpointError(
            f"{where}: {mode} normalisation needs {needed[0]} and {needed[1]}, but {' and '.join(missing)} "
            "are missing"
        )


def padded_width(stats: FeatureStats | None) -> int | None:
    """Width without trailing dimensions that are zero in every statistic: those are padding, not a robot's
    joint."""
    if stats is None or stats.width == 0:
        return None
    used = np.zeros(stats.width, dtype=bool)
    for array in stats.arrays().values():
        used |= array != 0
    return int(np.flatnonzero(used)[-1]) + 1 if used.any() else stats.width
