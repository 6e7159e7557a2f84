"""Why a request got no actions: one exception with a status, a code for programs and a text for people."""

from __future__ import annotations

import logging
import threading
import time

from ..errors import ActionError, DeviceLostError, FlashRTError

logger = logging.getLogger(__name__)

MAX_MESSAGE = 500
# The runtime's errors that tell what was wrong with an observation; every other one is the server's fault.
CLIENT_ERRORS = ("ObservationError", "PromptError", "PromptTooLongError", "OptionError")


class Refusal(Exception):
    """A request that is answered without actions.

    status: of HTTP. code: stable, for programs. message: what was expected, what came, what to do.
    retry_after_s: when trying again makes sense.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        # a client's words may be part of it: one line of the log, and not a long one
        line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(message.split()))
        self.message = line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}…"
        super().__init__(self.message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s

    def as_json(self) -> dict[str, str]:
        """The body of the answer."""
        return {"error": self.code, "detail": self.message}


def invalid(message: str) -> Refusal:
    """422: the request was understood, its content cannot be used."""
    return Refusal(422, "invalid_request", message)


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told about an exception of the model's thread; unexpected ones stay vague."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, FlashRTError):
        if type(error).__name__ in CLIENT_ERRORS:
            return Refusal(422, "invalid_observation", str(error))
        if isinstance(error, DeviceLostError):
            return Refusal(503, "device_lost", str(error))
        code = "unusable_actions" if isinstance(error, ActionError) else "policy_error"
        return Refusal(500, code, str(error))
    return Refusal(500, "internal_error", "the inference failed; the server's log says why")


class Reporter:
    """Logs each refused request once, and a flood of one kind as one line a second with a count."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self.interval_s = interval_s
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def forget(self) -> None:
        """Let the next line of every kind through."""
        with self._lock:
            self._last.clear()

    def report(self, client: str, refusal: Refusal) -> None:
        """One line: who, which status, why."""
        with self._lock:
            now = time.monotonic()
            if now - self._last.get(refusal.code, -1e9) < self.interval_s:
                self._held[refusal.code] = self._held.get(refusal.code, 0) + 1
                return
            self._last[refusal.code] = now
            held = self._held.pop(refusal.code, 0)
        level = logging.ERROR if refusal.status >= 500 else logging.WARNING
        more = f" (and {held} more since the last such line)" if held else ""
        logger.log(level, "%s: %d %s: %s%s", client, refusal.status, refusal.code, refusal.message, more)
