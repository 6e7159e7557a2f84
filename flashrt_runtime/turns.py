"""One caller at a time, and a turn for everybody who waits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from .errors import ReentryError

LONGEST_COURTESY_S = 0.1  # for a thread that waits no more, which an interrupt may leave written down
LOOK_S = 1e-4


class Turns:
    """A lock for `with turns.one():` whose last holder lets those who wait go first: a loop that takes a
    `threading.Lock` again and again (a calibration) keeps it, as it is back before anybody has woken.

    Its holder is refused with ReentryError, where a lock would wait for itself for ever. What excludes is
    a lock alone: an interrupt at any place costs courtesy and nothing else.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[int] = set()  # threads
        self._holder: int | None = None
        self._last: int | None = None

    def locked(self) -> bool:
        """Whether somebody has the turn."""
        return self._lock.locked()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A turn. Raises ReentryError inside one of this thread's."""
        me = threading.get_ident()
        if self._holder == me and self._lock.locked():
            raise ReentryError(
                "the policy was called by the thread that is inside a call of it, as a signal handler or a "
                "callback may: call it when the first call has returned, or from another thread"
            )
        try:
            if self._last == me:
                self._let_others(me)
            self._waiting.add(me)
            with self._lock:
                self._waiting.discard(me)
                self._holder = self._last = me
                try:
                    yield
                finally:
                    self._holder = None
        finally:
            self._waiting.discard(me)

    def _let_others(self, me: int) -> None:
        """Until one of those who wait has had the lock."""
        until = time.monotonic() + LONGEST_COURTESY_S
        while self._last == me and self._waiting - {me} and time.monotonic() < until:
            time.sleep(LOOK_S)
