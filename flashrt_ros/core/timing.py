"""Conversions between the seconds of configuration files and the int nanoseconds used everywhere else."""

from __future__ import annotations

from typing import Protocol

NS_PER_S = 1_000_000_000


class StampLike(Protocol):
    """builtin_interfaces/msg/Time, duck-typed."""

    sec: int
    nanosec: int


def to_ns(seconds: float) -> int:
    """Seconds as the nearest int nanoseconds."""
    return round(seconds * NS_PER_S)


def to_s(nanoseconds: int) -> float:
    """Nanoseconds as float seconds."""
    return nanoseconds / NS_PER_S


def stamp_to_ns(stamp: StampLike) -> int:
    """Header stamp (sec, nanosec) as nanoseconds since the epoch of its clock."""
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def period_ratio(action_period: int, control_period: int) -> int:
    """How many control ticks one action lasts.

    Both in ns. Raises ValueError unless the control rate is an integer multiple of the action rate, within
    0.1 % (periods such as 0.0333 s are rounded by hand).
    """
    if action_period <= 0 or control_period <= 0:
        raise ValueError(f"periods must be above 0, got {action_period} and {control_period} ns")
    ratio = round(action_period / control_period)
    if ratio < 1 or abs(action_period - ratio * control_period) > 1.001e-3 * action_period:
        action_rate, control_rate = NS_PER_S / action_period, NS_PER_S / control_period
        below, above = max(1, int(action_period / control_period)), int(action_period / control_period) + 1
        raise ValueError(
            f"the control rate ({control_rate:.6g} Hz) must be an integer multiple of the action rate "
            f"({action_rate:.6g} Hz): set {below * action_rate:.6g} or {above * action_rate:.6g} Hz"
        )
    return ratio
