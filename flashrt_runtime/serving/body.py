"""Reading a request's body within a size, a time and a share of the server's memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import Request

from .refusals import Refusal
from .settings import ServerSettings


class BodyBudget:
    """Bytes of all bodies that are in memory; used on the event loop only."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.used = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, counted until the block is left.

        Raises Refusal: 413 too large, by its announced length or by what came; 408 too slow; 429 when other
        bodies fill the memory. Raises starlette's ClientDisconnect.
        """
        announced = request.headers.get("content-length", "0")
        self._check_size(int(announced) if announced.isdecimal() else 0)
        held = 0
        try:
            chunks = []
            try:
                async with asyncio.timeout(self.settings.receive_timeout_s):
                    async for chunk in request.stream():
                        held += len(chunk)
                        self.used += len(chunk)
                        self._check_size(held)
                        self._check_budget()
                        chunks.append(chunk)
                request.state.body_read = True
            except TimeoutError:
                raise Refusal(
                    408,
                    "body_timeout",
                    f"{held} bytes of the body after {self.settings.receive_timeout_s:g} s: send it faster",
                ) from None
            yield b"".join(chunks)
        finally:
            self.used -= held

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Count a websocket's message while it is worked on. Raises Refusal (429)."""
        self.used += count
        try:
            self._check_budget()
            yield
        finally:
            self.used -= count

    def _check_size(self, count: int) -> None:
        limit = self.settings.max_body_bytes
        if count > limit:
            raise Refusal(
                413,
                "body_too_large",
                f"more than {limit} bytes: send JPEG images, smaller ones, or raise --max-body-mb",
            )

    def _check_budget(self) -> None:
        if self.used > self.settings.max_buffered_bytes:
            raise Refusal(
                429,
                "memory_full",
                f"bodies being read hold {self.settings.max_buffered_bytes} bytes already: try again",
                retry_after_s=1.0,
            )
