"""How fast a simulated clock runs against real time.

Commands leave by the monotonic clock: an arm of metal knows no other. In a simulation that runs at half of
real time the plan plays at twice its speed, beyond its speed limits there, and nothing else would say so.
"""

from __future__ import annotations

from collections import deque

from .problem import Problem
from .reasons import Reason
from .timing import NS_PER_S

TOLERANCE = 0.05  # of real time
WINDOW = 5 * NS_PER_S
SHORTEST = 4 * NS_PER_S  # a /clock of 10 Hz is then read to 2.5 %
FASTEST = 20.0  # times real time; more is no rate but a jump
JUMP = NS_PER_S


class ClockRate:
    """The rate over the last seconds. `add` belongs to one thread, what it found may be read on any."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Measure anew."""
        self._samples: deque[tuple[int, int]] = deque()
        self.factor: float | None = None  # simulated per real time; None until it is known

    def add(self, clock_ns: int, mono_ns: int) -> None:
        """The simulated clock showed `clock_ns` at `mono_ns` of the monotonic clock. A jump begins anew."""
        samples = self._samples
        if samples:
            ahead, passed = clock_ns - samples[-1][0], mono_ns - samples[-1][1]
            if ahead < 0 or ahead > JUMP + FASTEST * passed:
                self.reset()
                samples = self._samples
        samples.append((clock_ns, mono_ns))
        while len(samples) > 2 and mono_ns - samples[1][1] >= WINDOW:
            samples.popleft()
        span = mono_ns - samples[0][1]
        self.factor = (clock_ns - samples[0][0]) / span if span >= SHORTEST else None

    @property
    def problem(self) -> Problem | None:
        """What to say of a rate that is off by more than TOLERANCE."""
        factor = self.factor
        if factor is None or abs(factor - 1.0) <= TOLERANCE:
            return None
        told = f"/clock runs at {factor:.2f} of real time, commands and limits are timed by real time"
        speed = "" if factor < 0.01 else f": in the simulation they come {1 / factor:.2f} times as fast"
        return Problem(Reason.CLOCK_RATE, "", f"{told}{speed}; have it run at real time")
