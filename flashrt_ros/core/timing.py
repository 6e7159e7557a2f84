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
