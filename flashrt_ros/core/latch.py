"""The fault latch: which problems keep the robot held until somebody has looked (`~/reset_fault`).

At once: an action outside a position limit where the contract rejects violations, an error of the control
callback, a second publisher on a command topic; and for good, a lost GPU. After `max_failures` inferences in
a row without a good chunk between them: errors of the policy, chunks with a wrong shape, with values that are
not finite or with tokens that are no actions.
A lost GPU goes before any other fault and the message has both: the other still waits for somebody.
Everything else ends by itself when its cause does (a camera comes back, the next chunk keeps the limits),
and latches nothing.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from .problem import Problem
from .reasons import Reason

FOR_GOOD = frozenset({Reason.DEVICE_LOST})  # nobody can reset it: another process is needed
AT_ONCE = FOR_GOOD | {Reason.LIMIT_POSITION, Reason.CONTROL_ERROR, Reason.COMMAND_CONFLICT}
REPEATED = frozenset({
    Reason.INFERENCE_ERROR, Reason.OUT_OF_MEMORY, Reason.CHUNK_NOT_FINITE, Reason.CHUNK_SHAPE,
    Reason.NO_STOP_TOKEN, Reason.ACTION_TOKENS,
})
DEFAULT_MAX_FAILURES = 10
ADVICE = "; call ~/reset_fault to go on"


class FaultLatch:
    """Remembers the first fault until `reset`, or one that is for good. Thread-safe."""

    def __init__(self, max_failures: int = DEFAULT_MAX_FAILURES) -> None:
        """`max_failures`: failed inferences in a row that latch; at least 1."""
        self._lock = threading.Lock()
        self._fault: Problem | None = None
        self._unseen: Problem | None = None
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

    @property
    def for_good(self) -> bool:
        """Whether what is latched outlives every reset."""
        fault = self._fault
        return fault is not None and fault.reason in FOR_GOOD

    @property
    def unseen(self) -> Problem | None:
        """The fault beside one for good, before or after it, that nobody can reset any more."""
        return self._unseen

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
        """Forget the fault and the failures; returns what was latched. A fault for good stays: None."""
        with self._lock:
            self._failures = 0
            if self.for_good:
                return None
            fault, self._fault = self._fault, None
            return fault

    def _latch(self, problem: Problem) -> Problem | None:
        for_good, fault = problem.reason in FOR_GOOD, self._fault
        if fault is None:
            advice = "" if for_good else ADVICE
            self._fault = replace(problem, message=f"{problem.message}{advice}")
            return self._fault
        if for_good == self.for_good or self._unseen is not None:
            return None
        last, other = (problem, fault) if for_good else (fault, problem)
        text = f"{other.reason.name} ({str(other).removesuffix(ADVICE)})"
        self._unseen = other
        self._fault = replace(last, message=f"{last.message}, but first somebody is to see to {text}")
        return self._fault
