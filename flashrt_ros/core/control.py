"""A thread that calls back at a fixed rate with absolute deadlines, so that its period does not drift."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .metrics import LatencyWindow
from .timing import to_s

_LONGEST_SLEEP_NS = 50_000_000  # a stop is noticed within this


class ControlThread:
    """Calls `callback()` every `period_ns` from a thread of its own, until `stop`.

    Deadlines are multiples of the period after the start on the monotonic clock. A deadline that has passed
    when the callback returns is skipped and counted in `missed`, never made up for in a burst. An exception
    of the callback goes to `on_error` and does not end the thread: a robot must not lose its commands to a
    bad log line.
    """

    def __init__(
        self,
        period_ns: int,
        callback: Callable[[], None],
        on_error: Callable[[Exception], None] | None = None,
        name: str = "control",
        window: int = 1000,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_start` runs first, on the thread itself (scheduling)."""
        if period_ns <= 0:
            raise ValueError(f"period must be above 0 ns, got {period_ns}")
        self.period_ns = period_ns
        self.jitter = LatencyWindow(window)  # |period - nominal| [s]
        self.duration = LatencyWindow(window)  # of the callback [s]
        self.ticks = 0
        self.missed = 0
        self.errors = 0
        self.last_error: Exception | None = None
        self.longest_gap_ns = 0
        self._callback = callback
        self._on_error = on_error
        self._on_start = on_start
        self._stop = threading.Event()
        self._next_deadline = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)

    def start(self) -> None:
        """Start; the first call comes one period later. Raises RuntimeError when started before."""
        self._next_deadline = time.monotonic_ns() + self.period_ns
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> bool:
        """End and join; False when the callback did not return within `timeout` seconds. May be called again.

        From within the callback it only asks for the end, without waiting for it.
        """
        self._stop.set()
        if self._thread.ident is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def next_deadline_ns(self) -> int:
        """When the next call is due, during a call when that one was [ns, monotonic clock]."""
        return self._next_deadline

    def _run(self) -> None:
        self._on_start()
        previous: int | None = None
        while self._wait(self._next_deadline):
            began = time.monotonic_ns()
            if previous is not None:
                self.jitter.add(to_s(abs(began - previous - self.period_ns)))
                self.longest_gap_ns = max(self.longest_gap_ns, began - previous)
            previous = began
            self.ticks += 1
            self._call()
            ended = time.monotonic_ns()
            self.duration.add(to_s(ended - began))
            self._advance(ended)

    def _advance(self, now: int) -> None:
        """Move to the first deadline that is not past."""
        self._next_deadline += self.period_ns
        if now > self._next_deadline:
            skipped = (now - self._next_deadline + self.period_ns - 1) // self.period_ns
            self._next_deadline += skipped * self.period_ns
            self.missed += skipped

    def _wait(self, deadline: int) -> bool:
        """Sleep until the deadline; False when asked to stop."""
        while not self._stop.is_set():
            left = deadline - time.monotonic_ns()
            if left <= 0:
                return True
            time.sleep(to_s(min(left, _LONGEST_SLEEP_NS)))
        return False

    def _call(self) -> None:
        try:
            self._callback()
        except Exception as error:  # see the class: the thread outlives its callback's mistakes
            self.errors += 1
            self.last_error = error
            if self._on_error is not None:
                self._on_error(error)
