"""Bounded acceleration: which speeds a joint may take next, so that it can still stop before its end.

Per control period of dt seconds a joint moves at one speed. With u = a * dt the largest change of speed, a
joint that goes on at speed s and then brakes as hard as it may covers, after n = floor(s / u) further steps,

    dt * (s + (s - u) + ... + (s - n u)) = dt * ((n + 1) s - u n (n + 1) / 2)

which must not exceed the room that is left. Solved for s, that is `stoppable_speed`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def stoppable_speed(room: FloatArray, acceleration: FloatArray, period: FloatArray | float) -> FloatArray:
    """The largest speed (…, dof) for one period [s] after which braking still ends within `room` (…, dof).

    room: distance to the end, 0 or more; acceleration: (dof,), infinite where there is no bound.
    """
    change = acceleration * period
    bounded = np.isfinite(change)
    safe = np.where(bounded, change, 1.0)
    steps = np.floor((np.sqrt(1.0 + 8.0 * room / (period * safe)) - 1.0) / 2.0)
    braking = (room / period + safe * steps * (steps + 1.0) / 2.0) / (steps + 1.0)
    result: FloatArray = np.where(bounded, braking, room / period)
    return result


def speed_bounds(
    speed: FloatArray, room_below: FloatArray, room_above: FloatArray, acceleration: FloatArray,
    period: FloatArray | float, margin: float,
) -> tuple[FloatArray, FloatArray]:
    """(lowest, highest) speed that may follow `speed` (…, dof), by acceleration and room.

    Room wins where both cannot be had: an end is harder than a jerk. `margin` (relative) keeps rounding from
    ever carrying a change over the bound.
    """
    change = acceleration * period * (1.0 - margin)
    # Stopping is planned a little more gently than allowed, so that the plan can be kept.
    gentle = acceleration * (1.0 - 2.0 * margin)
    down = -stoppable_speed(np.maximum(room_below, 0.0), gentle, period)
    up = stoppable_speed(np.maximum(room_above, 0.0), gentle, period)
    return np.clip(speed - change, down, up), np.clip(speed + change, down, up)
