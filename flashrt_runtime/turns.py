"""One caller at a time, in the order they came."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from types import TracebackType

from .errors import ReentryError


class Turns:
    """A lock for `with` that is fair: who asked first has it first, so that a loop which takes it again at
    once (a calibration) leaves a turn to everybody who waits in between. A `threading.Lock` does not.

    Its holder is refused with ReentryError, where a lock would wait for itself for ever.
    """

    def __init__(self) -> None:
        self._queue: deque[threading.Lock] = deque()  # the first has the turn, or is about to
        self._inside: set[int] = set()  # threads that have it or wait for it

    def locked(self) -> bool:
        """Whether somebody has the turn."""
        return bool(self._queue)

    def __enter__(self) -> None:
        me = threading.get_ident()
        if me in self._inside:
            raise ReentryError(
                "the policy was called by the thread that is inside a call of it, as a signal handler or a "
                "callback may: call it when the first call has returned, or from another thread"
            )
        # queue and set change in one step each: a lock around them is one that a signal handler may wait for
        self._inside.add(me)
        ticket = threading.Lock()
        ticket.acquire()
        self._queue.append(ticket)
        try:
            if self._queue[0] is not ticket:
                ticket.acquire()
        except BaseException:  # an interrupt while waiting
            self._leave(ticket)
            self._inside.discard(me)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self._queue[0])
        self._inside.discard(threading.get_ident())

    def _leave(self, ticket: threading.Lock) -> None:
        """Give the ticket up, and wake whoever is first then: that one has the turn, or has it already."""
        self._queue.remove(ticket)
        with contextlib.suppress(IndexError, RuntimeError):  # nobody waits; it was woken before
            self._queue[0].release()
