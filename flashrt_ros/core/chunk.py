"""Pure functions on action chunks: check, resample to the control rate, blend. Arrays are float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .contract_model import FloatArray, Representation
from .errors import ChunkError
from .reasons import Reason


def check_chunk(actions: ArrayLike, dof: int) -> FloatArray:
    """Return `actions` as a (horizon, dof) float64 array.

    Raises ChunkError: CHUNK_SHAPE, or CHUNK_NOT_FINITE when any value is NaN or infinite (one bad value
    condemns the whole chunk).
    """
    try:
        array = np.asarray(actions, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ChunkError(Reason.CHUNK_SHAPE, f"actions are no numeric array: {error}") from error
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != dof:
        text = f"expected actions of shape (horizon, {dof}), got {array.shape}"
        raise ChunkError(Reason.CHUNK_SHAPE, text)
    finite = np.isfinite(array)
    if not finite.all():
        row, column = (int(index) for index in np.argwhere(~finite)[0])
        text = f"action {row}, joint index {column} is {array[row, column]}"
        raise ChunkError(Reason.CHUNK_NOT_FINITE, text)
    return array


def at_control_rate(actions: FloatArray, ratio: int, representation: Representation) -> FloatArray:
    """Commands for every control tick of a chunk whose actions last `ratio` ticks each.

    absolute: linear interpolation, action i due exactly at tick i * ratio -> ((H - 1) * ratio + 1, dof).
    delta: an increment is spread evenly over its ticks -> (H * ratio, dof).
    velocity: repeated -> (H * ratio, dof).
    """
    if representation is Representation.VELOCITY:
        return np.repeat(actions, ratio, axis=0)
    if representation is Representation.DELTA:
        return np.repeat(actions / ratio, ratio, axis=0)
    ticks = np.arange((len(actions) - 1) * ratio + 1)
    index, fraction = ticks // ratio, ((ticks % ratio) / ratio)[:, None]
    following = np.minimum(index + 1, len(actions) - 1)
    # Weighted sum, not a + f * (b - a): exact at f = 0 and free of overflow.
    path: FloatArray = (1.0 - fraction) * actions[index] + fraction * actions[following]
    return path


def at_action_rate(path: FloatArray, ratio: int, representation: Representation) -> FloatArray:
    """Commands of control ticks as actions of `ratio` ticks each, the first due at row 0: what
    `at_control_rate` takes back. absolute: the values due then; delta: sums, velocity: means of whole
    actions only.
    """
    if representation is Representation.ABSOLUTE:
        return path[::ratio]
    whole = path[: len(path) // ratio * ratio].reshape(-1, ratio, path.shape[1])
    actions: FloatArray = whole.sum(axis=1) if representation is Representation.DELTA else whole.mean(axis=1)
    return actions


def blend(old: FloatArray, new: FloatArray, steps: int) -> FloatArray:
    """Cross-fade the first `steps` rows from `old` to `new`: row j weighs the new one (j + 1) / (steps + 1).

    `old` has at least min(steps, len(new)) rows. Returns a new array of new's shape.
    """
    count = min(steps, len(new))
    weight = (np.arange(1, count + 1) / (steps + 1))[:, None]
    blended = new.copy()
    blended[:count] = (1.0 - weight) * old[:count] + weight * new[:count]
    return blended
