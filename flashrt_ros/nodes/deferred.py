"""A service whose answer comes later, from another thread, while the executor goes on.

rclpy's events executor does not await coroutines of services, and a thread that waits in a callback would
block every other callback of the node. Both executors used here send what the callback returned through
`Service.send_response`, so that is where the answer is held back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from rclpy.node import Node

from flashrt_ros.core.reasons import Reason

UNLOADED = "the policy was unloaded meanwhile"


class Refused(Exception):
    """Why a request gets no result: one of its response's CODE_*, the words, and the reason where one is
    reported."""

    def __init__(self, code: int, message: str, reason: Reason = Reason.PARAMETER_INVALID) -> None:
        self.code, self.reason = code, reason
        super().__init__(message)


class Reply:
    """The answer to one request: `send` it once, from any thread."""

    def __init__(self, transmit: Callable[[Any, Any], None], response: Any) -> None:
        self.response = response  # to be filled in
        self._transmit = transmit
        self._lock = threading.Lock()
        self._header: Any = None
        self._done = False

    def send(self) -> None:
        """Let the response go out as it is now."""
        with self._lock:
            self._done = True
            ready = self._header is not None
        if ready:
            self._transmit(self.response, self._header)

    def addressed(self, header: Any) -> None:
        """Called once by the executor: to whom the answer goes."""
        with self._lock:
            self._header = header
            ready = self._done
        if ready:
            self._transmit(self.response, header)


class DeferredService:
    """Like `create_service`, but `handler(request, reply)` has `reply.send()` called when it is time."""

    def __init__(
        self, node: Node, service_type: Any, name: str, handler: Callable[[Any, Reply], None]
    ) -> None:
        self._handler = handler
        self._service = node.create_service(service_type, name, self._call)
        self._transmit = self._service.send_response
        self._service.send_response = lambda reply, header: reply.addressed(header)

    def _call(self, request: Any, response: Any) -> Reply:
        reply = Reply(self._transmit, response)
        self._handler(request, reply)
        return reply
