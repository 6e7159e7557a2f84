"""uvicorn with the limits it lacks: a time for a request's head, sockets of a bounded number."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import OptionError
from .settings import ServerSettings

logger = logging.getLogger(__name__)

GRACE_S = 5
LAST_ANSWERS_S = 2.0  # so long it is said that the GPU is lost before the process ends
MAX_HEAD_BYTES = 32 * 1024
MAX_HTTP_CONNECTIONS = 448  # beside the websockets: together half of the usual limit of open files


class TimedProtocol(H11Protocol):
    """Closes a connection whose request line and headers are not complete in time.

    uvicorn's own timer runs between requests only, so that a client could hold a socket for ever by sending
    its headers one byte at a time.
    """

    head_timeout_s = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        between_requests = self.timeout_keep_alive_task is not None
        super().data_received(data)
        if between_requests and self.timeout_keep_alive_task is None:
            self._await_head()
        self._head_may_be_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._too_slow)

    def _head_may_be_complete(self) -> None:
        # a cycle that is not complete is a request under way; a websocket has taken the transport over
        if (self.cycle is not None and not self.cycle.response_complete) or (
            self.transport.get_protocol() is not self
        ):
            self._stop_timer()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing() and self.transport.get_protocol() is self:
            address = f"{self.client[0]}:{self.client[1]}" if self.client else "unknown"
            logger.warning("%s: no complete request within %g s: closed", address, self.head_timeout_s)
            self.transport.close()


def uvicorn_config(app: FastAPI, settings: ServerSettings, **options: Any) -> uvicorn.Config:
    """Configuration of the server for `app`; options: uvicorn's own, such as host, port and TLS files."""
    protocol = type("Protocol", (TimedProtocol,), {"head_timeout_s": settings.receive_timeout_s})
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol,
        ws="websockets-sansio",
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        limit_concurrency=settings.max_connections + MAX_HTTP_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        **options,
    )


def listen(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OptionError when the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OptionError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): is another server running?"
        ) from error
    # asyncio sets it on sockets that it opened itself; without, an answer's second packet waits 40 ms
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def serve(app: FastAPI, settings: ServerSettings, sock: socket.socket) -> None:
    """Serve on a socket of `listen` until SIGINT or SIGTERM; the app's worker is closed at the end.

    Raises DeviceLostError LAST_ANSWERS_S after the policy did: only a new process has the GPU back.
    """
    host = sock.getsockname()[0]
    if host not in ("127.0.0.1", "::1") and settings.token is None:
        logger.warning("%s can be reached from other machines and no token is set: anyone may ask", host)
    server, worker = uvicorn.Server(uvicorn_config(app, settings)), app.state.service.worker

    def end() -> None:
        server.should_exit = True

    def end_soon() -> None:
        threading.Timer(LAST_ANSWERS_S, end).start()

    worker.on_lost = end_soon
    server.run(sockets=[sock])
    if worker.lost is not None:
        raise worker.lost
