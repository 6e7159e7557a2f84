"""The fault latch: which problems keep the robot held until somebody has looked (`~/reset_fault`).

At once: an action outside a position limit where the contract rejects violations, an error of the control
callback, a second publisher on a command topic. After `max_failures` inferences in a row without a good
chunk between them: errors of the policy, chunks with a wrong shape, with values that are not finite or with
tokens that are no actions.
Everything else ends by itself when its cause does (a camera comes back, the next chunk keeps the limits),
and latches nothing.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from .problem import Problem
from .reasons import Reason

AT_ONCE = frozenset({Reason.LIMIT_POSITION, Reason.CONTROL_ERROR, Reason.COMMAND_CONFLICT})
REPEATED = frozenset({
    Reason.INFERENCE_ERROR, Reason.OUT_OF_MEMORY, Reason.CHUNK_NOT_FINITE, Reason.CHUNK_SHAPE,
    Reason.NO_STOP_TOKEN, Reason.ACTION_TOKENS,
})
DEFAULT_MAX_FAILURES = 10


class FaultLatch:
    """Remembers the first fault until `reset`. Thread-safe."""

    def __init__(self, max_failures: int = DEFAULT_MAX_FAILURES) -> None:
        """`max_failures`: failed inferences in a row that latch; at least 1."""
        self._lock = threading.Lock()
        self._fault: Problem | None = None
        self._failures = 0
        self.max_failures = max_failures

    @property
    def fault(self) -> Problem | None:
        """What is latched."""
        return self._fault

    @property
    def failures(self) -> int:
        """Failed inferences since the last good chunk or reset."""
        return self._failures

    def note(self, problem: Problem) -> Problem | None:
        """Judge a problem; returns the fault when this one latched it."""
        with self._lock:
            if problem.reason in REPEATED:
                self._failures += 1
                if self._failures >= self.max_failures:
                    text = f"{problem.message} ({self._failures} failed inferences in a row)"
                    return self._latch(replace(problem, message=text))
            return self._latch(problem) if problem.reason in AT_ONCE else None

    def chunk_accepted(self) -> None:
        """A good chunk ends a row of failures; what is latched stays."""
        self._failures = 0

    def reset(self) -> Problem | None:
        """Forget the fault and the failures; returns what was latched."""
        with self._lock:
            fault, self._fault, self._failures = self._fault, None, 0
            return fault

    def _latch(self, problem: Problem) -> Problem | None:
        if self._fault is not None:
            return None
        self._fault = replace(problem, message=f"{problem.message}; call ~/reset_fault to go on")
        return self._fault
