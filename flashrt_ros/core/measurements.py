"""What a running node measures of itself: latencies, rates and counts. Thread-safe, no dependence on ROS."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .contract_model import FloatArray
from .metrics import LatencyWindow, RateMeter
from .reasons import Reason
from .refusals import RefusedMessages
from .timing import to_s

WINDOW = 1000  # samples


class Measurements:
    """Windows of the last samples; see msg/LatencyMetrics for what each one is and its unit."""

    def __init__(self) -> None:
        self.observation_age = LatencyWindow(WINDOW)
        self.sync_wait = LatencyWindow(WINDOW)
        self.decode = LatencyWindow(WINDOW)
        self.inference = LatencyWindow(WINDOW)
        self.stamp_to_publish = LatencyWindow(WINDOW)
        self.overhead = LatencyWindow(WINDOW)
        self.seam_position = LatencyWindow(WINDOW)
        self.seam_velocity = LatencyWindow(WINDOW)
        self.chunk_rate, self.control_rate = RateMeter(), RateMeter()
        self.dropped: Counter[Reason] = Counter()  # chunks
        self.violations: Counter[Reason] = Counter()  # commands
        self.problems: Counter[Reason] = Counter()  # each time one was reported
        self.refused = RefusedMessages()

    def windows(self) -> dict[str, LatencyWindow]:
        """Every window by its name in msg/LatencyMetrics."""
        return {name: value for name, value in vars(self).items() if isinstance(value, LatencyWindow)}

    def clear(self) -> None:
        """Forget the samples (activate); the counts go on."""
        for window in self.windows().values():
            window.clear()


class SeamMeter:
    """How much commands jump where one chunk follows another. Belongs to the control thread."""

    def __init__(self, measurements: Measurements, control_period: int) -> None:
        """`control_period` [ns]."""
        self._position, self._velocity = measurements.seam_position, measurements.seam_velocity
        self._period = to_s(control_period)
        self.reset()

    def reset(self) -> None:
        """The next position is the first."""
        self._sequence = 0
        self._previous: FloatArray | None = None
        self._step: FloatArray | None = None

    def add(self, sequence: int, positions: FloatArray) -> None:
        """Positions (dof,) [rad, m] commanded this tick, of chunk `sequence`."""
        step = None if self._previous is None else positions - self._previous
        if step is not None and sequence != self._sequence:
            self._position.add(float(np.abs(step).max()))
            if self._step is not None:
                self._velocity.add(float(np.abs(step - self._step).max()) / self._period)
        self._sequence, self._previous, self._step = sequence, positions, step
