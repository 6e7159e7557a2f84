"""Latency percentiles over a window of samples, and message rates. Thread-safe, no dependence on ROS."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .timing import NS_PER_S, to_s


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Percentiles of the samples in a window [s]; nan when there is none."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float


class LatencyWindow:
    """The last `size` durations and their percentiles (linear interpolation, as numpy.percentile)."""

    def __init__(self, size: int = 1000) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._samples = np.empty(size)
        self._count = 0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Add a duration [s]; the oldest gives way when the window is full."""
        with self._lock:
            self._samples[self._count % len(self._samples)] = seconds
            self._count += 1

    def clear(self) -> None:
        """Forget every sample."""
        with self._lock:
            self._count = 0

    @property
    def total(self) -> int:
        """Samples added since the last clear, also those that left the window."""
        return self._count

    def samples(self) -> NDArray[np.float64]:
        """A copy of the window [s], in no particular order."""
        with self._lock:
            return self._samples[: min(self._count, len(self._samples))].copy()

    def summary(self) -> LatencySummary:
        """All percentiles at once."""
        samples = self.samples()
        if not len(samples):
            return LatencySummary(0, np.nan, np.nan, np.nan, np.nan)
        p50, p95, p99 = (float(value) for value in np.percentile(samples, [50, 95, 99]))
        return LatencySummary(len(samples), p50, p95, p99, float(samples.max()))

    @property
    def p50(self) -> float:
        return self.summary().p50

    @property
    def p95(self) -> float:
        return self.summary().p95

    @property
    def p99(self) -> float:
        return self.summary().p99

    @property
    def max(self) -> float:
        return self.summary().max


class RateMeter:
    """Events per second over a sliding window."""

    def __init__(self, window_ns: int = 2 * NS_PER_S) -> None:
        self._window = window_ns
        self._times: deque[int] = deque()
        self._lock = threading.Lock()

    def tick(self, now_ns: int) -> None:
        """Count an event at `now_ns` (monotonic)."""
        with self._lock:
            self._times.append(now_ns)
            self._forget(now_ns)

    def rate(self, now_ns: int) -> float:
        """Events per second [Hz]: intervals over the time they took; falls as soon as an event is overdue."""
        with self._lock:
            self._forget(now_ns)
            if len(self._times) < 2:
                return 0.0
            intervals, span = len(self._times) - 1, self._times[-1] - self._times[0]
            # The gap since the last event counts once it is longer than two of the intervals seen.
            if (now_ns - self._times[-1]) * intervals > 2 * span:
                span = now_ns - self._times[0]
        return intervals / to_s(span) if span > 0 else 0.0

    def _forget(self, now_ns: int) -> None:
        while self._times and self._times[0] < now_ns - self._window:
            self._times.popleft()
