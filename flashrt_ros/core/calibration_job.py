"""A calibration under way, as the threads that run, watch and cancel it share it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .problem import Problem
from .reasons import Reason


@dataclass
class CalibrationJob:
    """`total` observations of `source` (live, bag or dataset) are wanted, `done` have been taken.

    for_activation: it began with an activation and ends with it. obstacle: what it waits for. failed: why it
    ended without success; nothing runs any more then, and a node that needs scales commands nothing.
    """

    source: str
    total: int
    for_activation: bool = False
    done: int = 0
    obstacle: Problem | None = None
    failed: Problem | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def progress(self) -> float:
        """0..1."""
        return min(1.0, self.done / self.total)

    @property
    def problem(self) -> Problem:
        """For ~/status: the failure, what it waits for, or how far it is."""
        if self.failed is not None:
            return self.failed
        if self.obstacle is not None:
            obstacle = self.obstacle
            text = f"{self}; waiting: {obstacle.message}"
            return Problem(obstacle.reason, obstacle.stream, text)
        return Problem(Reason.CALIBRATING, "", str(self))

    def __str__(self) -> str:
        return f"calibrating from {self.source}: {self.done} of {self.total} observations"
